"""The offline search finds the pattern that was planted, and what it chooses is off least in the output itself."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.method.cases import PLANTS
from benchmarks.method.forward import Forward, forward
from benchmarks.method.planted import GEOMETRIES, interleaved, one_video, plant
from mminference_sgl.kernels.levels import LEVELS
from mminference_sgl.method import catalog, head_search
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.head_search import Scores, boundary, candidates, choose, measure, score, window_for

TOKENS, DENSITY = 8192, 0.2
GEOMETRY_NAMES = ("qwen2.5", "longvila", "qwen3")
CONFIG = Config(probe_rows=TOKENS, tile_queries=32)
BEST = {
    "lines": "grid",
    "slash": "grid",
    "all": "grid",
    "a-shape": "a_shape",
    "vertical-slash": "vertical_slash",
}
NO_BEST = "diffuse"
"""Heads that look everywhere lose about as much under every pattern."""


@cache
def problem(names: tuple[str, ...], geometry: str, tokens: int = TOKENS, seed: int = 0, *, mixed: bool = False):
    make = interleaved if mixed else one_video
    scene = make(GEOMETRIES[geometry], tokens)
    return plant(scene, [PLANTS[name] for name in names], heads=len(names), kv_heads=len(names), seed=seed)


def chunks(planted, size: int = 0) -> list[Forward]:
    length = planted.scene.length
    bounds = [(start, min(start + size, length)) for start in range(0, length, size)] if size else [(0, length)]
    given = {"chunk": size, "probe_one_in": head_search.PROBE_ONE_IN}
    return [forward(planted, *one, CONFIG, np.arange(length), **given) for one in bounds]


@cache
def scores(*args, size: int = 0, **kwargs) -> Scores:
    found = [score(one.operands, one.plan, CONFIG) for one in chunks(problem(*args, **kwargs), size)]
    return sum(found[1:], found[0])


def chosen(clips: Sequence[Scores], combine: str = "worst") -> list[HeadSpec]:
    return choose(clips, DENSITY, window_for([clips], DENSITY, combine), combine).specs


def test_planted_patterns_are_recovered(capsys: pytest.CaptureFixture[str]) -> None:
    names = (*BEST, NO_BEST)
    table: Counter[tuple[str, str]] = Counter()
    for geometry in GEOMETRY_NAMES:
        for seed in (0, 1):
            specs = chosen([scores(names, geometry, seed=seed)])
            table.update(zip(names, (spec.media_media for spec in specs), strict=True))
            assert all(spec.of("text") == ("dense", "dense") for spec in specs), "a short question runs dense"
    found = ("grid", "a_shape", "vertical_slash")
    with capsys.disabled():
        print("\nplanted \\ found".ljust(18), *(name.rjust(15) for name in found))
        for name in names:
            print(name.ljust(17), *(str(table[name, pattern]).rjust(15) for pattern in found))
    right = sum(table[name, pattern] for name, pattern in BEST.items())
    asked = sum(table[name, pattern] for name in BEST for pattern in found)
    assert asked == len(BEST) * len(GEOMETRY_NAMES) * 2
    assert right >= 0.95 * asked


PLANTED_MAPS = {
    "no-boundary": HeadSpec(*["vertical_slash"] * 4),
    "k-boundary": HeadSpec("vertical_slash", "vertical_slash", "dense", "grid"),
    "q-boundary": HeadSpec("vertical_slash", "vertical_slash", "grid", "grid"),
    "2d-boundary": HeadSpec("vertical_slash", "a_shape", "dense", "grid"),
}
"""The maps that were planted; media rows that read text keys read all of them."""
ROOMY = 0.3
"""Share of the tiles within which each of them fits: timestamps are many text keys."""


def lost_by(planted, one: Forward, specs: Sequence[HeadSpec], window: int) -> np.ndarray:
    """Relative error energy of each head's output under some maps, of all rows, each head with the limit to itself."""
    query, key, value = (x.transpose(0, 1) for x in (planted.query, planted.key, planted.value))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=planted.scale)
    config = head_search.with_window(dataclasses.replace(CONFIG, max_density=ROOMY), window)
    lost = []
    for head, spec in enumerate(specs):
        own = slice(head, head + 1)
        found = measure(one.operands.block(own), one.plan, [spec], config, dense.transpose(0, 1)[:, own])
        lost.append(found.error / found.energy)
    return np.concatenate(lost)


