"""The probe in Triton: output of the probe rows and what their key tiles hold, and never a weight per row and key.

Two launches for all row groups of a forward. The rows of all heads that share a KV head are one block of rows, so keys
are read once for the group. Programs split the key tiles among them. :func:`probe_kernel` runs an online softmax over
the sequence order. :func:`held_kernel` joins its splits, scores the keys of an order once more against the logarithm of
the row's sum, and adds up by tile what lies in some regions. What is asked of which memory stands in tables, as for
:mod:`.select_triton`.

Floor for ``P`` rows and ``N`` keys: ``2 * H * P * N * (D + Dv)`` FLOPs for the softmax and ``2 * H * P * N * D`` for
what the tiles of an order hold; keys three times and values once, and 16 bytes per key and KV head and order of
projected values in 16 bits; ``4 * HELD`` bytes per (row, key tile) and region. docs/kernels.md has the figures.
Numbers that change from chunk to chunk are not specialised on, or kernels would be compiled while serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attend import load_keys
from .copy_triton import CHANNELS_ALL, CHANNELS_HELD, padded_signs
from .launch_table import OPTIONS
from .operands import Operands
from .probe import ProbeKeys, ProbeRows
from .sketch import HELD
from .tables import Fields, Table, address, number, upload
from .work_triton import load_rows

LOG2_E = math.log2(math.e)
PROGRAMS = 512
"""Programs that a launch is split into, a few per processor; fewer where a split would have less than MIN_TILES."""
MIN_TILES = 8
MAX_REGIONS = 2
"""Regions that one pass over the keys adds up."""
PROBE = Fields("rows positions row_of part lse projected output size per_head first tiles per_split splits")
"""Probe rows of a row group, and ``row_of`` by head; the sequence order's key tiles in splits.

By split: output (``part``), its ``lse`` and what is ``projected`` of it; then all splits' together.
"""
JOB = Fields(
    "probe arrival held other_held arrived tiles first sink reach other_sink other_reach regions splits writes"
)
"""The key tiles of an order, those that have arrived first, and what is asked of them for the rows of a ``probe``: what
they hold in one region or two. ``writes``: whether it is the first of the row group, which writes the output."""


@triton.jit
def rows_of_group(
    p_probe,
    p_query,
    head_first,
    stride_row,
    stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of the rows of one KV head: place among all rows that are probed at a time, presence, query and position.

    A group's rows are those of its heads in turn.
    """
    i_kv, probe_rows = tl.program_id(1), number(p_probe, PROBE.per_head)
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < GROUP * probe_rows
    b_index = (i_kv * GROUP * probe_rows + o_row).to(tl.int64)
    b_row = tl.load(address(p_probe, PROBE.row_of, tl.int32) + head_first * probe_rows + b_index, mask=m_row, other=0)
    b_batch_row = tl.load(address(p_probe, PROBE.rows, tl.int64) + b_row, mask=m_row, other=0)
    # A lane without a row stands before every key, so it sees none.
    b_pos = tl.load(address(p_probe, PROBE.positions, tl.int32) + b_row, mask=m_row, other=-1)
    b_head = (i_kv * GROUP + o_row // probe_rows).to(tl.int64)
    p_query += b_batch_row * stride_row + b_head * stride_head
    return b_index, m_row, load_rows(p_query, m_row, 0, BLOCK_D, HEAD_DIM), b_pos


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


@triton.jit
def load_parts(p_parts, key_first, BLOCK_N: tl.constexpr):
    """Parts of some keys of an order, [keys, CHANNELS]."""
    o_key, o_c = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, CHANNELS_ALL)[None, :]
    p_part = p_parts + key_first.to(tl.int64) * CHANNELS_HELD + o_key * CHANNELS_HELD + o_c
    return tl.load(p_part, mask=o_c < CHANNELS_HELD, other=0.0)


@triton.jit
def column(b_held, i_column):
    """One column of [rows, CHANNELS]."""
    o_c = tl.arange(0, CHANNELS_ALL)[None, :]
    return tl.sum(tl.where(o_c == i_column, b_held, 0.0), 1)


