"""``make bench-accuracy``: does sparse prefill answer as dense prefill does, and would something simpler do?

A small video model (:mod:`benchmarks.clips`) answers questions about generated clips through a real SGLang server and
real mp4 files: one long clip with needles at all depths, and *mixed* prompts of two clips, a picture and texts. All
settings answer the same questions, so answers are compared in pairs.

- ``dense``, and ``auto`` with its defaults (but for ``min_tokens`` 0: what is judged is the sparse path).
- What is left of other choices at the density that ``auto`` had: ``grid``, ``vertical_slash`` for media rows, the same
  for all rows, as a method without boundaries between texts and media would have it, and ``a_shape``.

Exits 1 when a verdict is missed: ``auto`` at most one point below dense, the 95 % interval at most three; A-shape at
least ten below; and the mixed prompts no better without boundaries than with them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.accuracy.paired import Difference, difference
from benchmarks.accuracy.settings import ALL_ROWS, rivals
from benchmarks.clips.prompts import MOST_NEEDLES, OFFSETS, Form
from benchmarks.clips.serving import Media, ask, render
from benchmarks.clips.train import CHECKPOINT
from benchmarks.host import described
from benchmarks.toy.serving import COLUMNS, ROWS, server
from mminference_sgl.testing import ServerError, fallbacks, mean_density, prefills

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.toy.scenes import Question

LENGTHS = (4096, 8192, 16384, 32768)
PROMPTS = 3
"""Of each kind and length."""
CHUNK = 8192
CHANGE = 0.5
SEED = 20260717
KINDS = ("clip", "mixed")
DEPTHS = 8
"""Bands of the heat map."""
POINT, INTERVAL, CLEARLY = 0.01, 0.03, 0.1


@dataclass(frozen=True)
class Asked:
    """One prompt and its questions."""

    kind: str
    length: int
    media: Media
    questions: list[Question]


@dataclass
class Result:
    """One setting at one length; ``right``: by kind, of each question in their order."""

    name: str
    length: int
    right: dict[str, list[bool]] = field(default_factory=dict)
    density: list[float] = field(default_factory=list)
    coverage: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)

    @property
    def mean_density(self) -> float:
        """Over the prompts."""
        return float(np.mean(self.density))


def form(kind: str, length: int) -> Form:
    """Of prompts of about so many visual tokens."""
    frame = ROWS * COLUMNS
    if kind == "clip":
        return Form(((length // frame, ROWS, COLUMNS),), (MOST_NEEDLES,), (2,))
    half = (length // frame - 1) // 2
    return Form(((half, ROWS, COLUMNS), (1, ROWS, COLUMNS), (half, ROWS, COLUMNS)), (4, 1, 3), (2, 1, 2))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether its verdicts hold."""
    options = _arguments(argv)
    began = time.monotonic()
    results: list[Result] = []
    try:
        with tempfile.TemporaryDirectory(prefix="mminference-accuracy-") as name:
            folder = Path(name)
            asked = [each for length in options.lengths for each in prompts(length, options.prompts, folder)]
            _print_row("", "tokens", *KINDS, "lost", "won", "interval", "density", "coverage", "ttft s")
            for setting, config in (("dense", None), ("auto", {"min_tokens": 0, **options.config})):
                results += run(setting, config, asked, results, options.model)
            for own in [each for each in results if each.name == "auto"]:
                these = [each for each in asked if each.length == own.length]
                for setting, config in rivals(own.mean_density, own.length):
                    results += run(setting, {"min_tokens": 0, **config}, these, results, options.model)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    failures = judge(results)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"done in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(options, results, asked, failures), indent=1) + "\n")
    return 1 if failures else 0


def prompts(length: int, count: int, folder: Path) -> Iterator[Asked]:
    """The same for all settings."""
    for kind in KINDS:
        rng = np.random.default_rng([SEED, length, KINDS.index(kind)])
        for number in range(count):
            prompt = form(kind, length).draw(rng, CHANGE)
            media = render(prompt, rng, folder, f"{kind}-{length}-{number}")
            yield Asked(kind, length, media, prompt.questions())


def run(
    name: str,
    config: Mapping[str, Any] | None,
    asked: Sequence[Asked],
    others: Sequence[Result],
    model: Path,
) -> list[Result]:
    """Asks a server of one setting; prints a line for each length, compared with dense."""
    found: dict[int, Result] = {}
    with server(
        None if config is None else "mminference", dict(config or {}), CHUNK, quick=True, model=model
    ) as running:
        for each in asked:
            result = found.setdefault(each.length, Result(name, each.length))
            mark = len(running.log())
            answers = ask(running, each.media, each.questions)
            lines = prefills(running.log(mark))
            first = answers[0]
            result.right.setdefault(each.kind, []).extend(
                question.is_right(answer.text) for question, answer in zip(each.questions, answers, strict=True)
            )
            result.density.append(mean_density(lines, first.prompt_tokens))
            result.coverage += [line.coverage for line in lines]
            result.ttft.append(first.ttft or float("nan"))
        for dense in fallbacks(running.log()):
            raise ServerError(f"{name}: a request ran dense: {dense.reason}: {dense.detail}", running.log())
    for result in found.values():
        _print_result(result, _dense(others, result.length) or result)
    return list(found.values())


