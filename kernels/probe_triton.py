"""The probe in Triton: output and mass by key tile of the probe rows, and never a weight per row and key.

The rows of all heads that share a KV head are one block of rows, so keys are read once for the group. Programs split
the key tiles among them. :func:`probe_kernel` runs an online softmax over the sequence order and leaves, by tile, the
logarithm of its sum; :func:`combine_kernel` joins the splits and turns the logarithms into shares of the row.
:func:`mass_kernel` scores the keys of an order once more against the known logarithm of the row's sum, and adds up what
lies in some regions.

Floor for ``P`` rows and ``N`` keys: ``2 * H * P * N * (D + Dv)`` FLOPs for the softmax and ``2 * H * P * N * D`` for
the mass by cell; keys twice and values once from the pool; 4 bytes per (row, key tile) and region. docs/kernels.md has
the figures. Numbers that change from chunk to chunk are not specialised on, or kernels would be compiled while serving.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attend import load_rows, readable, widen
from .launch_table import OPTIONS
from .operands import Operands
from .probe import Bound, ProbeKeys, ProbeRows
from .tiles import KeyOrder

LOG2_E = math.log2(math.e)
PROGRAMS = 512
"""Programs that a launch is split into, a few per processor; fewer where a split would have less than MIN_TILES."""
MIN_TILES = 8
BLOCK_TILES = 1024
"""Key tiles at a time where their logarithms become shares."""


@triton.jit
def rows_of_group(i_block, i_kv, probe_rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head, probe row and presence of the rows of a block; a group's rows are its heads' probe rows in turn."""
    o_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < GROUP * probe_rows
    b_head = i_kv * GROUP + o_row // probe_rows
    return b_head.to(tl.int64), (o_row % probe_rows).to(tl.int64), m_row


@triton.jit
def scores(
    b_query,
    p_key,
    p_slots,
    key_first,
    stride_key_slot,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8_BITS: tl.constexpr,
):
    """Base-2 logits [rows, keys] of some keys of an order, and their slots."""
    b_slot = tl.load(p_slots + key_first + tl.arange(0, BLOCK_N)).to(tl.int64)
    b_key = widen(load_rows(p_key, b_slot, None, stride_key_slot, 0, BLOCK_D, HEAD_DIM), b_query.dtype, FP8_BITS)
    return tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale_log2, b_slot


