"""``make bench-method``: what selection keeps of planted attention, and how many tiles it computes for it.

Queries and keys are built so that the true attention map is known (:mod:`planted`). For each case and pattern:

- *needed*: tiles of the planted map, under the better split over the two passes, over causal tiles;
- *density*: tiles that the pattern computes, over causal tiles;
- *coverage*: the mass kept as selection itself reports it, from its probe rows;
- *mass*: the mass kept in truth, mean over all rows, and *weakest*: the kind of rows that keeps least;
- *error*: relative error of the output against dense attention.

The last three are exact for a sample of rows: only they are attended to, with the tiles that selection chose for all
rows, and their dense attention is computed in full. Cases in chunks measure the first, a middle and the last one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mminference_sgl import _core, prefill
from mminference_sgl import plan as planning
from mminference_sgl.catalog import HeadSpec
from mminference_sgl.config import Config, from_sources
from mminference_sgl.kernels import ops
from mminference_sgl.kernels.tiles import TilePass

sys.path.append(str(Path(__file__).parent))
import planted
from method_cases import CASES, Case, judge
from method_losses import losses
from planted import Ints, Problem, Relation

CPU = torch.device("cpu")
SAMPLE = 512
KINDS = ("media", "hlines", "between", "text")
"""Kinds of rows: at a place, at a place of an h-line, between two frames of an item, text outside of items."""


@dataclass(frozen=True)
class Result:
    """One pattern on one case; figures as in the module's text, ``mass_by_kind`` of the rows' kinds."""

    case: str
    pattern: str
    tokens: int
    chunk: int
    needed: float
    planted: float
    density: float
    density_near: float
    """The part of the density that the sequence pass computes."""
    coverage: float
    mass: float
    error: float
    guarded: int
    mass_by_kind: dict[str, float]
    mass_by_head: list[float]
    mass_as_chunked: dict[int, float]
    """In one chunk: the mass of the rows that the same case in chunks of that size measures."""
    seconds: float
    why: list[str]
    """One line per measured chunk, if asked for."""


@dataclass(frozen=True)
class Truth:
    """Dense attention of sampled rows: positions [S] ascending; lse, planted [S, H]; out [S, H, Dv].

    ``weight`` by size of the chunks, 0 for one chunk: [S], sums to 1 and makes means over the sample means over all
    rows of the measured chunks; 0 for rows drawn for another size. ``kind`` [S] indexes :data:`KINDS`.
    """

    positions: Ints
    kind: Ints
    weight: dict[int, np.ndarray]
    lse: torch.Tensor
    planted: torch.Tensor
    out: torch.Tensor


def measured_chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    """Start and end of the first, a middle and the last chunk; of everything for ``chunk`` 0."""
    if chunk == 0:
        return [(0, length)]
    count = -(-length // chunk)
    return [(index * chunk, min(length, (index + 1) * chunk)) for index in sorted({0, count // 2, count - 1})]


def kinds_of(problem: Problem) -> Ints:
    """Kind of every row, [length]."""
    scene = problem.scene
    kind = np.where(scene.media, 0, np.where(scene.deciding, 3, 2))
    kind[problem.hline] = 1
    return kind


def dense_truth(problem: Problem, chunks: Sequence[int], seed: int) -> Truth:
    """Draws rows by kind for each size of chunks, 0 for one chunk, and computes their dense attention."""
    rng = np.random.default_rng(seed)
    length, kind = problem.scene.length, kinds_of(problem)
    weights = {chunk: np.zeros(length) for chunk in {0, *chunks}}
    for chunk, weight in weights.items():
        rows = np.concatenate([np.arange(start, end) for start, end in measured_chunks(length, chunk)])
        _draw(rows, kind, weight, rng)
    positions = np.flatnonzero(sum(weights.values()))
    parts = [_dense_rows(problem, block) for block in np.array_split(positions, -(-positions.size // 64))]
    lse, mass, out = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return Truth(positions, kind[positions], {c: w[positions] for c, w in weights.items()}, lse, mass, out)


def _draw(rows: Ints, kind: Ints, weight: np.ndarray, rng: np.random.Generator) -> None:
    """Gives some of the rows their weight: a share of them per kind, evenly over its positions."""
    for index in range(len(KINDS)):
        own = rows[kind[rows] == index]
        if own.size == 0:
            continue
        wanted = min(own.size, max(SAMPLE // 8, round(SAMPLE * own.size / rows.size)))
        picked = own[((np.arange(wanted) + rng.random(wanted)) * own.size / wanted).astype(np.int64)]
        np.add.at(weight, picked, own.size / rows.size / wanted)


def _dense_rows(problem: Problem, positions: Ints) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LSE [s, H], mass in the planted map [s, H] and output [s, H, Dv] of some rows."""
    keys = int(positions[-1]) + 1
    heads, kv_heads = problem.query.shape[1], problem.key.shape[1]
    future = torch.arange(keys) > torch.from_numpy(positions)[:, None]
    lse, mass, out = [], [], []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = problem.query[positions, head] @ problem.key[:keys, kv_head].T * problem.scale
        scores.masked_fill_(future, -torch.inf)
        lse.append(scores.logsumexp(-1))
        weights = torch.exp(scores - lse[-1][:, None])
        mass.append((weights * torch.from_numpy(problem.heads[head].planted(positions, keys))).sum(-1))
        out.append(weights @ problem.value[:keys, kv_head])
    return torch.stack(lse, 1), torch.stack(mass, 1), torch.stack(out, 1)


