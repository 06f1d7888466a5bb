"""What :mod:`.fa4` gives to flash-attn-4 and takes from it, in Triton: lanes of query tiles, blocks, merging by LSE.

Floor: 2 bytes per element and lane read and written by :func:`gather`, 6 by a merging :func:`scatter`, and 8 per listed
tile by :func:`blocks`. Nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch_table import OPTIONS
from .tables import address, number
from .tiles import TileLists, TilePass
from .work_triton import PASS, lanes_of, load_rows, merged, row_of, store_rows

LANES_AT_ONCE = 32
"""Lanes of a program of :func:`gather` and :func:`scatter`."""
TILES_AT_ONCE = 256
"""Listed tiles that :func:`blocks` copies at a time."""


class Blocks(NamedTuple):
    """Lists as flash-attn-4 takes them, int32. A query tile is a sequence of one block of queries, a list a head.

    ``masked``, ``full`` [T, G, 1, n]: key tiles of the order, the ``*_count`` [T, G, 1] first ones of which are
    listed. ``bounds`` [G, T, 2]: sink and reach.
    """

    masked_count: torch.Tensor
    masked: torch.Tensor
    full_count: torch.Tensor
    full: torch.Tensor
    bounds: torch.Tensor


@triton.jit
def block_of(p_pass, LISTS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """A program's list, how many tiles it has, its lanes, and where these lie among [T, LANES, LISTS]."""
    i_tile, i_group = tl.program_id(0) // LISTS, tl.program_id(0) % LISTS
    i_list = i_group * number(p_pass, PASS.query_tiles) + i_tile
    lane_first = tl.program_id(1) * BLOCK
    o_lane = i_tile.to(tl.int64) * LANES + lane_first + tl.arange(0, BLOCK)
    count = tl.load(address(p_pass, PASS.count, tl.int32) + i_list)
    return i_group, count, o_lane, lanes_of(p_pass, i_list, lane_first, BLOCK)


