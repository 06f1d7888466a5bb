"""Selection: what is chosen holds what the patterns promise, and the reported coverage is true."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import problems
from mminference_sgl.kernels import choice as choices
from mminference_sgl.kernels import probe, reference, search, select
from mminference_sgl.kernels.levels import Curves
from mminference_sgl.kernels.sketch import HELD, signs
from mminference_sgl.kernels.stages import stages_of
from mminference_sgl.kernels.tiles import Region, element_mask
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec, load
from mminference_sgl.method.config import AShapeBudget, Config, GridBudget, PatternBudgets

PATTERNS = ("auto", "grid", "vertical_slash", "a_shape")
VIDEO = problems.Request(5 + 24 * 48 + 9, [problems.one_span_video(5, 24, 6, 8)], 0, 5 + 24 * 48 + 9)
LONG_VIDEO = problems.Request(5 + 48 * 96, [problems.one_span_video(5, 48, 8, 12)], 0, 5 + 48 * 96)
TIMESTAMPS = problems.Request(1400, [problems.timestamped_video(4, 20, 6, 8)], 500, 640)


def probed(problem: problems.Problem, group) -> probe.WeightProbe:
    return probe.run(problem.operands, group.keys, group.probe_rows)


def choose(problem: problems.Problem, group, pattern: str, config: Config) -> choices.Choice:
    rows, pairs = probed(problem, group), [(pattern, pattern)] * problem.query.shape[1]
    budget = prefill.budget_of(rows.output, config.bound(group.modality), config)
    blocks = [prefill.propose(select.Selection(group.view, rows, budget), config, pairs)]
    nothing = torch.full((len(pairs),), -1)
    return choices.decide([prefill.Want.of(group.view, pairs).offer(blocks)], budget, nothing)[0]


def loose(error: float, **settings) -> Config:
    """A configuration that allows the same error to text and media rows, and whose guard never acts."""
    return Config(error=error, text_error=error, error_ceiling=100.0, **settings)


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
def test_reported_coverage_and_error_are_those_of_attention(request_: problems.Request, pattern: str) -> None:
    """The LSE of the sparse and the dense softmax differ by exactly the log of the kept mass.

    Errors are estimated by random projections: exact on average, so within a third over these rows.
    """
    problem = problems.make([request_], tile_queries=32, tile_keys=16, heads=4, head_dim=64)
    group = media_group(problem)
    narrow = PatternBudgets(a_shape=AShapeBudget(sink=16, window=48))
    choice = choose(problem, group, pattern, loose(0.6, patterns=narrow))
    parts = []
    for tile_pass, tiles, selected in (
        (problem.plan.near, group.near, choice.near),
        (problem.plan.far, group.far, choice.far),
    ):
        lists = prefill._PassLists(tile_pass, 4)
        lists.put(tiles, selected, choice)
        whole = torch.zeros_like(problem.query), torch.full(problem.query.shape[:2], -torch.inf)
        reference.attend(problem.operands, *lists.lists(), *whole, merge=False)
        parts.append([x[group.probe_rows.rows] for x in whole])
    (near_out, near_lse), (far_out, far_lse) = parts
    lse = torch.logaddexp(near_lse, far_lse)
    out = sum(x * (part - lse).exp()[..., None] for x, part in ((near_out, near_lse), (far_out, far_lse)))
    scores = torch.einsum("phd,hkd->phk", problem.query[group.probe_rows.rows], _keys(problem)) * problem.scale
    future = torch.arange(scores.shape[-1]) > group.probe_rows.positions[:, None, None]
    dense_lse = scores.masked_fill(future, -torch.inf).logsumexp(-1)
    truth = (lse - dense_lse).exp().mean(0)
    torch.testing.assert_close(choice.coverage, truth, atol=1e-5, rtol=1e-4)
    error = (out - problem.dense(torch.float32)[group.probe_rows.rows]).square().sum(2).mean(0)
    assert (error > 1e-3).any(), "something must have been left out"
    torch.testing.assert_close(choice.error.sum(), error.sum(), atol=1e-5, rtol=0.33)


def _keys(problem: problems.Problem) -> torch.Tensor:
    request = problem.requests[0]
    keys = problem.key_pool[problem.req_to_token[0, : request.prefix + request.chunk].long()]
    return keys.repeat_interleave(problem.query.shape[1] // keys.shape[1], 1).transpose(0, 1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("error", [0.0, 0.1, 1.0])
def test_no_tile_is_wholly_in_the_future_and_every_near_key_is_listed(pattern: str, error: float) -> None:
    problem = problems.make(tile_queries=32, tile_keys=16)
    config = loose(error)
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
    config = loose(100.0, patterns=budget)
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
    config = loose(0.3, patterns=PatternBudgets(grid=GridBudget(sink=16)))
    rows = probed(problem, group)
    truth = (rows.weights[..., : key.numel()] * same_place[group.probe_rows.rows]).sum(-1).mean()
    assert truth > 0.85, "the plant must take"
    coverage = choose(problem, group, "grid", config).coverage
    assert (coverage >= truth - 0.1).all()
    auto = choose(problem, group, "auto", config)
    assert (auto.far.sum((1, 2)) > 0).all(), "auto must take the cell pass"
    assert (auto.tiles < 0.35 * group.view.causal_tiles).all()


def test_vertical_slash_finds_columns_and_diagonals() -> None:
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16, head_dim=128)
    query, key = distances(VIDEO)
    lines = ((key >= 300) & (key < 306)) | (query - key == 200)
    plant(problem, lines & (key <= query))
    group = media_group(problem)
    rows = probed(problem, group)
    truth = (rows.weights[..., : key.numel()] * (lines & (key <= query))[group.probe_rows.rows]).sum(-1).mean()
    choice = choose(problem, group, "vertical_slash", loose(0.3))
    assert truth > 0.85, "the plant must take; the first rows have nothing to look at yet"
    assert (choice.coverage >= 0.85).all()
    assert choice.tiles.sum() < 0.5 * group.view.causal_tiles * len(choice.tiles)


@pytest.mark.parametrize("error", [0.1, 1e-4])
@pytest.mark.parametrize("pattern", ["grid", "vertical_slash"])
def test_density_stays_within_the_budget(pattern: str, error: float) -> None:
    """Diffuse attention needs every tile; the budget bounds what is spent beyond the fixed part, whatever is lost."""
    problem = problems.make([VIDEO], tile_queries=16, tile_keys=16)
    problem.query.mul_(0.3)
    group = media_group(problem)
    causal = group.view.causal_tiles
    fixed = choose(problem, group, pattern, loose(100.0)).tiles
    assert (fixed < 0.5 * causal).all()
    spent = [choose(problem, group, pattern, loose(error, max_density=budget)) for budget in (0.1, 0.5, 0.8, 1.0)]
    for choice, budget in zip(spent, (0.1, 0.5, 0.8, 1.0), strict=True):
        assert choice.tiles.sum() <= max(fixed.sum(), budget * causal * len(fixed))
        assert (choice.tiles >= fixed).all()
    assert spent[-1].tiles.sum() > 0.9 * causal * len(fixed), "every tile is needed"
    assert all(more.error.sum() <= less.error.sum() for less, more in itertools.pairwise(spent))


def cells(problem: problems.Problem) -> torch.Tensor:
    """Cell of each token, int64 [length]: 0 for text, then from 1."""
    layout = problem.plan.requests[0].layout.layout
    inverse, runs = (torch.from_numpy(array.copy()) for array in (layout.inverse("cell"), layout.runs("cell")))
    return torch.searchsorted(runs, inverse, right=True) - 1


def test_h_lines_read_everything() -> None:
    """Rows of some cells look anywhere, the others at their own place: only the former's query tiles read it all."""
    problem = problems.make([LONG_VIDEO], tile_queries=32, tile_keys=16, head_dim=256, cell_size=4)
    query, key = distances(LONG_VIDEO)
    anywhere = torch.isin(cells(problem), torch.tensor([1, 7]))
    same_place = ((query - key) % 96 == 0) & (key >= 5) & (key <= query)
    generator = torch.Generator().manual_seed(5)
    some_key = key == (torch.rand(query.shape, generator=generator) * query).long()
    plant(problem, torch.where(anywhere[:, None], some_key, same_place))
    group = media_group(problem)
    choice = choose(problem, group, "grid", loose(0.03))
    cell, far = group.view.cell, problem.plan.far
    visible = cell.tiles(int(choice.sink[0]), int(choice.reach[0])).visible.sum(1)
    slots = [slice(*far.indptr[tile : tile + 2].tolist()) for tile in range(group.far.start, group.far.stop)]
    h_line = torch.tensor([bool(anywhere[far.positions[slot].long()].all()) for slot in slots])
    read = choice.far.sum(-1) / visible.clamp_min(1)
    assert 0 < int(h_line.sum()) < 0.2 * h_line.numel()
    others = ~h_line & (visible > 40)
    assert (read[:, h_line] > 0.8).float().mean() > 0.4, "heads share a budget, and some get on without"
    assert read[:, h_line].mean() > 4 * read[:, others].mean()