@dataclass(frozen=True)
class Forward:
    """One chunk of a problem in a paged pool: operands, plan and the plan whose passes hold only sampled rows."""

    problem: Problem
    start: int
    end: int
    query: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    plan: planning.ForwardPlan
    sampled_plan: planning.ForwardPlan

    @cached_property
    def causal(self) -> int:
        """Tiles that dense attention computes, over all heads."""
        near = self.plan.near
        return int((near.keys.tile_min <= near.max_pos[:, None]).sum()) * self.query.shape[1]

    @cached_property
    def needed(self) -> int:
        """Tiles of the planted map over all heads."""
        return sum(needed_tiles(self.plan, head.relations) for head in self.problem.heads)


def forward(
    problem: Problem, start: int, end: int, config: Config, sample: Ints, *, chunk: int = 0, seed: int = 0
) -> Forward:
    """The plan of rows ``start`` to ``end``, later keys not written yet; ``sample``: positions to attend to.

    ``chunk``: the size of chunks that the layout is told, 0 for none.
    """
    scene = problem.scene
    slots = torch.from_numpy(np.random.default_rng(seed).permutation(scene.length) + 1)
    pools = []
    for operand in (problem.key, problem.value):
        pool = torch.full((scene.length + 1, *operand.shape[1:]), torch.nan)
        pool[0] = 0
        pool[slots[:end]] = operand[:end]
        pools.append(pool)
    layout = _core.Layout(
        scene.length,
        scene.items,
        chunk_tokens=chunk,
        tile_queries=config.tile_queries,
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
    )
    wanted = torch.zeros(end - start, dtype=torch.bool)
    wanted[sample[(sample >= start) & (sample < end)] - start] = True
    for group in plan.groups:
        # The guard looks at their output.
        wanted[group.probe_rows.rows] = True
    near, far = thin(plan.near, wanted), plan.far and thin(plan.far, wanted)
    slots = [slice(*near.indptr[[group.near.start, group.near.stop]].tolist()) for group in plan.groups]
    groups = [replace(group, row_slots=own) for group, own in zip(plan.groups, slots, strict=True)]
    sampled = replace(plan, near=near, far=far, groups=groups)
    return Forward(problem, start, end, problem.query[start:end], *pools, plan, sampled)


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


def measure(
    forwards: Sequence[Forward], truth: Truth, chunk: int, specs: Sequence[HeadSpec], config: Config, *, why: bool
) -> dict[str, Any]:
    """Runs selection and attention on every forward of chunks of that size; figures are over all of their rows."""
    weight = truth.weight[chunk]
    lines = []
    tiles = near_tiles = guarded = 0
    coverage, squares, norm = [], 0.0, 0.0
    kept = torch.full(truth.lse.shape, torch.nan)
    for one in forwards:
        own = np.flatnonzero((truth.positions >= one.start) & (truth.positions < one.end))
        rows = truth.positions[own] - one.start
        operands, scale = (one.query, one.key_pool, one.value_pool), one.problem.scale
        passes, _ = prefill.select_layer(*operands, one.sampled_plan, specs, config, scale)
        out = torch.full_like(one.query, torch.nan)
        lse = ops.sparse_prefill(*operands, passes, scale, out, "torch")
        kept[own] = torch.exp(lse[rows] - truth.lse[own])
        out.fill_(torch.nan)
        (report,) = prefill.run_layer(*operands, one.sampled_plan, specs, config, scale, out, "torch")
        coverage.append(float(report.coverage))
        tiles += sum(lists.tiles.numel() for _, lists in passes)
        near_tiles += passes[0][1].tiles.numel()
        if report.guarded > 0:
            # Heads that the guard sent to dense compute all of their tiles on top, and keep everything.
            guarded += int(report.guarded)
            tiles += int(report.guarded) * one.causal // len(specs)
            error = (out[rows] - truth.out[own]).square().sum(-1)
            kept[own] = torch.where(error < 1e-8 * truth.out[own].square().sum(-1), 1.0, kept[own])
        own_weight = torch.from_numpy(weight[own])
        squares += float(((out[rows] - truth.out[own]).square().sum((1, 2)) * own_weight).sum())
        norm += float((truth.out[own].square().sum((1, 2)) * own_weight).sum())
        if why:
            lines.append(losses(one, truth, passes, weight))
    mass = kept.double().numpy()
    used = weight > 0

    def mean(values: np.ndarray, weights: np.ndarray) -> float:
        return float(np.average(values[weights > 0], weights=weights[weights > 0]))

    by_kind = {}
    for index, name in enumerate(KINDS):
        weights = np.where(truth.kind == index, weight, 0)
        if weights.any():
            by_kind[name] = mean(mass.mean(1), weights)
    return {
        "needed": sum(one.needed for one in forwards) / sum(one.causal for one in forwards),
        "planted": mean(truth.planted.mean(1).double().numpy(), weight),
        "density": tiles / sum(one.causal for one in forwards),
        "density_near": near_tiles / sum(one.causal for one in forwards),
        "coverage": float(np.mean(coverage)),
        "mass": mean(mass.mean(1), weight),
        "error": (squares / norm) ** 0.5,
        "guarded": guarded,
        "mass_by_kind": by_kind,
        "mass_by_head": [float(np.average(column[used], weights=weight[used])) for column in mass.T],
        "why": lines,
        "mass_as_chunked": {
            size: mean(mass.mean(1), other) for size, other in truth.weight.items() if not chunk and size
        },
    }


