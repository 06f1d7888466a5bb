"""Stride search: the frame stride of visual runs whose grid nobody recorded, from the probe's attention mass.

A head that looks at the same place in other frames puts mass at multiples of one distance. The search collects, over
the first chunks of a request, how mass inside such a run lies by distance, and asks which stride explains its peaks
(method: the paper's stride search for Grid heads). A phase is not needed: places are relative, any offset names them.

Nothing waits for the device until the next chunk asks for the layout, so a request of one chunk neither pays for the
answer nor profits from it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from math import log

import torch
from torch.nn import functional

from mminference_sgl.kernels.probe import WeightProbe
from mminference_sgl.method.items import IMAGE, VIDEO, Item

logger = logging.getLogger(__name__)

MIN_STRIDE, MAX_STRIDE = 16, 4096
PERIODS = 4
"""Fewest multiples of a stride that must lie inside what has been seen."""
MIN_RUN = 1024
"""Tokens of a run below which its places are not worth a search."""
MAX_DISTANCE = (PERIODS + 1) * MAX_STRIDE
"""Distances that are collected; once a run has so many, its answer is final."""

_EVERY = 4
"""One layer in so many is listened to."""
_SHARPEST = 8.0
"""Most that one head may say for one distance, in multiples of what is around it."""
_AROUND = 8
"""Distances on either side that a distance is compared with."""
_BLOCK, _PEAKS = 256, 2
"""In each block of distances so many are peaks. Their density is then the same everywhere, whatever the attention."""
_LEAST_PEAK = 0.5
"""What a peak must say at least, so that even attention, whose ties are broken anyhow, has none."""
_MOST_MULTIPLES = 512
_BYTES = 16 << 20
"""Mass of the probe rows that is looked at at a time, beside which about twice as much is needed."""
_CLEAR = 18.0
"""Evidence of a stride, in nats over chance. Four peaks at the first four multiples are 19.4; chance alone, with 4,000
strides to try, gets there in fewer than one of 10,000 runs."""


class StrideSearch:
    """The strides of a request's visual runs without a grid: those found, and those still looked for.

    One per request. Ranks that hold other heads may find other strides: orders are internal to a forward.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[int, int], _Run] = {}

    @classmethod
    def of(cls, items: Sequence[Item], before: StrideSearch | None, given: int = 0) -> StrideSearch | None:
        """A search for the items' long opaque runs, None if there are none.

        ``before``: what is known already. ``given``: the stride of all runs of at least two frames, if it is not 0.
        """
        spans = [_opaque_run(item) for item in items]
        runs = [span for span in spans if span is not None]
        if not runs:
            return None
        search = cls() if before is None else before
        for start, end in runs:
            stride = given if 0 < 2 * given <= end + 1 - start else None
            search._runs.setdefault((start, end), _Run(start, end, stride))
        return search

    @property
    def strides(self) -> list[int]:
        """Those of the runs where one is known, in the order of the runs."""
        return [run.stride for _, run in sorted(self._runs.items()) if run.stride]

    def listens(self, layer: int | None) -> bool:
        """Whether a layer's probe is wanted."""
        return not (layer or 0) % _EVERY and any(run.stride is None for run in self._runs.values())

    def listen(self, probed: WeightProbe) -> None:
        """Adds what one layer's probe of media rows shows, for some heads; waits for nothing."""
        for run in self._runs.values():
            if run.stride is None:
                run.listen(probed)

    def conclude(self, counters: Counter[str]) -> bool:
        """Whether a stride was found since the last call. Reads the device at most once per run and doubling of it."""
        found = False
        for run in self._runs.values():
            decided = run.conclude()
            if decided is not None:
                counters["stride:found" if decided else "stride:none"] += 1
                logger.debug("mminference stride run=%d..%d stride=%s", run.start, run.end, decided or "none")
                found |= decided > 0
        return found

    def applied(self, items: Sequence[Item]) -> list[Item]:
        """The items, with runs whose stride is known as frames of one row; what is left of a run stays opaque."""
        result: list[Item] = []
        for item in items:
            span = _opaque_run(item)
            stride = self._runs[span].stride if span is not None else None
            if span is None or not stride:
                result.append(item)
                continue
            start, end = span
            frames = (end + 1 - start) // stride
            tail = start + frames * stride
            result.append((item[0], [(start, tail - 1)], (frames, 1, stride)))
            if tail <= end:
                result.append((item[0], [(tail, end)], None))
        return result


def _opaque_run(item: Item) -> tuple[int, int] | None:
    """The span of an item whose stride is worth a search."""
    modality, spans, grid = item
    if grid is not None or modality not in (IMAGE, VIDEO) or len(spans) != 1:
        return None
    start, end = spans[0]
    return (start, end) if end - start + 1 >= MIN_RUN else None


