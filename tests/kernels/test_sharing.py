"""Heads of a KV group that share lists: when they do, what it saves, and that the output is what the lists say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

import problems
from benchmarks.method.cases import PLANTS
from benchmarks.method.forward import forward
from benchmarks.method.planted import GEOMETRIES, one_video, plant
from mminference_sgl.kernels import choice, ops, search, select
from mminference_sgl.kernels.choice import Offer
from mminference_sgl.kernels.probe import run as probe
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from test_attention import random_lists

LOOSE = Config(error=1.0, text_error=1.0, error_ceiling=100.0)
AUTO = HeadSpec()
GRID = HeadSpec("dense", "dense", "grid", "grid")
SLASH = HeadSpec("dense", "dense", "vertical_slash", "vertical_slash")


def problem(group: int, **given) -> problems.Problem:
    sizes = {"heads": 2 * group, "kv_heads": 2, "head_dim": 16, "tile_queries": 64, "tile_keys": 16}
    return problems.make(sharing=(group,), **sizes | given)


def run(made: problems.Problem, specs: Sequence[HeadSpec], config: Config, implementation: str = "torch"):
    out = torch.full_like(made.query, torch.nan)
    return out, prefill.run_layer(made.operands, made.plan, specs, config, out, implementation)


@pytest.mark.parametrize("group", [2, 3, 7])
@pytest.mark.parametrize("spec", [AUTO, GRID, SLASH], ids=["auto", "grid", "vertical_slash"])
def test_error_zero_is_dense_attention(group: int, spec: HeadSpec) -> None:
    made = problem(group)
    exact = dataclasses.replace(LOOSE, error=0.0, text_error=0.0)
    for implementation in ("torch", "reference"):
        out, reports = run(made, [spec] * 2 * group, exact, implementation)
        torch.testing.assert_close(out, made.dense(torch.float32), atol=2e-5, rtol=1e-4)
        assert all(float(report.coverage) == pytest.approx(1.0, abs=1e-5) for report in reports)


@pytest.mark.parametrize("group", [2, 7])
def test_implementations_compute_what_was_selected(group: int) -> None:
    made = problem(group)
    specs = [AUTO] * 2 * group
    (out, reports), (other, _) = (run(made, specs, LOOSE, name) for name in ("torch", "reference"))
    torch.testing.assert_close(out, other, atol=2e-5, rtol=1e-4)
    passes, _ = prefill.select_layer(made.operands, made.plan, specs, LOOSE)
    shared = sum(int(lists.count.sum()) for tile_pass, lists in passes if tile_pass.sharing > 1)
    assert shared, "some lists are shared"
    counted = sum(int(lists.count.sum()) for _, lists in passes)
    assert sum(float(report.tiles) for report in reports) == pytest.approx(counted, rel=1e-5)


def test_no_head_reads_twice_and_every_row_is_computed() -> None:
    """Each row and head has its lists in one tiling, whatever its group chose."""
    group = 4
    made = problem(group)
    specs = [AUTO] * group + [GRID, SLASH] * (group // 2)
    passes, _ = prefill.select_layer(made.operands, made.plan, specs, LOOSE)
    used = torch.zeros(2, len(made.query), 2 * group, dtype=torch.bool)
    for tile_pass, lists in passes:
        counts = lists.count.view(-1, tile_pass.num_tiles).repeat_interleave(tile_pass.sharing, dim=0)
        tile = torch.repeat_interleave(tile_pass.indptr.diff())
        used[int(tile_pass.sharing > 1), tile_pass.rows] |= (counts[:, tile] > 0).T
    assert (used.sum(0) == 1).all()
    assert not used[1, :, group:].any(), "heads of other patterns have lists of their own"
    assert used[1, :, :group].any()


def test_reports_are_those_of_attention() -> None:
    """The mass that is kept, from the LSE of what was computed, by head; shared lists keep what any head wanted."""
    group = 3
    made = problem(group, requests=problems.MIXED[:1])
    specs = [GRID] * 2 * group
    passes, (report,) = prefill.select_layer(made.operands, made.plan, specs, LOOSE)
    assert any(tile_pass.sharing > 1 and lists.count.any() for tile_pass, lists in passes)
    lse = ops.sparse_prefill(made.operands, passes, torch.empty_like(made.query), "reference")
    every, _ = prefill.select_layer(made.operands, made.plan, [HeadSpec(*["dense"] * 4)] * 2 * group, LOOSE)
    dense = ops.sparse_prefill(made.operands, every, torch.empty_like(made.query), "reference")
    kept = (lse - dense).exp()
    found = [float(kept[one.probe_rows.rows].mean()) for one in made.plan.groups]
    assert float(report.coverage) == pytest.approx(min(found), abs=1e-5)


def planted(names: Sequence[str], kv_heads: int = 1, *, sharing: bool):
    scene = one_video(GEOMETRIES["qwen2.5"], 8192)
    made = plant(scene, [PLANTS[name] for name in names], heads=len(names), kv_heads=kv_heads)
    config = Config(error_ceiling=1e9, tile_queries=64, sharing=sharing)
    return forward(made, 6144, scene.length, config, torch.arange(scene.length).numpy(), chunk=2048), config


@pytest.mark.parametrize("group", [2, 4, 7])
def test_heads_that_look_alike_share_and_compute_less(group: int) -> None:
    density = {}
    for sharing in (True, False):
        one, config = planted(["lines"] * group, sharing=sharing)
        out = torch.empty_like(one.operands.query)
        (report,) = prefill.run_layer(one.operands, one.plan, [AUTO] * group, config, out, "torch")
        density[sharing] = float(report.tiles / report.causal)
        assert float(report.error) <= config.error
    assert density[True] < 0.8 * density[False]


def test_heads_that_have_nothing_in_common_do_not_share() -> None:
    names = ("lines", "vertical-slash", "a-shape", "diffuse")
    one, config = planted(names * 2, kv_heads=2, sharing=True)
    passes, _ = prefill.select_layer(one.operands, one.plan, [AUTO] * 8, config)
    assert any(lists.count.any() for tile_pass, lists in passes if tile_pass.sharing == 1)
    assert not any(lists.count.any() for tile_pass, lists in passes if tile_pass.sharing > 1)
    # A group beside them that is alike does.
    one, config = planted((*names, *["lines"] * 4), kv_heads=2, sharing=True)
    passes, _ = prefill.select_layer(one.operands, one.plan, [AUTO] * 8, config)
    for tile_pass, lists in passes:
        counts = lists.count.view(-1, tile_pass.num_tiles).sum(1)
        if tile_pass.sharing > 1:
            assert counts[0] == 0 < counts[1]


def test_levels_of_a_shared_list_are_the_highest_of_its_heads() -> None:
    """Searched by list, from candidates, or head by head in the same query tiles: the same."""
    made = problem(4, requests=problems.MIXED[:1])
    ours, plan = made.plan.shared[0], made.plan
    for group, tiles in zip(plan.groups, ours.groups, strict=True):
        rows = probe(made.operands, group.keys, group.probe_rows)
        budget = prefill.budget_of(rows.output, 1.0, LOOSE)
        lists = select.Selection(tiles.view, rows, budget)
        heads = lists.of(dataclasses.replace(tiles.view, sharing=1))
        slash, window = select.Slash(16, 16), select.Near(16, 32)
        found = [[one.levels(select.Form("", slash, slash, 0, 1 << 30)).near] for one in (lists, heads)]
        if tiles.view.cell is not None:
            grid = select.Form("", window, window, *window, select.Far("grid", 0, exact=False))
            for kept, one in zip(found, (lists, heads), strict=True):
                kept.append(one.levels(grid).far)
        for by_list, by_head in zip(*found, strict=True):
            assert torch.equal(by_list, by_head.unflatten(0, (-1, 4)).amax(1))


def proposal(view: choice.View, heads: int, tiles: int, error: float) -> choice.Proposal:
    """One that has the same at every threshold."""
    lists, shape = heads // view.sharing, (search.LEVELS + 1,)
    near = torch.zeros(1, *view.near_tiles(0, 1).shape, dtype=torch.int8)
    curves = select.Curves(
        torch.full((heads, *shape), error), torch.ones(heads, *shape), torch.full((lists, *shape), tiles)
    )
    return choice.Proposal(choice.Levels(near, None, 0, 1 << 30), curves, searched=True)


@pytest.mark.parametrize(
    ("own", "shared", "wins"),
    [((40, 0.0), (70, 0.0), True), ((40, 0.0), (90, 0.0), False), ((40, 0.0), (70, 0.5), False)],
    ids=["fewer tiles", "more tiles", "more error"],
)
def test_a_group_takes_what_costs_less(own: tuple[int, float], shared: tuple[int, float], wins: bool) -> None:
    """``own``, ``shared``: tiles of a list and error of a head; two heads share."""
    made = problem(2, requests=problems.MIXED[:1])
    single, both = made.plan.groups[-1].view, made.plan.shared[0].groups[-1].view
    offers = [
        Offer(single, [proposal(single, 4, *own)], torch.ones(1, 4, dtype=torch.bool)),
        Offer(both, [proposal(both, 4, *shared)], torch.tensor([[True, False]])),
    ]
    found, pick = choice.decide(offers, choice.Budget(torch.ones(4), 0.1), torch.full((4,), -1))
    assert pick.tolist() == ([1, 1, 0, 0] if wins else [0] * 4)
    assert found.tiles.tolist() == ([shared[0] / 2] * 2 if wins else [own[0]] * 2) + [own[0]] * 2
    assert not found.shared[0].near[1].any(), "a list that may not be shared is empty"


def test_other_groups_are_refused() -> None:
    made = problem(3)
    (tiling,) = made.plan.shared
    lists = random_lists(made, tiling.near, 0)
    operands = dataclasses.replace(made.operands, query=made.query[:, :4])
    with pytest.raises(ValueError, match="3 heads of 4 share a list, but 4 query heads on 2 KV heads do not divide"):
        ops.sparse_prefill(operands, [(tiling.near, lists)], torch.empty_like(operands.query), "torch")


def test_layers_of_other_groups_keep_to_themselves() -> None:
    """A plan is for all layers; a layer whose groups do not divide has lists of single heads."""
    made = problem(3)
    wide = torch.cat([made.query, made.query[:, :2]], dim=1)
    operands = dataclasses.replace(made.operands, query=wide)
    out = torch.full_like(wide, torch.nan)
    prefill.run_layer(operands, made.plan, [AUTO] * 8, LOOSE, out, "torch")
    passes, _ = prefill.select_layer(operands, made.plan, [AUTO] * 8, LOOSE)
    assert all(tile_pass.sharing == 1 for tile_pass, _ in passes)
    want = torch.full_like(wide, torch.nan)
    ops.sparse_prefill(operands, passes, want, "reference")
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-4)
