"""``make gpu-report``: everything that is owed on a GPU, the most important first, in one command.

Needs CUDA, PyTorch and Triton, this checkout, and an installed mminference-sgl; what else a step needs it says itself.
Each step is a process of its own with a time limit, and what it prints and writes is kept in a folder of its name.
After every step ``report.md`` and ``report.json`` are written anew, and scripts write results line by line, so that
a machine that goes away has left what it measured. Steps of an earlier call stay in the report when a later one has the
same ``--output``, so an hour can be spent in pieces: ``--minutes 9``, then ``--only NAME,...``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu.report import RESULTS, environment, file_name, markdown, say

ROOT = Path(__file__).parents[2]
OUTPUT = "output.txt"
TAIL_LINES = 30
LEAST_SECONDS = 5.0
"""A step is not begun with less."""
TERM_GRACE_S = 20.0
"""For a step to end servers that it started, before it is killed."""
IMPORTANT = "(not test_fa4 and (bfloat16-128 or a_layer or (same_every_time and 128)))"
"""Tests of what most models would run: heads of 128 in bf16, and whole layers."""


@dataclass(frozen=True)
class Step:
    """``arguments`` of Python, where {output} is the step's folder; ``dry``: those that a dry run adds.

    ``needs``: modules without which it cannot run.
    """

    name: str
    shows: str
    seconds: float
    arguments: tuple[str, ...]
    dry: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


def _pytest(expression: str) -> tuple[str, ...]:
    """Tests without a stop at the first failure; warnings of other versions than the pinned ones are no failures."""
    return (
        "-m",
        "pytest",
        "-W",
        "default",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-k",
        expression,
        "tests/gpu",
    )


def _script(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.gpu.{name}", *arguments)


_DRY = ("--dry-run",)
_OUTPUT = ("--output", "{output}")
_CHUNK = (*_OUTPUT, "--chunks", "8K", "--no-fa3")
STEPS = (
    Step(
        "selfcheck",
        "implementations that run and are right for a usual layer",
        240,
        ("-c", "from benchmarks.gpu.first_hour import self_check; self_check()"),
    ),
    Step(
        "tests-important",
        "kernels against fp64, selection against the portable one: heads of 128 in bf16, whole layers",
        420,
        _pytest(IMPORTANT),
        needs=("pytest",),
    ),
    Step(
        "attend",
        "the attend kernel by stages and body, 16, 64 and 256 tiles per list",
        240,
        _script("attend", *_OUTPUT),
        _DRY,
    ),
    Step("profile", "time and launches by kernel, 32K and 128K", 180, _script("profile", *_OUTPUT), _DRY),
    Step(
        "tune",
        "the launch table's entry for heads of 128 by measurement",
        480,
        _script("tune", "--heads", "128", "--output", "{output}/launch_table.py"),
        _DRY,
    ),
    Step(
        "layer-128K",
        "one layer against dense cuDNN attention, 8K at 128K",
        240,
        _script("layer", "--tokens", "128K", "--densities", "5,10,100", "--name", "layer-128K", *_CHUNK),
        _DRY,
    ),
    Step(
        "layer-1M",
        "one layer against dense cuDNN attention, 8K at 1M",
        300,
        _script("layer", "--tokens", "1M", "--densities", "2,5,10", "--name", "layer-1M", *_CHUNK),
        _DRY,
    ),
    Step(
        "serving",
        "time to first token, dense, sparse, and what else SGLang has",
        1500,
        _script("serving", "--tokens", "32K,128K", "--rivals", *_OUTPUT),
        _DRY,
        ("sglang",),
    ),
    Step(
        "tests-others",
        "other dtypes, head sizes, tiles and implementations",
        900,
        _pytest(f"not {IMPORTANT} and not sanitizer"),
        needs=("pytest",),
    ),
    Step(
        "sanitizer",
        "memcheck, racecheck and initcheck of small problems",
        1200,
        _pytest("sanitizer"),
        needs=("pytest",),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a step: ok, failed, timed out or cannot run, and ``why``; ``files`` are relative to the report."""

    name: str
    status: str
    why: str = ""
    seconds: float = 0.0
    tail: str = ""
    files: list[str] = field(default_factory=list)


