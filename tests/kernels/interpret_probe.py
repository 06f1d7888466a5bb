"""Runs the Triton probe in the interpreter on small problems; prints its errors as JSON lines.

``TRITON_INTERPRET=1 python tests/kernels/interpret_probe.py float32 [CASE ...]``
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import torch

import problems
from interpret import BATCH, KEY_SCALE, TWO_VIDEOS, VALUE_SCALE, distance, strided
from mminference_sgl.kernels import probe, probe_triton
from mminference_sgl.kernels.probe_triton import Probed, ProbeLaunch, Probes, Source
from mminference_sgl.method import probe_rows


@dataclass(frozen=True)
class Case:
    """Shapes of one problem; ``launch`` None takes the default one."""

    name: str
    tile_keys: int
    head_dim: int
    heads: int
    kv_heads: int
    page_size: int
    launch: ProbeLaunch | None = None
    fp8: bool = False
    requests: tuple[problems.Request, ...] = BATCH


CASES = (
    Case("default", 16, 16, 4, 2, 1),
    Case("parts-of-tiles", 32, 24, 4, 1, 16, ProbeLaunch(16, 16, 1, 2)),
    Case("rows-of-several-heads", 16, 32, 6, 2, 1, ProbeLaunch(64, 16, 1, 2)),
    Case("head-80", 32, 80, 2, 1, 16, ProbeLaunch(32, 32, 1, 2), requests=TWO_VIDEOS),
    Case("head-128", 64, 128, 2, 2, 64, ProbeLaunch(32, 64, 1, 2), requests=TWO_VIDEOS),
    Case("fp8-bits", 16, 64, 2, 1, 1, fp8=True, requests=TWO_VIDEOS),
)


def main(dtype: torch.dtype, names: list[str]) -> None:
    """All row groups of each case at once, against the portable probe."""
    for case in CASES:
        if not names or case.name in names:
            run(case, dtype)


def run(case: Case, dtype: torch.dtype) -> None:
    problem = problems.make(
        case.requests,
        tile_queries=32,
        tile_keys=case.tile_keys,
        head_dim=case.head_dim,
        heads=case.heads,
        kv_heads=case.kv_heads,
        page_size=case.page_size,
        dtype=dtype,
        sharing=(case.heads // case.kv_heads,) * (case.heads > case.kv_heads),
    )
    stored = problem.operands
    if case.fp8:
        stored, _ = problems.in_fp8(stored, KEY_SCALE, VALUE_SCALE)
    ours_of = replace(stored, query=strided(stored.query))
    probed = []
    for group in problem.plan.groups:
        exact = probe.run(problems.cast(stored, torch.float32), group.keys, group.probe_rows)
        bounds = [(3, 9), (8, 31)]
        found = {Source(False, 0, 0): exact.held, Source(False, *bounds[0]): exact.held - exact.near(bounds[0])}
        if group.keys.cell is not None and group.modality == "media":
            found |= {Source(True, *region): exact.far(region) for region in bounds}
        ours = Probed(
            group.keys,
            group.probe_rows,
            torch.empty_like(exact.output),
            torch.empty(exact.output.shape[:2]),
            {source: torch.empty_like(want) for source, want in found.items()},
        )
        probed.append((group, exact, found, ours))
    probe_triton.run(ours_of, Probes([ours for *_, ours in probed], ours_of, case.heads, torch.empty, case.launch))
    for group, exact, found, ours in probed:
        held = {"output": (ours.output, exact.output), "size": (ours.size, exact.output.square().sum(2))}
        for source, expected in found.items():
            name, got = f"{'cell' if source.cell else 'sequence'} {source.reach}", ours.held[source]
            held |= {f"{name} mass": (got[0], expected[0]), f"{name} deviation": (got[1:], expected[1:])}
        result = {
            "case": case.name,
            "modality": group.modality,
            "rows": group.probe_rows.rows.numel(),
            "turns": group.probe_rows.turns,
            "errors": {name: distance(a, b) for name, (a, b) in held.items()},
            "sizes": {name: float(b.abs().max()) for name, (_, b) in held.items()},
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    # Memory that nothing was written to is NaN; small problems are split as large ones are.
    torch.use_deterministic_algorithms(True)
    probe_triton.MIN_TILES = 2
    # Heads of a KV head take turns at the probe rows.
    probe_rows.LEAST_OF_HEAD = 8
    main(getattr(torch, sys.argv[1]), sys.argv[2:])
