"""Gated DeltaNet of the `portable_cpu` platform: the linear-attention layers of Qwen3.5 and its relatives in PyTorch.

With them come the gates of these models: behind full attention, and of the expert that all tokens share. SGLang
computes all of this with Triton, or on a CPU with a build of its kernels that is not on the package index.
:func:`install` puts the functions below in the place of Triton's, under the names and with the signatures that these
have; SGLang's own backend, metadata, state pool and prefix cache stay as they are.

A head keeps a state ``S`` of ``[values, keys]``, and a token with query q, key k, value v, decay exp(g) and rate beta
does ``S = exp(g) S; S = S + beta (v - S k) k^T; o = S q``, with q and k of length 1 and q scaled (Yang, Kautz,
Hatamizadeh, "Gated Delta Networks", 2024). Prefill does it for :data:`CHUNK` tokens at a time by matrix products
(section 3.3 there), in float32.

Not covered: verification of drafts (speculative decoding) and multi-item scoring.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

CHUNK = 64
"""Tokens of a chunk: SGLang's prefix cache copies states at their bounds, so this is its number."""
_EPS = 1e-6

logger = logging.getLogger(__name__)


def install() -> None:
    """Replace the Triton functions where they are defined, and in modules that have imported them from there already.

    Does nothing where SGLang computes with its own kernels for CPUs, nor in a release that has other names.
    """
    from sglang.srt.utils import is_cpu

    if is_cpu():
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            homes = {module: importlib.import_module(f"sglang.kernels.ops.{module}") for module in REPLACED}
        known = [(homes[module], function) for module, functions in REPLACED.items() for function in functions]
        replaced = {getattr(home, function.__name__): function for home, function in known}
    except (ImportError, AttributeError) as error:
        logger.info("portable_cpu: models with Gated DeltaNet cannot be served with this SGLang: %s", error)
        return
    users = [vars(module) for name, module in sys.modules.items() if name.startswith("sglang.")]
    for names in (*(vars(home) for home in homes.values()), *users):
        for original, function in replaced.items():
            if names.get(function.__name__) is original:
                names[function.__name__] = function


