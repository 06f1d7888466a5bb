"""Selection: what is chosen holds what the patterns promise, and the reported coverage is true."""

from __future__ import annotations

import pytest
import torch

import problems
from mminference_sgl.kernels import choice as choices
from mminference_sgl.kernels import probe, reference, search, select
from mminference_sgl.kernels.stages import stages_of
from mminference_sgl.kernels.tiles import Region, element_mask
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec, load
from mminference_sgl.method.config import Config, GridBudget, PatternBudgets

PATTERNS = ("auto", "grid", "vertical_slash", "a_shape")
VIDEO = problems.Request(5 + 24 * 48 + 9, [problems.one_span_video(5, 24, 6, 8)], 0, 5 + 24 * 48 + 9)
LONG_VIDEO = problems.Request(5 + 48 * 96, [problems.one_span_video(5, 48, 8, 12)], 0, 5 + 48 * 96)
TIMESTAMPS = problems.Request(1400, [problems.timestamped_video(4, 20, 6, 8)], 500, 640)


def probed(problem: problems.Problem, group) -> probe.WeightProbe:
    return probe.run(problem.operands, group.keys, group.probe_rows)


def choose(problem: problems.Problem, group, pattern: str, config: Config) -> choices.Choice:
    proposals = prefill.Proposals(group.view, probed(problem, group), config, None)
    return proposals.choose([(pattern, pattern)] * problem.query.shape[1])


def media_group(problem: problems.Problem):
    (group,) = [group for group in problem.plan.groups if group.modality == "media"]
    return group


