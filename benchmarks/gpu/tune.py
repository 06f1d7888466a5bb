"""``make tune``: measures launches of the attend kernel on this GPU and writes the best ones into the launch table.

For every head size the candidates are timed on random lists of 64 tiles per query tile, by pointers and, where the
device has them, through descriptors; the fastest that compiles without spills and within the device's shared memory is
taken. The table's own entry is one of them and stays unless another one is faster by more than 2 %. Its line then says
what was measured and where.

``--resources`` needs no GPU: it compiles every entry and writes registers and shared memory behind it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.inputs import Shape, make_layer
from benchmarks.gpu.report import device_of, environment, say
from mminference_sgl.kernels import attend, launch_table
from mminference_sgl.kernels.launch_table import HEAD_DIMS, NATIVE_DESCRIPTORS, TABLE, Launch, device_architecture
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import TileLists, TilePass, lists_from_map
from mminference_sgl.method.config import Config

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "kernels" / "launch_table.py"
TILES_PER_LIST = 64
WORTH = 0.98
"""A launch replaces the table's when it takes less than this share of its time."""
KEYS_PER_TILE, ROWS_PER_TILE = 64, 128

Entry = tuple[int, int]
_LINE = re.compile(r"    \((\d+), (\d+)\): (Launch\([^)]*\)),(?:  # (.*))?$")


@dataclass(frozen=True)
class Tuned:
    """The best launch of an entry and what to say of it."""

    launch: Launch
    note: str


def candidates(own: Launch, entry: Entry) -> list[Launch]:
    """The table's entry, then all others that make sense there."""
    architecture, head_dim = entry
    shapes = itertools.product(
        ((128, 8), (64, 8), (64, 4)),
        (64, 32),
        (3, 5, 7),
        (False, True)[: 1 + (head_dim >= 128)],
        (False, True)[: 1 + (architecture >= NATIVE_DESCRIPTORS)],
    )
    found = [Launch(rows, keys, warps, stages, *switches) for (rows, warps), keys, stages, *switches in shapes]
    suited = [launch for launch in found if not launch.descriptors or attend.describable(launch, head_dim)]
    return list(dict.fromkeys([own, *suited]))


def tune(
    entries: Iterable[Entry],
    fits: Callable[[Entry, Launch], bool],
    measure: Callable[[Entry, Launch], float],
) -> dict[Entry, tuple[Launch, float]]:
    """The fastest fitting launch of each entry and what ``measure`` says of it: milliseconds, inf where it cannot run.

    All candidates are measured, and only the fastest ones asked whether they fit, because that takes longer.
    """
    best: dict[Entry, tuple[Launch, float]] = {}
    for entry in entries:
        own = TABLE[entry]
        times = {}
        for launch in candidates(own, entry):
            times[launch] = measure(entry, launch)
            # What a run that is cut off has found.
            say(f"{entry}: {source(launch)}: {times[launch]:.3g} ms")
        faster = sorted((time, launch) for launch, time in times.items() if time < WORTH * times[own])
        chosen = next((launch for _, launch in faster if fits(entry, launch)), own)
        best[entry] = (chosen, times[chosen])
        say(f"{entry}: {source(chosen)} takes {times[chosen]:.3g} ms, the table's {times[own]:.3g} ms, of {len(times)}")
    return best


def rewritten(text: str, tuned: Mapping[Entry, Tuned]) -> str:
    """The table's module with other entries; every entry must have its line.

    Raises:
        ValueError: an entry without a line.
    """
    missing, lines = set(tuned), []
    for line in text.splitlines():
        match = _LINE.match(line)
        entry = (int(match[1]), int(match[2])) if match else None
        if entry in tuned:
            missing.discard(entry)
            found = tuned[entry]
            lines.append(f"    {entry}: {source(found.launch)},  # {found.note}")
        else:
            lines.append(line)
    if missing:
        raise ValueError(f"no line for {sorted(missing)} in the launch table")
    return "\n".join(lines) + "\n"


def source(launch: Launch) -> str:
    """A launch as Python."""
    switches = ", split=True" * launch.split + ", descriptors=True" * launch.descriptors
    return f"Launch({', '.join(map(str, launch[:4]))}{switches})"


def resources(entry: Entry, launch: Launch) -> tuple[bool, str]:
    """Whether the served variants of an entry compile to something that fits, and their registers and shared memory."""
    aot = _aot()
    compiled = [aot.compile_job(job) for job in aot.jobs(*entry, "bf16", aot.SERVED, launch)]
    registers, shared = max(result.registers for result in compiled), max(result.shared for result in compiled)
    return all(result.fits for result in compiled), f"{registers} registers, {shared:,} bytes"