def compared(result: Result, dense: Result, kinds: Sequence[str] = KINDS) -> Difference:
    """All answers to some kinds of prompts against the dense ones."""
    ours, theirs = ([right for kind in kinds for right in each.right[kind]] for each in (result, dense))
    return difference(ours, theirs)


def judge(results: Sequence[Result]) -> list[str]:
    """The verdicts that are missed."""
    failures = []
    for result in results:
        dense = _dense(results, result.length)
        assert dense is not None
        against, where = compared(result, dense), f"{result.name} at {result.length} tokens"
        if result.name == "auto":
            if against.mean < -POINT or against.low < -INTERVAL:
                failures.append(f"{where}: {100 * against.mean:+.1f} points, from {100 * against.low:+.1f}")
            if result.mean_density >= 1:
                failures.append(f"{where}: nothing ran sparse")
        if result.name == "a_shape" and against.high > -CLEARLY:
            failures.append(f"{where}: only {100 * against.mean:+.1f} points below dense")
        if result.name == ALL_ROWS:
            kept = next(r for r in results if r.name == "vertical_slash" and r.length == result.length)
            ours, others = compared(kept, dense, ["mixed"]), compared(result, dense, ["mixed"])
            if ours.share < others.share:
                failures.append(f"{where}: mixed prompts {others.share:.3f}, with boundaries {ours.share:.3f}")
    return failures


def depths(asked: Sequence[Asked], result: Result) -> list[tuple[float, bool]]:
    """Of questions about needles of one clip: how deep the needle lies, 0 to 1, and whether the answer is right."""
    found, place = [], 0
    for each in asked:
        if each.kind != "clip" or each.length != result.length:
            continue
        scene = each.media.prompt.parts[0].scene
        where = {needle.key: needle.patch / len(scene.colours) for needle in scene.needles}
        for question in each.questions:
            if question.task in OFFSETS:
                found.append((where[question.key], result.right["clip"][place]))
            place += 1
    return found


def _dense(results: Sequence[Result], length: int) -> Result | None:
    return next((each for each in results if each.name == "dense" and each.length == length), None)


def _print_result(result: Result, dense: Result) -> None:
    against = compared(result, dense)
    shares = [f"{np.mean(result.right[kind]):.3f}" for kind in KINDS]
    interval = f"{100 * against.low:+.1f} {100 * against.high:+.1f}"
    coverage = f"{np.mean(result.coverage):.3f}" if result.coverage else ""
    cells = (*shares, str(against.lost), str(against.won), interval, f"{result.mean_density:.3f}", coverage)
    _print_row(result.name, str(result.length), *cells, f"{np.median(result.ttft):.2f}")


def _print_row(*cells: str) -> None:
    print(f"{cells[0]:26}" + "".join(f"{cell:>11}" for cell in cells[1:]), flush=True)


def _record(
    options: argparse.Namespace, results: Sequence[Result], asked: Sequence[Asked], failures: list[str]
) -> dict[str, Any]:
    rows = []
    for result in results:
        dense = _dense(results, result.length)
        assert dense is not None
        tasks: dict[str, list[bool]] = {}
        for kind in KINDS:
            questions = [
                q for each in asked if each.kind == kind and each.length == result.length for q in each.questions
            ]
            for question, right in zip(questions, result.right[kind], strict=True):
                tasks.setdefault(f"{kind} {question.task}", []).append(right)
        bands = [
            [right for depth, right in depths(asked, result) if int(depth * DEPTHS) == band] for band in range(DEPTHS)
        ]
        rows.append(
            {
                "name": result.name,
                "tokens": result.length,
                "share": {kind: float(np.mean(result.right[kind])) for kind in KINDS},
                "tasks": {task: float(np.mean(right)) for task, right in tasks.items()},
                "depths": [float(np.mean(right)) if right else None for right in bands],
                "against_dense": asdict(compared(result, dense)),
                "density": result.mean_density,
                "coverage": float(np.mean(result.coverage)) if result.coverage else None,
                "ttft_s": float(np.median(result.ttft)),
            }
        )
    return {
        **described(),
        "prompts": options.prompts,
        "rows": rows,
        "failures": failures,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="another checkpoint of benchmarks.clips")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each kind and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON of further settings for auto")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
