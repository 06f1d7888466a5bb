"""The dtype that the CPU platform serves in: by what the CPU computes fast, unless the user says it."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mminference_sgl.portable.dtype import WORTH_TWICE_THE_MEMORY, LinearTimes, least, measure_linear

on_this_platform = pytest.mark.skipif(
    os.environ.get("SGLANG_PLATFORM") != "portable_cpu", reason="SGLang runs on another platform in this process"
)

CPUS = {
    "amx": (0.2, "bfloat16"),
    "avx512_bf16": (2.1, "bfloat16"),
    "avx512": (4.3, "float32"),
    "avx2": (7.0, "float32"),
    "avx2, bfloat16 in a plain loop": (400.0, "float32"),
}
"""Seconds in bfloat16 over seconds in float32, measured, and the dtype to serve in."""
cpus = pytest.mark.parametrize(("ratio", "dtype"), CPUS.values(), ids=CPUS)


@pytest.fixture
def platform() -> Any:
    """The module of the platform's class, which SGLang imports."""
    from sglang.srt.platforms import current_platform

    return importlib.import_module(type(current_platform).__module__)


def resolved(**given: Any) -> Any:
    """Server arguments as the platform leaves them."""
    from sglang.srt.platforms import current_platform

    defaults: dict[str, Any] = {"attention_backend": None, "mem_fraction_static": 0.5, "max_total_tokens": None}
    defaults |= {"max_running_requests": 1, "watchdog_timeout": 1.0, "dtype": "auto", "quantization": None}
    args = SimpleNamespace(**(defaults | given), _raw_input={"dtype": "auto"} | given)
    current_platform.apply_server_args_defaults(args)
    return args


@pytest.fixture
def no_measuring(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "measure_linear", lambda: pytest.fail("measured"))


@on_this_platform
@cpus
def test_dtype_by_speed_said_in_one_line(
    ratio: float, dtype: str, platform: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platform, "measure_linear", lambda: LinearTimes(ratio * 1e-4, 1e-4))
    with caplog.at_level(logging.INFO, "mminference_sgl"):
        assert resolved().dtype == dtype
    (line,) = caplog.messages
    assert f"serving in {dtype}: " in line
    assert f"takes {ratio:.1f} times as long" in line
    assert "--dtype" in line


@on_this_platform
@pytest.mark.usefixtures("no_measuring")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "half", "float32"])
def test_dtype_given_by_the_user_stays(dtype: str) -> None:
    assert resolved(dtype=dtype).dtype == dtype


@on_this_platform
@pytest.mark.usefixtures("no_measuring")
def test_quantised_checkpoints_are_left_to_sglang() -> None:
    assert resolved(quantization="awq").dtype == "auto"


@on_this_platform
def test_every_part_follows(platform: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).half(), torch.nn.Linear(3, 1).double())
    model.requires_grad_(False)
    platform.to_one_dtype(model, torch.float32)
    assert [part.weight.dtype for part in model] == [torch.float32, torch.float32, torch.float64]


@on_this_platform
def test_quantised_models_keep_their_scales(platform: Any) -> None:
    model = torch.nn.Linear(3, 3).half().requires_grad_(False)
    model.quant_config = object()
    platform.to_one_dtype(model, torch.float32)
    assert model.weight.dtype is torch.float16


def test_other_work_on_the_machine_does_not_count() -> None:
    """The least of several runs, in turn; what takes long is not run again."""
    now = 0.0
    runs: list[str] = []

    def takes(name: str, seconds: list[float]) -> Any:
        times = itertools.cycle(seconds)

        def run() -> None:
            nonlocal now
            runs.append(name)
            now += next(times)

        return run

    quick = takes("quick", [0.009, 0.001, 0.004])
    slow = takes("slow", [0.4])
    assert least([slow, quick], lambda: now) == pytest.approx([0.4, 0.001])
    assert runs[:4] == ["slow", "quick", "quick", "quick"]


def test_measuring_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    times = measure_linear()
    assert torch.get_num_threads() == threads
    assert 0 < times.float32 < 0.1
    assert times.bfloat16 > 0
    assert (times.dtype == "float32") == (times.bfloat16 > WORTH_TWICE_THE_MEMORY * times.float32)
