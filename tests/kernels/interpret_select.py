"""Runs the Triton search, list building and whole layers in the interpreter; prints what differs as JSON lines.

``TRITON_INTERPRET=1 python tests/kernels/interpret_select.py``
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch

import problems
from interpret import BATCH, distance
from mminference_sgl.kernels import lists_triton, probe, search, search_triton, stages
from mminference_sgl.kernels.levels import Curves
from mminference_sgl.kernels.tiles import TileLists, TilePass, lists_from_map
from mminference_sgl.method import prefill, probe_rows
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import AShapeBudget, Config, GridBudget, PatternBudgets, VerticalSlashBudget
from test_attention import random_map

STRADDLING = (
    problems.Request(260, [problems.one_span_video(3, 6, 3, 5), problems.one_span_video(150, 4, 4, 5)], 0, 260),
    problems.Request(97, [problems.timestamped_video(9, 6, 3, 3)], 20, 77),
)
"""Query tiles of media rows that reach over text between two videos."""
ALLOWED = (0.05, 1e-4)
"""Energy that heads may lose, as a share of their output's."""
VIDEO = problems.Request(5 + 20 * 15 + 3, [problems.one_span_video(5, 20, 3, 5)], 5, 20 * 15 + 3)
BUDGETS = PatternBudgets(AShapeBudget(16, 32), VerticalSlashBudget(16, 16), GridBudget(sink=8, window=8))
LAYERS = (
    (HeadSpec("auto", "auto", "auto", "auto"), 10.0, 0.9),
    (HeadSpec("dense", "dense", "grid", "grid"), 0.6, 1.5),
    (HeadSpec("dense", "dense", "grid", "grid"), 1.0, 0.0),
    (HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid"), 10.0, 0.5),
)
"""Pattern of all heads, error ceiling and error."""
CASES = ((BATCH, 32, 16), (STRADDLING, 64, 16))
"""Requests, and rows and keys of tiles."""
SHARING = 2
"""Heads that share lists."""


def main() -> None:
    for layer in LAYERS:
        for sharing in ((), (SHARING,)):
            compare_layers(*layer, sharing)
    for requests, tile_queries, tile_keys in CASES:
        sizes = {"tile_queries": tile_queries, "tile_keys": tile_keys, "heads": SHARING, "kv_heads": 1}
        problem = problems.make(requests, **sizes, sharing=(SHARING,))
        compare_searches(problem)
        for seed, tile_pass in enumerate((problem.plan.near, problem.plan.far, *problem.plan.shared[0].passes)):
            compare_lists(tile_pass, *random_map(problem, tile_pass, seed))


def compare_layers(spec: HeadSpec, ceiling: float, error: float, sharing: tuple[int, ...]) -> None:
    """A layer with every stage in Triton, and with the portable ones around the reference."""
    problem = problems.make([VIDEO], tile_queries=16, tile_keys=16, head_dim=16, heads=4, kv_heads=2, sharing=sharing)
    config = Config(error=error, text_error=error, error_ceiling=ceiling, patterns=BUDGETS)
    runs = {}
    for implementation in ("triton", "reference"):
        out = torch.full_like(problem.query, torch.nan)
        reports = prefill.run_layer(problem.operands, problem.plan, [spec] * 4, config, out, implementation)
        runs[implementation] = out, reports
    (ours, our_reports), (want, reports) = runs["triton"], runs["reference"]
    print(
        json.dumps(
            {
                "kernel": "layer",
                "pattern": str(spec),
                "sharing": sharing,
                "error": distance(ours, want),
                "scale": float(want.abs().max()),
                "guarded": [int(r.guarded) for r in reports],
                "same_guarded": [int(r.guarded) for r in our_reports] == [int(r.guarded) for r in reports],
                "density": [float(r.tiles / r.causal) for r in reports],
                "same_tiles": [int(r.tiles) for r in our_reports] == [int(r.tiles) for r in reports],
            }
        ),
        flush=True,
    )


def compare_searches(problem: problems.Problem) -> None:
    """Both searches on what is probed of each row group, keys scaled up so that attention is sharp."""
    operands = replace(problem.operands, key_pool=problem.key_pool * 4)
    groups = [
        (group, tiles.view)
        for tiling in problem.plan.tilings
        for group, tiles in zip(problem.plan.groups, tiling.groups, strict=True)
    ]
    for group, view in groups:
        probed = probe.run(operands, group.keys, group.probe_rows)
        cell, sharing = view.cell, view.sharing
        size = probed.output.square().sum(2)
        energy = size.mean(1)
        for index, share in enumerate(ALLOWED):
            slash = view.slash_tiles(20, 33)
            given = probed.held, size, probed.row_of, slash, view.causal_tiles, energy * share
            report(
                "columns and diagonals",
                probed.held,
                size,
                view.row_tiles[probed.row_of],
                *(each.columns_and_diagonals(*given, sharing=sharing) for each in (search_triton, search)),
            )
            if cell is None:
                continue
            (held,) = probed.far([(8, 17)])
            given = held, size, probed.row_of, cell, cell.tiles(8, 17), view.causal_tiles, energy * share
            ours, want = (each.lines(*given, min_lines=index % 2, sharing=sharing) for each in (search_triton, search))
            report("lines", held, size, cell.row_tiles[probed.row_of], ours, want)


def report(
    name: str,
    held: torch.Tensor,
    size: torch.Tensor,
    row_tiles: torch.Tensor,
    ours: torch.Tensor,
    want: torch.Tensor,
) -> None:
    """Levels by both, and the curves of the portable ones by both."""
    curves: list[Curves] = [each.curves(held, size, want, row_tiles) for each in (search_triton, search)]
    got, expected = curves
    print(
        json.dumps(
            {
                "kernel": name,
                "levels": int(want.numel()),
                "values": want.unique().tolist(),
                "levels_differ": int((ours != want).sum()),
                "largest_difference": int((ours.int() - want.int()).abs().max()),
                "counts_differ": int((got.tiles != expected.tiles).sum()),
                "coverage_error": distance(got.coverage, expected.coverage),
                "error_error": distance(got.error, expected.error),
                "error_size": float(expected.error.max()),
            }
        ),
        flush=True,
    )


def compare_lists(tile_pass: TilePass, selected: torch.Tensor, sink: torch.Tensor, reach: torch.Tensor) -> None:
    ours = lists_triton.lists_from_map(tile_pass, selected, sink, reach)
    want = lists_from_map(tile_pass, selected, sink, reach)

    def listed(lists: TileLists) -> list[list[int]]:
        return [lists.tiles_of(index).tolist() for index in range(lists.count.numel())]

    print(
        json.dumps(
            {
                "kernel": "lists",
                "tiles": int(want.count.sum()),
                "full": int(want.full.sum()),
                "same": listed(ours) == listed(want) and torch.equal(ours.full, want.full),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    # Memory that nothing was written to is NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)
    # Small problems need most of their tiles.
    stages.CPU_EASE = stages.EASE
    # Heads that may share lists take turns at the probe rows.
    probe_rows.LEAST_OF_HEAD = 8
    main()