@triton.jit
def gather_kernel(
    p_pass,
    p_query,
    p_lanes,
    p_lane_pos,
    stride_row,
    stride_head,
    LISTS: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some lanes of one list: query elements, and positions where the list is the tile's first."""
    i_group, count, b_at, lanes = block_of(p_pass, LISTS, LANES, BLOCK)
    o_row, b_row, b_head, m_row = lanes
    if i_group == 0:
        # A lane without a row stands before every key.
        b_pos = tl.load(address(p_pass, PASS.positions, tl.int32) + o_row, mask=m_row, other=-1)
        tl.store(p_lane_pos + b_at, b_pos)
    if count == 0:
        return
    b_query = load_rows(p_query + b_row * stride_row + b_head * stride_head, m_row, 0, BLOCK_D, HEAD_DIM)
    m_all = tl.full([BLOCK], True, tl.int1)
    store_rows(p_lanes + (b_at * LISTS + i_group) * HEAD_DIM, b_query, m_all, 0, BLOCK_D, HEAD_DIM)


@triton.jit
def blocks_kernel(p_pass, p_tile_indptr, p_masked_count, p_bounds, p_index, widest, masked_first, BLOCK: tl.constexpr):
    """One list: its full tiles, and at ``masked_first`` entries behind them the others."""
    i_list = tl.program_id(0).to(tl.int64)
    count = tl.load(address(p_pass, PASS.count, tl.int32) + i_list)
    full = tl.load(address(p_pass, PASS.full, tl.int32) + i_list)
    i_tile = i_list % number(p_pass, PASS.query_tiles)
    first = tl.load(p_tile_indptr + tl.load(address(p_pass, PASS.request, tl.int32) + i_tile))
    tl.store(p_masked_count + i_list, count - full)
    tl.store(p_bounds + i_list * 2, tl.load(address(p_pass, PASS.sink, tl.int32) + i_list))
    tl.store(p_bounds + i_list * 2 + 1, tl.load(address(p_pass, PASS.reach, tl.int32) + i_list))
    p_tiles = address(p_pass, PASS.tiles, tl.int32) + tl.load(address(p_pass, PASS.begin, tl.int32) + i_list)
    p_index += i_list * widest
    for block in tl.range(0, count, BLOCK):
        o_tile = block + tl.arange(0, BLOCK)
        m_tile = o_tile < count
        b_tile = first + tl.load(p_tiles + o_tile, mask=m_tile, other=0)
        tl.store(p_index + tl.where(o_tile < full, o_tile, o_tile - full + masked_first), b_tile, mask=m_tile)


@triton.jit
def scatter_kernel(
    p_pass,
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    value_scale,
    stride_row,
    stride_head,
    stride_lse_row,
    LISTS: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Some lanes of one list, into the rows they are of."""
    i_group, count, b_at, lanes = block_of(p_pass, LISTS, LANES, BLOCK)
    if MERGE and count == 0:
        return
    _, b_row, b_head, m_row = lanes
    b_lse_at = tl.program_id(0).to(tl.int64) * LANES + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_lse = tl.load(p_part_lse + b_lse_at, mask=m_row, other=-float("inf"))
    p_part += (b_at * LISTS + i_group) * HEAD_DIM
    b_part = load_rows(p_part, b_lse != -float("inf"), 0, BLOCK_D, HEAD_DIM).to(tl.float32) * value_scale
    p_out += b_row * stride_row + b_head * stride_head
    p_lse += b_row * stride_lse_row + b_head
    if MERGE:
        b_old_lse = tl.load(p_lse, mask=m_row, other=-float("inf"))
        b_old = load_rows(p_out, b_old_lse != -float("inf"), 0, BLOCK_D, HEAD_DIM).to(tl.float32)
        b_part, b_lse = merged(b_old, b_old_lse, b_part, b_lse)
    store_rows(p_out, b_part, m_row, 0, BLOCK_D, HEAD_DIM)
    tl.store(p_lse, b_lse, mask=m_row)


def gather(query: torch.Tensor, tile_pass: TilePass, lists: TileLists, lanes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query [T, lanes, G, D] and positions int32 [T, lanes] of the pass's lanes.

    ``query`` [batch rows, H, D]; ``lanes`` is at least those of a tile. Lanes without a row have query 0 and position
    -1; those of an empty list have any query.
    """
    (groups, tiles), head_dim = lists.sink.shape, query.shape[2]
    gathered = query.new_empty(tiles, lanes, groups, head_dim)
    positions = torch.empty(tiles, lanes, dtype=torch.int32, device=query.device)
    gather_kernel[tiles * groups, triton.cdiv(lanes, LANES_AT_ONCE)](
        row_of(tile_pass, lists),
        query,
        gathered,
        positions,
        query.stride(0),
        query.stride(1),
        **_constants(groups, lanes, head_dim),
    )
    return gathered, positions


def blocks(tile_pass: TilePass, lists: TileLists) -> Blocks:
    """The lists of a pass with the key tiles of their requests counted within the order.

    Takes memory for both parts of every list at its longest, ``8 * G * T * n`` bytes for ``n`` key tiles of the widest
    request, of which what is listed is written. Callers bound it by taking some heads at a time.
    """
    (groups, tiles), device, widest = lists.sink.shape, lists.count.device, tile_pass.keys.widest
    index = torch.empty(2, groups, tiles, 1, widest, dtype=torch.int32, device=device)
    masked_count = torch.empty_like(lists.full)
    bounds = torch.empty(groups, tiles, 2, dtype=torch.int32, device=device)
    given = row_of(tile_pass, lists), tile_pass.keys.tile_indptr, masked_count, bounds, index
    blocks_kernel[groups * tiles,](*given, widest, groups * tiles * widest, BLOCK=TILES_AT_ONCE, **OPTIONS)
    masked_count, full_count = (
        count.view(groups, tiles).transpose(0, 1)[..., None] for count in (masked_count, lists.full)
    )
    full, masked = index.transpose(1, 2)
    return Blocks(masked_count, masked, full_count, full, bounds)


def scatter(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    tile_pass: TilePass,
    lists: TileLists,
    value_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Writes attention of lanes to their rows, or merges it in; lanes that see no key have an LSE of -inf.

    ``part`` [T, lanes, G, Dv], times ``value_scale`` the output; ``part_lse`` fp32 [T, G, lanes], natural logarithm;
    ``out``, ``lse`` and ``merge`` as for :class:`.ops.Attend`.
    """
    tiles, lanes, groups, head_dim = part.shape
    scatter_kernel[tiles * groups, triton.cdiv(lanes, LANES_AT_ONCE)](
        row_of(tile_pass, lists),
        part,
        part_lse,
        out,
        lse,
        value_scale,
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        **_constants(groups, lanes, head_dim),
        MERGE=merge,
    )


def _constants(groups: int, lanes: int, head_dim: int) -> dict[str, int | bool]:
    """What compilers are told of lanes; ``lanes`` is a multiple of :data:`LANES_AT_ONCE`."""
    block_d = triton.next_power_of_2(head_dim)
    return {
        "LISTS": groups,
        "LANES": lanes,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": LANES_AT_ONCE,
        **OPTIONS,
    }
