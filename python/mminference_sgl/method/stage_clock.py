"""Seconds of a forward's stages, by marks that nothing waits for: events on a device, read when it is done."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

STAGES = ("probe", "select", "attend", "guard")
"""Of a layer. Where selection is launches of kernels that know their memory, the probe is among those of ``select``."""


class StageClock:
    """Notes when stages begin; a stage ends where the next one begins."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def enter(self, stage: str) -> None:
        """What follows belongs to one of :data:`STAGES`, or to none if it is empty."""
        mark: Any = time.perf_counter()
        if self._on_device:
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        self._marks.append((stage, mark))

    def seconds(self) -> dict[str, float]:
        """Seconds by stage; on a device only once it has passed the last mark."""
        total: defaultdict[str, float] = defaultdict(float)
        for (stage, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            if stage:
                total[stage] += begun.elapsed_time(ended) / 1e3 if self._on_device else ended - begun
        return total
