"""The specification of block-sparse prefill attention: an explicit mask, one list at a time.

Slow on purpose. Every other implementation is tested against it.
"""

from __future__ import annotations

import torch

from .operands import Operands
from .tiles import TileLists, TilePass, element_mask


def attend(
    operands: Operands,
    tile_pass: TilePass,
    lists: TileLists,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Attention of one pass; see :class:`.ops.Attend`."""
    query = operands.query
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = tile_pass.keys
    for head in range(operands.heads):
        index = head // tile_pass.sharing
        for tile in range(tile_pass.num_tiles):
            listed = keys.tile_indptr[tile_pass.request[tile]] + lists.tiles_of(index * tile_pass.num_tiles + tile)
            slots, key_positions = keys.slots[listed].flatten(), keys.positions[listed].flatten()
            rows = slice(int(tile_pass.indptr[tile]), int(tile_pass.indptr[tile + 1]))
            visible = element_mask(
                tile_pass.region,
                tile_pass.positions[rows, None],
                key_positions[None, :],
                lists.sink[index, tile],
                lists.reach[index, tile],
            )
            k = operands.key_pool[slots, head // operands.group].to(compute) * operands.key_scale
            v = operands.value_pool[slots, head // operands.group].to(compute) * operands.value_scale
            scores = query[tile_pass.rows[rows], head].to(compute) @ k.T * operands.scale
            scores = scores.masked_fill(~visible, float("-inf"))
            part_lse = torch.logsumexp(scores, dim=1)
            weights = torch.exp(scores - part_lse[:, None]).masked_fill(~visible, 0.0)
            batch_rows = tile_pass.rows[rows]
            write(out[:, head], lse[:, head], batch_rows, weights @ v, part_lse, merge=merge)


def write(
    out: torch.Tensor,
    lse: torch.Tensor,
    index: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Writes attention ``part`` [n, Dv] and ``part_lse`` [n] to some rows of ``out`` and ``lse``, or merges it in.

    Two attentions over disjoint keys, weighted by their share of the sum of exponentials, are attention over both.
    """
    if merge:
        old_lse = lse[index]
        total = torch.logaddexp(old_lse, part_lse)
        old_share = torch.exp(old_lse - total).nan_to_num(0.0)[:, None]
        part = part * torch.exp(part_lse - total).nan_to_num(0.0)[:, None] + out[index] * old_share
        part_lse = total
    out[index] = part.to(out.dtype)
    lse[index] = part_lse.to(lse.dtype)
