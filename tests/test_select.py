"""Selection: what is chosen holds what the patterns promise, and the reported coverage and error are true."""

from __future__ import annotations

import pytest
import torch

import problems
from mminference_sgl import prefill
from mminference_sgl.catalog import load
from mminference_sgl.config import Config, GridBudget, PatternBudgets
from mminference_sgl.kernels import probe, reference, select
from mminference_sgl.kernels.tiles import Region, element_mask

PATTERNS = ("auto", "grid", "vertical_slash", "a_shape")
VIDEO = problems.Request(5 + 24 * 48 + 9, [problems.one_span_video(5, 24, 6, 8)], 0, 5 + 24 * 48 + 9)
TIMESTAMPS = problems.Request(1400, [problems.timestamped_video(4, 20, 6, 8)], 500, 640)


def probed(problem: problems.Problem, group) -> probe.Probe:
    slots = problem.plan.near.keys.slots[problem.plan.key_tiles[group.request]]
    operands = problem.query, problem.key_pool, problem.value_pool
    return probe.run(*operands, slots, group.probe_rows, problem.scale)


def choose(problem: problems.Problem, group, pattern: str, config: Config) -> select.Choice:
    return prefill._choose(group.view, probed(problem, group), [(pattern, pattern)] * problem.query.shape[1], config)


def media_group(problem: problems.Problem):
    (group,) = [group for group in problem.plan.groups if group.modality == "media"]
    return group


def plant(problem: problems.Problem, wanted: torch.Tensor) -> None:
    """Makes every row attend to the keys of the bool matrix ``wanted`` [rows, keys] and hardly to others.

    Each token gets a random direction as its key; a row asks for the sum of those it wants.
    """
    request = problem.requests[0]
    slots = problem.req_to_token[0, : request.prefix + request.chunk].long()
    keys = torch.nn.functional.normalize(torch.randn(slots.numel(), problem.query.shape[2]), dim=-1)
    problem.key_pool[slots] = keys[:, None]
    problem.query.copy_((wanted.float() @ keys)[:, None] * 14 / problem.scale)


def distances(request: problems.Request) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(request.prefix, request.prefix + request.chunk)[:, None], torch.arange(
        request.prefix + request.chunk
    )


