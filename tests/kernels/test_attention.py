"""Attention implementations against the reference, and both against dense attention in fp64."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

import pytest
import torch

import problems
from mminference_sgl.kernels import ops, reference, torch_tiles
from mminference_sgl.kernels.tiles import Region, TileLists, TilePass, element_mask, lists_from_map, tile_visibility
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec, load
from mminference_sgl.method.config import Config

PATTERNS = ("auto", "grid", "vertical_slash", "a_shape")
LOOSE = {"error": 2.0, "text_error": 2.0, "error_ceiling": 100.0}
"""Settings under which random operands really are attended sparsely."""


def run_specs(problem: problems.Problem, specs: list[HeadSpec], implementation: str, **settings):
    out = torch.full_like(problem.query, torch.nan)
    config = Config(**settings)
    reports = prefill.run_layer(problem.operands, problem.plan, specs, config, out, implementation)
    return out, reports


def run(problem: problems.Problem, pattern: str, implementation: str, **settings):
    return run_specs(problem, load(pattern).specs(0, range(problem.query.shape[1])), implementation, **settings)


def random_lists(problem: problems.Problem, tile_pass: TilePass, seed: int) -> TileLists:
    """Random tiles out of the visible ones, with random sink and reach; some lists are empty."""
    return lists_from_map(tile_pass, *random_map(problem, tile_pass, seed))


def random_map(
    problem: problems.Problem, tile_pass: TilePass, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Those tiles as a map bool [G, T, n], and the sinks and reaches, int32 [G, T]."""
    generator = torch.Generator().manual_seed(seed)
    heads, tiles, keys = problem.query.shape[1] // tile_pass.sharing, tile_pass.num_tiles, tile_pass.keys
    sink = torch.randint(0, 200, (heads, tiles), generator=generator, dtype=torch.int32)
    reach = torch.randint(1, 300, (heads, tiles), generator=generator, dtype=torch.int32)
    selected = torch.zeros(heads, tiles, keys.widest, dtype=torch.bool)
    for tile in range(tiles):
        own = slice(*keys.tile_indptr[int(tile_pass.request[tile]) :][:2].tolist())
        visible = tile_visibility(
            tile_pass.region,
            tile_pass.min_pos[tile : tile + 1],
            tile_pass.max_pos[tile : tile + 1],
            keys.tile_min[own],
            keys.tile_max[own],
            sink[:, tile : tile + 1],
            reach[:, tile : tile + 1],
        )
        random = torch.rand(visible.shape, generator=generator) < torch.rand(heads, 1, 1, generator=generator) - 0.1
        selected[:, tile, : visible.shape[-1]] = (visible & random)[:, 0]
    return selected, sink, reach


def attend(implementation, problem: problems.Problem, tile_pass: TilePass, lists: TileLists, dtype=None):
    """One pass of an implementation into memory full of NaN: output and LSE of the pass's rows."""
    operands = problems.cast(problem.operands, dtype or problem.query.dtype)
    out = torch.full_like(operands.query, torch.nan)
    lse = torch.full(out.shape[:2], torch.nan, dtype=dtype or torch.float32)
    implementation.attend(operands, tile_pass, lists, out, lse, merge=False)
    return out[tile_pass.rows], lse[tile_pass.rows]


