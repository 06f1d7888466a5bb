"""Probe: where the attention mass of a few query rows of the chunk lies.

:func:`run` is the portable way, which holds the rows' softmax weights; :mod:`.probe_triton` never does. Cost per
(request, layer) with ``P`` probe rows and ``N`` keys: ``2 * H * P * N * (D + Dv)`` FLOPs for the scores and the dense
output, ``4 * H * P * N`` bytes of fp32 weights written once and read about five times, and the keys and values read
once. With one row in 128 that is 1/128 of the dense chunk's FLOPs. Callers bound the memory by probing some heads at a
time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from .operands import Operands
from .tiles import KeyOrder, Region, element_mask


@dataclass(frozen=True)
class ProbeRows:
    """Rows of one request and one query modality whose attention is computed in full.

    ``rows`` int64 [P]: batch row. ``positions`` int32 [P]: token position; ``first``: the smallest of them.
    ``key_tile`` int64 [length]: token position -> key tile of the cell order, of which there are ``key_tiles`` (none
    where the rows take no part in a cell pass).
    """

    rows: torch.Tensor
    positions: torch.Tensor
    first: int
    key_tile: torch.Tensor
    key_tiles: int


class ProbeKeys:
    """A request's keys, those of earlier chunks and of this one, in both orders; made once per forward.

    ``sequence`` and ``cell``: the request's part of the two passes' orders; ``cell`` None without a cell pass.
    ``last``: the largest token position of the chunk.
    """

    def __init__(self, sequence: KeyOrder, cell: KeyOrder | None, last: int) -> None:
        self.sequence, self.cell = sequence, cell
        self._last = last
        self._present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def present(self, order: KeyOrder) -> tuple[torch.Tensor, torch.Tensor]:
        """An order's tiles, those that hold keys by now first: int32 [n], and how many these are, int64 0-d."""
        if id(order) not in self._present:
            future = order.tile_min > self._last
            tiles = future.byte().argsort(stable=True).int()
            self._present[id(order)] = tiles, (~future).sum()
        return self._present[id(order)]


Bound = int | torch.Tensor
"""A sink or a reach: the same for all heads, or int32 [H]."""


class Probe(Protocol):
    """Dense attention of the probe rows, for some heads: their output, and their mass by key tile.

    ``output`` fp32 [H, P, Dv]. Masses are shares of a row's softmax; keys in the future have none.
    """

    @property
    def rows(self) -> ProbeRows:
        """The rows that were probed."""
        ...

    @property
    def output(self) -> torch.Tensor:
        """Their dense output."""
        ...

    @property
    def tile_mass(self) -> torch.Tensor:
        """All mass by key tile of the sequence order: fp32 [H, P, n]."""
        ...

    def near(self, sink: Bound, reach: Bound) -> torch.Tensor:
        """Mass in the near region by key tile of the sequence order: fp32 [H, P, n]."""
        ...

    def far(self, regions: Sequence[tuple[Bound, Bound]]) -> torch.Tensor:
        """Mass in some far regions, each by sink and reach, by key tile of the cell order: fp32 [regions, H, P, n']."""
        ...


@dataclass(frozen=True)
class WeightProbe:
    """A probe that holds all weights.

    ``weights`` fp32 [H, P, n * tile_keys]: softmax weights over the request's keys in sequence order, 0 in the future
    and behind the last key.
    """

    rows: ProbeRows
    weights: torch.Tensor
    output: torch.Tensor
    tile_keys: int

    @cached_property
    def tile_mass(self) -> torch.Tensor:
        """See :class:`Probe`."""
        return self._by_tile(self.weights)

    def near(self, sink: Bound, reach: Bound) -> torch.Tensor:
        """See :class:`Probe`."""
        return self._by_tile(self.weights * self._region(Region.NEAR, sink, reach))

    def far(self, regions: Sequence[tuple[Bound, Bound]]) -> torch.Tensor:
        """See :class:`Probe`."""
        return torch.stack([self._far(sink, reach) for sink, reach in regions])

    def _far(self, sink: Bound, reach: Bound) -> torch.Tensor:
        if isinstance(sink, torch.Tensor) or isinstance(reach, torch.Tensor):
            return self._by_cell(self.weights * self._region(Region.FAR, sink, reach))
        # The near region is a few keys: what they hold is taken out of the mass of their tiles.
        positions = self.rows.positions.long()[:, None]
        first = torch.arange(min(sink, self.cell_tile.numel()), device=positions.device).expand(len(positions), -1)
        window = positions - torch.arange(min(reach, self.weights.shape[2]), device=positions.device)
        index = torch.cat([first, window.clamp_min(0)], dim=1)
        near = torch.cat([first <= positions, window >= sink], dim=1)
        heads = self.weights.shape[0]
        weights = self.weights.gather(2, index.expand(heads, -1, -1)) * near
        mass = self._cell_mass.clone()
        return mass.scatter_add_(2, self.cell_tile[index].expand(heads, -1, -1), -weights).clamp_min_(0)

    @property
    def cell_tile(self) -> torch.Tensor:
        """Cell-order key tile of the keys that ``weights`` has and the layout knows: int64 [known]."""
        return self.rows.key_tile[: self.weights.shape[2]]

    @cached_property
    def _cell_mass(self) -> torch.Tensor:
        return self._by_cell(self.weights)

    def _region(self, region: Region, sink: Bound, reach: Bound) -> torch.Tensor:
        keys = torch.arange(self.weights.shape[2], device=self.weights.device)
        return element_mask(region, self.rows.positions[:, None], keys, by_head(sink), by_head(reach))

    def _by_tile(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.view(*weights.shape[:2], -1, self.tile_keys).sum(-1)

    def _by_cell(self, weights: torch.Tensor) -> torch.Tensor:
        mass = weights.new_zeros(*weights.shape[:2], self.rows.key_tiles)
        known = weights[..., : self.cell_tile.numel()]
        return mass.scatter_add_(2, self.cell_tile.expand(known.shape), known)


def by_head(bound: Bound) -> Bound:
    """A bound that broadcasts over [H, P, keys]."""
    return bound[:, None, None] if isinstance(bound, torch.Tensor) else bound


def run(operands: Operands, keys: ProbeKeys, rows: ProbeRows) -> WeightProbe:
    """Computes the probe rows' attention over a request's keys."""
    slots = keys.sequence.slots
    k = operands.key_pool.index_select(0, slots.flatten()).permute(1, 2, 0).float()
    v = operands.value_pool.index_select(0, slots.flatten()).transpose(0, 1).float()
    q = operands.query[rows.rows].float() * (operands.scale * operands.key_scale)
    heads, kv_heads = q.shape[1], k.shape[0]
    grouped = q.view(-1, kv_heads, heads // kv_heads, q.shape[2]).permute(1, 2, 0, 3).flatten(1, 2)
    weights = torch.matmul(grouped, k).view(heads, len(rows.rows), -1)
    # Keys before the first row are seen by all; padding lies behind the last key, so it is in the future as well.
    late = torch.arange(rows.first + 1, k.shape[2], device=slots.device)
    weights[..., rows.first + 1 :].masked_fill_(late > rows.positions[:, None], float("-inf"))
    weights = torch.softmax(weights, dim=-1)
    output = torch.matmul(weights.view(kv_heads, -1, weights.shape[2]), v).view(heads, len(rows.rows), -1)
    if operands.value_scale != 1:
        output *= operands.value_scale
    return WeightProbe(rows, weights, output, slots.shape[1])
