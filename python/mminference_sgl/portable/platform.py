"""The class of the `portable_cpu` platform; `cpu` tells what it is for and when SGLang calls what."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from mminference_sgl.portable.cpu import (
    DENSE_BACKEND_NAME,
    PLATFORM_NAME,
    register_dense_backend,
    wait_briefly,
)
from mminference_sgl.portable.dtype import measure_linear

DEFAULT_POOL_TOKENS = 256 * 1024
"""KV slots of a server that was told neither tokens nor memory: one very long video, or many short."""

DEFAULT_LINEAR_STATES = 128
"""States of linear-attention layers, of requests and in the prefix cache, for a server that was told as little."""

SGLANG_WATCHDOG_S = 300.0
DEFAULT_WATCHDOG_S = 3600.0
"""Seconds after which a forward counts as stuck: SGLang's default, made for GPUs, and this platform's."""

logger = logging.getLogger(__name__)


class PortableCpuPlatform(SRTPlatform, CpuDeviceMixin):
    """The CPU as an out-of-tree platform: PyTorch operators, gloo, no graphs, no Triton."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        _make_pinning_the_identity()
        # OpenMP reads it when a process starts: the ranks are still to come.
        wait_briefly(os.environ)

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open and SGLang would guess for a GPU or its own CPU build."""
        given = getattr(server_args, "_raw_input", None) or {}
        # SGLang has put its own CPU default here by now: the AMX backend, or `torch_native` on ARM.
        asked = given.get("attention_backend", server_args.attention_backend)
        if asked in {None, "intel_amx"}:
            server_args.attention_backend = DENSE_BACKEND_NAME
        if given.get("dtype", server_args.dtype) == "auto" and server_args.quantization is None:
            # The ranks get resolved arguments, so they serve in one dtype whatever each would measure.
            times = measure_linear()
            server_args.dtype = times.dtype
            logger.info("%s: serving in %s: %s; --dtype overrides", PLATFORM_NAME, times.dtype, times)
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            # A pool takes its memory when it is made. SGLang would fill most of the machine with it.
            server_args.max_total_tokens = DEFAULT_POOL_TOKENS
        if server_args.mem_fraction_static is None and server_args.max_mamba_cache_size is None:
            server_args.max_mamba_cache_size = DEFAULT_LINEAR_STATES
        if server_args.mem_fraction_static is None:
            # The host needs the rest: frames, pixels, the vision tower's activations.
            server_args.mem_fraction_static = 0.5
        if given.get("watchdog_timeout", server_args.watchdog_timeout) == SGLANG_WATCHDOG_S:
            # One forward is one tick of the watchdog, and a long clip's vision tower may take many minutes here.
            server_args.watchdog_timeout = DEFAULT_WATCHDOG_S
        if server_args.max_running_requests is None:
            # SGLang's guess is 2048 or more, each with a row of the context's length in a table.
            server_args.max_running_requests = 32

    def get_device(self, *_device_id: Any, **_keywords: Any) -> str:
        """The device of a server without `--device`: a name, where SGLang's mixin gives an object."""
        return self.device_type

    def get_default_attention_backend(self) -> str:
        """Dense attention that costs what a chunk costs."""
        return DENSE_BACKEND_NAME

    def get_compile_backend(self, mode: str | None = None) -> str:  # noqa: ARG002
        """Small functions run as written: Inductor would need a C++ compiler on every machine."""
        return "eager"

    def get_dispatch_key_name(self) -> str:
        """Fused operators run their plain PyTorch form."""
        return "native"

    def support_mamba_cache_extra_buffer(self) -> bool:
        """States of linear attention can be kept within a prompt, as with overlap scheduling the prefix cache does."""
        return True

    def init_backend(self) -> None:
        """Register the dense backend, and replace the vision attention and Gated DeltaNet, in each scheduler."""
        from mminference_sgl.portable import gated_delta_net

        register_dense_backend()
        _replace_vision_attention()
        gated_delta_net.install()

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Let every part of the model follow the dtype in which it is served."""
        from sglang.srt.environ import envs
        from sglang.srt.runtime_context import get_model

        if (dtype := get_model().dtype) != "auto":
            to_one_dtype(model, getattr(torch, dtype))
            # What a chunk leaves to the next one's short convolutions; else it is bfloat16 whatever the model is in.
            if not envs.SGLANG_MAMBA_CONV_DTYPE.is_set():
                envs.SGLANG_MAMBA_CONV_DTYPE.set(str(getattr(torch, dtype)).removeprefix("torch."))


def _make_pinning_the_identity() -> None:
    def pin_memory(self: torch.Tensor, *_device: Any, **_keywords: Any) -> torch.Tensor:
        return self

    torch.Tensor.pin_memory = pin_memory  # type: ignore[assignment,method-assign]


def _replace_vision_attention() -> None:
    from sglang.srt.layers.attention import vision

    from mminference_sgl.portable.vision import SegmentedVisionAttention

    vision.QKV_BACKEND_IMPL["sdpa"] = SegmentedVisionAttention


def to_one_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert those parameters of a model served in `dtype` that are in float16 nevertheless, such as LLaVA's tower.

    SGLang loads some vision towers in float16 whatever the model is served in. A quantised model's scales are left.
    """
    if getattr(model, "quant_config", None) is not None:
        return
    for parameter in model.parameters():
        if parameter.dtype is torch.float16:
            parameter.data = parameter.data.to(dtype)
