"""The Triton kernels: against the reference in Triton's interpreter, and compiled for Hopper and Blackwell.

Each runs in a process of its own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aot

HERE = Path(__file__).parent


def run(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(HERE / script), *arguments]
    env = {**os.environ, **environment, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attend_equals_reference_in_the_interpreter(dtype: str) -> None:
    """bf16 is not tested: the interpreter computes it wrong without a word."""
    lines = [json.loads(line) for line in run("interpret.py", dtype, TRITON_INTERPRET="1").splitlines()]
    assert {(line["pass"], line["merge"]) for line in lines} == {("near", False), ("far", True)}
    for line in lines:
        assert line["same_blind_rows"], line
        assert line["error"] <= 2 * line["plain_error"] + line["rounding"], line
        assert line["lse_error"] <= 2 * line["plain_lse_error"] + 1e-5, line


def test_attend_compiles_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    results = [json.loads(line) for line in run("aot.py", "90", "100").splitlines()]
    with capsys.disabled():
        print()
        for result in results:
            print("  ".join(f"{key}={value}" for key, value in result.items()))
    assert {(result["arch"], result["head_dim"]) for result in results} == {
        (arch, head_dim) for arch in (90, 100) for head_dim in (64, 128)
    }
    for result in results:
        assert result["stack"] == 0, result
        assert result["shared"] <= aot.SHARED_MEMORY[result["arch"]], result
