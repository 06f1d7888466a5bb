"""Which layers of a model can run sparse."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

KV_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)
"""Of a KV pool, those that the kernels read."""


@dataclass(frozen=True)
class Survey:
    """The attention layers of this process's part of a model.

    ``sparse``: ids of those that can run sparse; ``dense``: how many cannot, by reason; ``last``: id of the last one.
    ``example``: a sparse one, None if there is none.
    """

    sparse: frozenset[int]
    dense: Counter[str]
    last: int
    example: RadixAttention | None

    @classmethod
    def of(cls, model: torch.nn.Module, pool: Any) -> Survey:
        """Looks at every attention layer as a module; what a layer passes with a call is seen only then."""
        sparse: dict[int, RadixAttention] = {}
        dense: Counter[str] = Counter()
        last = 0
        for module in model.modules():
            if isinstance(module, RadixAttention):
                last = max(last, module.layer_id)
                reason = layer_reason(module, pool, {})
                if reason:
                    dense[reason] += 1
                else:
                    sparse[module.layer_id] = module
        return cls(frozenset(sparse), dense, last, sparse[max(sparse)] if sparse else None)


def layer_reason(layer: RadixAttention, pool: Any, kwargs: dict[str, Any]) -> str:
    """Why a layer is dense; empty if it may run sparse: causal decoder attention without extras, a plain KV pool."""
    if layer.attn_type != AttentionType.DECODER or layer.is_cross_attention:
        return "not causal decoder attention"
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return "sliding window"
    if layer.use_irope or layer.logit_cap:
        return "irope or logit cap"
    if layer.qk_head_dim != layer.v_head_dim or layer.tp_k_head_num != layer.tp_v_head_num:
        return "key and value heads differ"
    if layer.tp_q_head_num % layer.tp_k_head_num:
        return "heads do not group"
    if pool.dtype not in KV_DTYPES or getattr(pool, "is_quantized_kv_cache", False):
        return f"KV cache dtype {pool.dtype}"
    if not hasattr(pool, "get_key_buffer"):
        return "KV pool without key buffers"
    if any(value is not None and value is not False for value in kwargs.values()):
        return "extra arguments " + ", ".join(sorted(k for k, x in kwargs.items() if x is not None))
    return ""
