"""Probe: where the attention mass of a few query rows of the chunk lies, and what their output would lose without it.

A key tile *holds* of a row the mass of its keys, ``m = sum p``, and their *deviation* ``sum p (v - o)`` from the row's
output ``o``. Without some tiles the output moves by minus the sum of their deviations over the mass that is left: that
is exact. Deviations are kept as :data:`SKETCH` random projections (:mod:`.sketch`).

:func:`run` is the portable way, which holds the rows' softmax weights; :mod:`.probe_triton` never does. Cost per
(request, layer) with ``P`` probe rows and ``N`` keys: ``2 * H * P * N * (D + Dv)`` FLOPs for the scores and the dense
output, ``2 * H * P * N * HELD`` for what each order's tiles hold, ``4 * H * P * N`` bytes of fp32 weights written once
and read about five times, and the keys and values read once. With one row in 128 that is 1/128 of the dense chunk's
FLOPs. Callers bound the memory by probing some heads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .operands import Operands
from .sketch import HELD, SKETCH, signs
from .tiles import KeyOrder, Region, element_mask


@dataclass(frozen=True)
class ProbeRows:
    """Rows of one request and one query modality. Each head's attention is computed in full for some of them.

    Neighbouring heads take turns: head ``i`` of a KV head's has ``P`` of the ``R = turns * P`` rows, ``i % turns``,
    ``i % turns + turns`` and so on. So a group of heads sees every row, and each head pays for a part.

    ``rows`` int64 [R]: batch row. ``positions`` int32 [R]: token position; ``first``: the smallest of them.
    ``key_tile`` int64 [length]: token position -> key tile of the cell order, of which there are ``key_tiles`` (none
    where the rows take no part in a cell pass).
    """

    rows: torch.Tensor
    positions: torch.Tensor
    first: int
    key_tile: torch.Tensor
    key_tiles: int
    turns: int = 1
    _of_heads: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def per_head(self) -> int:
        """Rows of a head, P."""
        return self.rows.numel() // self.turns

    def of_heads(self, operands: Operands) -> torch.Tensor:
        """Which of the rows each head has: int64 [H, P]."""
        return self.of(operands.heads, operands.group, operands.first)

    def of(self, heads: int, group: int, first: int = 0) -> torch.Tensor:
        """The same for so many heads, ``group`` on a KV head, the first of which is the ``first`` of its group."""
        key = heads, group, first
        if key not in self._of_heads:
            head = torch.arange(heads, device=self.rows.device)
            turn = (head % group + first) % self.turns
            step = torch.arange(self.per_head, device=self.rows.device) * self.turns
            self._of_heads[key] = turn[:, None] + step
        return self._of_heads[key]


@dataclass(frozen=True)
class ProbeKeys:
    """A request's keys, those of earlier chunks and of this one: its part of the two passes' orders.

    ``cell`` is None without a cell pass.
    """

    sequence: KeyOrder
    cell: KeyOrder | None


Reach = tuple[int, int]
"""A region's sink and reach."""


