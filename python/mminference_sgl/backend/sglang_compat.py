"""The few places where SGLang's internals moved between the versions this package supports (0.5.17 to 0.5.23)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

if TYPE_CHECKING:
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def default_dense_backend(runner: ModelRunner) -> str:
    """Name of the attention backend that SGLang would have chosen for this model and machine."""
    try:
        from sglang.srt.arg_groups.model_override_base import get_default_attn_backend
    except ImportError:
        server_args: Any = runner.server_args
        name = server_args._get_default_attn_backend(runner.use_mla_backend, runner.model_config)
    else:
        name = get_default_attn_backend(runner.server_args, runner.use_mla_backend, runner.model_config)
    return str(name)


def head_offset(runner: ModelRunner) -> int:
    """Rank of this process among those that share the attention heads; head ids are rank * heads per rank + h."""
    del runner  # Both versions keep it in the process's context.
    parallel = get_parallel()
    return int(parallel.attn_tp_rank) if parallel.attn_tp_size > 1 else 0


def agreed(measure: Callable[[], int]) -> int:
    """What the first tensor-parallel rank measures, so that all ranks decide alike and only one of them works."""
    parallel = get_parallel()
    if parallel.tp_size == 1:
        return measure()
    group = parallel.tp_group
    return int(group.broadcast_object(measure() if group.is_first_rank else None, src=0))


def set_kv_buffer(
    pool: Any, layer: RadixAttention, batch: ForwardBatch, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Writes a chunk's keys and values of one layer into the pool, in fp8 by the layer's scales."""
    if layer.k_scale is None:
        pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), key, value)
    else:
        # The pool divides in place, and others still read these.
        given = key.clone(), value.clone(), layer.k_scale, layer.v_scale
        pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), *given)
