"""``make bench-accuracy``: does sparse prefill answer as dense prefill does, and would something simpler do?

A small video model (:mod:`benchmarks.clips`) answers questions about generated clips through a real SGLang server and
real mp4 files: one long clip with needles at all depths, and *mixed* prompts of two clips, a picture and texts. All
settings answer the same questions, so answers are compared in pairs.

- ``dense``, and ``auto`` with its defaults (but for ``min_tokens`` 0: what is judged is the sparse path).
- What is left of other choices at the density that ``auto`` had: ``grid``, ``vertical_slash`` for media rows, the same
  for all rows, as a method without boundaries between texts and media would have it, and ``a_shape``.

Other models are asked for codes on cards in English (``--english``), by servers that are started for ``--model``, or by
running ones (``--url NAME=URL``, the first being what the others are compared with), whose density is not known.

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
import torch

from benchmarks.accuracy.paired import Difference, difference
from benchmarks.accuracy.prompts import CHANGE, KINDS, Asked, form, of_clips, of_codes
from benchmarks.accuracy.settings import ALL_ROWS, rivals
from benchmarks.clips.serving import render
from benchmarks.clips.train import CHECKPOINT
from benchmarks.host import described
from benchmarks.search.__main__ import search
from benchmarks.toy.serving import server as server_of_clips
from mminference_sgl.portable.cpu import PLATFORM_NAME
from mminference_sgl.testing import Client, Server, ServerError, fallbacks, mean_density, prefills

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTHS = (4096, 8192, 16384, 32768)
PROMPTS = 3
"""Of each kind and length."""
CHUNK = 8192
SEARCHED, SEARCH_SEED = 4096, 20261128
"""Tokens of the clips that patterns are searched on."""
DEPTHS = 8
"""Bands of the heat map."""
POINT, INTERVAL, CLEARLY = 0.01, 0.03, 0.1


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
        """Over the prompts; of a server without a log it is not known."""
        return float(np.mean(self.density)) if self.density else float("nan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether its verdicts hold."""
    options = _arguments(argv)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="mminference-accuracy-") as folder:
            make = of_codes if options.english else of_clips
            asked = [each for length in options.lengths for each in make(length, options.prompts, Path(folder))]
            _print_row("", "tokens", *KINDS, "lost", "won", "interval", "density", "coverage", "ttft s")
            results = running_ones(options, asked) if options.url else servers(options, asked, Path(folder))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    failures = [] if options.url else judge(results)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"done in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(options, results, asked, failures), indent=1) + "\n")
    return 1 if failures else 0


def running_ones(options: argparse.Namespace, asked: Sequence[Asked]) -> list[Result]:
    """Asks servers that others started."""
    results: list[Result] = []
    for name, url in options.url:
        results += told(run(name, Client(url, str(options.model)), asked), results)
    return results


def servers(options: argparse.Namespace, asked: Sequence[Asked], folder: Path) -> list[Result]:
    """Starts a server for each setting and asks it."""
    results: list[Result] = []

    def serve(name: str, config: dict[str, Any] | None, these: Sequence[Asked]) -> None:
        if config is not None:
            config = {"min_tokens": 0, **config}
        with start(config, options) as server:
            found = run(name, server, these)
            for dense in fallbacks(server.log()):
                raise ServerError(f"{name}: a request ran dense: {dense.reason}: {dense.detail}", server.log())
        results.extend(told(found, results))

    serve("dense", None, asked)
    serve("auto", options.config, asked)
    pattern = options.pattern
    for own in [each for each in results if each.name == "auto"]:
        if pattern is None and not options.english:
            pattern = searched(own.mean_density, options.model, folder)
        for name, config in rivals(own.mean_density, own.length, pattern):
            serve(name, config, [each for each in asked if each.length == own.length])
    return results


def searched(density: float, model: str | Path, folder: Path) -> Path:
    """A pattern file for the small model, found on clips that nobody is asked about.

    Raises:
        ServerError: the search failed.
    """
    rng, output = np.random.default_rng(SEARCH_SEED), folder / "searched.json"
    media = [render(form("clip", SEARCHED).draw(rng, CHANGE), rng, folder, f"search-{i}") for i in range(2)]
    text = media[0].prompt.questions()[0].text
    if search(text, [Path(each.sources[0]) for each in media], output, density, model):
        raise ServerError("mminference search failed")
    return output


