"""``make bench-planner``: what planning costs, against numpy and against copying the bytes it writes.

Three kinds of requests, each of 32K, 128K and 1M tokens:

- *video*: one Qwen2.5-VL video, one span, 360 tokens per frame;
- *timestamps*: one Qwen3-VL video, a span per frame, texts of varying length between them;
- *images*: 64 images between text.

For each of them, from one run:

- *layout*: of the request, from Python lists of spans to what a server reads of it: cell order, its inverse, and the
  key tiles of both orders.
- *plan*: of an 8K chunk behind a prefix of that length. The chunk is the same whatever the prefix.
- *numpy*: the same by the oracle of the tests, which is vectorised and finds an order by one radix argsort.
- *memcpy*: as many bytes as the planner writes, into memory that is there already.

Every result is compared with the oracle first; the first difference ends the run. Repetitions of the three contestants
alternate, so that a busy machine disturbs them alike. Times are medians with the middle half of the repetitions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CORES = 2
CHUNK = 8192
TILE_QUERIES, TILE_KEYS = 128, 64
OPTIONS = {"chunk_tokens": CHUNK, "tile_queries": TILE_QUERIES}
SIZES = {"32K": 1 << 15, "128K": 1 << 17, "1M": 1 << 20}
ROWS, COLS = 18, 20
LEAD = 24
"""Fewest tokens of text before the media."""

WANTED_OVER_NUMPY = 30.0
WANTED_OF_MEMCPY = 4.0
WANTED_PLAN_GROWTH = 1.3
WANTED_PLAN_OF_LAYOUT = 0.1

IMAGE, VIDEO = 1, 2
Item = tuple[int, list[tuple[int, int]], tuple[int, int, int] | None]
Request = tuple[int, list[Item]]


def video(tokens: int, chunk: int) -> Request:
    """Frames without anything between them; one of them begins at the chunk."""
    frames = (tokens - LEAD) // (ROWS * COLS) + chunk // (ROWS * COLS)
    start = LEAD + (tokens - LEAD) % (ROWS * COLS)
    return tokens + chunk, [(VIDEO, [(start, start + frames * ROWS * COLS - 1)], (frames, ROWS, COLS))]


def timestamps(tokens: int, chunk: int) -> Request:
    """Frames with 10 to 13 tokens of text between them; one of those texts begins at the chunk."""
    texts = (10, 10, 11, 10, 13, 11, 12)
    period = sum(texts) + len(texts) * ROWS * COLS
    start = LEAD + (tokens - LEAD) % period
    spans: list[tuple[int, int]] = []
    while True:
        start += texts[len(spans) % len(texts)]
        if start + ROWS * COLS > tokens + chunk:
            break
        spans.append((start, start + ROWS * COLS - 1))
        start += ROWS * COLS
    return tokens + chunk, [(VIDEO, spans, (len(spans), ROWS, COLS))]


def images(tokens: int, chunk: int) -> Request:
    """64 images of one size, and eight of 990 tokens in the chunk."""
    blocks = [(at * (tokens // 64), tokens // 64) for at in range(64)]
    blocks += [(tokens + at, 1024) for at in range(0, chunk, 1024)]
    items: list[Item] = []
    for start, length in blocks:
        cols = isqrt(length - LEAD)
        rows = (length - LEAD) // cols
        items.append((IMAGE, [(start + LEAD, start + LEAD + rows * cols - 1)], (1, rows, cols)))
    return tokens + chunk, items


CASES: dict[str, Callable[[int, int], Request]] = {"video": video, "timestamps": timestamps, "images": images}


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and quartiles."""

    median: float
    low: float
    high: float
    repetitions: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        low, median, high = (1e3 * value for value in statistics.quantiles(seconds, n=4, method="inclusive"))
        return cls(median, low, high, len(seconds))

    def __str__(self) -> str:
        digits = max(0, 3 - len(f"{self.median:.0f}")) if self.median >= 0.1 else 4
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


@dataclass(frozen=True)
class Result:
    """One row of the table; ``bytes_written`` counts the arrays that the planner filled."""

    case: str
    tokens: int
    what: str
    bytes_written: int
    ours: Timing
    numpy: Timing
    memcpy: Timing

    @property
    def over_numpy(self) -> float:
        return self.numpy.median / self.ours.median

    @property
    def of_memcpy(self) -> float:
        return self.ours.median / self.memcpy.median


