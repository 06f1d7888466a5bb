"""``make bench-long``: one layer's chunk behind a long prefix on this CPU, sparse against dense, 32K to 1M tokens.

Inputs are planted (benchmarks/gpu/inputs.py), with 4 and 7 query heads on one KV head. *Sparse* is all that a server
does for a layer: its share of the plan of the forward, probe, selection, attention, guard. *Dense* is the attention of
the portable platform; where it would take minutes, it computes some blocks of the chunk's rows, and its time is
multiplied. The *error* is that of the sparse output against the dense one over the rows that were computed densely.
With ``--apart`` heads that share a KV head have lists of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu.inputs import HEAD_DIM, Shape, count, make_layer
from benchmarks.gpu.report import environment, parse_count
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.portable.dense import extend_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LAYERS = 28
"""Layers of a model that share a forward's plan."""
DENSE_PRODUCTS = 4e9
"""(lane, key) products that dense attention computes at most."""
BLOCK = 1024
"""Rows of a block of those."""


@dataclass(frozen=True)
class Line:
    """One length and group; seconds are medians, ``spread`` from the least to the most of each repetition's ratio."""

    prefix: int
    chunk: int
    group: int
    sparse: float
    dense: float
    ratio: float
    spread: tuple[float, float]
    density: float
    error: float
    peak_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; with ``--json`` write it to a file too."""
    options = _arguments(argv)
    print(
        f"{'prefix':>8}{'group':>7}{'sparse':>9}{'dense':>9}{'ratio':>7}{'spread':>14}{'density':>9}{'error':>8}{'GiB':>6}"
    )
    lines = []
    for prefix in options.prefixes:
        for group in options.groups:
            line = measure(Shape(prefix, options.chunk), group, options.repeats, sharing=not options.apart)
            lines.append(line)
            spread = f"{line.spread[0]:.1f} to {line.spread[1]:.1f}"
            print(
                f"{count(prefix):>8}{group:>7}{line.sparse:>8.2f}s{line.dense:>8.1f}s{line.ratio:>6.1f}x{spread:>14}"
                f"{line.density:>9.4f}{line.error:>8.4f}{line.peak_bytes / 2**30:>6.1f}",
                flush=True,
            )
    if options.json:
        content = {**environment(torch.device("cpu")), "lines": [dataclasses.asdict(line) for line in lines]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def measure(shape: Shape, group: int, repeats: int, *, sharing: bool) -> Line:
    """Sparse and dense by turns."""
    config = Config(sharing=sharing).for_chunks(shape.chunk, 16)
    layer = make_layer(shape, config, (group, 1), torch.device("cpu"))
    specs, out = [HeadSpec()] * group, torch.empty_like(layer.operands.query)

    def sparse() -> list[prefill.LayerReport]:
        # Operands as a layer makes them, which have not been copied into any order.
        return prefill.run_layer(dataclasses.replace(layer.operands), layer.plan, specs, config, out, "torch")

    def dense() -> float:
        """Seconds for all rows; what is computed goes to ``exact``."""
        began = time.perf_counter()
        keys, values = (pool[layer.slots] for pool in (layer.operands.key_pool, layer.operands.value_pool))
        gathered = time.perf_counter()
        for start in starts:
            end = shape.prefix + start + BLOCK
            rows = layer.operands.query[start : start + BLOCK]
            exact[start] = extend_attention(rows, keys[:end], values[:end], HEAD_DIM**-0.5)
        return gathered - began + (time.perf_counter() - gathered) * shape.chunk / (BLOCK * blocks)

    products = group * shape.causal_pairs
    blocks = max(1, min(shape.chunk // BLOCK, int(DENSE_PRODUCTS / products * shape.chunk / BLOCK)))
    starts = [shape.chunk // BLOCK * (block + 1) // (blocks + 1) * BLOCK for block in range(blocks)]
    exact: dict[int, torch.Tensor] = {}
    reports = sparse()
    density = sum(float(r.tiles) for r in reports) / sum(float(r.causal) for r in reports)
    planning = min(_seconds(layer.planner) for _ in range(3)) / LAYERS
    times = [(planning + _seconds(sparse), dense()) for _ in range(repeats)]
    ratios = [dense_s / sparse_s for sparse_s, dense_s in times]
    lost = sum(float((out[start : start + BLOCK] - one).square().sum()) for start, one in exact.items())
    energy = sum(float(one.square().sum()) for one in exact.values())
    return Line(
        shape.prefix,
        shape.chunk,
        group,
        statistics.median(sparse_s for sparse_s, _ in times),
        statistics.median(dense_s for _, dense_s in times),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
        density,
        (lost / energy) ** 0.5,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    counts = {"type": lambda text: [parse_count(one) for one in text.split(",")]}
    parser.add_argument("--prefixes", **counts, default=[1 << 15, 1 << 17, 1 << 18, 1 << 20])
    parser.add_argument("--groups", **counts, default=[4, 7])
    parser.add_argument("--chunk", type=parse_count, default=1 << 13)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--apart", action="store_true", help="lists are those of single heads")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
