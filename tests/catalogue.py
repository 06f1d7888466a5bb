"""Pattern files of the tiny models, in tiny_models/patterns: ``python tests/catalogue.py [names]`` makes them anew.

Each is what `mminference search` finds on one clip. Models that no chat can give a video have none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny_models
from mminference_sgl.portable.cpu import PLATFORM_NAME
from mminference_sgl.testing import write_mp4
from serving import of_frames, squares, words

FOLDER = Path(__file__).parent / "tiny_models" / "patterns"
WITHOUT_VIDEO = ("gemma3", "kimi_vl", "llava_onevision")
DENSITY, DATE = 0.5, "2026-11-27"
CHUNK = 509
SERVER = [
    *("--device", "cpu", "--dtype", "float32", "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "16384"),
    *("--mem-fraction-static", "0.2", "--disable-overlap-schedule", "--context-length", "8192"),
]


_ARGUMENTS = {
    "nvila": ["--trust-remote-code", *of_frames(24)],
    "nvila_lite": ["--trust-remote-code", *of_frames(24)],
    "llava_video": of_frames(15),
    "llava_video_frame": of_frames(27),
}


def arguments(name: str) -> list[str]:
    """Those of a model's server."""
    return [*SERVER, *_ARGUMENTS.get(name, [])]


def search(name: str, checkpoint: Path, output: Path) -> None:
    """Searches a tiny model; raises if that fails."""
    clip = write_mp4(output.with_suffix(".mp4"), squares(24, 24, 8, 16))
    command = [str(Path(sys.executable).with_name("mminference")), "search", "--model-path", str(checkpoint)]
    command += ["--video", str(clip), "--text", words(1, 60), "--density", str(DENSITY), "--name", f"tiny-{name}"]
    command += ["--date", DATE, "-o", str(output), "--", *arguments(name)]
    subprocess.run(command, env=os.environ | {"SGLANG_PLATFORM": PLATFORM_NAME}, check=True)


def main(names: list[str]) -> None:
    """Makes the files of some models, or of all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or [one for one in tiny_models.BUILDERS if one not in WITHOUT_VIDEO]:
        with tempfile.TemporaryDirectory(prefix="mminference-catalogue-") as folder:
            checkpoint, output = Path(folder) / name, Path(folder) / f"{name}.json"
            tiny_models.build(name, checkpoint)
            search(name, checkpoint, output)
            (FOLDER / output.name).write_text(output.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
