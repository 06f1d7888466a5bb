"""Commands of the README and of docs/: each is run by a test or says what it needs, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import PAGES, ROOT, Command, commands, targets, unknown_options

RUN_BY = {
    "make venv": "scripts/bootstrap.sh",
    "make lint": ".ci/run",
    "make test": ".ci/run",
    "make demo": "tests/benchmarks/test_demo.py",
    "make bench-serving": "tests/benchmarks/test_serving.py",
    "make soak": "tests/benchmarks/test_serving.py",
    "curl -s http://127.0.0.1:30000/metrics": "tests/server/test_metrics.py",
    "make figures": "tests/benchmarks/test_figures.py",
    "make docs": "tests/package/test_documentation.py",
    "mminference doctor": "tests/package/test_cli.py",
    "mminference bench": "tests/package/test_bench.py",
    "mminference check-model": "tests/package/test_check_model.py",
    "mminference inspect": "tests/server/test_inspect.py",
    "mminference plot": "tests/package/test_plot.py",
    "mminference search": "tests/server/test_search.py",
    "mminference patterns": "tests/package/test_patterns.py",
    "python -m sglang.launch_server": "tests/server/test_real_server.py",
    "python -m examples.toy_video": "tests/server/test_examples.py",
    "python examples/ask_video.py": "tests/server/test_examples.py",
    "export 'MMINFERENCE_CONFIG": "tests/method/test_config.py",
    "export MMINFERENCE_LOG": "tests/server/test_real_server.py",
}
"""Beginning of a command -> what runs it or, where it takes many minutes, its parts."""
NEEDS = {"gpu", "real weights", "index", "network"}
_FLAG = re.compile(r"`(--[a-z][\w-]+)")
_PATH = re.compile(r"`((?:benchmarks|docs|examples|kernels|patterns|python|requirements|rust|scripts|tests)/[\w./-]+)`")
_MAKE = re.compile(r"`make ([a-z-]+)[^`]*`")
ALL = [pytest.param(command, id=f"{page.name}: {command}"[:90]) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", ALL)
def test_command_is_run_or_says_what_it_needs(command: Command) -> None:
    needs = {need.strip() for need in command.needs.split(",") if need}
    assert needs <= NEEDS
    runners = [path for beginning, path in RUN_BY.items() if str(command).startswith(beginning)]
    assert needs or runners, f"{command}: name a test in RUN_BY, or say <!-- needs: ... --> before the block"
    for path in runners:
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("command", ALL)
def test_command_has_options_that_exist(command: Command) -> None:
    assert unknown_options(command) == []


def test_runners_run_what_they_are_named_for() -> None:
    words = {beginning: beginning.split()[-1].rpartition("/")[2] for beginning in RUN_BY}
    text = {beginning: (ROOT / path).read_text() for beginning, path in RUN_BY.items()}
    stale = {b for b, word in words.items() if b.startswith(("mminference", "python examples")) and word not in text[b]}
    assert stale == set()


def test_commands_are_found() -> None:
    assert len(ALL) > 20
    assert "make no-such" not in {str(p.values[0]) for p in ALL}
    bad = Command("x", ("make", "no-such"), "")
    assert unknown_options(bad) == ["no-such"]
    assert unknown_options("mminference bench --no-such 1") == ["--no-such"]
    assert unknown_options("python -m sglang.launch_server --no-such 1 --tp 2") == ["--no-such"]
    assert unknown_options("python no/such.py") == ["no/such.py"]
    assert unknown_options("make bench-serving 'BENCH_ARGS=--no-such --quick'") == ["--no-such"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_say_what_they_are(page: Path) -> None:
    fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences[::2]) <= {"bash", "json", "python", "text"}, "commands are bash, output is text"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_targets_of_the_text_exist(page: Path) -> None:
    text = page.read_text()
    assert [path for path in _PATH.findall(text) if not list(ROOT.glob(path.rstrip("/")))] == []
    assert sorted(set(_MAKE.findall(text)) - targets()) == []


def test_site_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    assert 'href="quick-start.html"' in home
    assert "<h1" in (tmp_path / "repository/patterns/index.html").read_text()
    assert not re.search(
        r'(?:src|href)="https?://(?!127|github|squidfunk|semver|[\w.]*arxiv)[^"]*\.(?:js|css|woff2?)', home
    )
