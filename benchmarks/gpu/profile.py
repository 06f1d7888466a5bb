"""What one layer's sparse prefill launches: time by kernel, launches, and the host's time.

An 8K chunk behind a long prefix, with a server's settings, by torch.profiler. Each repetition has new operands, as each
layer of a model has, so copying keys and values into their order is included.

- *ms*, *launches*: per layer, by kernel; *host*: from calling the layer to its return, without the profiler and with an
  idle device, so that nothing is waited for; *both*: until the device is done as well.

On a CPU (dry runs) operators stand for kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import Timing
from benchmarks.gpu.inputs import Shape, make_layer
from benchmarks.gpu.layer import HEADS, TILE_QUERIES
from benchmarks.gpu.report import RESULTS, device_of, environment, markdown, parse_count
from mminference_sgl.kernels import ops
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import load
from mminference_sgl.method.config import Config

TOKENS = ("32K", "128K")
CHUNK = "8K"
NAME_LENGTH = 100


@dataclass(frozen=True)
class Kernel:
    """Milliseconds and launches per layer."""

    name: str
    milliseconds: float
    launches: float


@dataclass(frozen=True)
class Layer:
    """One shape; ``kernels`` by time, the longest first."""

    shape: str
    host: Timing
    both: Timing
    kernels: list[Kernel]

    @property
    def milliseconds(self) -> float:
        """Of all kernels."""
        return sum(kernel.milliseconds for kernel in self.kernels)

    @property
    def text(self) -> str:
        """Markdown."""
        launches = sum(kernel.launches for kernel in self.kernels)
        rows = [
            [
                f"`{kernel.name[:NAME_LENGTH]}`",
                f"{kernel.milliseconds:.3g}",
                f"{kernel.milliseconds / self.milliseconds:.1%}",
                f"{kernel.launches:g}",
            ]
            for kernel in self.kernels
        ]
        summary = f"{self.milliseconds:.3g} ms in {launches:g} launches; host {self.host} ms, both {self.both} ms."
        return f"## {self.shape}\n\n{summary}\n\n{markdown(['kernel', 'ms', 'share', 'launches'], rows)}\n"


def measure(shape: Shape, heads: tuple[int, int], device: torch.device, repeats: int) -> Layer:
    """One layer, first compiled, then timed, then profiled."""
    config = Config(tile_queries=TILE_QUERIES)
    implementation = ops.resolve("auto", device)
    layer = make_layer(shape, config, heads, device)
    specs = load("auto").specs(0, range(heads[0]))
    out = torch.empty_like(layer.operands.query)

    def run() -> None:
        prefill.run_layer(replace(layer.operands), layer.plan, specs, config, out, implementation)

    run()
    times = [_once(run, device) for _ in range(repeats)]
    hosts, boths = zip(*times, strict=True)
    return Layer(str(shape), Timing.of(hosts), Timing.of(boths), kernels(run, device, repeats))


def _once(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Milliseconds until it returns, and until the device is done."""
    _wait(device)
    begin = time.perf_counter()
    run()
    returned = time.perf_counter()
    _wait(device)
    return 1e3 * (returned - begin), 1e3 * (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def kernels(run: Callable[[], None], device: torch.device, repeats: int) -> list[Kernel]:
    """What the device ran, copies and fills included, by name."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            run()
        _wait(device)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    found = [
        Kernel(
            event.key,
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / repeats / 1e3,
            event.count / repeats,
        )
        for event in profiler.key_averages()
        if event.device_type == wanted and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel.milliseconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=lambda text: text.split(","), default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of profile.json and profile.md")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: does the script work?")
    options = parser.parse_args(argv)
    device = device_of(options)
    if device is None:
        return 1
    chunk, heads = CHUNK, HEADS
    if options.dry_run:
        options.tokens, chunk, heads, options.repeats = ["1K"], "512", (4, 2), 2
    found, layers = environment(device), []
    options.output.mkdir(parents=True, exist_ok=True)
    for tokens in options.tokens:
        layer = measure(Shape(parse_count(tokens), parse_count(chunk)), heads, device, options.repeats)
        layers.append(layer)
        print(layer.text)
        record = {**found, "layers": [asdict(layer) for layer in layers]}
        (options.output / "profile.json").write_text(json.dumps(record, indent=1) + "\n")
        text = "\n".join(layer.text for layer in layers)
        (options.output / "profile.md").write_text(f"# Kernels of one layer on {found['device']}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
