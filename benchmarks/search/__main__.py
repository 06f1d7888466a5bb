"""``make demo-search``: a searched pattern file beside single patterns, at one limit on tiles.

The toy model (benchmarks/toy) is searched on one generated mp4 with `mminference search`, another one held out. Then,
under the searched file, under `auto`, and under one pattern for all heads, each with the same `max_density` and without
the guard: *error*, *mass* and *density* are measured by the search's engine in a prefill of the held-out video, over
all of its rows, as the root of the mean squared error of the layers' outputs; and a real server answers the questions
about that video.
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
from mminference_sgl.method import catalog
from mminference_sgl.portable.cpu import PLATFORM_NAME
from mminference_sgl.testing import ServerError, write_mp4

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 20260501
PATCHES, DENSITY = 64, 0.3
CHUNK = 2048
SEARCHED = "searched"
ERROR = 0.02
"""So small that the limit on tiles alone decides."""
SERVER = ("--mm-process-config", json.dumps({"video": {"fps": CLIP_FPS}}), "--chunked-prefill-size", str(CHUNK))
CPU = ("--device", "cpu", "--max-total-tokens", "40960", "--mem-fraction-static", "0.2", "--disable-overlap-schedule")


def main(argv: Sequence[str] | None = None) -> int:
    """Search, serve and print; 1 when a server fails."""
    options = _arguments(argv)
    with tempfile.TemporaryDirectory(prefix="mminference-search-") as made:
        folder = Path(made)
        scenes, videos = clips(folder, options.patches)
        output = options.output or folder / "toy.json"
        if not options.output or not output.exists():
            status = search(scenes[0].questions()[0].text, videos, output, options.density)
            if status:
                return status
        found = catalog.read(output)
        window = found.config["patterns"]
        figures = measured(found, folder, scenes[0].questions()[0].text, videos[1], options.density)
        print(f"\n{scenes[1].tokens} video tokens, chunks of {CHUNK}, max_density {options.density:g}\n")
        print(f"{'pattern':16}{'mass':>8}{'density':>9}{'error':>8}", *(f"{task:>6}" for task in TASKS))
        try:
            for name, of in figures.items():
                pattern = str(output) if name == SEARCHED else name
                config = {"pattern": pattern, "min_tokens": 0, "error": ERROR, "error_ceiling": GUARD_OFF}
                config |= {"max_density": options.density, "patterns": window}
                score = Score()
                with server("mminference", config, CHUNK, quick=True) as running:
                    ask(running, score, scenes[1], videos[1])
                line = f"{name:16}{of['mass']:8.3f}{of['density']:9.3f}{of['error']:8.3f}"
                print(line, *(f"{score.right[task]}/{score.asked[task]}".rjust(6) for task in TASKS), flush=True)
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def measured(
    found: catalog.PatternFile, folder: Path, text: str, video: Path, density: float
) -> dict[str, dict[str, float]]:
    """What the patterns lose on a video, by name."""
    layers, heads = range(found.model.layers or 0), range(found.model.heads or 0)
    maps = {SEARCHED: {layer: found.specs(layer, heads) for layer in layers}}
    for name in ("auto", "grid", "a_shape", "vertical_slash"):
        maps[name] = {layer: catalog.load(name).specs(layer, heads) for layer in layers}
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["SGLANG_PLATFORM"] = PLATFORM_NAME
    # SGLang looks for its platform when it is first imported.
    from mminference_sgl.cli.search import Clip, compare, engine

    window, records = found.config["patterns"]["a_shape"]["window"], folder / "compared"
    with engine(str(CHECKPOINT), text, records, [*SERVER, *([] if gpu else CPU)]) as prefill:
        return compare(records, Clip.of(video), prefill, maps, density, window)


def clips(folder: Path, patches: int = PATCHES) -> tuple[list[Scene], list[Path]]:
    """The scene that is searched on and the one that is held out, as videos in a folder."""
    rng = np.random.default_rng(SEED)
    scenes = [make_scene(rng, patches, ROWS, COLUMNS, change=CHANGE) for _ in range(2)]
    return scenes, [write_mp4(folder / f"{i}.mp4", scene.frames(rng), FPS) for i, scene in enumerate(scenes)]


def search(
    text: str, videos: Sequence[Path], output: Path, density: float = DENSITY, model: str | Path = CHECKPOINT
) -> int:
    """Runs `mminference search` on one of two videos, with the other held out; returns its exit status."""
    command = [str(Path(sys.executable).with_name("mminference")), "search", "--model-path", str(model)]
    command += ["--video", str(videos[0]), "--held-out", str(videos[1]), "--text", text, "--density", str(density)]
    command += ["--name", output.stem, "--folder", str(output.with_suffix(".records")), "-o", str(output)]
    command += ["--", *SERVER]
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