def test_planted_boundaries_are_recovered(capsys: pytest.CaptureFixture[str]) -> None:
    """What is found loses no more than the map that was planted, with its pattern on media.

    The map may be a simpler one that does as well: text keys that all rows read are lines of a grid, so that a
    K-boundary need not be named (the paper counts No- and K-boundary as one kind), and few rows of text run dense.
    That boundaries matter shows in what one pattern for all of a head loses.
    """
    names = tuple(PLANTED_MAPS)
    table: Counter[tuple[str, str]] = Counter()
    recovered = 0
    for geometry in GEOMETRY_NAMES:
        for seed in (0, 1):
            planted = problem(names, geometry, seed=seed, mixed=True)
            (one,) = chunks(planted)
            clips = [scores(names, geometry, seed=seed, mixed=True)]
            window = window_for([clips], ROOMY)
            specs = choose(clips, ROOMY, window).specs
            lost, wanted = (lost_by(planted, one, maps, window) for maps in (specs, list(PLANTED_MAPS.values())))
            wrong = [HeadSpec("dense", "dense", "grid", "grid"), *[PLANTED_MAPS["no-boundary"]] * 3]
            assert (lost_by(planted, one, wrong, window) > 4 * np.maximum(lost, head_search.GOOD**2)).all()
            for head, (name, spec) in enumerate(zip(names, specs, strict=True)):
                media = "-".join(dict.fromkeys(spec.of("media")))
                table[name, media] += 1
                pattern = spec.media_media == PLANTED_MAPS[name].media_media
                recovered += pattern and lost[head] <= max(wanted[head] * (1 + head_search.TIE), head_search.GOOD**2)
    kinds = sorted({found for _, found in table})
    with capsys.disabled():
        print("\nplanted \\ found".ljust(18), *(kind.rjust(15) for kind in kinds))
        for name in names:
            print(name.ljust(17), *(str(table[name, kind]).rjust(15) for kind in kinds))
    assert sum(table.values()) == len(names) * len(GEOMETRY_NAMES) * 2
    assert recovered >= 0.95 * sum(table.values())


def test_boundaries_have_names() -> None:
    lines = HeadSpec("vertical_slash", "vertical_slash", "grid", "grid")
    assert boundary(lines) == "no", "to text rows, which have no place, these are the lines of a grid"
    assert boundary(HeadSpec(*["a_shape"] * 4)) == "no"
    assert boundary(HeadSpec("dense", "vertical_slash", "dense", "grid")) == "k"
    assert boundary(HeadSpec("dense", "a_shape", "dense", "a_shape")) == "k"
    assert boundary(HeadSpec("dense", "dense", "grid", "grid")) == "q"
    assert boundary(HeadSpec("vertical_slash", "a_shape", "dense", "grid")) == "2d"


def test_what_is_chosen_loses_least_in_the_output_itself() -> None:
    """Against dense attention of every row, at one limit on tiles: less than any one pattern for all heads.

    No more than `auto` as well, which looks for the pattern anew in every chunk.
    """
    planted = problem(tuple(BEST), "qwen2.5")
    (one,) = chunks(planted)
    clips = [scores(tuple(BEST), "qwen2.5")]
    window = window_for([clips], DENSITY)
    config = dataclasses.replace(CONFIG, max_density=DENSITY)
    shape = dataclasses.replace(config.patterns.a_shape, window=window)
    config = dataclasses.replace(config, patterns=dataclasses.replace(config.patterns, a_shape=shape))
    query, key, value = (x.transpose(0, 1) for x in (planted.query, planted.key, planted.value))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=planted.scale)
    dense = dense.transpose(0, 1)

    def lost(specs: Sequence[HeadSpec]) -> tuple[float, float]:
        found = measure(one.operands, one.plan, specs, config, dense)
        assert all(0 <= head["mass"] <= 1.001 for head in found.figures())
        return float(found.error.sum() / found.energy.sum()) ** 0.5, float(found.tiles.sum() / found.causal.sum())

    error, density = lost(choose(clips, DENSITY, window).specs)
    assert density <= DENSITY * 1.3, "the limit, and dense rows of text"
    for pattern in ("auto", "grid", "vertical_slash", "a_shape"):
        uniform = [HeadSpec("dense", "dense", pattern, pattern)] * len(BEST)
        other, _ = lost(uniform)
        assert error <= other * (1.02 if pattern == "auto" else 0.8), pattern


