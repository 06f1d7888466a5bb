"""What :mod:`.fa4` gives to flash-attn-4 and takes from it, in Triton: lanes of query tiles, blocks, merging by LSE.

Floor: 2 bytes per element and lane read and written by :func:`gather`, 6 by a merging :func:`scatter`, and 8 per listed
tile by :func:`blocks`. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .launch_table import OPTIONS
from .tiles import TileLists, TilePass

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
def gather_kernel(
    p_query,
    p_lanes,
    p_lane_pos,
    p_rows,
    p_row_pos,
    p_row_indptr,
    p_count,
    query_tiles,
    stride_row,
    stride_head,
    LISTS: tl.constexpr,
    SHARING: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some lanes of one list: query elements, and positions where the list is the tile's first."""
    i_tile = (tl.program_id(0) // LISTS).to(tl.int64)
    i_group = tl.program_id(0) % LISTS
    o_lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_row = tl.load(p_row_indptr + i_tile) + o_lane // SHARING
    m_row = o_row < tl.load(p_row_indptr + i_tile + 1)
    b_at = i_tile * LANES + o_lane
    if i_group == 0:
        # A lane without a row stands before every key.
        tl.store(p_lane_pos + b_at, tl.load(p_row_pos + o_row, mask=m_row, other=-1))
    if tl.load(p_count + i_group * query_tiles + i_tile) == 0:
        return
    b_row = tl.load(p_rows + o_row, mask=m_row, other=0)
    b_head = i_group * SHARING + o_lane % SHARING
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HEAD_DIM)[None, :]
    # lanes x head size
    p_elements = p_query + (b_row * stride_row + b_head * stride_head)[:, None] + o_d[None, :]
    b_query = tl.load(p_elements, mask=m_row[:, None] & m_d, other=0.0)
    tl.store(p_lanes + ((b_at * LISTS + i_group) * HEAD_DIM)[:, None] + o_d[None, :], b_query, mask=m_d)


@triton.jit
def blocks_kernel(
    p_begin,
    p_count,
    p_full,
    p_tiles,
    p_sink,
    p_reach,
    p_request,
    p_tile_indptr,
    p_masked_count,
    p_bounds,
    p_index,
    query_tiles,
    widest,
    masked_first,
    BLOCK: tl.constexpr,
):
    """One list: its full tiles, and at ``masked_first`` entries behind them the others."""
    i_list = tl.program_id(0).to(tl.int64)
    count, full = tl.load(p_count + i_list), tl.load(p_full + i_list)
    first = tl.load(p_tile_indptr + tl.load(p_request + i_list % query_tiles))
    tl.store(p_masked_count + i_list, count - full)
    tl.store(p_bounds + i_list * 2, tl.load(p_sink + i_list))
    tl.store(p_bounds + i_list * 2 + 1, tl.load(p_reach + i_list))
    p_tiles += tl.load(p_begin + i_list)
    p_index += i_list * widest
    for block in tl.range(0, count, BLOCK):
        o_tile = block + tl.arange(0, BLOCK)
        m_tile = o_tile < count
        b_tile = first + tl.load(p_tiles + o_tile, mask=m_tile, other=0)
        tl.store(p_index + tl.where(o_tile < full, o_tile, o_tile - full + masked_first), b_tile, mask=m_tile)


@triton.jit
def scatter_kernel(
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    p_rows,
    p_row_indptr,
    p_count,
    value_scale,
    query_tiles,
    stride_row,
    stride_head,
    stride_lse_row,
    LISTS: tl.constexpr,
    SHARING: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Some lanes of one list, into the rows they are of."""
    i_tile = (tl.program_id(0) // LISTS).to(tl.int64)
    i_group = tl.program_id(0) % LISTS
    if MERGE and tl.load(p_count + i_group * query_tiles + i_tile) == 0:
        return
    o_lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_row = tl.load(p_row_indptr + i_tile) + o_lane // SHARING
    m_row = o_row < tl.load(p_row_indptr + i_tile + 1)
    b_row = tl.load(p_rows + o_row, mask=m_row, other=0)
    b_head = i_group * SHARING + o_lane % SHARING
    b_lse = tl.load(p_part_lse + (i_tile * LISTS + i_group) * LANES + o_lane, mask=m_row, other=-float("inf"))
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HEAD_DIM)[None, :]
    b_at = ((i_tile * LANES + o_lane) * LISTS + i_group) * HEAD_DIM
    m_seen = (b_lse != -float("inf"))[:, None]
    b_part = tl.load(p_part + b_at[:, None] + o_d[None, :], mask=m_seen & m_d, other=0.0).to(tl.float32) * value_scale
    p_out += (b_row * stride_row + b_head * stride_head)[:, None] + o_d[None, :]
    p_lse += b_row * stride_lse_row + b_head
    if MERGE:
        b_old_lse = tl.load(p_lse, mask=m_row, other=-float("inf"))
        m_old = (b_old_lse != -float("inf"))[:, None]
        b_old = tl.load(p_out, mask=m_old & m_d, other=0.0).to(tl.float32)
        b_top = tl.maximum(b_old_lse, b_lse)
        # A row that sees no key has no maximum to subtract.
        b_top = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_old_sum, b_sum = tl.exp(b_old_lse - b_top), tl.exp(b_lse - b_top)
        b_total = b_old_sum + b_sum
        b_part = b_old * b_old_sum[:, None] + b_part * b_sum[:, None]
        m_none = b_total == 0.0
        b_total = tl.where(m_none, 1.0, b_total)
        b_part = b_part / b_total[:, None]
        b_lse = tl.where(m_none, -float("inf"), b_top + tl.log(b_total))
    tl.store(p_out, b_part.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_d)
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
        query,
        gathered,
        positions,
        tile_pass.rows,
        tile_pass.positions,
        tile_pass.indptr,
        lists.count,
        tiles,
        query.stride(0),
        query.stride(1),
        **_constants(tile_pass, groups, lanes, head_dim),
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
    blocks_kernel[groups * tiles,](
        lists.begin,
        lists.count,
        lists.full,
        lists.tiles,
        lists.sink,
        lists.reach,
        tile_pass.request,
        tile_pass.keys.tile_indptr,
        masked_count,
        bounds,
        index,
        tiles,
        widest,
        groups * tiles * widest,
        BLOCK=TILES_AT_ONCE,
        **OPTIONS,
    )
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
        part,
        part_lse,
        out,
        lse,
        tile_pass.rows,
        tile_pass.indptr,
        lists.count,
        value_scale,
        tiles,
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        **_constants(tile_pass, groups, lanes, head_dim),
        MERGE=merge,
    )


def _constants(tile_pass: TilePass, groups: int, lanes: int, head_dim: int) -> dict[str, Any]:
    """What compilers are told of lanes; ``lanes`` is a multiple of :data:`LANES_AT_ONCE`."""
    return {
        "LISTS": groups,
        "SHARING": tile_pass.sharing,
        "LANES": lanes,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK": LANES_AT_ONCE,
        **OPTIONS,
    }
