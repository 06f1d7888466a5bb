"""Probe, search and lists in Triton: against the portable ones in the interpreter, and compiled for GPUs without one.

Both run in processes of their own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

import aot_selection
import interpret_probe
import interpret_select
import problems
from mminference_sgl.kernels import copy_triton, operands
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from test_triton import DTYPES, interpret_side_by_side, run

PARTS = 2
"""Processes among which the layers are divided."""


@cache
def _interpreted() -> list[Future[list[dict[str, Any]]]]:
    layers = [("interpret_select.py", str(part), str(PARTS)) for part in range(PARTS)]
    return interpret_side_by_side(*layers, *(("interpret_probe.py", dtype) for dtype in DTYPES))


def probes(dtype: str) -> list[dict[str, Any]]:
    return _interpreted()[PARTS + DTYPES.index(dtype)].result()


def layers() -> dict[str, dict[str, Any]]:
    return {line["layer"]: line for part in _interpreted()[:PARTS] for line in part.result()}


@pytest.mark.parametrize("case", interpret_probe.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_equals_the_portable_one(dtype: str, case: interpret_probe.Case) -> None:
    """Weights are rounded where they meet values in fp16; deviations are differences of what is as large as outputs."""
    lines = [line for line in probes(dtype) if line["case"] == case.name]
    assert any(
        line["modality"] == "media" and {"cell 9 mass", "cell 31 deviation"} <= set(line["errors"]) for line in lines
    )
    eps = torch.finfo(getattr(torch, dtype)).eps
    for line in lines:
        for name, error in line["errors"].items():
            # A squared length is off by twice what the output is, and sums up to 128 of them.
            scale = line["sizes"]["output" if "deviation" in name else name] * (8 if name == "size" else 1)
            allowed = max(1e-5, 4 * eps * scale)
            assert error <= allowed, (name, line)
        # A row whose keys all lie in one tile deviates by nothing, and a short text has no keys that are far.
        sizes = [size for name, size in line["sizes"].items() if name in {"output", "size", "sequence 0 mass"}]
        assert min(sizes) > 0
        assert line["modality"] == "text" or all(size > 0 for name, size in line["sizes"].items() if "mass" in name)


@pytest.mark.parametrize("layer", interpret_select.LAYERS, ids=lambda layer: layer.name)
def test_layers_are_the_same(layer: interpret_select.Layer) -> None:
    """The same forms, thresholds, lists, repairs and reports as the portable stages find; the same bits every time."""
    line = layers()[layer.name]
    assert line["error"] <= 1e-5 * line["scale"], line
    assert line["same_lists"], line
    assert line["same_picks"], line
    assert line["same_reports"], line
    assert line["error_is_bounded"], line
    assert line["same_bits"], line
    assert line["ordered"], line
    assert line["pieces"] > 0, "lists come in pieces"


def test_layers_show_what_they_are_for() -> None:
    lines = layers().values()
    assert any(0 < guarded < 4 for line in lines for guarded in line["guarded"])
    assert any(density < 0.5 for line in lines for density in line["density"])


@cache
def compiled() -> list[aot_selection.Compiled]:
    return [aot_selection.Compiled(**line) for line in run("aot_selection.py", "--json")]


def test_no_kernel_loads_what_another_thread_may_have_stored() -> None:
    """Nothing orders a load behind another thread's store.

    The kernel that joins pieces stores last, what it computed from all that it loaded. Those of selection find their
    memory in tables, where this does not see it; they have barriers of their own.
    """
    seen = [result for result in compiled() if result.kernel not in {"join", *aot_selection.SELECTION}]
    assert not {(result.kernel, name) for result in seen for name in result.read_and_written}


def test_kernels_compile_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    results = compiled()
    with capsys.disabled():
        print()
        print("\n".join(aot_selection.table(results)))
    assert len(results) == len(aot_selection.jobs())
    assert not [result for result in results if not result.fits]


AUTO = HeadSpec()
BOUNDARY = HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid")
GRID = HeadSpec("dense", "dense", "grid", "grid")
LAUNCHES = 12
"""Of a layer, whatever its requests: copies, probe, search, decision, lists, attention, guard."""
OF_A_LAYER = {
    "copy": {"p_key", "p_value"},
    "probe": {"p_query"},
    "held": {"p_query"},
    "rows": set(),
    "candidates": set(),
    "curves": set(),
    "decide": {"layer"},
    "lists": set(),
    "attend": {"p_query", "p_out", "p_lse", "p_piece_out", "p_piece_lse"},
    "guard": {"p_out", "p_lse", "p_report"},
}
"""By kernel: what is a layer's own."""
KERNELS = {*OF_A_LAYER}


