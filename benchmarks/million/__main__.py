"""``make bench-million``: one very long video through a real server, chunk by chunk.

The toy reads a generated video of 256K tokens (``TOKENS=1M`` for more, memory permitting) with mminference as it comes:
chunks before the crossover run dense, and layers that save nothing rest (density counts both as 1). For every
chunk there is the time of the language model's attention and linear layers, the density, and the memory of the
scheduler's process; for the first, a middle and the last chunk also the time of dense attention of the same shapes, on
the same cores, measured apart: what dense attention costs does not depend on what is attended. Answers are not asked
for: the toy has not learned positions as far out as this.

Memory is the resident set of the scheduler, sampled, less what it was when the first chunk was through; it may grow by
the slots of the pool that are written for the first time, and by the keys and values of one layer, which attention
copies into its own order.

Exits 1 when a chunk is missing, or when memory grows by more than that and :data:`SLACK`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.inputs import count
from benchmarks.gpu.report import parse_count
from benchmarks.host import described
from benchmarks.real.model import Shape
from benchmarks.toy.scenes import FRAMES_PER_PATCH, make_scene
from benchmarks.toy.serving import CHANGE, CHECKPOINT, CLIP_FPS, COLUMNS, END, FPS, ROWS, USER, VIDEO
from mminference_sgl.portable.dense import extend_attention
from mminference_sgl.testing import (
    ModuleTimes,
    Server,
    ServerError,
    fallbacks,
    forward_times,
    prefills,
    start_lines,
    timing_arguments,
    write_mp4,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mminference_sgl.testing import Prefill

CHUNK = 8192
SPARE = 1024
"""Tokens of context and pool besides the video's."""
SLACK = 256 * 2**20
"""Bytes by which memory may grow from the first chunk on, besides the pool's and a layer's keys and values."""
SAMPLE_S = 0.2
SEED = 20261128


@dataclass(frozen=True)
class Line:
    """One chunk: tokens before it, seconds of the language model, density, and resident bytes when it was through."""

    prefix: int
    attention: float
    linear: float
    density: float
    error: float
    resident: int
    dense_attention: float | None = None


def layer_bytes(shape: Shape, tokens: int) -> int:
    """Keys and values of one layer in fp32, the widest that they are copied in."""
    return 2 * 4 * tokens * shape.kv_heads * shape.head_dim