def run(cases: Sequence[Case], config: Config, *, why: bool = False) -> Iterator[Result]:
    """Measures cases; those that differ in their chunks only share operands and sampled rows."""
    keyed: dict[Any, list[Case]] = {}
    for case in cases:
        keyed.setdefault(case.data, []).append(case)
    for same in keyed.values():
        first = same[0]
        problem = planted.plant(
            first.scene(), first.plants, heads=first.heads, kv_heads=first.kv_heads, seed=first.seed
        )
        truth = dense_truth(problem, [case.chunk for case in same], first.seed)
        for case in same:
            chunks = measured_chunks(problem.scene.length, case.chunk)
            # Query tiles of 64 rows are the smallest that a GPU is fast at.
            sized = config.for_chunks(case.chunk, 64)
            forwards = [
                forward(problem, *bounds, sized, truth.positions, chunk=case.chunk, seed=case.seed) for bounds in chunks
            ]
            for pattern, specs in case.specs().items():
                start = time.perf_counter()
                figures = measure(forwards, truth, case.chunk, specs, sized, why=why)
                yield Result(
                    case.name, pattern, case.tokens, case.chunk, **figures, seconds=time.perf_counter() - start
                )


def describe(result: Result) -> str:
    """A row of the table."""
    kind, mass = min(result.mass_by_kind.items(), key=lambda entry: entry[1])
    head = min(range(len(result.mass_by_head)), key=result.mass_by_head.__getitem__)
    figures = (result.needed, result.planted, result.density, result.coverage, result.mass)
    return (
        f"{result.case:34} {result.pattern:16}"
        + "".join(f"{figure:9.3f}" for figure in figures)
        + f"{result.error:9.3f}  {kind} {mass:.3f}, head {head} {result.mass_by_head[head]:.3f}"
        + (f", {result.guarded} guarded" if result.guarded else "")
        + "".join(f"\n    sequence pass {result.density_near:.3f}, {line}" for line in result.why)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="8K and 16K tokens only, few cases")
    parser.add_argument("--case", action="append", default=[], metavar="PART", help="only cases whose name contains it")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a setting, e.g. coverage=0.9")
    parser.add_argument("--why", action="store_true", help="also tell what the lost mass was planted as; slow")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures here")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a verdict is missed")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.quick or not arguments.quick]
    if arguments.case:
        cases = [case for case in cases if any(part in case.name for part in arguments.case)]
    if arguments.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    keep_freed_memory()
    config = from_sources(("defaults", {"max_density": 1.0}), ("--set", settings(arguments.set)))
    start, results = time.perf_counter(), []
    titles = "".join(f"{title:>9}" for title in ("needed", "planted", "density", "coverage", "mass", "error"))
    print(f"{'case':34} {'pattern':16}{titles}  weakest rows and head")
    for result in run(cases, config, why=arguments.why):
        results.append(result)
        print(describe(result), flush=True)
    print(f"{time.perf_counter() - start:.0f} s, target {config.coverage}")
    verdicts = judge(results, config.coverage)
    for text, held in verdicts:
        print(f"{'held  ' if held else 'MISSED'} {text}")
    if arguments.json is not None:
        document = {
            "config": asdict(config),
            "results": [asdict(result) for result in results],
            "verdicts": [{"wanted": text, "held": held} for text, held in verdicts],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if arguments.check and not all(held for _, held in verdicts) else 0


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks instead of mapping each anew, which takes longer than the arithmetic on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_mmap_max, 0)


def settings(pairs: Sequence[str]) -> Mapping[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for pair in pairs:
        path, _, value = pair.partition("=")
        *folders, name = path.split(".")
        target = result
        for folder in folders:
            target = target.setdefault(folder, {})
        target[name] = json.loads(value)
    return result


if __name__ == "__main__":
    sys.exit(main())
