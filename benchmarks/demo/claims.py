"""What the demonstration measures and claims: right answers, a control that fails, and a sooner prefill."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.toy.serving import Score
from mminference_sgl.testing import ModuleTimes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.toy.scenes import Scene

RATIO_CEILINGS = 1.0, 0.4
"""Share of the dense prefill that the language model's takes at most, as it comes and towards the knob's fast end."""
CONTROL_CEILING = 0.5
MIN_QUESTIONS = 24
MIN_TOKENS = 16384
BUSY = 1.25
"""Slowest over quickest of equal pieces of work, from which on the machine counts as busy with other things."""


@dataclass
class Timing:
    """Prefill of one video: seconds, and what was computed."""

    tokens: int
    ttft: float
    prefill: list[float]
    modules: list[ModuleTimes]
    """Of each of `prefill`."""
    density: float

    @property
    def median(self) -> float:
        """Seconds of the language model's prefill."""
        return statistics.median_low(self.prefill)

    @property
    def media(self) -> float:
        """Seconds of the time to first token that are not the language model's prefill."""
        return self.ttft - self.median

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the median prefill by what they went to."""
        modules = self.modules[self.prefill.index(self.median)]
        rest = self.median - modules.attention - modules.linear
        return {"attention": modules.attention, "linear": modules.linear, "rest": rest}


@dataclass
class Run:
    """One server's results."""

    name: str
    start_s: float = 0.0
    score: Score = field(default_factory=Score)
    toy: Timing | None = None
    clip: Timing | None = None
    fallbacks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """Claims that do not hold: those about answers, and those about speed with what kept them."""

    failed: list[str]
    missed: list[str]

    @property
    def lines(self) -> list[str]:
        """One line each."""
        return [f"FAILED: {line}" for line in self.failed] + [f"MISSED: {line}" for line in self.missed]

    def exit_code(self, *, check_speed: bool) -> int:
        """1 when an answer or the control is wrong, and with `check_speed` also when it is too slow."""
        return 1 if self.failed or (check_speed and self.missed) else 0


def judge(runs: Sequence[Run], scene: Scene) -> Verdict:
    """The claims that do not hold about the dense server, mminference as it comes and fast, and the control."""
    dense, *sparse, control = runs
    failed = [f"{run.name} gave wrong answers" for run in (dense, *sparse) if not run.score.all_right]
    if dense.score.asked.total() < MIN_QUESTIONS:
        failed.append(f"fewer than {MIN_QUESTIONS} questions were asked")
    if scene.tokens < MIN_TOKENS:
        failed.append(f"the video has only {scene.tokens} tokens")
    if (share := control.score.share("prev")) >= CONTROL_CEILING:
        failed.append(f"the control answers `prev`: {share:.2f}")
    failed += [f"{run.name}: a request ran dense: {f}" for run in runs for f in run.fallbacks]
    missed = []
    for run, ceiling in zip(sparse, RATIO_CEILINGS, strict=True):
        if dense.toy is None or run.toy is None:
            raise ValueError("the toy video was not timed")
        if run.toy.density == 1:
            failed.append(f"{run.name}: nothing ran sparse")
        if (ratio := run.toy.median / dense.toy.median) > ceiling:
            claim = f"{run.name}: the language model's prefill takes {ratio:.2f} of the dense one, not {ceiling}"
            missed.append(f"{claim}: {why_slow(dense.toy, run.toy, ceiling)}")
    return Verdict(failed, missed)


def why_slow(dense: Timing, sparse: Timing, ceiling: float) -> str:
    """What keeps the sparse prefill from its share of the dense one, as far as the times tell."""
    was, now = dense.parts, sparse.parts
    equal = {f"{name} prefills": x.prefill for name, x in (("dense", dense), ("mminference", sparse))}
    equal["linear layers of the two"] = [was["linear"], now["linear"]]
    spread = {name: max(seconds) / min(seconds) for name, seconds in equal.items()}
    other = dense.median - was["attention"]
    if max(spread.values()) > BUSY:
        told = ", ".join(f"{name} {value:.2f}x" for name, value in spread.items())
        reason = f"the machine was busy with other things, equal work took unequal time ({told})"
    elif other > ceiling * dense.median:
        share = was["attention"] / dense.median
        reason = f"attention is only {share:.0%} of the dense prefill here, and nothing else gets sparse"
    else:
        ratio = now["attention"] / was["attention"]
        reason = (
            f"attention takes {ratio:.2f} of the dense one, all else {(sparse.median - now['attention']) / other:.2f}"
        )
    seconds = "; ".join(
        f"{name} " + ", ".join(f"{part} {value:.2f} s" for part, value in parts.items())
        for name, parts in (("dense", was), ("mminference", now))
    )
    return f"{reason} ({seconds})"
