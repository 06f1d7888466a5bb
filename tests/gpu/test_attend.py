"""The attend kernel on a GPU against the reference in fp64, with fresh random inputs; ``make test-gpu``.

The seed of a failing case is in its message.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import checks
import problems
from mminference_sgl.backend import selfcheck
from mminference_sgl.kernels import attend, work_triton
from mminference_sgl.kernels.launch_table import (
    HEAD_DIMS,
    NATIVE_DESCRIPTORS,
    NATIVE_FP8,
    Launch,
    device_architecture,
)
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.stages import stages_of
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import load
from mminference_sgl.method.config import Config
from test_attention import random_lists

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def seed() -> int:
    return secrets.randbelow(1 << 31)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_equals_reference(dtype: torch.dtype, head_dim: int, page_size: int, seed: int) -> None:
    checks.check(checks.Setting(head_dim, dtype, page_size), DEVICE, seed)


@pytest.mark.parametrize("tiles", [(128, 128), (64, 64), (32, 16), (16, 32)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_attend_on_other_tiles(tiles: tuple[int, int], seed: int) -> None:
    checks.check(checks.Setting(128, torch.bfloat16, 1, tiles=tiles), DEVICE, seed)


@pytest.mark.parametrize("heads", [(8, 1), (4, 4), (28, 4)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_attend_on_other_groups(heads: tuple[int, int], seed: int) -> None:
    checks.check(checks.Setting(128, torch.bfloat16, 1, heads=heads), DEVICE, seed)


@pytest.mark.parametrize(
    "launch",
    [Launch(64, 16, 4, 2), Launch(64, 64, 4, 3), Launch(128, 32, 8, 3), Launch(128, 64, 8, 2, split=True)],
    ids=lambda launch: "-".join(map(str, launch)),
)
def test_attend_with_other_launches(launch: Launch, seed: int) -> None:
    checks.check(checks.Setting(64, torch.bfloat16, 1, launch=launch), DEVICE, seed)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("page_size", [1, 64])
def test_attend_on_fp8_pools(head_dim: int, page_size: int, seed: int) -> None:
    print("converted by", "the device" if device_architecture(DEVICE) >= NATIVE_FP8 else "bits")
    checks.check(checks.Setting(head_dim, torch.bfloat16, page_size, fp8=True), DEVICE, seed)


@pytest.mark.parametrize(
    "launch",
    [Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(128, 32, 8, 3, split=True), Launch(16, 16, 4, 2)],
    ids=lambda launch: "-".join(map(str, launch)),
)
@pytest.mark.parametrize(("head_dim", "tiles"), [(64, (128, 64)), (128, (64, 32)), (128, (128, 64))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_attend_by_both_kinds_of_loads(
    dtype: torch.dtype, head_dim: int, tiles: tuple[int, int], launch: Launch, descriptors: bool, seed: int
) -> None:
    """Launches of the table and others; each must be right, whatever the table takes on this device."""
    if descriptors and device_architecture(DEVICE) < NATIVE_DESCRIPTORS:
        pytest.skip("needs a device with tensor descriptors")
    launch = launch._replace(descriptors=descriptors)
    checks.check(checks.Setting(head_dim, dtype, 1, tiles=tiles, launch=launch), DEVICE, seed)


def test_attend_on_lists_in_pieces(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_triton, "SPLIT", 3)
    checks.check(checks.Setting(128, torch.bfloat16, 1), DEVICE, seed)


def test_attend_in_fp32(seed: int) -> None:
    checks.check(checks.Setting(64, torch.float32, 1), DEVICE, seed)


def test_attend_beyond_two_to_the_31_elements(seed: int) -> None:
    """The request's slots lie at the end of a pool of more than 2**31 elements, its rows at the end of such a batch."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    problem = problems.make(checks.SMALL, heads=4, kv_heads=4, head_dim=128, dtype=torch.bfloat16, seed=seed)
    problem, lists = checks.moved((problem, random_lists(problem, problem.plan.near, seed)), DEVICE)
    tile_pass, keys = problem.plan.near, problem.plan.near.keys
    outputs = []
    for shift in (0, (1 << 31) // (4 * 128) + 1000):
        pools = (_behind(shift, pool) for pool in (problem.query, problem.key_pool, problem.value_pool))
        operands = Operands(*pools, problem.scale)
        shifted_keys = replace(keys, all_keys=replace(keys.all_keys, slots=keys.all_keys.slots + shift))
        shifted = replace(tile_pass, keys=shifted_keys, rows=tile_pass.rows + shift)
        out = torch.full_like(operands.query, torch.nan)
        lse = torch.full(out.shape[:2], torch.nan, device=DEVICE)
        attend.attend(operands, shifted, lists, out, lse, merge=False)
        outputs.append((out[shift:].clone(), lse[shift:].clone()))
    for near, far in zip(*outputs, strict=True):
        assert torch.equal(near, far)


def _behind(rows: int, operand: torch.Tensor) -> torch.Tensor:
    """The operand at the end of larger memory."""
    large = torch.empty(rows + operand.shape[0], *operand.shape[1:], dtype=operand.dtype, device=DEVICE)
    large[rows:] = operand
    return large


@pytest.mark.parametrize("pattern", ["auto", "grid", "vertical_slash", "a_shape"])
@pytest.mark.parametrize("error", [0.0, 0.7])
def test_a_layer_equals_the_reference(pattern: str, error: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe, selection and attention on the device, against the reference implementation fed by the same selection."""
    problem = problems.make(checks.ODD, head_dim=64, dtype=torch.bfloat16, seed=seed)
    problem = checks.moved(problem, DEVICE)
    specs = load(pattern).specs(0, range(problem.query.shape[1]))
    config = Config(error=error, text_error=error, error_ceiling=10.0)
    outputs = []
    monkeypatch.setattr(prefill, "stages_of", lambda _name: stages_of("triton"))
    for implementation in ("reference", "triton"):
        out = torch.full_like(problem.query, torch.nan)
        prefill.run_layer(problem.operands, problem.plan, specs, config, out, implementation)
        outputs.append(out.double())
    band = torch.finfo(torch.bfloat16).eps * float(outputs[0].abs().max())
    assert float((outputs[1] - outputs[0]).abs().max()) <= 3 * band, f"seed {seed}"


@pytest.mark.parametrize("pool_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_selfcheck_passes(head_dim: int, pool_dtype: torch.dtype) -> None:
    served = selfcheck.Served(28, 4, head_dim, torch.bfloat16, pool_dtype)
    assert selfcheck.check("triton", DEVICE, served) == "ok"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    script = Path(checks.__file__)
    # PyTorch's caching allocator would hide reads past the end of a tensor.
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=_kernel"]
    done = subprocess.run(
        [*command, sys.executable, str(script)], capture_output=True, text=True, env=env, check=False, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
