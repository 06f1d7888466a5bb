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
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Attention of one pass, into the batch rows of the pass; other rows of ``out`` and ``lse`` are left alone.

    ``query`` [batch rows, H, D]; ``key_pool`` [slots, KV heads, D]; ``value_pool`` [slots, KV heads, Dv].
    ``out`` [batch rows, H, Dv]; ``lse`` [batch rows, H], natural logarithm, fp32 (fp64 for fp64 input). A row that sees
    no key has output 0 and LSE -inf. With ``merge``, what ``out`` and ``lse`` hold is attention over other keys of the
    same rows, and becomes the softmax over both. The pools' elements are multiplied by ``key_scale`` and
    ``value_scale``.
    """
    heads = query.shape[1]
    group = heads // key_pool.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = tile_pass.keys
    for head in range(heads):
        for tile in range(tile_pass.num_tiles):
            listed = keys.tile_indptr[tile_pass.request[tile]] + lists.tiles_of(head * tile_pass.num_tiles + tile)
            slots, key_positions = keys.slots[listed].flatten(), keys.positions[listed].flatten()
            rows = slice(int(tile_pass.indptr[tile]), int(tile_pass.indptr[tile + 1]))
            visible = element_mask(
                tile_pass.region,
                tile_pass.positions[rows, None],
                key_positions[None, :],
                lists.sink[head, tile],
                lists.reach[head, tile],
            )
            k = key_pool[slots, head // group].to(compute) * key_scale
            v = value_pool[slots, head // group].to(compute) * value_scale
            scores = query[tile_pass.rows[rows], head].to(compute) @ k.T * scale
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