@triton.jit(do_not_specialize=["head_first", "splits"])
def probe_kernel(
    p_probes,
    p_query,
    p_key,
    p_value,
    p_signs,
    scale_log2,
    head_first,
    splits,
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
    """One block of rows of one KV head over one split of the key tiles of a row group's sequence order.

    ``splits``: most of a row group. Of each split: output, base-2 logarithm of the sum, and the projected output.
    """
    i_kv, i_split = tl.program_id(1), tl.program_id(2) % splits
    p_probe = p_probes + tl.program_id(2) // splits * PROBE.width
    probe_rows, tiles, per_split = (
        number(p_probe, PROBE.per_head),
        number(p_probe, PROBE.tiles),
        number(p_probe, PROBE.per_split),
    )
    # Programs without rows or tiles have a loop of none: one that returned early would spill.
    b_index, m_row, b_query, b_pos = rows_of_group(
        p_probe, p_query, head_first, stride_query_row, stride_query_head, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    m_row &= i_split * per_split < tiles
    first = number(p_probe, PROBE.first).to(tl.int64) * (PARTS * BLOCK_N)
    p_key += i_kv.to(tl.int64) * stride_key_head + first * HEAD_DIM
    p_value += i_kv.to(tl.int64) * stride_value_head + first * HEAD_DIM_V

    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    tile_first = i_split * per_split
    tile_end = tl.minimum(tile_first + per_split, tiles)
    tile_seen = tl.minimum(tl.max(b_pos, 0) // (PARTS * BLOCK_N) + 1, tile_end)
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
    b_index += i_split.to(tl.int64) * tl.num_programs(1) * GROUP * probe_rows
    b_lse = tl.where(m_seen, b_max + tl.log2(b_sum), -float("inf"))
    tl.store(address(p_probe, PROBE.lse, tl.float32) + b_index, b_lse, mask=m_row)
    b_acc /= b_sum[:, None]
    o_d = tl.arange(0, BLOCK_DV)
    m_d = o_d < HEAD_DIM_V
    p_out = address(p_probe, PROBE.part, tl.float32) + b_index[:, None] * HEAD_DIM_V + o_d[None, :]
    tl.store(p_out, b_acc, mask=m_row[:, None] & m_d[None, :])
    p_projected = address(p_probe, PROBE.projected, tl.float32) + b_index * CHANNELS_HELD
    for i_channel in tl.static_range(1, CHANNELS_HELD):
        b_sign = tl.load(p_signs + o_d * CHANNELS_HELD + i_channel, mask=m_d, other=0.0).to(tl.float32)
        tl.store(p_projected + i_channel, tl.sum(b_acc * b_sign[None, :], 1), mask=m_row)


@triton.jit
def join_splits(p_probe, b_index, m_row, rows, value_scale):
    """Base-2 logarithm of the sum of some rows, and their projected output [rows, CHANNELS]."""
    splits, o_c = number(p_probe, PROBE.splits), tl.arange(0, CHANNELS_ALL)[None, :]
    p_lse = address(p_probe, PROBE.lse, tl.float32) + b_index
    p_projected = address(p_probe, PROBE.projected, tl.float32) + b_index[:, None] * CHANNELS_HELD + o_c
    m_projected = m_row[:, None] & (o_c > 0) & (o_c < CHANNELS_HELD)
    b_top = tl.full(b_index.shape, -float("inf"), tl.float32)
    for i_split in tl.range(0, splits):
        b_top = tl.maximum(b_top, tl.load(p_lse + i_split * rows, mask=m_row, other=0.0))
    b_sum = tl.zeros(b_index.shape, tl.float32)
    b_projected = tl.zeros([b_index.shape[0], CHANNELS_ALL], tl.float32)
    for i_split in tl.range(0, splits):
        b_share = tl.exp2(tl.load(p_lse + i_split * rows, mask=m_row, other=0.0) - b_top)
        b_sum += b_share
        b_part = tl.load(p_projected + i_split * rows * CHANNELS_HELD, mask=m_projected, other=0.0)
        b_projected += b_share[:, None] * b_part
    return b_top + tl.log2(b_sum), b_projected * (value_scale / b_sum)[:, None]


@triton.jit
def write_output(p_probe, i_index, head_first, rows, value_scale, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Output of one row, all its splits together, and its squared length."""
    o_d, splits = tl.arange(0, BLOCK_DV), number(p_probe, PROBE.splits)
    m_d = o_d < HEAD_DIM_V
    p_lse = address(p_probe, PROBE.lse, tl.float32) + i_index
    p_part = address(p_probe, PROBE.part, tl.float32) + i_index * HEAD_DIM_V + o_d
    top = -float("inf")
    for i_split in tl.range(0, splits):
        top = tl.maximum(top, tl.load(p_lse + i_split * rows))
    total = 0.0
    b_out = tl.zeros([BLOCK_DV], tl.float32)
    for i_split in tl.range(0, splits):
        share = tl.exp2(tl.load(p_lse + i_split * rows) - top)
        total += share
        b_out += share * tl.load(p_part + i_split * rows * HEAD_DIM_V, mask=m_d, other=0.0)
    b_out *= value_scale / total
    i_index += head_first * number(p_probe, PROBE.per_head)
    tl.store(address(p_probe, PROBE.output, tl.float32) + i_index * HEAD_DIM_V + o_d, b_out, mask=m_d)
    tl.store(address(p_probe, PROBE.size, tl.float32) + i_index, tl.sum(b_out * b_out, 0))


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


@triton.jit
def hold(
    p_job,
    rows_given,
    keys_given,
    i_split,
    scale_log2,
    rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    REGIONS: tl.constexpr,
):
    """What the tiles of one split of an order hold of some rows in one region or two."""
    b_index, m_row, b_query, b_pos, b_lse, b_projected = rows_given
    p_key, p_key_pos, p_parts = keys_given
    arrived, tiles, splits = number(p_job, JOB.arrived), number(p_job, JOB.tiles), number(p_job, JOB.splits)
    o_c = tl.arange(0, CHANNELS_ALL)[None, :]
    o_held = o_c * (rows * tiles) + b_index[:, None] * tiles
    m_held = m_row[:, None] & (o_c < CHANNELS_HELD)
    p_arrival, p_held = address(p_job, JOB.arrival, tl.int32), address(p_job, JOB.held, tl.float32) + o_held
    p_other = p_held
    sink, reach, other_sink, other_reach = number(p_job, JOB.sink), number(p_job, JOB.reach), 0, 0
    if REGIONS == 2:
        p_other = address(p_job, JOB.other_held, tl.float32) + o_held
        other_sink, other_reach = number(p_job, JOB.other_sink), number(p_job, JOB.other_reach)
    per_split = tl.cdiv(arrived, splits)
    for i_entry in tl.range(i_split * per_split, tl.minimum((i_split + 1) * per_split, arrived)):
        i_tile = tl.load(p_arrival + i_entry).to(tl.int64)
        b_first = tl.zeros([BLOCK_M, CHANNELS_ALL], tl.float32)
        b_second = tl.zeros([BLOCK_M, CHANNELS_ALL], tl.float32)
        for i_part in tl.static_range(PARTS):
            key_first = (i_tile * PARTS + i_part) * BLOCK_N
            b_score = scores(b_query, p_key, key_first, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N)
            b_key_pos = tl.load(p_key_pos + key_first + tl.arange(0, BLOCK_N))
            b_part = load_parts(p_parts, key_first, BLOCK_N)
            o_key = b_key_pos[None, :]
            b_weight = tl.where(o_key <= b_pos, tl.exp2(b_score - b_lse), 0.0)
            b_first = in_region(b_weight, b_part, b_first, sink, reach, o_key, b_pos)
            if REGIONS == 2:
                b_second = in_region(b_weight, b_part, b_second, other_sink, other_reach, o_key, b_pos)
        # Once per tile: what other threads stored could not be read back without a barrier.
        tl.store(p_held + i_tile, as_deviations(b_first, b_projected), mask=m_held)
        if REGIONS == 2:
            tl.store(p_other + i_tile, as_deviations(b_second, b_projected), mask=m_held)
    per_split = tl.cdiv(tiles - arrived, splits)
    first = arrived + i_split * per_split
    b_nothing = tl.zeros([BLOCK_M, CHANNELS_ALL], tl.float32)
    for i_entry in tl.range(first, tl.minimum(first + per_split, tiles)):
        i_tile = tl.load(p_arrival + i_entry).to(tl.int64)
        tl.store(p_held + i_tile, b_nothing, mask=m_held)
        if REGIONS == 2:
            tl.store(p_other + i_tile, b_nothing, mask=m_held)


@triton.jit(do_not_specialize=["head_first", "splits"])
def held_kernel(
    p_jobs,
    p_probes,
    p_query,
    p_key,
    p_key_pos,
    p_parts,
    scale_log2,
    value_scale,
    head_first,
    splits,
    stride_query_row,
    stride_query_head,
    stride_key_head,
    stride_part_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One block of rows of one KV head over one split of the key tiles of an order, and the output of some of the rows.

    ``splits``: most of an order. What tiles hold: [HELD, H, P, tiles] for the heads that are probed at a time.
    """
    i_kv, i_split = tl.program_id(1), tl.program_id(2) % splits
    p_job = p_jobs + tl.program_id(2) // splits * JOB.width
    p_probe = p_probes + number(p_job, JOB.probe) * PROBE.width
    of_group, own = GROUP * number(p_probe, PROBE.per_head), number(p_job, JOB.splits)
    row_first = tl.program_id(0) * BLOCK_M
    if (i_split >= own) | (row_first >= of_group):
        return
    rows = tl.num_programs(1).to(tl.int64) * of_group
    if number(p_job, JOB.writes) != 0:
        per_split = tl.cdiv(BLOCK_M, own)
        last = tl.minimum(tl.minimum((i_split + 1) * per_split, BLOCK_M), of_group - row_first)
        for i_row in tl.range(i_split * per_split, last):
            i_index = i_kv.to(tl.int64) * of_group + row_first + i_row
            write_output(p_probe, i_index, head_first, rows, value_scale, HEAD_DIM_V, BLOCK_DV)
    b_index, m_row, b_query, b_pos = rows_of_group(
        p_probe, p_query, head_first, stride_query_row, stride_query_head, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    b_lse, b_projected = join_splits(p_probe, b_index, m_row, rows, value_scale)
    first = number(p_job, JOB.first).to(tl.int64) * (PARTS * BLOCK_N)
    p_key += i_kv.to(tl.int64) * stride_key_head + first * HEAD_DIM
    p_parts += i_kv.to(tl.int64) * stride_part_head + first * CHANNELS_HELD
    rows_given = b_index, m_row, b_query, b_pos[:, None], b_lse[:, None], b_projected
    keys_given = p_key, p_key_pos + first, p_parts
    if number(p_job, JOB.regions) == 2:
        hold(p_job, rows_given, keys_given, i_split, scale_log2, rows, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PARTS, 2)
    else:
        hold(p_job, rows_given, keys_given, i_split, scale_log2, rows, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PARTS, 1)


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


def constants_for(
    launch: ProbeLaunch, tile_keys: int, group: int, head_dim: int, head_dim_v: int
) -> dict[str, int | bool]:
    """Compile-time arguments of :func:`probe_kernel` and :func:`held_kernel`."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(head_dim_v)),
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.keys,
        "PARTS": tile_keys // launch.keys,
    }


class Source(NamedTuple):
    """Keys of which it is asked what tiles hold: the far region of a sink and a reach, by tile of one of the orders.

    That of 0 and 0 is all keys.
    """

    cell: bool
    sink: int
    reach: int


@dataclass(frozen=True)
class Probed:
    """Rows of a row group that are probed, and where the results go.

    ``output`` fp32 [H, P, Dv]: the probe rows' dense output; ``size`` fp32 [H, P]: its squared length. ``held``: by
    source room for what tiles hold, fp32 [HELD, H', P, n] where H' heads are probed at a time: masses, which are shares
    of a row's softmax, then deviations.
    """

    keys: ProbeKeys
    rows: ProbeRows
    output: torch.Tensor
    size: torch.Tensor
    held: Mapping[Source, torch.Tensor]


class Probes:
    """Tables and memory of the probes of a forward, for layers that ask the same."""

    def __init__(
        self,
        probed: Sequence[Probed],
        operands: Operands,
        heads: int,
        new: Callable[..., torch.Tensor],
        launch: ProbeLaunch | None = None,
    ) -> None:
        """``operands``: of a layer like those that will come; ``heads``: that are probed at a time, whole GQA groups.

        ``new``: makes room for fp32 of a shape. ``launch`` replaces those of both kernels.
        """
        self.probed = probed
        query, head_dim_v = operands.query, operands.value_pool.shape[2]
        self.all_keys, head_dim = probed[0].keys.sequence.all_keys, query.shape[2]
        tile_keys, self._most_rows = self.all_keys.slots.shape[1], max(one.rows.per_head for one in probed)
        wide = probe_launch(max(head_dim, head_dim_v), query.element_size(), tile_keys)
        self.launches = launch or wide, launch or held_launch(head_dim, query.element_size(), tile_keys)
        blocks = [heads * one.rows.per_head for one in probed]
        probes, jobs = Table(PROBE), Table(JOB)
        orders = sum(len({source.cell for source in one.held}) for one in probed)
        most = [1, 1]
        for one, rows in zip(probed, blocks, strict=True):
            sequence, writes = one.keys.sequence, 1
            tiles = sequence.arrival.numel()
            per_split = triton.cdiv(tiles, self._splits(rows, tiles, self.launches[0], len(probed)))
            splits = triton.cdiv(tiles, per_split)
            for order in (sequence, one.keys.cell):
                asked = [source for source in one.held if source.cell == (order is one.keys.cell)]
                for first in range(0, len(asked), MAX_REGIONS):
                    assert order is not None
                    some = asked[first : first + MAX_REGIONS]
                    own_splits = self._splits(rows, order.arrival.numel(), self.launches[1], orders)
                    jobs.add(
                        probe=len(probes),
                        arrival=order.arrival,
                        held=one.held[some[0]],
                        other_held=one.held[some[-1]],
                        arrived=order.arrived,
                        tiles=order.arrival.numel(),
                        first=order.tiles.start,
                        sink=some[0].sink,
                        reach=some[0].reach,
                        other_sink=some[-1].sink,
                        other_reach=some[-1].reach,
                        regions=len(some),
                        splits=own_splits,
                        writes=writes,
                    )
                    writes, most = 0, [most[0], max(most[1], own_splits)]
            probes.add(
                rows=one.rows.rows,
                positions=one.rows.positions,
                row_of=one.rows.of(operands.heads, operands.group, operands.first).int(),
                part=new(splits, rows, head_dim_v),
                lse=new(splits, rows),
                projected=new(splits, rows, HELD),
                output=one.output,
                size=one.size,
                per_head=one.rows.per_head,
                first=sequence.tiles.start,
                tiles=tiles,
                per_split=per_split,
                splits=splits,
            )
            most[0] = max(most[0], splits)
        self.splits, self.counts = most, (len(probes), len(jobs))
        self._kept = probes.kept, jobs.kept
        self.probes, self.jobs = upload((probes, jobs), query.device)

    def blocks(self, launch: ProbeLaunch, group: int) -> int:
        """Blocks of rows of a KV head."""
        return -(-group * self._most_rows // launch.rows)

    def _splits(self, rows: int, tiles: int, launch: ProbeLaunch, others: int) -> int:
        """Programs among which the key tiles are split, for each block of rows; there are ``others`` like these."""
        return max(1, min(PROGRAMS * launch.rows // (rows * others), tiles // MIN_TILES))


def run(operands: Operands, probes: Probes, first: int = 0) -> None:
    """Probes for some heads, the ``first`` of which counts from those of the layer that the tables are for."""
    query = operands.query
    copies = operands.copies(probes.all_keys, query.dtype)
    kv_heads, _, head_dim_v = copies.values.shape
    for_probe, for_held = probes.launches

    def grid(launch: ProbeLaunch, programs: int) -> tuple[int, int, int]:
        return probes.blocks(launch, operands.group), kv_heads, programs

    def options(launch: ProbeLaunch) -> dict[str, int | bool]:
        tile_keys = probes.all_keys.slots.shape[1]
        constants = constants_for(launch, tile_keys, operands.group, query.shape[2], head_dim_v)
        return {**constants, **OPTIONS, "num_warps": launch.warps, "num_stages": launch.stages}

    scale_log2 = operands.scale * operands.key_scale * LOG2_E
    strides = query.stride(0), query.stride(1), copies.keys.stride(0)
    probe_kernel[grid(for_probe, probes.counts[0] * probes.splits[0])](
        probes.probes,
        query,
        copies.keys,
        copies.values,
        padded_signs(head_dim_v, query.dtype, query.device),
        scale_log2,
        first,
        probes.splits[0],
        *strides,
        copies.values.stride(0),
        **options(for_probe),
    )
    held_kernel[grid(for_held, probes.counts[1] * probes.splits[1])](
        probes.jobs,
        probes.probes,
        query,
        copies.keys,
        probes.all_keys.positions,
        copies.parts,
        scale_log2,
        operands.value_scale,
        first,
        probes.splits[1],
        *strides,
        copies.parts.stride(0),
        **options(for_held),
    )
