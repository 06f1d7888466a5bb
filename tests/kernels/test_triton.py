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
    PAGE_TABLE,
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
    """Whole pages only: the far pass in between gathers. Page tails and pages of nobody hold NaN."""
    cases = {case.name for case in interpret.CASES if case.launch is not None and case.launch.descriptors}
    assert len(cases) == 4
    lines = interpreted(dtype)
    for line in lines:
        expected = 2 if line["case"] in cases and line["pass"] == "near" else 0
        assert line["described"] == expected, line
    described = [line for line in lines if line["case"] in cases]
    assert all(line["same"] and line["described_otherwise"] == 0 for line in described)


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


AHEAD = {(90, 64, "bf16"), (90, 128, "bf16"), (100, 128, "bf16")}
"""Where keys and values of two steps are under way in every loop: what most models are served with."""


def test_every_table_entry_compiles_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    results = [aot.Compiled(**{**line, "launch": Launch(*line["launch"])}) for line in run("aot.py", "--json")]
    with capsys.disabled():
        print()
        print("\n".join(aot.table(results)))
    compiled = {(result.arch, result.head_dim, aot.DTYPES[result.dtype]) for result in results}
    assert {entry for entry in TABLE if entry[0] != 89 and entry[2] == 2} <= compiled
    described = [result for result in results if result.launch.descriptors]
    described_entries = {entry for entry, launch in PAGE_TABLE.items() if launch.descriptors}
    assert {(r.arch, r.head_dim, aot.DTYPES[r.dtype]) for r in described} == described_entries
    assert [result for result in results if result.bulk_loads] == described
    assert not [result for result in results if not result.fits]
    gathered = [r for r in results if "gather" in r.variant and (r.arch, r.head_dim, r.dtype) in AHEAD]
    assert {(r.arch, r.head_dim, r.dtype) for r in gathered} == AHEAD
    assert not [r for r in gathered if r.launch.rows == 128 and r.ahead < 2], "two steps are under way beside one"


def test_every_architecture_and_head_size_has_an_entry() -> None:
    assert set(TABLE) == {(arch, head, width) for arch in ARCHITECTURES for head in HEAD_DIMS for width in (1, 2)}
    assert lookup(103, 72, 2) == TABLE[100, 80, 2]
    assert lookup(87, 16, 1) == TABLE[86, 64, 1]
    with pytest.raises(ValueError, match="capability 7"):
        lookup(75, 64, 2)
    with pytest.raises(ValueError, match="320"):
        lookup(90, 320, 2)


def pools(head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(128, 2, head_dim, dtype=dtype), torch.empty(128, 2, head_dim, dtype=dtype)


def test_whole_pages_come_through_descriptors_where_the_device_has_them() -> None:
    assert not [arch for (arch, *_), launch in PAGE_TABLE.items() if launch.descriptors and arch < NATIVE_DESCRIPTORS]
    assert not [launch for launch in TABLE.values() if launch.descriptors]
    assert attend.choose(90, *pools(), contiguous=True) == PAGE_TABLE[90, 128, 2]
    assert attend.choose(103, *pools(64), contiguous=True) == PAGE_TABLE[100, 64, 2]
    assert attend.choose(121, *pools(112, torch.float16), contiguous=True) == PAGE_TABLE[120, 128, 2]
    assert attend.choose(90, *pools(dtype=torch.float8_e4m3fn), contiguous=True) == PAGE_TABLE[90, 128, 1]


@pytest.mark.parametrize(
    ("architecture", "head_dim", "dtype", "contiguous"),
    [
        (90, 128, torch.bfloat16, False),
        (89, 128, torch.bfloat16, True),
        (80, 128, torch.uint8, True),
        (90, 80, torch.bfloat16, True),
        (90, 96, torch.bfloat16, True),
        (90, 192, torch.bfloat16, True),
        (90, 60, torch.bfloat16, True),
        (90, 8, torch.float8_e4m3fn, True),
    ],
    ids=str,
)
def test_pointers_are_taken_otherwise(architecture: int, head_dim: int, dtype: torch.dtype, contiguous: bool) -> None:
    """Gathered keys, older devices, heads in two unequal blocks, rows that are no multiple of 16 bytes."""
    assert not attend.choose(architecture, *pools(head_dim, dtype), contiguous=contiguous).descriptors


def test_memory_that_is_not_aligned_is_read_by_pointers() -> None:
    key_pool, value_pool = pools()
    shifted = torch.empty(value_pool.numel() + 4, dtype=value_pool.dtype)[4:].view(value_pool.shape)
    wide = torch.empty(128, 2, 132, dtype=torch.bfloat16)[..., :128]
    apart = torch.empty(128, 2, 256, dtype=torch.bfloat16)[..., ::2]
    for pool in (shifted, wide, apart):
        assert not attend.describable(Launch(128, 64, 8, 3, descriptors=True), pool)
        assert not attend.choose(90, pool, value_pool, contiguous=True).descriptors
        assert not attend.choose(90, key_pool, pool, contiguous=True).descriptors


def test_a_launch_that_cannot_have_its_descriptors_is_refused() -> None:
    problem = problems.make(problems.MIXED[:1], head_dim=80, page_size=64)
    lists = random_lists(problem, problem.plan.near, 0)
    out = torch.empty_like(problem.query)
    given = problem.operands, problem.plan.near, lists
    launch = Launch(16, 16, 1, 2, descriptors=True)
    with pytest.raises(ValueError, match="cannot be read through them"):
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


def test_e4m3_bytes_are_widened_exactly() -> None:
    """What the kernel does with bytes where the device cannot convert them, in PyTorch: 1/256 of each value."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[~torch.isin(codes, torch.tensor([0x7F, 0xFF], dtype=torch.uint8))]
    wide = codes.to(torch.int32)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    half = bits.to(torch.uint16).view(torch.float16)
    assert torch.equal(half.double() * 256, codes.view(torch.float8_e4m3fn).double())
