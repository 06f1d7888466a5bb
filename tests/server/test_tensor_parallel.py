"""`--tp 2` on the CPU platform: each rank runs the patterns of its own heads, counted over all ranks.

Every head of the pattern file has another spec, and far less than all is computed, so a rank that takes another rank's
specs computes something else. The tolerance comes from the dense server: its answers at one and at two ranks differ by
the rounding of sums over ranks alone. Ours may differ by twice that and the rounding band.

Fewer KV heads than ranks cannot be served here: on CPUs SGLang pads heads where elsewhere it replicates them, and then
fails to load the weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import serving
from mminference_sgl.testing import Prefill, fallbacks, start_lines
from serving import Messages, ModelPath, Run, difference, rounding_band

pytestmark = pytest.mark.server

MODEL, CHUNK, RANKS = "qwen2_5_vl", 509, 2
SCENARIOS = ("image", "two images", "video", "video, radix hit")
MAPS: list[list[dict[str, str]]] = [
    [
        {"media": "dense"},
        {"media": "a_shape", "text->media": "vertical_slash"},
        {"media": "vertical_slash", "text->text": "a_shape"},
        {"media": "grid"},
    ],
    [
        {"media": "auto", "text->media": "a_shape"},
        {"media": "grid", "media->text": "dense"},
        {"media": "vertical_slash", "media->text": "a_shape", "text": "vertical_slash"},
        {"media": "grid", "media->text": "a_shape", "text": "a_shape"},
    ],
]
"""By layer, by head."""
CORRECT, NO_OFFSET, SWAPPED = (0, 1, 2, 3), (0, 1, 0, 1), (2, 3, 0, 1)
"""Whose spec each head gets; the others are what wrong head ids of a rank would amount to."""

RunWith = Callable[..., Run]


@pytest.fixture(scope="module")
def run_with(model_path: ModelPath, messages: Messages, tmp_path_factory: pytest.TempPathFactory) -> RunWith:
    """All scenarios, one after another, on a server of its own; `specs_of` None is a dense server."""
    folder = tmp_path_factory.mktemp("patterns")

    @functools.cache
    def run_with(ranks: int, specs_of: tuple[int, ...] | None = CORRECT) -> Run:
        args, env = serving.in_ranks(ranks)
        backend = None if specs_of is None else "mminference"
        config = settings(pattern_file(folder, specs_of or CORRECT))
        run = Run()
        with serving.start(model_path(MODEL), CHUNK, backend, args, config, **env) as server:
            serving.ask_in_turn(server, {name: messages[name] for name in SCENARIOS}, run)
        return run

    return run_with


def pattern_file(folder: Path, specs_of: Sequence[int]) -> Path:
    """A rule for each layer and head."""
    rules = [
        {"layers": [layer], "heads": [head], "map": MAPS[layer][spec]}
        for layer in range(len(MAPS))
        for head, spec in enumerate(specs_of)
    ]
    path = folder / f"{'-'.join(map(str, specs_of))}.json"
    path.write_text(json.dumps({"schema": 1, "id": "every head its own", "heads": rules}))
    return path


def settings(pattern: Path) -> dict[str, Any]:
    """Budgets that leave much out.

    A rank's heads share what may be lost, and the guard weighs them together: here so much may be lost that every head
    reads what its pattern always reads, and the guard is off.
    """
    budgets = {
        "a_shape": {"sink": 16, "window": 128},
        "vertical_slash": {"sink": 16, "window": 32},
        "grid": {"sink": 16, "window_frames": 0},
    }
    config: dict[str, Any] = {"pattern": str(pattern), "min_tokens": 256, "error": 1000.0, "text_error": 1000.0}
    return {**config, "error_ceiling": 1e9, "tile_queries": 32, "tile_keys": 16, "patterns": budgets}


def tolerance(run_with: RunWith) -> float:
    one, two = (run_with(ranks, None).answers for ranks in (1, RANKS))
    return 2 * max(difference(one[name], two[name]) for name in SCENARIOS) + rounding_band()


def test_two_ranks_answer_as_one(run_with: RunWith):
    one, two = (run_with(ranks).answers for ranks in (1, RANKS))
    for scenario in SCENARIOS:
        assert two[scenario].token_ids == one[scenario].token_ids
        assert difference(two[scenario], one[scenario]) <= tolerance(run_with), scenario


@pytest.mark.parametrize("specs_of", [NO_OFFSET, SWAPPED], ids=["no offset", "swapped"])
def test_wrong_head_ids_would_show(specs_of: tuple[int, ...], run_with: RunWith):
    right, wrong = (run_with(1, specs).answers["video"].top[0] for specs in (CORRECT, specs_of))
    both = right.keys() & wrong.keys()
    assert both
    assert max(abs(right[token] - wrong[token]) for token in both) > 100 * tolerance(run_with)


def test_two_ranks_compute_the_tiles_of_one(run_with: RunWith):
    """Of every chunk, each rank reports its heads' density; their mean is what one rank reports of all heads."""
    one, two = (run_with(ranks) for ranks in (1, RANKS))
    for scenario in SCENARIOS:
        whole, parts = by_chunk(one.prefills[scenario]), by_chunk(two.prefills[scenario])
        assert whole.keys() == parts.keys()
        for chunk, lines in parts.items():
            assert sorted(line.rank for line in lines) == list(range(RANKS))
            mean = sum(line.density for line in lines) / RANKS
            assert mean == pytest.approx(whole[chunk][0].density, abs=1e-4), "four digits are printed"
    lines = by_chunk(two.prefills["video"])
    assert len(lines) > 3
    last = lines[max(lines)]
    assert abs(last[0].density - last[1].density) > 0.01, "the ranks' heads differ"
    assert max(line.density for line in last) < 0.9
    assert all(line.coverage < 0.999 for line in last)


def by_chunk(lines: Sequence[Prefill]) -> dict[tuple[int, int], list[Prefill]]:
    found: dict[tuple[int, int], list[Prefill]] = {}
    for line in lines:
        found.setdefault((line.prefix, line.chunk), []).append(line)
    return found


def test_nothing_fell_back(run_with: RunWith):
    log = run_with(RANKS).log
    assert fallbacks(log) == []
    assert "Traceback" not in log
    assert len(start_lines(log)) == RANKS