@triton.jit(do_not_specialize=["probe_rows", "tiles", "tiles_per_split"])
def probe_kernel(
    p_query,
    p_key,
    p_value,
    p_rows,
    p_row_pos,
    p_slots,
    p_mass,
    p_part,
    p_part_lse,
    scale_log2,
    probe_rows,
    tiles,
    tiles_per_split,
    stride_query_row,
    stride_query_head,
    stride_key_slot,
    stride_key_head,
    stride_value_slot,
    stride_value_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    FP8_BITS: tl.constexpr,
):
    """One block of rows of one KV head over one split of the sequence order's key tiles.

    ``p_mass`` [H, P, tiles]: base-2 logarithm of each tile's sum of exponentials. ``p_part`` [splits, H, P, Dv] and
    ``p_part_lse`` [splits, H, P]: output and base-2 logarithm of the sum over the split.
    """
    i_kv, i_split = tl.program_id(1), tl.program_id(2)
    b_head, b_probe, m_row = rows_of_group(tl.program_id(0), i_kv, probe_rows, GROUP, BLOCK_M)
    b_batch_row = tl.load(p_rows + b_probe, mask=m_row, other=0)
    # A lane without a row stands before every key, so it sees none.
    b_pos = tl.load(p_row_pos + b_probe, mask=m_row, other=-1)
    o_d = tl.arange(0, BLOCK_D)
    p_q = p_query + (b_batch_row * stride_query_row + b_head * stride_query_head)[:, None] + o_d[None, :]
    b_query = tl.load(p_q, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    p_key += i_kv.to(tl.int64) * stride_key_head
    p_value += i_kv.to(tl.int64) * stride_value_head
    heads = tl.num_programs(1) * GROUP
    b_index = b_head * probe_rows + b_probe
    p_mass += b_index * tiles

    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    tile_first = i_split * tiles_per_split
    tile_end = tl.minimum(tile_first + tiles_per_split, tiles)
    last_pos = tl.max(b_pos, 0)
    tile_seen = tl.minimum(last_pos // (PARTS * BLOCK_N) + 1, tile_end)
    for i_tile in tl.range(tile_first, tile_seen):
        b_tile = tl.zeros([BLOCK_M], tl.float32)
        for i_part in tl.static_range(PARTS):
            key_first = (i_tile * PARTS + i_part) * BLOCK_N
            b_score, b_slot = scores(
                b_query, p_key, p_slots, key_first, stride_key_slot, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, FP8_BITS
            )
            o_key = key_first + tl.arange(0, BLOCK_N)
            b_score = tl.where(o_key[None, :] <= b_pos[:, None], b_score, -float("inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
            b_shift = tl.where(b_new_max == -float("inf"), 0.0, b_new_max)
            b_weight = tl.exp2(b_score - b_shift[:, None])
            b_decay = tl.exp2(b_max - b_shift)
            b_part = tl.sum(b_weight, 1)
            b_tile = b_tile * b_decay + b_part
            b_sum = b_sum * b_decay + b_part
            b_max = b_new_max
            # What is behind a request's last key may be anything, and 0 * NaN is no 0.
            m_slot = o_key <= last_pos
            b_value = load_rows(p_value, b_slot, m_slot, stride_value_slot, 0, BLOCK_DV, HEAD_DIM_V)
            b_value = widen(b_value, b_query.dtype, FP8_BITS)
            b_acc = tl.dot(b_weight.to(b_query.dtype), b_value, b_acc * b_decay[:, None], input_precision="ieee")
        tl.store(p_mass + i_tile, b_max + tl.log2(b_tile), mask=m_row)
    for i_tile in tl.range(tl.maximum(tile_first, tile_seen), tile_end):
        tl.store(p_mass + i_tile, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=m_row)

    m_seen = b_sum > 0
    b_sum = tl.where(m_seen, b_sum, 1.0)
    b_index += i_split.to(tl.int64) * heads * probe_rows
    tl.store(p_part_lse + b_index, tl.where(m_seen, b_max + tl.log2(b_sum), -float("inf")), mask=m_row)
    o_d = tl.arange(0, BLOCK_DV)
    p_out = p_part + b_index[:, None] * HEAD_DIM_V + o_d[None, :]
    tl.store(p_out, b_acc / b_sum[:, None], mask=m_row[:, None] & (o_d < HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=["tiles", "splits"])
def combine_kernel(
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    p_mass,
    value_scale,
    tiles,
    splits,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Joins the splits of one (head, probe row): ``p_out`` [H, P, Dv], ``p_lse`` [H, P], and shares in ``p_mass``."""
    i_row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    o_split = tl.arange(0, BLOCK_SPLITS)
    b_lse = tl.load(p_part_lse + o_split * rows + i_row, mask=o_split < splits, other=-float("inf"))
    top = tl.max(b_lse, 0)
    lse = top + tl.log2(tl.sum(tl.exp2(b_lse - top), 0))
    tl.store(p_lse + i_row, lse)
    o_d = tl.arange(0, BLOCK_DV)
    m_d = o_d < HEAD_DIM_V
    b_out = tl.zeros([BLOCK_DV], tl.float32)
    for i_split in tl.range(0, splits):
        share = tl.exp2(tl.load(p_part_lse + i_split * rows + i_row) - lse)
        b_out += share * tl.load(p_part + (i_split * rows + i_row) * HEAD_DIM_V + o_d, mask=m_d, other=0.0)
    tl.store(p_out + i_row * HEAD_DIM_V + o_d, b_out * value_scale, mask=m_d)
    p_mass += i_row * tiles
    for first in tl.range(0, tiles, BLOCK_TILES):
        o_tile = first + tl.arange(0, BLOCK_TILES)
        b_mass = tl.load(p_mass + o_tile, mask=o_tile < tiles, other=-float("inf"))
        tl.store(p_mass + o_tile, tl.exp2(b_mass - lse), mask=o_tile < tiles)


@triton.jit(do_not_specialize=["probe_rows", "tiles"])
def mass_kernel(
    p_query,
    p_key,
    p_rows,
    p_row_pos,
    p_slots,
    p_key_pos,
    p_present,
    p_count,
    p_lse,
    p_sink,
    p_reach,
    p_mass,
    scale_log2,
    probe_rows,
    tiles,
    stride_query_row,
    stride_query_head,
    stride_key_slot,
    stride_key_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    REGIONS: tl.constexpr,
    BLOCK_REGIONS: tl.constexpr,
    FAR: tl.constexpr,
    FP8_BITS: tl.constexpr,
):
    """One block of rows of one KV head over one split of an order's key tiles.

    ``p_present`` [tiles]: the order's tiles, the ``p_count`` that are not all in the future first.
    ``p_sink``, ``p_reach`` [REGIONS, H]; ``p_mass`` [REGIONS, H, P, tiles]: mass in each region by tile.
    """
    i_kv, i_split = tl.program_id(1), tl.program_id(2)
    b_head, b_probe, m_row = rows_of_group(tl.program_id(0), i_kv, probe_rows, GROUP, BLOCK_M)
    b_batch_row = tl.load(p_rows + b_probe, mask=m_row, other=0)
    b_pos = tl.load(p_row_pos + b_probe, mask=m_row, other=-1)[:, None]
    heads = tl.num_programs(1) * GROUP
    b_index = b_head * probe_rows + b_probe
    b_lse = tl.load(p_lse + b_index, mask=m_row, other=0.0)[:, None]
    o_d = tl.arange(0, BLOCK_D)
    p_q = p_query + (b_batch_row * stride_query_row + b_head * stride_query_head)[:, None] + o_d[None, :]
    b_query = tl.load(p_q, mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)
    p_key += i_kv.to(tl.int64) * stride_key_head
    o_region = tl.arange(0, BLOCK_REGIONS)[None, :]
    p_masses = p_mass + (o_region * heads.to(tl.int64) * probe_rows + b_index[:, None]) * tiles
    m_masses = m_row[:, None] & (o_region < REGIONS)

    count = tl.load(p_count).to(tl.int32)
    per_split = tl.cdiv(count, tl.num_programs(2))
    for i_entry in tl.range(i_split * per_split, tl.minimum((i_split + 1) * per_split, count)):
        i_tile = tl.load(p_present + i_entry).to(tl.int64)
        b_mass = tl.zeros([BLOCK_M, BLOCK_REGIONS], tl.float32)
        for i_part in tl.static_range(PARTS):
            key_first = (i_tile * PARTS + i_part) * BLOCK_N
            b_score, _ = scores(
                b_query, p_key, p_slots, key_first, stride_key_slot, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_N, FP8_BITS
            )
            b_key_pos = tl.load(p_key_pos + key_first + tl.arange(0, BLOCK_N))[None, :]
            b_weight = tl.where(b_key_pos <= b_pos, tl.exp2(b_score - b_lse), 0.0)
            for i_region in tl.static_range(REGIONS):
                b_sink = tl.load(p_sink + i_region * heads + b_head, mask=m_row, other=0)[:, None]
                b_reach = tl.load(p_reach + i_region * heads + b_head, mask=m_row, other=0)[:, None]
                m_near = (b_key_pos < b_sink) | (b_key_pos > b_pos - b_reach)
                b_part = tl.sum(tl.where(m_near != FAR, b_weight, 0.0), 1)
                b_mass += tl.where(o_region == i_region, b_part[:, None], 0.0)
        # Once per tile: what other threads stored could not be read back without a barrier.
        tl.store(p_masses + i_tile, b_mass, mask=m_masses)
    per_split = tl.cdiv(tiles - count, tl.num_programs(2))
    first = count + i_split * per_split
    for i_entry in tl.range(first, tl.minimum(first + per_split, tiles)):
        i_tile = tl.load(p_present + i_entry).to(tl.int64)
        tl.store(p_masses + i_tile, tl.zeros([BLOCK_M, BLOCK_REGIONS], tl.float32), mask=m_masses)


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
    if head_dim <= 64:
        return ProbeLaunch(64, min(64, tile_keys), 4, 3)
    return ProbeLaunch(64 if head_dim <= 128 else 16, min(64, tile_keys), 8, 2)


def mass_launch(head_dim: int, element_size: int, tile_keys: int) -> ProbeLaunch:
    """That of :func:`mass_kernel`."""
    if element_size == 4:
        return ProbeLaunch(16, min(16, tile_keys), 4, 2)
    if head_dim <= 128:
        return ProbeLaunch(64, min(64 if head_dim <= 64 else 32, tile_keys), 4, 2)
    return ProbeLaunch(64, min(16, tile_keys), 8, 2)


def constants_for(
    launch: ProbeLaunch, tile_keys: int, *, group: int, head_dim: int, fp8_bits: bool
) -> dict[str, int | bool]:
    """Compile-time arguments that :func:`probe_kernel` and :func:`mass_kernel` have in common."""
    return {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.keys,
        "PARTS": tile_keys // launch.keys,
        "FP8_BITS": fp8_bits,
    }


@dataclass(frozen=True)
class _Shared:
    """What every launch of a probe has in common: the operands as kernels read them here."""

    operands: Operands
    fp8_bits: bool

    @property
    def scale_log2(self) -> float:
        """Scale of the base-2 logits."""
        return self.operands.scale * self.operands.key_scale * LOG2_E

    def grid(self, launch: ProbeLaunch, rows: int, tiles: int) -> tuple[int, int, int]:
        """Blocks of rows, KV heads and splits of the key tiles."""
        kv_heads = self.operands.kv_heads
        blocks = triton.cdiv(self.operands.group * rows, launch.rows)
        return blocks, kv_heads, max(1, min(PROGRAMS // (blocks * kv_heads), tiles // MIN_TILES))

    def options(self, launch: ProbeLaunch, tile_keys: int) -> dict[str, int | bool]:
        """Compile-time arguments that both kernels have, and those of the launch."""
        group, head_dim = self.operands.group, self.operands.query.shape[2]
        constants = constants_for(launch, tile_keys, group=group, head_dim=head_dim, fp8_bits=self.fp8_bits)
        return {**constants, **OPTIONS, "num_warps": launch.warps, "num_stages": launch.stages}


@dataclass(frozen=True)
class FusedProbe:
    """A :class:`~.probe.Probe` that keeps the logarithm of each row's sum, and scores keys again for other masses.

    ``lse`` fp32 [H, P]: base 2, of scaled logits.
    """

    rows: ProbeRows
    output: torch.Tensor
    tile_mass: torch.Tensor
    lse: torch.Tensor
    keys: ProbeKeys
    shared: _Shared
    launch: ProbeLaunch | None

    def near(self, sink: Bound, reach: Bound) -> torch.Tensor:
        """See :class:`~.probe.Probe`."""
        return self._mass(self.keys.sequence, [(sink, reach)], far=False)[0]

    def far(self, regions: Sequence[tuple[Bound, Bound]]) -> torch.Tensor:
        """See :class:`~.probe.Probe`."""
        assert self.keys.cell is not None
        return self._mass(self.keys.cell, regions, far=True)

    def _mass(self, order: KeyOrder, regions: Sequence[tuple[Bound, Bound]], *, far: bool) -> torch.Tensor:
        heads, rows = self.lse.shape
        sinks, reaches = (
            torch.stack([_by_head(bound, heads, self.lse.device) for bound in bounds])
            for bounds in zip(*regions, strict=True)
        )
        present, count = self.keys.present(order)
        mass = self.lse.new_empty(len(regions), heads, rows, present.numel())
        shared, query, key_pool = self.shared, self.shared.operands.query, self.shared.operands.key_pool
        launch = self.launch or mass_launch(query.shape[2], query.element_size(), order.tile_keys)
        mass_kernel[shared.grid(launch, rows, present.numel())](
            query,
            key_pool,
            self.rows.rows,
            self.rows.positions,
            order.slots,
            order.positions,
            present,
            count,
            self.lse,
            sinks,
            reaches,
            mass,
            shared.scale_log2,
            rows,
            present.numel(),
            query.stride(0),
            query.stride(1),
            key_pool.stride(0),
            key_pool.stride(1),
            REGIONS=len(regions),
            BLOCK_REGIONS=triton.next_power_of_2(len(regions)),
            FAR=far,
            **shared.options(launch, order.tile_keys),
        )
        return mass


def _by_head(bound: Bound, heads: int, device: torch.device) -> torch.Tensor:
    if isinstance(bound, torch.Tensor):
        return bound
    return torch.full((heads,), bound, dtype=torch.int32, device=device)


def run(operands: Operands, keys: ProbeKeys, rows: ProbeRows, *, launch: ProbeLaunch | None = None) -> FusedProbe:
    """Probes a request; arguments as in :func:`.probe.run`. ``launch`` replaces those of both kernels."""
    operands, fp8_bits = readable(operands)
    query, key_pool, value_pool = operands.query, operands.key_pool, operands.value_pool
    heads, head_dim = query.shape[1:]
    head_dim_v = value_pool.shape[2]
    tile_keys, tiles = keys.sequence.tile_keys, keys.sequence.slots.shape[0]
    shared = _Shared(operands, fp8_bits)
    own = launch or probe_launch(max(head_dim, head_dim_v), query.element_size(), tile_keys)
    count = rows.rows.numel()
    grid = shared.grid(own, count, tiles)
    per_split = triton.cdiv(tiles, grid[2])
    splits = triton.cdiv(tiles, per_split)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    mass, out, lse = empty(heads, count, tiles), empty(heads, count, head_dim_v), empty(heads, count)
    part, part_lse = empty(splits, heads, count, head_dim_v), empty(splits, heads, count)
    block_dv = max(16, triton.next_power_of_2(head_dim_v))
    probe_kernel[grid[0], grid[1], splits](
        query,
        key_pool,
        value_pool,
        rows.rows,
        rows.positions,
        keys.sequence.slots,
        mass,
        part,
        part_lse,
        shared.scale_log2,
        count,
        tiles,
        per_split,
        query.stride(0),
        query.stride(1),
        key_pool.stride(0),
        key_pool.stride(1),
        value_pool.stride(0),
        value_pool.stride(1),
        HEAD_DIM_V=head_dim_v,
        BLOCK_DV=block_dv,
        **shared.options(own, tile_keys),
    )
    combine_kernel[heads * count,](
        part,
        part_lse,
        out,
        lse,
        mass,
        operands.value_scale,
        tiles,
        splits,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DV=block_dv,
        BLOCK_SPLITS=PROGRAMS,
        BLOCK_TILES=BLOCK_TILES,
        **OPTIONS,
    )
    return FusedProbe(rows, out, mass, lse, keys, shared, launch)
