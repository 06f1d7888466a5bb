"""Block-sparse prefill attention with FlashInfer's FA3 kernel for full tiles and the Triton kernel for the others.

FlashInfer has no element masks. It computes each list's full tiles, non-causally, into buffers in the order of the
pass's rows; these are written or merged into the output by their LSE, and the Triton kernel goes on from there with the
tiles that compare positions. Lists go to FlashInfer as work items that :mod:`.flashinfer_work` fills on the device,
past FlashInfer's ``plan()``, which would plan on the host. That is an internal interface: it is used where the sources
are those that were read (:mod:`.flashinfer_sources`), and the start-up check runs it in a process of its own first.

Nothing waits for the device. Memory beyond the operands: the pass's rows of the query, output and LSE once more; page
indices of what the pass's lists can hold, 4 bytes per key, or per tile where tiles are whole pages, at most 256 MiB and
one list; and where it merges 12 bytes per element of :data:`MERGED_ROWS` rows.

Requirements on a GPU: compute capability 9.0; fp16 or bf16 queries and pool; head size 64, 128 or 256, the same for
keys and values. FlashInfer compiles its kernel for a dtype and a head size when they are first used, with nvcc.

Not timed on any device, so ``auto`` never chooses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch

from . import attend as triton_tiles
from . import flashinfer_sources
from . import flashinfer_work as work_items
from .operands import Operands
from .ops import ImplementationUnavailableError
from .tiles import TileLists, TilePass

CTA_ROWS = {64: 192, 128: 128, 256: 128}
"""Query rows of an item by head size."""

MERGED_ROWS = 4096
"""Rows that are merged at a time."""

_CAPABILITY = (9, 0)
_DTYPES = (torch.float16, torch.bfloat16)
_NO_MASK, _NHD, _NO_WINDOW, _NO_CAP = 0, 0, -1, 0.0


def unavailable(device: torch.device) -> str:
    """Why this implementation cannot run on a device, empty if it may; FlashInfer is not imported."""
    if device.type != "cuda":
        return f"it needs a CUDA device of compute capability 9.0, this is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability != _CAPABILITY:
        return f"it needs compute capability 9.0 (H100, H200), this device has {capability[0]}.{capability[1]}"
    return flashinfer_sources.problem()


def unsupported(dtype: torch.dtype, head_dim: int, head_dim_v: int | None = None) -> str:
    """Why this implementation cannot compute layers of a kind, empty if it can."""
    if dtype not in _DTYPES:
        return f"it computes in fp16 and bf16, not in {dtype}"
    if head_dim not in CTA_ROWS or head_dim_v not in {None, head_dim}:
        values = "" if head_dim_v is None else f" (values: {head_dim_v})"
        return f"it has kernels for head sizes {', '.join(map(str, CTA_ROWS))}, not for {head_dim}{values}"
    return ""


@cache
def paged_run(dtype: torch.dtype, head_dim: int) -> Callable[..., None]:
    """FlashInfer's compiled entry point for a dtype and a head size; the first time on a machine, compiles for minutes.

    Raises:
        Exception: whatever FlashInfer's compilation raises, for instance where nvcc is missing.
    """
    from flashinfer.jit import gen_batch_prefill_module

    # Query, pool, output and index dtypes; head sizes; no positional encoding, window, soft cap or fp16 reduction.
    options = (dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, False, False, False)
    run: Callable[..., None] = gen_batch_prefill_module("fa3", *options).build_and_load().paged_run
    return run


def attend(
    operands: Operands,
    tile_pass: TilePass,
    lists: TileLists,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Attention of one pass; see :class:`.ops.Attend`.

    Raises:
        ImplementationUnavailableError: the operands are of a kind that FlashInfer's kernel does not take.
    """
    reason = _refusal(operands)
    if reason:
        raise ImplementationUnavailableError(f"implementation 'flashinfer': {reason}; use 'triton'")
    if lists.tiles.numel() and tile_pass.num_tiles:
        query = operands.query
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
        part, part_lse = full_tiles(operands, tile_pass, lists, paged_run(query.dtype, query.shape[2]), processors)
        write(out, lse, tile_pass.rows, part, part_lse, merge=merge)
        lists, merge = work_items.masked_rest(lists), True
    triton_tiles.attend(operands, tile_pass, lists, out, lse, merge=merge)


