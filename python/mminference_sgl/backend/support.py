"""Which servers can prefill sparse: one list of what a server's options and model rule out, and why.

Asked twice about the same facts: while SGLang resolves its arguments (:mod:`.resolution`), so that a server that cannot
gain is resolved as if this package were not there; and when a backend is made (:mod:`.factory`), where the model and
its KV pool are there as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SPARSE_KV_DTYPES = ("auto", "bf16", "bfloat16", "fp16", "float16", "fp8_e4m3")
"""``--kv-cache-dtype`` values that the kernels read; ``auto`` is judged by the pool that comes of it."""


class UnsupportedServerError(ValueError):
    """A combination that promises what sparse prefill would break; the message names it and the remedy."""


@dataclass(frozen=True)
class Deployment:
    """What of a server decides whether any of its prefill may run sparse."""

    device: str = "cuda"
    mla: bool = False
    encoder_decoder: bool = False
    own_sparse_attention: bool = False
    bidirectional_images: bool = False
    deterministic: bool = False
    decode_only: bool = False
    kv_cache_dtype: str = "auto"
    heads_before_tokens: bool = False
    decode_context_parallel: int = 1
    prefill_context_parallel: int = 1
    two_batch_overlap: bool = False
    full_prefill_graph: bool = False
    compiled_on_cpu: bool = False

    @classmethod
    def of(cls, options: Any, model_config: Any, dense: str) -> Deployment:
        """Reads SGLang's resolved options and its model configuration; ``dense`` names the dense prefill backend.

        Options that a version of SGLang does not have are at their default.
        """
        from sglang.srt.configs.model_config import AttentionArch
        from sglang.srt.environ import envs

        def option(name: str, default: Any) -> Any:
            value = getattr(options, name, default)
            return default if value is None else value

        device = str(option("device", "cuda"))
        graphs = option("cuda_graph_config", None)
        hnd = getattr(envs, "SGLANG_USE_HND_KVCACHE", None)
        architectures = getattr(model_config.hf_config, "architectures", None) or []
        return cls(
            device=device,
            mla=model_config.attention_arch == AttentionArch.MLA,
            encoder_decoder=bool(getattr(model_config, "is_encoder_decoder", False)),
            own_sparse_attention=_has_own_sparse_attention(model_config.hf_config),
            # SGLang lets images attend both ways on this backend alone, which it knows by its class.
            bidirectional_images=dense == "triton" and "Gemma3ForConditionalGeneration" in architectures,
            deterministic=bool(option("enable_deterministic_inference", False))
            or option("rl_on_policy_target", None) is not None,
            decode_only=option("disaggregation_mode", "null") == "decode",
            kv_cache_dtype=str(option("kv_cache_dtype", "auto")),
            heads_before_tokens=bool(hnd is not None and hnd.get()),
            decode_context_parallel=int(option("dcp_size", 1)),
            prefill_context_parallel=int(option("attn_cp_size", 1)),
            two_batch_overlap=bool(option("enable_two_batch_overlap", False)),
            full_prefill_graph=getattr(getattr(graphs, "prefill", None), "backend", "") == "full",
            compiled_on_cpu=device == "cpu" and bool(option("enable_torch_compile", False)),
        )

    def check(self) -> None:
        """Refuses what must not be silently broken.

        Raises:
            UnsupportedServerError: the options promise more than sparse prefill, or an attention backend by this name,
                can keep.
        """
        if self.deterministic:
            raise UnsupportedServerError(
                "deterministic inference (--enable-deterministic-inference, --rl-on-policy-target) is not kept by "
                "attention backend mminference, whose choices depend on chunk bounds; leave one of the two out"
            )
        if self.decode_context_parallel > 1:
            raise UnsupportedServerError(
                f"--dcp-size {self.decode_context_parallel} shards the KV pool, and attention backend mminference does "
                "not read shards; use --dcp-size 1 or another attention backend"
            )

    def dense_reason(self) -> str:
        """Why all prefill of the server is dense, empty if some of it may run sparse."""
        return next(self._reasons(), "")

    def _reasons(self) -> Iterator[str]:
        if self.device == "npu":
            yield "no kernels for NPUs"
        if self.mla:
            yield "MLA models have no layer with keys and values per head"
        if self.encoder_decoder:
            yield "encoder-decoder models keep the encoder's tokens in the request's slots"
        if self.own_sparse_attention:
            yield "the model brings its own sparse attention"
        if self.bidirectional_images:
            yield "Gemma 3's images attend both ways on the triton backend"
        if self.decode_only:
            yield "a decode server does not prefill"
        if self.kv_cache_dtype not in SPARSE_KV_DTYPES:
            yield f"KV cache dtype {self.kv_cache_dtype}"
        if self.heads_before_tokens:
            yield "SGLANG_USE_HND_KVCACHE puts heads before tokens in the KV pool"
        if self.prefill_context_parallel > 1:
            yield f"prefill context parallelism over {self.prefill_context_parallel} ranks"
        if self.two_batch_overlap:
            yield "two-batch overlap gives its halves no media"
        if self.full_prefill_graph:
            yield "full CUDA graphs of prefill; breakable ones are fine"
        if self.compiled_on_cpu:
            yield "--enable-torch-compile on a CPU"


def pool_reason(pool: Any) -> str:
    """Why no layer can read a KV pool, empty if one may: token-major keys and values in a dtype the kernels read."""
    if not hasattr(pool, "get_key_buffer"):
        return "KV pool without key buffers"
    # With sliding windows a pool is two, and the full layers' is what we read.
    inner = getattr(pool, "full_kv_pool", pool)
    layout = getattr(inner, "kv_cache_layout", "nhd")
    if layout != "nhd" or getattr(inner, "use_hnd", False):
        return f"KV pool layout {layout}"
    # fp8 with one scale per block, which only its own attention kernels apply.
    if hasattr(inner, "get_kv_scale_buffer"):
        return "KV pool with block scales"
    return ""


def _has_own_sparse_attention(hf_config: Any) -> bool:
    try:
        from sglang.srt.layers.attention.qsa.config import is_qwen_qsa
    except ImportError:
        return False
    return bool(is_qwen_qsa(hf_config))
