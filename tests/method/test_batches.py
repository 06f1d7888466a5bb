"""A request is computed alike alone, beside others and once more: the same tiles, figures and output, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch

import problems
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import load
from mminference_sgl.method.config import Config

ORDERS = ((0,), (1,), (2,), (3,), (3, 2, 1, 0), (2, 0), (0, 3, 1))
"""Requests of a batch by themselves, all of them in another order, and some."""


@dataclass(frozen=True)
class Case:
    """Sizes of a problem, a pattern, and what a layer may lose."""

    sizes: dict[str, Any]
    pattern: str
    error: float
    ceiling: float | None = None


SMALL = {"tile_queries": 32, "tile_keys": 16}
CASES = {
    "exact": Case(SMALL, "auto", 0.0),
    "sparse": Case(SMALL, "auto", 0.8),
    "columns": Case(SMALL, "vertical_slash", 0.8),
    "guarded": Case(SMALL, "auto", 0.8, ceiling=0.3),
    "shared lists": Case({"tile_queries": 64, "tile_keys": 64, "heads": 8, "sharing": (4,)}, "auto", 0.6),
    "bfloat16": Case(
        {"tile_queries": 32, "tile_keys": 64, "heads": 7, "kv_heads": 1, "head_dim": 80, "sharing": (7,)}
        | {"dtype": torch.bfloat16},
        "auto",
        0.6,
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

Facts = list[torch.Tensor]


def facts_of(problem: problems.Problem, case: Case, *, traced: bool, dense: Collection[int] = ()) -> list[Facts]:
    """By request: its output, what is reported of it, and, if ``traced``, what was selected for it."""
    specs = load(case.pattern).specs(0, range(problem.query.shape[1]))
    config = Config(error=case.error, text_error=case.error, error_ceiling=case.ceiling)
    out, trace = torch.full_like(problem.query, torch.nan), prefill.Trace() if traced else None
    reports = prefill.run_layer(problem.operands, problem.plan, specs, config, out, "torch", trace=trace, dense=dense)
    ends = list(itertools.accumulate(request.chunk for request in problem.requests))
    facts = [[rows] for rows in out.tensor_split(ends[:-1])]
    for report in reports:
        facts[report.request] += astuple(report)[1:]
    for selected in trace.selected if trace is not None else []:
        choice, found = selected.choice, facts[problem.plan.groups[selected.group].request]
        found += [selected.picked, choice.coverage, choice.error, choice.tiles]
        for tiles in (choice, *choice.shared):
            found += [tiles.near, tiles.sink, tiles.reach] + ([] if tiles.far is None else [tiles.far])
    return facts


def assert_equal(ours: Facts, theirs: Facts) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@cases
def test_a_request_is_the_same_alone_and_in_any_batch(case: Case) -> None:
    batch = problems.make(**case.sizes)
    whole = facts_of(batch, case, traced=True)
    for order in ORDERS:
        part = facts_of(problems.part_of(batch, order, **case.sizes), case, traced=True)
        for facts, index in zip(part, order, strict=True):
            assert_equal(facts, whole[index])


@cases
def test_requests_that_rest_are_as_in_a_dense_layer_and_others_as_before(case: Case) -> None:
    problem = problems.make(**case.sizes)
    before = facts_of(problem, case, traced=False)
    dense = facts_of(problem, replace(case, pattern="dense"), traced=False)
    resting = facts_of(problem, case, traced=False, dense={1, 3})
    for index, facts in enumerate(resting):
        assert_equal(facts, dense[index] if index in {1, 3} else before[index])


def test_reports_of_a_layer_that_ran_dense() -> None:
    problem, case = problems.make(**SMALL), CASES["exact"]
    heads = problem.query.shape[1]
    specs = load("dense").specs(0, range(heads))
    ran = prefill.run_layer(problem.operands, problem.plan, specs, Config(), torch.empty_like(problem.query), "torch")
    for ours, theirs in zip(prefill.dense_reports(problem.plan, heads), ran, strict=True):
        assert astuple(ours) == astuple(theirs), case


@cases
def test_two_runs_are_the_same(case: Case) -> None:
    first, second = (facts_of(problems.make(**case.sizes), case, traced=False) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)


def test_the_cases_are_what_they_are_called() -> None:
    """Otherwise equality would say little."""
    reports = {name: _reports(case) for name, case in CASES.items()}
    assert all(int(report.tiles) >= int(report.causal) for report in reports["exact"])
    for name in ("sparse", "columns", "shared lists", "bfloat16"):
        assert any(int(report.tiles) < int(report.causal) for report in reports[name]), name
    assert any(int(report.guarded) for report in reports["guarded"])


def _reports(case: Case) -> list[prefill.LayerReport]:
    problem = problems.make(**case.sizes)
    specs = load(case.pattern).specs(0, range(problem.query.shape[1]))
    config = Config(error=case.error, text_error=case.error, error_ceiling=case.ceiling)
    return prefill.run_layer(problem.operands, problem.plan, specs, config, torch.empty_like(problem.query), "torch")


def test_a_request_that_begins_again_forgets_what_its_heads_picked() -> None:
    """As one that was retracted does; a chunk that goes on where the last one ended does not."""
    layout = problems.make([problems.MIXED[0]]).plan.requests[0].layout
    picks = layout.carried_picks("media", 4)
    for prefix, num_keys, kept in ((0, 300, True), (300, 500, True), (510, 600, True), (599, 700, False)):
        picks.fill_(1)
        layout.begin(prefix, num_keys)
        assert (picks == (1 if kept else -1)).all(), prefix
