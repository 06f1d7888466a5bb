"""Models whose other layers are linear attention: SGLang wraps both kinds of backends, and asks for names on Blackwell.

Servers of such a model are in tests/server/test_families.py; here is what a CPU cannot show, with a played GPU.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_models

LAYERS = (3, 7, 11)
"""Of full attention; the layers between have no attention module."""


@pytest.fixture
def runner(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch):
    """A model runner of SGLang's kit with Qwen3.5's configuration and its full layers, asked for by two names."""
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.configs.qwen3_5 import Qwen3_5Config
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

    monkeypatch.setenv("MMINFERENCE_CONFIG", '{"min_tokens": 64}')
    folder = tiny_models.path_of("qwen3_5", Path(str(pytestconfig.cache.mkdir("tiny_models"))))
    case = kit.DenseAttentionCase("any", "mminference", ForwardMode.EXTEND, 8, 2, 1, (0,), (8,))
    sizes = kit.TinyModelConfig(num_heads=8, num_kv_heads=2, head_dim=256, hidden_size=64, context_len=256)
    made = kit.MockModelRunner(
        case=case, model_config=sizes, dtype=torch.float32, device="cpu", max_context_len=256, head_dim=256
    )
    made.model = torch.nn.ModuleList(RadixAttention(8, 256, 1 / 16, 2, layer_id) for layer_id in LAYERS)
    made.is_draft_worker, made.use_mla_backend = False, False
    config = Qwen3_5Config.from_pretrained(folder)
    made.model_config.hf_config, made.model_config.hf_text_config = config, config.text_config
    made.model_config.linear_attn_registry_result, made.model_config.dtype = None, torch.float32
    return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Plays a Blackwell GPU, on which stock SGLang would take `triton`; only SGLang's own wrapper is real."""
    from sglang.srt.layers.attention import attention_registry as registry
    from sglang.srt.layers.attention.linear import gdn_backend
    from sglang.srt.layers.attention.linear import utils as linear

    from mminference_sgl.backend import factory

    monkeypatch.setitem(registry.ATTENTION_BACKENDS, "triton", registry.ATTENTION_BACKENDS["portable_dense"])
    monkeypatch.setattr(
        factory, "resolved_options", lambda _: SimpleNamespace(device="cpu", attention_backend="triton")
    )
    monkeypatch.setattr(gdn_backend, "GDNAttnBackend", LinearBackend)
    monkeypatch.setattr(gdn_backend, "flashinfer_gdn_prefill_default", lambda _: None)
    monkeypatch.setattr(linear, "resolve_linear_attn_backends", lambda **_: None)

    def gpu(*, sm120: bool) -> None:
        monkeypatch.setattr("sglang.srt.utils.is_blackwell", lambda: True)
        monkeypatch.setattr(registry, "get_platform", lambda: SimpleNamespace(is_sm120=sm120))

    return gpu


class LinearBackend:
    """In the place of SGLang's, of which the wrapper asks this much when it is made."""

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        del runner

    def supports_prefill_graph_extend(self) -> bool:
        return False


def built(runner: Any, *names: str) -> Any:
    """As SGLang builds the backends of prefill and decode by their names."""
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup as setup

    runner.prefill_attention_backend_str, runner.decode_attention_backend_str = names
    resolved = setup.ResolvedAttentionBackendStr(prefill=names[0], decode=names[1], is_draft_override=False)
    return setup._build_resolved_backend(model_runner=runner, resolved=resolved, init_new_workspace=False)


@pytest.mark.parametrize("sm120", [False, True], ids=["sm100", "sm120"])
@pytest.mark.parametrize(
    "names", [("mminference", "triton"), ("mminference", "mminference")], ids=["resolved", "both-phases"]
)
def test_blackwell_takes_it(names: tuple[str, str], sm120: bool, runner, gpu) -> None:
    gpu(sm120=sm120)
    backend = built(runner, *names)
    assert type(backend).__name__ == "HybridLinearAttnBackend"
    assert backend.full_attn_backend.prefill_backend._layers.sparse == set(LAYERS)
    assert backend.full_attn_backend.decode_backend is not backend.full_attn_backend.prefill_backend
    assert (runner.prefill_attention_backend_str, runner.decode_attention_backend_str) == ("triton", "triton")


@pytest.mark.parametrize("sm120", [False, True], ids=["sm100", "sm120"])
def test_blackwell_would_refuse_its_name(sm120: bool, runner, gpu) -> None:
    """What the names on the runner are for; once SGLang stops asking, this fails and they may go."""
    from sglang.srt.layers.attention.attention_registry import attn_backend_wrapper

    gpu(sm120=sm120)
    runner.prefill_attention_backend_str, runner.decode_attention_backend_str = "mminference", "triton"
    with pytest.raises(AssertionError, match="Got prefill=mminference"):
        attn_backend_wrapper(runner, SimpleNamespace())


def test_the_crossover_is_that_of_the_full_layers(runner, gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from mminference_sgl.backend import crossover

    gpu(sm120=False)
    monkeypatch.setenv("MMINFERENCE_CONFIG", "{}")
    asked: list[crossover.Shape] = []
    monkeypatch.setattr(crossover, "of", lambda shape: (asked.append(shape), crossover.Crossover(4096, 0.7))[1])
    backend = built(runner, "mminference", "triton").full_attn_backend.prefill_backend
    (shape,) = asked
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.sparse_layers) == (8, 2, 256, 3)
    assert (backend._start.min_tokens, backend._start.dense_above) == (4096, 0.7)


def test_the_crossover_is_measured_with_such_heads() -> None:
    from mminference_sgl.backend import crossover
    from mminference_sgl.method.config import Config

    config = Config().for_chunks(512, 16)
    shape = crossover.Shape(2, 1, 256, torch.float32, torch.device("cpu"), 512, "torch", config, sparse_layers=3)
    timing = crossover._times(shape, 1024, 0.2)
    assert 0 < timing.sparse < 60
    assert 0 < timing.dense < 60


def test_the_wrapper_reads_what_the_dense_backend_answers(runner, gpu) -> None:
    gpu(sm120=False)
    backend = built(runner, "mminference", "triton")
    full = backend.full_attn_backend
    dense = full.prefill_backend.dense
    assert backend.data_type == runner.kv_cache_dtype
    assert backend.token_to_kv_pool is runner.token_to_kv_pool
    assert backend.req_to_token_pool is runner.req_to_token_pool
    assert backend.needs_cpu_seq_lens == dense.needs_cpu_seq_lens
    assert not backend.use_captured_forward_metadata_for_breakable_cuda_graph
