"""The servers that commands start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mminference_sgl.testing import Server


def server(
    model: str,
    backend: str | None,
    chunk: int | None,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str | None],
    metrics: bool = False,
) -> Server:
    """A server on this machine's GPU, or on its CPU where there is none; arguments as those of `testing.Server`."""
    import torch

    from mminference_sgl.portable.cpu import PLATFORM_NAME
    from mminference_sgl.testing import Server

    return Server(
        model,
        attention_backend=backend,
        chunked_prefill_size=chunk,
        platform=None if torch.cuda.is_available() else PLATFORM_NAME,
        env={"MMINFERENCE_LOG": "debug", **env},
        args=arguments,
        metrics=metrics,
        quick=True,
    )