def full_tiles(
    operands: Operands, tile_pass: TilePass, lists: TileLists, run: Callable[..., None], processors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a pass's rows over the full tiles of their lists.

    ``run`` is FlashInfer's entry point. Returns output [n, H, D] and LSE fp32 [n, H] to the base 2, in the order of
    ``tile_pass.rows``; 0 and -inf where a list has no full tile.
    """
    own = operands.query.index_select(0, tile_pass.rows)
    part = torch.empty_like(own)
    part_lse = torch.empty(own.shape[:2], dtype=torch.float32, device=own.device)
    size = work_items.page_size(tile_pass.keys)
    pools = work_items.pages(operands.key_pool, size), work_items.pages(operands.value_pool, size)
    cta_rows = CTA_ROWS.get(own.shape[2], min(CTA_ROWS.values()))
    scale = operands.scale * operands.key_scale
    for work in work_items.launches(tile_pass, lists, cta_rows=cta_rows, processors=processors):
        # The float workspace and the three arrays beside the page indices are not read.
        unread = work.kv_indices
        buffers = (work.workspace, work.workspace, work.plan_info, own, *pools, unread, unread, work.kv_indices, unread)
        # No prefix lengths, token positions, item lengths and value scales by head.
        extras = (None, None, None, None, _NO_CAP, scale, operands.value_scale, 0)
        run(*buffers, part, part_lse, _NO_MASK, _NHD, _NO_WINDOW, False, *extras)
    return part, part_lse


def write(
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Writes attention ``part`` [n, H, D] to ``rows`` of ``out`` and ``lse``, or merges it in.

    ``part_lse`` [n, H] is to the base 2, ``lse`` [batch rows, H] the natural logarithm.
    """
    part_lse = part_lse * math.log(2)
    if not merge:
        out.index_copy_(0, rows, part)
        lse.index_copy_(0, rows, part_lse)
        return
    for first in range(0, rows.numel(), MERGED_ROWS):
        block = slice(first, first + MERGED_ROWS)
        own, new_lse = rows[block], part_lse[block]
        old_lse = lse.index_select(0, own)
        total = torch.logaddexp(old_lse, new_lse)
        # Where neither saw a key both shares are exp(NaN).
        old_share, new_share = (torch.exp(x - total).nan_to_num_(0.0)[..., None] for x in (old_lse, new_lse))
        merged = out.index_select(0, own).float().masked_fill_(old_share == 0, 0.0)
        merged.mul_(old_share).add_(part[block].float().mul_(new_share))
        out.index_copy_(0, own, merged.to(out.dtype))
        lse.index_copy_(0, own, total)


def _refusal(operands: Operands) -> str:
    """Why FlashInfer's kernel does not take some operands, empty if it does."""
    query, key_pool, value_pool = operands.query, operands.key_pool, operands.value_pool
    reason = unsupported(query.dtype, query.shape[2], value_pool.shape[2])
    if reason:
        return reason
    if key_pool.dtype != query.dtype or value_pool.dtype != query.dtype:
        return f"the pool must be in the dtype of the query, {query.dtype}, got {key_pool.dtype}, {value_pool.dtype}"
    if key_pool.stride() != value_pool.stride():
        return f"keys and values must have the same strides, got {key_pool.stride()}, {value_pool.stride()}"
    # Keys are read 16 bytes at a time.
    aligned = all(stride % 8 == 0 for stride in key_pool.stride()[:2]) and key_pool.stride(2) == 1
    if not aligned or key_pool.data_ptr() % 16 or value_pool.data_ptr() % 16:
        return f"heads of the pool must begin at multiples of 16 bytes, got strides {key_pool.stride()}"
    return ""
