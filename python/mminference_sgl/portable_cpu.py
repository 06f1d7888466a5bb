"""An SGLang platform for machines without an accelerator; active when SGLANG_PLATFORM names it.

Stock SGLang serves on a CPU only with a build of its kernels that is not on the package index. This
platform needs PyTorch alone. SGLang reaches it at four moments, and each thing is done at the
earliest moment that all the processes concerned pass:

| moment | processes | done there |
| --- | --- | --- |
| general plugin (`register`), before the command line is read | all that load plugins | `portable_dense` becomes a choice of the command line and a registered factory |
| platform object made, when SGLang's utilities are imported | all, also those that load no plugins | `Tensor.pin_memory` becomes the identity: the processors of video requests pin frames, which needs a CUDA driver |
| server arguments resolved (`apply_server_args_defaults`) | the launching one | defaults for what the user left open |
| model runner imported (`init_backend`) | schedulers: the only ones with a vision tower | vision attention without a mask of patches x patches; the factory again, for servers whose SGLANG_PLUGINS leaves the general plugin out |
"""  # noqa: E501 - a table

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

PLATFORM_NAME = "portable_cpu"
DENSE_BACKEND_NAME = "portable_dense"
DEFAULT_POOL_TOKENS = 256 * 1024
"""KV slots of a server that was told neither tokens nor memory: one very long video, or many short."""


def is_selected() -> bool:
    """Whether the environment asks for this platform."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def activate() -> str | None:
    """SGLang's platform entry point: the path of the class, or None on every other machine."""
    return f"{__name__}.PortableCpuPlatform" if is_selected() else None


def register() -> None:
    """SGLang's general plugin entry point: name the dense backend, on this platform only."""
    if not is_selected():
        return
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if DENSE_BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([DENSE_BACKEND_NAME])
    _register_dense_backend()


class PortableCpuPlatform(SRTPlatform, CpuDeviceMixin):
    """The CPU as an out-of-tree platform: PyTorch operators, gloo, no graphs, no Triton."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        super().__init__()
        _make_pinning_the_identity()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the user left open and SGLang would guess for a GPU or its own CPU build."""
        given = getattr(server_args, "_raw_input", None) or {}
        # SGLang has put its own CPU default here by now: the AMX backend, or `torch_native` on ARM.
        asked = given.get("attention_backend", server_args.attention_backend)
        if asked in {None, "intel_amx"}:
            server_args.attention_backend = DENSE_BACKEND_NAME
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            # A pool takes its memory when it is made. SGLang would fill most of the machine with it.
            server_args.max_total_tokens = DEFAULT_POOL_TOKENS
        if server_args.mem_fraction_static is None:
            # The host needs the rest: frames, pixels, the vision tower's activations.
            server_args.mem_fraction_static = 0.5
        if not hasattr(torch.cpu, "Event"):
            # The overlapped scheduler waits for events, which older PyTorch has for GPUs only.
            server_args.disable_overlap_schedule = True
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

    def init_backend(self) -> None:
        """Register the dense backend and replace the vision attention, in each scheduler."""
        _register_dense_backend()
        _replace_vision_attention()


def _register_dense_backend() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(DENSE_BACKEND_NAME)(_create_dense_backend)


def _create_dense_backend(runner: Any) -> Any:
    from mminference_sgl import portable_dense

    return portable_dense.create(runner)


def _make_pinning_the_identity() -> None:
    def pin_memory(self: torch.Tensor, *_device: Any, **_keywords: Any) -> torch.Tensor:
        return self

    torch.Tensor.pin_memory = pin_memory  # type: ignore[assignment,method-assign]


def _replace_vision_attention() -> None:
    from sglang.srt.layers.attention import vision

    from mminference_sgl.portable_vision import SegmentedVisionAttention

    vision.QKV_BACKEND_IMPL["sdpa"] = SegmentedVisionAttention
