"""The self-check at start runs what is served, and finds what is wrong with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import problems
from mminference_sgl.backend import selfcheck
from mminference_sgl.backend.selfcheck import Served
from mminference_sgl.kernels import fa4, ops
from test_triton import run

FP8 = torch.float8_e4m3fn


def test_kernels_that_are_served_are_run() -> None:
    """Both passes, the model's head size and group, and tiles in parts."""
    (found,) = run("interpret_selfcheck.py", TRITON_INTERPRET="1")
    assert found["verdict"] == "ok"
    for constants in found["attend"] + found["probe"]:
        assert (constants["HEAD_DIM"], constants["GROUP"]) == (80, 3)
    assert {(bool(c["FAR"]), bool(c["MERGE"])) for c in found["attend"]} >= {(False, False), (True, True)}
    assert any(constants["PARTS"] > 1 for constants in found["probe"])


@pytest.mark.parametrize(
    "served",
    [
        Served(28, 4, 128, torch.bfloat16, torch.bfloat16),
        Served(8, 1, 64, torch.bfloat16, FP8, 64, 32),
        Served(2, 2, 80, torch.float32, torch.float32, 32, 128),
    ],
    ids=["28q4kv", "fp8", "fp32"],
)
def test_what_is_right_is_found_right(served: Served) -> None:
    assert Served.parse(served.text) == served
    assert selfcheck.check("torch", problems.CPU, served) == "ok"


@pytest.mark.parametrize("scale", ["key_scale", "value_scale"])
def test_a_scale_that_is_left_out_is_found(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_prefill

    def wrong(operands, passes, out, implementation):
        return right(replace(operands, **{scale: 1.0}), passes, out, implementation)

    monkeypatch.setattr(ops, "sparse_prefill", wrong)
    verdict = selfcheck.check("torch", problems.CPU, Served(4, 2, 64, torch.float32, FP8))
    assert verdict.startswith("computes wrong on cpu"), verdict


def test_what_runs_kernels_of_others_is_tried_in_processes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, built = [], []
    monkeypatch.setattr(selfcheck, "_in_a_process", lambda arguments, seconds: asked.append(arguments) or "ok")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (10, 0))
    monkeypatch.setattr(fa4, "build", lambda *arguments: built.append(arguments))
    served = Served(28, 4, 128, torch.float16, FP8)
    assert selfcheck.check("fa4", torch.device("cuda:3"), served) == "ok"
    assert asked == [[stage, "fa4", "cuda:3", served.text] for stage in ("build", "run")]
    # Lists of single heads, seven on a KV head, and lists of whole groups.
    assert built == [(torch.float16, 128, 64, lists, 10) for lists in (7, 1)]
    monkeypatch.setattr(selfcheck, "_in_a_process", lambda arguments, seconds: "computes wrong")
    assert selfcheck.check("fa4", torch.device("cuda:3"), served).startswith("computes wrong (build on cuda:3); use")
    assert len(built) == 2


def test_processes_of_their_own_end_in_time_and_say_why() -> None:
    served = Served.usual(problems.CPU)
    assert selfcheck.isolated("torch", problems.CPU, served) == "ok"
    slow = selfcheck.isolated("torch", problems.CPU, served, build_seconds=0.1)
    assert slow == "was not done after 0.1 s (build on cpu); use 'triton' or 'auto'"
    refused = selfcheck.isolated("fa4", problems.CPU, served)
    assert refused.startswith("does not take this model: it computes in fp16 and bf16, not in torch.float32 (build")
    crashed = selfcheck.isolated("torch", problems.CPU, replace(served, dtype="no dtype"))
    assert crashed.startswith("ended with status 1: AttributeError")


def test_what_does_not_compile_is_told() -> None:
    """Here CuTe DSL finds no device to compile for."""
    if fa4.differences() or torch.cuda.is_available():
        pytest.skip("flash-attn-4 is not installed, or there is a device")
    served = replace(Served.usual(problems.CPU), dtype=torch.float16)
    assert selfcheck.main(["build", "fa4", "cpu", served.text]).startswith("does not compile: ")
