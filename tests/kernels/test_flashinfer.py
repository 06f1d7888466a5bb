"""FlashInfer's implementation on the CPU: its work items read as FlashInfer's kernel reads them, and its guards.

The kernel's part is played by a few lines of PyTorch with the signature of FlashInfer's compiled entry point.
"""

from __future__ import annotations

import itertools
import re
import shutil
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import problems
from mminference_sgl.backend import selfcheck
from mminference_sgl.kernels import (
    flashinfer_fill,
    flashinfer_sources,
    flashinfer_tiles,
    flashinfer_work,
    ops,
    reference,
)
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import UNBOUNDED, TileLists, TilePass
from test_attention import assert_as_exact_as, random_lists
from test_triton import output

CUDA = torch.device("cuda")
CTA_ROWS = 128
OTHERS = (*problems.MIXED[:2], problems.Request(1, [], 0, 1))


class Kernel:
    """What FlashInfer's kernel computes from its arguments, in fp64; counts who writes each row of each head.

    It reads nothing but what the kernel reads: the int workspace at the plan's byte offsets, the page indices, the
    pools by the strides of keys and the query by rows.
    """

    def __init__(self, processors: int, cta_rows: int = CTA_ROWS) -> None:
        self.processors, self.cta_rows = processors, cta_rows
        self.writes: torch.Tensor | None = None
        self.launches = 0

    def __call__(self, *arguments: object) -> None:
        (_, workspace, plan, query, keys, values, _, _, indices, _, out, lse, *modes) = arguments
        assert modes[:4] == [0, 0, -1, False], "no mask, pages x keys x heads, no window, no dependent launch"
        assert modes[4:8] == [None] * 4
        _, scale, value_scale, _ = modes[8:]
        assert workspace.dtype == indices.dtype == torch.int32
        assert workspace.is_contiguous()
        assert indices.is_contiguous()
        assert query.is_contiguous()
        assert lse.is_contiguous()
        assert lse.dtype == torch.float32
        assert len(plan) == 9
        assert not plan[8], "every head has its own schedule"
        assert all(offset % 16 == 0 for offset in plan[:8])
        assert keys.stride() == values.stride()
        numbers = workspace.flatten()
        q_tile, q_first, kv_first, q_len, kv_len, head, bounds, _ = (numbers[offset // 4 :] for offset in plan[:8])
        group = query.shape[1] // keys.shape[2]
        if self.writes is None:
            self.writes = torch.zeros(lse.shape, dtype=torch.int64)
        self.launches += 1
        for block in range(self.processors):
            for item in range(int(bounds[block]), int(bounds[block + 1])):
                begin = int(q_tile[item]) * self.cta_rows
                if begin >= int(q_len[item]):
                    continue
                end = min(begin + self.cta_rows, int(q_len[item]))
                rows, own = slice(int(q_first[item]) + begin, int(q_first[item]) + end), int(head[item])
                self.writes[rows, own] += 1
                number = torch.arange(int(kv_len[item]))
                page = indices[int(kv_first[item]) + number // keys.shape[1]].long()
                entry = number % keys.shape[1]
                k, v = (pool[page, entry, own // group].double() for pool in (keys, values))
                scores = query[rows, own].double() @ k.T * scale
                out[rows, own] = (scores.softmax(1) @ v * value_scale).to(out.dtype)
                lse[rows, own] = (torch.logsumexp(scores, 1) / torch.tensor(2.0).log()).float()


def attend(
    kernel: Kernel, operands: Operands, passes: list[tuple[TilePass, TileLists]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Passes by the implementation's functions, their masked tiles by the reference; output and LSE of the batch."""
    out = torch.full_like(operands.query, torch.nan)
    lse = torch.full(out.shape[:2], torch.nan)
    for index, (tile_pass, lists) in enumerate(passes):
        kernel.writes = None
        part, part_lse = flashinfer_tiles.full_tiles(operands, tile_pass, lists, kernel, kernel.processors)
        assert kernel.writes is not None
        assert (kernel.writes == 1).all(), "each row of each head is written once"
        flashinfer_tiles.write(out, lse, tile_pass.rows, part, part_lse, merge=index > 0)
        rest = flashinfer_work.masked_rest(lists)
        reference.attend(operands, tile_pass, rest, out, lse, merge=True)
    return out, lse


def by_reference(
    operands: Operands, passes: list[tuple[TilePass, TileLists]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    operands = problems.cast(operands, dtype)
    out = torch.full_like(operands.query, torch.nan)
    lse = torch.full(out.shape[:2], torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    for index, (tile_pass, lists) in enumerate(passes):
        reference.attend(operands, tile_pass, lists, out, lse, merge=index > 0)
    return out, lse


def compare(problem: problems.Problem, passes: list[tuple[TilePass, TileLists]], kernel: Kernel) -> None:
    ours = attend(kernel, problem.operands, passes)
    exact = by_reference(problem.operands, passes, torch.float64)
    plain = by_reference(problem.operands, passes, problem.query.dtype)
    blind = torch.isneginf(exact[1])
    assert torch.equal(torch.isneginf(ours[1]), blind)
    assert (ours[0][blind] == 0).all()
    assert_as_exact_as(plain[0], ours[0], exact[0])
    if not blind.all():
        assert_as_exact_as(plain[1][~blind].float(), ours[1][~blind], exact[1][~blind])


def both_passes(problem: problems.Problem) -> list[tuple[TilePass, TileLists]]:
    passes = (problem.plan.near, problem.plan.far)
    return [(tile_pass, random_lists(problem, tile_pass, seed)) for seed, tile_pass in enumerate(passes)]


@pytest.mark.parametrize("tiles", [(128, 64), (64, 64), (256, 32), (48, 16)], ids=lambda t: f"{t[0]}x{t[1]}")
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("processors", [1, 7, 132])
def test_work_items_compute_what_the_reference_does(tiles: tuple[int, int], page_size: int, processors: int) -> None:
    problem = problems.make(OTHERS, tile_queries=tiles[0], tile_keys=tiles[1], page_size=page_size)
    passes = both_passes(problem)
    assert passes[0][0].keys.contiguous == (page_size % tiles[1] == 0)
    assert all((lists.full == 0).any() and (lists.full > 0).any() for _, lists in passes)
    compare(problem, passes, Kernel(processors))


@pytest.mark.parametrize("heads", [(8, 1), (4, 4), (6, 2)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_every_head_reads_its_own_lists(heads: tuple[int, int]) -> None:
    problem = problems.make(OTHERS, heads=heads[0], kv_heads=heads[1], tile_queries=64, tile_keys=32)
    compare(problem, both_passes(problem), Kernel(11))


@pytest.mark.parametrize("page_size", [1, 32])
def test_lists_may_share_entries_leave_gaps_and_lie_anywhere(page_size: int) -> None:
    """All lists of all requests are one run of tiles, of which each takes what it sees; garbage lies around it."""
    problem = problems.make(OTHERS, tile_queries=64, tile_keys=32, page_size=page_size)
    tile_pass, keys = problem.plan.near, problem.plan.near.keys
    heads, garbage = problem.query.shape[1], torch.tensor([1 << 30, -7, -(1 << 31)], dtype=torch.int32)
    tiles = torch.cat([garbage, torch.arange(keys.widest, dtype=torch.int32), garbage])
    begin, count, full = torch.zeros(3, heads, tile_pass.num_tiles, dtype=torch.int32)
    for tile in range(tile_pass.num_tiles):
        own = slice(*keys.tile_indptr[int(tile_pass.request[tile]) :][:2].tolist())
        # A head leaves out the first tiles, as many as its number.
        begin[:, tile] = 3 + torch.arange(heads)
        skipped = torch.arange(heads)
        full[:, tile] = ((keys.tile_max[own] <= tile_pass.min_pos[tile]).sum() - skipped).clamp_min(0)
        count[:, tile] = ((keys.tile_min[own] <= tile_pass.max_pos[tile]).sum() - skipped).clamp_min(0)
    sink = torch.zeros(heads, tile_pass.num_tiles, dtype=torch.int32)
    lists = TileLists(begin.flatten(), count.flatten(), full.flatten(), tiles, sink, torch.full_like(sink, UNBOUNDED))
    compare(problem, [(tile_pass, lists)], Kernel(5))


@pytest.mark.parametrize("page_size", [1, 32])
def test_long_lists_go_in_several_launches_of_bounded_size(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make(OTHERS, tile_queries=64, tile_keys=32, page_size=page_size)
    passes = both_passes(problem)
    bound, longest = 20 * 32, 32 * max(tile_pass.keys.widest for tile_pass, _ in passes)
    launch, held = flashinfer_work.launches, []

    def bounded(*arguments: object, **options: int):
        for work in launch(*arguments, **options, indices=bound, entries=20):
            held.append(work.kv_indices.numel())
            yield work

    monkeypatch.setattr(flashinfer_work, "launches", bounded)
    kernel = Kernel(7)
    compare(problem, passes, kernel)
    assert kernel.launches == len(held) > 10
    assert max(held) <= bound + longest


def test_lists_that_hold_all_they_can_are_all_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make(problems.MIXED[2:3], tile_queries=32, tile_keys=16)
    tile_pass, launch = problem.plan.near, flashinfer_work.launches
    every = torch.full((problem.query.shape[1], tile_pass.num_tiles), tile_pass.keys.widest, dtype=torch.int32)
    tiles = torch.arange(tile_pass.keys.widest, dtype=torch.int32)
    lists = TileLists(every.flatten() * 0, every.flatten(), every.flatten(), tiles, every, every)
    for window in (16, int(every.sum()), 1 << 20):
        monkeypatch.setattr(flashinfer_work, "launches", partial(launch, entries=window))
        kernel = Kernel(5)
        flashinfer_tiles.full_tiles(problem.operands, tile_pass, lists, kernel, kernel.processors)
        assert kernel.launches == int(every.sum()) // window + 1
        assert kernel.writes is not None
        assert (kernel.writes == 1).all()


def test_the_filling_kernel_equals_its_eager_form() -> None:
    """In Triton's interpreter, which is chosen when Triton is imported."""
    lines = output("interpret_flashinfer.py", TRITON_INTERPRET="1").splitlines()
    filled = [int(line.split()[-1]) for line in lines]
    assert len(filled) == 16
    assert sum(filled) > 100


@pytest.mark.parametrize("per_tile", [1, 64], ids=["pages", "gathers"])
def test_the_filling_kernel_compiles_for_its_architecture(per_tile: int) -> None:
    kernel = flashinfer_fill.fill_kernel
    pointers = dict.fromkeys(("order", "start", "slots"), "*i64")
    pointers |= dict.fromkeys(("begin", "full", "request", "tile_indptr", "tiles", "held"), "*i32")
    types = {f"p_{name}": kind for name, kind in pointers.items()} | {
        "first": "i64",
        "window": "i32",
        "query_tiles": "i32",
    }
    constants = {"TILE_KEYS": 64, "PER_TILE": per_tile, "BLOCK": flashinfer_fill.BLOCK}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


def test_nothing_listed_is_zero_everywhere() -> None:
    problem = problems.make(OTHERS, tile_queries=64, tile_keys=32)
    tile_pass, lists = both_passes(problem)[0]
    none = torch.zeros_like(lists.count)
    for tiles in (lists.tiles, lists.tiles[:0]):
        empty = replace(lists, begin=none + tiles.numel(), count=none, full=none, tiles=tiles)
        compare(problem, [(tile_pass, empty)], Kernel(7))


def test_lists_too_long_for_32_bits_are_refused() -> None:
    problem = problems.make(OTHERS, tile_queries=64, tile_keys=32)
    tile_pass, lists = both_passes(problem)[0]
    wide = replace(tile_pass, keys=replace(tile_pass.keys, widest=1 << 27))
    with pytest.raises(ValueError, match="32-bit"):
        next(flashinfer_work.launches(wide, lists, cta_rows=128, processors=7))


@pytest.mark.parametrize("processors", [1, 3, 132])
def test_blocks_get_even_shares_the_longest_first(processors: int) -> None:
    problem = problems.make(tile_queries=32, tile_keys=16, heads=8)
    tile_pass = problem.plan.near
    lists = random_lists(problem, tile_pass, 1)
    (work,) = flashinfer_work.launches(tile_pass, lists, cta_rows=128, processors=processors)
    fields = dict(zip(flashinfer_work.FIELDS, work.workspace, strict=True))
    bounds = fields["work_indptr"][: processors + 1].tolist()
    lengths = torch.where(fields["qo_lens"] > 0, fields["kv_lens"], 0)
    blocks = [lengths[begin:end] for begin, end in itertools.pairwise(bounds)]
    shares = [int(block.sum()) for block in blocks]
    assert sum(shares) == int(lists.full.sum()) * 16
    assert max(shares) - min(shares) <= int(lists.full.max()) * 16
    assert all((block.diff() <= 0).all() for block in blocks)
    assert flashinfer_work.dealt(3, 3, problems.CPU).view(3, 3).tolist() == [[0, 5, 6], [1, 4, 7], [2, 3, 8]]


def test_pages_may_begin_anywhere() -> None:
    pool = torch.arange(10 * 2 * 3).view(10, 2, 3)
    found = flashinfer_work.pages(pool, 4)
    assert found.shape == (7, 4, 2, 3)
    assert all(torch.equal(found[slot], pool[slot : slot + 4]) for slot in range(7))


def test_merging_ignores_what_rows_without_keys_hold() -> None:
    old, new = torch.tensor([[[torch.nan]], [[2.0]], [[torch.nan]]]), torch.tensor([[[3.0]], [[4.0]], [[0.0]]])
    lse = torch.tensor([[-torch.inf], [0.0], [-torch.inf]])
    flashinfer_tiles.write(old, lse, torch.arange(3), new, torch.tensor([[1.0], [0.0], [-torch.inf]]), merge=True)
    assert old.flatten().tolist() == [3.0, 3.0, 0.0]
    torch.testing.assert_close(lse.flatten(), torch.tensor([1.0, 1.0, -torch.inf]) * torch.tensor(2.0).log())


# -- the implementation as a whole -------------------------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The implementation with the kernel played here and the reference in Triton's place."""
    kernel = Kernel(13, flashinfer_tiles.CTA_ROWS[64])
    properties = types.SimpleNamespace(multi_processor_count=kernel.processors)
    monkeypatch.setattr(flashinfer_tiles, "paged_run", lambda dtype, head_dim: kernel)
    monkeypatch.setattr(flashinfer_tiles, "triton_tiles", reference)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return kernel


@pytest.mark.parametrize("page_size", [1, 64])
def test_attend_equals_the_reference(on_cpu: Kernel, page_size: int) -> None:
    problem = problems.make(OTHERS, head_dim=64, dtype=torch.float16, tile_queries=128, page_size=page_size)
    passes = both_passes(problem)
    out = torch.full_like(problem.query, torch.nan)
    lse = ops.sparse_prefill(problem.operands, passes, out, "flashinfer")
    exact, exact_lse = by_reference(problem.operands, passes, torch.float64)
    plain, _ = by_reference(problem.operands, passes, torch.float16)
    assert on_cpu.launches == 2
    assert_as_exact_as(plain, out, exact)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(exact_lse))


def test_scales_of_the_pool_are_applied(on_cpu: Kernel) -> None:
    problem = problems.make(OTHERS, head_dim=64, dtype=torch.float16)
    tile_pass, lists = both_passes(problem)[0]
    scaled = replace(problem.operands, key_pool=problem.key_pool * 0.5, value_pool=problem.value_pool * 2)
    exact, exact_lse = by_reference(scaled, [(tile_pass, lists)], torch.float64)
    plain, _ = by_reference(scaled, [(tile_pass, lists)], torch.float16)
    out, lse = torch.full_like(problem.query, torch.nan), torch.full(problem.query.shape[:2], torch.nan)
    operands = replace(problem.operands, key_scale=0.5, value_scale=2.0)
    flashinfer_tiles.attend(operands, tile_pass, lists, out, lse, merge=False)
    assert_as_exact_as(plain, out, exact)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


def test_without_entries_flashinfer_is_not_asked(on_cpu: Kernel) -> None:
    problem = problems.make(OTHERS, head_dim=64, dtype=torch.float16)
    tile_pass, lists = both_passes(problem)[0]
    none = torch.zeros_like(lists.count)
    empty = replace(lists, begin=none, count=none, full=none, tiles=lists.tiles[:0])
    out = torch.full_like(problem.query, torch.nan)
    lse = ops.sparse_prefill(problem.operands, [(tile_pass, empty)], out, "flashinfer")
    assert on_cpu.launches == 0
    assert (out == 0).all()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v: (q.float(), k, v), "fp16 and bf16, not in torch.float32"),
        (lambda q, k, v: (q, k.bfloat16(), v.bfloat16()), "the pool must be in the dtype of the query"),
        (lambda q, k, v: (q[..., :48], k[..., :48], v[..., :48]), "head sizes 64, 128, 256, not for 48"),
        (lambda q, k, v: (q, k, v[..., :32]), r"not for 64 \(values: 32\)"),
        (lambda q, k, v: (q, k, torch.cat([v, v], 1)[:, :2]), "must have the same strides"),
        (lambda q, k, v: (q, *(torch.cat([x, x], 2)[..., 1:65] for x in (k, v))), "multiples of 16 bytes"),
    ],
    ids=["fp32", "other-pool", "head-size", "value-size", "strides", "alignment"],
)
def test_operands_it_does_not_take_are_refused(on_cpu: Kernel, change: Callable, reason: str) -> None:
    problem = problems.make(OTHERS[:1], head_dim=64, dtype=torch.float16)
    tile_pass, lists = both_passes(problem)[0]
    operands = Operands(*change(problem.query, problem.key_pool, problem.value_pool), 1.0)
    out, lse = torch.empty_like(problem.query), torch.empty(problem.query.shape[:2])
    with pytest.raises(ops.ImplementationUnavailableError, match=reason):
        flashinfer_tiles.attend(operands, tile_pass, lists, out, lse, merge=False)
    assert on_cpu.launches == 0


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], str | None], None]:
    def pretend(capability: tuple[int, int], version: str | None) -> None:
        def find(name: str) -> str:
            assert name == "flashinfer-python"
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(metadata, "version", find)
        monkeypatch.setattr(flashinfer_sources, "folder", lambda: None)

    return pretend


@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((8, 0), "0.7.2", "needs compute capability 9.0 .* this device has 8.0"),
        ((10, 0), "0.7.2", "this device has 10.0"),
        ((9, 0), None, r"is not installed; pip install 'mminference-sgl\[flashinfer\]'"),
        ((9, 0), "0.7.3", r"internals of flashinfer-python 0.7.1 to 0.7.2.post1; 0.7.3 has others \(its package is"),
    ],
)
def test_other_machines_are_told_why(machine, capability: tuple[int, int], version: str | None, reason: str) -> None:
    machine(capability, version)
    with pytest.raises(ops.ImplementationUnavailableError, match=f"'flashinfer' is not available: .*{reason}") as error:
        ops.resolve("flashinfer", CUDA)
    assert "use one of reference, torch, triton or 'auto'" in str(error.value)


def test_it_is_used_by_name_only(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0), "0.7.2.post1")
    monkeypatch.setattr(flashinfer_sources, "folder", lambda: Path("anywhere"))
    monkeypatch.setattr(flashinfer_sources, "changed", lambda root: [])
    assert ops.resolve("flashinfer", CUDA) == "flashinfer"
    assert ops.resolve("auto", CUDA) == "triton"
    with pytest.raises(ops.ImplementationUnavailableError, match=r"needs a CUDA device of compute capability 9\.0"):
        ops.resolve("flashinfer", problems.CPU)


def test_the_check_runs_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(selfcheck, "_in_a_process", lambda arguments, seconds: asked.append(arguments) or "ok")
    served = selfcheck.Served(28, 4, 128, torch.float16, torch.float16)
    assert selfcheck.check("flashinfer", torch.device("cuda:3"), served) == "ok"
    rest = ["flashinfer", "cuda:3", served.text]
    assert asked == [["build", *rest], ["run", *rest]]


def test_the_check_says_how_its_process_ended() -> None:
    cpu, served = problems.CPU, selfcheck.Served.usual(problems.CPU)
    assert selfcheck.isolated("torch", cpu, served) == "ok"
    slow = selfcheck.isolated("torch", cpu, served, build_seconds=0.1)
    assert slow == "was not done after 0.1 s (build on cpu); use 'triton' or 'auto'"
    refused = selfcheck.isolated("flashinfer", cpu, served)
    assert refused.startswith("does not take this model: it computes in fp16 and bf16, not in torch.float32 (build")
    crashed = selfcheck.isolated("torch", cpu, replace(served, dtype="no dtype"))
    assert crashed.startswith("ended with status 1: AttributeError")


def test_the_check_finds_wrong_gathers_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    right, seen = ops.sparse_prefill, []

    def wrong(operands, passes, out, implementation):
        seen.append(passes[0][0].keys.contiguous)
        lse = right(operands, passes, out, implementation)
        if seen[-1]:
            out[-1] += 1
        return lse

    monkeypatch.setattr(ops, "sparse_prefill", wrong)
    assert "computes wrong" in selfcheck.main(["run", "torch", "cpu", selfcheck.Served.usual(problems.CPU).text])
    assert seen == [False, True]


# -- FlashInfer's sources, where those that were read are installed ----------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> Path:
    """The folder of FlashInfer's sources; nothing of it is imported."""
    reason = flashinfer_sources.problem()
    if reason:
        pytest.skip(reason)
    root = flashinfer_sources.folder()
    assert root is not None
    return root / "data"


def test_sources_are_known_by_what_they_are(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version with the same parts is taken, and one with others refused with their names."""
    copied = tmp_path / "flashinfer"
    scheduler, modules = "data/include/flashinfer/attention/scheduler.cuh", "jit/attention/modules.py"
    launcher = [f"data/csrc/{name}" for name in (*flashinfer_sources._BINDING, *flashinfer_sources._TEMPLATES)]
    headers = (sources.parent / flashinfer_sources._HOPPER).glob("*.cuh")
    kernel = [path.relative_to(sources.parent) for path in headers]
    for name in (scheduler, modules, *launcher, *kernel):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources.parent / name, copied / name)
    monkeypatch.setattr(flashinfer_sources, "folder", lambda: copied)
    monkeypatch.setattr(metadata, "version", lambda name: "0.8.0")
    assert flashinfer_sources.problem() == ""
    (copied / scheduler).write_text((copied / scheduler).read_text() + "struct Other {};\n")
    assert flashinfer_sources.problem() == "", "nothing of that was read"
    for name, edited in (("plan", scheduler), ("kernel", f"{flashinfer_sources._HOPPER}/epilogue.cuh")):
        text = (copied / edited).read_text()
        (copied / edited).write_text(text.replace("int64_t", "int32_t"))
        assert f"0.8.0 has others ({name})" in flashinfer_sources.problem()
        (copied / edited).write_text(text)
    (copied / edited).unlink()
    assert "0.8.0 has others (kernel)" in flashinfer_sources.problem()
    (copied / scheduler).unlink()
    assert "scheduler.cuh cannot be read" in flashinfer_sources.problem()


def test_the_plan_has_our_fields(sources: Path) -> None:
    text = (sources / "include/flashinfer/attention/scheduler.cuh").read_text()
    struct = text.partition("struct PrefillPlanSM90Info")[2]
    vector = struct.partition("ToVector() const")[2].partition("}")[0]
    plural = {"qo_len": "qo_lens", "kv_len": "kv_lens"}
    names = re.findall(r"(\w+)_offset", vector)
    assert tuple(plural.get(name, name) for name in names) == flashinfer_work.FIELDS
    assert re.findall(r"\w+", vector)[-1] == "same_schedule_for_all_heads"


def test_the_entry_point_takes_our_arguments(sources: Path) -> None:
    text = (sources / "csrc/batch_prefill_sm90_jit_binding.cu").read_text()
    (signature,) = re.findall(r"void BatchPrefillWithPagedKVCacheSM90Run\(([^;]*)ADDITIONAL_FUNC_PARAMS\)", text)
    names = [part.split()[-1] for part in signature.replace("\n", " ").split(",")]
    assert names == [
        *("float_workspace_buffer", "int_workspace_buffer", "plan_info_vec", "q", "paged_k_cache", "paged_v_cache"),
        *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "o", "maybe_lse"),
        *("mask_mode_code", "layout", "window_left", "enable_pdl"),
    ]
    modules = (sources.parent / "jit/attention/modules.py").read_text()
    generator = modules.partition("def _gen_batch_prefill_module(")[2].partition("if not fp8_enabled:")[2]
    tensors, scalars = re.findall(r"additional_(?:tensor|scalar)_names = \[([^\]]*)\]", generator)[:2]
    assert re.findall(r'"(\w+)"', tensors) == [
        *("maybe_prefix_len_ptr", "maybe_token_pos_in_items_ptr", "maybe_max_item_len_ptr", "maybe_scale_v")
    ]
    assert re.findall(r'"(\w+)"', scalars) == [
        *("logits_soft_cap", "sm_scale", "scale_v_scalar", "token_pos_in_items_len")
    ]


def test_items_have_the_kernels_rows(sources: Path) -> None:
    text = (sources / "include/flashinfer/attention/hopper/prefill_sm90.cuh").read_text()
    paged = text.rpartition("cudaError_t BatchPrefillWithPagedKVCacheDispatched")[2]
    rows = [int(number) for number in re.findall(r"/\*CTA_Q_=\*/(\d+)", paged)]
    assert rows == list(flashinfer_tiles.CTA_ROWS.values())
