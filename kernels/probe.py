"""Probe: where the attention mass of a few query rows of the chunk lies.

Cost per (request, layer) with ``P`` probe rows and ``N`` keys: ``2 * H * P * N * (D + Dv)`` FLOPs for the scores and
the dense output, ``4 * H * P * N`` bytes of fp32 weights written once and read about five times, and the keys and
values read once. With one row in 128 that is 1/128 of the dense chunk's FLOPs. Callers bound the memory by probing
some heads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ProbeRows:
    """Rows of one request and one query modality whose attention is computed in full.

    ``rows`` int64 [P]: batch row. ``positions`` int32 [P]: token position; ``first``: the smallest of them.
    ``cell_tiles`` int64 [P]: the row's query tile in the request's cell pass, counted within the request (empty when
    the rows take no part in a cell pass).
    ``key_tile`` int64 [length]: token position -> key tile of the cell order, of which there are ``key_tiles``.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    first: int
    cell_tiles: torch.Tensor
    key_tile: torch.Tensor
    key_tiles: int


@dataclass(frozen=True)
class Probe:
    """Dense attention of the probe rows, for some heads.

    ``weights`` fp32 [H, P, n * tile_keys]: softmax weights over the request's keys in sequence order, 0 in the future
    and behind the last key. ``output`` fp32 [H, P, Dv]: the rows' dense output.
    """

    rows: ProbeRows
    weights: torch.Tensor
    output: torch.Tensor
    tile_keys: int

    @cached_property
    def tile_mass(self) -> torch.Tensor:
        """Mass per key tile of the sequence order: fp32 [H, P, n]."""
        heads, rows, _ = self.weights.shape
        return self.weights.view(heads, rows, -1, self.tile_keys).sum(-1)

    @cached_property
    def cell_mass(self) -> torch.Tensor:
        """Mass per key tile of the cell order: fp32 [H, P, n']."""
        heads, rows, _ = self.weights.shape
        mass = self.weights.new_zeros(heads, rows, self.rows.key_tiles)
        known = self.weights[..., : self.cell_tile.numel()]
        return mass.scatter_add_(2, self.cell_tile.expand(heads, rows, -1), known)

    @property
    def cell_tile(self) -> torch.Tensor:
        """Cell-order key tile of the keys that ``weights`` has and the layout knows: int64 [known]."""
        return self.rows.key_tile[: self.weights.shape[2]]


def run(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    slots: torch.Tensor,
    rows: ProbeRows,
    scale: float,
) -> Probe:
    """Computes the probe rows' attention over a request's keys.

    ``query`` [batch rows, H, D]; ``key_pool`` [slots, KV heads, D]; ``slots`` int64 [n, tile_keys]: the request's key
    tiles in sequence order, prefix and chunk, padded with any slot.
    """
    keys = key_pool.index_select(0, slots.flatten()).permute(1, 2, 0).float()
    values = value_pool.index_select(0, slots.flatten()).transpose(0, 1).float()
    q = query[rows.rows].float() * scale
    heads, kv_heads = q.shape[1], keys.shape[0]
    grouped = q.view(-1, kv_heads, heads // kv_heads, q.shape[2]).permute(1, 2, 0, 3).flatten(1, 2)
    weights = torch.matmul(grouped, keys).view(heads, len(rows.rows), -1)
    # Keys before the first row are seen by all; padding lies behind the last key, so it is in the future as well.
    late = torch.arange(rows.first + 1, keys.shape[2], device=slots.device)
    weights[..., rows.first + 1 :].masked_fill_(late > rows.positions[:, None], float("-inf"))
    weights = torch.softmax(weights, dim=-1)
    output = torch.matmul(weights.view(kv_heads, -1, weights.shape[2]), values).view(heads, len(rows.rows), -1)
    return Probe(rows, weights, output, slots.shape[1])
