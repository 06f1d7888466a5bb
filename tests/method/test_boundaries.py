"""The four kinds of modality boundary, chunks, and what the guard can and cannot see."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import problems
from mminference_sgl.kernels import ops
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import AShapeBudget, Config, PatternBudgets
from test_attention import assert_as_exact_as
from test_select import LONG_VIDEO, cells, distances, plant

BOUNDARIES = {
    "none": HeadSpec("vertical_slash", "vertical_slash", "vertical_slash", "vertical_slash"),
    "key": HeadSpec("dense", "vertical_slash", "dense", "vertical_slash"),
    "query": HeadSpec("dense", "dense", "grid", "grid"),
    "query, auto": HeadSpec("vertical_slash", "vertical_slash", "auto", "auto"),
    "query and key": HeadSpec("dense", "vertical_slash", "a_shape", "grid"),
    "query and key, by mass": HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid"),
    "query and key, no grid": HeadSpec("vertical_slash", "a_shape", "dense", "a_shape"),
}
NARROW = PatternBudgets(a_shape=AShapeBudget(sink=16, window=48))
boundaries = pytest.mark.parametrize("name", BOUNDARIES)


def run(problem: problems.Problem, spec: HeadSpec, implementation: str, config: Config) -> torch.Tensor:
    out = torch.full_like(problem.query, torch.nan)
    specs = [spec] * problem.query.shape[1]
    prefill.run_layer(problem.operands, problem.plan, specs, config, out, implementation)
    return out


def kept_mass(problem: problems.Problem, spec: HeadSpec, config: Config) -> torch.Tensor:
    """True mass that each row keeps, [rows, H]: the LSE over the listed keys against that over all."""
    passes, _ = prefill.select_layer(problem.operands, problem.plan, [spec] * problem.query.shape[1], config)
    sparse = ops.sparse_prefill(problem.operands, passes, torch.empty_like(problem.query), "torch")
    every_head_dense = [HeadSpec(media_text="dense", media_media="dense")] * problem.query.shape[1]
    dense, _ = prefill.select_layer(problem.operands, problem.plan, every_head_dense, config)
    every = ops.sparse_prefill(problem.operands, dense, torch.empty_like(problem.query), "torch")
    return (sparse - every).exp()


@boundaries
def test_every_boundary_equals_the_reference_on_its_tiles(name: str) -> None:
    problem = problems.make(tile_queries=32, tile_keys=16)
    config = Config(error=0.8, text_error=0.8, error_ceiling=100.0, patterns=NARROW)
    plain, fast = (run(problem, BOUNDARIES[name], which, config) for which in ("reference", "torch"))
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-4)
    assert (fast - problem.dense()).abs().max() > 1e-2, "something must have been left out"


@boundaries
def test_every_boundary_is_dense_at_error_zero(name: str) -> None:
    problem = problems.make(tile_queries=32, tile_keys=16)
    out = run(problem, BOUNDARIES[name], "torch", Config(error=0.0, patterns=NARROW))
    assert_as_exact_as(problem.dense(torch.float32), out, problem.dense())


@boundaries
def test_what_a_boundary_calls_dense_is_read_in_full(name: str) -> None:
    """Mass on the keys of a modality is kept whole where the map says dense for it."""
    problem = problems.make([problems.MIXED[1]], tile_queries=32, tile_keys=16)
    spec = BOUNDARIES[name]
    request = problems.MIXED[1]
    is_media = torch.zeros(request.length, dtype=torch.bool)
    for _, spans, _ in request.items:
        for start, end in spans:
            is_media[start : end + 1] = True
    config = Config(error=100.0, text_error=100.0, error_ceiling=1e9, patterns=NARROW)
    end = request.prefix + request.chunk
    slots = problem.req_to_token[0, :end].long()
    media_row = is_media[request.prefix : end]
    # Text between the frames of one item runs as media rows do.
    decides = torch.ones(request.chunk, dtype=torch.bool)
    decides[: int(torch.nonzero(media_row)[-1]) + 1] = False
    for key_modality, keys in (("text", ~is_media[:end]), ("media", is_media[:end])):
        only = dataclasses.replace(problem, query=problem.query.clone(), key_pool=problem.key_pool.clone())
        direction = torch.zeros(problem.query.shape[2])
        direction[0] = 20.0
        only.query.copy_(direction.expand_as(only.query))
        only.key_pool[slots] = 0.0
        only.key_pool[slots[keys], :, 0] = 10.0
        mass = kept_mass(only, spec, config)
        for modality, rows in (("text", decides), ("media", media_row)):
            pattern = getattr(spec, f"{modality}_{key_modality}")
            if pattern == "dense" and rows.any():
                assert mass[rows].min() > 0.999, (modality, key_modality)


@pytest.mark.parametrize("chunk", [509, 1153])
def test_chunks_keep_the_mass_that_the_whole_keeps(chunk: int) -> None:
    """Same place in all frames, and a few columns: cut anywhere, as much of the mass is kept as by one chunk."""
    whole = problems.make([LONG_VIDEO], tile_queries=32, tile_keys=16, head_dim=256, cell_size=4)
    query, key = distances(LONG_VIDEO)
    wanted = ((query - key) % 96 == 0) & (key >= 5) | (key % 577 == 3)
    plant(whole, wanted & (key <= query))
    spec, config = HeadSpec(), Config(error=0.2)
    at_once = kept_mass(whole, spec, config)
    parts = []
    for prefix in range(0, LONG_VIDEO.length, chunk):
        rows = slice(prefix, min(prefix + chunk, LONG_VIDEO.length))
        cut = dataclasses.replace(LONG_VIDEO, prefix=prefix, chunk=rows.stop - prefix)
        part = problems.make([cut], tile_queries=32, tile_keys=16, head_dim=256, cell_size=4)
        slots, own = (p.req_to_token[0, : rows.stop].long() for p in (whole, part))
        for pool, source in ((part.key_pool, whole.key_pool), (part.value_pool, whole.value_pool)):
            pool[own] = source[slots]
        part.query.copy_(whole.query[rows])
        parts.append(kept_mass(part, spec, config))
    # The rows of the first frames see hardly anything in either.
    late = slice(LONG_VIDEO.length // 4, None)
    in_parts = torch.cat(parts)
    for rows in (late, slice(None)):
        kept = [float(mass[rows].mean().clamp_max(0.9)) for mass in (in_parts, at_once)]
        assert kept[1] > 0.85
        assert kept[0] == pytest.approx(kept[1], abs=0.01)


def test_the_guard_sees_what_its_probe_rows_see_and_nothing_else() -> None:
    """Keys that only unprobed rows need: estimated coverage and error stay good, and the rows lose them.

    With the same keys needed by the probe rows, the error is measured and the heads go dense. docs/method.md says so.
    """
    hidden, seen = _needing_far_keys(by_probed=False), _needing_far_keys(by_probed=True)
    config = Config(error=100.0, error_ceiling=0.5)

    def outcome(problem: problems.Problem) -> tuple[prefill.LayerReport, torch.Tensor]:
        out = torch.empty_like(problem.query)
        specs = [HeadSpec(media_text="grid", media_media="grid")] * problem.query.shape[1]
        (report,) = prefill.run_layer(problem.operands, problem.plan, specs, config, out, "torch")
        return report, (out - problem.dense(torch.float32)).square().mean((1, 2)).sqrt()

    report, error = outcome(hidden)
    probed = torch.zeros(LONG_VIDEO.chunk, dtype=torch.bool)
    for group in hidden.plan.groups:
        probed[group.probe_rows.rows] = True
    late = torch.arange(LONG_VIDEO.chunk) > LONG_VIDEO.chunk // 2
    assert float(report.coverage) > 0.85
    assert int(report.guarded) == 0, "not promised: rows that are not probed are not watched"
    assert error[late & ~probed].mean() > 5 * error[probed].mean(), "the plant must take"

    report, error = outcome(seen)
    assert int(report.guarded) == seen.query.shape[1], "promised: what the probe rows lose is measured"
    assert float(report.error) == 0, "what is left behind the repair"
    assert error.max() < 1e-4


def _needing_far_keys(*, by_probed: bool) -> problems.Problem:
    """Every row looks at its own cell, but some, the probed ones or all others, look at two keys far away."""
    problem = problems.make([LONG_VIDEO], tile_queries=32, tile_keys=16, head_dim=256, cell_size=4)
    query, key = distances(LONG_VIDEO)
    cell = cells(problem)
    same_place = ((query - key) % 96 == 0) & (key >= 5) & (key <= query)
    far = (cell[key] != cell[query]) & ((key % 1999 == 700) | (key == 100)) & (key <= query - 200)
    wants_far = torch.zeros(LONG_VIDEO.chunk, dtype=torch.bool)
    for group in problem.plan.groups:
        wants_far[group.probe_rows.rows] = True
    if not by_probed:
        wants_far = ~wants_far & (query[:, 0] > 300)
    plant(problem, torch.where(wants_far[:, None], far, same_place))
    return problem