def test_chunks_add_up_and_heads_do_not_depend_on_one_another() -> None:
    names = ("lines", "a-shape", "vertical-slash")
    whole = scores(names, "longvila", 4096, size=1024)
    found = [spec.media_media for spec in chosen([whole])]
    assert (found[0], found[2]) == ("grid", "vertical_slash")
    blocks = []
    for one in chunks(problem(names, "longvila", 4096), 1024):
        parts = [score(one.operands.block(slice(h, h + 1)), one.plan, CONFIG) for h in range(len(names))]
        blocks.append(Scores.concatenate(parts))
    together = sum(blocks[1:], blocks[0])
    for name in ("error", "tiles", "energy", "causal"):
        np.testing.assert_allclose(getattr(together, name), getattr(whole, name), rtol=1e-3, atol=1e-6)


def made(errors: dict[tuple[str, str], float], heads: int = 1, tiles: float = 10.0) -> Scores:
    """Scores with these relative errors of media rows, 1 for other candidates; text rows are few."""
    known = candidates()
    error = np.ones((len(known), 2, heads, LEVELS + 1))
    for index, one in enumerate(known):
        if one.rows == "media":
            error[index] = errors.get(one.pair, 1.0) ** 2
    return Scores(error, np.full_like(error, tiles), np.ones((2, heads)), np.array([1.0, 100.0]))


GRID, SLASH, SHAPE = ("grid",) * 2, ("vertical_slash",) * 2, ("a_shape",) * 2


def test_clips_are_combined_by_the_worst_or_the_mean() -> None:
    steady, moody = 0.5, (0.1, 0.6)
    clips = [made({GRID: steady, SLASH: moody[0]}), made({GRID: steady, SLASH: moody[1]})]
    assert choose(clips, 0.2, 512, "worst").specs[0].of("media") == GRID
    assert choose(clips, 0.2, 512, "mean").specs[0].of("media") == SLASH
    assert choose(clips, 0.2, 512, "worst").error[0] == pytest.approx(steady)


def test_ties_go_to_the_simpler_map() -> None:
    mixed = ("dense", "grid")
    assert choose([made({GRID: 0.3, mixed: 0.299})], 0.2, 512).specs[0].of("media") == GRID
    assert choose([made({GRID: 0.3, mixed: 0.2})], 0.2, 512).specs[0].of("media") == mixed
    assert choose([made({GRID: 0.04, SHAPE: 0.045, SLASH: 0.01})], 0.2, 512).specs[0].of("media") == SHAPE
    equal = choose([made({}, heads=3)], 0.2, 512)
    assert len(set(equal.specs)) == 1


def test_what_cannot_keep_to_the_density_is_out() -> None:
    spec = choose([made({GRID: 0.1}, tiles=30.0)], 0.2, 512).specs[0]
    assert spec == HeadSpec("dense", "dense", "auto", "auto")
    dear = made({GRID: 0.1, SLASH: 0.4})
    for index, one in enumerate(candidates()):
        if one.pair == GRID:
            dear.tiles[index] = 30.0
    assert choose([dear], 0.2, 512).specs[0].of("media") == SLASH
    assert choose([dear], 0.4, 512).specs[0].of("media") == GRID


def test_rules_say_what_was_chosen() -> None:
    specs = {
        0: [HeadSpec("dense", "dense", *GRID), HeadSpec(*SLASH, *SLASH), HeadSpec("dense", "dense", *GRID)],
        3: [HeadSpec("dense", "vertical_slash", "dense", "grid")] * 3,
    }
    rules = head_search.rules(specs)
    assert [rule.get("heads") for rule in rules] == [[0, 2], [1], None]
    content = {"schema": 1, "id": "made", "heads": rules}
    file = catalog.parse(content, "test")
    for layer, own in specs.items():
        assert file.specs(layer, range(3)) == own
