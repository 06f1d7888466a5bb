"""Page indices for FlashInfer's kernel, in Triton: what lists hold and nothing else; see :mod:`.flashinfer_work`.

Floor: 4 bytes per listed key written and 8 read (its slot), or per listed tile where tiles are whole pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_table import OPTIONS
from .tiles import TileLists, TilePass

BLOCK = 1024
"""Page indices a program writes at a time."""
PARTS = 8
"""Programs of a list."""


@triton.jit
def fill_kernel(  # type: ignore[no-untyped-def]
    p_order,
    p_start,
    p_begin,
    p_full,
    p_request,
    p_tile_indptr,
    p_tiles,
    p_slots,
    p_held,
    first,
    window,
    query_tiles,
    TILE_KEYS: tl.constexpr,
    PER_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A part of the list that is packed as number ``program_id(0)``, if it begins in the window."""
    start = tl.load(p_start + tl.program_id(0)) - first
    if (start < 0) | (start >= window):
        return
    i_list = tl.load(p_order + tl.program_id(0))
    count = tl.load(p_full + i_list) * PER_TILE
    p_tiles += tl.load(p_begin + i_list)
    p_held += start * PER_TILE
    tile_first = tl.load(p_tile_indptr + tl.load(p_request + i_list % query_tiles)).to(tl.int64)
    for block in tl.range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        o_index = block + tl.arange(0, BLOCK)
        m_index = o_index < count
        b_tile = tl.load(p_tiles + o_index // PER_TILE, mask=m_index, other=0)
        b_slot = tl.load(p_slots + (tile_first + b_tile) * TILE_KEYS + o_index % PER_TILE, mask=m_index, other=0)
        tl.store(p_held + o_index, b_slot.to(tl.int32), mask=m_index)


def fill(
    tile_pass: TilePass,
    lists: TileLists,
    order: torch.Tensor,
    start: torch.Tensor,
    first: int,
    window: int,
    held: torch.Tensor,
) -> None:
    """Arguments as in :func:`.flashinfer_work.fill`; ``order`` and ``start`` are those of its packed lists."""
    keys = tile_pass.keys
    fill_kernel[order.numel(), PARTS](
        order,
        start,
        lists.begin,
        lists.full,
        tile_pass.request,
        keys.tile_indptr,
        lists.tiles,
        keys.slots,
        held,
        first,
        window,
        tile_pass.num_tiles,
        TILE_KEYS=keys.tile_keys,
        PER_TILE=1 if keys.contiguous else keys.tile_keys,
        BLOCK=BLOCK,
        **OPTIONS,
    )
