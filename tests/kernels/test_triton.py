"""The Triton attend kernel: against the reference in Triton's interpreter, and compiled for GPUs without one.

Both run in processes of their own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import aot
import interpret
import problems
from mminference_sgl.kernels import attend
from mminference_sgl.kernels.launch_table import (
    ARCHITECTURES,
    HEAD_DIMS,
    NATIVE_DESCRIPTORS,
    TABLE,
    Launch,
    fitted,
    lookup,
)
from test_attention import random_lists

HERE = Path(__file__).parent


def output(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, str(HERE / script), *arguments]
    path = os.pathsep.join(map(str, (HERE, HERE.parent)))
    env = {**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(script: str, *arguments: str, **environment: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output(script, *arguments, **environment).splitlines()]


_CORES = ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def interpret_side_by_side(*commands: tuple[str, ...]) -> list[Future[list[dict[str, Any]]]]:
    """What scripts print that run in the interpreter, each on a core: what the first test waits for serves the others.

    All cases of a script in one process: starting it takes longer than most of them.
    """
    return [_CORES.submit(run, *command, TRITON_INTERPRET="1") for command in commands]


DTYPES = ("float32", "float16")


@cache
def _interpreted() -> dict[str, Future[list[dict[str, Any]]]]:
    return dict(zip(DTYPES, interpret_side_by_side(*(("interpret.py", dtype) for dtype in DTYPES)), strict=True))


def interpreted(dtype: str) -> list[dict[str, Any]]:
    return _interpreted()[dtype].result()


@pytest.mark.parametrize("case", interpret.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_equals_reference_in_the_interpreter(dtype: str, case: interpret.Case) -> None:
    """bf16 is not tested: the interpreter computes it wrong without a word."""
    lines = [line for line in interpreted(dtype) if line["case"] == case.name]
    assert [line["pass"] for line in lines] == ["near", "far", "near"]
    for line in lines:
        assert line["same_blind_rows"], line
        allowed = 2 * line["plain_error"] + line["rounding"]
        assert line["error"] <= allowed, line
        assert line["outside"] <= allowed, line
        assert line["lse_error"] <= 2 * line["plain_lse_error"] + 1e-5, line


@pytest.mark.parametrize("dtype", DTYPES)
def test_descriptors_give_the_same_bits_as_pointers(dtype: str) -> None:
    cases = {case.name for case in interpret.CASES if case.launch is not None and case.launch.descriptors}
    assert len(cases) == 5
    lines = interpreted(dtype)
    for line in lines:
        assert line["described"] == (2 if line["case"] in cases else 0), line
    assert all(line["same"] for line in lines if line["case"] in cases)


def test_rests_of_long_lists_are_programs_of_their_own() -> None:
    """As many as there may be; all other cases have shorter lists."""
    for line in interpreted("float32"):
        case = next(case for case in interpret.CASES if case.name == line["case"])
        assert (line["pieces"] > 0) == (case.split < 10), line
        assert line["pieces"] <= case.pieces
        assert line["ordered"], line
    assert any(line["pieces"] >= 10 for line in interpreted("float32") if line["case"] == "too-many-pieces")


def test_interpreted_lists_are_of_every_kind() -> None:
    lines = interpreted("float32")
    for region in ("near", "far"):
        own = [line for line in lines if line["pass"] == region]
        assert any(line["empty_lists"] for line in own)
        assert any(line["single_tiles"] for line in own)
        assert any(line["full_tiles"] for line in own)
        assert any(line["tiles"] > line["full_tiles"] for line in own)


def test_checks_of_the_gpu_tests_run_without_one() -> None:
    """What `make test-gpu` and compute-sanitizer run, on their smallest shapes in the interpreter."""
    lines = output("../gpu/checks.py", "--device", "cpu", TRITON_INTERPRET="1").splitlines()
    assert len(lines) == 6
    assert all(line.startswith("ok") for line in lines)


AHEAD = {(arch, head) for arch in (90, 100) for head in (80, 96, 128)} | {(90, 64)}
"""Where keys and values of two steps are under way in every loop, beside those that are computed with."""


def test_every_table_entry_compiles_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    results = [aot.Compiled(**{**line, "launch": Launch(*line["launch"])}) for line in run("aot.py", "--json")]
    with capsys.disabled():
        print()
        print("\n".join(aot.table(results)))
        print("\n".join(aot.cost_table(results)))
    assert {entry for entry in TABLE if entry[0] != 89} <= {(result.arch, result.head_dim) for result in results}
    assert [result for result in results if result.bulk_loads] == [r for r in results if r.launch.descriptors]
    assert not [result for result in results if not result.fits]
    served = [r for r in results if r.dtype != "fp32" and r.launch.rows == 128]
    assert not [r for r in served if (r.arch, r.head_dim) in AHEAD and r.ahead < 2], "two steps are under way"
    assert not [r for r in results if r.dtype != "fp32" and r.ahead < 1], "the next step is under way"
    assert not [loop for r in results for loop in r.loops if loop["stack"]]
    # Over full tiles, and over those that compare positions.
    assert all(len(r.loops) == 2 for r in results if r.dtype != "fp32")


def test_every_architecture_and_head_size_has_an_entry() -> None:
    assert set(TABLE) == {(arch, head) for arch in ARCHITECTURES for head in HEAD_DIMS}
    assert lookup(103, 72, 2) == TABLE[100, 80]
    assert lookup(87, 16, 2) == TABLE[86, 64]
    with pytest.raises(ValueError, match="capability 7"):
        lookup(75, 64, 2)
    with pytest.raises(ValueError, match="320"):
        lookup(90, 320, 2)


def test_descriptors_are_taken_where_device_and_head_allow_them() -> None:
    assert not [arch for (arch, _), launch in TABLE.items() if launch.descriptors and arch < NATIVE_DESCRIPTORS]
    assert attend.choose(90, 128, 128, 2) == TABLE[90, 128]
    assert attend.choose(103, 64, 64, 2).descriptors
    assert attend.choose(121, 112, 112, 2).descriptors
    for architecture, head_dim, head_dim_v in ((89, 128, 128), (90, 80, 80), (90, 96, 96), (90, 128, 80), (90, 60, 60)):
        assert not attend.choose(architecture, head_dim, head_dim_v, 2).descriptors, (architecture, head_dim)


def test_a_launch_that_cannot_have_its_descriptors_is_refused() -> None:
    problem = problems.make(problems.MIXED[:1], head_dim=80)
    lists = random_lists(problem, problem.plan.near, 0)
    out = torch.empty_like(problem.query)
    given = problem.operands, problem.plan.near, lists
    launch = Launch(16, 16, 1, 2, descriptors=True)
    with pytest.raises(ValueError, match="80 and 80 are not one box"):
        attend.attend(*given, out, out[..., 0].float(), merge=False, launch=launch)


@pytest.mark.parametrize(
    ("tiles", "expected"),
    [
        ((128, 64), (128, 64, 8, 3)),
        ((64, 32), (64, 32, 4, 3)),
        ((16, 16), (16, 16, 1, 3)),
        ((128, 128), (128, 64, 8, 3)),
    ],
    ids=lambda value: "x".join(map(str, value)),
)
def test_an_entry_is_cut_to_the_plans_tiles(tiles: tuple[int, int], expected: tuple[int, int, int, int]) -> None:
    assert fitted(Launch(128, 64, 8, 3), *tiles) == Launch(*expected)


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        *((8, (16, 0)), (16, (16, 0)), (24, (32, 0)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32))),
        *((112, (128, 0)), (128, (128, 0)), (192, (128, 64)), (256, (256, 0))),
    ],
    ids=str,
)
def test_heads_are_padded_only_where_splitting_saves_nothing(head_dim: int, expected: tuple[int, int]) -> None:
    assert attend.head_blocks(head_dim, split=False) == expected


def test_a_split_head_comes_in_halves() -> None:
    assert [attend.head_blocks(head, split=True) for head in (16, 64, 80, 128)] == [
        (16, 0),
        (32, 32),
        (64, 16),
        (64, 64),
    ]


def test_copies_equal_the_portable_ones_in_the_interpreter() -> None:
    lines = run("interpret_copy.py", TRITON_INTERPRET="1")
    assert len(lines) == 6
    assert all(line["same"] and line["untouched"] for line in lines)
    assert all(line["parts"] <= 4 * torch.finfo(getattr(torch, line["into"])).eps for line in lines)
    assert {line["dtype"] for line in lines} == {"float32", "float16", "float8_e4m3fn"}
    assert any(line["left_out"] for line in lines)
