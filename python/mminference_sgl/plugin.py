"""The entry point that makes `--attention-backend mminference` known to SGLang.

SGLang calls `register` in each of its processes, before it reads the command line. It logs and
swallows what an entry point raises, and a server then rejects the backend's name as an invalid
choice. So nothing happens here but naming: the backend is imported when a server asks for it.
`mminference doctor` shows what went wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mminference_sgl import BACKEND_NAME

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner


def register() -> None:
    """Name the backend to SGLang: a choice of the command line and a factory."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([BACKEND_NAME])
    register_attention_backend(BACKEND_NAME)(create)
    from mminference_sgl.backend import resolution

    resolution.register()


def create(runner: ModelRunner) -> AttentionBackend:
    """Build the backend for a model runner; SGLang's factory for the name `mminference`."""
    from mminference_sgl.backend import factory

    return factory.create(runner)
