"""The self-check at start runs what is served, and finds what is wrong with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import problems
from mminference_sgl.backend import selfcheck
from mminference_sgl.backend.selfcheck import Served
from mminference_sgl.kernels import ops
from test_triton import run

FP8 = torch.float8_e4m3fn


def test_kernels_that_are_served_are_run() -> None:
    """Gathered keys and whole pages, both passes, the model's head size, group and pool, and tiles in parts."""
    (found,) = run("interpret_selfcheck.py", TRITON_INTERPRET="1")
    assert found["verdict"] == "ok"
    for constants in found["attend"] + found["probe"]:
        assert (constants["HEAD_DIM"], constants["GROUP"], constants["FP8_BITS"]) == (80, 3, True)
    bodies = {(bool(c["CONTIGUOUS"]), bool(c["FAR"]), bool(c["MERGE"])) for c in found["attend"]}
    assert bodies >= {(False, False, False), (False, True, True), (True, False, False)}
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
