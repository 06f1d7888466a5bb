"""Tables that kernels read their memory from: rows of 64-bit numbers and addresses, made once for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl


@triton.jit
def number(p_row, FIELD: tl.constexpr):
    """A number of a table's row."""
    return tl.load(p_row + FIELD).to(tl.int32)


@triton.jit
def address(p_row, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """An address of a table's row."""
    return tl.load(p_row + FIELD).to(tl.pointer_type(DTYPE))


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host on a device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
