"""Random sparse-prefill problems: a paged pool, several requests in a batch, and their dense answer in fp64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mminference_sgl import _core
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method.plan import DeviceLayout, ForwardPlan, SparseRequest, build, smallest_tile

IMAGE, VIDEO = 1, 2
CPU = torch.device("cpu")

Item = tuple[int, list[tuple[int, int]], tuple[int, int, int] | None]


@dataclass(frozen=True)
class Request:
    """Length of the whole request, its items, and the chunk of this forward."""

    length: int
    items: Sequence[Item]
    prefix: int
    chunk: int


def one_span_video(start: int, frames: int, rows: int, cols: int) -> Item:
    """An item as Qwen2.5-VL leaves it: one span for all frames."""
    return VIDEO, [(start, start + frames * rows * cols - 1)], (frames, rows, cols)


def timestamped_video(start: int, frames: int, rows: int, cols: int) -> Item:
    """An item as Qwen3-VL leaves it: a span per frame, text between them whose length grows with its digits."""
    spans = []
    for frame in range(frames):
        start += 5 + (frame > 5)
        spans.append((start, start + rows * cols - 1))
        start += rows * cols
    return VIDEO, spans, (frames, rows, cols)


MIXED = (
    Request(700, [one_span_video(10, 8, 6, 10)], 0, 700),
    Request(900, [timestamped_video(18, 10, 6, 10), (IMAGE, [(800, 863)], (1, 8, 8))], 307, 557),
    Request(300, [], 37, 200),
    Request(1111, [one_span_video(3, 63, 1, 17)], 1000, 111),
)
"""A video from its start, timestamps with a cut inside a frame, text, thin frames of odd size with a long prefix."""


@dataclass(frozen=True)
class Problem:
    """Operands of one layer and the plan of one forward; ``scale`` is the softmax scale."""

    query: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    req_to_token: torch.Tensor
    requests: Sequence[Request]
    plan: ForwardPlan
    scale: float

    @property
    def operands(self) -> Operands:
        return Operands(self.query, self.key_pool, self.value_pool, self.scale)

    def dense(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Dense causal attention of all rows by plain PyTorch: [rows, H, Dv]."""
        group = self.query.shape[1] // self.key_pool.shape[1]
        outputs, row = [], 0
        for index, request in enumerate(self.requests):
            slots = self.req_to_token[index, : request.prefix + request.chunk].long()
            q, k, v = (
                operand.to(dtype).transpose(0, 1)
                for operand in (
                    self.query[row : row + request.chunk],
                    self.key_pool[slots].repeat_interleave(group, 1),
                    self.value_pool[slots].repeat_interleave(group, 1),
                )
            )
            future = torch.arange(slots.numel()) > torch.arange(request.prefix, request.prefix + request.chunk)[:, None]
            scores = (q @ k.mT * self.scale).masked_fill(future, -torch.inf)
            outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
            row += request.chunk
        return torch.cat(outputs)


def cast(operands: Operands, dtype: torch.dtype) -> Operands:
    """Query and pools in another dtype."""
    query, *pools = (x.to(dtype) for x in (operands.query, operands.key_pool, operands.value_pool))
    return replace(operands, query=query, key_pool=pools[0], value_pool=pools[1])


def in_fp8(operands: Operands, key_scale: float, value_scale: float) -> tuple[Operands, Operands]:
    """With pools in e4m3 and these scales, and with pools of what they stand for, in the query's dtype."""
    keys, values = (pool.to(torch.float8_e4m3fn) for pool in (operands.key_pool, operands.value_pool))
    stored = replace(operands, key_pool=keys, value_pool=values, key_scale=key_scale, value_scale=value_scale)
    meant = [pool.to(operands.query.dtype) * scale for pool, scale in ((keys, key_scale), (values, value_scale))]
    return stored, replace(operands, key_pool=meant[0], value_pool=meant[1])


def make(
    requests: Sequence[Request] = MIXED,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    tile_queries: int = 128,
    tile_keys: int = 64,
    probe_rows: int = 64,
    cell_size: int = 0,
    page_size: int = 1,
    seed: int = 0,
    sharing: Sequence[int] = (),
) -> Problem:
    """A problem with random operands, request after request in the batch, pages of the pool in random order.

    Unused slots of the pool hold NaN, the padding slot 0 too: whoever reads a future token is found out.
    """
    generator = torch.Generator().manual_seed(seed)
    pages_of = [-(-request.length // page_size) for request in requests]
    pages = torch.randperm(sum(pages_of), generator=generator) + 1
    req_to_token = torch.zeros(len(requests), max(r.length for r in requests), dtype=torch.int32)
    first = 0
    for index, (request, count) in enumerate(zip(requests, pages_of, strict=True)):
        own = pages[first : first + count, None] * page_size + torch.arange(page_size)
        req_to_token[index, : request.length] = own.flatten()[: request.length]
        first += count
    slots = (sum(pages_of) + 1) * page_size
    rows = sum(request.chunk for request in requests)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    query, key_pool, value_pool = (
        random(rows, heads, head_dim) * 3,
        random(slots, kv_heads, head_dim),
        random(slots, kv_heads, head_dim),
    )
    sparse, row = [], 0
    written = torch.zeros(slots, dtype=torch.bool)
    for index, request in enumerate(requests):
        written[req_to_token[index, : request.prefix + request.chunk].long()] = True
        layout = _core.Layout(
            request.length,
            request.items,
            chunk_tokens=request.chunk,
            tile_queries=smallest_tile(tile_queries, sharing),
            cell_size=cell_size,
        )
        pool_row = torch.tensor([index])
        sparse.append(SparseRequest(DeviceLayout(layout, tile_keys, CPU), request.prefix, request.chunk, pool_row, row))
        row += request.chunk
    key_pool[~written] = torch.nan
    value_pool[~written] = torch.nan
    plan = build(
        sparse,
        req_to_token,
        tile_queries=tile_queries,
        tile_keys=tile_keys,
        probe_rows=probe_rows,
        sharing=sharing,
    )
    return Problem(query, key_pool, value_pool, req_to_token, requests, plan, head_dim**-0.5)


def part_of(batch: Problem, indices: Sequence[int], **sizes: Any) -> Problem:
    """Some requests of a batch, in this order, with the same operands at other places of query and pools.

    ``sizes``: what the batch was made with.
    """
    part = make([batch.requests[index] for index in indices], **sizes)
    starts = [0, *itertools.accumulate(request.chunk for request in batch.requests)]
    part.query.copy_(torch.cat([batch.query[starts[index] : starts[index + 1]] for index in indices]))
    for row, index in enumerate(indices):
        keys = batch.requests[index].prefix + batch.requests[index].chunk
        theirs, ours = batch.req_to_token[index, :keys].long(), part.req_to_token[row, :keys].long()
        part.key_pool[ours], part.value_pool[ours] = batch.key_pool[theirs], batch.value_pool[theirs]
    return part
