"""The servers that benchmarks/gpu/serving.py compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GUARD_OFF = 1e9
DENSE = (None, "flashinfer", "triton")
"""Dense backends in the order in which they are tried; None is the platform's own."""
SKIP_SOFTMAX = "SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR"
SKIP_FACTORS = (300, 1000, 3000)
"""The threshold is such a factor over the length."""


@dataclass(frozen=True)
class Setup:
    """How a server differs from the platform's own: settings of mminference, arguments, environment."""

    backend: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)


def ours(density: float, dense: str | None) -> dict[str, Setup]:
    """Sparse servers by name, with a dense backend beside them."""
    budget = {"error": 1.0, "max_density": density / 100, "error_ceiling": GUARD_OFF}
    floor = {"pattern": "a_shape", "error_ceiling": GUARD_OFF, "patterns": {"a_shape": {"sink": 64, "window": 64}}}
    args = ("--prefill-attention-backend", "mminference") if dense else ()
    backend = dense or "mminference"
    return {"mminference": Setup(backend, budget, args), "rest": Setup(backend, floor, args)}


def rivals() -> dict[str, Setup]:
    """Dense and skip-softmax servers of stock SGLang by name."""
    found = {f"fa3, pages of {size}": Setup("fa3", args=("--page-size", str(size))) for size in (1, 128)}
    found["trtllm_mha"] = Setup("trtllm_mha")
    for factor in SKIP_FACTORS:
        found[f"trtllm_mha, skip {factor}"] = Setup("trtllm_mha", env={SKIP_SOFTMAX: str(factor)})
    return found
