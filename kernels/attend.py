"""Block-sparse prefill attention in Triton: a program per list and sub-tile of its query tile's lanes.

Keys and values lie in the order of the pass, contiguous by head (:meth:`.operands.Operands.in_order`), so a key tile is
a block of memory. Rows are addressed through the pass, so nothing of the query or the output is copied. A list's full
tiles come first and skip the position compare. A program takes ``BLOCK_M`` lanes of the query tile and ``BLOCK_N`` keys
of a key tile at a time, as :mod:`.launch_table` says for the device; where that has them, keys and values come through
tensor descriptors (TMA). Later passes of a layer start from what those before them left, so that merging costs one read
of the output.

In which order lists start is told by :mod:`.work_triton`; the rests of long ones, which are programs of their own, are
merged by :func:`join_kernel`.

Floor per listed tile of M lanes and N keys: ``2 * M * N * (D + Dv)`` FLOPs, and per sub-tile ``N * (D + Dv)`` elements
(and ``4 * N`` bytes of positions for a tile that compares them). docs/kernels.md has what that means on a device.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import work_triton
from .launch_table import OPTIONS, Launch, device_architecture, fitted, lookup
from .operands import Operands
from .tables import address, number
from .tiles import Region, TileLists, TilePass
from .work_triton import PASS, lanes_of, load_rows, merged, store_rows

JOINED = 8
"""Lanes of which a program joins the pieces."""


@triton.jit
def load_keys(
    p_block,
    i_key,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Columns ``FIRST`` to ``FIRST + WIDTH`` of ``BLOCK_N`` keys or values from ``i_key`` on: [keys, columns].

    ``p_block`` is a pointer to the head's first key, or a descriptor of all heads' keys behind one another.
    """
    o_d = FIRST + tl.arange(0, WIDTH)
    if DESCRIPTORS:
        b_block = p_block.load([i_key, FIRST])
    else:
        o_at = tl.arange(0, BLOCK_N)[:, None] * HEAD_DIM + o_d[None, :]
        p_key = p_block + i_key.to(tl.int64) * HEAD_DIM + o_at
        if FIRST + WIDTH > HEAD_DIM:
            b_block = tl.load(p_key, mask=(o_d < HEAD_DIM)[None, :], other=0.0)
        else:
            b_block = tl.load(p_key)
    return b_block


