"""The few places where SGLang's internals moved between the versions this package supports (0.5.17 to 0.5.23)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

if TYPE_CHECKING:
    from array import array

    import torch
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

T = TypeVar("T")


def resolved_options(runner: ModelRunner) -> Any:
    """The server's options as SGLang resolved them; the record that it keeps of them is what was typed."""
    try:
        from sglang.srt.arg_groups.overrides import resolved_view
    except ImportError:
        return runner.server_args
    return resolved_view(runner.server_args)


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


def decode_backend(runner: ModelRunner) -> str | None:
    """Name of the attention backend that decodes; 0.5.17 tells a runner only once its backends are made."""
    name: str | None = getattr(runner, "decode_attention_backend_str", None)
    if name is None:
        options = resolved_options(runner)
        name = getattr(options, "decode_attention_backend", None) or getattr(options, "attention_backend", None)
    return name


def chunk_tokens(runner: ModelRunner) -> int:
    """Tokens of a prefill chunk, 0 where prompts are not cut."""
    try:
        from sglang.srt.runtime_context import get_schedule
    except ImportError:
        size = runner.server_args.chunked_prefill_size
    else:
        size = get_schedule().chunked_prefill_size
    return max(0, int(size or 0))


def head_offset(runner: ModelRunner) -> int:
    """Rank of this process among those that share the attention heads; head ids are rank * heads per rank + h."""
    del runner  # Both versions keep it in the process's context.
    parallel = get_parallel()
    return int(parallel.attn_tp_rank) if parallel.attn_tp_size > 1 else 0


def head_ranks(runner: ModelRunner) -> int:
    """Number of processes that share the attention heads."""
    del runner  # As above.
    return int(get_parallel().attn_tp_size)


def metric_labels(runner: ModelRunner) -> dict[str, str] | None:
    """Labels of this process's metrics, SGLang's own names; None where it exports none."""
    options = resolved_options(runner)
    if not options.enable_metrics or (head_offset(runner) > 0 and not options.enable_metrics_for_all_schedulers):
        return None
    parallel = get_parallel()
    from sglang.srt.disaggregation.utils import DisaggregationMode

    labels = {
        "model_name": options.served_model_name,
        "engine_type": DisaggregationMode.to_engine_type(options.disaggregation_mode),
        "tp_rank": parallel.tp_rank,
        "pp_rank": parallel.pp_rank,
    }
    dp_rank = getattr(parallel, "dp_rank", None)
    if dp_rank is not None:
        labels["dp_rank"] = dp_rank
    return {name: str(value) for name, value in {**labels, **(options.extra_metric_labels or {})}.items()}


def hybrid_models_on_blackwell() -> bool:
    """Whether SGLang judges the backends of Gated DeltaNet models there by the names the factory left on a runner.

    0.5.17 judges by those that were typed, and takes its own alone.
    """
    from sglang.srt.layers.attention.attention_registry import attn_backend_wrapper

    return "prefill_attention_backend_str" in attn_backend_wrapper.__code__.co_names


def first_rank_decides(decide: Callable[[], T]) -> T:
    """What the first tensor-parallel rank says, so that all ranks do alike and only one of them works.

    A collective: every rank must get here.
    """
    parallel = get_parallel()
    if parallel.tp_size == 1:
        return decide()
    group = parallel.tp_group
    said: T = group.broadcast_object(decide() if group.is_first_rank else None, src=0)
    return said


def of_all_ranks(own: T) -> list[T]:
    """What each tensor-parallel rank brings, by rank. A collective: every rank must get here."""
    parallel = get_parallel()
    return [own] if parallel.tp_size == 1 else list(parallel.tp_group.all_gather_object(own))


def pad_mm_tokens(input_ids: array[int], mm_inputs: Any) -> array[int]:
    """A prompt with each item's hash in place of its placeholders; in a list where SGLang gives a list."""
    from sglang.srt.managers import mm_utils

    pad = getattr(mm_utils, "pad_mm_tokens", None)
    if pad is None:
        pad = mm_utils.MultiModalityDataPaddingPatternMultimodalTokens().pad_input_tokens
    padded: array[int] = pad(input_ids, mm_inputs)
    return padded


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