class MismatchError(Exception):
    """The planner and the oracle differ."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures here")
    parser.add_argument("--repetitions", type=int, default=31, help="of each contestant; numpy gets a third")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a wanted ratio is missed")
    arguments = parser.parse_args()
    # Before rayon counts the cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "planner"))
    try:
        results = list(run(arguments.repetitions))
    except MismatchError as error:
        print(f"No figures: {error}", file=sys.stderr)
        return 2
    device = describe()
    print(", ".join(f"{key} {value}" for key, value in device.items()))
    print_table(results)
    verdicts = judge(results)
    for text, held in verdicts:
        print(f"{'held  ' if held else 'MISSED'} {text}")
    if arguments.json is not None:
        rows = [asdict(r) | {"over_numpy": r.over_numpy, "of_memcpy": r.of_memcpy} for r in results]
        wanted = [{"wanted": text, "held": held} for text, held in verdicts]
        document = {"device": device, "unit": "ms", "results": rows, "verdicts": wanted}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if arguments.check and not all(held for _, held in verdicts) else 0


def run(repetitions: int) -> Iterator[Result]:
    """Checks and times every case."""
    for name, make in CASES.items():
        for tokens in SIZES.values():
            yield from measure(name, tokens, make(tokens, 0), make(tokens, CHUNK), repetitions)


def measure(name: str, tokens: int, request: Request, extended: Request, repetitions: int) -> Iterator[Result]:
    """Layout of ``request``; plan of the last ``CHUNK`` tokens of ``extended``."""
    import oracle_layout
    from mminference_sgl import _core

    def lay_out() -> tuple[Any, ...]:
        layout = _core.Layout(*request, **OPTIONS)
        return (
            layout.order("cell"),
            layout.inverse("cell"),
            *layout.key_tiles("sequence", TILE_KEYS),
            *layout.key_tiles("cell", TILE_KEYS),
        )

    def lay_out_numpy() -> tuple[Any, ...]:
        layout = oracle_layout.OracleLayout(*request, **OPTIONS)
        order, sequence = layout.order("cell"), layout.order("sequence")
        near = layout.key_tiles("sequence", TILE_KEYS, sequence.tokens)
        far = layout.key_tiles("cell", TILE_KEYS, order.tokens)
        bounds = (near.min_pos, near.max_pos, near.modality_mask, far.min_pos, far.max_pos, far.modality_mask)
        return order.tokens, order.inverse, *bounds

    ours = lay_out()
    compare(f"{name}, {tokens} tokens, layout", ours, lay_out_numpy())
    size = sum(array.nbytes for array in ours)
    del ours
    yield Result(name, tokens, "layout", size, *contest(lay_out, lay_out_numpy, size, repetitions))

    layout = _core.Layout(*extended, **OPTIONS)
    oracle = oracle_layout.OracleLayout(*extended, **OPTIONS)
    # An oracle's order and kinds are part of its layout, not of its plan.
    oracle.cell_order, oracle.kinds  # noqa: B018
    sizes = {"tile_queries": TILE_QUERIES, "tile_keys": TILE_KEYS}

    def plan() -> Any:
        return _core.plan([(layout, tokens, CHUNK, 0)], **sizes)

    def plan_numpy() -> Any:
        return oracle_layout.plan([(oracle, tokens, CHUNK, 0)], **sizes)

    planned, wanted = plan(), plan_numpy()
    fields = [planned.buffer[at : at + length] for at, length in planned.fields().values()]
    compare(f"{name}, chunk at {tokens} tokens, plan", fields, [wanted[field] for field in planned.fields()])
    size = planned.buffer.nbytes
    yield Result(name, tokens, "plan", size, *contest(plan, plan_numpy, size, 10 * repetitions))


def compare(what: str, ours: Any, wanted: Any) -> None:
    """Raises MismatchError at the first array that differs."""
    import numpy as np

    for number, (mine, theirs) in enumerate(zip(ours, wanted, strict=True)):
        if not np.array_equal(mine, theirs):
            raise MismatchError(f"{what}: array {number} is not the oracle's")


def contest(
    ours: Callable[[], Any], numpy: Callable[[], Any], size: int, repetitions: int
) -> tuple[Timing, Timing, Timing]:
    """Times of the planner, of numpy and of copying ``size`` bytes, in turns."""
    import numpy as np

    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    contestants = [(ours, 1), (lambda: np.copyto(target, source), 1), (numpy, 3)]
    seconds: list[list[float]] = [[] for _ in contestants]
    gc.disable()
    for repetition in range(repetitions + 1):
        for (function, every), times in zip(contestants, seconds, strict=True):
            if repetition % every:
                continue
            start = time.perf_counter()
            result = function()
            times.append(time.perf_counter() - start)
            del result
    gc.enable()
    # The first of each warms up.
    mine, copy, theirs = (Timing.of(times[1:]) for times in seconds)
    return mine, theirs, copy


def judge(results: list[Result]) -> list[tuple[str, bool]]:
    """The wanted ratios, with the figures."""
    by_key = {(r.case, r.tokens, r.what): r for r in results}
    low, high = min(SIZES.values()), max(SIZES.values())
    verdicts = []
    for case in CASES:
        layout, plan = by_key[case, high, "layout"], by_key[case, high, "plan"]
        growth = plan.ours.median / by_key[case, low, "plan"].ours.median
        share = plan.ours.median / layout.ours.median
        claims = [
            ("layout of 1M tokens over numpy, at least", layout.over_numpy, WANTED_OVER_NUMPY, True),
            ("layout of 1M tokens in memcpys, at most", layout.of_memcpy, WANTED_OF_MEMCPY, False),
            ("plan at 1M in plans at 32K, at most", growth, WANTED_PLAN_GROWTH, False),
            ("plan in layouts at 1M, at most", share, WANTED_PLAN_OF_LAYOUT, False),
        ]
        for text, value, limit, least in claims:
            held = value >= limit if least else value <= limit
            verdicts.append((f"{case}: {text} {limit:g}x: {value:.3g}x", held))
    return verdicts


def describe() -> dict[str, str]:
    """The machine and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "mminference-sgl": metadata.version("mminference-sgl"),
    }


def print_table(results: list[Result]) -> None:
    header = ("", "prefix", "case", "planner ms", "numpy ms", "faster", "memcpy ms", "of memcpy", "written")
    size_names = {tokens: name for name, tokens in SIZES.items()}
    rows = [header]
    for what in ("layout", "plan"):
        for r in (r for r in results if r.what == what):
            ratios = (f"{r.over_numpy:.0f}x", f"{r.of_memcpy:.1f}x", f"{r.bytes_written / 1e3:.0f} kB")
            row = (what, size_names[r.tokens], r.case, str(r.ours), str(r.numpy), ratios[0], str(r.memcpy), *ratios[1:])
            rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
