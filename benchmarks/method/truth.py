"""Dense attention of sampled rows of a planted problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.method.planted import Ints, Problem

SAMPLE = 512
KINDS = ("media", "hlines", "between", "text")
"""Kinds of rows: at a place, at a place of an h-line, between two frames of an item, text outside of items."""


@dataclass(frozen=True)
class Truth:
    """Dense attention of sampled rows: positions [S] ascending; lse, planted [S, H]; out [S, H, Dv].

    ``weight`` by size of the chunks, 0 for one chunk: [S], sums to 1 and makes means over the sample means over all
    rows of the measured chunks; 0 for rows drawn for another size. ``kind`` [S] indexes :data:`KINDS`.
    """

    positions: Ints
    kind: Ints
    weight: dict[int, np.ndarray]
    lse: torch.Tensor
    planted: torch.Tensor
    out: torch.Tensor


def measured_chunks(length: int, chunk: int) -> list[tuple[int, int]]:
    """Start and end of the first, a middle and the last chunk; of everything for ``chunk`` 0."""
    if chunk == 0:
        return [(0, length)]
    count = -(-length // chunk)
    return [(index * chunk, min(length, (index + 1) * chunk)) for index in sorted({0, count // 2, count - 1})]


def kinds_of(problem: Problem) -> Ints:
    """Kind of every row, [length]."""
    scene = problem.scene
    kind = np.where(scene.media, 0, np.where(scene.deciding, 3, 2))
    kind[problem.hline] = 1
    return kind


def dense_truth(problem: Problem, chunks: Sequence[int], seed: int) -> Truth:
    """Draws rows by kind for each size of chunks, 0 for one chunk, and computes their dense attention."""
    rng = np.random.default_rng(seed)
    length, kind = problem.scene.length, kinds_of(problem)
    weights = {chunk: np.zeros(length) for chunk in {0, *chunks}}
    for chunk, weight in weights.items():
        rows = np.concatenate([np.arange(start, end) for start, end in measured_chunks(length, chunk)])
        _draw(rows, kind, weight, rng)
    positions = np.flatnonzero(sum(weights.values()))
    parts = [_dense_rows(problem, block) for block in np.array_split(positions, -(-positions.size // 64))]
    lse, mass, out = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return Truth(positions, kind[positions], {c: w[positions] for c, w in weights.items()}, lse, mass, out)


def _draw(rows: Ints, kind: Ints, weight: np.ndarray, rng: np.random.Generator) -> None:
    """Gives some of the rows their weight: a share of them per kind, evenly over its positions."""
    for index in range(len(KINDS)):
        own = rows[kind[rows] == index]
        if own.size == 0:
            continue
        wanted = min(own.size, max(SAMPLE // 8, round(SAMPLE * own.size / rows.size)))
        picked = own[((np.arange(wanted) + rng.random(wanted)) * own.size / wanted).astype(np.int64)]
        np.add.at(weight, picked, own.size / rows.size / wanted)


def _dense_rows(problem: Problem, positions: Ints) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LSE [s, H], mass in the planted map [s, H] and output [s, H, Dv] of some rows."""
    keys = int(positions[-1]) + 1
    heads, kv_heads = problem.query.shape[1], problem.key.shape[1]
    future = torch.arange(keys) > torch.from_numpy(positions)[:, None]
    lse, mass, out = [], [], []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = problem.query[positions, head] @ problem.key[:keys, kv_head].T * problem.scale
        scores.masked_fill_(future, -torch.inf)
        lse.append(scores.logsumexp(-1))
        weights = torch.exp(scores - lse[-1][:, None])
        mass.append((weights * torch.from_numpy(problem.heads[head].planted(positions, keys))).sum(-1))
        out.append(weights @ problem.value[:keys, kv_head])
    return torch.stack(lse, 1), torch.stack(mass, 1), torch.stack(out, 1)
