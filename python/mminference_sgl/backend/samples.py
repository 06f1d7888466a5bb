"""What sparse prefill did for a long request, now and then, told without a wait: figures travel while devices work."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mminference_sgl.method.plan import SparseRequest
from mminference_sgl.method.prefill import LayerReport

SECONDS = 10.0
"""Between two samples."""
LONG = 16384
"""Keys from which on a request is long."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sample:
    """A request's figures on their way: density, coverage, largest error of a layer, heads guarded, heads dense."""

    prefix: int
    chunk: int
    layers: int
    values: torch.Tensor
    ready: Any
    """A CUDA event, None where the figures are there at once."""


class Samples:
    """At most one long request per :data:`SECONDS`, logged at level info once its figures have arrived.

    ``bound``: error that is promised; a request beyond it is logged at level warning.
    """

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._last = -SECONDS
        self._pending: _Sample | None = None

    def take(self, requests: Sequence[SparseRequest], reports: Sequence[LayerReport]) -> None:
        """Looks at the longest request of a forward that has just been issued."""
        index = max(range(len(requests)), key=lambda i: requests[i].num_keys)
        request, own = requests[index], [report for report in reports if report.request == index]
        due = time.monotonic() - self._last >= SECONDS and logger.isEnabledFor(logging.INFO)
        if self._pending is not None or not due or not own or request.num_keys < LONG:
            return
        self._last = time.monotonic()
        tiles, causal, coverage, error, guarded, dense = (
            torch.stack([getattr(report, name).float() for report in own])
            for name in ("tiles", "causal", "coverage", "error", "guarded", "dense")
        )
        values = torch.stack([tiles.sum() / causal.sum(), coverage.mean(), error.max(), guarded.sum(), dense.sum()])
        ready = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            ready = torch.cuda.current_stream().record_event()
        self._pending = _Sample(request.prefix, request.chunk, len(own), values, ready)

    def tell(self) -> None:
        """Logs what has arrived by now."""
        sample = self._pending
        if sample is None or (sample.ready is not None and not sample.ready.query()):
            return
        self._pending = None
        density, coverage, error, guarded, dense = sample.values.tolist()
        missed = self._bound > 0 and error > self._bound
        logger.log(
            logging.WARNING if missed else logging.INFO,
            "mminference sample prefix=%d chunk=%d layers=%d density=%.4f coverage=%.4f error=%.4f"
            " guarded_heads=%d dense_heads=%d%s",
            sample.prefix,
            sample.chunk,
            sample.layers,
            density,
            coverage,
            error,
            guarded,
            dense,
            f": more than the error of {self._bound:g} that was asked for" if missed else "",
        )
