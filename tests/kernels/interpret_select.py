"""Runs whole layers with Triton's selection in the interpreter against the portable one; prints what differs as JSON
lines.

``TRITON_INTERPRET=1 python tests/kernels/interpret_select.py PART PARTS``
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

import problems
from interpret import distance, in_order
from mminference_sgl.kernels import prepared, stages, work_triton
from mminference_sgl.kernels.tiles import TileLists
from mminference_sgl.method import prefill, probe_rows
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import AShapeBudget, Config, GridBudget, PatternBudgets, VerticalSlashBudget

VIDEO = problems.Request(5 + 14 * 15 + 3, [problems.one_span_video(5, 14, 3, 5)], 5, 14 * 15 + 3)
STRADDLING = (
    problems.Request(196, [problems.one_span_video(3, 6, 3, 5), problems.one_span_video(120, 3, 4, 5)], 0, 196),
    problems.Request(97, [problems.timestamped_video(9, 6, 3, 3)], 20, 77),
)
"""Query tiles of media rows that reach over text between two videos; another request."""
BUDGETS = PatternBudgets(AShapeBudget(16, 32), VerticalSlashBudget(16, 16), GridBudget(sink=8, window=8))
AUTO = HeadSpec("auto", "auto", "auto", "auto")
GRID = HeadSpec("dense", "dense", "grid", "grid")
BOUNDARY = HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid")


class Layer(NamedTuple):
    """Heads, requests, error ceiling and error, and whether heads may share lists.

    ``blocks``: heads are selected for by KV head; ``probed``: and only probed so.
    """

    name: str
    specs: Sequence[HeadSpec]
    requests: Sequence[problems.Request]
    ceiling: float
    error: float
    shared: bool = True
    min_lines: int = 0
    max_density: float = 1.0
    blocks: bool = False
    probed: bool = False


LAYERS = (
    Layer("auto", [AUTO] * 4, [VIDEO], 10.0, 0.9),
    Layer("own lists", [AUTO] * 4, [VIDEO], 10.0, 0.5, shared=False, max_density=0.4),
    Layer("few tiles", [AUTO] * 4, [VIDEO], 1e9, 1e-4, max_density=0.4),
    Layer("in blocks", [AUTO, AUTO, GRID, AUTO], [VIDEO], 10.0, 0.9, blocks=True),
    Layer("probed in blocks", [AUTO, GRID, GRID, GRID], [VIDEO], 10.0, 0.7, probed=True),
    Layer("repaired", [GRID] * 4, [VIDEO], 0.6, 1.5, min_lines=2),
    Layer("exact", [GRID, AUTO, BOUNDARY, BOUNDARY], [VIDEO], 1.0, 0.0),
    Layer("boundary", [BOUNDARY] * 4, [VIDEO], 10.0, 0.5),
    Layer("a batch", [AUTO, AUTO, HeadSpec("dense", "dense", "a_shape", "a_shape"), BOUNDARY], STRADDLING, 0.7, 0.6),
)
SHARING = 2
"""Heads that share lists."""


def main(part: int, parts: int) -> None:
    for layer in LAYERS[part::parts]:
        compare(layer)


def compare(layer: Layer) -> None:
    """A layer with every stage in Triton, twice, and with the portable ones around the reference."""
    sizes = {"tile_queries": 16, "tile_keys": 16, "head_dim": 16, "heads": 4, "kv_heads": 2}
    problem = problems.make(layer.requests, **sizes, sharing=(SHARING,) if layer.shared else ())
    grid = GridBudget(sink=8, window=8, min_lines=layer.min_lines)
    config = Config(
        error=layer.error,
        text_error=layer.error,
        error_ceiling=layer.ceiling,
        max_density=layer.max_density,
        patterns=PatternBudgets(BUDGETS.a_shape, BUDGETS.vertical_slash, grid),
    )
    prefill.PROBE_BYTES_CPU = 1 if layer.probed else 1 << 24
    prefill.MAP_TILES = 2 * problem.plan.near.num_tiles * problem.plan.near.keys.widest if layer.blocks else 1 << 26
    given = problem.operands, problem.plan, layer.specs, config
    out, again, want = (torch.full_like(problem.query, torch.nan) for _ in range(3))
    ours = prefill.run_layer(*given, out, "triton", 0)
    *_, made = problem.plan.prepared.values()
    assert len(problem.plan.prepared) == 1 + layer.blocks
    lists = [listed(one) for _, one in made.passes]
    ordered = all(in_order(one, problem.operands.group // tile_pass.sharing) for tile_pass, one in made.passes)
    picks = [group_picks(problem, group) for group in problem.plan.groups]
    repeated = prefill.run_layer(*given, again, "triton")
    same_bits = torch.equal(out, again) and [listed(one) for _, one in made.passes] == lists
    same_bits &= all(torch.equal(a, b) for one, two in zip(ours, repeated, strict=True) for a, b in values(one, two))
    for group in problem.plan.groups:
        problem.plan.requests[group.request].layout.carried_picks(group.modality, 4).fill_(-1)
    reports = prefill.run_layer(*given, want, "reference", 0)
    passes, _ = prefill.select_layer(*given, "reference")
    print(
        json.dumps(
            {
                "layer": layer.name,
                "error": distance(out, want),
                "scale": float(want.abs().max()),
                "guarded": [int(r.guarded) for r in reports],
                "density": [float(r.tiles / r.causal) for r in reports],
                "same_reports": all(
                    abs(float(a) - float(b)) <= 1e-4 * abs(float(b)) + 1e-5
                    for one, two in zip(ours, reports, strict=True)
                    for a, b in values(one, two)[: 2 if layer.blocks else None]
                ),
                "error_is_bounded": all(
                    float(one.error) >= float(two.error) - 1e-5 for one, two in zip(ours, reports, strict=True)
                ),
                # Of blocks the last one's are left, and others were selected together.
                "same_lists": layer.blocks or lists == [listed(one) for _, one in passes],
                "same_picks": picks == [group_picks(problem, group) for group in problem.plan.groups],
                "same_bits": same_bits,
                "ordered": ordered,
                "pieces": sum(one.work.pieces for _, one in made.passes),
            }
        ),
        flush=True,
    )


def values(one: prefill.LayerReport, two: prefill.LayerReport) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What two reports say."""
    names = "tiles", "causal", "coverage", "error", "guarded", "dense"
    return [(getattr(one, name), getattr(two, name)) for name in names]


def group_picks(problem: problems.Problem, group) -> list[int]:
    """What is carried over of a row group."""
    return problem.plan.requests[group.request].layout.carried_picks(group.modality, 4)[0].tolist()


def listed(lists: TileLists) -> list[object]:
    """Every list that is not empty: its tiles, how many are full, and its near region."""
    count, full, sink, reach = (x.flatten().tolist() for x in (lists.count, lists.full, lists.sink, lists.reach))
    return [
        (index, lists.tiles_of(index).tolist(), full[index], sink[index], reach[index])
        for index in range(len(count))
        if count[index]
    ]


if __name__ == "__main__":
    # Memory that nothing was written to is NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    # Small problems need most of their tiles, and have no long lists.
    stages.CPU_EASE = stages.EASE
    work_triton.SPLIT = 6
    # Heads that may share lists take turns at the probe rows.
    probe_rows.LEAST_OF_HEAD = 8
    prepared.BLOCK = prepared.BLOCK_BANDS = work_triton.BLOCK_ORDERED = 64
    main(*map(int, sys.argv[1:]))
