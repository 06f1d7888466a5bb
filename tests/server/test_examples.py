"""The programs of examples/ on the toy model, and the options of launches that need GPUs."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.toy.serving import CHECKPOINT, CLIP_FPS
from commands import unknown_options
from mminference_sgl.testing import Server, prefills

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SETTINGS = {"MMINFERENCE_CONFIG": json.dumps({"min_tokens": 0}), "MMINFERENCE_LOG": "debug"}
VIDEO = json.dumps({"video": {"fps": CLIP_FPS}})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    arguments = ["--mm-process-config", VIDEO]
    with Server(
        CHECKPOINT, attention_backend="mminference", warm=True, quick=True, args=arguments, env=SETTINGS
    ) as one:
        yield one


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A video for the toy, and the right answer to each question."""
    path = tmp_path_factory.mktemp("examples") / "clip.mp4"
    command = [sys.executable, "-m", "examples.toy_video", str(path), "16"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return str(path), dict(line.split(": ") for line in told.splitlines())


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """A program, in this process: SGLang is imported here already."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_openai_client(server, clip, monkeypatch, capsys):
    path, answers = clip
    question = next(iter(answers))
    run("ask_video.py", monkeypatch, path, question, f"{server.url}/v1")
    assert capsys.readouterr().out.strip().lower() == answers[question]


def test_frontend_program_prefills_the_video_once(server, clip, monkeypatch, capsys):
    path, answers = clip
    questions = list(answers)[:3]
    mark = len(server.log())
    server.flush_cache()
    run("frontend.py", monkeypatch, path, *questions, "--url", server.url)
    told = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    assert {q: a.strip().lower() for q, a in told} == {q: answers[q] for q in questions}
    assert sum(p.chunk for p in prefills(server.log(mark)) if not p.prefix) < 2 * 16 * 128


def test_load_test(server, clip, monkeypatch, tmp_path, capsys):
    path, answers = clip
    monkeypatch.chdir(tmp_path)
    options = ("--", "--request-rate", "4", "--goodput", "ttft:60000")
    run("load_test.py", monkeypatch, server.url, next(iter(answers)), path, path, *options)
    capsys.readouterr()
    record = json.loads((tmp_path / "load-test.jsonl").read_text())
    assert record["completed"] == 2
    assert record["slo_attainment"] == 1


def test_offline_engine(clip, tmp_path):
    path, answers = clip
    question = next(iter(answers))
    engine = {"device": "cpu", "mem_fraction_static": 0.2, "max_total_tokens": 16384, "disable_overlap_schedule": True}
    engine["mm_process_config"] = json.loads(VIDEO)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "offline_engine.py"), str(CHECKPOINT), path, question, json.dumps(engine)],
        env=Server(CHECKPOINT, env=SETTINGS)._env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1].strip().lower() == answers[question]
    assert prefills(done.stderr + done.stdout)


@pytest.mark.parametrize("name", ["disaggregated.sh", "two_nodes.sh"])
def test_launches_have_options_that_sglang_knows(name):
    text = (EXAMPLES / name).read_text().replace("\\\n", " ")
    subprocess.run(["bash", "-n", str(EXAMPLES / name)], check=True)
    commands = [line.rstrip(" &") for line in text.splitlines() if line.startswith("python -m sglang.launch_server")]
    assert commands
    assert [unknown_options(command) for command in commands] == [[]] * len(commands)


def test_dockerfile_is_of_the_release_that_is_tested():
    pinned = re.search(r"^sglang==(\S+)$", (ROOT / "requirements" / "dev.in").read_text(), re.MULTILINE)
    images = re.findall(r"^FROM (\S+)", (EXAMPLES / "Dockerfile").read_text(), re.MULTILINE)
    assert pinned
    assert set(images) == {f"lmsysorg/sglang:v{pinned[1]}"}


def test_every_example_is_listed():
    listed = set(re.findall(r"\[\S+\]\((\w+\.?\w*)\)", (EXAMPLES / "README.md").read_text()))
    assert listed == {file.name for file in EXAMPLES.iterdir() if file.is_file()} - {"README.md"}