def self_check() -> None:
    """Prints what each implementation says; exits with 1 where the one that a server takes does not work."""
    from mminference_sgl.backend.selfcheck import check_implementations
    from mminference_sgl.kernels import ops

    states = check_implementations()
    print("\n".join(f"{name}: {state}" for name, state in states.items()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sys.exit(int(states[ops.resolve("auto", device)] != "ok"))


def obstacle(step: Step, *, dry: bool) -> str:
    """Why a step cannot run, or nothing."""
    if not dry and not torch.cuda.is_available():
        return "needs a CUDA device"
    missing = [module for module in ("mminference_sgl", *step.needs) if importlib.util.find_spec(module) is None]
    return f"needs {', '.join(missing)}" if missing else ""


def run(step: Step, folder: Path, seconds: float, *, dry: bool) -> Outcome:
    """One step, at most so many seconds long."""
    reason = obstacle(step, dry=dry)
    if not reason and seconds < LEAST_SECONDS:
        reason = "no time is left"
    if reason:
        return Outcome(step.name, "cannot run", reason)
    own = folder / step.name
    own.mkdir(parents=True, exist_ok=True)
    arguments = [argument.format(output=own) for argument in step.arguments]
    command = [sys.executable, *arguments, *(step.dry if dry else ())]
    begin = time.monotonic()
    with (own / OUTPUT).open("wb") as output:
        status = _wait(command, output.fileno(), seconds)
    took = time.monotonic() - begin
    if status is None:
        verdict, why = "timed out", f"was not done after {seconds:.0f} s"
    else:
        verdict, why = ("failed", f"ended with status {status}") if status else ("ok", "")
    tail = "\n".join((own / OUTPUT).read_text(errors="replace").splitlines()[-TAIL_LINES:])
    files = sorted(str(path.relative_to(folder)) for path in own.rglob("*") if path.is_file())
    return Outcome(step.name, verdict, why, round(took, 1), tail, files)


def _wait(command: Sequence[str], output: int, seconds: float) -> int | None:
    """The command's exit status, None where it was not done in time; its process group ends with this function."""
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for kind, grace in ((signal.SIGTERM, TERM_GRACE_S), (signal.SIGKILL, LEAST_SECONDS)):
            if process.poll() is None:
                os.killpg(process.pid, kind)
                # A process that waits for a hung device may not end at all.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)


def write(folder: Path, outcomes: Sequence[Outcome], found: dict[str, Any]) -> None:
    """``report.json`` and ``report.md``: a line per step, then each step's own results or the end of its output."""
    shows = {step.name: step.shows for step in STEPS}
    record = {**found, "steps": [asdict(each) for each in outcomes]}
    _replace(folder / "report.json", json.dumps(record, indent=1) + "\n")
    rows = [[each.name, shows[each.name], each.status, f"{each.seconds:.0f}", each.why] for each in outcomes]
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    parts = [f"# First hour on {found['device']}\n\n{versions}, {found['time']}.\n"]
    parts.append(f"{markdown(['step', 'what it shows', 'status', 's', 'why'], rows)}\n")
    for each in outcomes:
        if not each.files:
            continue
        results = [folder / name for name in each.files if name.endswith(".md")]
        # Their headings are below the step's.
        text = "\n".join(re.sub("^#", "###", path.read_text(), flags=re.MULTILINE) for path in results)
        shown = text if results and each.status == "ok" else f"{text}\n```\n{each.tail}\n```\n"
        parts.append(f"## {each.name}: {each.status}\n\n{', '.join(each.files)}\n\n{shown}")
    _replace(folder / "report.md", "\n".join(parts))


def _replace(path: Path, text: str) -> None:
    """Writes a file that is at no time half written."""
    new = path.with_name(f".{path.name}")
    new.write_text(text)
    new.replace(path)


def earlier(folder: Path) -> dict[str, Outcome]:
    """What a report that is there already says, by step."""
    path = folder / "report.json"
    if not path.exists():
        return {}
    return {step["name"]: Outcome(**step) for step in json.loads(path.read_text())["steps"]}


def report(options: argparse.Namespace, folder: Path, found: dict[str, Any]) -> Iterator[Outcome]:
    """Runs the steps asked for; the report is written before each outcome is given."""
    outcomes = earlier(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for step in STEPS:
        if step.name not in options.only:
            continue
        outcome = run(step, folder, min(step.seconds, end - time.monotonic()), dry=options.dry_run)
        outcomes[step.name] = outcome
        write(folder, [outcomes[each.name] for each in STEPS if each.name in outcomes], found)
        yield outcome


def _names(text: str) -> list[str]:
    names, known = text.split(","), [step.name for step in STEPS]
    if unknown := set(names).difference(known):
        raise argparse.ArgumentTypeError(f"no step {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return names


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for all steps together")
    parser.add_argument("--only", type=_names, default=[step.name for step in STEPS], help="NAME,...")
    parser.add_argument("--output", type=Path, help="folder; by default one of the device and the day")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and stand-ins on the CPU")
    options = parser.parse_args(argv)
    # A step's processes end with this one.
    signal.signal(signal.SIGTERM, _leave)
    cuda = torch.cuda.is_available() and not options.dry_run
    found = environment(torch.device("cuda" if cuda else "cpu"))
    folder = options.output or RESULTS / f"{file_name(found['device'])}-{time.strftime('%F')}"
    statuses = set()
    for outcome in report(options, folder.resolve(), found):
        statuses.add(outcome.status)
        say(f"{outcome.name}: {outcome.status} {outcome.why} ({outcome.seconds:.0f} s)")
    say(f"written: {folder / 'report.md'}")
    return int(statuses != {"ok"})


if __name__ == "__main__":
    sys.exit(main())
