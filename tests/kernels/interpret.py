"""Runs the Triton attend kernel in the interpreter on small problems; prints its errors as JSON lines.

``TRITON_INTERPRET=1 python tests/kernels/interpret.py float32 [CASE ...]``
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from unittest import mock

import torch

import problems
from mminference_sgl.kernels import attend, reference, work_triton
from mminference_sgl.kernels.launch_table import Launch
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import TileLists, TilePass, lists_from_map, tile_visibility
from test_attention import random_lists

BATCH = (
    problems.Request(150, [problems.one_span_video(10, 6, 4, 5)], 0, 150),
    problems.Request(1, [], 0, 1),
    problems.Request(200, [problems.timestamped_video(9, 6, 3, 5)], 60, 100),
    problems.Request(63, [], 40, 23),
)
"""A whole video; a request of one key; a chunk cut inside a timestamped frame; a short text tail."""
TWO_VIDEOS = (
    problems.Request(111, [problems.one_span_video(3, 6, 3, 3), problems.one_span_video(60, 5, 2, 4)], 0, 111),
)


@dataclass(frozen=True)
class Case:
    """Shapes of one problem; ``launch`` None takes the table's entry; ``value_dim`` 0 is the head size.

    ``every_tile`` lists all tiles that a pass may see behind a sink and a reach of 8 keys, otherwise random ones are.
    ``shared``: the heads of a KV group share lists of smaller query tiles in the last two of the passes.
    ``split``: key tiles of a list that one program reads at most, and ``pieces`` the most programs for their rests.
    """

    name: str
    tile_queries: int
    tile_keys: int
    head_dim: int
    heads: int
    kv_heads: int
    page_size: int
    launch: Launch | None = None
    value_dim: int = 0
    fp8: bool = False
    every_tile: bool = False
    shared: bool = False
    split: int = work_triton.SPLIT
    pieces: int = work_triton.SPLIT_PIECES


CASES = (
    Case("table-entry", 32, 16, 16, 4, 2, 1),
    Case("pages-of-16", 16, 32, 24, 4, 1, 16),
    Case("sub-tiles", 64, 32, 64, 2, 2, 1, Launch(16, 16, 1, 2)),
    Case("uneven-sub-tiles", 32, 64, 32, 2, 1, 16, Launch(16, 32, 1, 2)),
    Case("other-pages", 64, 64, 64, 2, 1, 64),
    Case("every-tile", 16, 16, 16, 2, 1, 1, Launch(16, 16, 1, 2), every_tile=True),
    Case("head-80", 32, 32, 80, 2, 1, 1),
    Case("head-96", 32, 32, 96, 2, 2, 16),
    Case("head-128", 64, 64, 128, 2, 1, 64),
    Case("split-head", 32, 16, 64, 2, 1, 1, Launch(32, 16, 2, 2, split=True)),
    Case("head-256", 16, 32, 256, 1, 1, 1),
    Case("value-head-48", 32, 16, 72, 2, 1, 1, value_dim=48),
    Case("fp8", 32, 16, 64, 2, 1, 1, fp8=True),
    Case("pieces", 32, 16, 64, 4, 2, 1, Launch(16, 16, 1, 2), split=2),
    Case("pieces-of-all", 64, 16, 24, 2, 1, 1, Launch(32, 16, 2, 2), every_tile=True, split=1),
    Case("too-many-pieces", 32, 16, 80, 3, 1, 1, split=1, pieces=11),
    Case("pieces-of-groups", 32, 16, 16, 7, 1, 1, Launch(32, 16, 1, 2, descriptors=True), shared=True, split=2),
    Case("descriptors", 64, 64, 64, 2, 1, 64, Launch(32, 64, 2, 2, descriptors=True)),
    Case("descriptors-sub-tiles", 32, 32, 32, 4, 2, 64, Launch(16, 16, 1, 2, descriptors=True)),
    Case("descriptors-split-head", 32, 16, 128, 2, 2, 32, Launch(32, 16, 2, 2, split=True, descriptors=True)),
    Case("descriptors-padded-heads", 16, 32, 56, 4, 1, 32, Launch(16, 32, 1, 2, descriptors=True), value_dim=24),
)
CASES += tuple(
    Case(f"group-of-{group}", 32, 16, 16, group, 1, 16, Launch(rows, 16, 2, 2), shared=True)
    for group, rows in ((2, 32), (3, 16), (4, 32), (5, 32), (7, 16), (8, 32), (12, 16), (16, 32))
)
CASES += (
    Case("groups-and-fp8", 64, 32, 64, 6, 2, 1, Launch(64, 16, 1, 2), fp8=True, shared=True),
    Case("groups-and-head-80", 32, 16, 80, 8, 2, 1, Launch(32, 16, 1, 2, split=True), shared=True),
)
KEY_SCALE, VALUE_SCALE = 0.75, 1.5
"""Scales of the fp8 cases."""


def main(dtype: torch.dtype, names: list[str]) -> None:
    """Near pass into NaN memory, the far pass merged into it, other lists of the near pass merged into that.

    Each against the reference in fp64, and descriptors against pointers. Memory that nothing was written to is NaN.
    """
    torch.use_deterministic_algorithms(True)
    for case in CASES:
        if not names or case.name in names:
            run(case, dtype)


def run(case: Case, dtype: torch.dtype) -> None:
    problem = problems.make(
        TWO_VIDEOS if case.every_tile else BATCH,
        tile_queries=case.tile_queries,
        tile_keys=case.tile_keys,
        head_dim=case.head_dim,
        heads=case.heads,
        kv_heads=case.kv_heads,
        page_size=case.page_size,
        dtype=dtype,
        sharing=(case.heads // case.kv_heads,) if case.shared else (),
    )
    meant = replace(problem.operands, value_pool=problem.value_pool[..., : case.value_dim or case.head_dim])
    stored = meant
    if case.fp8:
        stored, meant = problems.in_fp8(meant, KEY_SCALE, VALUE_SCALE)
    stored = replace(stored, query=strided(stored.query))
    exact, plain = Result(problems.cast(meant, torch.float64)), Result(meant)
    ours, pointers = Result(stored), Result(stored)
    passes = [problem.plan.near, problem.plan.far, problem.plan.near]
    if case.shared:
        passes[1:] = reversed(problem.plan.shared[0].passes)
    for step, tile_pass in enumerate(passes):
        lists = every_tile(problem, tile_pass) if case.every_tile else random_lists(problem, tile_pass, step)
        for result in (exact, plain):
            result.run(reference, tile_pass, lists, merge=step > 0)
        with mock.patch.multiple(work_triton, SPLIT=case.split, SPLIT_PIECES=case.pieces):
            started = run_attend(ours, tile_pass, lists, merge=step > 0, launch=case.launch)
        line = compare(case, tile_pass, lists, exact, plain, ours)
        line |= {"step": step, **started}
        if case.launch is not None and case.launch.descriptors:
            other = case.launch._replace(descriptors=False)
            with mock.patch.multiple(work_triton, SPLIT=case.split, SPLIT_PIECES=case.pieces):
                run_attend(pointers, tile_pass, lists, merge=step > 0, launch=other)
            line["same"] = all(
                bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
                for a, b in ((ours.out, pointers.out), (ours.lse, pointers.lse))
            )
        print(json.dumps(line), flush=True)


def run_attend(result: Result, tile_pass: TilePass, lists: TileLists, **options) -> dict[str, object]:
    """Runs the kernel; how many descriptors its launch had, how many rests of lists, and whether these are in order."""
    lists = work_triton.put(tile_pass, lists, result.operands.group)
    with mock.patch.object(attend, "describe", wraps=attend.describe) as describe:
        result.run(attend, tile_pass, lists, **options)
    work, lists_of_head = lists.work, result.operands.group // tile_pass.sharing
    return {
        "described": describe.call_count,
        "pieces": int((work.first[: work.pieces] > 0).sum()),
        "ordered": in_order(lists, lists_of_head),
    }


def in_order(lists: TileLists, lists_of_head: int) -> bool:
    """Whether every entry of every list is read once, rests of long lists first, one after another and none too long.

    Of the lists those of more than twice the mean length come first; both by KV head and neighbouring query tiles.
    """
    work, counts, tiles = lists.work, lists.count.tolist(), lists.sink.shape[1]
    order, first, until = work.order.tolist(), work.first.tolist(), work.until.tolist()
    entries = [0] * len(counts)
    for number, (index, start, end) in enumerate(zip(order, first, until, strict=True)):
        entries[index] += end - start
        if number < work.pieces and start < end:
            follows = number > 0 and (order[number - 1], until[number - 1]) == (index, start)
            if end - start > work_triton.SPLIT or not (start == work_triton.SPLIT or follows):
                return False
    own = order[work.pieces :]
    places = [
        (
            counts[index] <= 2 * sum(counts) / len(counts),
            index // tiles // lists_of_head,
            index % tiles // work_triton.NEIGHBOURS,
        )
        for index in own
    ]
    whole = all(start == 0 for start in first[work.pieces :])
    return entries == counts and sorted(own) == list(range(len(counts))) and places == sorted(places) and whole


class Result:
    """Operands of one implementation, and its output and LSE in memory that starts as NaN."""

    def __init__(self, operands: Operands) -> None:
        self.operands, query = operands, operands.query
        self.out = query.new_full((*query.shape[:2], operands.value_pool.shape[2]), torch.nan)
        self.lse = torch.full(
            query.shape[:2], torch.nan, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32
        )

    def run(self, implementation, tile_pass: TilePass, lists: TileLists, *, merge: bool, **options) -> None:
        implementation.attend(self.operands, tile_pass, lists, self.out, self.lse, merge=merge, **options)


def compare(
    case: Case, tile_pass: TilePass, lists: TileLists, exact: Result, plain: Result, ours: Result
) -> dict[str, object]:
    """Errors over the rows of a pass; rows outside of it must still be what they were."""
    rows = tile_pass.rows
    want, have, got = ((result.out[rows], result.lse[rows]) for result in (exact, plain, ours))
    blind = torch.isneginf(want[1])
    untouched = torch.ones(exact.out.shape[0], dtype=torch.bool)
    untouched[rows] = False
    lengths = lists.count
    return {
        "case": case.name,
        "pass": tile_pass.region.value,
        "same_blind_rows": bool(torch.equal(torch.isneginf(got[1]), blind) and (got[0][blind] == 0).all()),
        "error": distance(got[0], want[0]),
        "plain_error": distance(have[0], want[0]),
        "rounding": 2 * torch.finfo(plain.out.dtype).eps * float(want[0].abs().max()),
        "lse_error": distance(got[1][~blind], want[1][~blind]),
        "plain_lse_error": distance(have[1][~blind], want[1][~blind]),
        "outside": distance(ours.out[untouched], exact.out[untouched]) if tile_pass.region.value == "far" else 0.0,
        "empty_lists": int((lengths == 0).sum()),
        "single_tiles": int((lengths == 1).sum()),
        "full_tiles": int(lists.full.sum()),
        "tiles": int(lengths.sum()),
    }


def every_tile(problem: problems.Problem, tile_pass: TilePass) -> TileLists:
    """All tiles that a pass of one request may see behind a sink and a reach of 8 keys; some far ones are full."""
    keys = tile_pass.keys
    sink = torch.full((problem.query.shape[1], tile_pass.num_tiles), 8, dtype=torch.int32)
    bounds = (tile_pass.min_pos, tile_pass.max_pos, keys.tile_min, keys.tile_max)
    return lists_from_map(tile_pass, tile_visibility(tile_pass.region, *bounds, sink, sink), sink, sink)


def strided(query: torch.Tensor) -> torch.Tensor:
    """The same query as a part of wider rows, as a fused projection leaves it."""
    wide = torch.cat([query, torch.full_like(query, torch.nan)], dim=1)
    return wide[:, : query.shape[1]]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; NaN in one of two is infinitely far."""
    return float((a.double() - b.double()).abs().nan_to_num(torch.inf).max()) if a.numel() else 0.0


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), sys.argv[2:])
