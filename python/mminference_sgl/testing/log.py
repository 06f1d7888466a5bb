"""What the backend writes to a server's log, read back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Prefill:
    """One line of the backend's debug log: one chunk of one request that ran sparse."""

    request: str
    prefix: int
    chunk: int
    layers: int
    density: float
    """Computed tiles / causal tiles, over the layers that ran sparse."""
    coverage: float
    error: float
    rank: int = 0
    """Tensor-parallel rank whose heads these are."""


@dataclass(frozen=True)
class Fallback:
    """One warning of the backend: a request that had to run dense, and why."""

    reason: str
    detail: str


_PREFILL = re.compile(r"(?:\bTP(\d+)[^\]\n]*\] )?mminference prefill (?=\S+=)(.*)$", re.MULTILINE)
_LAYOUT = re.compile(r"mminference layout tokens=\d+ items=(\S+)$", re.MULTILINE)
_FALLBACK = re.compile(r"mminference: request runs dense: ([^:\n]+): (.*)$", re.MULTILINE)
_START = re.compile(r"\bmminference: (?!request runs dense)(.*)$", re.MULTILINE)


def prefills(log: str) -> list[Prefill]:
    """The sparse prefills that a server's log tells of (``MMINFERENCE_LOG=debug``), in order."""
    found = []
    for match in _PREFILL.finditer(log):
        values = dict(part.split("=", 1) for part in match[2].split() if "=" in part)
        found.append(
            Prefill(
                request=values["request"],
                prefix=int(values["prefix"]),
                chunk=int(values["chunk"]),
                layers=int(values["layers"]),
                density=float(values["density"]),
                coverage=float(values["coverage"]),
                error=float(values["error"]),
                rank=int(match[1] or 0),
            )
        )
    return found


def layouts(log: str) -> list[tuple[str, ...]]:
    """The items of each request with media as they were laid out, in prompt order, such as ``video:12x8x16``."""
    return [tuple(match[1].split(",")) for match in _LAYOUT.finditer(log)]


def fallbacks(log: str) -> list[Fallback]:
    """The warnings about requests that could not be planned; one per reason."""
    return [Fallback(m[1].strip(), m[2].strip()) for m in _FALLBACK.finditer(log)]


def start_lines(log: str) -> list[str]:
    """What the backend said about itself when it started."""
    return [m[1].strip() for m in _START.finditer(log)]


def mean_density(lines: Sequence[Prefill], tokens: int) -> float:
    """Density of the prefill of one request of `tokens` tokens, over its causal area.

    Chunks without a line ran dense.
    """
    skipped = sum(p.chunk * (p.prefix + (p.chunk + 1) / 2) * (1 - p.density) for p in lines)
    return 1 - skipped / (tokens * (tokens + 1) / 2)
