"""Block-sparse prefill attention in Triton: one program per (head, query tile) list, over the paged pool.

Rows and keys are addressed through the pass (``rows``, ``slots``), so nothing is permuted or copied. A list's full
tiles come first and skip the position compare. The second pass of a layer merges, in its epilogue, with what the first
one left.

Floor per listed tile of M rows and N keys: ``2 * M * N * (D + Dv)`` FLOPs, and ``N * (D + Dv)`` elements of the pool
plus ``8 * N`` bytes of slots (and ``4 * N`` of positions for a tile that compares them).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .tiles import Region, TileLists, TilePass


@triton.jit
def attend_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    p_lse,
    p_rows,
    p_row_pos,
    p_row_indptr,
    p_request,
    p_slots,
    p_key_pos,
    p_tile_indptr,
    p_order,
    p_indptr,
    p_tiles,
    p_full,
    p_sink,
    p_reach,
    scale_log2,
    query_tiles,
    stride_query_row,
    stride_query_head,
    stride_key_slot,
    stride_key_head,
    stride_value_slot,
    stride_value_head,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAR: tl.constexpr,
    MERGE: tl.constexpr,
):
    """Online softmax over one list; the names of its arguments are those of the pass and the lists."""
    i_list = tl.load(p_order + tl.program_id(0))
    i_head = i_list // query_tiles
    i_tile = i_list % query_tiles

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    row_first = tl.load(p_row_indptr + i_tile)
    m_row = o_m < tl.load(p_row_indptr + i_tile + 1) - row_first
    b_row = tl.load(p_rows + row_first + o_m, mask=m_row, other=0).to(tl.int64)
    # A lane without a row stands before every key, so it sees none.
    b_pos = tl.load(p_row_pos + row_first + o_m, mask=m_row, other=-1)
    # rows x head size
    b_query = tl.load(
        p_query + b_row[:, None] * stride_query_row + i_head * stride_query_head + o_d[None, :],
        mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :],
        other=0.0,
    )

    p_key += (i_head // GROUP).to(tl.int64) * stride_key_head
    p_value += (i_head // GROUP).to(tl.int64) * stride_value_head
    tile_first = tl.load(p_tile_indptr + tl.load(p_request + i_tile)).to(tl.int64)
    begin = tl.load(p_indptr + i_list)
    middle = begin + tl.load(p_full + i_list)
    end = tl.load(p_indptr + i_list + 1)
    if MERGE and begin == end:
        return

    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for entry in tl.range(begin, middle):
        b_key_index = (tile_first + tl.load(p_tiles + entry)) * BLOCK_N + o_n
        b_slot = tl.load(p_slots + b_key_index).to(tl.int64)
        # head size x keys
        b_key = tl.load(
            p_key + b_slot[None, :] * stride_key_slot + o_d[:, None], mask=(o_d < HEAD_DIM)[:, None], other=0.0
        )
        b_score = tl.dot(b_query, b_key) * scale_log2
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        b_weight = tl.exp2(b_score - b_new_max[:, None])
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        # keys x head size
        b_value = tl.load(
            p_value + b_slot[:, None] * stride_value_slot + o_dv[None, :],
            mask=(o_dv < HEAD_DIM_V)[None, :],
            other=0.0,
        )
        b_acc = tl.dot(b_weight.to(b_value.dtype), b_value, b_acc * b_decay[:, None])
        b_max = b_new_max

    b_sink = tl.load(p_sink + i_list)
    b_far_edge = b_pos - tl.load(p_reach + i_list)
    for entry in tl.range(middle, end):
        b_key_index = (tile_first + tl.load(p_tiles + entry)) * BLOCK_N + o_n
        b_slot = tl.load(p_slots + b_key_index).to(tl.int64)
        b_key_pos = tl.load(p_key_pos + b_key_index)
        b_key = tl.load(
            p_key + b_slot[None, :] * stride_key_slot + o_d[:, None], mask=(o_d < HEAD_DIM)[:, None], other=0.0
        )
        b_score = tl.dot(b_query, b_key) * scale_log2
        if FAR:
            m_see = (b_key_pos >= b_sink)[None, :] & (b_key_pos[None, :] <= b_far_edge[:, None])
        else:
            m_see = (b_key_pos < b_sink)[None, :] | (b_key_pos[None, :] > b_far_edge[:, None])
            m_see = m_see & (b_key_pos[None, :] <= b_pos[:, None])
        b_score = tl.where(m_see, b_score, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        # A row that has seen no key yet has no maximum to subtract.
        b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_weight = tl.exp2(b_score - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_value = tl.load(
            p_value + b_slot[:, None] * stride_value_slot + o_dv[None, :],
            mask=(o_dv < HEAD_DIM_V)[None, :],
            other=0.0,
        )
        b_acc = tl.dot(b_weight.to(b_value.dtype), b_value, b_acc * b_decay[:, None])
        b_max = b_new_max

    m_seen = b_sum > 0
    b_out = b_acc / tl.where(m_seen, b_sum, 1.0)[:, None]
    # Natural logarithm: ln(2) = 0.693...
    b_lse = tl.where(m_seen, (b_max + tl.log2(tl.where(m_seen, b_sum, 1.0))) * 0.6931471805599453, -float("inf"))
    o_out = b_row[:, None] * stride_out_row + i_head * stride_out_head + o_dv[None, :]
    m_out = m_row[:, None] & (o_dv < HEAD_DIM_V)[None, :]
    o_lse = b_row * stride_lse_row + i_head
    if MERGE:
        b_old_lse = tl.load(p_lse + o_lse, mask=m_row, other=-float("inf"))
        b_old = tl.load(p_out + o_out, mask=m_out, other=0.0).to(tl.float32)
        b_top = tl.maximum(b_lse, b_old_lse)
        b_top = tl.where(b_top == -float("inf"), 0.0, b_top)
        b_new_share = tl.exp(b_lse - b_top)
        b_old_share = tl.exp(b_old_lse - b_top)
        b_total = b_new_share + b_old_share
        m_any = b_total > 0
        b_total = tl.where(m_any, b_total, 1.0)
        b_out = (b_out * b_new_share[:, None] + b_old * b_old_share[:, None]) / b_total[:, None]
        b_lse = tl.where(m_any, b_top + tl.log(b_total), -float("inf"))
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
    tl.store(p_lse + o_lse, b_lse, mask=m_row)


def attend(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    tile_pass: TilePass,
    lists: TileLists,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Attention of one pass; arguments as in :func:`.reference.attend`."""
    heads, head_dim = query.shape[1:]
    keys = tile_pass.keys
    warps, stages = launch_options(head_dim, tile_pass.tile_queries, keys.tile_keys, query.element_size())
    attend_kernel[(lists.order.numel(),)](
        query,
        key_pool,
        value_pool,
        out,
        lse,
        tile_pass.rows,
        tile_pass.positions,
        tile_pass.indptr,
        tile_pass.request,
        keys.slots,
        keys.positions,
        keys.tile_indptr,
        lists.order,
        lists.indptr,
        lists.tiles,
        lists.full,
        lists.sink,
        lists.reach,
        scale * math.log2(math.e),
        tile_pass.num_tiles,
        query.stride(0),
        query.stride(1),
        key_pool.stride(0),
        key_pool.stride(1),
        value_pool.stride(0),
        value_pool.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        GROUP=heads // key_pool.shape[1],
        HEAD_DIM=head_dim,
        HEAD_DIM_V=value_pool.shape[2],
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_DV=triton.next_power_of_2(value_pool.shape[2]),
        BLOCK_M=tile_pass.tile_queries,
        BLOCK_N=keys.tile_keys,
        FAR=tile_pass.region is Region.FAR,
        MERGE=merge,
        num_warps=warps,
        num_stages=stages,
    )


def launch_options(head_dim: int, tile_queries: int, tile_keys: int, element_size: int) -> tuple[int, int]:
    """Warps and pipeline stages: as many stages as keep the operands within the smallest shared memory (99 KiB)."""
    warps = 8 if tile_queries >= 128 else 4
    width = triton.next_power_of_2(head_dim)
    per_stage = 2 * tile_keys * width * element_size
    free = 99 * 1024 - tile_queries * width * element_size
    return warps, max(1, min(3, free // per_stage))
