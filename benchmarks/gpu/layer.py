"""``make bench-gpu``: block-sparse prefill of one layer on a GPU, against dense cuDNN attention in the same run.

One request: text, one video, one question, planted so that rows attend to the same place of all frames, to their own
frame and to the first tokens. Each line is one shape (all tokens at once, or a chunk behind a prefix) and density;
selection is what a server runs, with its tile budget set to the density and an error that it cannot keep to,
so that the budget is used up; at 100 % everything is listed.

- *probe*, *select*, *attend*: milliseconds of the device; *select* includes making the lists.
- *TFLOP/s*: of the computed tiles, masked halves of tiles included; *share*: of the dense kernel's rate on the same
  rows. Dense is cuDNN over contiguous keys and values, copied for it outside of the timing; a chunk behind a prefix is
  two calls, one per part, whose merging is not counted. *FA3 ms*: the same by FlashInfer's FA3 kernel in one call,
  where FlashInfer and compute capability 9.0 are there; compiling it takes minutes the first time (``--no-fa3``).
- *true mass*: share of sampled rows' softmax that the listed tiles hold. *speed-up*: dense / (probe + select + attend).
- *peak*: most device memory beyond the operands.

Before a line is reported, sampled rows of its output are compared with fp64 attention over the listed keys: the error
may be twice that of fp32 arithmetic rounded to the dtype plus a band of rounding. The first failure ends the run.
Medians and quartiles of repetitions; a buffer larger than the L2 cache is written before each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.clock import Clock, Timing
from benchmarks.gpu.dense import dense_attention, dense_fa3
from benchmarks.gpu.inputs import HEAD_DIM, Layer, Shape, make_layer
from benchmarks.gpu.report import RESULTS, device_of, environment, file_name, markdown, parse_count, say
from mminference_sgl.kernels import ops
from mminference_sgl.kernels.tiles import TileLists, TilePass, element_mask
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import load
from mminference_sgl.method.config import Config

HEADS = (28, 4)
"""Query and KV heads, those of Qwen2.5-VL-7B."""
TOKENS = ("32K", "128K", "256K", "1M")
CHUNKS = ("one-shot", "8K", "32K")
DENSITIES = (2, 5, 10, 25, 100)
SAMPLED_ROWS = 24
TILE_QUERIES = 128


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    shape: str
    wanted_density: float
    density: float
    true_mass: float
    probe: Timing
    select: Timing
    attend: Timing
    dense: Timing
    dense_fa3: Timing | None
    tflops: float
    dense_tflops: float
    tiles_per_list: float
    peak_bytes: int
    error: float
    allowed_error: float

    @property
    def share(self) -> float:
        """Of the dense kernel's rate."""
        return self.tflops / self.dense_tflops

    @property
    def speed_up(self) -> float:
        """Everything included."""
        return self.dense.median / (self.probe.median + self.select.median + self.attend.median)


