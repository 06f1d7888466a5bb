"""The specification of block-sparse prefill attention: an explicit mask, one list at a time.

Slow on purpose. Every other implementation is tested against it.
"""

from __future__ import annotations

import torch

from .tiles import TileLists, TilePass, element_mask


def attend(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    tile_pass: TilePass,
    lists: TileLists,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one pass.

    ``query`` [batch rows, H, D]; ``key_pool`` [slots, KV heads, D]; ``value_pool`` [slots, KV heads, Dv].
    Returns the output [row slots, H, Dv] in the query's dtype and the natural-log LSE [row slots, H] in fp32 (fp64 for
    fp64 input), in the order of ``tile_pass.rows``; a row that sees no key has output 0 and LSE -inf.
    """
    heads = query.shape[1]
    group = heads // key_pool.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(tile_pass.rows.numel(), heads, value_pool.shape[-1])
    lse = torch.full(out.shape[:2], float("-inf"), dtype=compute, device=query.device)
    keys = tile_pass.keys
    for head in range(heads):
        for tile in range(tile_pass.num_tiles):
            entries = slice(*lists.indptr[head * tile_pass.num_tiles + tile :][:2].tolist())
            listed = keys.tile_indptr[tile_pass.request[tile]].long() + lists.tiles[entries].long()
            slots, key_positions = keys.slots[listed].flatten(), keys.positions[listed].flatten()
            rows = slice(int(tile_pass.indptr[tile]), int(tile_pass.indptr[tile + 1]))
            visible = element_mask(
                tile_pass.region,
                tile_pass.positions[rows, None],
                key_positions[None, :],
                lists.sink[head, tile],
                lists.reach[head, tile],
            )
            k = key_pool[slots, head // group].to(compute)
            v = value_pool[slots, head // group].to(compute)
            scores = query[tile_pass.rows[rows], head].to(compute) @ k.T * scale
            scores = scores.masked_fill(~visible, float("-inf"))
            row_lse = torch.logsumexp(scores, dim=1) if slots.numel() else lse[rows, head]
            weights = torch.exp(scores - row_lse[:, None]).masked_fill(~visible, 0.0)
            out[rows, head] = (weights @ v).to(out.dtype)
            lse[rows, head] = row_lse
    return out, lse
