"""Where the mass goes that a selection leaves out: ``make bench-method BENCH_ARGS=--why``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.method.forward import Forward
from benchmarks.method.truth import Truth
from mminference_sgl.kernels.tiles import TileLists, TilePass, element_mask

PARTS = 4


def kept_keys(passes: Sequence[tuple[TilePass, TileLists]], head: int, row: int, keys: int) -> torch.Tensor:
    """Keys that one batch row reads, bool [keys], straight from the definition of lists and regions."""
    kept = torch.zeros(keys, dtype=torch.bool)
    for tile_pass, lists in passes:
        slot = (tile_pass.rows == row).nonzero().flatten()
        if slot.numel() == 0:
            continue
        tile = int(torch.searchsorted(tile_pass.indptr, slot[:1].int(), right=True)) - 1
        number = head // tile_pass.sharing
        index = number * tile_pass.num_tiles + tile
        listed = lists.tiles_of(index).long()
        positions = tile_pass.keys.positions[listed].flatten()
        own = int(tile_pass.positions[slot[0]])
        seen = element_mask(
            tile_pass.region,
            torch.tensor(own),
            positions,
            int(lists.sink[number, tile]),
            int(lists.reach[number, tile]),
        )
        kept[positions[seen].long()] = True
    return kept


def losses(one: Forward, truth: Truth, passes: Sequence[tuple[TilePass, TileLists]], weight: np.ndarray) -> str:
    """Lost mass by what it was planted as and by the rows' place in the chunk; means over the sampled rows."""
    problem, heads = one.problem, one.operands.heads
    own = np.flatnonzero((truth.positions >= one.start) & (truth.positions < one.end) & (weight > 0))
    by_name: dict[str, float] = {}
    by_part = np.zeros((PARTS, 2))
    total = weight[own].sum() * heads
    for index in own:
        position = int(truth.positions[index])
        part = (position - one.start) * PARTS // (one.end - one.start)
        for head in range(heads):
            key = problem.key[: position + 1, head * problem.key.shape[1] // heads]
            scores = key @ problem.query[position, head] * problem.scale
            lost = torch.exp(scores - truth.lse[index, head])
            lost[kept_keys(passes, head, position - one.start, position + 1)] = 0
            share = weight[index] / total
            by_part[part] += weight[index] * float(lost.sum()), weight[index]
            for relation in problem.heads[head].relations:
                mask = torch.from_numpy(relation.pairs(np.array([position]), position + 1)[0])
                amount = float(lost[mask].sum()) * share
                by_name[relation.name] = by_name.get(relation.name, 0.0) + amount
                lost[mask] = 0
            by_name["background"] = by_name.get("background", 0.0) + float(lost.sum()) * share
    names = ", ".join(f"{name} {amount:.3f}" for name, amount in sorted(by_name.items(), key=lambda e: -e[1]))
    parts = " ".join(f"{lost / max(rows, 1e-12):.3f}" for lost, rows in by_part)
    return f"lost: {names}; by quarter of the chunk {parts}"
