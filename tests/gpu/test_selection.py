"""Probe, searches and lists in Triton on a GPU against the portable ones, with fresh random inputs; ``make test-gpu``.

The seed of a failing case is in its message.
"""

from __future__ import annotations

import secrets

import pytest
import torch

import checks
import problems
from mminference_sgl import _core
from mminference_sgl.kernels import probe, probe_triton
from mminference_sgl.kernels.launch_table import HEAD_DIMS
from mminference_sgl.kernels.probe_triton import Probed, Probes, Source
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import DeviceLayout, SparseRequest, build

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


@pytest.fixture
def seed() -> int:
    return secrets.randbelow(1 << 31)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_selection_equals_the_portable_one(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    checks.check_selection(checks.Setting(head_dim, dtype, 1), DEVICE, seed)


@pytest.mark.parametrize("heads", [(8, 1), (28, 4)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("tiles", [(64, 64), (32, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_selection_on_other_shapes(heads: tuple[int, int], tiles: tuple[int, int], seed: int) -> None:
    checks.check_selection(checks.Setting(128, torch.bfloat16, 16, heads=heads, tiles=tiles), DEVICE, seed)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_selection_on_fp8_pools(head_dim: int, seed: int) -> None:
    checks.check_selection(checks.Setting(head_dim, torch.bfloat16, 1, fp8=True), DEVICE, seed)


@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_masses_are_the_same_every_time(head_dim: int, fp8: bool, seed: int) -> None:
    """Tiles in parts and one region: what is stored must not be read back before it is there."""
    setting = checks.Setting(head_dim, torch.bfloat16, 1)
    problem = checks.moved(setting.problem(seed), DEVICE)
    operands = problems.in_fp8(problem.operands, 0.75, 1.5)[0] if fp8 else problem.operands
    group = max(problem.plan.groups, key=lambda group: group.keys.sequence.slots.shape[0])
    want = probe.run(operands, group.keys, group.probe_rows)
    source = Source(False, 8, 64)

    def masses() -> torch.Tensor:
        made = Probed(
            group.keys,
            group.probe_rows,
            torch.empty_like(want.output),
            torch.empty(want.output.shape[:2], device=DEVICE),
            {source: torch.full_like(want.held, torch.nan)},
        )
        probe_triton.run(operands, Probes([made], operands, operands.heads, checks.empty_on(DEVICE)))
        return made.held[source]

    first = masses()
    checks.close(first[0], checks.held_of(want, source)[0], 1e-2, f"masses, seed {seed}")
    for repetition in range(1000):
        assert torch.equal(masses(), first), f"repetition {repetition}, seed {seed}"


def test_a_plan_does_not_wait_for_the_device() -> None:
    sparse, row = [], 0
    for request in checks.ODD:
        layout = _core.Layout(request.length, request.items, chunk_tokens=request.chunk, tile_queries=64)
        on_device = DeviceLayout(layout, 64, DEVICE)
        pool_row = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        sparse.append(SparseRequest(on_device, request.prefix, request.chunk, pool_row, row))
        row += request.chunk
    req_to_token = torch.zeros(1, max(r.length for r in checks.ODD), dtype=torch.int32, device=DEVICE)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            build(sparse, req_to_token, tile_queries=128, tile_keys=64, probe_rows=64, sharing=(2,))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spec", [HeadSpec(), HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid")], ids=str)
def test_a_layer_does_not_wait_for_the_device(spec: HeadSpec, seed: int) -> None:
    problem = checks.moved(problems.make(checks.ODD, head_dim=64, dtype=torch.bfloat16, seed=seed), DEVICE)
    out = torch.empty_like(problem.query)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            prefill.run_layer(problem.operands, problem.plan, [spec] * 4, Config(), out, "triton", layer=0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
