"""``make gpu-report``: what becomes of steps, and that each real one is given arguments that it takes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import first_hour
from benchmarks.gpu.first_hour import STEPS, Step

PRINTS = Step("prints", "an output", 30, ("-c", "print('said')"))
FAILS = Step("fails", "a failure", 30, ("-c", "print('before'); raise SystemExit(3)"))
HANGS = Step("hangs", "a time limit", 1, ("-c", "print('partial'); import time; time.sleep(60)"))
LACKS = Step("lacks", "a missing module", 30, ("-c", ""), needs=("no_such_module",))
WRITES = Step("writes", "a result", 30, ("-c", r"open(r'{output}/result.md', 'w').write('# Figures\n')"))
SCRIPTS = [step for step in STEPS if step.dry]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a report of other steps; their outcomes by name, in order."""
    monkeypatch.setattr(first_hour, "LEAST_SECONDS", 0.5)

    def run(*steps: Step, arguments: tuple[str, ...] = (), status: int | None = None) -> dict[str, dict]:
        monkeypatch.setattr(first_hour, "STEPS", steps)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            got = first_hour.main(["--dry-run", "--output", str(tmp_path), *arguments])
        finally:
            signal.signal(signal.SIGTERM, handler)
        assert status in (None, got)
        return {step["name"]: step for step in json.loads((tmp_path / "report.json").read_text())["steps"]}

    return run


def test_steps_run_in_order_whatever_becomes_of_them(run, tmp_path: Path) -> None:
    steps = run(FAILS, HANGS, LACKS, WRITES, PRINTS, status=1)
    assert {name: step["status"] for name, step in steps.items()} == {
        "fails": "failed",
        "hangs": "timed out",
        "lacks": "cannot run",
        "writes": "ok",
        "prints": "ok",
    }
    assert list(steps) == ["fails", "hangs", "lacks", "writes", "prints"]
    assert [steps[name]["tail"] for name in ("fails", "hangs", "prints")] == ["before", "partial", "said"]
    assert steps["fails"]["why"] == "ended with status 3"
    assert steps["lacks"]["why"] == "needs no_such_module"
    assert steps["hangs"]["seconds"] < 10
    assert steps["writes"]["files"] == ["writes/output.txt", "writes/result.md"]
    text = (tmp_path / "report.md").read_text()
    assert "| lacks | a missing module | cannot run | 0 | needs no_such_module |" in text
    assert "\n### Figures\n" in text


def test_a_later_call_adds_to_the_report(run) -> None:
    steps = FAILS, PRINTS
    assert run(*steps, arguments=("--only", "prints"), status=0).keys() == {"prints"}
    assert list(run(*steps, arguments=("--only", "fails"), status=1)) == ["fails", "prints"]


def test_no_step_begins_without_time(run) -> None:
    steps = run(HANGS, PRINTS, arguments=("--minutes", "0.02"), status=1)
    assert (steps["hangs"]["status"], steps["prints"]["why"]) == ("timed out", "no time is left")


def test_without_a_gpu_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert first_hour.run(PRINTS, tmp_path, 30, dry=False).why == "needs a CUDA device"
    assert not list(tmp_path.iterdir())


def test_a_killed_report_leaves_its_first_steps_and_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"""
from pathlib import Path
from benchmarks.gpu import first_hour
from benchmarks.gpu.first_hour import Step
hang = "import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
first_hour.STEPS = Step("prints", "", 30, ("-c", "print('said')")), Step("hangs", "", 60, ("-c", hang))
first_hour.main(["--dry-run", "--output", {str(tmp_path)!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=first_hour.ROOT)
    try:
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert [(step["name"], step["status"], step["tail"]) for step in steps] == [("prints", "ok", "said")]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_an_unknown_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        first_hour.main(["--only", "attend,nothing"])
    assert "no step nothing; there are selfcheck, " in capsys.readouterr().err


@pytest.mark.parametrize("step", SCRIPTS, ids=lambda step: step.name)
def test_scripts_take_their_arguments_and_write_results(step: Step, tmp_path: Path) -> None:
    """In this process; ``make gpu-report DRY=1`` starts one for each."""
    script = importlib.import_module(step.arguments[1])
    arguments = [argument.format(output=tmp_path) for argument in step.arguments[2:]]
    assert script.main([*arguments, *step.dry]) == 0
    assert list(tmp_path.iterdir())


def test_every_gpu_test_is_in_one_step() -> None:
    steps = [step.arguments[2:] for step in STEPS if step.arguments[1] == "pytest"]
    program = f"""
import pytest
class Names:
    def pytest_collection_finish(self, session):
        print("names", *sorted(item.nodeid.replace(" ", "") for item in session.items))
for arguments in {[*steps, ("tests/gpu",)]}:
    pytest.main(["--collect-only", "-qq", *arguments], [Names()])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=first_hour.ROOT, capture_output=True, text=True, check=True
    )
    *chosen, every = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("names"))
    assert len(chosen) == len(steps)
    assert all(chosen)
    assert sorted(name for names in chosen for name in names) == every


def test_self_check_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        first_hour.self_check()
    assert ended.value.code == 0
    assert "torch: ok" in capsys.readouterr().out


def test_the_bundle_tells_what_it_packs(tmp_path: Path) -> None:
    for name, size in (
        ("sglang-0.5.17-cp312.whl", 100),
        ("sglang_kernel-0.4.5-abi3.whl", 7),
        ("tokenizers-0.1-x.whl", 1),
    ):
        (tmp_path / "server").mkdir(exist_ok=True)
        (tmp_path / "server" / name).write_bytes(b"-" * size)
    command = ["scripts/gpu_bundle.sh", "--list", str(tmp_path)]
    done = subprocess.run(command, cwd=first_hour.ROOT, capture_output=True, text=True, check=True)
    rows = {" ".join(words[:2]): words[2:] for words in map(str.split, done.stdout.splitlines())}
    assert rows["server sglang==0.5.17"] == ["100"]
    assert rows["server sglang-kernel==0.4.5"] == ["7"]
    assert rows["server tokenizers==0.22.2"] == []
    assert rows["server in"] == ["all", "107"]
    assert {"kernels mminference-sgl", "kernels checkout", "packages xgrammar==0.2.1"} <= rows.keys()