def test_what_a_band_would_lose_counts_for_the_bands_beside_it() -> None:
    problem = problems.make([LONG_VIDEO], tile_queries=32, tile_keys=16, head_dim=128, cell_size=4)
    group = media_group(problem)
    cell = group.view.cell
    assert cell is not None
    tiles = cell.tiles(4, 1)
    assert cell.num_bands > 8
    rows = (cell.band_of_row == 4).nonzero()[:, 0]
    held = torch.zeros(HELD, 1, len(group.probe_rows.rows), tiles.visible.shape[1])
    # As much in every tile that is not read anyhow: no line stands out, but all of them together.
    held[:2, 0, rows] = 0.5 / tiles.visible.shape[1] * ~cell.own_at_rows[rows]
    size = torch.ones(held.shape[1:3])
    row_of = torch.arange(held.shape[2])[None]
    levels = search.lines(held, size, row_of, cell, tiles, group.view.causal_tiles, torch.ones(1), min_lines=0)
    near, loose_tiles = (cell.bands - 4).abs() <= 1, tiles.visible & ~cell.own
    assert levels[0][loose_tiles & near[:, None]].min() > levels[0][loose_tiles & ~near[:, None]].max()


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
    choice = choose(problem, group, "grid", loose(0.4))
    assert own < 0.2, "the plant must take"
    assert (choice.coverage >= 0.7).all()
    assert (choice.tiles < 0.5 * group.view.causal_tiles).all()


