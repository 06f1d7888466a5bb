"""`mminference search` on a real model: interrupted, resumed, and what it wrote served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import catalogue
import serving
from benchmarks.search import __main__ as demo
from mminference_sgl.method import catalog
from mminference_sgl.portable.cpu import PLATFORM_NAME
from mminference_sgl.testing import write_mp4
from serving import ModelPath, squares, words

pytestmark = pytest.mark.server

HEADS, LAYERS = 4, 2


def command(model: Path, clip: Path, output: Path) -> list[str]:
    given = [
        "--model-path",
        str(model),
        "--video",
        str(clip),
        "--text",
        words(1, 60),
        "--density",
        str(catalogue.DENSITY),
    ]
    script = str(Path(sys.executable).with_name("mminference"))
    return [script, "search", *given, "--date", "2026-01-02", "-o", str(output), "--", *catalogue.SERVER]


def _heed_ctrl_c() -> None:
    """What runs in the background of a shell inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_search_is_interrupted_goes_on_and_is_served(model_path: ModelPath, tmp_path: Path):
    model, clip = model_path("qwen2_5_vl"), write_mp4(tmp_path / "clip.mp4", squares(24, 24, 8, 16))
    output, env = tmp_path / "searched.json", os.environ | {"SGLANG_PLATFORM": PLATFORM_NAME}
    with subprocess.Popen(
        command(model, clip, output),
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_ctrl_c,  # noqa: PLW1509
    ) as first:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*/scores/*/layer*.npz")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.send_signal(signal.SIGINT)
        said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "goes on from there" in said
    assert not output.exists()

    # That an uninterrupted search writes the same file is tests/package/test_search.py's to show.
    again = command(model, clip, output)
    done = subprocess.run(again, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

    content = json.loads(output.read_text())
    assert content["model"] == {
        "id": "qwen2_5_vl",
        "architecture": "Qwen2_5_VLForConditionalGeneration",
        "layers": LAYERS,
        "heads": HEADS,
        "kv_heads": 2,
        "head_dim": 32,
    }
    maps = {pattern for rule in content["heads"] for pattern in rule["map"].values()}
    assert maps - {"auto", "dense"}, "heads have patterns of their own"
    assert len(content["measured"]) == LAYERS * HEADS
    assert all(0 < one["error"] < 1 and 0 < one["density"] < 1 for one in content["measured"])

    config = {"pattern": str(output), "min_tokens": 256, "error": 0.2}
    with serving.start(model, catalogue.CHUNK, "mminference", config=config) as server:
        mark = len(server.log())
        server.chat([serving.user_message(words(1, 60), videos=[str(clip)])], 1)
        prefills = serving.prefills(server.log(mark))
    assert prefills
    assert any(one.density < 1 for one in prefills)


def test_the_toy_of_the_catalogue_is_what_a_search_finds(tmp_path: Path):
    """On any machine: settings are the same, and maps but for a few heads that are about as good with another one.

    Processors round differently, which decides where maps are a tie; on one machine two searches find the same file.
    """
    scenes, videos = demo.clips(tmp_path)
    output = tmp_path / "toy.json"
    assert demo.search(scenes[0].questions()[0].text, videos, output) == 0
    found, kept = catalog.read(output), catalog.load("toy-searched")
    assert (found.model, found.config) == (kept.model, kept.config)
    assert found.model.layers is not None
    assert found.model.heads is not None
    same = 0
    for one, other in zip(found.measured, kept.measured, strict=True):
        assert (one["layer"], one["head"]) == (other["layer"], other["head"])
        equal = found.spec(one["layer"], one["head"]) == kept.spec(one["layer"], one["head"])
        same += equal
        # The limit on tiles is one for a layer's heads, so another map of one head moves the others a little.
        assert one["error"] == pytest.approx(other["error"], rel=0.1, abs=0.01)
    assert same >= 0.9 * found.model.layers * found.model.heads
