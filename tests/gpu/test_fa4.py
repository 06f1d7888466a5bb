"""flash-attn-4's block-sparse forward behind our lists, on Hopper or Blackwell; ``make test-gpu``.

Each dtype and head size is first tried in a process of its own. The seed of a failing case is in its message.
"""

from __future__ import annotations

import secrets
from functools import cache

import pytest
import torch

import checks
import problems
from mminference_sgl.backend import selfcheck
from mminference_sgl.kernels import fa4, ops, reference
from mminference_sgl.kernels.stages import stages_of
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import load
from mminference_sgl.method.config import Config
from test_attention import random_lists

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


@cache
def state(dtype: torch.dtype, head_dim: int, pool_dtype: torch.dtype, tile_keys: int) -> str:
    served = selfcheck.Served(28, 4, head_dim, dtype, pool_dtype, tile_keys=tile_keys)
    return selfcheck.check("fa4", DEVICE, served)


@pytest.fixture(autouse=True)
def available() -> None:
    reason = fa4.unavailable(DEVICE)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def seed() -> int:
    return secrets.randbelow(1 << 31)


def check(
    seed: int,
    head_dim: int = 128,
    dtype: torch.dtype = BF16,
    *,
    heads: tuple[int, int] = (4, 2),
    tiles: tuple[int, int] = (128, 64),
    shared: bool = False,
    fp8: bool = False,
) -> None:
    """Both passes of a random problem, lists of single heads or shared ones; other near lists merged into that.

    In memory that starts as NaN, against the reference in fp64.
    """
    pool_dtype = FP8 if fp8 else dtype
    assert state(dtype, head_dim, pool_dtype, tiles[1]) == "ok"
    problem = problems.make(
        checks.ODD,
        tile_queries=tiles[0],
        tile_keys=tiles[1],
        head_dim=head_dim,
        heads=heads[0],
        kv_heads=heads[1],
        dtype=dtype,
        seed=seed,
        sharing=(heads[0] // heads[1],) if shared else (),
    )
    plan = problem.plan
    passes = [*(plan.shared[0].passes if shared else (plan.near, plan.far)), plan.near]
    passes = [(tile_pass, random_lists(problem, tile_pass, seed + step)) for step, tile_pass in enumerate(passes)]
    meant, passes = checks.moved((problem.operands, passes), DEVICE)
    stored = meant
    if fp8:
        stored, meant = problems.in_fp8(meant, 0.75, 1.5)
    results = []
    for implementation, own in (
        (reference, problems.cast(meant, torch.float64)),
        (reference, meant),
        (fa4, stored),
    ):
        out = torch.full_like(own.query, torch.nan)
        lse = torch.full(out.shape[:2], torch.nan, dtype=torch.promote_types(out.dtype, torch.float32), device=DEVICE)
        for index, (tile_pass, lists) in enumerate(passes):
            implementation.attend(own, tile_pass, lists, out, lse, merge=index > 0)
        results.append((out, lse))
    checks.compare(*results, what=f"head size {head_dim}, {dtype}, {heads}, {tiles}, {shared=}, {fp8=}, seed {seed}")


@pytest.mark.parametrize("shared", [False, True], ids=["single", "shared"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_attend_equals_reference(dtype: torch.dtype, head_dim: int, shared: bool, seed: int) -> None:
    check(seed, head_dim, dtype, shared=shared)


@pytest.mark.parametrize("tiles", [(256, 64), (128, 128), (64, 64), (16, 128)], ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attend_on_other_tiles(head_dim: int, tiles: tuple[int, int], seed: int) -> None:
    check(seed, head_dim, tiles=tiles)


@pytest.mark.parametrize("heads", [(8, 1), (4, 4), (28, 4), (3, 1), (32, 2)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("shared", [False, True], ids=["single", "shared"])
def test_attend_on_other_groups(heads: tuple[int, int], shared: bool, seed: int) -> None:
    check(seed, heads=heads, shared=shared and heads[0] > heads[1])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attend_on_fp8_pools(head_dim: int, seed: int) -> None:
    check(seed, head_dim, fp8=True)


def test_attend_does_not_wait_for_the_device(seed: int) -> None:
    assert state(BF16, 128, BF16, 64) == "ok"
    problem = problems.make(checks.ODD, head_dim=128, dtype=BF16, seed=seed)
    passes = [(problem.plan.near, random_lists(problem, problem.plan.near, seed))]
    problem, passes = checks.moved((problem, passes), DEVICE)
    out = torch.empty_like(problem.query)
    ops.sparse_prefill(problem.operands, passes, out, "fa4")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.sparse_prefill(problem.operands, passes, out, "fa4")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_built_ahead_is_what_runs(seed: int) -> None:
    """No request waits for a compiler: one query tile or several, lists of single heads or shared ones."""
    from flash_attn.cute.interface import _flash_attn_fwd

    major = torch.cuda.get_device_capability(DEVICE)[0]
    for lists_per_kv_head in (1, 2):
        fa4.build(FP16, 64, 64, lists_per_kv_head, major)
    built = set(_flash_attn_fwd.compile_cache.cache)
    text = (problems.Request(100, [], 20, 80),)
    for requests in (text, checks.ODD):
        for sharing in ((), (2,)):
            problem = problems.make(requests, head_dim=64, dtype=FP16, seed=seed, sharing=sharing)
            passes = problem.plan.shared[0].passes if sharing else (problem.plan.near, problem.plan.far)
            for tile_pass in filter(None, passes):
                step = tile_pass, random_lists(problem, tile_pass, seed)
                operands, step = checks.moved((problem.operands, step), DEVICE)
                ops.sparse_prefill(operands, [step], torch.empty_like(operands.query), "fa4")
    assert set(_flash_attn_fwd.compile_cache.cache) == built


@pytest.mark.parametrize("pattern", ["auto", "grid"])
@pytest.mark.parametrize("error", [0.0, 0.7])
def test_a_layer_equals_the_reference(pattern: str, error: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state(BF16, 64, BF16, 64) == "ok"
    problem = checks.moved(problems.make(checks.ODD, head_dim=64, dtype=BF16, seed=seed), DEVICE)
    specs = load(pattern).specs(0, range(problem.query.shape[1]))
    config = Config(error=error, text_error=error, error_ceiling=10.0)
    outputs = []
    monkeypatch.setattr(prefill, "stages_of", lambda _name: stages_of("triton"))
    for implementation in ("reference", "fa4"):
        out = torch.full_like(problem.query, torch.nan)
        prefill.run_layer(problem.operands, problem.plan, specs, config, out, implementation)
        outputs.append(out.double())
    band = torch.finfo(BF16).eps * float(outputs[0].abs().max())
    assert float((outputs[1] - outputs[0]).abs().max()) <= 4 * band, f"seed {seed}"
