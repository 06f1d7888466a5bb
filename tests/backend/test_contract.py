"""What this package uses of SGLang's internals is there, by name and signature; a new release fails here first."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from importlib import metadata

import pytest

from mminference_sgl.backend import sub_batch

BATCH_FIELDS = (
    *sub_batch.PER_REQUEST,
    *sub_batch.PER_REQUEST_ON_HOST,
    *sub_batch.PER_ROW,
    "batch_size",
    "encoder_lens",
    "extend_num_tokens",
    "extend_prefix_lens_cpu",
    "extend_seq_lens_cpu",
    "extend_start_loc",
    "forward_mode",
    "input_embeds",
    "kv_loc_plan",
    "mm_inputs",
    "seq_lens_sum",
)


def test_the_pinned_range_holds_what_is_tested() -> None:
    (pin,) = [item for item in metadata.requires("mminference-sgl") or [] if item.startswith("sglang")]
    from packaging.requirements import Requirement

    assert Requirement(pin).specifier.contains(metadata.version("sglang"))
    assert not Requirement(pin).specifier.contains("0.5.24"), "not tested yet"


@pytest.mark.parametrize("name", BATCH_FIELDS)
def test_fields_of_a_batch(name: str) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    assert name in {item.name for item in dataclasses.fields(ForwardBatch)}


SIGNATURES = {
    "sglang.srt.mem_cache.memory_pool:KVWriteLoc": ("loc", "swa_loc"),
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer": (
        "self",
        "layer",
        "loc_info",
        "cache_k",
        "cache_v",
        "k_scale",
        "v_scale",
    ),
    "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator.own_plan": ("self", "forward_batch"),
    "sglang.srt.arg_groups.model_override_base:get_default_attn_backend": (
        "server_args",
        "use_mla_backend",
        "model_config",
    ),
    "sglang.srt.arg_groups.overrides:declare_resolution": ("server_args", "source", "fields"),
    "sglang.srt.arg_groups.overrides:resolving_view": ("server_args",),
    "sglang.srt.arg_groups.overrides:attention_backends_of": ("cfg",),
    "sglang.srt.arg_groups.overrides:model_config_of": ("server_args",),
    "sglang.srt.distributed.parallel_state:GroupCoordinator.all_gather_object": ("self", "obj"),
    "sglang.srt.distributed.parallel_state:GroupCoordinator.broadcast_object": ("self", "obj", "src"),
    "sglang.srt.layers.attention.hybrid_attn_backend:HybridAttnBackend": (
        "model_runner",
        "prefill_backend",
        "decode_backend",
    ),
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(path: str) -> None:
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    parameters = tuple(inspect.signature(found).parameters)
    assert parameters[: len(SIGNATURES[path])] == SIGNATURES[path]


@pytest.mark.parametrize(
    "step",
    ["handle_model_specific_adjustments", "handle_attention_backend_compatibility", "handle_speculative_decoding"],
)
def test_steps_of_resolution_can_be_hooked(step: str) -> None:
    from sglang.srt.arg_groups import resolution_hooks

    assert step in resolution_hooks._OVERRIDABLE_HOOKS
    assert len(resolution_hooks._HOOKS.get(step, ())) <= 1, "registered once in a process"


def test_the_resolved_schedule_has_a_chunk_size() -> None:
    from sglang.srt.arg_groups.arg_utils import namespace_of
    from sglang.srt.server_args import ServerArgs

    assert namespace_of(ServerArgs)["chunked_prefill_size"].startswith("schedule")