def test_curves_are_what_is_lost_below_each_threshold() -> None:
    """Deviations add up with their signs, over the mass that is left; rows count alike."""
    held = torch.zeros(HELD, 1, 2, 4)
    held[0, 0] = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    held[1, 0] = torch.tensor([[1.0, -1.0, 2.0, -2.0], [0.5, 0.5, 0.5, -1.5]])
    levels = torch.tensor([[[10, 20, 30, search.ALWAYS]]], dtype=torch.int8)
    found = search.curves(held, torch.ones(1, 2), levels, torch.tensor([[0, 0]]))
    for threshold, lost in ((0, 0), (10, 0), (11, 1), (20, 1), (21, 2), (30, 2), (31, 3), (63, 3)):
        kept = 1 - held[0, 0, :, :lost].sum(1)
        moved = held[1, 0, :, :lost].sum(1) / kept
        assert float(found.error[0, threshold]) == pytest.approx(float(moved.square().mean()), rel=2e-3)
        assert float(found.coverage[0, threshold]) == pytest.approx(float(kept.mean()), abs=1e-6)
        assert int(found.tiles[0, threshold]) == 4 - lost


def test_a_row_that_reads_one_tile_loses_all_without_it() -> None:
    """Its deviation is nothing, since its output is what the tile holds."""
    held = torch.zeros(HELD, 1, 1, 2)
    held[0] = torch.tensor([1.0, 0.0])
    loss = search._loss(held, torch.full((1, 1), 7.0))
    torch.testing.assert_close(loss, torch.tensor([[[7.0, 0.0]]]))


