"""The promise: a layer's output at the probe rows is off by no more than the knob says, whatever selection believed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import problems
from mminference_sgl.kernels import search
from mminference_sgl.kernels.levels import Curves
from mminference_sgl.method.catalog import load
from mminference_sgl.method.config import AShapeBudget, Config, PatternBudgets
from test_attention import run_specs
from test_select import LONG_VIDEO, distances, plant

PATTERNS = ("auto", "grid", "vertical_slash", "a_shape")
NARROW = PatternBudgets(a_shape=AShapeBudget(sink=16, window=48))


def sharp(scale: float = 0.4) -> problems.Problem:
    """Rows that look at the same place in all frames, and a little at everything."""
    problem = problems.make([LONG_VIDEO], tile_queries=32, tile_keys=16, head_dim=64, cell_size=4)
    query, key = distances(LONG_VIDEO)
    plant(problem, ((query - key) % 96 == 0) & (key >= 5) & (key <= query))
    problem.query.mul_(scale)
    return problem


def measured(problem: problems.Problem, out: torch.Tensor) -> list[float]:
    """The error at each group's probe rows, from dense attention itself."""
    exact, found = problem.dense(torch.float32), []
    for group in problem.plan.groups:
        rows = group.probe_rows.rows
        found.append(float((out - exact)[rows].norm() / exact[rows].norm()))
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("error", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("make", [sharp, problems.make], ids=["planted", "random"])
def test_no_layer_is_off_by_more_than_the_knob(pattern: str, error: float, make) -> None:
    problem = make()
    specs = load(pattern).specs(0, range(problem.query.shape[1]))
    config = {"error": error, "text_error": error, "patterns": NARROW}
    out, reports = run_specs(problem, specs, "torch", **config)
    assert all(float(report.error) <= error for report in reports)
    assert max(measured(problem, out)) <= error * 1.001 + 1e-5


def test_the_knob_is_used() -> None:
    """A looser bound costs fewer tiles, and selection keeps to it by itself."""
    specs = load("auto").specs(0, range(4))
    reports = [run_specs(sharp(0.7), specs, "torch", error=error)[1][0] for error in (0.02, 0.1, 0.5)]
    tiles = [float(report.tiles) for report in reports]
    assert tiles[0] > tiles[1] > tiles[2]
    assert all(int(report.guarded) == 0 for report in reports)
    assert float(reports[1].error) > 0.02, "what may be lost is lost"


def test_what_selection_does_not_see_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection that believes nothing is lost reads next to nothing; the guard measures, and computes heads again."""

    seeing = search.curves

    def blind(*given: torch.Tensor) -> Curves:
        found = seeing(*given)
        return dataclasses.replace(found, error=torch.zeros_like(found.error))

    monkeypatch.setattr(search, "curves", blind)
    problem, specs = sharp(), load("auto").specs(0, range(4))
    _, (free,) = run_specs(problem, specs, "torch", error=0.1, error_ceiling=1e9)
    assert float(free.error) > 0.1
    out, (report,) = run_specs(problem, specs, "torch", error=0.1)
    assert int(report.guarded) > 0
    assert float(report.error) <= 0.1
    assert max(measured(problem, out)) <= 0.1


def test_text_rows_are_held_to_their_own_bound() -> None:
    config = Config()
    assert (config.error, config.text_error) == (0.07, 0.01), "as docs/real-weights.md says"
    assert (config.bound("media"), config.bound("text")) == (0.07, 0.01)
    assert Config(error=0.005).bound("text") == 0.005, "text is never held to less than media"
    assert Config(error=0.0).ceiling("media") == torch.inf, "rounding is no error"
    assert Config(error=0.3).ceiling("media") == 0.3
    assert Config(error=0.3, error_ceiling=0.5).ceiling("text") == 0.5