class Operators(TorchDispatchMode):
    """Notes what PyTorch computes: neither views nor memory that is only made room for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        storages = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        is_view = bool(made) and all(x.untyped_storage().data_ptr() in storages for x in made)
        if not name.startswith(("empty", "new_empty")) and (name.endswith("_") or not is_view):
            self.seen.append(name)
        return found


Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def launched(
    monkeypatch: pytest.MonkeyPatch, requests: Sequence[problems.Request], specs: Sequence[HeadSpec]
) -> tuple[list[list[Launch]], list[str]]:
    """What the layers of a forward launch, and what PyTorch does beside that in the last one; no kernel runs."""
    launches: list[list[Launch]] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *given, **named: launches[-1].append((kernel, given, named)))
    monkeypatch.setattr(operands, "_copy", copy_triton.copy)
    problem = problems.make(requests, tile_queries=32, tile_keys=16, heads=4, kv_heads=2, sharing=(2,))
    for layer in range(3):
        of_layer = replace(problem.operands, key_pool=problem.key_pool.clone(), value_pool=problem.value_pool.clone())
        launches.append([])
        with Operators() as operators:
            reports = prefill.run_layer(
                of_layer, problem.plan, specs, Config(), torch.empty_like(problem.query), "triton", layer
            )
        assert len(reports) == len(problem.plan.requests)
    return launches, operators.seen


@pytest.mark.parametrize("specs", [[AUTO] * 4, [BOUNDARY, BOUNDARY, AUTO, AUTO]], ids=["auto", "by head and boundary"])
def test_a_layer_is_a_few_launches_and_nothing_else(specs: list[HeadSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of PyTorch, so nothing that waits for the device or comes from the host."""
    request, counts = problems.MIXED[0], []
    for requests in ([request], [request] * 2):
        (*_, last), operators = launched(monkeypatch, requests, specs)
        assert not operators
        counts.append(len(last))
    assert counts[0] <= LAUNCHES, [kernel.__name__ for kernel, _, _ in last]
    assert counts[1] == counts[0], "all requests are launched together"


def test_requests_of_a_batch_are_launched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pointer lies by 16 bytes is specialised on: a kernel would be compiled while serving.

    Nothing is left to Triton's defaults that decides about bits.
    """
    (*_, last), _ = launched(monkeypatch, problems.MIXED, [AUTO, AUTO, BOUNDARY, BOUNDARY])
    assert {kernel.__name__.removesuffix("_kernel") for kernel, _, _ in last} == KERNELS
    for kernel, given, named in last:
        assert named["enable_fp_fusion"] is True, kernel.__name__
        for name, value in zip(kernel.arg_names, given, strict=False):
            if isinstance(value, torch.Tensor) and name not in kernel.do_not_specialize_on_alignment:
                assert value.storage_offset() * value.element_size() % 16 == 0, (kernel.__name__, name)


def test_what_is_launched_is_the_same_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the layer's id, its operands and what it makes of them: a graph of one layer could run all of them."""
    (_, one, two), _ = launched(monkeypatch, problems.MIXED[:2], [AUTO] * 4)
    assert [kernel for kernel, _, _ in one] == [kernel for kernel, _, _ in two]
    for (kernel, given, named), (_, other, others) in zip(one, two, strict=True):
        assert named == others
        for name, a, b in zip(kernel.arg_names, given, other, strict=False):
            assert name in OF_A_LAYER[kernel.__name__.removesuffix("_kernel")] or same(a, b), (kernel.__name__, name)


def test_layers_of_other_patterns_have_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JITFunction, "run", lambda *_given, **_named: None)
    problem = problems.make(problems.MIXED[:1], tile_queries=32, tile_keys=16, heads=4, kv_heads=2, sharing=(2,))
    sizes = []
    for specs in ([AUTO] * 4, [AUTO, AUTO, GRID, GRID], [GRID, GRID, AUTO, AUTO]):
        out = torch.empty_like(problem.query)
        prefill.run_layer(problem.operands, problem.plan, specs, Config(), out, "triton")
        sizes.append(sum(x.nbytes for x in problem.plan.memory.values()))
    assert len(problem.plan.prepared) == 3
    assert sizes[0] <= sizes[1] == sizes[2] < 1.5 * sizes[0], "more forms need more"


def test_tables_are_those_of_the_settings_and_of_the_place_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one plan, as benchmarks and searches ask for: heads of a group that come in parts have other probe rows."""
    monkeypatch.setattr(JITFunction, "run", lambda *_given, **_named: None)
    problem = problems.make(problems.MIXED[:1], tile_queries=32, tile_keys=16, heads=4, kv_heads=2, sharing=(2,))
    blocks = [problem.operands.block(slice(head, head + 1)) for head in range(2)]
    for config in (Config(), Config(error=0.5)):
        for block in (*blocks, blocks[0]):
            prefill.select_layer(block, problem.plan, [AUTO], config, "triton")
    assert len(problem.plan.prepared) == 4


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same number or the same memory."""
    return one.data_ptr() == other.data_ptr() if isinstance(one, torch.Tensor) else one == other