def plant(problem: problems.Problem, wanted: torch.Tensor) -> None:
    """Makes every row attend to the keys of the bool matrix ``wanted`` [rows, keys] and hardly to others.

    Each token gets a random direction as its key; a row asks for the sum of those it wants.
    """
    request = problem.requests[0]
    slots = problem.req_to_token[0, : request.prefix + request.chunk].long()
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(slots.numel(), problem.query.shape[2], generator=generator)
    keys /= keys.norm(dim=-1, keepdim=True)
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
    measured = select.measured(group.view, rows, choice, choices.Limits(0.8, 0.4, 4.0)).coverage

    parts = []
    for tile_pass, tiles, selected in (
        (problem.plan.near, group.near, choice.near),
        (problem.plan.far, group.far, choice.far),
    ):
        lists = prefill._PassLists(tile_pass, 4, stages_of("reference"))
        lists.put(tiles, selected, choice)
        whole = torch.zeros_like(problem.query), torch.full(problem.query.shape[:2], -torch.inf)
        reference.attend(problem.operands, tile_pass, lists.lists(), *whole, merge=False)
        parts.append([x[group.probe_rows.rows] for x in whole])
    (_, near_lse), (_, far_lse) = parts
    lse = torch.logaddexp(near_lse, far_lse)
    scores = torch.einsum("phd,hkd->phk", problem.query[group.probe_rows.rows], _keys(problem)) * problem.scale
    future = torch.arange(scores.shape[-1]) > group.probe_rows.positions[:, None, None]
    dense_lse = scores.masked_fill(future, -torch.inf).logsumexp(-1)
    truth = (lse - dense_lse).exp().mean(0)
    torch.testing.assert_close(choice.coverage, truth, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(measured, truth, atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize(("window", "frames"), [(1, 0), (30, 0), (64, 1), (64, 2)])
def test_every_row_sees_itself_the_sink_and_the_window(window: int, frames: int) -> None:
    problem = problems.make([TIMESTAMPS], tile_queries=32, tile_keys=16)
    budget = PatternBudgets(grid=GridBudget(sink=20, window=window, window_frames=frames))
    config = Config(coverage=2.0 / 3, max_density=0.0, error_ceiling=100.0, patterns=budget)
    group = media_group(problem)
    rows = probed(problem, group)
    choice = choose(problem, group, "grid", config)
    kept = select.kept(group.view, rows, choice)
    position = group.probe_rows.positions[:, None]
    keys = torch.arange(kept.shape[-1])
    reach = choice.reach[:, None, None]
    assert choice.reach.unique().tolist() in ([window], [frames * group.view.cell.stride + 1])
    assert kept[((keys <= position) & ((keys < 20) | (keys > position - reach))).expand_as(kept)].all()
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
    coverage = choose(problem, group, "grid", config).coverage
    assert (coverage >= truth - 0.02).all()
    auto = choose(problem, group, "auto", config)
    assert (auto.far.sum((1, 2)) > 0).all(), "auto must take the cell pass"
    assert (auto.tiles < 0.35 * group.view.causal_tiles).all()


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
    assert truth > 0.85, "the plant must take; the first rows have nothing to look at yet"
    assert (choice.coverage >= config.coverage).all()
    assert (choice.tiles < 0.5 * group.view.causal_tiles).all()


def test_density_stays_within_the_budget() -> None:
    """Diffuse attention never reaches the coverage; the budget bounds what is spent beyond the fixed part."""
    problem = problems.make([VIDEO], tile_queries=16, tile_keys=16)
    problem.query.mul_(0.3)
    group = media_group(problem)
    causal = group.view.causal_tiles
    for pattern in ("grid", "vertical_slash"):
        fixed = choose(problem, group, pattern, Config(coverage=0.95, max_density=0.0)).tiles
        assert (fixed < 0.5 * causal).all()
        for budget in (0.2, 0.5, 0.8):
            spent = choose(problem, group, pattern, Config(coverage=0.95, max_density=budget, min_gain=0.0)).tiles
            assert (spent <= torch.maximum(fixed, budget * causal)).all()
            assert (spent >= fixed).all()
        spent = choose(problem, group, pattern, Config(coverage=0.95, max_density=1.0, min_gain=0.0)).tiles
        assert (spent > (0.9 * causal if pattern == "vertical_slash" else fixed)).all(), "it takes what it may"
        spent = choose(problem, group, pattern, Config(coverage=0.95, max_density=0.8, min_gain=2.0)).tiles
        assert (spent == fixed).all(), "no tile of a diffuse head holds twice what an average one holds"


def cells(problem: problems.Problem) -> torch.Tensor:
    """Cell of each token, int64 [length]: 0 for text, then from 1."""
    layout = problem.plan.requests[0].layout.layout
    inverse, runs = (torch.from_numpy(array.copy()) for array in (layout.inverse("cell"), layout.runs("cell")))
    return torch.searchsorted(runs, inverse, right=True) - 1


def test_h_lines_read_everything() -> None:
    """Rows of some cells look everywhere, the others at their own place: only the former's query tiles read it all."""
    problem = problems.make([LONG_VIDEO], tile_queries=32, tile_keys=16, head_dim=256, cell_size=4)
    query, key = distances(LONG_VIDEO)
    everywhere = torch.isin(cells(problem), torch.tensor([1, 7]))
    same_place = ((query - key) % 96 == 0) & (key >= 5) & (key <= query)
    plant(problem, same_place)
    problem.query[everywhere] = 0
    group = media_group(problem)
    rows = group.probe_rows.rows
    weights = probed(problem, group).weights[..., : key.numel()]
    truth = (weights * (same_place | everywhere[:, None])[rows]).sum(-1).mean()
    choice = choose(problem, group, "grid", Config(coverage=float(truth) - 0.004, max_density=0.5))
    cell, far = group.view.cell, problem.plan.far
    visible = cell.tiles(int(choice.sink[0]), int(choice.reach[0])).visible.sum(1)
    slots = [slice(*far.indptr[tile : tile + 2].tolist()) for tile in range(group.far.start, group.far.stop)]
    h_line = torch.tensor([bool(everywhere[far.positions[slot].long()].all()) for slot in slots])
    read = choice.far.sum(-1) / visible.clamp_min(1)
    assert 0 < int(h_line.sum()) < 0.2 * h_line.numel()
    assert (read[:, h_line] > 0.9).float().mean() > 0.8, "a band at the edge may hold another cell as well"
    assert (read[:, ~h_line & (visible > 40)] < 0.6).all()


def test_neighbouring_cells_are_read_where_heads_look_there() -> None:
    """Rows that look at the cells before and behind their own along the curve."""
    problem = problems.make([LONG_VIDEO], tile_queries=32, tile_keys=16, head_dim=128, cell_size=4)
    cell = cells(problem)
    query, key = distances(LONG_VIDEO)
    wanted = ((cell[query] - cell[key]).abs() == 1) & (cell[key] > 0) & (key <= query) & (key % 5 == 0)
    plant(problem, wanted)
    group = media_group(problem)
    rows = probed(problem, group)
    own = (rows.weights[..., : key.numel()] * (cell[query] == cell[key])[group.probe_rows.rows]).sum(-1).mean()
    choice = choose(problem, group, "grid", Config(coverage=0.75, max_density=0.5))
    assert own < 0.2, "the plant must take"
    assert (choice.coverage >= 0.75).all()
    assert (choice.tiles < 0.5 * group.view.causal_tiles).all()


def by_threshold(start: torch.Tensor, mass: torch.Tensor, cost: torch.Tensor, limits: choices.Limits) -> list[bool]:
    """Which tiles are taken where each is a candidate by itself: ``mass`` [P, n], ``cost`` [n] of one head."""
    useful = search._useful(mass[None], limits.coverage - start[None]).mean(1)
    levels = search._levels(useful, cost, cost.sum(), limits)
    reached = search._reached(start[None], mass[None], levels[:, None].expand(1, *mass.shape))
    tiles = torch.stack([(cost * (levels[0] >= level)).sum() for level in range(search.LEVELS + 1)])
    return (levels[0] >= search._threshold(reached, tiles[None], cost.sum(), limits)).tolist()


def test_fewest_candidates_are_taken() -> None:
    mass = torch.tensor([[0.4, 0.3, 0.15, 0.07, 0.03]])

    def fewest(budget: int, target: float, min_gain: float = 0.0) -> list[bool]:
        limits = choices.Limits(target, budget / 5, min_gain)
        return by_threshold(torch.tensor([0.05]), mass, torch.ones(5, dtype=torch.int64), limits)

    assert fewest(5, 0.55) == [True, True, False, False, False]
    assert fewest(5, 0.35) == [True, True, False, False, False], "both hold as much as is needed"
    assert fewest(5, 0.4) == [True, False, False, False, False]
    assert fewest(5, 0.05) == [False] * 5
    assert fewest(5, 0.95) == [True, True, True, True, False], "0.03 of the mass is not worth a tile"
    assert fewest(5, 1.0) == [True] * 5
    assert fewest(2, 0.88) == [True, True, False, False, False], "the budget ends the list"
    assert fewest(0, 0.55) == [False] * 5
    assert fewest(3, 0.95, min_gain=1.0) == [True, True, False, False, False], "out of reach: what holds its share"


def test_rows_above_the_target_do_not_make_up_for_rows_below() -> None:
    """Nine rows find all they need in one tile, the tenth in another: the mean is reached without it, but it is not."""
    mass = torch.zeros(10, 2)
    mass[:9, 0], mass[9, 1] = 1.0, 1.0
    limits = choices.Limits(0.9, 1.0, 0.0)
    assert by_threshold(torch.zeros(10), mass, torch.ones(2, dtype=torch.int64), limits) == [True, True]


@pytest.mark.parametrize("span", [1, 2, 3, 5, 9])
def test_the_level_of_a_tile_is_the_highest_of_the_diagonals_that_touch_it(span: int) -> None:
    generator = torch.Generator().manual_seed(span)
    levels = torch.randint(-1, 65, (2, 20), generator=generator, dtype=torch.int8)
    first = torch.arange(20)
    last = (first + torch.randint(span, (20,), generator=generator)).clamp_max(19)
    found = search._on_diagonals(levels, first, last, span)
    for head in range(2):
        for query in range(20):
            for tile in range(int(last[query]) + 1):
                touching = range(max(0, int(first[query]) - tile), int(last[query]) - tile + 1)
                assert int(found[head, query, tile]) == max(int(levels[head, b]) for b in touching)


def test_the_cheapest_choice_that_reaches_the_target_is_picked() -> None:
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16)
    view = media_group(problem).view
    causal = int(view.causal_tiles)

    def choice(tiles: int, coverage: float, missing: float) -> choices.Choice:
        near = torch.zeros(1, causal, dtype=torch.bool)
        near[0, :tiles] = True
        whole = choices.dense(view, 1)
        return choices.Choice(
            near[None],
            None,
            whole.sink,
            whole.reach,
            torch.tensor([coverage]),
            torch.tensor([missing]),
            torch.tensor([tiles]),
        )

    def pick(*made: choices.Choice) -> int:
        return int(choices.cheapest(view, list(made), choices.Limits(0.9, 1.0, 4.0))[1])

    cheap, dear, poor = choice(9, 0.92, 0.0), choice(99, 0.99, 0.0), choice(1, 0.8, 0.1)
    assert pick(dear, cheap, poor) == 1
    assert pick(poor, dear) == 1, "reaching the target beats everything"
    tenth = causal // 10
    assert pick(choice(tenth, 0.5, 0.4), choice(2 * tenth, 0.8, 0.1)) == 0, "0.3 of the mass for a tenth of the tiles"
    assert pick(choice(tenth, 0.3, 0.6), choice(2 * tenth, 0.8, 0.1)) == 1, "half the mass for a tenth of the tiles"


@pytest.mark.parametrize("waits", [True, False], ids=["asked", "empty lists"])
def test_guard_bounds_the_error_with_the_fewest_heads(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of what was computed; heads over the ceiling are computed again, and equal dense attention."""
    monkeypatch.setattr(prefill, "stages_of", lambda name: stages_of(name)._replace(waits=waits))
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16, heads=8, kv_heads=2)
    specs = load("grid").specs(0, range(8))
    rows = media_group(problem).probe_rows.rows
    exact = problem.dense(torch.float32)

    def run(ceiling: float) -> tuple[prefill.LayerReport, torch.Tensor]:
        config = Config(coverage=0.3, max_density=0.1, error_ceiling=ceiling)
        out = torch.full_like(problem.query, torch.nan)
        (report,) = prefill.run_layer(problem.operands, problem.plan, specs, config, out, "torch")
        return report, out

    free, loose = run(100.0)
    error = (loose - exact)[rows].square().sum((0, 2))
    energy = exact[rows].square().sum()
    assert int(free.guarded) == 0
    assert float(free.error) == pytest.approx(float((error.sum() / energy).sqrt()), rel=1e-3)

    ceiling = 0.5 * float(free.error)
    report, out = run(ceiling)
    after = (out - exact)[rows].square().sum((0, 2))
    guarded = after < 1e-3 * error
    assert int(report.guarded) == int(guarded.sum())
    assert 0 < int(guarded.sum()) < 8
    assert float((after.sum() / energy).sqrt()) <= ceiling
    assert float(report.error) == pytest.approx(float((after.sum() / energy).sqrt()), rel=1e-3)
    assert error[guarded].min() >= error[~guarded].max(), "the worst heads go first"
    one_less = after.sum() + error[guarded].min()
    assert float((one_less / energy).sqrt()) > ceiling, "no head goes dense without need"
    torch.testing.assert_close(out[:, guarded], exact[:, guarded], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[:, ~guarded], loose[:, ~guarded], atol=1e-5, rtol=1e-5)
    assert int(report.tiles) > int(free.tiles)
    assert int(run(0.0)[0].guarded) == 8


def test_a_head_keeps_its_pattern_unless_another_one_is_clearly_cheaper() -> None:
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16)
    view = media_group(problem).view
    limits = choices.Limits(0.9, 1.0, 4.0)

    def of(*tiles: int) -> choices.Choice:
        near = torch.zeros(len(tiles), 1, 1000, dtype=torch.bool)
        for head, count in enumerate(tiles):
            near[head, 0, :count] = True
        whole = choices.dense(view, len(tiles))
        return choices.Choice(near, None, whole.sink, whole.reach, whole.coverage, whole.missing, torch.tensor(tiles))

    made = [of(100, 100, 100), of(99, 95, 80)]
    assert choices.cheapest(view, made, limits)[1].tolist() == [1, 1, 1]
    assert choices.cheapest(view, made, limits, torch.tensor([0, 0, 0]))[1].tolist() == [0, 0, 1]
    assert choices.cheapest(view, made, limits, torch.tensor([1, 1, 1]))[1].tolist() == [1, 1, 1]


def test_picks_are_carried_to_the_next_chunk_of_the_same_layer_and_request(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16)
    layout = problem.plan.requests[0].layout
    specs = load("auto").specs(0, range(4))

    def run(layer: int | None) -> torch.Tensor:
        out = torch.empty_like(problem.query)
        prefill.run_layer(problem.operands, problem.plan, specs, Config(), out, "torch", layer)
        return out

    def carried(layer: int | None) -> torch.Tensor:
        return layout.carried_picks(layer, "media", 4, problem.query.device)

    free = run(None)
    assert carried(None).tolist() == [-1] * 4
    assert carried(3).tolist() == [-1] * 4
    # As keys grow in number, fewer heads are probed at a time.
    monkeypatch.setattr(prefill, "PROBE_BYTES_CPU", 1)
    run(3)
    picked = carried(3).clone()
    assert (picked >= 0).all()
    monkeypatch.undo()
    torch.testing.assert_close(run(3), free)
    assert torch.equal(carried(3), picked)
    assert carried(5).tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("bound", "value"), [("PROBE_BYTES_CPU", 1), ("PROBE_BYTES_CPU", 1 << 16), ("MAP_TILES", 1), ("MAP_TILES", 5000)]
)
@pytest.mark.parametrize("first", ["auto", "dense"])
def test_blocks_of_heads_do_not_change_the_answer(
    first: str, bound: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the first half of the heads is as the others, or never probed where it is alone."""
    problem = problems.make(heads=8, kv_heads=2, tile_queries=64)
    specs = [HeadSpec(media_text=pattern, media_media=pattern) for pattern in [first] * 4 + ["auto"] * 4]
    config = Config(coverage=0.7, max_density=0.3, error_ceiling=0.9)

    def output() -> torch.Tensor:
        out = torch.empty_like(problem.query)
        prefill.run_layer(problem.operands, problem.plan, specs, config, out, "torch")
        return out

    whole = output()
    monkeypatch.setattr(prefill, bound, value)
    torch.testing.assert_close(output(), whole, atol=1e-5, rtol=1e-5)
