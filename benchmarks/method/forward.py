"""One chunk of a planted problem in a paged pool, and the fewest tiles that hold what was planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
import torch

from benchmarks.method.planted import Ints, Problem, Relation
from mminference_sgl import _core
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import TilePass
from mminference_sgl.method import plan as planning
from mminference_sgl.method import prefill
from mminference_sgl.method.config import Config

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Forward:
    """One chunk of a problem in a paged pool: operands, plan and the plan whose passes hold only sampled rows."""

    problem: Problem
    start: int
    end: int
    operands: Operands
    plan: planning.ForwardPlan
    sampled_plan: planning.ForwardPlan

    @cached_property
    def causal(self) -> int:
        """Tiles that dense attention computes, over all heads."""
        near = self.plan.near
        return int((near.keys.tile_min <= near.max_pos[:, None]).sum()) * self.operands.heads

    @cached_property
    def needed(self) -> int:
        """Tiles of the planted map over all heads."""
        return sum(needed_tiles(self.plan, head.relations) for head in self.problem.heads)


def forward(
    problem: Problem,
    start: int,
    end: int,
    config: Config,
    sample: Ints,
    *,
    chunk: int = 0,
    seed: int = 0,
    probe_one_in: int = 0,
) -> Forward:
    """The plan of rows ``start`` to ``end``, later keys not written yet; ``sample``: positions to attend to.

    ``chunk``: the size of chunks that the layout is told, 0 for none. ``probe_one_in``: see :func:`.plan.build`.
    """
    scene = problem.scene
    slots = torch.from_numpy(np.random.default_rng(seed).permutation(scene.length) + 1)
    pools = []
    for operand in (problem.key, problem.value):
        pool = torch.full((scene.length + 1, *operand.shape[1:]), torch.nan)
        pool[slots[:end]] = operand[:end]
        pools.append(pool)
    heads, kv_heads = problem.query.shape[1], problem.key.shape[1]
    sharing = prefill.sharing(config, heads // kv_heads)
    layout = _core.Layout(
        scene.length,
        scene.items,
        chunk_tokens=chunk,
        tile_queries=planning.smallest_tile(config.tile_queries, sharing),
        cell_size=config.cell_size,
    )
    device_layout = planning.DeviceLayout(layout, config.tile_keys, CPU)
    request = planning.SparseRequest(device_layout, start, end - start, torch.tensor([0]), 0)
    plan = planning.build(
        [request],
        slots[None].int(),
        tile_queries=config.tile_queries,
        tile_keys=config.tile_keys,
        probe_rows=config.probe_rows,
        probe_one_in=probe_one_in,
        sharing=sharing,
    )
    wanted = torch.zeros(end - start, dtype=torch.bool)
    wanted[sample[(sample >= start) & (sample < end)] - start] = True
    for group in plan.groups:
        # The guard looks at their output.
        wanted[group.probe_rows.rows] = True
    near, far = thin(plan.near, wanted), plan.far and thin(plan.far, wanted)
    slots = [slice(*near.indptr[[group.near.start, group.near.stop]].tolist()) for group in plan.groups]
    groups = [replace(group, row_slots=own) for group, own in zip(plan.groups, slots, strict=True)]
    shared = [
        replace(tiling, near=thin(tiling.near, wanted), far=tiling.far and thin(tiling.far, wanted))
        for tiling in plan.shared
    ]
    sampled = replace(plan, near=near, far=far, groups=groups, shared=shared)
    operands = Operands(problem.query[start:end], *pools, problem.scale)
    return Forward(problem, start, end, operands, plan, sampled)


def thin(tile_pass: TilePass, wanted: torch.Tensor) -> TilePass:
    """The same query tiles with only the ``wanted`` batch rows, and each tile's first row, as none may be empty."""
    keep = wanted[tile_pass.rows]
    keep[tile_pass.indptr[:-1].long()] = True
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    indptr = before[tile_pass.indptr.long()].int()
    return replace(tile_pass, rows=tile_pass.rows[keep], positions=tile_pass.positions[keep], indptr=indptr)


def needed_tiles(plan: planning.ForwardPlan, relations: Sequence[Relation]) -> int:
    """Fewest tiles that hold the relations' pairs, each relation of media rows in one of the two passes."""
    total, media = 0, None
    for group in plan.groups:
        near = [_tile_map(plan.near, group.near, relation) for relation in relations]
        if group.modality == "text" or plan.far is None:
            total += int(np.logical_or.reduce(near).sum())
            continue
        far = [_tile_map(plan.far, group.far, relation) for relation in relations]
        names = sorted({relation.name for relation in relations})
        for split in product((near, far), repeat=len(names)):
            maps = dict(zip(names, split, strict=True))
            count = 0
            for side in (near, far):
                chosen = [side[i] for i, relation in enumerate(relations) if maps[relation.name] is side]
                count += int(np.logical_or.reduce(chosen).sum()) if chosen else 0
            media = count if media is None else min(media, count)
    return total + (media or 0)


def _tile_map(tile_pass: TilePass, tiles: slice, relation: Relation) -> np.ndarray:
    """Whether a key tile holds a key for some row of a query tile, bool [query tiles, key tiles]."""
    positions, indptr = tile_pass.positions.numpy(), tile_pass.indptr.numpy()
    keys = tile_pass.keys.positions.numpy()
    labels = int(max(relation.rows.max(), relation.keys.max())) + 1
    known = keys < relation.keys.size
    label = np.where(known, relation.keys[np.where(known, keys, 0)], -1)
    # The first key of each label in each key tile: it is the one that most rows may see.
    first = np.full((keys.shape[0], labels), np.iinfo(np.int64).max)
    tile, lane = np.nonzero(label >= 0)
    np.minimum.at(first, (tile, label[tile, lane]), keys[tile, lane])
    result = np.zeros((tiles.stop - tiles.start, keys.shape[0]), dtype=bool)
    for index in range(tiles.start, tiles.stop):
        rows = positions[indptr[index] : indptr[index + 1]]
        rows = rows[relation.rows[rows] >= 0]
        last = np.full(labels, -1)
        np.maximum.at(last, relation.rows[rows], rows)
        own = np.flatnonzero(last >= 0)
        result[index - tiles.start] = (first[:, own] <= last[own]).any(1)
    return result
