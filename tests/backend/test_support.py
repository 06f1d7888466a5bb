"""Which servers prefill sparse: the reasons against it, the factory's gate, and the interface behind the backend."""

from __future__ import annotations

import inspect
import logging
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mminference_sgl.backend.support import SPARSE_KV_DTYPES, Deployment, UnsupportedServerError, pool_reason

REASONS = {
    "device": "npu",
    "mla": True,
    "encoder_decoder": True,
    "own_sparse_attention": True,
    "bidirectional_images": True,
    "decode_only": True,
    "kv_cache_dtype": "mxfp8",
    "heads_before_tokens": True,
    "prefill_context_parallel": 2,
    "two_batch_overlap": True,
    "full_prefill_graph": True,
    "compiled_on_cpu": True,
}
"""By fact of a deployment, a value that makes all prefill dense."""
REFUSED = {"deterministic": True, "decode_context_parallel": 4}


def model_config(*architectures: str, **more: Any) -> SimpleNamespace:
    from sglang.srt.configs.model_config import AttentionArch

    hf_config = SimpleNamespace(architectures=list(architectures), get_text_config=SimpleNamespace)
    return SimpleNamespace(attention_arch=AttentionArch.MHA, is_encoder_decoder=False, hf_config=hf_config, **more)


def test_every_fact_decides_something() -> None:
    assert {item.name for item in fields(Deployment)} == REASONS.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", REASONS)
def test_dense_reasons(name: str) -> None:
    assert Deployment().dense_reason() == ""
    found = replace(Deployment(), **{name: REASONS[name]})
    found.check()
    assert found.dense_reason()


@pytest.mark.parametrize("dtype", SPARSE_KV_DTYPES)
def test_kv_dtypes_that_are_read(dtype: str) -> None:
    assert Deployment(kv_cache_dtype=dtype).dense_reason() == ""


@pytest.mark.parametrize(("name", "message"), [("deterministic", "rl-on-policy"), ("decode_context_parallel", "4")])
def test_refusals_name_the_remedy(name: str, message: str) -> None:
    with pytest.raises(UnsupportedServerError, match=message) as refused:
        replace(Deployment(), **{name: REFUSED[name]}).check()
    assert "leave one of the two out" in str(refused.value) or "use --dcp-size 1" in str(refused.value)