@pytest.mark.parametrize("request_", [VIDEO, TIMESTAMPS], ids=["one-span", "timestamps"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_reported_coverage_is_the_mass_that_attention_keeps(request_: problems.Request, pattern: str) -> None:
    """The LSE of the sparse and the dense softmax differ by exactly the log of the kept mass."""
    problem = problems.make([request_], tile_queries=32, tile_keys=16, heads=4)
    config = Config(coverage=0.8, max_density=0.4, error_ceiling=100.0)
    group = media_group(problem)
    rows = probed(problem, group)
    choice = choose(problem, group, pattern, config)
    coverage, error = select.evaluate(group.view, rows, choice)

    operands = problem.query, problem.key_pool, problem.value_pool
    parts = []
    for tile_pass, tiles, selected in (
        (problem.plan.near, group.near, choice.near),
        (problem.plan.far, group.far, choice.far),
    ):
        lists = prefill._PassLists(tile_pass, 4)
        lists.put(tiles, selected, choice)
        whole = torch.zeros_like(problem.query), torch.full(problem.query.shape[:2], -torch.inf)
        reference.attend(*operands, tile_pass, lists.lists(), problem.scale, *whole, merge=False)
        parts.append([x[group.probe_rows.rows] for x in whole])
    (near_out, near_lse), (far_out, far_lse) = parts
    lse = torch.logaddexp(near_lse, far_lse)
    scores = torch.einsum("phd,hkd->phk", problem.query[group.probe_rows.rows], _keys(problem)) * problem.scale
    future = torch.arange(scores.shape[-1]) > group.probe_rows.positions[:, None, None]
    dense_lse = scores.masked_fill(future, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(coverage, (lse - dense_lse).exp().mean(0), atol=1e-5, rtol=1e-4)

    share = torch.exp(far_lse - lse)[..., None]
    sparse = near_out * (1 - share) + far_out * share
    dense = problem.dense(torch.float32)[group.probe_rows.rows]
    torch.testing.assert_close(error, (sparse - dense).square().sum((0, 2)), atol=1e-3, rtol=1e-3)


def _keys(problem: problems.Problem) -> torch.Tensor:
    request = problem.requests[0]
    keys = problem.key_pool[problem.req_to_token[0, : request.prefix + request.chunk].long()]
    return keys.repeat_interleave(problem.query.shape[1] // keys.shape[1], 1).transpose(0, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("coverage", [0.5, 0.95, 1.0])
def test_no_tile_is_wholly_in_the_future_and_every_near_key_is_listed(pattern: str, coverage: float) -> None:
    problem = problems.make(tile_queries=32, tile_keys=16)
    config = Config(coverage=coverage, max_density=0.3, error_ceiling=100.0)
    for group in problem.plan.groups:
        if group.modality == "text" and pattern in {"grid", "auto"}:
            continue
        choice = choose(problem, group, pattern, config)
        view = group.view
        assert not (choice.near & (view.keys.min_pos > view.queries.max_pos[:, None])).any()
        if choice.far is not None and view.cell is not None:
            assert not (choice.far & (view.cell.keys.min_pos > view.cell.queries.max_pos[:, None])).any()
        near = problem.plan.near
        offset = int(near.keys.tile_indptr[group.request])
        for index, tile in enumerate(range(group.near.start, group.near.stop)):
            rows = slice(*near.indptr[tile : tile + 2].tolist())
            positions = near.keys.positions[offset : offset + choice.near.shape[-1]].flatten()
            for head in range(choice.near.shape[0]):
                reach = int(choice.reach[head])
                if reach > 1 << 20:
                    continue
                needed = element_mask(Region.NEAR, near.positions[rows, None], positions, int(choice.sink[head]), reach)
                needed_tiles = needed.any(0).view(-1, near.keys.tile_keys).any(1)
                assert (choice.near[head, index] >= needed_tiles).all()


def test_every_row_sees_itself_the_sink_and_the_window() -> None:
    problem = problems.make([TIMESTAMPS], tile_queries=32, tile_keys=16)
    budget = PatternBudgets(grid=GridBudget(sink=20, window_frames=1))
    config = Config(coverage=0.01, max_density=0.0, error_ceiling=100.0, patterns=budget)
    group = media_group(problem)
    rows = probed(problem, group)
    kept = select._kept_elements(group.view, rows, choose(problem, group, "grid", config))
    position = group.probe_rows.positions[:, None]
    keys = torch.arange(kept.shape[-1])
    stride = group.view.cell.stride
    assert kept[:, (keys <= position) & ((keys < 20) | (keys >= position - stride))].all()
    assert not kept[:, keys > position].any()


def test_grid_finds_the_same_place_in_other_frames() -> None:
    """Rows that attend to their own place in every frame: grid keeps it all, cheaply, and auto picks it."""
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16, head_dim=128)
    query, key = distances(VIDEO)
    same_place = ((query - key) % 48 == 0) & (key <= query) & (key >= 5)
    plant(problem, same_place)
    group = media_group(problem)
    config = Config(coverage=0.9, max_density=0.3, patterns=PatternBudgets(grid=GridBudget(sink=16)))
    rows = probed(problem, group)
    truth = (rows.weights[..., : key.numel()] * same_place[group.probe_rows.rows]).sum(-1).mean()
    assert truth > 0.85, "the plant must take"
    coverage, _ = select.evaluate(group.view, rows, choose(problem, group, "grid", config))
    assert (coverage >= truth - 0.02).all()
    auto = choose(problem, group, "auto", config)
    assert (auto.far.sum((1, 2)) > 0).all(), "auto must take the cell pass"
    assert (auto.tiles() < 0.35 * select.causal_tiles(group.view)).all()


def test_vertical_slash_finds_columns_and_diagonals() -> None:
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16, head_dim=128)
    query, key = distances(VIDEO)
    lines = ((key >= 300) & (key < 306)) | (query - key == 200)
    plant(problem, lines & (key <= query))
    group = media_group(problem)
    config = Config(coverage=0.9, max_density=0.5)
    rows = probed(problem, group)
    truth = (rows.weights[..., : key.numel()] * (lines & (key <= query))[group.probe_rows.rows]).sum(-1).mean()
    choice = choose(problem, group, "vertical_slash", config)
    coverage, _ = select.evaluate(group.view, rows, choice)
    assert truth > 0.95, "the plant must take"
    assert (coverage >= config.coverage).all()
    assert (choice.tiles() < 0.5 * select.causal_tiles(group.view)).all()
    torch.testing.assert_close(coverage, choice.coverage, atol=1e-4, rtol=1e-4)


def test_density_stays_within_the_budget() -> None:
    """Diffuse attention never reaches the coverage; the budget bounds what is spent beyond the fixed part."""
    problem = problems.make([VIDEO], tile_queries=16, tile_keys=16)
    problem.query.mul_(0.01)
    group = media_group(problem)
    causal = select.causal_tiles(group.view)
    for pattern in ("grid", "vertical_slash"):
        fixed = choose(problem, group, pattern, Config(coverage=0.95, max_density=0.0)).tiles()
        assert (fixed < 0.5 * causal).all()
        for budget in (0.2, 0.5, 0.8):
            spent = choose(problem, group, pattern, Config(coverage=0.95, max_density=budget)).tiles()
            assert (spent <= torch.maximum(fixed, budget * causal + 1)).all()
            assert (spent >= fixed).all()
        assert (spent > 0.4 * causal).all(), "a diffuse head takes what it may, but for diagonals that share tiles"


def test_guard_bounds_the_error_with_the_fewest_heads() -> None:
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16, heads=8, kv_heads=2)
    group = media_group(problem)
    rows = probed(problem, group)
    choice = choose(problem, group, "a_shape", Config(patterns=PatternBudgets(), max_density=0.1))
    choice = choose(problem, group, "grid", Config(coverage=0.3, max_density=0.1))
    _, error = select.evaluate(group.view, rows, choice)
    energy = rows.output.square().sum()
    ceiling = 0.5 * float((error.sum() / energy).sqrt())
    guarded_choice, guarded = select.guard(group.view, choice, error, energy, ceiling)
    _, after = select.evaluate(group.view, rows, guarded_choice)
    assert 0 < int(guarded.sum()) < 8
    assert float((after.sum() / energy).sqrt()) <= ceiling
    assert error[guarded].min() >= error[~guarded].max(), "the worst heads go first"
    one_less = after.sum() + error[guarded].min()
    assert float((one_less / energy).sqrt()) > ceiling, "no head goes dense without need"
    _, none = select.guard(group.view, choice, error, energy, 100.0)
    assert not none.any()
    _, every = select.guard(group.view, choice, error, energy, 0.0)
    assert every.all()


@pytest.mark.parametrize("bound", [1, 1 << 16, 1 << 30])
def test_blocks_of_heads_do_not_change_the_answer(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make(heads=8, kv_heads=2, tile_queries=64)
    specs = load("auto").specs(0, range(8))
    config = Config(coverage=0.7, max_density=0.3, error_ceiling=0.9)

    def output() -> torch.Tensor:
        out = torch.empty_like(problem.query)
        operands = problem.query, problem.key_pool, problem.value_pool
        prefill.run_layer(*operands, problem.plan, specs, config, problem.scale, out, "torch")
        return out

    whole = output()
    monkeypatch.setattr(prefill, "PROBE_BYTES_CPU", bound)
    torch.testing.assert_close(output(), whole, atol=1e-5, rtol=1e-5)