def _aot():
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    import aot

    return aot


class Bench:
    """Random lists, and the time of a launch on them."""

    def __init__(self, device: torch.device, tokens: int, chunk: int, heads: tuple[int, int], repeats: int) -> None:
        self.device, self.heads = device, heads
        config = Config(tile_queries=ROWS_PER_TILE, tile_keys=KEYS_PER_TILE)
        self.layer = make_layer(Shape(tokens - chunk, chunk), config, heads, device)
        self.lists = random_lists(self.layer.plan.near, heads[0], TILES_PER_LIST)
        self.clock = Clock(device, repeats)
        self.pairs = int(self.lists.tiles.numel()) * KEYS_PER_TILE * ROWS_PER_TILE

    def milliseconds(self, entry: Entry, launch: Launch) -> float:
        """Median of one call; on a CPU there is no kernel to time, so the launch's own size stands for it."""
        if self.device.type != "cuda":
            return 1e6 / (launch.rows * launch.keys * launch.warps)
        given = self.layer.operands
        query, *pools = (_resized(operand, entry[1]) for operand in (given.query, given.key_pool, given.value_pool))
        operands = Operands(query, *pools, entry[1] ** -0.5)
        out, lse = torch.empty_like(query), torch.empty(query.shape[:2], device=self.device)
        near = self.layer.plan.near

        def run() -> None:
            attend.attend(operands, near, self.lists, out, lse, merge=False, launch=launch)

        try:
            return self.clock.samples(run).median
        except OutOfResources:
            return math.inf

    def tflops(self, entry: Entry, milliseconds: float) -> float:
        """Of the computed tiles."""
        return 4 * entry[1] * self.pairs / milliseconds / 1e9


def random_lists(tile_pass: TilePass, heads: int, tiles: int) -> TileLists:
    """Up to ``tiles`` random causal tiles per list."""
    keys = tile_pass.keys
    device = keys.tile_min.device
    generator = torch.Generator(device).manual_seed(0)
    causal = keys.tile_min[None] <= tile_pass.max_pos[:, None]
    score = torch.rand(heads, *causal.shape, generator=generator, device=device).masked_fill(~causal, -1)
    chosen = score.topk(min(tiles, causal.shape[1]), dim=-1).indices
    selected = torch.zeros_like(score, dtype=torch.bool).scatter_(2, chosen, True) & causal
    sink = torch.zeros(heads, tile_pass.num_tiles, dtype=torch.int32, device=device)
    return lists_from_map(tile_pass, selected, sink, torch.full_like(sink, 1 << 30))


def _resized(operand: torch.Tensor, head_dim: int) -> torch.Tensor:
    repeated = operand.repeat(1, 1, -(-head_dim // operand.shape[2]))
    return repeated[..., :head_dim].contiguous()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--heads", type=lambda text: [int(part) for part in text.split(",")], default=list(HEAD_DIMS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=MODULE, help="the table's module by default")
    parser.add_argument("--resources", action="store_true", help="only registers and shared memory; needs no GPU")
    parser.add_argument("--dry-run", action="store_true", help="no kernel is run: does the script work?")
    options = parser.parse_args(argv)
    text = MODULE.read_text()
    if options.resources:
        wanted = {entry: launch for entry, launch in TABLE.items() if entry[1] in options.heads}
        found = {entry: Tuned(launch, resources(entry, launch)[1]) for entry, launch in wanted.items()}
        options.output.write_text(rewritten(text, found))
        return 0
    device = device_of(options)
    if device is None:
        return 1
    sizes = (1024, 512, (4, 2)) if options.dry_run else (1 << 16, 1 << 13, (28, 4))
    known = max(arch for arch in launch_table.ARCHITECTURES if arch <= device_architecture(device))
    name = environment(device)["device"]
    bench = Bench(device, *sizes, options.repeats)

    def compiled(entry: Entry, launch: Launch) -> tuple[bool, str]:
        return (launch.stages > 2, "dry run") if options.dry_run else resources(entry, launch)

    entries = [(known, head) for head in options.heads]
    best = tune(entries, lambda *args: compiled(*args)[0], bench.milliseconds)
    tuned = {}
    for entry, (launch, milliseconds) in best.items():
        note = f"{compiled(entry, launch)[1]}, {bench.tflops(entry, milliseconds):.0f} TFLOP/s on {name}"
        tuned[entry] = Tuned(launch, note)
    options.output.write_text(rewritten(text, tuned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
