"""Dense attention of the `portable_cpu` platform.

SGLang's `torch_native` backend pads the queries of a chunk to the whole sequence, so a chunk costs
as much as the whole prompt and a chunked prefill grows with the cube of its length. This backend
computes the rows of the chunk and no others: its causal part, and the part against the cached
prefix, which needs no mask; the two are merged through their log-sum-exp. Layers with a sliding
window read the keys in it and no others. All other decode is inherited.
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

_ROWS_AT_A_TIME = 512
"""Rows of a sliding-window layer that share a mask."""

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


def window_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Attention of the last rows of a sequence, each over itself and the `window` keys before it.

    Shapes and dtypes as in `extend_attention`; keys that no row sees may be left out of `k` and `v` at their front.
    Some rows are computed at a time, against the keys that these see.
    """
    rows, keys = q.shape[0], k.shape[0]
    out = torch.empty_like(q)
    for first in range(0, rows, _ROWS_AT_A_TIME):
        last = min(first + _ROWS_AT_A_TIME, rows)
        start, end = max(0, keys - rows + first - window), keys - rows + last
        distance = torch.arange(end - (last - first), end).unsqueeze(1) - torch.arange(start, end)
        some = torch.nn.functional.scaled_dot_product_attention(
            q[first:last].transpose(0, 1),
            k[start:end].transpose(0, 1),
            v[start:end].transpose(0, 1),
            attn_mask=(distance >= 0) & (distance <= window),
            scale=scale,
            enable_gqa=True,
        )
        out[first:last] = some.transpose(0, 1)
    return out


class PortableDenseAttnBackend(TorchNativeAttnBackend):
    """SGLang's native backend with an extend that costs what the chunk costs.

    Where sliding-window layers have a pool of their own, the native one writes to it and reads where the keys of the
    other layers lie.
    """

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
        prefixes = _lengths(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_prefix_lens)
        chunks = _lengths(forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, prefixes, chunks)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend to a row per request. q: [requests, heads * head_dim]; returns the same shape."""
        if kwargs or not _is_plain(layer, forward_batch) or _window(layer) is None:
            out: torch.Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            return out
        prefixes = (forward_batch.seq_lens - 1).tolist()
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, prefixes, [1] * len(prefixes))

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        prefixes: Sequence[int],
        chunks: Sequence[int],
    ) -> torch.Tensor:
        """Rows of requests one after the other: `chunks` of them behind as many tokens as `prefixes` says."""
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v
            )
        k_pool = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_pool = self.token_to_kv_pool.get_value_buffer(layer.layer_id)

        dtype = compute_dtype(q.dtype, q.device)
        rows = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        window = _window(layer)
        out = torch.empty_like(rows)
        start = 0
        for request, prefix, chunk in zip(forward_batch.req_pool_indices.tolist(), prefixes, chunks, strict=True):
            if chunk == 0:
                continue
            end = start + chunk
            first = 0 if window is None else max(0, prefix - window)
            slots = self._slots(layer, request, first, prefix + chunk)
            own, keys, values = rows[start:end].to(dtype), k_pool[slots].to(dtype), v_pool[slots].to(dtype)
            if window is None:
                out[start:end] = extend_attention(own, keys, values, layer.scaling)
            else:
                out[start:end] = window_attention(own, keys, values, layer.scaling, window)
            start = end
        # Rows beyond the requests are padding, which goes on through the model.
        out[start:] = 0
        return out.view(q.shape)

    def _slots(self, layer: RadixAttention, request: int, start: int, end: int) -> torch.Tensor:
        """Where the layer's keys of a request's tokens from `start` to before `end` lie in its pool."""
        slots: torch.Tensor = self.req_to_token_pool.req_to_token[request, start:end]
        pool = self.token_to_kv_pool
        if self.use_sliding_window_kv_pool and pool.layers_mapping[layer.layer_id][1]:
            slots = pool.translate_loc_from_full_to_swa(slots)
        return slots


def _is_plain(layer: RadixAttention, forward_batch: ForwardBatch) -> bool:
    """Whether a call is causal decoder attention without extras."""
    return (
        layer.attn_type == AttentionType.DECODER
        and not layer.is_cross_attention
        and layer.qk_head_dim == layer.v_head_dim
        and forward_batch.encoder_lens is None
    )


def _window(layer: RadixAttention) -> int | None:
    """Keys before its own that a row of a sliding-window layer sees; None if the layer has no window."""
    window = layer.sliding_window_size
    return None if window is None or window < 0 else int(window)


def _lengths(on_host: Sequence[int] | None, on_device: torch.Tensor) -> Sequence[int]:
    lengths: Sequence[int] = on_device.tolist() if on_host is None else on_host
    return lengths
