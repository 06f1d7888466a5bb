"""``mminference inspect`` and ``plot`` on a real server of a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mminference_sgl.backend import capture
from mminference_sgl.testing import write_mp4
from serving import ModelPath, squares

pytestmark = pytest.mark.server

LAYERS, HEADS = 2, 4
COMMAND = "import sys; from mminference_sgl.cli import main; sys.exit(main())"


def test_every_head_of_a_video(model_path: ModelPath, tmp_path: Path):
    clip = write_mp4(tmp_path / "clip.mp4", squares(24, 24, 8, 16))
    folder = tmp_path / "captures"
    arguments = ["--model-path", model_path("qwen2_5_vl"), "--video", clip, "--capture", folder, "--chunk", "509"]
    arguments += ["--server-args=--dtype float32 --context-length 8192", "--json"]
    command = [sys.executable, "-c", COMMAND, "inspect", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in json.loads(done.stdout) if line["rows"] == "media"]
    assert [(line["layer"], line["head"]) for line in lines] == [(i, h) for i in range(LAYERS) for h in range(HEADS)]
    for line in lines:
        assert line["pattern"] in {"grid", "vertical_slash", "dense"}
        assert 0 < line["density"] <= 1
        assert 0 < line["coverage"] <= 1.0001
        assert line["error"] >= 0
    found = [capture.load(path) for path in capture.files(folder)]
    assert max(one.layer_error for one in found) <= 0.07 * 1.01
    # All chunks are there, each with its part of the prompt behind the one before.
    chunks = [(one.about.prefix, one.about.chunk) for one in found if one.about.layer == 0]
    assert len(chunks) > 1
    assert chunks[1][0] == chunks[0][0] + chunks[0][1]