def measure(
    layer: Layer,
    density: float,
    dense: tuple[Timing, Timing | None],
    config: Config,
    clock: Clock,
    implementation: str,
) -> Line:
    """Selects, attends, checks, and times both; ``density`` in per cent, ``dense``: cuDNN and FA3.

    Heads that do not fit into memory together run one block after the other, as in a server; times are their sums.
    """
    operands, heads = layer.operands, layer.operands.heads
    parts = []
    before = _memory(operands.query.device, reset=True)
    for own in prefill.head_blocks(layer.plan, operands):
        part = replace(layer, operands=operands.block(own))
        parts.append(measure_part(part, config, clock, implementation))
    peak = _memory(operands.query.device, reset=False) - before
    for part in parts:
        if not part.error <= part.allowed_error:
            off = f"the output is off by {part.error:.3g}, {part.allowed_error:.3g} is allowed"
            raise SystemExit(f"{layer.shape}, {density} %: {off}")
    probes, selects, attends = (
        Timing.of([sum(times) for times in zip(*(getattr(part, name) for part in parts), strict=True)])
        for name in ("probe", "select", "attend")
    )
    pairs = sum(part.pairs for part in parts)
    near = layer.plan.near
    causal_tiles = (near.max_pos // config.tile_keys + 1).long() * near.indptr.diff()
    return Line(
        shape=str(layer.shape),
        wanted_density=density,
        density=pairs / (heads * config.tile_keys * int(causal_tiles.sum())),
        true_mass=statistics.fmean(part.mass for part in parts),
        probe=probes,
        select=selects,
        attend=attends,
        dense=dense[0],
        dense_fa3=dense[1],
        tflops=4 * HEAD_DIM * pairs / attends.median / 1e9,
        dense_tflops=4 * HEAD_DIM * heads * layer.shape.causal_pairs / dense[0].median / 1e9,
        tiles_per_list=sum(part.tiles for part in parts) / sum(part.lists for part in parts),
        peak_bytes=peak,
        error=max(part.error for part in parts),
        allowed_error=max(part.allowed_error for part in parts),
    )


@dataclass(frozen=True)
class Part:
    """What was measured of a block of heads: milliseconds of each repetition, work, and how exact it is."""

    probe: list[float]
    select: list[float]
    attend: list[float]
    tiles: int
    pairs: int
    lists: int
    mass: float
    error: float
    allowed_error: float


def measure_part(layer: Layer, config: Config, clock: Clock, implementation: str) -> Part:
    """One block of heads, alone in ``layer``."""
    operands = layer.operands
    specs = load("auto").specs(0, range(operands.heads))
    out = torch.full_like(operands.query, torch.nan)

    def select() -> tuple[prefill.Passes, float, float]:
        with _spans(clock, implementation) as probes, clock.span() as span:
            # Operands as a layer makes them, which have not been copied into any order.
            passes, _ = prefill.select_layer(replace(operands), layer.plan, specs, config, implementation)
        total, probed = span(), sum(tell() for tell in probes)
        return passes, probed, total - probed

    def attend() -> torch.Tensor:
        return ops.sparse_prefill(operands, passes, out, implementation)

    passes, _, _ = select()
    lse = attend()
    mass, error, allowed = verify(layer, passes, out, lse)
    times = [select()[1:] for _ in range(clock.repeats)]
    tiles, pairs = _work(passes)
    return Part(
        probe=[probe for probe, _ in times],
        select=[rest for _, rest in times],
        attend=[clock.once(attend) for _ in range(clock.repeats)],
        tiles=tiles,
        pairs=pairs,
        lists=sum(lists.full.numel() for _, lists in passes),
        mass=mass,
        error=error,
        allowed_error=allowed,
    )


@contextmanager
def _spans(clock: Clock, implementation: str) -> Iterator[list[Callable[[], float]]]:
    """Times every call of the probe while it lasts."""
    name = "probe" if prefill.stages_of(implementation).prepare is None else "probe_triton"
    module = importlib.import_module(f"mminference_sgl.kernels.{name}")
    run, found = module.run, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.span() as span:
            result = run(*args, **kwargs)
        found.append(span)
        return result

    module.run = timed
    try:
        yield found
    finally:
        module.run = run


def _work(passes: Sequence[tuple[TilePass, TileLists]]) -> tuple[int, int]:
    """Listed tiles, and their (lane, key) pairs."""
    tiles = pairs = 0
    for tile_pass, lists in passes:
        lengths = lists.count.long()
        rows = tile_pass.indptr.diff().long().repeat(lengths.numel() // tile_pass.num_tiles) * tile_pass.sharing
        tiles += int(lengths.sum())
        pairs += int((lengths * rows).sum()) * tile_pass.keys.tile_keys
    return tiles, pairs


def verify(
    layer: Layer, passes: Sequence[tuple[TilePass, TileLists]], out: torch.Tensor, lse: torch.Tensor
) -> tuple[float, float, float]:
    """True mass of sampled (row, head) pairs, our error on them, and the error that is allowed."""
    generator = torch.Generator().manual_seed(0)
    operands = layer.operands
    group, scale = operands.group, operands.scale
    masses, ours, plains, largest = [], 0.0, 0.0, 0.0
    for row in torch.randint(0, layer.shape.chunk, (SAMPLED_ROWS,), generator=generator).tolist():
        head = int(torch.randint(0, operands.heads, (1,), generator=generator))
        slots = torch.cat([_listed(tile_pass, lists, row, head) for tile_pass, lists in passes])
        seen = layer.slots[: layer.shape.prefix + row + 1]
        q = operands.query[row, head]
        k, v = (pool[:, head // group] for pool in (operands.key_pool, operands.value_pool))
        scores = k[slots].double() @ q.double() * scale
        exact = scores.softmax(0) @ v[slots].double()
        plain = ((k[slots].float() @ q.float() * scale).softmax(0) @ v[slots].float()).to(out.dtype)
        dense_lse = torch.logsumexp(k[seen].float() @ q.float() * scale, 0)
        masses.append(float(torch.exp(lse[row, head] - dense_lse)))
        ours = max(ours, float((out[row, head].double() - exact).abs().nan_to_num(torch.inf).max()))
        plains = max(plains, float((plain.double() - exact).abs().max()))
        largest = max(largest, float(exact.abs().max()))
    return statistics.fmean(masses), ours, 2 * plains + 2 * torch.finfo(out.dtype).eps * largest


def _listed(tile_pass: TilePass, lists: TileLists, row: int, head: int) -> torch.Tensor:
    """Slots of the keys that a row sees through its list."""
    keys = tile_pass.keys
    where = (tile_pass.rows == row).nonzero()
    if where.numel() == 0:
        return keys.slots[:0].flatten()
    tile = int(torch.searchsorted(tile_pass.indptr, where[0].int(), right=True)) - 1
    number = head // tile_pass.sharing
    listed = keys.tile_indptr[tile_pass.request[tile]] + lists.tiles_of(number * tile_pass.num_tiles + tile)
    position = tile_pass.positions[where[0]]
    sees = element_mask(
        tile_pass.region, position, keys.positions[listed], lists.sink[number, tile], lists.reach[number, tile]
    )
    return keys.slots[listed][sees]


def _memory(device: torch.device, *, reset: bool) -> int:
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def settings(density: float) -> Config:
    """A server's settings with its tile budget at ``density`` per cent; the guard would add tiles, so it is off."""
    if density >= 100:
        return Config(error=0.0, tile_queries=TILE_QUERIES)
    budget = {"error": 1.0, "max_density": density / 100, "error_ceiling": 1e9}
    return Config(**budget, tile_queries=TILE_QUERIES)


def run(options: argparse.Namespace, device: torch.device) -> Iterator[Line]:
    """The lines of all shapes; those that do not fit into the device's memory are left out with a word."""
    clock = Clock(device, options.repeats)
    implementation = ops.resolve(options.implementation, device)
    for shape in shapes(options.tokens, options.chunks):
        dense: tuple[Timing, Timing | None] | None = None
        for density in options.densities:
            config = settings(density)
            try:
                layer = make_layer(shape, config, options.heads, device)
                if dense is None:
                    fa3 = dense_fa3(layer, clock) if options.fa3 else None
                    dense = clock.samples(dense_attention(layer)), fa3
                yield measure(layer, density, dense, config, clock, implementation)
            except torch.OutOfMemoryError as error:
                say(f"{shape}, {density} %: left out, {str(error).partition('.')[0]}")
                torch.cuda.empty_cache()


def shapes(tokens: Sequence[str], chunks: Sequence[str]) -> list[Shape]:
    """``tokens`` at once, or a chunk behind as many."""
    return [
        Shape(0, parse_count(total)) if chunk == "one-shot" else Shape(parse_count(total), parse_count(chunk))
        for total in tokens
        for chunk in chunks
    ]


COLUMNS: dict[str, Callable[[Line], str]] = {
    "shape": lambda line: line.shape,
    "budget %": lambda line: f"{line.wanted_density:g}",
    "density %": lambda line: f"{100 * line.density:.2f}",
    "true mass": lambda line: f"{line.true_mass:.3f}",
    "probe ms": lambda line: str(line.probe),
    "select ms": lambda line: str(line.select),
    "attend ms": lambda line: str(line.attend),
    "dense ms": lambda line: str(line.dense),
    "FA3 ms": lambda line: str(line.dense_fa3 or ""),
    "TFLOP/s": lambda line: f"{line.tflops:.3g}",
    "share": lambda line: f"{line.share:.2f}",
    "tiles/list": lambda line: f"{line.tiles_per_list:.0f}",
    "speed-up": lambda line: f"{line.speed_up:.2f}",
    "peak MiB": lambda line: f"{line.peak_bytes / 2**20:.0f}",
}


def table(lines: Sequence[Line]) -> str:
    """Markdown."""
    return markdown(list(COLUMNS), ([tell(line) for tell in COLUMNS.values()] for line in lines))


def write(folder: Path, name: str, lines: Sequence[Line], found: dict[str, Any]) -> None:
    """``name``.json and ``name``.md."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**found, "lines": [{**asdict(line), "share": line.share, "speed_up": line.speed_up} for line in lines]}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    text = f"# Sparse prefill of one layer on {found['device']}\n\n{versions}, {found['time']}.\n"
    text += f"Implementation: {found['implementation']}. Columns: see the head of benchmarks/gpu/layer.py.\n"
    (folder / f"{name}.md").write_text(f"{text}\n{table(lines)}\n")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=listed(str), default=list(TOKENS))
    parser.add_argument("--chunks", type=listed(str), default=list(CHUNKS), help="one-shot, or tokens of a chunk")
    parser.add_argument("--densities", type=listed(float), default=list(DENSITIES), help="per cent")
    parser.add_argument("--implementation", choices=("auto", *ops.IMPLEMENTATIONS), default="auto")
    parser.add_argument("--fa3", action=argparse.BooleanOptionalAction, default=True, help="FA3 as a dense baseline")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", help="of the files; by default the device's")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: does the script work?")
    options = parser.parse_args(argv)
    options.heads = HEADS
    if options.dry_run:
        options.tokens, options.chunks = ["1K"], ["one-shot", "512"]
        options.densities, options.repeats, options.heads = [20.0, 100.0], 2, (4, 2)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    device = device_of(options)
    if device is None:
        return 1
    found = {**environment(device), "implementation": ops.resolve(options.implementation, device)}
    name = options.name or file_name(found["device"])
    if options.name is None and options.implementation != "auto":
        name += f"-{options.implementation}"
    lines: list[Line] = []
    for line in run(options, device):
        lines.append(line)
        say(" | ".join(tell(line) for tell in COLUMNS.values()))
        # After every line, so that a run that is cut off leaves what it has.
        write(options.output, name, lines, found)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
