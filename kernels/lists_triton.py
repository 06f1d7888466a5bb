"""Tile lists in Triton: from a tile map, without waiting for the device to tell how long they are.

List ``i`` begins at entry ``i * n`` of ``n`` key tiles, so memory is ``4 * H * T * n`` bytes, four times the map's, of
which what is listed is written. Callers bound it by taking some heads at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_table import OPTIONS
from .tiles import Region, TileLists, TilePass

BLOCK = 256
"""Key tiles at a time."""


@triton.jit(do_not_specialize=["query_tiles", "tiles", "all_tiles"])
def lists_kernel(
    p_selected,
    p_key_min,
    p_key_max,
    p_tile_indptr,
    p_request,
    p_min_pos,
    p_max_pos,
    p_sink,
    p_reach,
    p_counts,
    p_full,
    p_tiles,
    query_tiles,
    tiles,
    all_tiles,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One list: counts its full tiles, then writes these and the others behind them, both ascending."""
    i_list = tl.program_id(0).to(tl.int64)
    i_tile = i_list % query_tiles
    query_min, query_max = tl.load(p_min_pos + i_tile), tl.load(p_max_pos + i_tile)
    sink, reach = tl.load(p_sink + i_list), tl.load(p_reach + i_list)
    key_first = tl.load(p_tile_indptr + tl.load(p_request + i_tile))
    p_selected += i_list * tiles
    p_tiles += i_list * tiles
    full = 0
    for WRITE in tl.static_range(2):
        at_full, at_other = 0, full
        for first in tl.range(0, tiles, BLOCK):
            o_tile = first + tl.arange(0, BLOCK)
            m_key = (o_tile < tiles) & (key_first + o_tile < all_tiles)
            m_listed = m_key & (tl.load(p_selected + o_tile, mask=m_key, other=0) != 0)
            b_min = tl.load(p_key_min + key_first + o_tile, mask=m_listed, other=0)
            b_max = tl.load(p_key_max + key_first + o_tile, mask=m_listed, other=0)
            if FAR:
                m_full = m_listed & (b_min >= sink) & (b_max <= query_min - reach)
            else:
                m_full = m_listed & (b_max <= query_min) & ((b_max < sink) | (b_min > query_max - reach))
            b_full, b_other = m_full.to(tl.int32), (m_listed & (m_full == 0)).to(tl.int32)
            if WRITE:
                tl.store(p_tiles + at_full + tl.cumsum(b_full, 0) - b_full, o_tile, mask=m_full)
                tl.store(p_tiles + at_other + tl.cumsum(b_other, 0) - b_other, o_tile, mask=b_other != 0)
            at_full += tl.sum(b_full, 0)
            at_other += tl.sum(b_other, 0)
        if WRITE:
            tl.store(p_counts + i_list, at_other)
            tl.store(p_full + i_list, full)
        full = at_full


def lists_from_map(tile_pass: TilePass, selected: torch.Tensor, sink: torch.Tensor, reach: torch.Tensor) -> TileLists:
    """See :func:`.tiles.lists_from_map`."""
    heads, query_tiles, tiles = selected.shape
    keys, device = tile_pass.keys, selected.device
    lists = heads * query_tiles
    count, full = (torch.empty(lists, dtype=torch.int32, device=device) for _ in range(2))
    listed = torch.empty(lists * tiles, dtype=torch.int32, device=device)
    lists_kernel[lists,](
        selected,
        keys.tile_min,
        keys.tile_max,
        keys.tile_indptr,
        tile_pass.request,
        tile_pass.min_pos,
        tile_pass.max_pos,
        sink,
        reach,
        count,
        full,
        listed,
        query_tiles,
        tiles,
        keys.tile_min.numel(),
        FAR=tile_pass.region is Region.FAR,
        BLOCK=BLOCK,
        **OPTIONS,
    )
    begin = torch.arange(lists, dtype=torch.int32, device=device) * tiles
    return TileLists(begin, count, full, listed, sink, reach)
