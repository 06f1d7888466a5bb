"""The probe in Triton: output of the probe rows and what their key tiles hold, and never a weight per row and key.

The rows of all heads that share a KV head are one block of rows, so keys are read once for the group. Programs split
the key tiles among them. :func:`parts_kernel` projects every value; :func:`probe_kernel` runs an online softmax over
the sequence order and :func:`combine_kernel` joins its splits. :func:`held_kernel` scores the keys of an order once
more against the known logarithm of the row's sum, and adds up by tile what lies in some regions.

Floor for ``P`` rows and ``N`` keys: ``2 * H * P * N * (D + Dv)`` FLOPs for the softmax and ``2 * H * P * N * D`` for
what the tiles of an order hold; keys three times and values twice, and 32 bytes per key and KV head of
projected values in 16 bits; ``4 * HELD`` bytes per (row, key tile) and region. docs/kernels.md has the figures.
Numbers that change from chunk to chunk are not specialised on, or kernels would be compiled while serving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attend import load_keys, load_rows
from .launch_table import OPTIONS
from .operands import Operands
from .probe import HELD, ProbeKeys, ProbeRows, signs

LOG2_E = math.log2(math.e)
PROGRAMS = 512
"""Programs that a launch is split into, a few per processor; fewer where a split would have less than MIN_TILES."""
MIN_TILES = 8
PARTS_KEYS = 64
"""Keys at a time whose values are projected."""
MAX_REGIONS = 2
"""Regions that one pass over the keys adds up."""
CHANNELS = 16
"""What a tile holds and room beside it: the fewest columns that matrix instructions have."""
CHANNELS_HELD = tl.constexpr(HELD)
CHANNELS_ALL = tl.constexpr(CHANNELS)


@triton.jit
def rows_of_group(i_block, i_kv, probe_rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head, which of its probe rows, and presence of a block's rows: a group's are those of its heads in turn."""
    o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < GROUP * probe_rows
    b_head = i_kv * GROUP + o_row // probe_rows
    return b_head.to(tl.int64), (o_row % probe_rows).to(tl.int64), m_row


