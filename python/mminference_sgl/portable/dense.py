"""Dense attention of the `portable_cpu` platform.

SGLang's `torch_native` backend pads the queries of a chunk to the whole sequence, so a chunk costs
as much as the whole prompt and a chunked prefill grows with the cube of its length. This backend
computes the rows of the chunk and no others: its causal part, and the part against the cached
prefix, which needs no mask; the two are merged through their log-sum-exp. Decode is inherited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from mminference_sgl.kernels.torch_tiles import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

BACKEND_NAME = "portable_dense"

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def create(runner: ModelRunner) -> PortableDenseAttnBackend:
    """Build the backend for a model runner; SGLang's factory for the name `portable_dense`."""
    return PortableDenseAttnBackend(runner)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its log-sum-exp, without repeating the KV heads of a GQA group.

    q: [rows, heads, head_dim]; k, v: [keys, kv_heads, head_dim]; with `causal`, row i sees the keys
    up to i. Returns the output [rows, heads, head_dim] and the natural log-sum-exp [rows, heads].
    """
    rows, heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    group = heads // kv_heads
    # The kernel follows strides: the KV heads are its batch, a group's query heads its heads.
    grouped_q = q.view(rows, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    shared = (kv_heads, group, keys, head_dim)
    out, lse = _flash(
        grouped_q,
        k.transpose(0, 1).unsqueeze(1).expand(shared),
        v.transpose(0, 1).unsqueeze(1).expand(shared),
        0.0,
        causal,
        scale=scale,
    )
    return (
        out.permute(2, 0, 1, 3).reshape(rows, heads, head_dim),
        lse.permute(2, 0, 1).reshape(rows, heads),
    )


def extend_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last rows of a sequence over all of it.

    q: [rows, heads, head_dim]; k, v: [keys, kv_heads, head_dim] with keys >= rows, all in one
    dtype. Returns [rows, heads, head_dim]. Without a prefix this is plain causal attention; a
    single row needs no mask at all.
    """
    rows, keys = q.shape[0], k.shape[0]
    prefix = keys - rows
    if rows == 1 or prefix == 0:
        return attend(q, k, v, scale, causal=rows > 1)[0]
    own, own_lse = attend(q, k[prefix:], v[prefix:], scale, causal=True)
    past, past_lse = attend(q, k[:prefix], v[:prefix], scale, causal=False)
    # The share of the past is exp(past) / (exp(past) + exp(own)).
    share = torch.sigmoid(past_lse - own_lse).unsqueeze(-1)
    return torch.lerp(own.float(), past.float(), share).to(q.dtype)


class PortableDenseAttnBackend(TorchNativeAttnBackend):
    """SGLang's native backend with an extend that costs what the chunk costs."""

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend to the chunk's rows. q: [tokens, heads * head_dim]; returns the same shape."""
        if kwargs or not _is_plain(layer, forward_batch):
            out: torch.Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            return out

        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v
            )
        k_pool = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_pool = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        req_to_token = self.req_to_token_pool.req_to_token

        dtype = compute_dtype(q.dtype, q.device)
        rows = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(rows)
        start = 0
        for request, prefix_len, extend_len in zip(
            forward_batch.req_pool_indices.tolist(),
            _lengths(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens),
            _lengths(forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens),
            strict=True,
        ):
            if extend_len == 0:
                continue
            end = start + extend_len
            slots = req_to_token[request, : prefix_len + extend_len]
            out[start:end] = extend_attention(
                rows[start:end].to(dtype),
                k_pool[slots].to(dtype),
                v_pool[slots].to(dtype),
                layer.scaling,
            )
            start = end
        # Rows beyond the requests are padding; nobody reads them.
        return out.view(q.shape)


def _is_plain(layer: RadixAttention, forward_batch: ForwardBatch) -> bool:
    """Whether a call is causal decoder attention over the whole sequence."""
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.qk_head_dim == layer.v_head_dim
        and (layer.sliding_window_size is None or layer.sliding_window_size < 0)
        and forward_batch.encoder_lens is None
    )


def _lengths(on_host: Sequence[int] | None, on_device: torch.Tensor) -> Sequence[int]:
    lengths: Sequence[int] = on_device.tolist() if on_host is None else on_host
    return lengths