def test_levels_are_energies_per_tile() -> None:
    """Twice the energy is three levels, twice the tiles three less; what would cost all that is allowed is fair."""
    energy, cost = torch.tensor([[1.0, 2.0, 4.0, 4.0, 0.0]]), torch.tensor([10, 10, 10, 20, 10])
    levels = search._levels(energy, cost, torch.tensor(10), torch.ones(1))
    assert levels.tolist() == [[search.FAIR, search.FAIR + 3, search.FAIR + 6, search.FAIR + 3, -1]]
    assert search._levels(energy, cost, torch.tensor(10), torch.full((1,), 4.0))[0, 2] == search.FAIR


def test_projections_keep_lengths() -> None:
    """On average over directions, and any one by no more than so many projections can tell."""
    vectors = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    lengths = (vectors @ signs(64, torch.device("cpu"))).square().sum(1) / vectors.square().sum(1)
    assert float(lengths.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(lengths.std()) == pytest.approx((2 / probe.SKETCH) ** 0.5, rel=0.2)


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


def proposal(view: choices.View, points: list[tuple[int, float]], *, searched: bool = True) -> choices.Proposal:
    """Of one head for which each threshold up to ALWAYS has (tiles, error); the last point holds for all above."""
    points = points + points[-1:] * (search.LEVELS + 1 - len(points))
    tiles, error = (torch.tensor([values]) for values in zip(*points, strict=True))
    near = torch.zeros(1, *view.near_tiles(0, 1).shape, dtype=torch.int8)
    return choices.Proposal(
        choices.Levels(near, None, 0, 1 << 30), Curves(error, torch.ones_like(error), tiles), searched
    )


def decide(view, proposals, wanted, energy, bound, previous=None, **limits):
    """The pick, tiles and error of each head; ``proposals`` by pattern, one for each head."""
    heads = len(energy)
    joined = [
        choices.concatenate([replace(each, levels=first.levels) for each in (first, *rest)])
        for first, *rest in proposals
    ]
    joined = [replace(each, levels=replace(each.levels, near=each.levels.near)) for each in joined]
    carried = torch.full((heads,), -1) if previous is None else torch.tensor(previous)
    budget = choices.Budget(torch.tensor(energy), bound, **limits)
    choice, pick = choices.decide([choices.Offer(view, joined, torch.tensor(wanted))], budget, carried)
    return pick.tolist(), choice.tiles.tolist(), choice.error.tolist()


@pytest.fixture
def view() -> choices.View:
    return media_group(problems.make([VIDEO], tile_queries=32, tile_keys=16)).view


def test_the_heads_of_a_layer_share_its_budget(view: choices.View) -> None:
    """Tiles go where they help the layer's output most: a head of little output may lose all that it has."""
    causal = int(view.causal_tiles)
    steep = [(causal // 2, 0.0), (causal // 4, 0.001), (causal // 8, 0.8)]
    small = [(causal // 2, 0.0), (causal // 4, 0.0001), (causal // 8, 0.005)]
    proposals = [[proposal(view, steep), proposal(view, small)]]
    everyone = [[True, True]]
    pick, tiles, error = decide(view, proposals, everyone, [1.0, 0.01], 0.1)
    assert pick == [0, 0]
    assert tiles == [causal // 4, causal // 8]
    assert sum(error) <= 0.1**2 * 1.01
    tight = decide(view, proposals, everyone, [1.0, 0.01], 0.005)
    assert tight[1] == [causal // 2, causal // 2]
    assert decide(view, proposals, everyone, [1.0, 0.01], 10.0)[1] == [causal // 8] * 2


def test_heads_that_need_nearly_all_tiles_run_dense(view: choices.View) -> None:
    causal = int(view.causal_tiles)
    diffuse = proposal(view, [(causal + 5, 0.0), (causal // 2, 5.0)])
    pick, tiles, error = decide(view, [[diffuse]], [[True]], [1.0], 0.1)
    assert (pick, tiles, error) == ([-1], [causal], [0.0])
    pick, tiles, _ = decide(view, [[diffuse]], [[True]], [1.0], 0.1, max_density=0.6)
    assert (pick, tiles) == ([0], [causal // 2]), "unless that is more than may be spent"


def test_what_is_not_searched_neither_draws_on_the_budget_nor_adds_to_it(view: choices.View) -> None:
    causal = int(view.causal_tiles)
    window, free = proposal(view, [(9, 0.9)], searched=False), proposal(view, [(causal // 2, 0.0), (causal // 4, 0.02)])
    wanted = [[True, False], [False, True]]
    pick, tiles, _ = decide(view, [[window] * 2, [free] * 2], wanted, [1.0, 1.0], 0.1)
    assert (pick, tiles) == ([0, 1], [9, causal // 2])


@pytest.mark.parametrize("waits", [True, False], ids=["asked", "empty lists"])
def test_guard_bounds_the_error_with_the_fewest_heads(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of what was computed; heads over the ceiling are computed again, and equal dense attention."""
    monkeypatch.setattr(prefill, "stages_of", lambda name: stages_of(name)._replace(waits=waits))
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16, heads=8, kv_heads=2)
    specs = load("grid").specs(0, range(8))
    rows = media_group(problem).probe_rows.rows
    exact = problem.dense(torch.float32)

    def run(ceiling: float) -> tuple[prefill.LayerReport, torch.Tensor]:
        config = Config(error=1.0, text_error=1.0, error_ceiling=ceiling)
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


def test_a_head_keeps_its_pattern_unless_another_one_is_clearly_cheaper(view: choices.View) -> None:
    def flat(tiles: int) -> choices.Proposal:
        return proposal(view, [(tiles, 0.0)])

    made, wanted = [[flat(100)] * 3, [flat(99), flat(95), flat(80)]], [[True] * 3] * 2
    assert decide(view, made, wanted, [1.0] * 3, 0.1)[0] == [1, 1, 1]
    assert decide(view, made, wanted, [1.0] * 3, 0.1, [0, 0, 0])[0] == [0, 0, 1]
    assert decide(view, made, wanted, [1.0] * 3, 0.1, [1, 1, 1])[0] == [1, 1, 1]


def test_picks_are_carried_to_the_next_chunk_of_the_same_layer_and_request(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make([VIDEO], tile_queries=32, tile_keys=16)
    layout = problem.plan.requests[0].layout
    specs = load("auto").specs(0, range(4))

    def run(layer: int | None) -> torch.Tensor:
        out = torch.empty_like(problem.query)
        prefill.run_layer(problem.operands, problem.plan, specs, loose(1.0), out, "torch", layer)
        return out

    def carried(layer: int) -> torch.Tensor:
        return layout.carried_picks("media", 4)[layer]

    free = run(None)
    assert (layout.carried_picks("media", 4) == -1).all(), "a layer without an id carries nothing"
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
    """Whether the first half of the heads is as the others, or never probed where it is alone.

    Blocks whose maps are made one after another have a budget each: there the answer differs, and keeps within it.
    """
    problem = problems.make(heads=8, kv_heads=2, tile_queries=64)
    specs = [HeadSpec(media_text=pattern, media_media=pattern) for pattern in [first] * 4 + ["auto"] * 4]
    config = Config(error=0.5, error_ceiling=0.55)

    def output() -> tuple[torch.Tensor, list[prefill.LayerReport]]:
        out = torch.empty_like(problem.query)
        return out, prefill.run_layer(problem.operands, problem.plan, specs, config, out, "torch")

    whole, reports = output()
    assert any(report.error > 0.1 for report in reports), "something must have been left out"
    monkeypatch.setattr(prefill, bound, value)
    parts, reports = output()
    if bound == "PROBE_BYTES_CPU":
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert all(report.error <= 0.55 for report in reports)
