"""SGLang's interface of attention backends, member by member: what is ours, what is the dense backend's.

``AttentionBackend`` gives every optional member a default that means "not supported". Behind this backend stands one
that may support it, so each of them is answered by the dense backend. A test compares the lists with SGLang's class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

DELEGATED = (
    # Speculation: verification is routed through prefill by default, and is dense.
    "verify_mask",
    "update_verify_buffers_to_fill_after_draft",
    "supports_ragged_verify_graph",
    "supports_draft_extend_metadata_staging",
    "draft_extend_metadata_captured_in_graph",
    "glue_target_verify_metadata",
    "glue_draft_metadata",
    "dllm_attention",
    "folds_encoder_swa_replay",
    # A chunk's own lengths are on the host in any case.
    "needs_cpu_seq_lens",
    # CUDA graphs, which hold dense forwards alone.
    "init_cuda_graph_state",
    "init_forward_metadata_in_graph",
    "get_cuda_graph_seq_len_fill_value",
    "validate_elastic_cuda_graph_recapture",
    "on_after_cuda_graph_warmup",
    "supports_full_cuda_graph_chunked_prefix",
    "prepare_full_cuda_graph_chunked_prefix",
    "supports_prefill_cuda_graph_max_context_size",
    "prefill_cuda_graph_default_max_seq_len",
    "prefill_cuda_graph_max_batch_size",
    "prefer_eager_mixed_prefill_under_dp_attention",
    "skips_prefill_metadata_on_idle_dp_rank",
    "late_layer_num_tokens",
    "init_cpu_graph_state",
    # What the scheduler and generic code ask.
    "support_triton",
    "extend_dummy_seqs_capped_by_req_pool",
    "extend_attention_block_m",
    "get_indexer_metadata",
    "init_mha_chunk_metadata",
    "kv_index_translator",
    "kv_cache_dtype",
    "max_context_len",
    "forward_metadata",
)
"""Members that are the dense backend's."""

BASE = {
    "attn_backend_list": "no wrapper to generic code, which reaches the dense backend's state through forward_metadata",
    "forward": "routes by mode to what is ours",
    "forward_mixed": "NPUs only, which run dense",
    "prefill_attention_backend_str": "SGLang sets it",
    "decode_attention_backend_str": "SGLang sets it",
    "use_captured_forward_metadata_for_breakable_cuda_graph": "a forward on captured metadata would not be planned",
    "init_forward_metadata_for_breakable_cuda_graph_capture": "as above",
    "prepare_forward_metadata_for_breakable_cuda_graph_replay": "as above",
    "get_fused_kv_write_buffers": "this backend writes keys and values itself: fused with RoPE they came twice",
    "shared_read_ends": "req_to_token is read in every layer's plan: an earlier end would let it change before",
    "resolve_prefill_shared_read_ends": "as shared_read_ends",
    "_snapshot_prefill_shared_reads": "as shared_read_ends",
}
"""Members that stay as SGLang's base class has them, and why."""


def delegate(cls: type) -> type:
    """Class decorator: every member in :data:`DELEGATED` is read from, and set on, the instance's ``dense``."""
    for name in DELEGATED:
        setattr(cls, name, property(_reader(name), _writer(name)))
    return cls


def _reader(name: str) -> Callable[[Any], Any]:
    return lambda self: getattr(self.dense, name)


def _writer(name: str) -> Callable[[Any, Any], None]:
    return lambda self, value: setattr(self.dense, name, value)
