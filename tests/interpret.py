"""Runs the Triton attend kernel in the interpreter on small problems; prints its errors as JSON lines.

``TRITON_INTERPRET=1 python tests/interpret.py float32``
"""

from __future__ import annotations

import json
import sys

import torch

import problems
from mminference_sgl.kernels import attend, reference
from test_attention import random_lists

SMALL = (
    problems.Request(150, [problems.one_span_video(10, 6, 4, 5)], 0, 150),
    problems.Request(200, [problems.timestamped_video(9, 6, 3, 5)], 60, 100),
)
SHAPES = [
    # tile_queries, tile_keys, head_dim, heads, kv_heads, page_size
    (32, 16, 16, 4, 2, 1),
    (16, 32, 24, 4, 1, 16),
    (64, 16, 64, 2, 2, 64),
]


def main(dtype: torch.dtype) -> None:
    """Near pass into NaN memory, then the far pass merged into it, each against the reference in fp64."""
    for tile_queries, tile_keys, head_dim, heads, kv_heads, page_size in SHAPES:
        problem = problems.make(
            SMALL,
            tile_queries=tile_queries,
            tile_keys=tile_keys,
            head_dim=head_dim,
            heads=heads,
            kv_heads=kv_heads,
            page_size=page_size,
            dtype=dtype,
        )
        results = [Result(problem, torch.float64), Result(problem, None), Result(problem, None)]
        for seed, tile_pass in enumerate((problem.plan.near, problem.plan.far)):
            lists = random_lists(problem, tile_pass, seed)
            for result, implementation in zip(results, (reference, reference, attend), strict=True):
                result.run(implementation, tile_pass, lists, merge=seed > 0)
            exact, plain, ours = ((r.out[tile_pass.rows], r.lse[tile_pass.rows]) for r in results)
            blind = torch.isneginf(exact[1])
            record = {
                "pass": tile_pass.region.value,
                "merge": seed > 0,
                "same_blind_rows": bool(torch.equal(torch.isneginf(ours[1]), blind) and (ours[0][blind] == 0).all()),
                "error": distance(ours[0], exact[0]),
                "plain_error": distance(plain[0], exact[0]),
                "rounding": 2 * torch.finfo(dtype).eps * float(exact[0].abs().max()),
                "lse_error": distance(ours[1][~blind], exact[1][~blind]),
                "plain_lse_error": distance(plain[1][~blind], exact[1][~blind]),
            }
            print(json.dumps(record), flush=True)


class Result:
    """Output and LSE of one implementation, in memory that starts as NaN."""

    def __init__(self, problem: problems.Problem, dtype: torch.dtype | None) -> None:
        self.problem = problem
        self.operands = [
            x if dtype is None else x.to(dtype) for x in (problem.query, problem.key_pool, problem.value_pool)
        ]
        self.out = torch.full_like(self.operands[0], torch.nan)
        self.lse = torch.full(self.out.shape[:2], torch.nan, dtype=dtype or torch.float32)

    def run(self, implementation, tile_pass, lists, *, merge: bool) -> None:
        implementation.attend(*self.operands, tile_pass, lists, self.problem.scale, self.out, self.lse, merge=merge)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN anywhere is infinitely far."""
    return float((a.double() - b.double()).abs().nan_to_num(torch.inf).max())


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]))
