"""Timing of work on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


class Clock:
    """Times functions on a device: events on CUDA, the wall on a CPU (dry runs only)."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        size = FLUSH_BYTES if device.type == "cuda" else 1
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def samples(self, work: Callable[[], object]) -> Timing:
        work()
        return Timing.of([self.once(work) for _ in range(self.repeats)])

    def once(self, work: Callable[[], object]) -> float:
        """Milliseconds of one call, with a cold L2 cache."""
        self._flush.zero_()
        with self.span() as span:
            work()
        return span()

    @contextmanager
    def span(self) -> Iterator[Callable[[], float]]:
        """Gives a function that tells the milliseconds of what ran inside, once it is over."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

            def tell() -> float:
                end.synchronize()
                return begin.elapsed_time(end)

            begin.record()
            yield tell
            end.record()
        else:
            times = [time.perf_counter()]
            yield lambda: 1e3 * (times[1] - times[0])
            times.append(time.perf_counter())