# -- the delta rule ----------------------------------------------------------------------------------------------------


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Prefill of sequences that lie behind one another.

    q, k: [1, tokens, heads, key_dim]; v: [1, tokens, value_heads, value_dim]; g (log of the decay), beta: [1, tokens,
    value_heads]; initial_state: [slots, value_heads, value_dim, key_dim], read at ``initial_state_indices`` of each
    sequence, and with ``inplace_update`` overwritten by its last state; cu_seqlens: [sequences + 1], by default one
    sequence. Returns the output in v's shape, nothing, and the states before each chunk of each sequence [1, chunks,
    value_heads, value_dim, key_dim], both in v's dtype. Rows behind the last sequence are 0.
    """
    assert not head_first
    bounds = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    slots = range(len(bounds) - 1) if initial_state_indices is None else initial_state_indices.tolist()
    value_heads, value_dim, key_dim = v.shape[2], v.shape[3], k.shape[3]
    scale = key_dim**-0.5 if scale is None else scale
    out, states = torch.zeros_like(v), []
    for slot, start, end in zip(slots, bounds, bounds[1:], strict=False):
        if start == end:
            continue
        own = slice(start, end)
        query, key = (_by_head(x[0, own], value_heads) for x in (q, k))
        if use_qk_l2norm_in_kernel:
            query, key = _unit(query), _unit(key)
        value, decay, rate = (x[0, own].float().transpose(0, 1) for x in (v, g, beta))
        pool = initial_state if slot >= 0 else None
        state = torch.zeros(value_heads, value_dim, key_dim) if pool is None else pool[slot].float()
        result, state, before = _prefill(query * scale, key, value, decay, rate, state)
        out[0, own] = result.transpose(0, 1).to(v.dtype)
        states.append(before.to(v.dtype))
        if pool is not None and inplace_update:
            pool[slot] = state.to(pool.dtype)
    return out, None, torch.cat(states)[None] if states else v.new_empty(1, 0, value_heads, value_dim, key_dim)


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    rate: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence in chunks.

    query, key: [heads, tokens, key_dim]; value: [heads, tokens, value_dim]; decay, rate: [heads, tokens]; state:
    [heads, value_dim, key_dim]; float32. Returns the output in value's shape, the last state and those before each
    chunk [chunks, heads, value_dim, key_dim].

    In a chunk, token i has the whole decay ``D_ij`` since token j. What the tokens write depends on what those before
    them wrote: (1 + strictly lower part of D_ij rate_i k_i.k_j) solves for all of it at once.
    """
    tokens = query.shape[1]
    pad = -tokens % CHUNK
    query, key, value = (functional.pad(x, (0, 0, 0, pad)) for x in (query, key, value))
    query, key, value, decay, rate = (
        torch.unflatten(x, 1, (-1, CHUNK))
        for x in (query, key, value, functional.pad(decay, (0, pad)), functional.pad(rate, (0, pad)))
    )
    total = decay.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf).exp()
    scaled = key * rate[..., None]
    # The diagonal is 1 by the solver's word, so what is there does not count.
    system = (scaled @ key.mT) * between
    sides = torch.cat([value * rate[..., None], scaled * total.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    written, read = solved[..., : value.shape[-1]], solved[..., value.shape[-1] :]
    within = (query @ key.mT) * between
    seen = query * total.exp()[..., None]
    last = total[..., -1:]
    kept = key * (last - total).exp()[..., None]
    out, before = torch.empty_like(value), []
    for chunk in range(value.shape[1]):
        before.append(state)
        new = written[:, chunk] - read[:, chunk] @ state.mT
        out[:, chunk] = seen[:, chunk] @ state.mT + within[:, chunk] @ new
        state = state * last[:, chunk, :, None].exp() + new.mT @ kept[:, chunk]
    return out.flatten(1, 2)[:, :tokens], state, torch.stack(before)


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each request.

    mixed_qkv: [requests, queries, keys and values of all heads]; a, b: [requests, value_heads], what decay and rate
    come from; A_log, dt_bias: [value_heads]; initial_state: [slots, value_heads, value_dim, key_dim], whose rows at
    ``ssm_state_indices`` [requests] go one token on; out: [requests, 1, value_heads, value_dim], written. A request
    with a negative index gets 0.
    """
    _, value_heads, value_dim, key_dim = initial_state.shape
    keys = (mixed_qkv.shape[1] - value_heads * value_dim) // 2
    query, key = (
        _by_head(torch.unflatten(x, 1, (-1, key_dim)), value_heads).transpose(0, 1)
        for x in (mixed_qkv[:, :keys], mixed_qkv[:, keys : 2 * keys])
    )
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    value = torch.unflatten(mixed_qkv[:, 2 * keys :], 1, (value_heads, value_dim)).float()
    decay, rate = (x[0] for x in fused_gdn_gating(A_log, a, b, dt_bias))
    real = ssm_state_indices >= 0
    slots = ssm_state_indices.clamp(min=0).long()
    state = initial_state[slots].float() * decay.exp()[..., None, None]
    new = (value - (state @ key[..., None])[..., 0]) * rate[..., None]
    state += new[..., None] * key[..., None, :]
    result = (state @ (query * scale)[..., None])[..., 0]
    out[:, 0] = result.to(out.dtype) * real[:, None, None]
    initial_state[slots[real]] = state[real].to(initial_state.dtype)
    return out, initial_state


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log of the decay, and the rate, both float32 [1, tokens, value_heads].

    A_log, dt_bias: [value_heads]; a, b: [tokens, value_heads]. ``beta`` and ``threshold`` are softplus's.
    """
    decay = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float(), beta, threshold)
    return decay[None], b.float().sigmoid().to(b.dtype).float()[None]


def _by_head(x: torch.Tensor, value_heads: int) -> torch.Tensor:
    """[tokens, heads, key_dim] in float32, a head for each value head: [value_heads, tokens, key_dim]."""
    return x.float().repeat_interleave(value_heads // x.shape[1], 1).transpose(0, 1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)


# -- the short convolution before it -----------------------------------------------------------------------------------


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: Any,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    **_unused: Any,
) -> torch.Tensor:
    """Convolution of each channel over its last tokens, for sequences that lie behind one another.

    x: [channels, tokens]; weight: [channels, width]; conv_states: [slots, channels, width - 1], the inputs before a
    sequence, read where it has an initial state and left as those before what follows it, in a dtype of their own;
    query_start_loc: [sequences + 1]. Returns x's shape.
    """
    del seq_lens_cpu
    bounds = query_start_loc.tolist()
    slots = list(range(len(bounds) - 1)) if cache_indices is None else cache_indices.tolist()
    continued = [False] * len(slots) if has_initial_state is None else has_initial_state.tolist()
    out = torch.zeros_like(x)
    for slot, known, start, end in zip(slots, continued, bounds, bounds[1:], strict=False):
        if start == end or slot < 0:
            continue
        state = conv_states[slot].T.to(x.dtype)
        inputs = torch.cat([state if known else torch.zeros_like(state), x[:, start:end].T])
        out[:, start:end] = _convolve(inputs, weight, bias, activation).T
        conv_states[slot] = inputs[-len(state) :].T.to(conv_states.dtype)
    return out


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    **drafts: Any,
) -> torch.Tensor:
    """The same for one token of each request: x: [requests, channels]; returns x's shape.

    Raises:
        NotImplementedError: several tokens are given, as when drafts are verified.
    """
    if x.dim() != 2 or cache_seqlens is not None or any(value is not None for value in drafts.values()):
        raise NotImplementedError("speculative decoding of Gated DeltaNet models on the portable_cpu platform")
    slots = torch.arange(len(x)) if conv_state_indices is None else conv_state_indices.long()
    real = slots >= 0
    inputs = torch.cat([conv_state[slots.clamp(min=0)].mT.to(x.dtype), x[:, None]], 1)
    conv_state[slots[real]] = inputs[real, 1:].mT.to(conv_state.dtype)
    return _convolve(inputs, weight, bias, activation)[:, 0].to(x.dtype)


