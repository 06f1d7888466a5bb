"""Layers that save nothing run dense for a while, so that a request whose attention is spread out is not slowed down.

How many tiles a layer needs is known when its selection has been paid for. But what one chunk of a request needed tells
what the next one will: where the density was above the one at which sparse takes as long as dense on this machine
(:mod:`.crossover`), the layer runs dense until a chunk begins behind half as many keys again, and is looked at anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mminference_sgl.backend.figures import ChunkFigures
from mminference_sgl.method.plan import DeviceLayout, SparseRequest

GROWTH = 1.5
"""Over how much a request's keys grow until a layer is looked at again: density falls as they do."""


class Resting:
    """Which layers rest for which requests.

    What a forward found holds from the next one on, or on a device from the one after that: when that is planned, the
    figures are there without waiting, and what a request computes does not depend on when they arrive.
    """

    def __init__(self, dense_above: float, device: torch.device) -> None:
        self._dense_above = dense_above
        self._lag = 1 if device.type == "cpu" else 2

    def is_due(self, forward: int, present: int) -> bool:
        """Whether a forward's figures have to be known when the present one is planned."""
        return present - forward >= self._lag

    def note(self, chunks: Sequence[ChunkFigures], forward: int) -> None:
        """Notes which layers saved nothing in a forward; those that rested in it say nothing new."""
        for chunk in chunks:
            for layer, density in chunk.densities.items():
                if density > self._dense_above and not self._rests(chunk.layout, layer, chunk.prefix, forward):
                    before = chunk.layout.resting.get(layer, ())
                    kept = [(number, until) for number, until in before if until > chunk.prefix]
                    chunk.layout.resting[layer] = [*kept, (forward, int(GROWTH * chunk.num_keys))]

    def requests(self, layer: int, requests: Sequence[SparseRequest], present: int) -> frozenset[int]:
        """Those requests of the present forward for which a layer rests, as indices."""
        return frozenset(
            index for index, one in enumerate(requests) if self._rests(one.layout, layer, one.prefix, present)
        )

    def _rests(self, layout: DeviceLayout, layer: int, prefix: int, present: int) -> bool:
        found = layout.resting.get(layer, ())
        return any(self.is_due(forward, present) and prefix < until for forward, until in found)