class _Run:
    """One run, tokens ``start`` to ``end`` inclusive. ``stride``: None while not decided, 0 if there is none."""

    def __init__(self, start: int, end: int, stride: int | None = None) -> None:
        self.start, self.end = start, end
        self.stride = stride
        self._spectrum: torch.Tensor | None = None
        self._extent = 0
        self._answered = 0

    def listen(self, probed: WeightProbe) -> None:
        extent = min(probed.weights.shape[2], self.end + 1) - self.start
        if extent < MIN_RUN or probed.rows.first > self.end:
            return
        self._extent = max(self._extent, min(extent, MAX_DISTANCE))
        spectrum = distance_spectrum(probed, self.start, self.start + extent, min(extent, MAX_DISTANCE))
        if self._spectrum is None:
            self._spectrum = spectrum.new_zeros(min(self.end + 1 - self.start, MAX_DISTANCE))
        self._spectrum[: spectrum.numel()] += spectrum

    def conclude(self) -> int | None:
        """The stride or 0, if there is twice as much to go by as at the last try and it decides; None otherwise."""
        if self._spectrum is None or self._extent < min(2 * self._answered, self._spectrum.numel()):
            return None
        self._answered = self._extent
        strides, evidence = stride_evidence(self._spectrum[: self._extent])
        best = evidence.argmax()
        stride, clear = torch.stack([strides[best].double(), evidence[best].double()]).tolist()
        if clear >= _CLEAR:
            self.stride = int(stride)
        elif self._extent == self._spectrum.numel():
            self.stride = 0
        if self.stride is not None:
            self._spectrum = None
        return self.stride


def distance_spectrum(probed: WeightProbe, start: int, end: int, distances: int) -> torch.Tensor:
    """How far the mass at each distance row - key stands out, both inside tokens [start, end): fp32 [distances].

    Summed over heads, each by how many times the mass around a distance it puts there: a sharp head is heard, a diffuse
    one is silent. Rows must agree: their logarithm counts, so that a single one says little, less where few reach so
    far back. Keys that other rows see as well are columns and count for no distance.
    """
    low = max(start, probed.rows.first - distances)
    positions = probed.rows.positions.long()
    keys = torch.arange(low, end, device=positions.device)
    inside = (positions >= start) & (positions < end)
    visible = inside[:, None] & (keys <= positions[:, None])  # [P, n]
    index = positions[:, None] - torch.arange(distances, device=positions.device) - low  # [P, distances]
    reached = inside[:, None] & (index >= 0)
    index = index.clamp(0, keys.numel() - 1)
    rows = reached.sum(0).clamp_min(1)
    sharpness = torch.zeros(distances, device=positions.device)
    for weights in torch.split(probed.weights, max(1, _BYTES // (4 * visible.numel()))):
        mass = weights[..., low:end] * visible
        mass *= visible.sum(-1)[:, None] / mass.sum(-1, keepdim=True).clamp_min(1e-20)
        others = (mass.sum(1, keepdim=True) - mass) / (visible.sum(0) - 1).clamp_min(1)
        mass = mass.sub_(others, alpha=2).clamp_min_(0).log1p_()
        by_distance = mass.gather(2, index.expand(mass.shape[0], -1, -1)).mul_(reached).sum(1) / rows  # [h, distances]
        around = functional.avg_pool1d(by_distance, 2 * _AROUND + 1, 1, _AROUND, count_include_pad=False)
        sharpness += ((by_distance - around) / (around + _SHARPEST / rows)).clamp(0, _SHARPEST).sum(0)
    sharpness[:MIN_STRIDE] = 0
    return sharpness


def stride_evidence(spectrum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate strides and the evidence for each: int64 and fp32 [strides].

    The evidence is the log-likelihood ratio of as many peaks among the first multiples of a stride as there are,
    against the rate of peaks anywhere, at the number of multiples (at least ``PERIODS``) where it is largest: heads
    look less far than a run is long. The true stride beats its multiples, which explain fewer peaks, and its divisors,
    which promise peaks that are not there.
    """
    device, length = spectrum.device, spectrum.numel() // _BLOCK * _BLOCK
    top = spectrum[:length].view(-1, _BLOCK).topk(_PEAKS, dim=1)
    peaks = torch.zeros(length // _BLOCK, _BLOCK, dtype=torch.bool, device=device)
    peaks = peaks.scatter_(1, top.indices, top.values >= _LEAST_PEAK).flatten()
    strides = torch.arange(MIN_STRIDE, min(MAX_STRIDE, (length - 1) // PERIODS) + 1, device=device)
    count = torch.arange(1, min(_MOST_MULTIPLES, (length - 1) // MIN_STRIDE) + 1, device=device)
    distance = strides[:, None] * count
    inside = distance < length
    hits = (peaks[distance.clamp_max(length - 1)] & inside).cumsum(1)
    rate, chance = hits / count, _PEAKS / _BLOCK
    evidence = torch.xlogy(rate, rate / chance) + torch.xlogy(1 - rate, (1 - rate) / (1 - chance))
    counts = inside & (count >= PERIODS) & (rate > chance)
    return strides, (evidence * count).masked_fill(~counts, 0).amax(1)


assert PERIODS * log(_BLOCK / _PEAKS) > _CLEAR