def _convolve(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """inputs: [..., width - 1 + tokens, channels]; returns [..., tokens, channels] in float32."""
    taps = weight.T.float()
    tokens = inputs.shape[-2] - len(taps) + 1
    out = inputs[..., :tokens, :].float() * taps[0]
    for tap in range(1, len(taps)):
        out.addcmul_(inputs[..., tap : tap + tokens, :].float(), taps[tap])
    if bias is not None:
        out += bias.float()
    return functional.silu(out, inplace=True) if activation in {"silu", "swish"} else out


# -- around it ---------------------------------------------------------------------------------------------------------


def fused_qkvzba_split_reshape_cat_contiguous(
    mixed_qkvz: torch.Tensor, mixed_ba: torch.Tensor, num_heads_qk: int, num_heads_v: int, head_qk: int, head_v: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What two projections gave, apart.

    mixed_qkvz: [tokens, queries, keys, values and output gates of all heads]; mixed_ba: [tokens, rates and decays].
    Returns the first three as they are, gates [tokens, num_heads_v, head_v], and what rate and decay come from
    [tokens, num_heads_v] each.
    """
    gates = 2 * num_heads_qk * head_qk + num_heads_v * head_v
    z = torch.unflatten(mixed_qkvz[:, gates:], 1, (num_heads_v, head_v))
    parts = mixed_qkvz[:, :gates], z, mixed_ba[:, :num_heads_v], mixed_ba[:, num_heads_v:]
    mixed_qkv, z, b, a = (part.contiguous() for part in parts)
    return mixed_qkv, z, b, a


def rms_norm_gated(
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """RMS norm of the last dimension, times a gate; x, z: [rows, size], weight: [size]; returns x's shape and dtype."""
    assert is_rms_norm
    assert norm_before_gate
    assert group_size is None
    out = functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
    if bias is not None:
        out += bias.float()
    if z is not None:
        gate = z.reshape(x.shape).float()
        out *= gate.sigmoid() if activation == "sigmoid" else functional.silu(gate)
    return out.to(x.dtype)


def fused_sigmoid_mul(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """The output gate of the full-attention layers: attn_output [tokens, size] times the sigmoid of as many gates."""
    assert not quant
    gated = (attn_output.float() * gate.reshape(attn_output.shape).float().sigmoid()).to(attn_output.dtype)
    return attn_output.copy_(gated) if inplace else gated


def fused_gate_sigmoid_mul(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor
) -> torch.Tensor:
    """What the shared expert of a mixture gives, times its gate: all but the weight [size] are [tokens, size]."""
    gate = hidden_states.float() @ gate_weight.float()
    return (shared_output.float() * gate.sigmoid()[:, None]).to(shared_output.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """The same, added to what the other experts gave [tokens, size]."""
    final_hidden_states += fused_gate_sigmoid_mul(hidden_states, gate_weight, shared_output)


# -- states for the prefix cache ---------------------------------------------------------------------------------------


def track_mamba_states_all_layers(
    conv_states_pool: torch.Tensor,
    ssm_states_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy the states of some requests to other slots, in all layers.

    conv_states_pool, ssm_states_pool: [layers, slots, ...]; the others: [requests], and those whose mask is set are
    copied. With ``check_freed_slots`` a slot may be -1, and is left.
    """
    chosen = mamba_track_mask[:batch_size].bool()
    source, target = (x[:batch_size][chosen].long() for x in (cache_indices, mamba_track_indices))
    if check_freed_slots:
        held = (source >= 0) & (target >= 0)
        source, target = source[held], target[held]
    for pool in (conv_states_pool, ssm_states_pool):
        pool[:, target] = pool[:, source]


def track_mamba_states_if_needed(
    conv_states: torch.Tensor, ssm_states: torch.Tensor, *rows: Any, **options: Any
) -> None:
    """The same in one layer: states [slots, ...]."""
    track_mamba_states_all_layers(conv_states[None], ssm_states[None], *rows, **options)


REPLACED: dict[str, tuple[Callable[..., Any], ...]] = {
    "attention.fla.chunk": (chunk_gated_delta_rule,),
    "attention.fla.fused_recurrent": (fused_recurrent_gated_delta_rule_packed_decode,),
    "attention.fla.layernorm_gated": (rms_norm_gated,),
    "attention.linear.fused_gdn_gating": (fused_gdn_gating,),
    "attention.triton_gdn_fused_proj": (fused_qkvzba_split_reshape_cat_contiguous,),
    "elementwise.elementwise": (fused_sigmoid_mul, fused_gate_sigmoid_mul, fused_gate_sigmoid_mul_add),
    "mamba.causal_conv1d_triton": (causal_conv1d_fn, causal_conv1d_update),
    "mamba.mamba_state_scatter_triton": (track_mamba_states_all_layers, track_mamba_states_if_needed),
}
"""By module of ``sglang.kernels.ops``, what is computed here instead."""
