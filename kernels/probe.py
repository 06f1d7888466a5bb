"""Probe: where the attention mass of a few query rows of the chunk lies, and what their output would lose without it.

A key tile *holds* of a row the mass of its keys, ``m = sum p``, and their *deviation* ``sum p (v - o)`` from the row's
output ``o``. Without some tiles the output moves by minus the sum of their deviations over the mass that is left: that
is exact. Deviations are kept as :data:`SKETCH` random projections, whose squares sum to the squared length on average.

:func:`run` is the portable way, which holds the rows' softmax weights; :mod:`.probe_triton` never does. Cost per
(request, layer) with ``P`` probe rows and ``N`` keys: ``2 * H * P * N * (D + Dv)`` FLOPs for the scores and the dense
output, ``2 * H * P * N * HELD`` for what each order's tiles hold, ``4 * H * P * N`` bytes of fp32 weights written once
and read about five times, and the keys and values read once. With one row in 128 that is 1/128 of the dense chunk's
FLOPs. Callers bound the memory by probing some heads at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch

from .operands import Operands
from .tiles import KeyOrder, Region, element_mask

SKETCH = 7
"""Random projections of a deviation."""
HELD = 1 + SKETCH
"""What a tile holds of a row: its mass, and the projections of its deviation."""


@cache
def signs(head_dim: int, device: torch.device) -> torch.Tensor:
    """The projections: fp32 [head_dim, SKETCH], each entry plus or minus ``SKETCH ** -0.5``."""
    bits = torch.randint(2, (head_dim, SKETCH), generator=torch.Generator().manual_seed(0))
    return torch.sub(2 * bits, 1).mul(SKETCH**-0.5).to(device)


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


Reach = tuple[int, int]
"""A region's sink and reach."""


class Probe(Protocol):
    """Dense attention of the probe rows, for some heads: their output, and what each key tile holds of it.

    ``output`` fp32 [H, P, Dv]. What tiles hold is fp32 [HELD, H, P, n]: masses, which are shares of a row's softmax,
    then deviations. Keys in the future hold nothing.
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
    def held(self) -> torch.Tensor:
        """By key tile of the sequence order: fp32 [HELD, H, P, n]."""
        ...

    def near(self, region: Reach) -> torch.Tensor:
        """Of the near region alone, by key tile of the sequence order: fp32 [HELD, H, P, n]."""
        ...

    def far(self, regions: Sequence[Reach]) -> list[torch.Tensor]:
        """Of some far regions, by key tile of the cell order: fp32 [HELD, H, P, n'] each."""
        ...


@dataclass(frozen=True)
class WeightProbe:
    """A probe that holds all weights.

    ``weights`` fp32 [H, P, n * tile_keys]: softmax weights over the request's keys in sequence order, 0 in the future
    and behind the last key. ``parts`` fp32 [KV heads, n * tile_keys, HELD]: 1 and the projected value of each key.
    ``projected`` fp32 [SKETCH, H, P]: the projected output.
    """

    rows: ProbeRows
    keys: ProbeKeys
    weights: torch.Tensor
    output: torch.Tensor
    parts: torch.Tensor
    projected: torch.Tensor

    @property
    def tile_keys(self) -> int:
        """Keys of a tile."""
        return self.keys.sequence.tile_keys

    @cached_property
    def held(self) -> torch.Tensor:
        """See :class:`Probe`."""
        return self._by_tile(self.weights)

    def near(self, region: Reach) -> torch.Tensor:
        """See :class:`Probe`."""
        keys = torch.arange(self.weights.shape[2], device=self.weights.device)
        near = element_mask(Region.NEAR, self.rows.positions[:, None], keys, *region)
        return self._by_tile(self.weights * near)

    def far(self, regions: Sequence[Reach]) -> list[torch.Tensor]:
        """See :class:`Probe`."""
        return [self._far(sink, reach) for sink, reach in regions]

    def _far(self, sink: int, reach: int) -> torch.Tensor:
        # The near region is a few keys: what they hold is taken out of what their tiles hold.
        positions = self.rows.positions.long()[:, None]
        first = torch.arange(min(sink, self.cell_tile.numel()), device=positions.device).expand(len(positions), -1)
        window = positions - torch.arange(min(reach, self.weights.shape[2]), device=positions.device)
        index = torch.cat([first, window.clamp_min(0)], dim=1)
        near = torch.cat([first <= positions, window >= sink], dim=1)
        heads, kv_heads = self.weights.shape[0], self.parts.shape[0]
        weights = (self.weights.gather(2, index.expand(heads, -1, -1)) * near).view(kv_heads, -1, *index.shape)
        parts = self.parts[:, index].permute(3, 0, 1, 2).unsqueeze(2)
        tile = self.cell_tile[index].expand(heads, -1, -1)
        held = self._cell_held.clone()
        held[0].scatter_add_(2, tile, -weights.flatten(0, 1)).clamp_min_(0)
        for channel in range(SKETCH):
            deviation = parts[1 + channel] - self.projected[channel].view(*weights.shape[:3], 1)
            held[1 + channel].scatter_add_(2, tile, (weights * -deviation).flatten(0, 1))
        return held

    @property
    def cell_tile(self) -> torch.Tensor:
        """Cell-order key tile of the keys that ``weights`` has and the layout knows: int64 [known]."""
        return self.rows.key_tile[: self.weights.shape[2]]

    @cached_property
    def _cell_held(self) -> torch.Tensor:
        order = self.keys.cell
        assert order is not None
        tiles, count = self.keys.present(order)
        tiles = tiles[: int(count)].long()
        positions = order.positions[tiles].flatten()
        known = positions < self.weights.shape[2]
        index = torch.where(known, positions, 0)
        # Keys that are not there yet have the first one's weight here, and no part in the sums.
        parts = self.parts[:, index] * known[:, None]
        found = self._sums(self.weights.index_select(2, index), parts)
        held = found.new_zeros(*found.shape[:3], order.tile_min.numel())
        return held.index_copy_(3, tiles, found)

    def _by_tile(self, weights: torch.Tensor) -> torch.Tensor:
        return self._sums(weights, self.parts)

    def _sums(self, weights: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Sums by tile of weighted parts, as deviations: [H, P, n * tile_keys], [KV heads, .., HELD] -> [HELD, ..]."""
        heads, rows, kv_heads = *weights.shape[:2], parts.shape[0]
        tiled = weights.view(kv_heads, heads // kv_heads * rows, -1, self.tile_keys).transpose(1, 2)
        sums = torch.matmul(tiled, parts.view(kv_heads, -1, self.tile_keys, HELD))
        held = sums.permute(3, 0, 2, 1).reshape(HELD, heads, rows, -1).contiguous()
        held[1:] -= held[0] * self.projected[..., None]
        return held


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
    project = signs(v.shape[2], v.device)
    parts = torch.cat([v.new_ones(*v.shape[:2], 1), torch.matmul(v, project) * operands.value_scale], dim=2)
    projected = torch.matmul(output.view(kv_heads, -1, v.shape[2]), project)
    return WeightProbe(rows, keys, weights, output, parts, projected.view(heads, -1, SKETCH).permute(2, 0, 1))
