"""``make bench-toy``: does sparse prefill answer as dense prefill does?

The toy model answers questions about generated videos of 2K to 16K tokens through a real SGLang server: dense,
mminference in one chunk and in chunks that cut frames, and a control that must fail. Settings are the defaults, but for
`min_tokens` 0: what is judged is the sparse path, also where it would not pay. Videos are the same for all. `prev` and
`past` need visual tokens that looked at their own place in earlier frames while they were prefilled, so they tell a
good pattern from a bad one; `find` needs the question to find a token.

Exits 1 when a verdict is missed: mminference within 0.03 of dense on every task, length and chunk size, and not dense;
the control below half on `prev` at every length. `--errors` asks under other settings of the knob, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.host import described
from benchmarks.toy.scenes import TASKS, Scene, make_scene
from benchmarks.toy.serving import CHANGE, COLUMNS, CONTROL, FPS, ROWS, Score, ask, server
from mminference_sgl.testing import ServerError, fallbacks, write_mp4

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LENGTHS = (2048, 4096, 8192, 16384)
VIDEOS, VIDEOS_CUT = 8, 3
"""Videos per length, of 8 questions per task each: in one chunk, and in chunks."""
ONE_CHUNK = -1
SPARSE = {"min_tokens": 0}
CUTS = (2048, 509)
TOLERANCE = 0.03
CONTROL_CEILING = 0.5
SEED = 20260401


@dataclass(frozen=True)
class Setting:
    """One server: its name in the table, backend, configuration and chunk size, and videos per length."""

    name: str
    backend: str | None
    config: dict[str, Any]
    chunk: int
    videos: int


@dataclass(frozen=True)
class Clip:
    """A video file and what is on it."""

    scene: Scene
    path: Path


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """The servers, one after the other."""
    config = SPARSE | json.loads(options.config)
    yield Setting("dense", None, {}, ONE_CHUNK, options.videos)
    yield Setting("mminference", "mminference", config, ONE_CHUNK, options.videos)
    for chunk in CUTS:
        yield Setting("mminference", "mminference", config, chunk, min(VIDEOS_CUT, options.videos))
    for error in options.errors:
        yield Setting(f"error {error}", "mminference", config | {"error": error}, ONE_CHUNK, VIDEOS_CUT)
    yield Setting("control", "mminference", CONTROL | SPARSE, ONE_CHUNK, min(VIDEOS_CUT, options.videos))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether its verdicts hold."""
    options = _arguments(argv)
    began = time.monotonic()
    scores: dict[tuple[str, int, int], Score] = {}
    failures: list[str] = []
    _print_row("", "chunk", "tokens", *TASKS, "density")
    try:
        with tempfile.TemporaryDirectory(prefix="mminference-toy-") as folder:
            clips = {length: _clips(length, options.videos, Path(folder)) for length in options.lengths}
            for setting in settings(options):
                with server(setting.backend, setting.config, setting.chunk) as running:
                    for length in options.lengths:
                        score = scores[setting.name, setting.chunk, length] = Score()
                        for clip in clips[length][: setting.videos]:
                            ask(running, score, clip.scene, clip.path)
                        _print_row(*_row(setting, length, score))
                    failures += [f"{setting.name}: a request ran dense: {f.reason}" for f in fallbacks(running.log())]
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    failures += judge(scores)
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"done in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.json is not None:
        options.json.write_text(json.dumps(_record(scores, failures), indent=1) + "\n")
    return 1 if failures else 0


def judge(scores: dict[tuple[str, int, int], Score]) -> list[str]:
    """The verdicts that are missed."""
    failures = []
    for (name, chunk, length), score in scores.items():
        dense, density = scores["dense", ONE_CHUNK, length], float(np.mean(score.densities))
        where = f"{name} at {length} tokens, {_size(chunk)}"
        if name == "control" and score.share("prev") >= CONTROL_CEILING:
            failures.append(f"{where}: it answers `prev`: {score.share('prev'):.3f}")
        if name != "mminference":
            continue
        failures += [
            f"{where}: {task} {score.share(task):.3f}, dense {dense.share(task):.3f}"
            for task in TASKS
            if score.share(task) < dense.share(task) - TOLERANCE
        ]
        if density >= 1:
            failures.append(f"{where}: nothing ran sparse")
    return failures


def _clips(length: int, videos: int, folder: Path) -> list[Clip]:
    rng = np.random.default_rng([SEED, length])
    clips = []
    for number in range(videos):
        scene = make_scene(rng, length // (ROWS * COLUMNS), ROWS, COLUMNS, change=CHANGE)
        clips.append(Clip(scene, write_mp4(folder / f"{length}-{number}.mp4", scene.frames(rng), FPS)))
    return clips


def _row(setting: Setting, length: int, score: Score) -> list[str]:
    right = [f"{score.right[task]}/{score.asked[task]}" for task in TASKS]
    return [setting.name, _size(setting.chunk), str(length), *right, f"{np.mean(score.densities):.4f}"]


def _size(chunk: int) -> str:
    return "one" if chunk == ONE_CHUNK else str(chunk)


def _print_row(*cells: str) -> None:
    print(f"{cells[0]:12}" + "".join(f"{cell:>10}" for cell in cells[1:]), flush=True)


def _record(scores: dict[tuple[str, int, int], Score], failures: list[str]) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "chunk": chunk,
            "tokens": length,
            "right": dict(score.right),
            "asked": dict(score.asked),
            "density": float(np.mean(score.densities)),
        }
        for (name, chunk, length), score in scores.items()
    ]
    return {
        **described(),
        "rows": rows,
        "failures": failures,
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--videos", type=int, default=VIDEOS, help="videos per length, 24 questions each")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, choices=LENGTHS)
    parser.add_argument("--errors", type=float, nargs="+", default=(), metavar="ERROR", help="further settings of it")
    parser.add_argument("--config", default="{}", help="JSON of further settings for mminference")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
