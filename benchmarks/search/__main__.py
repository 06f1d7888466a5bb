"""``make demo-search``: a searched pattern file beside single patterns, at one limit on tiles.

The toy model (benchmarks/toy) is searched on one generated mp4 with `mminference search`, another one held out. Then a
real server answers the questions about the held-out video: under the searched file, under `auto`, and under one pattern
for all heads, each with the same `max_density` and without the guard, so that every setting has the same tiles to spend
and keeps what it lost. Chunks are as the backend's log tells them: *mass* is the probe rows' coverage, *error* the
largest of a layer's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.toy.scenes import TASKS, Scene, make_scene
from benchmarks.toy.serving import CHANGE, CHECKPOINT, CLIP_FPS, COLUMNS, FPS, GUARD_OFF, ROWS, Score, ask, server
from mminference_sgl.portable.cpu import PLATFORM_NAME
from mminference_sgl.testing import ServerError, prefills, write_mp4

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 20260501
PATCHES, DENSITY = 64, 0.3
CHUNK = 2048
ERROR = 0.02
"""So small that the limit on tiles alone decides."""
SERVER = ("--mm-process-config", json.dumps({"video": {"fps": CLIP_FPS}}), "--chunked-prefill-size", str(CHUNK))
CPU = ("--device", "cpu", "--max-total-tokens", "40960", "--mem-fraction-static", "0.2", "--disable-overlap-schedule")


def main(argv: Sequence[str] | None = None) -> int:
    """Search, serve and print; 1 when a server fails."""
    options = _arguments(argv)
    with tempfile.TemporaryDirectory(prefix="mminference-search-") as name:
        folder = Path(name)
        scenes, videos = clips(folder, options.patches)
        output = options.output or folder / "toy.json"
        if not options.output or not output.exists():
            status = search(scenes, videos, output, options.density)
            if status:
                return status
        window = json.loads(output.read_text())["config"]["patterns"]
        print(f"\n{scenes[1].tokens} video tokens, chunks of {CHUNK}, max_density {options.density:g}\n")
        print(f"{'pattern':16}{'mass':>8}{'density':>9}{'error':>8}", *(f"{task:>6}" for task in TASKS))
        try:
            for pattern in (str(output), "auto", "grid", "a_shape", "vertical_slash"):
                config = {"pattern": pattern, "min_tokens": 0, "error": ERROR, "error_ceiling": GUARD_OFF}
                config |= {"max_density": options.density, "patterns": window}
                score = Score()
                with server("mminference", config, CHUNK, quick=True) as running:
                    ask(running, score, scenes[1], videos[1])
                    chunks = prefills(running.log())
                mass = sum(p.coverage * p.chunk for p in chunks) / sum(p.chunk for p in chunks)
                label = "searched" if pattern == str(output) else pattern
                figures = f"{label:16}{mass:8.3f}{score.densities[0]:9.3f}{max(p.error for p in chunks):8.3f}"
                print(figures, *(f"{score.right[task]}/{score.asked[task]}".rjust(6) for task in TASKS), flush=True)
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def clips(folder: Path, patches: int = PATCHES) -> tuple[list[Scene], list[Path]]:
    """The scene that is searched on and the one that is held out, as videos in a folder."""
    rng = np.random.default_rng(SEED)
    scenes = [make_scene(rng, patches, ROWS, COLUMNS, change=CHANGE) for _ in range(2)]
    return scenes, [write_mp4(folder / f"{i}.mp4", scene.frames(rng), FPS) for i, scene in enumerate(scenes)]


def search(scenes: Sequence[Scene], videos: Sequence[Path], output: Path, density: float = DENSITY) -> int:
    """Runs `mminference search` on the toy; returns its exit status."""
    command = [str(Path(sys.executable).with_name("mminference")), "search", "--model-path", str(CHECKPOINT)]
    command += ["--video", str(videos[0]), "--held-out", str(videos[1]), "--text", scenes[0].questions()[0].text]
    records = videos[0].with_name("records")
    command += ["--density", str(density), "--name", "toy", "--folder", str(records), "-o", str(output), "--", *SERVER]
    if torch.cuda.is_available():
        return subprocess.run(command, check=False).returncode
    env = os.environ | {"SGLANG_PLATFORM": PLATFORM_NAME}
    return subprocess.run([*command, *CPU], env=env, check=False).returncode


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--patches", type=int, default=PATCHES, help="temporal patches of each video, 128 tokens each")
    parser.add_argument("--density", type=float, default=DENSITY)
    parser.add_argument("--output", type=Path, help="keep the pattern file there; one that is there is not made again")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
