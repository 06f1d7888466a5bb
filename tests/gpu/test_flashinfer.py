"""FlashInfer's FA3 kernel behind our work items, on a GPU of compute capability 9.0; ``make test-gpu``.

Each dtype and head size is first tried in a process of its own, which compiles the kernel: minutes, once a machine.
The seed of a failing case is in its message.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch

import checks
import problems
from mminference_sgl.backend import selfcheck
from mminference_sgl.kernels import flashinfer_tiles, flashinfer_work, ops, reference
from mminference_sgl.kernels.stages import stages_of
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import load
from mminference_sgl.method.config import Config
from test_attention import random_lists

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


@cache
def state(dtype: torch.dtype, head_dim: int) -> str:
    return selfcheck.check("flashinfer", DEVICE, selfcheck.Served(28, 4, head_dim, dtype, dtype))


@pytest.fixture(autouse=True)
def available() -> None:
    reason = flashinfer_tiles.unavailable(DEVICE)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def seed() -> int:
    return secrets.randbelow(1 << 31)


def check(setting: checks.Setting, seed: int) -> None:
    """Both passes of a random problem in memory that starts as NaN, against the reference in fp64."""
    assert state(setting.dtype, setting.head_dim) == "ok"
    problem = setting.problem(seed)
    passes = [
        (tile_pass, random_lists(problem, tile_pass, seed + far))
        for far, tile_pass in enumerate((problem.plan.near, problem.plan.far))
    ]
    operands, passes = checks.moved((problem.operands, passes), DEVICE)
    results = []
    for implementation, own in (
        (reference, problems.cast(operands, torch.float64)),
        (reference, operands),
        (flashinfer_tiles, operands),
    ):
        out = torch.full_like(own.query, torch.nan)
        lse = torch.full(out.shape[:2], torch.nan, dtype=torch.promote_types(out.dtype, torch.float32), device=DEVICE)
        for index, (tile_pass, lists) in enumerate(passes):
            implementation.attend(own, tile_pass, lists, out, lse, merge=index > 0)
        results.append((out, lse))
    checks.compare(*results, what=f"{setting}, seed {seed}")


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("head_dim", list(flashinfer_tiles.CTA_ROWS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attend_equals_reference(dtype: torch.dtype, head_dim: int, page_size: int, seed: int) -> None:
    check(checks.Setting(head_dim, dtype, page_size), seed)


@pytest.mark.parametrize("tiles", [(256, 64), (128, 128), (64, 64), (32, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_attend_on_other_tiles(tiles: tuple[int, int], seed: int) -> None:
    check(checks.Setting(128, torch.bfloat16, 1, tiles=tiles), seed)


@pytest.mark.parametrize("heads", [(8, 1), (4, 4), (28, 4)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_attend_on_other_groups(heads: tuple[int, int], seed: int) -> None:
    check(checks.Setting(128, torch.bfloat16, 1, heads=heads), seed)


@pytest.mark.parametrize("page_size", [1, 64])
def test_attend_in_several_launches(page_size: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded: Callable = partial(flashinfer_work.launches, indices=40 * 64, entries=40)
    monkeypatch.setattr(flashinfer_work, "launches", bounded)
    check(checks.Setting(128, torch.bfloat16, page_size), seed)


def test_attend_does_not_wait_for_the_device(seed: int) -> None:
    assert state(torch.bfloat16, 128) == "ok"
    problem = problems.make(checks.ODD, head_dim=128, dtype=torch.bfloat16, seed=seed)
    passes = [(problem.plan.near, random_lists(problem, problem.plan.near, seed))]
    problem, passes = checks.moved((problem, passes), DEVICE)
    out = torch.empty_like(problem.query)
    ops.sparse_prefill(problem.operands, passes, out, "flashinfer")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.sparse_prefill(problem.operands, passes, out, "flashinfer")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", ["auto", "grid"])
@pytest.mark.parametrize("error", [0.0, 0.7])
def test_a_layer_equals_the_reference(pattern: str, error: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state(torch.bfloat16, 64) == "ok"
    problem = checks.moved(problems.make(checks.ODD, head_dim=64, dtype=torch.bfloat16, seed=seed), DEVICE)
    specs = load(pattern).specs(0, range(problem.query.shape[1]))
    config = Config(error=error, text_error=error, error_ceiling=10.0)
    outputs = []
    monkeypatch.setattr(prefill, "stages_of", lambda _name: stages_of("triton"))
    for implementation in ("reference", "flashinfer"):
        out = torch.full_like(problem.query, torch.nan)
        prefill.run_layer(problem.operands, problem.plan, specs, config, out, implementation)
        outputs.append(out.double())
    band = torch.finfo(torch.bfloat16).eps * float(outputs[0].abs().max())
    assert float((outputs[1] - outputs[0]).abs().max()) <= 4 * band, f"seed {seed}"