def assert_as_exact_as(plain: torch.Tensor, ours: torch.Tensor, exact: torch.Tensor) -> None:
    """Our error against fp64 is at most twice that of plain PyTorch in the same dtype plus two units of rounding."""
    assert not torch.isnan(ours).any()
    rounding = 2 * torch.finfo(plain.dtype).eps * float(exact.abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + rounding
    error = float((ours.double() - exact).abs().max())
    assert error <= allowed, f"error {error:.3g}, plain PyTorch allows {allowed:.3g}"


@pytest.mark.parametrize("tiles", [(128, 64), (64, 64), (32, 128), (16, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("page_size", [1, 16])
def test_torch_equals_reference_on_random_lists(tiles: tuple[int, int], page_size: int) -> None:
    problem = problems.make(tile_queries=tiles[0], tile_keys=tiles[1], page_size=page_size)
    for seed, tile_pass in enumerate((problem.plan.near, problem.plan.far)):
        lists = random_lists(problem, tile_pass, seed)
        out, lse = attend(torch_tiles, problem, tile_pass, lists)
        exact, exact_lse = attend(reference, problem, tile_pass, lists, torch.float64)
        plain, plain_lse = attend(reference, problem, tile_pass, lists)
        blind = torch.isneginf(exact_lse)
        assert blind.any(), "some rows must see no key, or the empty case is not tested"
        assert not blind.all()
        assert torch.equal(torch.isneginf(lse), blind)
        assert (out[blind] == 0).all()
        assert_as_exact_as(plain, out, exact)
        assert_as_exact_as(plain_lse[~blind], lse[~blind], exact_lse[~blind])


GROUPS = (2, 3, 4, 5, 7, 8, 12, 16)
"""Query heads on a KV head."""


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tiles", [(128, 64), (32, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_heads_that_share_lists_equal_the_reference(group: int, tiles: tuple[int, int]) -> None:
    """Rows of a tile are as many as its lanes hold; several requests, odd rows, merged into what passes before left."""
    heads = 2 * group
    problem = problems.make(
        heads=heads, kv_heads=2, head_dim=16, tile_queries=tiles[0], tile_keys=tiles[1], sharing=(group,)
    )
    (tiling,) = problem.plan.shared
    assert tiling.near.tile_queries == tiles[0] // group
    assert tiling.near.lanes <= tiles[0]
    operands = problem.operands
    results = {}
    for name, implementation, dtype in (
        ("ours", torch_tiles, torch.float32), ("plain", reference, torch.float32), ("exact", reference, torch.float64)
    ):  # fmt: skip
        cast = problems.cast(operands, dtype)
        out, lse = torch.full_like(cast.query, torch.nan), torch.full(cast.query.shape[:2], torch.nan, dtype=dtype)
        passes = (problem.plan.near, *tiling.passes)
        for seed, tile_pass in enumerate(passes):
            implementation.attend(cast, tile_pass, random_lists(problem, tile_pass, seed), out, lse, merge=seed > 0)
        results[name] = out
    assert_as_exact_as(results["plain"], results["ours"], results["exact"])


@pytest.mark.parametrize("heads", [(8, 1), (4, 4), (6, 2)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_torch_equals_reference_on_heads_and_dtypes(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    problem = problems.make(heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype, tile_queries=64)
    lists = random_lists(problem, problem.plan.near, 3)
    out, _ = attend(torch_tiles, problem, problem.plan.near, lists)
    exact, _ = attend(reference, problem, problem.plan.near, lists, torch.float64)
    plain, _ = attend(reference, problem, problem.plan.near, lists)
    assert_as_exact_as(plain, out, exact)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("implementation", ["reference", "torch"])
@pytest.mark.parametrize("tiles", [(128, 64), (32, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_error_zero_is_dense_attention(pattern: str, implementation: str, tiles: tuple[int, int]) -> None:
    problem = problems.make(tile_queries=tiles[0], tile_keys=tiles[1])
    out, reports = run(problem, pattern, implementation, error=0.0)
    assert_as_exact_as(problem.dense(torch.float32), out, problem.dense())
    assert all(float(report.coverage) == pytest.approx(1.0, abs=1e-5) for report in reports)
    assert all(float(report.error) < 1e-5 for report in reports)


def test_grid_at_error_zero_uses_both_passes() -> None:
    problem = problems.make(problems.MIXED[:2])
    _, reports = run(problem, "grid", "torch", error=0.0)
    assert all(int(report.tiles) > int(report.causal) for report in reports), "the cell pass comes on top"


def test_heads_that_list_everything_are_attended_to_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make(tile_queries=32, tile_keys=16)

    def refuse(*_args: object) -> None:
        raise AssertionError("no tile needs gathering")

    monkeypatch.setattr(torch_tiles, "_attend_batch", refuse)
    out, reports = run(problem, "vertical_slash", "torch", error=0.0)
    assert all(report.tiles == report.causal for report in reports)
    assert_as_exact_as(problem.dense(torch.float32), out, problem.dense())


@pytest.mark.parametrize(("pattern", "error"), [("grid", 0.0), ("grid", 0.7), ("vertical_slash", 0.7)])
def test_full_tiles_by_themselves_change_nothing(pattern: str, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of every length have their full tiles attended to without a mask, and the others merged."""
    problem = problems.make(tile_queries=32, tile_keys=16)
    settings = LOOSE | {"error": error, "text_error": error}
    plain, _ = run(problem, pattern, "reference", **settings)
    alone: list[int] = []
    attention = torch_tiles._attention

    def counting(q, k, v, mask, scale):
        alone.append(mask is None)
        return attention(q, k, v, mask, scale)

    monkeypatch.setattr(torch_tiles, "_attention", counting)
    monkeypatch.setattr(torch_tiles, "LONG", 1)
    fast, _ = run(problem, pattern, "torch", **settings)
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-4)
    assert 0 < sum(alone) < len(alone)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_torch_equals_reference_beyond_error_zero(pattern: str) -> None:
    problem = problems.make(tile_queries=32, tile_keys=16, probe_rows=7)
    settings = LOOSE if pattern != "a_shape" else {**LOOSE, "patterns": _narrow_a_shape()}
    plain, _ = run(problem, pattern, "reference", **settings)
    fast, reports = run(problem, pattern, "torch", **settings)
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=1e-4)
    assert float(reports[0].tiles) < float(reports[0].causal)
    assert (fast - problem.dense()).abs().max() > 1e-2, "something must have been left out"


def test_every_head_runs_its_own_spec() -> None:
    """A layer whose heads differ gives each head what a layer of only its kind would give it.

    So much may be lost that no head needs a tile beyond what its pattern always reads: heads share one budget.
    """
    always = LOOSE | {"error": 1000.0, "text_error": 1000.0}
    problem = problems.make(heads=8, kv_heads=2, tile_queries=64)
    specs = [
        HeadSpec("dense", "dense", "dense", "dense"),
        HeadSpec("dense", "dense", "auto", "auto"),
        HeadSpec("dense", "dense", "a_shape", "a_shape"),
        HeadSpec("dense", "dense", "dense", "grid"),
        HeadSpec("vertical_slash", "vertical_slash", "vertical_slash", "vertical_slash"),
        HeadSpec("dense", "dense", "a_shape", "grid"),
        HeadSpec("dense", "dense", "dense", "a_shape"),
        HeadSpec("dense", "dense", "a_shape", "vertical_slash"),
    ]
    out, _ = run_specs(problem, specs, "torch", **always)
    for head, spec in enumerate(specs):
        alone, _ = run_specs(problem, [spec] * 8, "torch", **always)
        torch.testing.assert_close(out[:, head], alone[:, head], atol=2e-5, rtol=1e-4)


def test_regions_split_the_causal_keys() -> None:
    query, key = torch.arange(40)[:, None], torch.arange(40)[None]
    for sink, reach in [(0, 1), (5, 3), (64, 1), (0, 64), (7, 40)]:
        near = element_mask(Region.NEAR, query, key, sink, reach)
        far = element_mask(Region.FAR, query, key, sink, reach)
        assert not (near & far).any()
        assert torch.equal(near | far, key <= query)


@pytest.mark.parametrize("tiles", [(32, 16), (16, 64)], ids=lambda t: f"{t[0]}x{t[1]}")
def test_full_tiles_come_first_and_need_no_mask(tiles: tuple[int, int]) -> None:
    problem = problems.make(tile_queries=tiles[0], tile_keys=tiles[1])
    for seed, tile_pass in enumerate((problem.plan.near, problem.plan.far)):
        lists = random_lists(problem, tile_pass, seed)
        masked = 0
        for index in range(lists.count.numel()):
            head, tile = divmod(index, tile_pass.num_tiles)
            rows = slice(*tile_pass.indptr[tile : tile + 2].tolist())
            listed = lists.tiles_of(index)
            count = int(lists.full[index])
            assert (listed[:count].diff() > 0).all()
            assert (listed[count:].diff() > 0).all()
            assert not set(listed[:count].tolist()) & set(listed[count:].tolist())
            key_tiles = tile_pass.keys.tile_indptr[tile_pass.request[tile]] + listed
            visible = element_mask(
                tile_pass.region,
                tile_pass.positions[rows, None, None],
                tile_pass.keys.positions[key_tiles.long()],
                lists.sink[head, tile],
                lists.reach[head, tile],
            )
            assert visible[:, :count].all()
            masked += int((~visible[:, count:]).sum())
        assert int(lists.full.sum()) > 0
        assert masked > 0


def test_ops_rejects_what_does_not_belong_together() -> None:
    problem = problems.make(problems.MIXED[:1])
    operands, query, out = problem.operands, problem.query, torch.empty_like(problem.query)
    passes = [(problem.plan.near, random_lists(problem, problem.plan.near, 0))]
    with pytest.raises(ValueError, match="do not divide"):
        ops.sparse_prefill(replace(operands, query=query[:, :3]), passes, out, "torch")
    with pytest.raises(ValueError, match="head size"):
        ops.sparse_prefill(replace(operands, query=query[..., :16]), passes, out, "torch")
    with pytest.raises(ValueError, match="out has shape"):
        ops.sparse_prefill(operands, passes, out[:1], "torch")
    with pytest.raises(ValueError, match="lists are for"):
        ops.sparse_prefill(replace(operands, query=query[:, :2]), passes, out[:, :2], "torch")


def test_implementations_take_what_the_protocol_lists() -> None:
    wanted = list(inspect.signature(ops.Attend.__call__).parameters.values())[1:]
    for module in ops._MODULES.values():
        attend = importlib.import_module(module, "mminference_sgl.kernels").attend
        own = list(inspect.signature(attend).parameters.values())
        assert own[: len(wanted)] == wanted, module
        assert all(more.default is None for more in own[len(wanted) :]), module


def test_a_block_of_heads_has_their_keys() -> None:
    operands = problems.make(problems.MIXED[2:3], heads=12, kv_heads=3).operands
    assert operands.group == 4
    for heads, kv_heads in ((slice(0, 12), slice(0, 3)), (slice(4, 12), slice(1, 3)), (slice(6, 8), slice(1, 2))):
        block = operands.block(heads)
        assert torch.equal(block.query, operands.query[:, heads])
        for name in ("key_pool", "value_pool"):
            own, whole = getattr(block, name), getattr(operands, name)
            assert own.data_ptr() == whole[:, kv_heads].data_ptr()
            assert own.shape == whole[:, kv_heads].shape


def test_a_named_implementation_never_falls_back() -> None:
    assert ops.resolve("auto", problems.CPU) == "torch"
    assert ops.resolve("reference", problems.CPU) == "reference"
    with pytest.raises(ops.ImplementationUnavailableError, match="'fa4' is not available"):
        ops.resolve("fa4", problems.CPU)
    assert ops.available_implementations(problems.CPU)["torch"] == "ok"


def _narrow_a_shape():
    from mminference_sgl.method.config import AShapeBudget, PatternBudgets

    return PatternBudgets(a_shape=AShapeBudget(sink=20, window=100))


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("error", [0.5, 0.0])
def test_fp8_pools_are_what_their_scales_say(implementation: str, error: float) -> None:
    """Probe, selection, attention and guard of an fp8 pool are those of the pool it stands for."""
    problem = problems.make(tile_queries=32, tile_keys=16)
    specs = load("auto").specs(0, range(problem.query.shape[1]))
    config = Config(error=error, text_error=error, error_ceiling=0.5)
    results = []
    for operands in problems.in_fp8(problem.operands, 0.5, 1.75):
        out = torch.full_like(problem.query, torch.nan)
        reports = prefill.run_layer(operands, problem.plan, specs, config, out, implementation)
        results.append((out[problem.plan.near.rows], [(int(r.tiles), int(r.guarded)) for r in reports]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    assert results[0][1] == results[1][1]
