"""An SGLang platform for machines without an accelerator; active when SGLANG_PLATFORM names it.

Stock SGLang serves on a CPU only with a build of its kernels that is not on the package index. This
platform needs PyTorch alone. SGLang reaches it at five moments, and each thing is done at the
earliest moment that all the processes concerned pass:

| moment | processes | done there |
| --- | --- | --- |
| general plugin (`register`), before the command line is read | all that load plugins | `portable_dense` becomes a choice of the command line and a registered factory |
| platform object made, when SGLang's utilities are imported | all, also those that load no plugins | `Tensor.pin_memory` becomes the identity: the processors of video requests pin frames, which needs a CUDA driver; processes started from now on let OpenMP's threads wait briefly |
| server arguments resolved (`apply_server_args_defaults`) | the launching one | defaults for what the user left open, the dtype among them (`dtype`) |
| model runner imported (`init_backend`) | schedulers: the only ones with a vision tower | vision attention without a mask of patches x patches; Gated DeltaNet in PyTorch; the factory again, for servers whose SGLANG_PLUGINS leaves the general plugin out |
| weights loaded (`post_load_model`) | schedulers | parts that SGLang loads in float16, and what it keeps of short convolutions, follow the served dtype |

This module holds the entry points and imports nothing of SGLang: it is loaded while SGLang is being imported, and on
every machine. The platform's class is in `platform`.
"""  # noqa: E501 - a table

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

PLATFORM_NAME = "portable_cpu"
DENSE_BACKEND_NAME = "portable_dense"

SPIN_COUNT = 2000
"""Rounds, a tenth of a millisecond, in which a thread of GNU OpenMP waits for the others before it sleeps."""


def is_selected() -> bool:
    """Whether the environment asks for this platform."""
    return os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Let the threads of processes that start with this environment sleep soon when they wait for one another.

    By default they spin for 300,000 rounds, up to 15 ms. Sparse prefill is thousands of small parallel operations, and
    where a core is shared with something else, a spinning thread keeps from it the one that it waits for: 2 cores
    with a load of 8 took 20 s for what took 4 s with short waits. What the user set stays.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def activate() -> str | None:
    """SGLang's platform entry point: the path of the class, or None when another platform is to be used.

    Raises:
        RuntimeError: this platform is asked for, and SGLang is too old for it.
    """
    if not is_selected():
        return None
    from sglang.srt.platforms import interface

    if not hasattr(interface, "PlatformCapabilities"):
        raise RuntimeError(f"SGLANG_PLATFORM={PLATFORM_NAME} needs SGLang 0.5.22 or newer")
    return "mminference_sgl.portable.platform.PortableCpuPlatform"


def register() -> None:
    """SGLang's general plugin entry point: name the dense backend, on this platform only."""
    if not is_selected():
        return
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

    if DENSE_BACKEND_NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([DENSE_BACKEND_NAME])
    register_dense_backend()


def register_dense_backend() -> None:
    """Make the dense backend's name known to SGLang's registry; its code is imported when a server uses it."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend(DENSE_BACKEND_NAME)(_create_dense_backend)


def _create_dense_backend(runner: Any) -> Any:
    from mminference_sgl.portable import dense

    return dense.create(runner)