@triton.jit(do_not_specialize=["keys"])
def attend_kernel(
    p_query,
    p_key,
    p_value,
    p_out,
    p_lse,
    p_passes,
    p_key_pos,
    p_tile_indptr,
    p_piece_out,
    p_piece_lse,
    scale_log2,
    value_scale,
    keys,
    stride_query_row,
    stride_query_head,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REST_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB_TILES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FAR: tl.constexpr,
    MERGE: tl.constexpr,
    IN_PIECES: tl.constexpr,
):
    """A list, or with ``IN_PIECES`` a part of one, and one sub-tile of its lanes.

    ``p_passes``: a row of :data:`.work_triton.PASS` for each pass; where there are several, what has no tiles is
    another one's to write. Head sizes that are no power of two come in two blocks, ``BLOCK_D`` and ``REST_D`` wide,
    instead of padded. ``keys``: from a head's first one in ``p_key`` and ``p_value`` to the next one's; these are
    pointers or those of :func:`describe`.
    """
    # Sub-tiles of a list start together, so that what they read twice comes from L2.
    i_work = tl.program_id(0) // SUB_TILES
    p_pass = p_passes + tl.program_id(1) * PASS.width
    query_tiles, pieces = number(p_pass, PASS.query_tiles), number(p_pass, PASS.pieces)
    if i_work >= number(p_pass, PASS.lists) + pieces:
        return
    i_list = tl.load(address(p_pass, PASS.order, tl.int32) + i_work)
    first, until = 0, tl.load(address(p_pass, PASS.count, tl.int32) + i_list)
    is_piece = False
    if IN_PIECES:
        first = tl.load(address(p_pass, PASS.first, tl.int32) + i_work)
        until = tl.load(address(p_pass, PASS.until, tl.int32) + i_work)
        is_piece = i_work < pieces
    lane_first = tl.program_id(0) % SUB_TILES * BLOCK_M
    o_row, b_row, b_head, m_row = lanes_of(p_pass, i_list, lane_first, BLOCK_M)
    if (MERGE or is_piece or tl.num_programs(1) > 1) and first == until:
        return
    if tl.sum(m_row.to(tl.int32), 0) == 0:
        return

    # A lane without a row stands before every key, so it sees none.
    b_pos = tl.load(address(p_pass, PASS.positions, tl.int32) + o_row, mask=m_row, other=-1)
    # lanes x head size
    p_query += b_row * stride_query_row + b_head * stride_query_head
    b_query = load_rows(p_query, m_row, 0, BLOCK_D, HEAD_DIM)
    b_query_rest = b_query
    if REST_D > 0:
        b_query_rest = load_rows(p_query, m_row, BLOCK_D, REST_D, HEAD_DIM)

    i_kv = i_list // query_tiles * number(p_pass, PASS.sharing) // GROUP
    head_first = 0
    if DESCRIPTORS:
        head_first = i_kv * keys
    else:
        p_key += i_kv.to(tl.int64) * keys * HEAD_DIM
        p_value += i_kv.to(tl.int64) * keys * HEAD_DIM_V
    tile_first = tl.load(p_tile_indptr + tl.load(address(p_pass, PASS.request, tl.int32) + i_list % query_tiles))
    p_tiles = address(p_pass, PASS.tiles, tl.int32) + tl.load(address(p_pass, PASS.begin, tl.int32) + i_list)
    full = tl.minimum(tl.maximum(tl.load(address(p_pass, PASS.full, tl.int32) + i_list), first), until)
    sink = tl.load(address(p_pass, PASS.sink, tl.int32) + i_list)
    reach = tl.load(address(p_pass, PASS.reach, tl.int32) + i_list)

    p_out += b_row * stride_out_row + b_head * stride_out_head
    p_lse += b_row * stride_lse_row + b_head
    b_acc_rest = b_pos
    if MERGE:
        # What earlier passes left is a softmax over their keys: it goes on from there.
        m_old = m_row & (is_piece == 0)
        b_max = tl.load(p_lse, mask=m_old, other=-float("inf")) * 1.4426950408889634
        m_old = b_max != -float("inf")
        b_sum = tl.where(m_old, 1.0, 0.0)
        b_acc = load_rows(p_out, m_old, 0, BLOCK_DV, HEAD_DIM_V).to(tl.float32) / value_scale
        if REST_DV > 0:
            b_acc_rest = load_rows(p_out, m_old, BLOCK_DV, REST_DV, HEAD_DIM_V).to(tl.float32) / value_scale
    else:
        b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if REST_DV > 0:
            b_acc_rest = tl.zeros([BLOCK_M, REST_DV], tl.float32)
    PARTS: tl.constexpr = TILE_KEYS // BLOCK_N
    DTYPE: tl.constexpr = b_query.dtype
    b_far_edge = b_pos - reach
    for MASKED in tl.static_range(2):
        p_listed = p_tiles + MASKED * full + (1 - MASKED) * first
        count = MASKED * (until - full) + (1 - MASKED) * (full - first)
        for step in tl.range(0, count * PARTS):
            key_first = (tile_first + tl.load(p_listed + step // PARTS)) * TILE_KEYS + (step % PARTS) * BLOCK_N
            i_key = head_first + key_first
            # keys x head size
            b_key = load_keys(p_key, i_key, 0, BLOCK_D, HEAD_DIM, BLOCK_N, DESCRIPTORS)
            b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
            if REST_D > 0:
                b_key = load_keys(p_key, i_key, BLOCK_D, REST_D, HEAD_DIM, BLOCK_N, DESCRIPTORS)
                b_score = tl.dot(b_query_rest, tl.trans(b_key), b_score, input_precision="ieee")
            if MASKED:
                b_key_pos = tl.load(p_key_pos + key_first + tl.arange(0, BLOCK_N))
                if FAR:
                    m_see = (b_key_pos >= sink)[None, :] & (b_key_pos[None, :] <= b_far_edge[:, None])
                else:
                    m_see = (b_key_pos < sink)[None, :] | (b_key_pos[None, :] > b_far_edge[:, None])
                    m_see = m_see & (b_key_pos[None, :] <= b_pos[:, None])
                b_score = tl.where(m_see, b_score, -float("inf"))
            # The scale is positive, so the largest score stays the largest, and scaling is fused with the subtraction.
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * scale_log2)
            b_shift = b_new_max
            if MASKED:
                # A row that has seen no key yet has no maximum to subtract.
                b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
            b_weight = tl.exp2(b_score * scale_log2 - b_shift[:, None])
            b_decay = tl.exp2(b_max - b_shift)
            b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
            b_max = b_new_max
            b_weight = b_weight.to(DTYPE)
            b_value = load_keys(p_value, i_key, 0, BLOCK_DV, HEAD_DIM_V, BLOCK_N, DESCRIPTORS)
            b_acc = tl.dot(b_weight, b_value, b_acc * b_decay[:, None], input_precision="ieee")
            if REST_DV > 0:
                b_value = load_keys(p_value, i_key, BLOCK_DV, REST_DV, HEAD_DIM_V, BLOCK_N, DESCRIPTORS)
                b_acc_rest = tl.dot(b_weight, b_value, b_acc_rest * b_decay[:, None], input_precision="ieee")

    m_seen = b_sum > 0
    b_sum = tl.where(m_seen, b_sum, 1.0)
    b_share = (value_scale / b_sum)[:, None]
    b_acc *= b_share
    if REST_DV > 0:
        b_acc_rest *= b_share
    # Natural logarithm: ln(2) = 0.693...
    b_lse = tl.where(m_seen, (b_max + tl.log2(b_sum)) * 0.6931471805599453, -float("inf"))
    if is_piece:
        lane_first += (number(p_pass, PASS.piece_first) + i_work) * SUB_TILES * BLOCK_M
        o_lane = lane_first.to(tl.int64) + tl.arange(0, BLOCK_M)
        p_out = p_piece_out + o_lane * HEAD_DIM_V
        p_lse = p_piece_lse + o_lane
    store_rows(p_out, b_acc, m_row, 0, BLOCK_DV, HEAD_DIM_V)
    if REST_DV > 0:
        store_rows(p_out, b_acc_rest, m_row, BLOCK_DV, REST_DV, HEAD_DIM_V)
    tl.store(p_lse, b_lse, mask=m_row)


@triton.jit
def join_kernel(
    p_out,
    p_lse,
    p_passes,
    p_piece_out,
    p_piece_lse,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
):
    """All pieces of one list into what its first part left, for some of its lanes."""
    i_piece, p_pass = tl.program_id(0), p_passes + tl.program_id(2) * PASS.width
    if i_piece >= number(p_pass, PASS.pieces):
        return
    if tl.load(address(p_pass, PASS.first, tl.int32) + i_piece) != SPLIT_TILES:
        return
    i_list = tl.load(address(p_pass, PASS.order, tl.int32) + i_piece)
    lane_first = tl.program_id(1) * BLOCK_M
    _, b_row, b_head, m_row = lanes_of(p_pass, i_list, lane_first, BLOCK_M)
    p_out += b_row * stride_out_row + b_head * stride_out_head
    p_lse += b_row * stride_lse_row + b_head
    b_out = load_rows(p_out, m_row, 0, BLOCK_DV, HEAD_DIM_V).to(tl.float32)
    b_lse = tl.load(p_lse, mask=m_row, other=-float("inf"))
    o_lane = (number(p_pass, PASS.piece_first) + i_piece).to(tl.int64) * LANES + lane_first + tl.arange(0, BLOCK_M)
    count = tl.load(address(p_pass, PASS.count, tl.int32) + i_list)
    for _ in tl.range(1, tl.cdiv(count, SPLIT_TILES)):
        b_part = load_rows(p_piece_out + o_lane * HEAD_DIM_V, m_row, 0, BLOCK_DV, HEAD_DIM_V).to(tl.float32)
        b_part_lse = tl.load(p_piece_lse + o_lane, mask=m_row, other=-float("inf"))
        b_out, b_lse = merged(b_out, b_lse, b_part, b_part_lse)
        o_lane += LANES
    store_rows(p_out, b_out, m_row, 0, BLOCK_DV, HEAD_DIM_V)
    tl.store(p_lse, b_lse, mask=m_row)


def attend(
    operands: Operands,
    tile_pass: TilePass,
    lists: TileLists,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
    launch: Launch | None = None,
) -> None:
    """Attention of one pass; see :class:`.ops.Attend`. ``launch`` replaces the launch table's entry.

    Passes that are :class:`.tiles.Started` together are attended to with the first of them.

    Raises:
        ValueError: ``launch`` asks for descriptors where there can be none.
    """
    query, keys = operands.query, tile_pass.keys
    key, value, _ = operands.in_order(keys, query.dtype)
    head_dim, head_dim_v = key.shape[2], value.shape[2]
    if launch is None:
        launch = choose(device_architecture(query.device), head_dim, head_dim_v, query.element_size())
    elif launch.descriptors and not describable(launch, head_dim, head_dim_v):
        raise ValueError(f"{launch} asks for descriptors, but heads of {head_dim} and {head_dim_v} are not one box")
    if lists.work is None:
        lists = work_triton.put(tile_pass, lists, operands.group)
    assert lists.work is not None
    started = lists.work.started
    assert started is not None
    passes = started.table.numel() // PASS.width
    if passes == 0:
        return
    launch = fitted(launch, started.lanes, keys.tile_keys)
    constants = constants_for(
        launch,
        started.lanes,
        keys.tile_keys,
        group=operands.group,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        far=tile_pass.region is Region.FAR,
        merge=merge,
        in_pieces=started.pieces > 0,
    )
    blocks = [key, value]
    if launch.descriptors:
        widths = constants["BLOCK_D"], constants["BLOCK_DV"]
        blocks = [describe(block, launch.keys, width) for block, width in zip(blocks, widths, strict=True)]
    lanes = constants["SUB_TILES"] * launch.rows
    piece_out = out.new_empty(started.pieces, lanes, head_dim_v)
    piece_lse = lse.new_empty(started.pieces, lanes)
    attend_kernel[started.programs * constants["SUB_TILES"], passes](
        query,
        *blocks,
        out,
        lse,
        started.table,
        keys.positions,
        keys.tile_indptr,
        piece_out,
        piece_lse,
        operands.scale * operands.key_scale * math.log2(math.e),
        operands.value_scale,
        key.stride(0) // head_dim,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        **constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **OPTIONS,
    )
    if started.pieces:
        join_kernel[started.pieces, lanes // JOINED, passes](
            out,
            lse,
            started.table,
            piece_out,
            piece_lse,
            out.stride(0),
            out.stride(1),
            lse.stride(0),
            HEAD_DIM_V=head_dim_v,
            BLOCK_DV=max(16, triton.next_power_of_2(head_dim_v)),
            BLOCK_M=JOINED,
            LANES=lanes,
            SPLIT_TILES=work_triton.SPLIT,
            **OPTIONS,
        )


def choose(architecture: int, head_dim: int, head_dim_v: int, element_size: int) -> Launch:
    """The table's entry, without descriptors where they do not suit these heads."""
    launch = lookup(architecture, max(head_dim, head_dim_v), element_size)
    return launch._replace(descriptors=launch.descriptors and describable(launch, head_dim, head_dim_v))


def describable(launch: Launch, *head_dims: int) -> bool:
    """Whether heads of these sizes can be read through descriptors: a descriptor has boxes of one width.

    So a head that comes in two blocks must have two of the same width: those of 80 and 96 cannot. TMA wants rows of
    16-bit elements to begin at multiples of 16 bytes.
    """
    blocks = (head_blocks(size, split=launch.split) for size in head_dims)
    return all(rest in (0, block) for block, rest in blocks) and not any(size % 8 for size in head_dims)


def describe(block: torch.Tensor, keys: int, width: int) -> TensorDescriptor:
    """Keys or values [KV heads, n, D] and what lies between heads as [rows, D], in boxes of ``width`` by ``keys`` rows.

    Making one takes 2 to 3 us of the host and no memory of the device, so none is kept. Columns behind a head's last
    one are read as 0.
    """
    heads, own, size = block.shape
    rows = (heads - 1) * (block.stride(0) // size) + own
    return TensorDescriptor(block.as_strided((rows, size), (size, 1)), [rows, size], [size, 1], [keys, width])


def constants_for(
    launch: Launch,
    lanes: int,
    tile_keys: int,
    *,
    group: int,
    head_dim: int,
    head_dim_v: int,
    far: bool,
    merge: bool,
    in_pieces: bool = False,
) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    block_d, rest_d = head_blocks(head_dim, split=launch.split)
    block_dv, rest_dv = head_blocks(head_dim_v, split=launch.split)
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": block_d,
        "REST_D": rest_d,
        "BLOCK_DV": block_dv,
        "REST_DV": rest_dv,
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.keys,
        "SUB_TILES": -(-lanes // launch.rows),
        "TILE_KEYS": tile_keys,
        "DESCRIPTORS": launch.descriptors,
        "FAR": far,
        "MERGE": merge,
        "IN_PIECES": in_pieces,
    }


@cache
def head_blocks(head_dim: int, *, split: bool) -> tuple[int, int]:
    """Two powers of two that hold a head: 64 + 16 for 80, 64 + 32 for 96; the second is 0 where it saves nothing.

    With ``split`` it is half of the head then: an operand that comes in halves needs half as many registers.
    """
    whole = max(16, triton.next_power_of_2(head_dim))
    rest = max(16, triton.next_power_of_2(head_dim - whole // 2))
    if whole >= 32 and (split or rest < whole // 2):
        return whole // 2, rest
    return whole, 0
