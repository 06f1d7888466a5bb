"""The planted attention of benchmarks/method: its maps, masses and needed tiles by brute force, and a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.method import __main__ as command
from benchmarks.method import cases, forward, losses, measure, planted, verdicts
from benchmarks.method.truth import dense_truth, kinds_of, measured_chunks
from mminference_sgl import _core
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config

GEOMETRIES = planted.GEOMETRIES
CONFIG = Config(tile_queries=32, tile_keys=16, probe_rows=16)
DENSE = HeadSpec("dense", "dense", "dense", "dense")


def scene_of(plant: str, geometry: str = "qwen3", length: int = 1500):
    make = planted.interleaved if plant in cases.BOUNDARIES else planted.one_video
    return make(GEOMETRIES[geometry], length)


def problem_of(plant: str, geometry: str = "qwen3", length: int = 1500, heads: int = 1, kv_heads: int = 1):
    scene = scene_of(plant, geometry, length)
    return planted.plant(scene, [cases.PLANTS[plant]], heads=heads, kv_heads=kv_heads, seed=1)


def dense_weights(problem, head: int = 0) -> torch.Tensor:
    """Softmax weights of all rows in fp64, [length, length]."""
    kv_head = head * problem.key.shape[1] // problem.query.shape[1]
    scores = problem.query[:, head].double() @ problem.key[:, kv_head].double().T * problem.scale
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_codes_are_unit_vectors_far_from_one_another() -> None:
    table = planted.codes()
    products = table @ table.T
    assert np.diag(products) == pytest.approx(1, abs=1e-5)
    assert np.abs(products - np.eye(len(table))).max() <= 29**-0.5 + 1e-5


def test_more_places_than_codes_are_refused() -> None:
    large = planted.make_scene([10, (planted.Geometry("large", 30, 30), 1), 10])
    with pytest.raises(ValueError, match="900 places or blocks, there are 841 codes"):
        planted.plant(large, [cases.PLANTS["slash"]], heads=1, kv_heads=1)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("plant", ["lines", "2d-boundary"])
def test_the_layout_agrees_with_the_scene(geometry: str, plant: str) -> None:
    scene = scene_of(plant, geometry, 2011)
    layout = _core.Layout(scene.length, scene.items, chunk_tokens=0, tile_queries=128)
    kinds = layout.kinds()
    assert ((kinds == 1) == scene.media).all()
    assert ((kinds == 0) == scene.deciding).all()
    for index, (_, spans, (frames, rows, cols)) in enumerate(scene.items):
        tokens = np.concatenate([np.arange(start, end + 1) for start, end in spans])
        assert (scene.place[tokens] == np.tile(np.arange(rows * cols), frames)).all()
        assert (scene.item[tokens] == index).all()
        assert (scene.cols[tokens] == cols).all()


def test_timestamps_make_the_distance_between_frames_vary() -> None:
    scene = scene_of("lines", "qwen3", 160 * 30)
    starts = np.flatnonzero(scene.place == 0)
    assert set(np.diff(starts).tolist()) == {165, 166}


def test_slash_relates_the_same_place_of_one_item() -> None:
    problem = problem_of("k-boundary", "llava-video", 1200)
    scene = problem.scene
    (slash,) = [r for r in problem.heads[0].relations if r.name == "slash" and (r.rows >= 0).any()]
    # The sink tokens are text here, so every media token keeps its place.
    same = (scene.place[:, None] == scene.place) & (scene.item[:, None] == scene.item)
    wanted = np.tril(same & scene.media[:, None] & scene.media)
    found = slash.pairs(np.arange(scene.length), scene.length)
    assert (found == wanted).all()
    assert (slash.counts() == wanted.sum(1)).all()


def test_a_patch_is_two_by_two_places() -> None:
    problem = problem_of("patch", "longvila", 700)
    scene = problem.scene
    (slash,) = [r for r in problem.heads[0].relations if r.name == "slash" and (r.rows >= 0).any()]
    row, col = scene.place // 16 // 2, scene.place % 16 // 2
    wanted = np.tril((row[:, None] == row) & (col[:, None] == col) & scene.media[:, None] & scene.media)
    assert (slash.pairs(np.arange(scene.length), scene.length) == wanted).all()


def test_hline_rows_read_every_key_alike() -> None:
    problem = problem_of("hlines", "qwen2.5")
    weights = dense_weights(problem)
    row = int(np.flatnonzero(problem.hline)[-1])
    assert problem.heads[0].planted(np.array([row]), row + 1).all()
    assert 0.04 < problem.hline.mean() < 0.08
    top = weights[row].topk((row + 1) // 10).values.sum()
    assert top < 0.3, "the top tenth of the keys holds little more than a tenth"


@pytest.mark.parametrize("plant", [name for name in cases.PLANTS if name != "diffuse"])
def test_the_planted_map_holds_the_mass(plant: str) -> None:
    problem = problem_of(plant, heads=2)
    for head, one in enumerate(problem.heads):
        mask = one.planted(np.arange(problem.scene.length), problem.scene.length)
        assert not np.triu(mask, 1).any()
        mass = (dense_weights(problem, head) * torch.from_numpy(mask)).sum(-1)
        assert 0.97 < float(mass.mean()) < 0.995
        assert float(mass.min()) > 0.8


@pytest.mark.parametrize("plant", ["lines", "vertical-slash", "2d-boundary"])
def test_rows_have_the_shares_of_their_mix(plant: str) -> None:
    problem = problem_of(plant, length=3000)
    scene, head = problem.scene, problem.heads[0]
    weights = dense_weights(problem).numpy()
    mix = head.plant.media.shares()
    rows = np.flatnonzero(scene.media & (np.arange(scene.length) > 2000))
    labelled = {name: np.zeros(rows.size) for name in mix}
    for relation in head.relations:
        if (relation.rows[rows] >= 0).any():
            labelled[relation.name] += (weights[rows] * relation.pairs(rows, scene.length)).sum(1)
    # Rows at a v-line's place and in the first blocks lack a relation, so medians are compared; cross-talk is
    # counted in its mean over many codes, and there are few here.
    for name, share in mix.items():
        assert np.median(labelled[name]) == pytest.approx(share / sum(mix.values()), abs=0.1), name


@pytest.mark.parametrize("plant", ["lines", "all", "2d-boundary"])
@pytest.mark.parametrize("chunk", [None, (512, 1024)])
def test_needed_tiles_by_brute_force(plant: str, chunk: tuple[int, int] | None) -> None:
    problem = problem_of(plant, length=1300)
    start, end = chunk or (0, problem.scene.length)
    one = forward.forward(problem, start, end, CONFIG, np.arange(start, end), chunk=end - start)
    length, relations = problem.scene.length, problem.heads[0].relations
    names = sorted({relation.name for relation in relations})
    masks = {
        name: np.logical_or.reduce([r.pairs(np.arange(length), length) for r in relations if r.name == name])
        for name in names
    }

    def tiles(tile_pass, group: slice, chosen: list[str]) -> int:
        count, mask = 0, np.logical_or.reduce([masks[name] for name in chosen]) if chosen else None
        for tile in range(group.start, group.stop) if chosen else ():
            rows = tile_pass.positions[tile_pass.indptr[tile] : tile_pass.indptr[tile + 1]].numpy()
            for keys in tile_pass.keys.positions.numpy():
                count += bool(mask[np.ix_(rows, keys[keys < length])].any())
        return count

    groups = {group.modality: group for group in one.plan.groups}
    fewest = min(
        tiles(one.plan.near, groups["media"].near, [n for i, n in enumerate(names) if split >> i & 1])
        + tiles(one.plan.far, groups["media"].far, [n for i, n in enumerate(names) if not split >> i & 1])
        for split in range(1 << len(names))
    )
    text = tiles(one.plan.near, groups["text"].near, names) if "text" in groups else 0
    assert one.needed == fewest + text


def test_dense_truth_is_dense_attention() -> None:
    problem = problem_of("all", heads=2)
    truth = dense_truth(problem, [0, 512], 0)
    assert [weight.sum() for weight in truth.weight.values()] == pytest.approx([1, 1])
    kind = kinds_of(problem)
    for index in range(4):
        assert truth.weight[0][truth.kind == index].sum() == pytest.approx((kind == index).mean())
    for head in range(2):
        weights = dense_weights(problem, head)[truth.positions]
        expected = (weights @ problem.value[:, 0].double()).float()
        torch.testing.assert_close(truth.out[:, head], expected, atol=2e-5, rtol=1e-4)
        mask = torch.from_numpy(problem.heads[head].planted(truth.positions, problem.scene.length))
        torch.testing.assert_close(truth.planted[:, head], (weights * mask).sum(-1).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [0, 512])
def test_dense_keeps_everything(chunk: int) -> None:
    problem = problem_of("all", heads=2)
    truth = dense_truth(problem, [chunk], 0)
    forwards = [
        forward.forward(problem, *bounds, CONFIG, truth.positions, chunk=chunk)
        for bounds in measured_chunks(problem.scene.length, chunk)
    ]
    figures = measure.measure(forwards, truth, chunk, [DENSE] * 2, CONFIG, why=True)
    assert figures["density"] == 1
    assert figures["mass"] == pytest.approx(1, abs=1e-5)
    assert figures["error"] < 1e-5
    assert figures["needed"] < 1
    assert len(figures["why"]) == len(forwards)


def test_thinned_passes_give_sampled_rows_what_all_rows_get() -> None:
    problem = problem_of("all", heads=2)
    sample = np.arange(3, problem.scene.length, 7)
    one = forward.forward(problem, 0, problem.scene.length, CONFIG, sample)
    specs = [HeadSpec()] * 2
    outs = []
    for plan in (one.plan, one.sampled_plan):
        outs.append(torch.full_like(one.operands.query, torch.nan))
        prefill.run_layer(one.operands, plan, specs, CONFIG, outs[-1], "torch")
    assert one.sampled_plan.near.rows.numel() < 0.3 * one.plan.near.rows.numel()
    torch.testing.assert_close(outs[1][sample], outs[0][sample], atol=2e-5, rtol=1e-4)


def test_kept_keys_hold_the_mass_that_the_lse_says() -> None:
    problem = problem_of("lines")
    sample = np.arange(0, problem.scene.length, 97)
    one = forward.forward(problem, 0, problem.scene.length, CONFIG, sample)
    passes, _ = prefill.select_layer(one.operands, one.sampled_plan, [HeadSpec()], CONFIG)
    out = torch.empty_like(one.operands.query)
    lse = measure.ops.sparse_prefill(one.operands, passes, out, "torch")
    weights = dense_weights(problem)
    for row in sample.tolist():
        scores = problem.query[row, 0] @ problem.key[: row + 1, 0].T * problem.scale
        kept = float(weights[row, : row + 1][losses.kept_keys(passes, 0, row, row + 1)].sum())
        assert float(torch.exp(lse[row, 0] - scores.logsumexp(0))) == pytest.approx(kept, abs=1e-4)


def test_measured_chunks_are_the_first_a_middle_and_the_last() -> None:
    assert measured_chunks(8 * 2048, 2048) == [(0, 2048), (8192, 10240), (14336, 16384)]
    assert measured_chunks(1500, 0) == [(0, 1500)]
    assert measured_chunks(4095, 2048) == [(0, 2048), (2048, 4095)]


def test_settings_nest() -> None:
    assert command.settings(["a.b=1", "a.c=2", "d=true"]) == {"a": {"b": 1, "c": 2}, "d": True}


def test_a_small_run_end_to_end(monkeypatch, tmp_path: Path, capsys) -> None:
    small = [
        cases.Case("lines", "qwen2.5", 2048),
        cases.Case("lines", "qwen2.5", 2048, chunk=1024),
        cases.Case("2d-boundary", "qwen3", 2048),
    ]
    monkeypatch.setattr(verdicts, "CASES", small)
    monkeypatch.setattr(command, "CASES", small)
    monkeypatch.setattr(sys, "argv", ["method.py", "--set", "error=0.0", "--json", str(tmp_path / "out.json")])
    assert command.main() == 0
    document = json.loads((tmp_path / "out.json").read_text())
    results = {(r["case"], r["pattern"]): r for r in document["results"]}
    assert len({case for case, _ in results}) == len(small)
    assert all(r["mass"] == pytest.approx(1, abs=1e-4) for r in document["results"])
    assert len(document["verdicts"]) > 2 * len(small)
    assert "held" in capsys.readouterr().out


def test_check_fails_when_a_verdict_is_missed(monkeypatch, capsys) -> None:
    small = [cases.Case("lines", "qwen2.5", 8192)]
    monkeypatch.setattr(verdicts, "CASES", small)
    monkeypatch.setattr(command, "CASES", small)
    # No loss at all is wanted of rows that may lose something.
    monkeypatch.setattr(measure, "_slack", lambda *_: 0.0)
    monkeypatch.setattr(sys, "argv", ["method.py", "--check"])
    assert command.main() == 1
    assert "MISSED" in capsys.readouterr().out
