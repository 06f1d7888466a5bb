"""Block-sparse prefill attention in Triton over the paged pool: a program per list and sub-tile of its query tile.

Rows and keys are addressed through the pass (``rows``, ``slots``), so nothing is permuted or copied. A list's full
tiles come first and skip the position compare. A program takes ``BLOCK_M`` lanes of the query tile and ``BLOCK_N`` keys
of a key tile at a time, as :mod:`.launch_table` says for the device. Later passes of a layer start from what those
before them left, so that merging costs one read of the output.

Floor per listed tile of M lanes and N keys: ``2 * M * N * (D + Dv)`` FLOPs, and per sub-tile ``N * (D + Dv)`` elements
of the pool plus ``8 * N`` bytes of slots, or 8 bytes where tiles are whole pages (and ``4 * N`` of positions for a
tile that compares them). docs/kernels.md has what that means on a device.

Three bodies read the pool: keys of a tile gathered by their slots; whole pages by pointers; whole pages by tensor
descriptors (TMA), which :func:`choose` takes where the device, the head size and the pool's memory allow it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch_table import NATIVE_FP8, OPTIONS, Launch, device_architecture, fitted, lookup, lookup_pages
from .operands import Operands
from .tiles import ABSENT, Region, TileLists, TilePass

NO_TOKEN = tl.constexpr(ABSENT)

ALIGNMENT = 16
"""Bytes to which descriptors (TMA) want memory and strides aligned."""


@triton.jit
def load_rows(p_pool, b_slot, m_slot, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns ``FIRST`` to ``FIRST + WIDTH`` of some rows of memory; ``m_slot`` None reads all of them."""
    o_d = FIRST + tl.arange(0, WIDTH)
    p_rows = p_pool + b_slot[:, None] * stride + o_d[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        m_load = (o_d < HEAD_DIM)[None, :]
        if m_slot is not None:
            m_load = m_load & m_slot[:, None]
        return tl.load(p_rows, mask=m_load, other=0.0)
    if m_slot is not None:
        return tl.load(p_rows, mask=m_slot[:, None], other=0.0)
    return tl.load(p_rows)


@triton.jit
def widen(b_block, DTYPE: tl.constexpr, FP8_BITS: tl.constexpr):
    """Pool elements in the query's dtype; with ``FP8_BITS``, bytes of e4m3 become 1/256 of their value, exactly."""
    if FP8_BITS:
        # e4m3 moved into the fields of e5m10, whose bias is 8 larger; subnormal numbers stay right.
        b_block = b_block.to(tl.uint16)
        b_block = (((b_block & 0x80) << 8) | ((b_block & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return b_block.to(DTYPE)


@triton.jit
def load_pool(
    p_pool,
    b_slot,
    m_slot,
    i_kv,
    stride,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FP8_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Columns ``FIRST`` to ``FIRST + WIDTH`` of a step's keys or values, those that ``m_slot`` leaves out as 0.

    By pointers ``p_pool`` is at the head and ``b_slot`` has a slot per row; by a descriptor ``b_slot`` is the first
    slot. A descriptor's load cannot leave out rows, and 0 * NaN is no 0: they are replaced afterwards.
    """
    if DESCRIPTORS:
        b_block = p_pool.load([i_kv, b_slot, FIRST])
        b_block = widen(b_block.reshape(b_block.shape[1], WIDTH), DTYPE, FP8_BITS)
        if m_slot is not None:
            b_block = tl.where(m_slot[:, None], b_block, 0.0)
    else:
        b_block = widen(load_rows(p_pool, b_slot, m_slot, stride, FIRST, WIDTH, HEAD_DIM), DTYPE, FP8_BITS)
    return b_block


@triton.jit
def attend_tiles(
    b_acc,
    b_acc_rest,
    b_sum,
    b_max,
    b_query,
    b_query_rest,
    b_pos,
    sink,
    reach,
    p_key,
    p_value,
    i_kv,
    stride_key_slot,
    stride_value_slot,
    p_slots,
    p_key_pos,
    p_tiles,
    tile_first,
    count,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    REST_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FP8_BITS: tl.constexpr,
    FAR: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over the ``count`` tiles at ``p_tiles``; with ``MASKED`` it compares positions."""
    PARTS: tl.constexpr = TILE_KEYS // BLOCK_N
    DTYPE: tl.constexpr = b_query.dtype
    o_n = tl.arange(0, BLOCK_N)
    b_far_edge = b_pos - reach
    for step in tl.range(0, count * PARTS):
        key_first = (tile_first + tl.load(p_tiles + step // PARTS)) * TILE_KEYS + (step % PARTS) * BLOCK_N
        if DESCRIPTORS:
            b_slot = tl.load(p_slots + key_first).to(tl.int32)
        elif CONTIGUOUS:
            b_slot = tl.load(p_slots + key_first).to(tl.int64) + o_n
        else:
            b_slot = tl.load(p_slots + key_first + o_n).to(tl.int64)
        m_slot = None
        if MASKED:
            b_key_pos = tl.load(p_key_pos + key_first + o_n)
            if CONTIGUOUS:
                # Behind a request's last key a page may hold anything, and 0 * NaN is no 0.
                m_slot = b_key_pos != NO_TOKEN
        # keys x head size
        b_key = load_pool(
            p_key, b_slot, None, i_kv, stride_key_slot, 0, BLOCK_D, HEAD_DIM, DESCRIPTORS, FP8_BITS, DTYPE
        )
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
        if REST_D > 0:
            b_key = load_pool(
                p_key, b_slot, None, i_kv, stride_key_slot, BLOCK_D, REST_D, HEAD_DIM, DESCRIPTORS, FP8_BITS, DTYPE
            )
            b_score = tl.dot(b_query_rest, tl.trans(b_key), b_score, input_precision="ieee")
        b_score *= scale_log2
        if MASKED:
            if FAR:
                m_see = (b_key_pos >= sink)[None, :] & (b_key_pos[None, :] <= b_far_edge[:, None])
            else:
                m_see = (b_key_pos < sink)[None, :] | (b_key_pos[None, :] > b_far_edge[:, None])
                m_see = m_see & (b_key_pos[None, :] <= b_pos[:, None])
            b_score = tl.where(m_see, b_score, -float("inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
        b_shift = b_new_max
        if MASKED:
            # A row that has seen no key yet has no maximum to subtract.
            b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
        b_weight = tl.exp2(b_score - b_shift[:, None])
        b_decay = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_max = b_new_max
        b_weight = b_weight.to(DTYPE)
        b_value = load_pool(
            p_value, b_slot, m_slot, i_kv, stride_value_slot, 0, BLOCK_DV, HEAD_DIM_V, DESCRIPTORS, FP8_BITS, DTYPE
        )
        b_acc = tl.dot(b_weight, b_value, b_acc * b_decay[:, None], input_precision="ieee")
        if REST_DV > 0:
            b_value = load_pool(
                p_value,
                b_slot,
                m_slot,
                i_kv,
                stride_value_slot,
                BLOCK_DV,
                REST_DV,
                HEAD_DIM_V,
                DESCRIPTORS,
                FP8_BITS,
                DTYPE,
            )
            b_acc_rest = tl.dot(b_weight, b_value, b_acc_rest * b_decay[:, None], input_precision="ieee")
    return b_acc, b_acc_rest, b_sum, b_max


@triton.jit
def store_rows(p_out, b_block, b_at, m_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes columns ``FIRST`` to ``FIRST + WIDTH`` of the rows that begin at ``b_at``."""
    o_d = FIRST + tl.arange(0, WIDTH)
    m_out = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_out + b_at[:, None] + o_d[None, :], b_block.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["query_tiles"])
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
    p_begin,
    p_count,
    p_full,
    p_tiles,
    p_sink,
    p_reach,
    scale_log2,
    value_scale,
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
    SHARING: tl.constexpr,
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
    CONTIGUOUS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FP8_BITS: tl.constexpr,
    FAR: tl.constexpr,
    MERGE: tl.constexpr,
):
    """One list and one sub-tile of its lanes; the names of its arguments are those of the pass and the lists.

    Head sizes that are no power of two come in two blocks, ``BLOCK_D`` and ``REST_D`` wide, instead of padded.
    With ``DESCRIPTORS``, ``p_key`` and ``p_value`` are those of :func:`describe`.
    """
    # Sub-tiles of a list start together, so that what they read twice comes from L2.
    i_list = tl.load(p_order + tl.program_id(0) // SUB_TILES)
    i_head = (i_list // query_tiles).to(tl.int64) * SHARING
    i_tile = i_list % query_tiles
    row_first = tl.load(p_row_indptr + i_tile)
    row_end = tl.load(p_row_indptr + i_tile + 1)
    lane_first = tl.program_id(0) % SUB_TILES * BLOCK_M
    count = tl.load(p_count + i_list)
    if row_first + lane_first // SHARING >= row_end:
        return
    if MERGE and count == 0:
        return

    o_lane = lane_first + tl.arange(0, BLOCK_M)
    o_row = row_first + o_lane // SHARING
    m_row = o_row < row_end
    b_row = tl.load(p_rows + o_row, mask=m_row, other=0).to(tl.int64)
    # A lane without a row stands before every key, so it sees none.
    b_pos = tl.load(p_row_pos + o_row, mask=m_row, other=-1)
    b_head = i_head + o_lane % SHARING
    # lanes x head size
    b_at = b_row * stride_query_row + b_head * stride_query_head
    b_query = load_rows(p_query, b_at, m_row, 1, 0, BLOCK_D, HEAD_DIM)
    b_query_rest = b_query
    if REST_D > 0:
        b_query_rest = load_rows(p_query, b_at, m_row, 1, BLOCK_D, REST_D, HEAD_DIM)

    i_kv = (i_head // GROUP).to(tl.int32)
    if not DESCRIPTORS:
        p_key += i_head // GROUP * stride_key_head
        p_value += i_head // GROUP * stride_value_head
    p_tiles += tl.load(p_begin + i_list)
    tile_first = tl.load(p_tile_indptr + tl.load(p_request + i_tile)).to(tl.int64)
    full = tl.load(p_full + i_list)
    sink = tl.load(p_sink + i_list)
    reach = tl.load(p_reach + i_list)

    b_at = b_row * stride_out_row + b_head * stride_out_head
    p_lse += b_row * stride_lse_row + b_head
    b_acc_rest = b_pos
    if MERGE:
        # What earlier passes left is a softmax over their keys: it goes on from there.
        b_max = tl.load(p_lse, mask=m_row, other=-float("inf")) * 1.4426950408889634
        m_old = b_max != -float("inf")
        b_sum = tl.where(m_old, 1.0, 0.0)
        b_acc = load_rows(p_out, b_at, m_old, 1, 0, BLOCK_DV, HEAD_DIM_V).to(tl.float32) / value_scale
        if REST_DV > 0:
            b_acc_rest = load_rows(p_out, b_at, m_old, 1, BLOCK_DV, REST_DV, HEAD_DIM_V)
            b_acc_rest = b_acc_rest.to(tl.float32) / value_scale
    else:
        b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        if REST_DV > 0:
            b_acc_rest = tl.zeros([BLOCK_M, REST_DV], tl.float32)
    for MASKED in tl.static_range(2):
        b_acc, b_acc_rest, b_sum, b_max = attend_tiles(
            b_acc,
            b_acc_rest,
            b_sum,
            b_max,
            b_query,
            b_query_rest,
            b_pos,
            sink,
            reach,
            p_key,
            p_value,
            i_kv,
            stride_key_slot,
            stride_value_slot,
            p_slots,
            p_key_pos,
            p_tiles + MASKED * full,
            tile_first,
            MASKED * (count - full) + (1 - MASKED) * full,
            scale_log2,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_D,
            REST_D,
            BLOCK_DV,
            REST_DV,
            BLOCK_N,
            TILE_KEYS,
            CONTIGUOUS,
            DESCRIPTORS,
            FP8_BITS,
            FAR,
            MASKED,
        )

    m_seen = b_sum > 0
    b_sum = tl.where(m_seen, b_sum, 1.0)
    b_share = (value_scale / b_sum)[:, None]
    store_rows(p_out, b_acc * b_share, b_at, m_row, 0, BLOCK_DV, HEAD_DIM_V)
    if REST_DV > 0:
        store_rows(p_out, b_acc_rest * b_share, b_at, m_row, BLOCK_DV, REST_DV, HEAD_DIM_V)
    # Natural logarithm: ln(2) = 0.693...
    b_lse = tl.where(m_seen, (b_max + tl.log2(b_sum)) * 0.6931471805599453, -float("inf"))
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
    """Attention of one pass; see :class:`.ops.Attend`. ``launch`` replaces the table's entry.

    Raises:
        ValueError: ``launch`` asks for descriptors where there can be none.
    """
    operands, fp8_bits = readable(operands)
    query, key_pool, value_pool = operands.query, operands.key_pool, operands.value_pool
    architecture = device_architecture(query.device)
    keys = tile_pass.keys
    if launch is None:
        launch = choose(architecture, key_pool, value_pool, contiguous=keys.contiguous)
    elif launch.descriptors and keys.contiguous and not describable(launch, key_pool, value_pool):
        raise ValueError(f"{launch} asks for descriptors, but these pools cannot be read through them")
    launch = fitted(launch, tile_pass.lanes, keys.tile_keys)
    constants = constants_for(
        launch,
        tile_pass.lanes,
        keys.tile_keys,
        group=operands.group,
        sharing=tile_pass.sharing,
        head_dim=query.shape[2],
        head_dim_v=value_pool.shape[2],
        contiguous=keys.contiguous,
        fp8_bits=fp8_bits,
        far=tile_pass.region is Region.FAR,
        merge=merge,
    )
    pools = [key_pool, value_pool]
    if constants["DESCRIPTORS"]:
        pools = [
            describe(pool, constants["BLOCK_N"], constants[block])
            for pool, block in zip(pools, ("BLOCK_D", "BLOCK_DV"), strict=True)
        ]
    attend_kernel[(lists.order.numel() * constants["SUB_TILES"],)](
        query,
        *pools,
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
        lists.begin,
        lists.count,
        lists.full,
        lists.tiles,
        lists.sink,
        lists.reach,
        operands.scale * operands.key_scale * math.log2(math.e),
        operands.value_scale,
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
        **constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **OPTIONS,
    )


def readable(operands: Operands) -> tuple[Operands, bool]:
    """The operands as :func:`widen` reads them here, and whether it is told ``FP8_BITS``.

    Devices without instructions that convert e4m3 read its bytes as 1/256 of their value.
    """
    pool = operands.key_pool
    if pool.element_size() > 1 or device_architecture(pool.device) >= NATIVE_FP8:
        return operands, False
    bits = replace(
        operands,
        key_pool=pool.view(torch.uint8),
        value_pool=operands.value_pool.view(torch.uint8),
        key_scale=operands.key_scale * 256,
        value_scale=operands.value_scale * 256,
    )
    return bits, True


def choose(architecture: int, key_pool: torch.Tensor, value_pool: torch.Tensor, *, contiguous: bool) -> Launch:
    """The table's entry for pools [slots, KV heads, D]: one with descriptors only where :func:`describable` holds."""
    shape = architecture, max(key_pool.shape[2], value_pool.shape[2]), key_pool.element_size()
    launch = lookup_pages(*shape) if contiguous else None
    if launch is None or (launch.descriptors and not describable(launch, key_pool, value_pool)):
        launch = lookup(*shape)
    return launch


def describable(launch: Launch, *pools: torch.Tensor) -> bool:
    """Whether whole pages of these pools can be read through descriptors, by the device's rules (TMA).

    Memory and strides are aligned to 16 bytes, and a head's elements are neighbours. A descriptor has one box: a head
    in two blocks must have two of the same width, so heads of 80 and 96 cannot. Bytes whose bits are converted
    (``uint8``) are for devices without descriptors.
    """
    for pool in pools:
        block, rest = head_blocks(pool.shape[2], split=launch.split)
        slot, head, element = pool.stride()
        size = pool.element_size()
        if pool.dtype == torch.uint8 or element != 1 or rest not in (0, block):
            return False
        if any(offset % ALIGNMENT for offset in (pool.data_ptr(), slot * size, head * size)):
            return False
    return True


def describe(pool: torch.Tensor, keys: int, width: int) -> TensorDescriptor:
    """A pool [slots, KV heads, D] as [KV heads, slots, D] in boxes of ``width`` columns of ``keys`` slots of one head.

    Making one takes 2 to 3 us of the host and no memory of the device, so none is kept. Columns behind a head's last
    one are read as 0.
    """
    slots, heads, head_dim = pool.shape
    return TensorDescriptor(pool, [heads, slots, head_dim], [pool.stride(1), pool.stride(0), 1], [1, keys, width])


def constants_for(
    launch: Launch,
    lanes: int,
    tile_keys: int,
    *,
    group: int,
    sharing: int = 1,
    head_dim: int,
    head_dim_v: int,
    contiguous: bool,
    fp8_bits: bool,
    far: bool,
    merge: bool,
) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    block_d, rest_d = head_blocks(head_dim, split=launch.split)
    block_dv, rest_dv = head_blocks(head_dim_v, split=launch.split)
    return {
        "GROUP": group,
        "SHARING": sharing,
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
        "CONTIGUOUS": contiguous,
        "DESCRIPTORS": launch.descriptors and contiguous,
        "FP8_BITS": fp8_bits,
        "FAR": far,
        "MERGE": merge,
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
