"""What sparse prefill did, in figures that travel to the host while the device works, to be read when they are there.

One home of what a forward's layers report: the log, samples and metrics read it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mminference_sgl.method.plan import DeviceLayout, SparseRequest
from mminference_sgl.method.prefill import LayerReport

_FIELDS = ("tiles", "causal", "coverage", "error", "guarded", "dense")
"""Of a :class:`LayerReport`."""


@dataclass(frozen=True)
class ChunkFigures:
    """What became of one chunk of one request that ran sparse.

    ``layout``: the request's. ``tiles``, ``causal``: of all its layers; ``coverage``: their mean; ``error``: a layer's
    largest; ``densities``: by layer; ``guarded``: heads that the guard sent to dense, by layer; ``dense``: head and
    layer pairs that computed all tiles.
    """

    layout: DeviceLayout
    prefix: int
    chunk: int
    layers: int
    tiles: float
    causal: float
    coverage: float
    error: float
    densities: dict[int, float]
    guarded: dict[int, int]
    dense: int

    @property
    def density(self) -> float:
        """Computed tiles over causal tiles."""
        return self.tiles / self.causal

    @property
    def words(self) -> str:
        """For the log."""
        return (
            f"prefix={self.prefix} chunk={self.chunk} layers={self.layers} density={self.density:.4f} "
            f"coverage={self.coverage:.4f} error={self.error:.4f} guarded_heads={sum(self.guarded.values())}"
        )

    @property
    def num_keys(self) -> int:
        """Keys in the pool behind the chunk."""
        return self.prefix + self.chunk


class Figures:
    """Figures of one forward on their way to the host."""

    def __init__(self, requests: Sequence[SparseRequest], layers: Sequence[tuple[int, Sequence[LayerReport]]]) -> None:
        """``layers``: each one's id and its reports, of which there is one per request."""
        self._requests = [(request.layout, request.prefix, request.chunk) for request in requests]
        self._layers = [layer for layer, _ in layers]
        ordered = [one for _, reports in layers for one in sorted(reports, key=lambda one: one.request)]
        values = torch.stack([torch.stack([getattr(one, name).float() for one in ordered]) for name in _FIELDS])
        self._ready: Any = None
        """A CUDA event, None where the figures are there at once."""
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            self._ready = torch.cuda.current_stream().record_event()
        self._values = values

    @property
    def arrived(self) -> bool:
        """Whether reading waits for nothing."""
        return self._ready is None or bool(self._ready.query())

    def read(self) -> list[ChunkFigures]:
        """One per request, in the order of the forward's; waits for them if they have not arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        values = self._values.double().view(len(_FIELDS), len(self._layers), len(self._requests))
        found = []
        for index, (layout, prefix, chunk) in enumerate(self._requests):
            tiles, causal, coverage, error, guarded, dense = values[..., index]
            by_layer = zip(self._layers, guarded.tolist(), strict=True)
            found.append(
                ChunkFigures(
                    layout=layout,
                    prefix=prefix,
                    chunk=chunk,
                    layers=len(self._layers),
                    tiles=float(tiles.sum()),
                    causal=float(causal.sum()),
                    coverage=float(coverage.mean()),
                    error=float(error.max()),
                    densities=dict(zip(self._layers, (tiles / causal).tolist(), strict=True)),
                    guarded={layer: int(heads) for layer, heads in by_layer if heads},
                    dense=int(dense.sum()),
                )
            )
        return found