@triton.jit
def scores(
    b_query,
    p_key,
    key_first,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Base-2 logits [rows, keys] of some keys of an order."""
    b_key = load_keys(p_key, key_first, 0, BLOCK_D, HEAD_DIM, BLOCK_N, False)
    return tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale_log2


@triton.jit(do_not_specialize=["keys"])
def parts_kernel(
    p_value,
    p_signs,
    p_parts,
    value_scale,
    keys,
    stride_value_head,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """1 and the projected value of some keys of one KV head: ``p_parts`` [KV heads, keys, CHANNELS].

    ``p_signs`` [Dv, CHANNELS]: the projections in columns 1 to SKETCH, 0 in the others.
    """
    i_block, i_kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_key = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_key = o_key < keys
    p_value += i_kv * stride_value_head
    o_d, o_c = tl.arange(0, BLOCK_DV), tl.arange(0, CHANNELS_ALL)
    p_sign = p_signs + o_d[:, None] * CHANNELS_ALL + o_c[None, :]
    b_sign = tl.load(p_sign, mask=(o_d < HEAD_DIM_V)[:, None], other=0.0)
    b_value = load_rows(p_value + o_key.to(tl.int64) * HEAD_DIM_V, m_key, 0, BLOCK_DV, HEAD_DIM_V)
    b_part = tl.dot(b_value, b_sign, input_precision="ieee") * value_scale
    b_part = tl.where(o_c[None, :] == 0, 1.0, b_part)
    p_part = p_parts + (i_kv * keys + o_key[:, None]) * CHANNELS_ALL + o_c[None, :]
    tl.store(p_part, b_part.to(p_parts.dtype.element_ty), mask=m_key[:, None])


@triton.jit
def load_parts(p_parts, o_key, m_key):
    """Parts of some keys, [keys, CHANNELS]; 0 where the mask is."""
    o_c = tl.arange(0, CHANNELS_ALL)
    p_part = p_parts + o_key.to(tl.int64)[:, None] * CHANNELS_ALL + o_c[None, :]
    return tl.load(p_part, mask=m_key[:, None], other=0.0)


@triton.jit
def column(b_held, i_column):
    """One column of [rows, CHANNELS]."""
    o_c = tl.arange(0, CHANNELS_ALL)[None, :]
    return tl.sum(tl.where(o_c == i_column, b_held, 0.0), 1)


@triton.jit(do_not_specialize=["probe_rows", "tiles", "tiles_per_split"])
def probe_kernel(
    p_query,
    p_key,
    p_value,
    p_rows,
    p_row_pos,
    p_row_of,
    p_part,
    p_part_lse,
    scale_log2,
    probe_rows,
    tiles,
    tiles_per_split,
    stride_query_row,
    stride_query_head,
    stride_key_head,
    stride_value_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One block of rows of one KV head over one split of the sequence order's key tiles.

    ``p_row_of`` [H, P]: which entry of ``p_rows`` and ``p_row_pos`` a head's probe row is.
    ``p_part`` [splits, H, P, Dv] and ``p_part_lse`` [splits, H, P]: output and base-2 logarithm of the sum over the
    split.
    """
    i_kv, i_split = tl.program_id(1), tl.program_id(2)
    b_head, b_probe, m_row = rows_of_group(tl.program_id(0), i_kv, probe_rows, GROUP, BLOCK_M)
    b_row = tl.load(p_row_of + b_head * probe_rows + b_probe, mask=m_row, other=0)
    b_batch_row = tl.load(p_rows + b_row, mask=m_row, other=0)
    # A lane without a row stands before every key, so it sees none.
    b_pos = tl.load(p_row_pos + b_row, mask=m_row, other=-1)
    o_d = tl.arange(0, BLOCK_D)
    p_q = p_query + (b_batch_row * stride_query_row + b_head * stride_query_head)[:, None] + o_d[None, :]
    b_query = tl.load(p_q, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    p_key += i_kv.to(tl.int64) * stride_key_head
    p_value += i_kv.to(tl.int64) * stride_value_head
    heads = tl.num_programs(1) * GROUP
    b_index = b_head * probe_rows + b_probe

    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    tile_first = i_split * tiles_per_split
    tile_end = tl.minimum(tile_first + tiles_per_split, tiles)
    last_pos = tl.max(b_pos, 0)
    tile_seen = tl.minimum(last_pos // (PARTS * BLOCK_N) + 1, tile_end)
    for i_tile in tl.range(tile_first, tile_seen):
        for i_part in tl.static_range(PARTS):
            key_first = (i_tile * PARTS + i_part) * BLOCK_N
            b_score = scores(b_query, p_key, key_first, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N)
            o_key = key_first + tl.arange(0, BLOCK_N)
            b_score = tl.where(o_key[None, :] <= b_pos[:, None], b_score, -float("inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
            b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
            b_weight = tl.exp2(b_score - b_shift[:, None])
            b_decay = tl.exp2(b_max - b_shift)
            b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
            b_max = b_new_max
            b_value = load_keys(p_value, key_first, 0, BLOCK_DV, HEAD_DIM_V, BLOCK_N, False)
            b_acc = tl.dot(b_weight.to(b_query.dtype), b_value, b_acc * b_decay[:, None], input_precision="ieee")

    m_seen = b_sum > 0
    b_sum = tl.where(m_seen, b_sum, 1.0)
    b_index += i_split.to(tl.int64) * heads * probe_rows
    tl.store(p_part_lse + b_index, tl.where(m_seen, b_max + tl.log2(b_sum), -float("inf")), mask=m_row)
    o_d = tl.arange(0, BLOCK_DV)
    p_out = p_part + b_index[:, None] * HEAD_DIM_V + o_d[None, :]
    tl.store(p_out, b_acc / b_sum[:, None], mask=m_row[:, None] & (o_d < HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    p_part,
    p_part_lse,
    p_signs,
    p_out,
    p_size,
    p_lse,
    p_projected,
    value_scale,
    splits,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Joins the splits of one (head, probe row): ``p_out`` [H, P, Dv], its squared length ``p_size``, ``p_lse`` [H, P].

    ``p_projected`` [H, P, CHANNELS]: the projected output.
    """
    i_row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    o_split = tl.arange(0, BLOCK_SPLITS)
    b_lse = tl.load(p_part_lse + o_split * rows + i_row, mask=o_split < splits, other=-float("inf"))
    top = tl.max(b_lse, 0)
    lse = top + tl.log2(tl.sum(tl.exp2(b_lse - top), 0))
    tl.store(p_lse + i_row, lse)
    o_d, o_c = tl.arange(0, BLOCK_DV), tl.arange(0, CHANNELS_ALL)
    m_d = o_d < HEAD_DIM_V
    b_out = tl.zeros([BLOCK_DV], tl.float32)
    for i_split in tl.range(0, splits):
        share = tl.exp2(tl.load(p_part_lse + i_split * rows + i_row) - lse)
        b_out += share * tl.load(p_part + (i_split * rows + i_row) * HEAD_DIM_V + o_d, mask=m_d, other=0.0)
    b_out *= value_scale
    tl.store(p_out + i_row * HEAD_DIM_V + o_d, b_out, mask=m_d)
    tl.store(p_size + i_row, tl.sum(b_out * b_out, 0))
    p_sign = p_signs + o_d[:, None] * CHANNELS_ALL + o_c[None, :]
    b_sign = tl.load(p_sign, mask=m_d[:, None], other=0.0).to(tl.float32)
    b_projected = tl.sum(b_out[:, None] * b_sign, 0)
    tl.store(p_projected + i_row * CHANNELS_ALL + o_c, b_projected)


@triton.jit
def in_region(b_weight, b_part, b_held, sink, reach, o_key, b_pos):
    """``b_held`` with the parts of the keys in a far region."""
    b_weight = tl.where((o_key >= sink) & (o_key <= b_pos - reach), b_weight, 0.0)
    return tl.dot(b_weight.to(b_part.dtype), b_part, b_held, input_precision="ieee")


@triton.jit
def as_deviations(b_held, b_projected):
    """Masses in column 0 as they are, projections as deviations from the projected output."""
    o_c = tl.arange(0, CHANNELS_ALL)[None, :]
    return tl.where(o_c == 0, b_held, b_held - column(b_held, 0)[:, None] * b_projected)


@triton.jit(do_not_specialize=["probe_rows", "tiles", "arrived", "keys", "sink", "reach", "other_sink", "other_reach"])
def held_kernel(
    p_query,
    p_key,
    p_rows,
    p_row_pos,
    p_row_of,
    p_key_pos,
    p_arrival,
    p_parts,
    p_lse,
    p_projected,
    p_held,
    p_other,
    sink,
    reach,
    other_sink,
    other_reach,
    scale_log2,
    probe_rows,
    tiles,
    arrived,
    keys,
    stride_query_row,
    stride_query_head,
    stride_key_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    REGIONS: tl.constexpr,
):
    """One block of rows of one KV head over one split of an order's key tiles.

    ``p_arrival`` [tiles]: the order's tiles, the first ``arrived`` of which hold keys by now. ``p_parts``
    [KV heads, keys, CHANNELS] by token position. ``p_held`` [HELD, H, P, tiles]: what each tile holds in the far region
    of ``sink`` and ``reach``; ``p_other``: in another one.
    """
    i_kv, i_split = tl.program_id(1), tl.program_id(2)
    b_head, b_probe, m_row = rows_of_group(tl.program_id(0), i_kv, probe_rows, GROUP, BLOCK_M)
    b_row = tl.load(p_row_of + b_head * probe_rows + b_probe, mask=m_row, other=0)
    b_batch_row = tl.load(p_rows + b_row, mask=m_row, other=0)
    b_pos = tl.load(p_row_pos + b_row, mask=m_row, other=-1)[:, None]
    heads = tl.num_programs(1) * GROUP
    b_index = b_head * probe_rows + b_probe
    b_lse = tl.load(p_lse + b_index, mask=m_row, other=0.0)[:, None]
    o_d, o_c = tl.arange(0, BLOCK_D), tl.arange(0, CHANNELS_ALL)[None, :]
    b_projected = tl.load(p_projected + b_index[:, None] * CHANNELS_ALL + o_c, mask=m_row[:, None], other=0.0)
    p_q = p_query + (b_batch_row * stride_query_row + b_head * stride_query_head)[:, None] + o_d[None, :]
    b_query = tl.load(p_q, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    p_key += i_kv.to(tl.int64) * stride_key_head
    p_parts += i_kv.to(tl.int64) * keys * CHANNELS_ALL
    channel = heads.to(tl.int64) * probe_rows * tiles
    o_held = o_c * channel + b_index[:, None] * tiles
    p_held += o_held
    if REGIONS == 2:
        p_other += o_held
    m_held = m_row[:, None] & (o_c < CHANNELS_HELD)

    per_split = tl.cdiv(arrived, tl.num_programs(2))
    for i_entry in tl.range(i_split * per_split, tl.minimum((i_split + 1) * per_split, arrived)):
        i_tile = tl.load(p_arrival + i_entry).to(tl.int64)
        b_first = tl.zeros([BLOCK_M, CHANNELS_ALL], tl.float32)
        b_second = tl.zeros([BLOCK_M, CHANNELS_ALL], tl.float32)
        for i_part in tl.static_range(PARTS):
            key_first = (i_tile * PARTS + i_part) * BLOCK_N
            b_score = scores(b_query, p_key, key_first, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N)
            b_key_pos = tl.load(p_key_pos + key_first + tl.arange(0, BLOCK_N))
            b_part = load_parts(p_parts, b_key_pos, b_key_pos < keys)
            o_key = b_key_pos[None, :]
            b_weight = tl.where(o_key <= b_pos, tl.exp2(b_score - b_lse), 0.0)
            b_first = in_region(b_weight, b_part, b_first, sink, reach, o_key, b_pos)
            if REGIONS == 2:
                b_second = in_region(b_weight, b_part, b_second, other_sink, other_reach, o_key, b_pos)
        # Once per tile: what other threads stored could not be read back without a barrier.
        tl.store(p_held + i_tile, as_deviations(b_first, b_projected), mask=m_held)
        if REGIONS == 2:
            tl.store(p_other + i_tile, as_deviations(b_second, b_projected), mask=m_held)
    per_split = tl.cdiv(tiles - arrived, tl.num_programs(2))
    first = arrived + i_split * per_split
    b_nothing = tl.zeros([BLOCK_M, CHANNELS_ALL], tl.float32)
    for i_entry in tl.range(first, tl.minimum(first + per_split, tiles)):
        i_tile = tl.load(p_arrival + i_entry).to(tl.int64)
        tl.store(p_held + i_tile, b_nothing, mask=m_held)
        if REGIONS == 2:
            tl.store(p_other + i_tile, b_nothing, mask=m_held)


class ProbeLaunch(NamedTuple):
    """``rows`` of a group per program, ``keys`` of a key tile per step, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def probe_launch(head_dim: int, element_size: int, tile_keys: int) -> ProbeLaunch:
    """That of :func:`probe_kernel` on all devices: probes are small, and the oldest device's registers do for them.

    ``element_size`` in bytes, of the query; fp32 exists for tests.
    """
    if element_size == 4:
        return ProbeLaunch(16, min(16, tile_keys), 4, 2)
    # A warp group multiplies 64 rows at a time: two of them would do the same twice.
    if head_dim <= 128:
        return ProbeLaunch(64, min(64, tile_keys), 4, 3)
    return ProbeLaunch(16, min(64, tile_keys), 8, 2)


def held_launch(head_dim: int, element_size: int, tile_keys: int) -> ProbeLaunch:
    """That of :func:`held_kernel`."""
    if element_size == 4:
        return ProbeLaunch(16, min(16, tile_keys), 4, 2)
    if head_dim <= 128:
        return ProbeLaunch(64, min(64 if head_dim <= 64 else 32, tile_keys), 4 if head_dim <= 80 else 8, 2)
    return ProbeLaunch(32, min(16, tile_keys), 8, 2)


def constants_for(launch: ProbeLaunch, tile_keys: int, *, group: int, head_dim: int) -> dict[str, int | bool]:
    """Compile-time arguments that :func:`probe_kernel` and :func:`held_kernel` have in common."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.keys,
        "PARTS": tile_keys // launch.keys,
    }


@cache
def _signs(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """:func:`.probe.signs` in columns 1 to SKETCH of CHANNELS: [head_dim, CHANNELS]."""
    padded = torch.nn.functional.pad(signs(head_dim, device), (1, CHANNELS - HELD))
    return padded.to(dtype)


class Source(NamedTuple):
    """Keys of which it is asked what tiles hold: the far region of a sink and a reach, by tile of one of the orders.

    That of 0 and 0 is all keys.
    """

    cell: bool
    sink: int
    reach: int


@dataclass(frozen=True)
class Probed:
    """Where a probe's results go; all heads that are probed at a time.

    ``output`` fp32 [H, P, Dv]: the probe rows' dense output; ``size`` fp32 [H, P]: its squared length. ``held``: what
    tiles hold by source, fp32 [HELD, H, P, n]: masses, which are shares of a row's softmax, then deviations.
    """

    output: torch.Tensor
    size: torch.Tensor
    held: Mapping[Source, torch.Tensor]


def run(
    operands: Operands, keys: ProbeKeys, rows: ProbeRows, probed: Probed, *, launch: ProbeLaunch | None = None
) -> None:
    """Probes a request; arguments as in :func:`.probe.run`. ``launch`` replaces those of both kernels."""
    query = operands.query
    key, value = operands.in_order(keys.sequence, query.dtype)
    heads, head_dim = query.shape[1:]
    kv_heads, _, head_dim_v = value.shape
    tile_keys, tiles = keys.sequence.tile_keys, keys.sequence.slots.shape[0]
    scale_log2 = operands.scale * operands.key_scale * LOG2_E
    row_of, count = rows.of_heads(operands), rows.per_head

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    def grid(launch: ProbeLaunch, tiles: int) -> tuple[int, int, int]:
        """Blocks of rows, KV heads and splits of the key tiles."""
        blocks = triton.cdiv(operands.group * count, launch.rows)
        return blocks, kv_heads, max(1, min(PROGRAMS // (blocks * kv_heads), tiles // MIN_TILES))

    def options(launch: ProbeLaunch) -> dict[str, int | bool]:
        constants = constants_for(launch, tile_keys, group=operands.group, head_dim=head_dim)
        return {**constants, **OPTIONS, "num_warps": launch.warps, "num_stages": launch.stages}

    block_dv = max(16, triton.next_power_of_2(head_dim_v))
    parts = empty(kv_heads, tiles * tile_keys, CHANNELS, dtype=query.dtype)
    project = _signs(head_dim_v, query.dtype, query.device)
    parts_kernel[triton.cdiv(tiles * tile_keys, PARTS_KEYS), kv_heads](
        value,
        project,
        parts,
        operands.value_scale,
        tiles * tile_keys,
        value.stride(0),
        HEAD_DIM_V=head_dim_v,
        BLOCK_DV=block_dv,
        BLOCK_N=PARTS_KEYS,
        **OPTIONS,
    )
    own = launch or probe_launch(max(head_dim, head_dim_v), query.element_size(), tile_keys)
    blocks, _, splits = grid(own, tiles)
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    part, part_lse = empty(splits, heads, count, head_dim_v), empty(splits, heads, count)
    probe_kernel[blocks, kv_heads, splits](
        query,
        key,
        value,
        rows.rows,
        rows.positions,
        row_of,
        part,
        part_lse,
        scale_log2,
        count,
        tiles,
        per_split,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        value.stride(0),
        HEAD_DIM_V=head_dim_v,
        BLOCK_DV=block_dv,
        **options(own),
    )
    lse, projected = empty(heads, count), empty(heads, count, CHANNELS)
    combine_kernel[heads * count,](
        part,
        part_lse,
        project,
        probed.output,
        probed.size,
        lse,
        projected,
        operands.value_scale,
        splits,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DV=block_dv,
        BLOCK_SPLITS=PROGRAMS,
        **OPTIONS,
    )
    own = launch or held_launch(head_dim, query.element_size(), tile_keys)
    for order in (keys.sequence, keys.cell):
        asked = [source for source in probed.held if source.cell == (order is keys.cell)]
        for first in range(0, len(asked), MAX_REGIONS):
            both = asked[first : first + MAX_REGIONS]
            assert order is not None
            key, _ = operands.in_order(order, query.dtype)
            held_kernel[grid(own, order.arrival.numel())](
                query,
                key,
                rows.rows,
                rows.positions,
                row_of,
                order.positions,
                order.arrival,
                parts,
                lse,
                projected,
                probed.held[both[0]],
                probed.held[both[-1]],
                *both[0][1:],
                *both[-1][1:],
                scale_log2,
                count,
                order.arrival.numel(),
                order.arrived,
                parts.shape[1],
                query.stride(0),
                query.stride(1),
                key.stride(0),
                REGIONS=len(both),
                **options(own),
            )
