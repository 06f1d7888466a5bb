"""What a result file says of the machine and the software that it was measured with."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = ("mminference-sgl", "sglang", "torch", "transformers")


def described() -> dict[str, object]:
    """Processor family and cores that this process may use, and versions."""
    return {
        "device": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