def start(config: dict[str, Any] | None, options: argparse.Namespace) -> Server:
    """A server of one setting, dense for None; other models than the small one run where SGLang puts them."""
    backend, slots = None if config is None else "mminference", max(65536, 2 * max(options.lengths))
    if not options.english:
        return server_of_clips(backend, config or {}, CHUNK, quick=True, model=options.model)
    return Server(
        options.model,
        attention_backend=backend,
        chunked_prefill_size=CHUNK,
        max_total_tokens=slots,
        platform=None if torch.cuda.is_available() else PLATFORM_NAME,
        start_timeout=1800,
        args=["--trust-remote-code", *options.server],
        env={"MMINFERENCE_CONFIG": json.dumps(config or {}), "MMINFERENCE_LOG": "debug", "HF_HUB_OFFLINE": None},
    )


def run(name: str, client: Client, asked: Sequence[Asked]) -> list[Result]:
    """Asks a server all prompts: a result for each length."""
    found: dict[int, Result] = {}
    for each in asked:
        result = found.setdefault(each.length, Result(name, each.length))
        mark = len(client.log())
        answers = each.ask(client)
        first, log = answers[0], client.log(mark)
        result.right.setdefault(each.kind, []).extend(
            question.is_right(answer.text) for question, answer in zip(each.questions, answers, strict=True)
        )
        if log:
            lines = prefills(log)
            # Follow-up questions are few rows behind what is cached: they run dense.
            result.density.append(mean_density(lines, first.prompt_tokens))
            result.coverage += [line.coverage for line in lines]
        result.ttft.append(first.ttft or float("nan"))
    return list(found.values())


def told(found: list[Result], others: Sequence[Result]) -> list[Result]:
    """Prints a line for each result, compared with the first one of its length."""
    for result in found:
        _print_result(result, _reference(others, result.length) or result)
    return found


def compared(result: Result, dense: Result, kinds: Sequence[str] = KINDS) -> Difference:
    """All answers to some kinds of prompts against the dense ones."""
    ours, theirs = ([right for kind in kinds for right in each.right[kind]] for each in (result, dense))
    return difference(ours, theirs)


def judge(results: Sequence[Result]) -> list[str]:
    """The verdicts that are missed."""
    failures = []
    for result in results:
        dense = _reference(results, result.length)
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
    """Of questions about what lies in a single clip: how deep, 0 to 1, and whether the answer is right."""
    these = [each for each in asked if each.kind == "clip" and each.length == result.length]
    places = [depth for each in these for depth in each.depths]
    return [(depth, right) for depth, right in zip(places, result.right["clip"], strict=True) if depth is not None]


def _reference(results: Sequence[Result], length: int) -> Result | None:
    return next((each for each in results if each.length == length), None)


def _print_result(result: Result, reference: Result) -> None:
    against = compared(result, reference)
    shares = [f"{np.mean(result.right[kind]):.3f}" for kind in KINDS]
    interval = f"{100 * against.low:+.1f} {100 * against.high:+.1f}"
    coverage = f"{np.mean(result.coverage):.3f}" if result.coverage else ""
    cells = (
        *shares,
        str(against.lost),
        str(against.won),
        interval,
        f"{result.mean_density:.3f}" if result.density else "",
        coverage,
    )
    _print_row(result.name, str(result.length), *cells, f"{np.median(result.ttft):.2f}")


def _print_row(*cells: str) -> None:
    print(f"{cells[0]:26}" + "".join(f"{cell:>11}" for cell in cells[1:]), flush=True)


def _record(
    options: argparse.Namespace, results: Sequence[Result], asked: Sequence[Asked], failures: list[str]
) -> dict[str, Any]:
    rows = []
    for result in results:
        dense = _reference(results, result.length)
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
                "density": result.mean_density if result.density else None,
                "coverage": float(np.mean(result.coverage)) if result.coverage else None,
                "ttft_s": float(np.median(result.ttft)),
            }
        )
    return {
        **described(),
        "model": "clips" if options.model is CHECKPOINT else str(options.model),
        "prompts": options.prompts,
        "rows": rows,
        "failures": failures,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", default=CHECKPOINT, help="another checkpoint of benchmarks.clips, or of --english")
    parser.add_argument("--english", action="store_true", help="ask for codes on cards, as any video model can answer")
    parser.add_argument("--pattern", type=Path, metavar="FILE", help="a pattern file to compare")
    parser.add_argument("--url", type=_named, nargs="+", metavar="NAME=URL", help="ask these servers instead")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="last: more arguments for the servers")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of each kind and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON of further settings for auto")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, too")
    options = parser.parse_args(argv)
    options.english |= bool(options.url)
    if options.english and options.model is CHECKPOINT:
        options.model = "default" if options.url else parser.error("--english needs --model: a name or a directory")
    return options


def _named(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not url.startswith("http"):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL, as in dense=http://127.0.0.1:30000")
    return name, url


if __name__ == "__main__":
    sys.exit(main())