def test_of_an_old_release_without_the_options() -> None:
    assert Deployment.of(SimpleNamespace(device="cuda"), model_config("Any"), "fa3") == Deployment()


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        ({"enable_deterministic_inference": True}, "deterministic", True),
        ({"rl_on_policy_target": "fsdp"}, "deterministic", True),
        ({"disaggregation_mode": "decode"}, "decode_only", True),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype", "nvfp4"),
        ({"dcp_size": 2}, "decode_context_parallel", 2),
        ({"attn_cp_size": 2}, "prefill_context_parallel", 2),
        ({"enable_two_batch_overlap": True}, "two_batch_overlap", True),
        ({"cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="full"))}, "full_prefill_graph", True),
        (
            {"cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="breakable"))},
            "full_prefill_graph",
            False,
        ),
        ({"enable_torch_compile": True, "device": "cpu"}, "compiled_on_cpu", True),
        ({"enable_torch_compile": True, "device": "cuda"}, "compiled_on_cpu", False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_options_are_read(options: dict[str, Any], name: str, value: Any) -> None:
    found = Deployment.of(SimpleNamespace(**{"device": "cuda", **options}), model_config("Any"), "fa3")
    assert getattr(found, name) == value


def test_models_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.configs.model_config import AttentionArch

    options = SimpleNamespace(device="cuda")
    mla = model_config("KimiVLForConditionalGeneration")
    mla.attention_arch = AttentionArch.MLA
    assert Deployment.of(options, mla, "fa3").mla
    llama = model_config("MllamaForConditionalGeneration")
    llama.is_encoder_decoder = True
    assert Deployment.of(options, llama, "fa3").encoder_decoder
    gemma = model_config("Gemma3ForConditionalGeneration")
    assert Deployment.of(options, gemma, "triton").bidirectional_images
    assert not Deployment.of(options, gemma, "fa3").bidirectional_images, "causal there as well"
    monkeypatch.setattr("sglang.srt.layers.attention.qsa.config.is_qwen_qsa", lambda _: True)
    assert Deployment.of(options, model_config("Qwen4"), "fa3").own_sparse_attention
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    assert Deployment.of(options, model_config("Any"), "fa3").heads_before_tokens


def pool(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(get_key_buffer=lambda _: None, dtype=torch.bfloat16, **more)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (pool(), ""),
        (pool(kv_cache_layout="nhd", use_hnd=False), ""),
        (pool(kv_cache_layout="hnd", use_hnd=True), "KV pool layout hnd"),
        (pool(kv_cache_layout="vectorized_5d"), "KV pool layout vectorized_5d"),
        (pool(get_kv_scale_buffer=None), "KV pool with block scales"),
        (pool(full_kv_pool=pool(kv_cache_layout="hnd", use_hnd=True)), "KV pool layout hnd"),
        (pool(full_kv_pool=pool(), get_kv_scale_buffer=None), ""),
        (SimpleNamespace(), "KV pool without key buffers"),
    ],
    ids=["plain", "nhd", "hnd", "rocm", "mxfp8", "windows-hnd", "windows", "no-buffers"],
)
def test_pools(found: SimpleNamespace, reason: str) -> None:
    assert pool_reason(found) == reason


# -- the factory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch):
    """A model runner of SGLang's kit with layers of some kinds."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

    monkeypatch.setenv("MMINFERENCE_CONFIG", '{"min_tokens": 64}')

    def runner(*windows: int) -> Any:
        case = kit.DenseAttentionCase("any", "mminference", ForwardMode.EXTEND, 4, 2, 1, (0,), (8,))
        config = kit.TinyModelConfig(num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, context_len=256)
        made = kit.MockModelRunner(
            case=case, model_config=config, dtype=torch.float32, device="cpu", max_context_len=256, head_dim=16
        )
        made.model = torch.nn.ModuleList(
            RadixAttention(4, 16, 0.25, 2, layer_id, sliding_window_size=window)
            for layer_id, window in enumerate(windows)
        )
        return made

    return runner


def test_a_model_without_sparse_layers_gets_the_dense_backend_itself(runner, caplog) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    with caplog.at_level(logging.WARNING, "mminference_sgl"):
        backend = ATTENTION_BACKENDS["mminference"](runner(31, 31))
    assert type(backend).__name__ == "PortableDenseAttnBackend"
    assert "prefill is dense: no layer can run sparse: sliding window (2)" in caplog.text


def test_the_dense_backend_sees_its_own_name(runner) -> None:
    """Backends and hybrid models ask the runner by name who prefills."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    made = runner(-1, 31)
    backend = ATTENTION_BACKENDS["mminference"](made)
    assert made.prefill_attention_backend_str == "portable_dense"
    assert type(backend.prefill_backend).__name__ == "MMInferenceAttnBackend"
    assert backend.decode_backend is backend.prefill_backend.dense


def test_a_refused_server_stops_with_one_line(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from mminference_sgl.backend import factory

    options = SimpleNamespace(device="cpu", enable_deterministic_inference=True)
    monkeypatch.setattr(factory, "resolved_options", lambda _: options)
    with pytest.raises(SystemExit, match=r"^mminference: deterministic inference"):
        ATTENTION_BACKENDS["mminference"](runner(-1))


# -- agreement between ranks -------------------------------------------------------------------------------------------


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch):
    """Makes a second tensor-parallel rank answer with what it would have brought."""

    def second_rank(change) -> None:
        from mminference_sgl.backend import start

        monkeypatch.setattr(start, "of_all_ranks", lambda own: [own, change(*own)])

    return second_rank


def create(runner: Any) -> Any:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    return ATTENTION_BACKENDS["mminference"](runner).prefill_backend


def test_ranks_that_agree(runner, second_rank) -> None:
    second_rank(lambda *own: own)
    assert create(runner(-1))._start.config.active


def test_one_rank_that_cannot_makes_all_dense(runner, second_rank, caplog) -> None:
    second_rank(lambda settings, state, problem: (settings, "fails on cuda:1: out of memory", problem))
    with caplog.at_level(logging.WARNING, "mminference_sgl"):
        assert not create(runner(-1))._start.config.active
    assert "rank 1: implementation 'torch' fails on cuda:1: out of memory" in caplog.text


def test_one_rank_that_cannot_run_what_was_named_stops_all(runner, second_rank, monkeypatch) -> None:
    monkeypatch.setenv("MMINFERENCE_IMPL", "torch")
    second_rank(lambda settings, state, problem: (settings, "computes wrong", problem))
    with pytest.raises(SystemExit, match="rank 1: implementation 'torch' computes wrong"):
        create(runner(-1))


def test_settings_of_one_node_only_stop_all(runner, second_rank) -> None:
    def other(settings, state, problem):
        config, pattern, implementation = settings
        return (replace(config, error=0.5), pattern, implementation), state, problem

    second_rank(other)
    with pytest.raises(SystemExit, match=r"settings differ between tensor-parallel ranks: rank 1 .*error=0.5"):
        create(runner(-1))


def test_a_bad_setting_of_one_node_only_stops_all(runner, second_rank) -> None:
    second_rank(lambda *_: (None, "ok", "MMINFERENCE_CONFIG: unknown key 'covrage'"))
    with pytest.raises(SystemExit, match=r"^mminference: rank 1: MMINFERENCE_CONFIG: unknown key 'covrage'"):
        create(runner(-1))


# -- the interface -----------------------------------------------------------------------------------------------------


def test_every_member_of_sglangs_interface_is_accounted_for() -> None:
    """Moves with SGLang: a member that appears there has to be put into one of the lists of `interface`."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    from mminference_sgl.backend import interface
    from mminference_sgl.backend.backend import MMInferenceAttnBackend

    members = {name for name in vars(AttentionBackend) if not name.startswith("__") and name != "_abc_impl"}
    ours = {name for name, value in vars(MMInferenceAttnBackend).items() if not isinstance(value, property)}
    ours.add("data_type")
    lists = (members & ours, set(interface.DELEGATED), interface.BASE.keys())
    assert members <= set().union(*lists), "unknown to interface.py"
    counted = [name for names in lists for name in names]
    assert len(counted) == len(set(counted)), "in two lists"
    assert interface.BASE.keys() <= members | {"forward_mixed"}, "gone from SGLang"


def test_delegated_members_are_the_dense_backends(runner) -> None:
    from mminference_sgl.backend import interface

    backend = create(runner(-1))
    assert backend.needs_cpu_seq_lens is backend.dense.needs_cpu_seq_lens
    backend.dense.forward_metadata = metadata = object()
    assert backend.forward_metadata is metadata
    backend.forward_metadata = None
    assert backend.dense.forward_metadata is None
    backend.dense.supports_ragged_verify_graph = True
    assert backend.supports_ragged_verify_graph
    assert not hasattr(backend, "extend_attention_block_m"), "as the dense one"
    for name in interface.DELEGATED:
        assert isinstance(inspect.getattr_static(type(backend), name), property)


def test_stays_the_base_class() -> None:
    """Keys and values are written once, and req_to_token is read until the last layer."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

    from mminference_sgl.backend import interface
    from mminference_sgl.backend.backend import MMInferenceAttnBackend

    for name in interface.BASE:
        assert inspect.getattr_static(MMInferenceAttnBackend, name) is inspect.getattr_static(AttentionBackend, name)


@pytest.mark.parametrize(("named", "expected"), [(None, "mminference"), ("triton", "triton")])
def test_who_decodes_is_known_before_the_runner_says_it(
    named: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In SGLang 0.5.17 a runner has the names only behind the factory."""
    from mminference_sgl.backend import sglang_compat

    options = SimpleNamespace(attention_backend="mminference", decode_attention_backend=named)
    monkeypatch.setattr(sglang_compat, "resolved_options", lambda _runner: options)
    assert sglang_compat.decode_backend(SimpleNamespace()) == expected
    assert sglang_compat.decode_backend(SimpleNamespace(decode_attention_backend_str="fa3")) == "fa3"
