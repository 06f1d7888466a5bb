"""The attend kernel by pipeline stages, kind of loads and length of lists, against dense cuDNN attention.

Random causal lists for a chunk of 8K at 64K tokens, heads of 128. Each variant's output is compared first, as in
benchmarks/gpu/layer.py, with fp64 attention of sampled rows over the listed keys; one that is off, or does not run, is
reported with the reason and without a time. Keys and values are copied into their order before anything is timed.

- *attend*: milliseconds, median (quartiles); *TFLOP/s*: of the computed tiles, masked halves included;
- *share*: of cuDNN's rate over the causal pairs of the same chunk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu.clock import Clock, Timing
from benchmarks.gpu.dense import dense_attention
from benchmarks.gpu.inputs import HEAD_DIM, Layer, Shape, make_layer
from benchmarks.gpu.layer import HEADS, verify
from benchmarks.gpu.report import RESULTS, device_of, environment, markdown, say
from benchmarks.gpu.tune import random_lists
from mminference_sgl.kernels import attend, torch_tiles
from mminference_sgl.kernels.launch_table import NATIVE_DESCRIPTORS, Launch, device_architecture
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import TileLists, TilePass
from mminference_sgl.method.config import Config

STAGES = (3, 5, 7)
BODIES = ("descriptors", "pointers")
TILES = (16, 64, 256)
QUERY_ROWS, KEYS, WARPS = 128, 64, 8

Kernel = Callable[[Operands, TilePass, TileLists, torch.Tensor, torch.Tensor, Launch], None]


@dataclass(frozen=True)
class Line:
    """One variant; ``attend`` is None where ``wrong`` says what is."""

    tiles: int
    body: str
    stages: int
    attend: Timing | None = None
    tflops: float = 0.0
    share: float = 0.0
    wrong: str = ""

    @property
    def cells(self) -> list[str]:
        """As a row of the table."""
        variant = [str(self.tiles), self.body, str(self.stages)]
        return [*variant, str(self.attend or self.wrong), f"{self.tflops:.0f}", f"{self.share:.2f}"]


HEAD = ["tiles/list", "body", "stages", "attend ms", "TFLOP/s", "share"]


def triton(
    operands: Operands, tile_pass: TilePass, lists: TileLists, out: torch.Tensor, lse: torch.Tensor, launch: Launch
) -> None:
    """The kernel."""
    attend.attend(operands, tile_pass, lists, out, lse, merge=False, launch=launch)


def stand_in(
    operands: Operands, tile_pass: TilePass, lists: TileLists, out: torch.Tensor, lse: torch.Tensor, _: Launch
) -> None:
    """The portable implementation, for dry runs on a CPU."""
    torch_tiles.attend(operands, tile_pass, lists, out, lse, merge=False)


def run(layer: Layer, lengths: Sequence[int], kernel: Kernel, clock: Clock) -> Iterator[Line]:
    """All variants, the lists' lengths outermost."""
    operands, near = layer.operands, layer.plan.near
    dense = clock.samples(dense_attention(layer)).median
    dense_tflops = 4 * HEAD_DIM * operands.heads * layer.shape.causal_pairs / dense / 1e9
    say(f"dense: {dense:.3g} ms, {dense_tflops:.0f} TFLOP/s")
    for length in lengths:
        lists = random_lists(near, operands.heads, length)
        pairs = int((lists.count.view(-1, near.num_tiles) * near.indptr.diff()).sum()) * near.keys.tile_keys
        for body, stages in itertools.product(BODIES, STAGES):
            launch = Launch(QUERY_ROWS, KEYS, WARPS, stages, descriptors=body == "descriptors")
            wrong, timing = measure(layer, lists, launch, kernel, clock)
            if timing is None:
                yield Line(length, body, stages, wrong=wrong)
                continue
            tflops = 4 * HEAD_DIM * pairs / timing.median / 1e9
            yield Line(length, body, stages, timing, tflops, tflops / dense_tflops)


def measure(layer: Layer, lists: TileLists, launch: Launch, kernel: Kernel, clock: Clock) -> tuple[str, Timing | None]:
    """What is wrong with a variant, or its time."""
    operands, near = layer.operands, layer.plan.near
    device = operands.query.device
    if launch.descriptors and device.type == "cuda" and device_architecture(device) < NATIVE_DESCRIPTORS:
        return "the device has none", None
    out = torch.full_like(operands.query, torch.nan)
    lse = torch.full(out.shape[:2], torch.nan, device=device)

    def work() -> None:
        kernel(operands, near, lists, out, lse, launch)

    try:
        work()
        _, error, allowed = verify(layer, [(near, lists)], out, lse)
        if not error <= allowed:
            return f"off by {error:.3g}, {allowed:.3g} is allowed", None
        return "", clock.samples(work)
    except Exception as problem:  # noqa: BLE001 - its line says so, and the others are measured
        return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}", None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of attend.json and attend.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and the portable implementation on the CPU")
    options = parser.parse_args(argv)
    device = device_of(options)
    if device is None:
        return 1
    shape, heads, lengths, kernel = Shape(7 << 13, 1 << 13), HEADS, TILES, triton
    if options.dry_run:
        shape, heads, lengths, kernel = Shape(512, 512), (2, 1), (4, 8), stand_in
    layer = make_layer(shape, Config(tile_queries=QUERY_ROWS, tile_keys=KEYS), heads, device)
    found, lines = environment(device), []
    options.output.mkdir(parents=True, exist_ok=True)
    for line in run(layer, lengths, kernel, Clock(device, options.repeats)):
        lines.append(line)
        say(" | ".join(line.cells))
        # After every line, so that a run that is cut off leaves what it has.
        table = markdown(HEAD, (line.cells for line in lines))
        record = {**found, "lines": [asdict(line) for line in lines]}
        (options.output / "attend.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.output / "attend.md").write_text(f"# The attend kernel on {found['device']}\n\n{table}\n")
    print(table)
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main())
