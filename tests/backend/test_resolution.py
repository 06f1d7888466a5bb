"""SGLang's own resolution of arguments with this backend named: stock but for who prefills, or stock altogether."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_models

OURS = ["--attention-backend", "mminference"]
NAMES = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


@pytest.fixture(scope="module")
def checkpoint(pytestconfig: pytest.Config) -> str:
    cache = Path(str(pytestconfig.cache.mkdir("tiny_models")))
    return str(tiny_models.path_of("qwen2_5_vl", cache))


@pytest.fixture
def resolved(checkpoint: str, monkeypatch: pytest.MonkeyPatch):
    """From a command line, SGLang's resolved options as a mapping; ``dense`` is what it takes by default."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.arg_groups import overrides
    from sglang.srt.arg_groups.pipeline import run_resolution_pipeline
    from sglang.srt.server_args import prepare_server_args

    def resolved(*arguments: str, dense: str | None = None) -> dict[str, Any]:
        if dense is not None:
            monkeypatch.setattr("mminference_sgl.portable.platform.DENSE_BACKEND_NAME", dense)
        options = prepare_server_args(["--model-path", checkpoint, *arguments])
        run_resolution_pipeline(options)
        view = overrides.resolved_view(options)
        return {name: getattr(view, name) for name in type(options).__struct_fields__}

    return resolved


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What this package logs; SGLang takes the root logger's handlers away when it resolves."""
    logger = logging.getLogger("mminference_sgl")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def names(found: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(found[name] for name in NAMES)


def others(found: dict[str, Any]) -> dict[str, str]:
    # Seeds and ports are drawn anew.
    drawn = {*NAMES, "random_seed", "nccl_port", "dist_init_addr"}
    return {name: repr(value) for name, value in found.items() if name not in drawn}


@pytest.mark.parametrize(
    "ours", [OURS, ["--prefill-attention-backend", "mminference"]], ids=["both-phases", "prefill-only"]
)
@pytest.mark.parametrize(
    ("dense", "options"),
    [
        ("fa3", []),
        ("hpc_ops", []),
        ("triton", ["--kv-cache-dtype", "fp8_e4m3"]),
        ("flashinfer", ["--chunked-prefill-size", "512", "--enable-mixed-chunk"]),
        ("fa3", ["--tp-size", "2", "--attn-dp-size", "2"]),
    ],
    ids=["fa3", "page-size", "fp8", "mixed-chunk", "dp-attention"],
)
def test_all_but_the_names_is_stock(resolved, ours: list[str], dense: str, options: list[str]) -> None:
    stock, found = resolved(*options, dense=dense), resolved(*options, *ours, dense=dense)
    assert names(found) == (dense, "mminference", dense)
    assert others(found) == others(stock)
    if dense == "hpc_ops":
        assert found["page_size"] == 64, "its kernels have no pages of one token"


def test_a_named_decode_backend_stays(resolved) -> None:
    found = resolved(*OURS, "--decode-attention-backend", "flashinfer", dense="fa3")
    assert names(found) == ("fa3", "mminference", "flashinfer")
    found = resolved("--attention-backend", "triton", "--prefill-attention-backend", "mminference", dense="fa3")
    assert names(found) == ("triton", "mminference", "triton")


def test_decode_alone_is_not_ours(resolved, said) -> None:
    found = resolved("--decode-attention-backend", "mminference", dense="fa3")
    assert names(found) == ("fa3", None, None)
    assert "decode is never sparse" in said.text


def test_models_that_choose_for_themselves_still_do(resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers of model defaults ask whether any backend was named."""
    from sglang.srt.arg_groups import model_override_base as base

    def choose(server_args: Any, hf_config: Any) -> dict[str, Any]:
        view = base.resolving_view(server_args)
        return {"decode_attention_backend": "flashinfer"} if base.is_attention_backend_not_set(view) else {}

    providers = {"Qwen2_5_VLForConditionalGeneration": [choose]}
    monkeypatch.setattr(base, "_MODEL_OVERRIDE_FNS", providers)
    assert names(resolved(*OURS, dense="fa3")) == ("fa3", "mminference", "flashinfer")


@pytest.mark.parametrize(("named", "expected"), [(None, "fa3"), ("triton", "triton")], ids=["unnamed", "named"])
def test_a_draft_model_attends_densely(named: str | None, expected: str) -> None:
    """The CPU platform refuses to speculate, so the step is run by itself."""
    from sglang.srt.arg_groups.overrides import resolved_view

    from mminference_sgl.backend.resolution import name_draft_backend

    options = SimpleNamespace(
        attention_backend="fa3",
        prefill_attention_backend="mminference",
        speculative_algorithm="EAGLE",
        speculative_draft_attention_backend=named,
    )
    seen = []
    name_draft_backend(options, lambda given: seen.append(resolved_view(given).speculative_draft_attention_backend))
    assert seen == [expected]


def test_draft_models_of_others_are_left_alone() -> None:
    from mminference_sgl.backend.resolution import name_draft_backend

    options = SimpleNamespace(
        attention_backend="fa3",
        prefill_attention_backend=None,
        speculative_algorithm="EAGLE",
        speculative_draft_attention_backend=None,
    )
    name_draft_backend(options, lambda _: None)
    assert not hasattr(options, "_resolved_overrides")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--kv-cache-dtype", "fp8_e5m2"], "KV cache dtype fp8_e5m2"),
        (["--enable-two-batch-overlap"], "two-batch overlap"),
        (["--cuda-graph-backend-prefill", "full"], "full CUDA graphs"),
        (["--enable-torch-compile", "--device", "cpu"], "--enable-torch-compile"),
    ],
    ids=["e5m2", "two-batch-overlap", "full-prefill-graph", "torch-compile"],
)
def test_a_server_that_cannot_gain_is_stock(resolved, said, options: list[str], reason: str) -> None:
    found = resolved(*options, *OURS, dense="fa3")
    stock = resolved(*options, dense="fa3")
    assert names(found) == names(stock)
    assert others(found) == others(stock)
    assert f"mminference: prefill is dense: {reason}" in said.text


def test_e5m2_falls_back_as_stock(resolved) -> None:
    """SGLang knows by name that FA3 does not read it."""
    assert names(resolved("--kv-cache-dtype", "fp8_e5m2", *OURS, dense="fa3"))[0] == "triton"


@pytest.mark.parametrize(
    "ours", [OURS, ["--prefill-attention-backend", "mminference"]], ids=["both-phases", "prefill-only"]
)
@pytest.mark.parametrize(
    "promise", [["--enable-deterministic-inference"], ["--rl-on-policy-target", "fsdp"]], ids=["flag", "rl"]
)
def test_deterministic_inference_is_refused(resolved, ours: list[str], promise: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^deterministic inference .* leave one of the two out"):
        resolved(*promise, *ours, dense="fa3")


def test_without_hooks_nothing_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older releases of SGLang have none."""

    from mminference_sgl.backend import resolution

    monkeypatch.setitem(sys.modules, "sglang.srt.arg_groups.resolution_hooks", None)
    resolution.register.__wrapped__()


def test_asked_for() -> None:
    from mminference_sgl.backend.resolution import asked_for

    def options(attention: str | None, prefill: str | None) -> SimpleNamespace:
        return SimpleNamespace(attention_backend=attention, prefill_attention_backend=prefill)

    assert asked_for(options("mminference", None))
    assert asked_for(options("fa3", "mminference"))
    assert not asked_for(options("mminference", "fa3")), "somebody else prefills"
    assert not asked_for(options(None, None))