@dataclass(frozen=True)
class WeightProbe:
    """Dense attention of the probe rows, for some heads, and what each key tile holds of it.

    What tiles hold is fp32 [HELD, H, P, n]: masses, which are shares of a row's softmax, then deviations. Keys in the
    future hold nothing.

    ``by_key`` fp32 [KV heads, n * tile_keys, group * P]: softmax weights over the request's keys in sequence order, 0
    in the future and behind the last key. ``parts`` fp32 [KV heads, n * tile_keys, HELD]: 1 and the projected value of
    each key. ``projected`` fp32 [SKETCH, H, P]: the projected output.
    """

    rows: ProbeRows
    row_of: torch.Tensor
    keys: ProbeKeys
    by_key: torch.Tensor
    output: torch.Tensor
    parts: torch.Tensor
    projected: torch.Tensor

    @property
    def tile_keys(self) -> int:
        """Keys of a tile."""
        return self.keys.sequence.tile_keys

    @cached_property
    def weights(self) -> torch.Tensor:
        """The weights by row: fp32 [H, P, n * tile_keys]."""
        return self.by_key.transpose(1, 2).reshape(*self.output.shape[:2], -1)

    @cached_property
    def held(self) -> torch.Tensor:
        """By key tile of the sequence order: fp32 [HELD, H, P, n]."""
        return self._sums(self.by_key, self.parts)

    def near(self, region: Reach) -> torch.Tensor:
        """Of the near region alone, by key tile of the sequence order: fp32 [HELD, H, P, n]."""
        keys = torch.arange(self.by_key.shape[1], device=self.by_key.device)
        near = element_mask(Region.NEAR, self.rows.positions, keys[:, None], *region)
        return self._sums(self.by_key * self._by_lane(near.T).mT, self.parts)

    def far(self, region: Reach) -> torch.Tensor:
        """Of the far region alone, by key tile of the cell order: fp32 [HELD, H, P, n']."""
        sink, reach = region
        # The near region is a few keys: what they hold is taken out of what their tiles hold.
        positions = self.rows.positions.long()[:, None]
        first = torch.arange(min(sink, self.cell_tile.numel()), device=positions.device).expand(len(positions), -1)
        window = positions - torch.arange(min(reach, self.by_key.shape[1]), device=positions.device)
        index = torch.cat([first, window.clamp_min(0)], dim=1)
        near = torch.cat([first <= positions, window >= sink], dim=1)
        kv_heads, _, group, rows = self._by_row.shape
        index, near = (
            index[self.row_of].view(kv_heads, group, rows, -1),
            near[self.row_of].view(kv_heads, group, rows, -1),
        )
        weights = self._by_row.permute(0, 2, 3, 1).gather(3, index) * near
        parts = self.parts[torch.arange(kv_heads, device=index.device)[:, None, None, None], index].movedim(4, 0)
        tile = self.cell_tile[index].flatten(0, 1)
        held = self._cell_held.clone()
        held[0].scatter_add_(2, tile, -weights.flatten(0, 1)).clamp_min_(0)
        for channel in range(SKETCH):
            deviation = parts[1 + channel] - self.projected[channel].view(kv_heads, group, rows, 1)
            held[1 + channel].scatter_add_(2, tile, (weights * -deviation).flatten(0, 1))
        return held

    @property
    def cell_tile(self) -> torch.Tensor:
        """Cell-order key tile of the keys that there are weights of and that the layout knows: int64 [known]."""
        return self.rows.key_tile[: self.by_key.shape[1]]

    def _by_lane(self, values: torch.Tensor) -> torch.Tensor:
        """Of what there is by row, [R, m], what the lanes of each KV head have: [KV heads, group * P, m]."""
        return values[self.row_of].view(self.by_key.shape[0], -1, values.shape[1])

    @property
    def _by_row(self) -> torch.Tensor:
        """[KV heads, n * tile_keys, group, P]."""
        heads, rows = self.output.shape[:2]
        kv_heads, keys = self.by_key.shape[:2]
        return self.by_key.view(kv_heads, keys, heads // kv_heads, rows)

    @cached_property
    def _cell_held(self) -> torch.Tensor:
        order = self.keys.cell
        assert order is not None
        tiles = order.arrival[: order.arrived].long()
        positions = order.positions[tiles].flatten()
        known = positions < self.by_key.shape[1]
        index = torch.where(known, positions, 0)
        # Keys that are not there yet have the first one's weight here, and no part in the sums.
        found = self._sums(self.by_key.index_select(1, index), self.parts[:, index] * known[:, None])
        held = found.new_zeros(*found.shape[:3], order.tile_min.numel())
        return held.index_copy_(3, tiles, found)

    def _sums(self, by_key: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
        """Sums by tile of weighted parts, as deviations: fp32 [HELD, H, P, tiles] from weights and parts by key."""
        heads, rows = self.output.shape[:2]
        kv_heads = parts.shape[0]
        weights = by_key.view(-1, self.tile_keys, by_key.shape[2])
        sums = torch.bmm(parts.view(-1, self.tile_keys, HELD).transpose(1, 2), weights)
        held = sums.view(kv_heads, -1, HELD, by_key.shape[2]).permute(2, 0, 3, 1).reshape(HELD, heads, rows, -1)
        held = held.contiguous()
        held[1:] -= held[0] * self.projected[..., None]
        return held


def run(operands: Operands, keys: ProbeKeys, rows: ProbeRows) -> WeightProbe:
    """Computes the probe rows' attention over a request's keys."""
    k, v, parts = operands.in_order(keys.sequence, torch.float32)
    row_of = rows.of_heads(operands)
    heads, kv_heads, count = operands.heads, k.shape[0], rows.per_head
    head = torch.arange(heads, device=k.device)[:, None]
    q = operands.query[rows.rows[row_of], head].float() * (operands.scale * operands.key_scale)
    by_key = torch.matmul(k, q.view(kv_heads, -1, k.shape[2]).mT)
    # Keys before the first row are seen by all; padding lies behind the last key, so it is in the future as well.
    late = torch.arange(rows.first + 1, k.shape[1], device=k.device)
    future = late[:, None] > rows.positions[row_of].view(kv_heads, 1, -1)
    by_key[:, rows.first + 1 :].masked_fill_(future, float("-inf"))
    by_key = torch.softmax(by_key, dim=1)
    output = torch.matmul(by_key.transpose(1, 2), v).view(heads, count, -1)
    if operands.value_scale != 1:
        output *= operands.value_scale
    projected = torch.matmul(output, signs(v.shape[2], v.device)).permute(2, 0, 1)
    return WeightProbe(rows, row_of, keys, by_key, output, parts.contiguous(), projected)
