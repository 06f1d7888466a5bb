"""What selection keeps of planted attention, exactly, for sampled rows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.method import planted
from benchmarks.method.cases import Case
from benchmarks.method.forward import Forward, forward
from benchmarks.method.losses import losses
from benchmarks.method.truth import KINDS, Truth, dense_truth, measured_chunks
from mminference_sgl.kernels import ops
from mminference_sgl.kernels.tiles import Region
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config

APART = "auto apart"
"""``auto`` with lists of single heads, in cells that suit these."""


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
    error_bound_slack: float
    """By how much an error may exceed its bound that as many rows as were probed were found to keep: a factor."""
    guarded: int
    mass_by_kind: dict[str, float]
    mass_by_head: list[float]
    seconds: float
    why: list[str]
    """One line per measured chunk, if asked for."""


def measure(
    forwards: Sequence[Forward], truth: Truth, chunk: int, specs: Sequence[HeadSpec], config: Config, *, why: bool
) -> dict[str, Any]:
    """Runs selection and attention on every forward of chunks of that size; figures are over all of their rows."""
    weight = truth.weight[chunk]
    lines = []
    tiles = near_tiles = guarded = 0
    coverage, norm, probed = [], 0.0, 0
    squares = np.zeros(len(truth.positions))
    kept = torch.full(truth.lse.shape, torch.nan)
    for one in forwards:
        own = np.flatnonzero((truth.positions >= one.start) & (truth.positions < one.end))
        rows = truth.positions[own] - one.start
        passes, _ = prefill.select_layer(one.operands, one.sampled_plan, specs, config)
        out = torch.full_like(one.operands.query, torch.nan)
        lse = ops.sparse_prefill(one.operands, passes, out, "torch")
        kept[own] = torch.exp(lse[rows] - truth.lse[own])
        out.fill_(torch.nan)
        (report,) = prefill.run_layer(one.operands, one.sampled_plan, specs, config, out, "torch")
        coverage.append(float(report.coverage))
        tiles += sum(lists.tiles.numel() for _, lists in passes)
        near_tiles += sum(lists.tiles.numel() for own, lists in passes if own.region is Region.NEAR)
        if report.guarded > 0:
            # Heads that the guard sent to dense compute all of their tiles on top, and keep everything.
            guarded += int(report.guarded)
            tiles += int(report.guarded) * one.causal // len(specs)
            error = (out[rows] - truth.out[own]).square().sum(-1)
            kept[own] = torch.where(error < 1e-8 * truth.out[own].square().sum(-1), 1.0, kept[own])
        own_weight = torch.from_numpy(weight[own])
        squares[own] = (out[rows] - truth.out[own]).square().sum((1, 2)).double().numpy()
        probed += sum(len(group.probe_rows.rows) for group in one.sampled_plan.groups if group.modality == "media")
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
        "error": float(squares @ weight / norm) ** 0.5,
        "error_bound_slack": _slack(squares, weight, probed),
        "guarded": guarded,
        "mass_by_kind": by_kind,
        "mass_by_head": [float(np.average(column[used], weights=weight[used])) for column in mass.T],
        "why": lines,
    }


def _slack(squares: np.ndarray, weight: np.ndarray, probed: int) -> float:
    """By how much a root of a mean square may exceed the one of ``probed`` rows drawn from the same: two deviations."""
    mean = squares @ weight
    if mean == 0:
        return 1.0
    deviation = (weight @ (squares - mean) ** 2 / probed) ** 0.5
    return float(1 + 2 * deviation / mean) ** 0.5


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
            # Query tiles of 64 lanes are the smallest that a GPU is fast at.
            sized = config.for_chunks(case.chunk, 64)
            ways = {sized: case.specs()}
            if case.group > 1:
                ways[replace(sized, sharing=False)] = {APART: case.specs()["auto"]}
            for own, patterns in ways.items():
                forwards = [
                    forward(problem, *bounds, own, truth.positions, chunk=case.chunk, seed=case.seed)
                    for bounds in chunks
                ]
                for pattern, specs in patterns.items():
                    start = time.perf_counter()
                    figures = measure(forwards, truth, case.chunk, specs, own, why=why)
                    yield Result(
                        case.name, pattern, case.tokens, case.chunk, **figures, seconds=time.perf_counter() - start
                    )
