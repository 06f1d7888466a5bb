"""``fa4`` without a GPU: what flash-attn-4 gets and gives, its kernel compiled with our masks, and what it refuses."""

from __future__ import annotations

import importlib.util
import inspect
from concurrent.futures import Future
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import problems
from interpret_fa4 import BATCH, CASES
from mminference_sgl.kernels import fa4, ops
from test_attention import random_lists
from test_triton import interpret_side_by_side

ARCHITECTURES = ("sm_90", "sm_100")

installed = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="flash-attn-4 is not installed")


@cache
def _started() -> dict[tuple[str, ...], Future[list[dict[str, Any]]]]:
    """All scripts, side by side; what the first test waits for serves the others."""
    commands = [(script, arch) for script in ("interpret_fa4.py", "aot_fa4.py") for arch in ARCHITECTURES]
    return dict(zip(commands, interpret_side_by_side(*commands), strict=True))


def interpreted() -> list[dict[str, Any]]:
    return [line for arch in ARCHITECTURES for line in _started()["interpret_fa4.py", arch].result()]


@installed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attend_equals_reference(case) -> None:
    """Through an emulation of flash-attn-4 behind its own checks of what it is called with."""
    lines = [line for line in interpreted() if line["case"] == case.name]
    assert {line["lists"] for line in lines} == ({"random", "dense", "empty"} if case.more_lists else {"random"})
    for line in lines:
        assert line["same_blind"]
        assert not line["nan"]
        assert max(line["shares"], default=0.0) <= 1.0, line
        assert bool(line["tiles"]["all"]) == (line["lists"] != "empty")
        if case.tile_queries <= 128 and case.head_dim == case.value_dim:
            assert line["late"] == 0, "a kernel is not compiled ahead"
        lanes = 256 if case.tile_queries > 128 else 128
        assert {shape[1] for shape in line["queries"]} == {lanes}
        heads = {shape[2] for shape in line["queries"]}
        assert heads <= {case.heads, case.kv_heads if case.shared else case.heads}


@installed
def test_lists_have_full_tiles_and_others() -> None:
    tiles = [line["tiles"] for line in interpreted() if line["lists"] == "random"]
    full = sum(each["full"] for each in tiles)
    assert 0 < full < sum(each["all"] for each in tiles)


@installed
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile(arch: str) -> None:
    """Keys and values are loaded by descriptors of three dimensions: a sequence's stride of 0 is no part of them."""
    lines = _started()["aot_fa4.py", arch].result()
    assert {(line["head_dim"], line["tile_keys"]) for line in lines} == {
        (64, 64),
        (80, 64),
        (128, 64),
        (128, 128),
        (256, 64),
    }
    for line in lines:
        assert line["loads"] in ([3, 4], [4]), line
        # What flash-attn-4's own kernels for Blackwell keep there.
        assert line["STACK"] <= (0 if arch == "sm_90" else 16), line
    assert sum(line["loads"] == [4] for line in lines) == 1, "only the kernel for one query tile may know of sequences"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ((torch.float16, 64, 64, 64, 9), ""),
        ((torch.bfloat16, 128, 128, 128, 9), ""),
        ((torch.bfloat16, 72, 40, 64, 10), ""),
        ((torch.bfloat16, 256, 256, 64, 9), ""),
        ((torch.bfloat16, 256, 256, 128, 10), ""),
        ((torch.bfloat16, 192, 128, 64, 9), ""),
        ((torch.float32, 64, 64, 64, 9), "fp16 and bf16, not in torch.float32"),
        ((torch.float8_e4m3fn, 64, 64, 64, 9), "not in torch.float8_e4m3fn"),
        ((torch.bfloat16, 36, 36, 64, 9), "multiples of 8 up to 256, not 36"),
        ((torch.bfloat16, 512, 512, 64, 9), "up to 256, not 512"),
        ((torch.bfloat16, 192, 128, 64, 10), "up to 128, and 256, not 192 (values: 128)"),
        ((torch.bfloat16, 256, 128, 64, 10), "up to 128, and 256, not 256 (values: 128)"),
        ((torch.bfloat16, 256, 256, 128, 9), "a tile_keys of 64 for head size 256, not 128"),
        ((torch.bfloat16, 128, 128, 32, 9), "a tile_keys of 64 or 128 for head size 128, not 32"),
    ],
    ids=str,
)
def test_unsupported_says_what_it_takes(kind: tuple, reason: str) -> None:
    found = fa4.unsupported(*kind)
    assert reason in found
    assert bool(reason) == bool(found)


def test_attend_refuses_what_flash_attn_4_does_not_take() -> None:
    problem = problems.make(BATCH)
    lists = random_lists(problem, problem.plan.near, 0)
    out, lse = torch.empty_like(problem.query), torch.empty(problem.query.shape[:2])
    with pytest.raises(ops.ImplementationUnavailableError, match=r"'fa4': .* not in torch.float32; use 'triton'"):
        fa4.attend(problem.operands, problem.plan.near, lists, out, lse, merge=False)


def test_unavailable_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert fa4.unavailable(problems.CPU) == "it needs a CUDA device of compute capability 9.0, 10.0, 10.3, this is cpu"
    for capability, found in (((8, 9), True), ((12, 0), True), ((9, 0), False), ((10, 3), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device, said=capability: said)
        monkeypatch.setattr(fa4, "differences", lambda: "")
        assert ("this device has {}.{}".format(*capability) in fa4.unavailable(cuda)) == found


@pytest.mark.parametrize("of_another", [False, True], ids=["no-package", "flash-attn-2"])
def test_without_flash_attn_4(of_another: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(_name: str) -> None:
        if not of_another:
            raise ModuleNotFoundError

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert fa4.differences.__wrapped__() == "flash-attn-4 is not installed; pip install 'mminference-sgl[fa4]'"


@installed
def test_another_interface_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each argument of each function and class that is called."""
    assert fa4.differences() == ""
    for (module, name), arguments in fa4._CALLED.items():
        for argument in arguments:

            def signature(called: Any, without: str = argument, of: str = name) -> Any:
                names = set(inspect.signature(called).parameters)
                return SimpleNamespace(parameters=names - {without} if called.__name__ == of else names)

            monkeypatch.setattr(fa4, "inspect", SimpleNamespace(signature=signature))
            said = f"this flash-attn-4 has another interface: {module}.{name} takes no {argument}"
            assert fa4.differences.__wrapped__() == said


@installed
def test_what_does_not_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fa4._CALLED, ("flash_attn.cute.no_such_module", "nothing"), ())
    assert fa4.differences.__wrapped__().startswith("flash-attn-4 does not import: ModuleNotFoundError")
    monkeypatch.delitem(fa4._CALLED, ("flash_attn.cute.no_such_module", "nothing"))
    monkeypatch.setitem(fa4._CALLED, ("flash_attn.cute.interface", "gone"), ())
    assert "'flash_attn.cute.interface' has no attribute 'gone'" in fa4.differences.__wrapped__()