class Watch:
    """Samples the resident set of a server's scheduler, and how many chunks its log tells of."""

    def __init__(self, running: Server) -> None:
        self._running, self._mark, self._over = running, len(running.log()), threading.Event()
        self.resident: list[int] = []
        self.peak = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def lines(self) -> tuple[list[Prefill], list[ModuleTimes]]:
        """What the log tells: the method's figures of chunks that ran sparse, and seconds of all."""
        log = self._running.log(self._mark)
        return prefills(log), forward_times(log)

    def _watch(self) -> None:
        scheduler = self._running.scheduler()
        while not self._over.wait(SAMPLE_S):
            resident = scheduler.resident_bytes
            self.peak = max(self.peak, resident)
            done = len(self.lines()[1])
            self.resident += [resident] * (done - len(self.resident))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code says whether its promises are kept."""
    options = _arguments(argv)
    shape, began = Shape.of(json.loads((CHECKPOINT / "config.json").read_text())["text_config"]), time.monotonic()
    try:
        lines, peak = serve(options.tokens, json.loads(options.config))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    timed = sorted({0, len(lines) // 2, len(lines) - 1})
    for index in timed:
        line = lines[index]
        lines[index] = Line(**{**asdict(line), "dense_attention": dense_seconds(shape, line.prefix)})
    _print(lines)
    failures = judge(lines, options.tokens, shape)
    for failure in failures:
        print(f"FAILED: {failure}")
    seconds = time.monotonic() - began
    print(f"scheduler's peak {peak / 2**30:.1f} GiB, done in {seconds:.0f} s")
    if options.json is not None:
        content: dict[str, Any] = {
            **described(),
            "tokens": options.tokens,
            "chunk": CHUNK,
            "seconds": seconds,
            "peak_bytes": peak,
            "lines": [asdict(line) for line in lines],
            "failures": failures,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failures else 0


def serve(tokens: int, config: dict[str, Any]) -> tuple[list[Line], int]:
    """Every chunk of one video, and the scheduler's peak."""
    patches = tokens // (ROWS * COLUMNS)
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory(prefix="mminference-million-") as folder:
        video = write_mp4(
            Path(folder) / "video.mp4", make_scene(rng, patches, ROWS, COLUMNS, change=CHANGE).frames(rng), FPS
        )
        sampling = {"fps": CLIP_FPS, "max_frames": FRAMES_PER_PATCH * patches}
        with Server(
            CHECKPOINT,
            attention_backend="mminference",
            chunked_prefill_size=CHUNK,
            max_total_tokens=tokens + SPARE,
            metrics=True,
            args=[
                *("--mm-process-config", json.dumps({"video": sampling})),
                *("--context-length", str(tokens + SPARE)),
                *timing_arguments(),
            ],
            env={
                "MMINFERENCE_CONFIG": json.dumps(config),
                "MMINFERENCE_LOG": "debug",
                "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
                "SGLANG_VLM_CACHE_SIZE_MB": str(embeddings_mb(tokens)),
            },
        ) as running:
            with Watch(running) as watch:
                answer = running.generate(USER + VIDEO + "find dot" + END, video_data=[str(video)], max_tokens=1)
                time.sleep(2 * SAMPLE_S)
            found, times = watch.lines()
            print("\n".join(start_lines(running.log())), flush=True)
            if dense := fallbacks(running.log()):
                raise ServerError(f"a chunk ran dense: {dense[0].reason}: {dense[0].detail}", running.log())
            print(f"{answer.prompt_tokens} tokens, decoded and prepared in {answer.preprocess_s:.0f} s, "
                  f"prefilled in {answer.forward_s:.0f} s", flush=True)  # fmt: skip
    # Chunks begin behind the few tokens that all prompts begin with, if they are cached.
    sparse = {chunk.prefix // CHUNK: (chunk.density, chunk.error) for chunk in found}
    # What is left for a chunk of its own is the question, of a few rows.
    prefixes = range(0, tokens, CHUNK)
    return [
        Line(prefix, took.attention, took.linear, *sparse.get(prefix // CHUNK, (1.0, 0.0)), resident)
        for prefix, took, resident in zip(prefixes, times, watch.resident, strict=False)
    ], watch.peak


def embeddings_mb(tokens: int) -> int:
    """Room for the video's embeddings: what SGLang's cache has none for is computed anew for every chunk."""
    hidden = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]["hidden_size"]
    return 64 + tokens * int(hidden) * 4 // 2**20


def dense_seconds(shape: Shape, prefix: int) -> float:
    """Dense attention of a chunk's layers behind a prefix."""
    generator = torch.Generator().manual_seed(prefix)

    def normal(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, shape.head_dim, generator=generator)

    q = normal(CHUNK, shape.heads)
    k, v = (normal(prefix + CHUNK, shape.kv_heads) for _ in range(2))
    began = time.perf_counter()
    extend_attention(q, k, v, shape.scale)
    return shape.layers * (time.perf_counter() - began)


def judge(lines: Sequence[Line], tokens: int, shape: Shape) -> list[str]:
    """The promises that are missed."""
    failures = []
    if lines[-1].prefix < tokens - CHUNK:
        failures.append(f"the last chunk begins at {lines[-1].prefix} of {tokens} tokens")
    if all(line.density == 1 for line in lines):
        failures.append("no chunk ran sparse")
    grown = max(line.resident for line in lines) - lines[0].resident
    allowed = (shape.layers + 1) * layer_bytes(shape, tokens) + SLACK
    if grown > allowed:
        failures.append(
            f"memory grew by {grown / 2**20:.0f} MiB from the first chunk on, {allowed / 2**20:.0f} expected"
        )
    return failures


def _print(lines: Sequence[Line]) -> None:
    print(f"{'prefix':>9}{'attention':>11}{'dense':>9}{'ratio':>7}{'linear':>9}{'density':>9}{'error':>8}{'GiB':>7}")
    for line in lines:
        dense = line.dense_attention
        cells = ("", "") if dense is None else (f"{dense:.1f}s", f"{dense / line.attention:.1f}x")
        print(
            f"{count(line.prefix) if line.prefix % 1024 == 0 else line.prefix:>9}{line.attention:>10.2f}s{cells[0]:>9}"
            f"{cells[1]:>7}{line.linear:>8.2f}s{line.density:>9.4f}{line.error:>8.4f}{line.resident / 2**30:>7.2f}"
        )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.million", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tokens", type=parse_count, default=parse_count("256K"), help="of the video, such as 1M")
    parser.add_argument("--config", default="{}", help="JSON of further settings")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
