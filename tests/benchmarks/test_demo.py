"""The demonstration's claims: wrong answers and a control that passes always fail, a slow machine is told why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.demo.claims import Run, Timing, judge
from benchmarks.toy.scenes import TASKS
from benchmarks.toy.serving import Score
from mminference_sgl.testing import ModuleTimes

EIGHT = Counter(dict.fromkeys(TASKS, 8))


class Video:
    tokens = 16384


def timing(attention: float, linear: float, rest: float, *, slowest: float = 1.0, density: float = 0.1) -> Timing:
    total = attention + linear + rest
    times = [total, total, total * slowest]
    return Timing(16396, 2 * total, times, [ModuleTimes(attention, linear)] * 3, density)


DENSE, SPARSE = timing(3.5, 0.3, 0.6, density=1.0), timing(0.5, 0.3, 0.6)
SLOW = timing(2.6, 0.3, 0.6)


def runs(
    dense: Timing, fast: Timing, wrong: Counter[str] | None = None, default: Timing | None = None, **control: int
) -> list[Run]:
    scores = [Score(EIGHT, EIGHT), Score(EIGHT, EIGHT), Score(EIGHT - (wrong or Counter()), EIGHT)]
    scores.append(Score(Counter(control), EIGHT))
    timings = dense, default or SPARSE, fast, fast
    names = "dense", "mminference", "fast", "control"
    return [Run(name, score=score, toy=toy) for name, score, toy in zip(names, scores, timings, strict=True)]


def verdict(found: list[Run]) -> Any:
    return judge(found, Video())  # type: ignore[arg-type]


def test_all_holds() -> None:
    found = verdict(runs(DENSE, SPARSE, find=8, prev=3))
    assert (found.failed, found.missed, found.lines) == ([], [], [])
    assert found.exit_code(check_speed=True) == 0


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (runs(DENSE, SPARSE, wrong=Counter(past=1)), "fast gave wrong answers"),
        (runs(DENSE, SPARSE, prev=4), "the control answers `prev`: 0.50"),
        (runs(DENSE, replace(SPARSE, density=1.0)), "fast: nothing ran sparse"),
        (runs(DENSE, SPARSE, default=replace(SPARSE, density=1.0)), "mminference: nothing ran sparse"),
    ],
    ids=["wrong answer", "control passes", "fast dense", "default dense"],
)
def test_answers_and_control_always_fail(found: list[Run], words: str) -> None:
    result = verdict(found)
    assert result.failed == [words]
    assert result.lines == [f"FAILED: {words}"]
    assert result.exit_code(check_speed=False) == 1


@pytest.mark.parametrize(
    ("dense", "sparse", "reason"),
    [
        (timing(1.0, 3.0, 0.4, density=1.0), timing(0.1, 3.0, 0.4), "attention is only 23% of the dense prefill"),
        (DENSE, replace(SLOW, prefill=[2.0, 3.5, 5.5]), "busy with other things, equal work took unequal time (dense"),
        (DENSE, timing(1.5, 0.4, 0.6), "linear layers of the two 1.33x)"),
        (DENSE, SLOW, "attention takes 0.74 of the dense one, all else 1.00"),
    ],
    ids=["not attention", "busy at times", "busy with one server", "attention"],
)
def test_missed_speed_is_told_with_its_reason(dense: Timing, sparse: Timing, reason: str) -> None:
    found = verdict(runs(dense, sparse))
    assert found.failed == []
    (line,) = found.missed
    assert (
        f"fast: the language model's prefill takes {sparse.median / dense.median:.2f} of the dense one, not 0.4" in line
    )
    assert reason in line
    assert f"mminference attention {sparse.parts['attention']:.2f} s, linear" in line
    assert found.lines == [f"MISSED: {line}"]
    assert (found.exit_code(check_speed=False), found.exit_code(check_speed=True)) == (0, 1)


def test_as_it_comes_it_must_be_sooner_than_dense() -> None:
    (line,) = verdict(runs(DENSE, SPARSE, default=timing(3.6, 0.3, 0.6))).missed
    assert line.startswith("mminference: the language model's prefill takes 1.02 of the dense one, not 1.0: ")


def test_parts_are_those_of_the_prefill_in_the_middle() -> None:
    times = [ModuleTimes(1.0, 0.5), ModuleTimes(2.0, 0.25), ModuleTimes(9.0, 0.0)]
    assert Timing(1, 1.0, [1.75, 2.5, 9.0], times, 1.0).parts == {"attention": 2.0, "linear": 0.25, "rest": 0.25}
