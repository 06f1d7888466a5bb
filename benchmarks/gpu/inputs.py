"""Planted inputs of one layer, for the GPU benchmarks and benchmarks/long: one request with one video, and its plan.

Its tokens lie in the pool in random order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mminference_sgl import _core
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import prefill
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import DeviceLayout, ForwardPlan, SparseRequest, build, smallest_tile

HEAD_DIM = 128
FRAME = (18, 20)
"""Rows and columns of tokens."""
LEAD, QUESTION = 24, 48
"""Fewest tokens of text before the video, and those behind it."""


@dataclass(frozen=True)
class Shape:
    """A chunk of ``chunk`` tokens behind ``prefix`` ones."""

    prefix: int
    chunk: int

    @property
    def length(self) -> int:
        return self.prefix + self.chunk

    @property
    def causal_pairs(self) -> int:
        """(row, key) pairs of dense attention."""
        return self.chunk * self.prefix + self.chunk * (self.chunk + 1) // 2

    def __str__(self) -> str:
        return f"{count(self.chunk)} at {count(self.prefix)}" if self.prefix else f"{count(self.chunk)} one-shot"


@dataclass(frozen=True)
class Layer:
    """Operands of one layer on the device and their plan, which ``planner`` makes anew; ``slots`` int64 [length]."""

    operands: Operands
    slots: torch.Tensor
    plan: ForwardPlan
    shape: Shape
    planner: Callable[[], ForwardPlan]


def make_layer(
    shape: Shape,
    config: Config,
    heads: tuple[int, int],
    device: torch.device,
) -> Layer:
    """A planted request, its tokens anywhere in the pool but in slot 0."""
    sharing = prefill.sharing(config, heads[0] // heads[1])
    rows, cols = FRAME
    frames = (shape.length - LEAD - QUESTION) // (rows * cols)
    start = shape.length - QUESTION - frames * rows * cols
    item = (2, [(start, start + frames * rows * cols - 1)], (frames, rows, cols))
    generator = torch.Generator(device).manual_seed(shape.length)
    slots = torch.randperm(shape.length, generator=generator, device=device) + 1
    layout = _core.Layout(
        shape.length,
        [item],
        chunk_tokens=shape.chunk,
        tile_queries=smallest_tile(config.tile_queries, sharing),
        cell_size=config.cell_size,
    )
    request = SparseRequest(
        DeviceLayout(layout, config.tile_keys, device),
        shape.prefix,
        shape.chunk,
        torch.zeros(1, dtype=torch.long, device=device),
        0,
    )
    planner = functools.partial(
        build,
        [request],
        slots.int()[None],
        tile_queries=config.tile_queries,
        tile_keys=config.tile_keys,
        probe_rows=config.probe_rows,
        sharing=sharing,
    )
    query, key, value = planted(shape, start, *heads, generator)
    pools = []
    for operand in (key, value):
        pool = torch.zeros(shape.length + 1, heads[1], HEAD_DIM, dtype=operand.dtype, device=device)
        pool[slots] = operand
        pools.append(pool)
    return Layer(Operands(query, *pools, HEAD_DIM**-0.5), slots, planner(), shape, planner)


def planted(
    shape: Shape, start: int, heads: int, kv_heads: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [chunk, H, D] and keys, values [length, KV heads, D] in bf16.

    A score is a sum of products of features: the place in the frame (half of the row's mass), the frame (a third), the
    first four tokens (a tenth); strengths are those that give these shares against a background of a twentieth.
    """
    device, area = generator.device, FRAME[0] * FRAME[1]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    position = torch.arange(shape.length, device=device)
    place = torch.where(position < start, area, (position - start) % area)
    frame = (position - start).clamp_min(-1) // area + 1

    def unit(*size: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(*size, generator=generator, device=device), dim=-1)

    background, place_dim, frame_dim = 0.05, 64, 48
    key = torch.zeros(shape.length, kv_heads, HEAD_DIM, dtype=dtype, device=device)
    value = torch.empty_like(key)
    query = torch.zeros(shape.chunk, heads, HEAD_DIM, dtype=dtype, device=device)
    seen = (position[shape.prefix :] + 1).float()
    same_place = (0.5 / background * torch.full_like(seen, area)).log()
    same_frame = (0.35 / background * seen / area).clamp_min(1).log()
    sink = (0.1 / background * seen / 4).clamp_min(1).log()
    for kv_head in range(kv_heads):
        places, times = unit(area + 1, place_dim), unit(int(frame.max()) + 1, frame_dim)
        key[:, kv_head, :place_dim] = places[place]
        key[:, kv_head, place_dim : place_dim + frame_dim] = times[frame]
        key[:4, kv_head, place_dim + frame_dim] = 1
        own = torch.zeros(shape.chunk, HEAD_DIM, device=device)
        own[:, :place_dim] = same_place[:, None] * places[place[shape.prefix :]]
        own[:, place_dim : place_dim + frame_dim] = same_frame[:, None] * times[frame[shape.prefix :]]
        own[:, place_dim + frame_dim] = sink
        group = heads // kv_heads
        for head in range(kv_head * group, (kv_head + 1) * group):
            query[:, head] = (own + 0.02 * torch.randn(own.shape, generator=generator, device=device)) * HEAD_DIM**0.5
        value[:, kv_head] = torch.randn(shape.length, HEAD_DIM, generator=generator, device=device)
        value[:, kv_head] += torch.randn(area + 1, HEAD_DIM, generator=generator, device=device)[place]
    return query, key, value


def count(tokens: int) -> str:
    """131072 as 128K."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
