"""Integers that the host computes for a forward, in one buffer: they reach the device in one copy.

A copy from pageable memory waits for the device, and every copy is a call of the driver.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 16
"""Parts begin at multiples of so many elements, those of the Rust plan too: at an address as a tensor of its own has.

Triton compiles a kernel anew for pointers that are aligned differently.
"""


@dataclass(frozen=True)
class Uploaded:
    """The buffer on the device, in both widths: a part is ``int32[part]`` or ``int64[part]``."""

    int32: torch.Tensor
    int64: torch.Tensor


class Packer:
    """Collects arrays on the host and uploads them together."""

    def __init__(self) -> None:
        self._arrays: list[tuple[slice, npt.NDArray[np.integer]]] = []
        self._end = 0

    def add(self, values: npt.NDArray[np.integer]) -> slice:
        """Appends an array of one dimension whose values fit int32; returns its part of the buffer."""
        part = slice(self._end, self._end + values.size)
        self._arrays.append((part, values))
        self._end = -(-part.stop // ALIGNMENT) * ALIGNMENT
        return part

    def upload(self, device: torch.device) -> Uploaded:
        """Copies what was added to the device and widens it there; waits for nothing.

        The allocator of pinned memory keeps the buffer until the copy is done.
        """
        buffer = torch.empty(self._end, dtype=torch.int32, pin_memory=device.type != "cpu")
        on_host = buffer.numpy()
        for part, values in self._arrays:
            on_host[part] = values
        uploaded = buffer.to(device, non_blocking=True)
        return Uploaded(uploaded, uploaded.long())
