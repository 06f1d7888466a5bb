"""Dense baselines of one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.clock import Clock, Timing
from benchmarks.gpu.inputs import Layer
from benchmarks.gpu.report import say

DENSE_ROWS = 65536
"""Rows of one dense call: more would overflow 32-bit offsets."""


def dense_attention(layer: Layer) -> Callable[[], None]:
    """Dense causal attention of the chunk by cuDNN over contiguous keys and values; on a CPU by whatever is there."""
    cuda = layer.operands.query.device.type == "cuda"
    query, key, value = (x.transpose(0, 1)[None] for x in (layer.operands.query, *_contiguous(layer)))
    backends = [SDPBackend.CUDNN_ATTENTION] if cuda else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]

    def run() -> None:
        with sdpa_kernel(backends):
            for first in range(0, layer.shape.chunk, DENSE_ROWS):
                part = query[:, :, first : first + DENSE_ROWS]
                before, end = layer.shape.prefix + first, layer.shape.prefix + first + part.shape[2]
                attention = torch.nn.functional.scaled_dot_product_attention
                if before:
                    attention(part, key[:, :, :before], value[:, :, :before], enable_gqa=True)
                attention(part, key[:, :, before:end], value[:, :, before:end], is_causal=True, enable_gqa=True)

    return run


def dense_fa3(layer: Layer, clock: Clock) -> Timing | None:
    """Dense causal attention of the chunk by FlashInfer's FA3 kernel; None where that cannot run, with a word."""
    device = layer.operands.query.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from flashinfer import single_prefill_with_kv_cache
    except ImportError:
        return None
    # Causality is bottom-right aligned there, so a prefix needs no call of its own.
    work = partial(single_prefill_with_kv_cache, layer.operands.query, *_contiguous(layer), causal=True, backend="fa3")
    try:
        return clock.samples(work)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a baseline that does not compile is left out
        say(f"FlashInfer's FA3 is left out: {type(error).__name__}: {str(error)[-300:]}")
        return None


def _contiguous(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.operands.key_pool[layer.slots], layer.operands.value_pool[layer.slots]
