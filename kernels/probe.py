"""Probe: where the attention mass of a few query rows of the chunk lies.

Cost per (request, layer) with ``P`` probe rows and ``N`` keys: ``2 * H * P * N * (D + 2 * Dv)`` FLOPs for the scores,
the dense and the sparse output, and ``4 * H * P * N`` bytes of fp32 weights per pass over them. With 64 rows the
scores are 64 / chunk of the dense chunk's. Callers bound the memory by probing some heads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class ProbeRows:
    """Rows of one request and one query modality whose attention is computed in full.

    ``rows`` int64 [P]: batch row. ``positions`` int32 [P]: token position.
    ``cell_tiles`` int64 [P]: the row's query tile in the request's cell pass, counted within the request (empty when
    the rows take no part in a cell pass).
    """

    rows: torch.Tensor
    positions: torch.Tensor
    cell_tiles: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """Dense attention of the probe rows, for some heads.

    ``weights`` fp32 [H, P, n * tile_keys]: softmax weights over the request's keys in sequence order, 0 in the future
    and behind the last key. ``values`` fp32 [KV heads, n * tile_keys, Dv].
    ``output`` fp32 [H, P, Dv]: the rows' dense output.
    """

    rows: ProbeRows
    weights: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    tile_keys: int

    def tile_mass(self) -> torch.Tensor:
        """Mass per key tile of the sequence order: fp32 [H, P, n]."""
        heads, rows, _ = self.weights.shape
        return self.weights.view(heads, rows, -1, self.tile_keys).sum(-1)

    @cached_property
    def cumulative(self) -> torch.Tensor:
        """Mass before each position: fp32 [H, P, keys + 1]."""
        result = self.weights.new_zeros(*self.weights.shape[:2], self.weights.shape[2] + 1)
        torch.cumsum(self.weights, dim=-1, out=result[..., 1:])
        return result

    def mass_before(self, positions: torch.Tensor) -> torch.Tensor:
        """Mass on keys before ``positions`` [P, m]: fp32 [H, P, m]."""
        index = positions.long().clamp(0, self.weights.shape[-1])
        return self.cumulative.gather(2, index.expand(self.weights.shape[0], -1, -1))

    def error_energy(self, kept: torch.Tensor) -> torch.Tensor:
        """Squared error of each head's output if its rows kept only some keys.

        ``kept``: the weights with everything that is not selected set to 0.
        Returns fp32 [H], summed over rows and head size.
        """
        mass = kept.sum(-1, keepdim=True).clamp_min_(torch.finfo(kept.dtype).tiny)
        return (weighted_values(kept, self.values) / mass - self.output).square().sum((1, 2))


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
    # Padding lies behind the last key, so it is in the future as well.
    future = torch.arange(keys.shape[2], device=slots.device) > rows.positions[:, None]
    weights += torch.zeros_like(future, dtype=weights.dtype).masked_fill_(future, float("-inf"))
    weights = torch.softmax(weights, dim=-1)
    return Probe(rows, weights, values, weighted_values(weights, values), slots.shape[1])


def weighted_values(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``weights`` fp32 [H, P, N] times ``values`` fp32 [KV heads, N, Dv] with grouped heads: fp32 [H, P, Dv]."""
    heads, kv_heads = weights.shape[0], values.shape[0]
    grouped = weights.view(kv_heads, heads // kv_heads * weights.shape[1], -1)
    return torch.matmul(grouped, values).view(heads, weights.shape[1], -1)
