"""What every result is stored with, and words to whoever waits for it."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions, which every result is stored with."""
    name = platform.machine()
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    packages = ("mminference-sgl", "sglang", "torch", "triton", "flash-attn-4", "flashinfer-python")
    installed = {distribution.name for distribution in metadata.distributions()}
    versions = {package: metadata.version(package) for package in packages if package in installed}
    return {
        "device": name,
        "versions": versions,
        "cudnn": torch.backends.cudnn.version(),
        "time": time.strftime("%F %T"),
    }


def device_of(options: argparse.Namespace) -> torch.device | None:
    """The GPU, or the CPU in dry runs; None, with a word to whoever waits, where there is no GPU."""
    if options.dry_run:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    say("needs a CUDA device; --dry-run shows on the CPU that the script works")
    return None


def file_name(text: str) -> str:
    """A device's name as that of a file."""
    return text.lower().replace(" ", "-").replace("(", "").replace(")", "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def parse_count(text: str) -> int:
    """128K as 131072."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)
    return int(text.rstrip("KM")) * unit


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
