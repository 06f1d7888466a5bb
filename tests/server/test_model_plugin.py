"""The models of this package behind every way to start SGLang, and what stock SGLang answers in their place.

Stock's failures are asserted: on the day SGLang mends one, its test says that ours is no longer needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import serving
from mminference_sgl.portable.cpu import PLATFORM_NAME
from mminference_sgl.testing import Server, ServerError, write_mp4
from serving import ModelPath, squares, words

pytestmark = pytest.mark.server

STOCK = "mminference,portable_cpu"
"""Plugins without the models."""
PROMPT = f"{words(1, 60)}<vila/video>{words(3, 20)}"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4", squares(24, 24, 6, 8)))


def ask(server: Server, clip: str) -> list[int]:
    return list(server.generate(PROMPT, video_data=[clip], max_tokens=4).token_ids)


@pytest.fixture(scope="module")
def launched(model_path: ModelPath, clip: str) -> list[int]:
    with serving.start(model_path("longvila"), 509, "mminference") as server:
        return ask(server, clip)


def test_sglang_serve_answers_as_launch_server(model_path: ModelPath, clip: str, launched: list[int]):
    server = serving.start(model_path("longvila"), 509, "mminference", warm=False)
    server.command[:3] = [str(Path(sys.executable).with_name("sglang")), "serve"]
    with server:
        assert ask(server, clip) == launched


def test_two_ranks_answer_as_one(model_path: ModelPath, clip: str, launched: list[int]):
    """Each has the whole tower, and half of the language model's heads."""
    args, env = serving.in_ranks(2)
    with serving.start(model_path("longvila"), 509, "mminference", args, **env) as server:
        assert ask(server, clip) == launched


ENGINE = """
import json, sys
import sglang

if __name__ == "__main__":
    model, clip, prompt = sys.argv[1:]
    engine = sglang.Engine(
        model_path=model, attention_backend="mminference", device="cpu", dtype="float32", chunked_prefill_size=509,
        max_total_tokens=16384, mem_fraction_static=0.2, disable_overlap_schedule=True, context_length=8192,
    )
    sampling = {"temperature": 0, "max_new_tokens": 4}
    answer = engine.generate(prompt=prompt, video_data=[clip], sampling_params=sampling)
    print("IDS", json.dumps(answer["output_ids"]))
    engine.shutdown()
"""


def test_the_engine_answers_as_launch_server(
    model_path: ModelPath, clip: str, launched: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    monkeypatch.setenv("SGLANG_PLATFORM", PLATFORM_NAME)
    monkeypatch.setenv("MMINFERENCE_CONFIG", json.dumps(serving.EXACT))
    command = [sys.executable, str(script), str(model_path("longvila")), clip, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("IDS")] or [done.stderr[-3000:]]
    assert json.loads(line.removeprefix("IDS ")) == launched


def test_stock_does_not_know_longvila(model_path: ModelPath):
    with pytest.raises(ServerError, match="llava_llama"):
        serving.start(model_path("longvila"), 509, None, warm=False, SGLANG_PLUGINS=STOCK).__enter__()


def test_sglangs_llava_answers_400_to_a_video(model_path: ModelPath, clip: str):
    """LLaVA-Video's checkpoints have its architecture; LLaVA-OneVision's stay with it."""
    args = ("--dtype", "float16")
    with (
        serving.start(model_path("llava_onevision"), 509, None, args) as server,
        pytest.raises(ServerError, match="answered 400"),
    ):
        server.generate("what is <image>", video_data=[clip], max_tokens=4)


def test_stock_answers_500_to_a_video_for_nvila(model_path: ModelPath, clip: str):
    args = ("--trust-remote-code",)
    with (
        serving.start(model_path("nvila_lite"), 509, None, args, warm=False, SGLANG_PLUGINS=STOCK) as server,
        pytest.raises(ServerError, match="answered 500"),
    ):
        ask(server, clip)
