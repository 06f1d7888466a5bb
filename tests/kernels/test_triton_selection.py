"""Probe, search and lists in Triton: against the portable ones in the interpreter, and compiled for GPUs without one.

Both run in processes of their own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import copy
import enum
from concurrent.futures import Future
from functools import cache
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from triton.runtime.jit import JITFunction

import aot_selection
import interpret_probe
import interpret_select
import problems
from mminference_sgl.kernels import choice, probe, probe_triton
from mminference_sgl.kernels.stages import stages_of
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from test_triton import DTYPES, interpret_side_by_side, run


@cache
def _interpreted() -> dict[str, Future[list[dict[str, Any]]]]:
    commands = (("interpret_select.py",), *(("interpret_probe.py", dtype) for dtype in DTYPES))
    return dict(zip(("selections", *DTYPES), interpret_side_by_side(*commands), strict=True))


def probes(dtype: str) -> list[dict[str, Any]]:
    return _interpreted()[dtype].result()


def selections() -> list[dict[str, Any]]:
    return _interpreted()["selections"].result()


@pytest.mark.parametrize("case", interpret_probe.CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_equals_the_portable_one(dtype: str, case: interpret_probe.Case) -> None:
    """Weights are rounded where they meet values in fp16; deviations are differences of what is as large as outputs."""
    lines = [line for line in probes(dtype) if line["case"] == case.name]
    assert any(
        line["modality"] == "media" and {"far-0 mass", "far-1 deviation"} <= set(line["errors"]) for line in lines
    )
    eps = torch.finfo(getattr(torch, dtype)).eps
    for line in lines:
        for name, error in line["errors"].items():
            allowed = max(1e-5, 4 * eps * line["sizes"]["output" if "deviation" in name else name])
            assert error <= allowed, (name, line)
        # A row whose keys all lie in one tile deviates by nothing.
        assert all(size > 0 for name, size in line["sizes"].items() if "deviation" not in name)


def test_searches_find_the_same() -> None:
    lines = [line for line in selections() if "levels_differ" in line]
    assert {line["kernel"] for line in lines} == {"columns and diagonals", "lines"}
    assert any(len(line["values"]) > 5 for line in lines)
    for line in lines:
        # Sums are added up in another order, and a level is a logarithm rounded down.
        assert line["levels_differ"] <= 0.03 * line["levels"], line
        assert line["largest_difference"] <= 1, line
        assert line["counts_differ"] == 0, line
        assert line["coverage_error"] <= 1e-6, line
        assert line["error_error"] <= 1e-4 * line["error_size"], line


def test_lists_are_the_same() -> None:
    lines = [line for line in selections() if line["kernel"] == "lists"]
    assert len(lines) == 4 * len(interpret_select.CASES)
    assert all(line["same"] and line["tiles"] > line["full"] for line in lines)
    assert any(line["full"] for line in lines)


def test_layers_are_the_same() -> None:
    lines = [line for line in selections() if line["kernel"] == "layer"]
    assert len(lines) == 2 * len(interpret_select.LAYERS)
    for line in lines:
        assert line["error"] <= 1e-5 * line["scale"], line
        assert line["same_tiles"], line
        assert line["same_guarded"], line
    assert any(0 < guarded < 4 for line in lines for guarded in line["guarded"])
    assert any(density < 0.5 for line in lines for density in line["density"])


@cache
def compiled() -> list[aot_selection.Compiled]:
    return [aot_selection.Compiled(**line) for line in run("aot_selection.py", "--json")]


def test_no_kernel_loads_what_another_thread_may_have_stored() -> None:
    """Nothing orders a load behind another thread's store.

    The kernel that joins pieces stores last, what it computed from all that it loaded.
    """
    assert not {(r.kernel, name) for r in compiled() for name in r.read_and_written if r.kernel != "join"}


def test_kernels_compile_without_spills(capsys: pytest.CaptureFixture[str]) -> None:
    results = compiled()
    with capsys.disabled():
        print()
        print("\n".join(aot_selection.table(results)))
    assert len(results) == len(aot_selection.jobs())
    assert not [result for result in results if not result.fits]


AUTO = HeadSpec()
BOUNDARY = HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid")


@pytest.mark.parametrize("specs", [[AUTO] * 4, [BOUNDARY, AUTO, AUTO, BOUNDARY]], ids=["auto", "by head and boundary"])
def test_no_stage_of_a_layer_waits_for_the_device(specs: list[HeadSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: whoever asked for one, or for a shape that depends on one, would fail.

    From the second layer on nothing may come from the host either.
    """
    monkeypatch.setattr(JITFunction, "run", lambda *_args, **_kwargs: None)
    forget(monkeypatch)
    problem = problems.make(problems.MIXED, tile_queries=32, tile_keys=16)
    with FakeTensorMode() as mode:
        problem = without_values(problem, mode)
        given = problem.operands, problem.plan, specs, Config()
        prefill.run_layer(*given, torch.empty_like(problem.query), "triton", 0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", None)
            reports = prefill.run_layer(*given, torch.empty_like(problem.query), "triton", 0)
        assert len(reports) == len(problem.plan.requests)
        waiting = stages_of("triton")._replace(lists=stages_of("torch").lists)
        monkeypatch.setattr(prefill, "stages_of", lambda _name: waiting)
        with pytest.raises(DynamicOutputShapeException):
            prefill.run_layer(*given, torch.empty_like(problem.query), "triton")


def test_requests_of_a_batch_are_launched_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pointer lies by 16 bytes is specialised on: a kernel would be compiled while serving.

    Nothing is left to Triton's defaults that decides about bits.
    """
    forget(monkeypatch)
    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *given, **named: launches.append((kernel, given, named)))
    problem = problems.make(problems.MIXED, tile_queries=32, tile_keys=16)
    with FakeTensorMode() as mode:
        problem = without_values(problem, mode)
        specs = [AUTO, AUTO, BOUNDARY, BOUNDARY]
        prefill.run_layer(problem.operands, problem.plan, specs, Config(), torch.empty_like(problem.query), "triton")
    assert len({kernel.__name__ for kernel, _, _ in launches}) == 11
    for kernel, given, named in launches:
        assert named["enable_fp_fusion"] is True, kernel.__name__
        for name, value in zip(kernel.arg_names, given, strict=False):
            if isinstance(value, torch.Tensor) and name not in kernel.do_not_specialize_on_alignment:
                assert value.storage_offset() * value.element_size() % 16 == 0, (kernel.__name__, name)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is brought to the device once is brought anew, and left behind."""
    for module, name in ((choice, "mask_of"), (probe_triton, "_bounds"), (probe_triton, "_signs")):
        monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))
    monkeypatch.setattr(probe_triton, "signs", probe.signs.__wrapped__)


def without_values(value: Any, mode: FakeTensorMode) -> Any:
    """A copy of an object with the shapes of its tensors only."""
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if isinstance(value, list | tuple):
        return type(value)(without_values(item, mode) for item in value)
    if isinstance(value, dict):
        return {key: without_values(item, mode) for key, item in value.items()}
    if isinstance(value, enum.Enum) or not type(value).__module__.startswith(("mminference_sgl", "problems")):
        return value
    if not hasattr(value, "__dict__"):
        return value
    result = copy.copy(value)
    for name, item in vars(value).items():
        object.__setattr__(result, name, without_values(item, mode))
    return result
