"""From how many tokens on sparse prefill pays on this machine: measured once at start, and remembered.

One layer of the model's shape is prefilled sparse and dense at growing lengths, on random operands, until sparse wins.
Dense is PyTorch's fused attention over contiguous keys, at least as fast as a paged backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from mminference_sgl import _core
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import DeviceLayout, SparseRequest, build

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SECONDS = 4.0
"""After this much time no further length is tried."""
MARGIN = 1.25
"""Sparse must be this much faster: random operands need fewer tiles than a video."""
_LONG = 0.5
"""Seconds of a run that is not repeated."""
_SIDE = 16
_CPU_FILE = Path("/proc/cpuinfo")
_CPU_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables by which oneDNN and MKL leave instructions unused; PyTorch's own shows in its capability."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What the crossover depends on: one layer's shape on this rank, and how it is computed."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    chunk_tokens: int
    implementation: str
    config: Config

    @property
    def key(self) -> str:
        """Names this shape, machine and version in the file of remembered results."""
        parts = (
            torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor(),
            torch.get_num_threads(),
            torch.__version__,
            _core.__version__,
            self.heads,
            self.kv_heads,
            self.head_dim,
        )
        tiles = (self.dtype, self.chunk_tokens, self.implementation, self.config.tile_queries, self.config.tile_keys)
        return " ".join(str(part) for part in (*parts, *tiles))


def _processor() -> str:
    """The CPU and what of it PyTorch and the libraries below it use; a cache may be shared between machines."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        described = re.search(r"^model name\s*: (.*)$", _CPU_FILE.read_text(encoding="utf-8"), re.MULTILINE)
        model = described[1] if described else model
    caps = [f"{name}={os.environ[name]}" for name in _CPU_CAPS if name in os.environ]
    return " ".join([model, torch.backends.cpu.get_cpu_capability(), *caps])


def min_tokens(shape: Shape, file: Path | None = None) -> int:
    """Smallest tried length at which sparse prefill wins, from the file or measured.

    ``file`` defaults to ``mminference-sgl/crossover.json`` in the user's cache; one that cannot be read or written is
    done without.
    """
    file = file or _cache_file()
    known = _remembered(file)
    if shape.key not in known:
        began = time.perf_counter()
        known[shape.key] = measured(lambda length: _times(shape, length))
        _remember(file, known)
        logger.info(
            "mminference: sparse prefill pays from %d tokens on (measured in %.1f s, kept in %s)",
            known[shape.key],
            time.perf_counter() - began,
            file,
        )
    return known[shape.key]


def measured(times: Callable[[int], tuple[float, float]]) -> int:
    """The first of :data:`LENGTHS` at which sparse wins; ``times``: length -> seconds sparse and dense.

    Where time runs out, the first length that was not tried; where sparse never wins, twice the last one.
    """
    deadline = time.perf_counter() + SECONDS
    for length in LENGTHS:
        if time.perf_counter() > deadline:
            return length
        sparse, dense = times(length)
        if MARGIN * sparse <= dense:
            return length
    return 2 * LENGTHS[-1]


def _times(shape: Shape, length: int) -> tuple[float, float]:
    """Seconds of one layer for the last chunk of a video of ``length`` tokens, sparse and dense."""
    rows = min(length, shape.chunk_tokens or length)
    generator = torch.Generator(shape.device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=shape.device).to(shape.dtype)

    query = random(rows, shape.heads, shape.head_dim)
    key_pool, value_pool = (random(length + 1, shape.kv_heads, shape.head_dim) for _ in range(2))
    operands = Operands(query, key_pool, value_pool, shape.head_dim**-0.5)
    out = torch.empty_like(query)
    req_to_token = torch.arange(1, length + 1, dtype=torch.int32, device=shape.device)[None]
    frames = length // _SIDE**2
    layout = _core.Layout(
        length,
        [(2, [(0, length - 1)], (frames, _SIDE, _SIDE))],
        chunk_tokens=shape.chunk_tokens,
        tile_queries=shape.config.tile_queries,
        cell_size=shape.config.cell_size,
    )
    on_device = DeviceLayout(layout, shape.config.tile_keys, shape.device)
    pool_row = torch.zeros(1, dtype=torch.int64, device=shape.device)
    request = SparseRequest(on_device, length - rows, rows, pool_row, 0)
    plan = build(
        [request],
        req_to_token,
        tile_queries=shape.config.tile_queries,
        tile_keys=shape.config.tile_keys,
        probe_rows=shape.config.probe_rows,
    )
    specs = [HeadSpec()] * shape.heads
    # Attention to random keys averages to nothing, so that any error is large against it.
    config = dataclasses.replace(shape.config, error_ceiling=math.inf)

    def sparse() -> None:
        prefill.run_layer(operands, plan, specs, config, out, shape.implementation)

    q, k, v = (x.transpose(0, 1)[None] for x in (query, key_pool[1:], value_pool[1:]))
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (k, v))

    def dense() -> None:
        own = slice(length - rows, length)
        functional.scaled_dot_product_attention(q, k[:, :, own], v[:, :, own], is_causal=True, scale=operands.scale)
        if length > rows:
            functional.scaled_dot_product_attention(q, k[:, :, :-rows], v[:, :, :-rows], scale=operands.scale)

    return _seconds(sparse, shape.device), _seconds(dense, shape.device)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """The faster of two runs after a warm-up, which alone counts where it takes long."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = timed()
    return first if first > _LONG else min(timed(), timed())


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mminference-sgl" / "crossover.json"


def _remembered(file: Path) -> dict[str, int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if isinstance(value, int) and value > 0}


def _remember(file: Path, known: dict[str, int]) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        logger.info("mminference: the crossover is measured at every start: %s", error)
