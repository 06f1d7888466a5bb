"""From how many tokens on, and up to what density, sparse prefill pays on this machine: measured once, and remembered.

Layers of the model's shape are prefilled sparse and dense at growing lengths, on random operands, until sparse wins.
Dense is attention over contiguous keys by the fastest kernel that is here: PyTorch's, and on CUDA cuDNN's and the FA3
that SGLang brings, which PyTorch would not choose by itself.

A forward is planned once for all layers that run sparse, so each of these bears its share of that: the fewer there are,
as in models whose other layers are linear attention, the more.

On CUDA some layers run behind one another, as in a model: a layer alone would wait for its launches, which others hide.
There sparse has a budget of tiles that it uses up, since random operands need next to none.

The density is where a line through two budgets, at a length beyond that at which sparse wins, meets the time of dense.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mminference_sgl import _core
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import DeviceLayout, ForwardPlan, SparseRequest, build, smallest_tile

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SECONDS = 4.0
"""After this much time no further length is tried."""
MARGIN = 1.25
"""Sparse must be this much faster: a video may need more tiles than what is timed."""
DENSITY = 0.2
"""Share of the causal tiles up to which sparse computes: to random keys attention is so flat that it would need all."""
DENSER = 0.6
"""A second share, where seconds are compared by density."""
LONGER = 4
"""How many times longer what densities are compared at may be than what sparse first wins at."""
LAYERS = 4
"""Layers that are timed together on CUDA, if there are as many."""
_LONG = 0.5
"""Seconds of a run that is not repeated."""
_SIDE = 16
_CPU_FILE = Path("/proc/cpuinfo")
_CPU_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables by which oneDNN and MKL leave instructions unused; PyTorch's own shows in its capability."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What the crossover depends on: one layer's shape on this rank, how it is computed, and how many there are."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    chunk_tokens: int
    implementation: str
    config: Config
    sparse_layers: int

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
        cuda = (f"FA3 {_fa3_version()}",) if self.device.type == "cuda" else ()
        counted = (f"layers {self.sparse_layers}", f"densities {DENSITY} {DENSER}", *cuda)
        return " ".join(str(part) for part in (*parts, *tiles, *counted))

    @property
    def layers(self) -> int:
        """How many are timed together: on a CPU nothing is hidden behind another layer."""
        return min(LAYERS, self.sparse_layers) if self.device.type == "cuda" else 1

    def settings(self, density: float = DENSITY) -> Config:
        """What sparse is timed with: a budget of tiles, and an error for which all of it is used."""
        return dataclasses.replace(self.config, error=1.0, error_ceiling=math.inf, max_density=density)


@dataclass(frozen=True)
class Timing:
    """Seconds ``sparse`` and ``dense``, and the density that sparse had."""

    sparse: float
    dense: float
    density: float


@dataclass(frozen=True)
class Crossover:
    """From how many ``tokens`` on sparse prefill pays, and up to what ``density`` of a layer."""

    tokens: int
    density: float


def _processor() -> str:
    """The CPU and what of it PyTorch and the libraries below it use; a cache may be shared between machines."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        described = re.search(r"^model name\s*: (.*)$", _CPU_FILE.read_text(encoding="utf-8"), re.MULTILINE)
        model = described[1] if described else model
    caps = [f"{name}={os.environ[name]}" for name in _CPU_CAPS if name in os.environ]
    return " ".join([model, torch.backends.cpu.get_cpu_capability(), *caps])


def of(shape: Shape, file: Path | None = None) -> Crossover:
    """Where sparse prefill wins, from the file or measured.

    ``file`` defaults to ``mminference-sgl/crossover.json`` in the user's cache; one that cannot be read or written is
    done without.
    """
    file = file or _cache_file()
    known = _remembered(file)
    if shape.key not in known:
        began = time.perf_counter()
        known[shape.key] = measured(functools.partial(_times, shape))
        _remember(file, known)
        logger.info(
            "mminference: sparse prefill pays from %d tokens on, to density %.2f (measured in %.1f s, kept in %s)",
            known[shape.key].tokens,
            known[shape.key].density,
            time.perf_counter() - began,
            file,
        )
    return known[shape.key]


def measured(times: Callable[[int, float], Timing]) -> Crossover:
    """The first of :data:`LENGTHS` at which sparse wins; ``times``: seconds at a length and a budget of tiles.

    Where time runs out, the first length that was not tried; where sparse never wins, twice the last one. Densities are
    compared at up to :data:`LONGER` times the last length that was tried, as far as time allows: there selection is a
    smaller share of what sparse takes, as it is in the long requests that this is for.
    """
    deadline = time.perf_counter() + SECONDS
    tokens, tried, few = 2 * LENGTHS[-1], LENGTHS[0], None
    for length in LENGTHS:
        if few is not None and time.perf_counter() > deadline:
            tokens = length
            break
        tried, few = length, times(length, DENSITY)
        if MARGIN * few.sparse <= few.dense:
            tokens = length
            break
    assert few is not None
    longest = min(LONGER, math.sqrt(SECONDS / max(few.sparse + few.dense, 1e-9))) * tried
    compared = max(length for length in LENGTHS if length <= max(longest, tried))
    return Crossover(tokens, _worthwhile(times(compared, DENSITY), times(compared, DENSER)))


def _worthwhile(few: Timing, more: Timing) -> float:
    """The density at which sparse takes as long as dense, on the line through two: at least the first, at most 1."""
    by_density = (more.sparse - few.sparse) / max(more.density - few.density, 1e-9)
    if by_density <= 0:
        return 1.0
    return float(np.clip(few.density + (few.dense - few.sparse) / by_density, few.density, 1.0))


def _times(shape: Shape, length: int, budget: float) -> Timing:
    """Seconds of :attr:`Shape.layers` for the last chunk of a video of ``length`` tokens, sparse and dense.

    Sparse with their share of planning it.
    """
    operands, plan = _problem(shape, length)
    out, specs, config = torch.empty_like(operands.query), [HeadSpec()] * shape.heads, shape.settings(budget)
    reports: list[prefill.LayerReport] = []

    def sparse() -> None:
        reports[:] = prefill.run_layer(operands, plan, specs, config, out, shape.implementation)

    planning = _seconds(_planner(shape, length), shape.device) * shape.layers / shape.sparse_layers
    seconds = planning + _fastest([sparse], shape)
    (report,) = reports
    return Timing(seconds, _fastest(_dense_runs(operands), shape), float(report.tiles / report.causal))


def _problem(shape: Shape, length: int) -> tuple[Operands, ForwardPlan]:
    """Random operands of a video of ``length`` tokens, token i in slot i + 1, and the plan of its last chunk."""
    rows = min(length, shape.chunk_tokens or length)
    generator = torch.Generator(shape.device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=shape.device).to(shape.dtype)

    query = random(rows, shape.heads, shape.head_dim)
    key_pool, value_pool = (random(length + 1, shape.kv_heads, shape.head_dim) for _ in range(2))
    return Operands(query, key_pool, value_pool, shape.head_dim**-0.5), _planner(shape, length)()


def _planner(shape: Shape, length: int) -> Callable[[], ForwardPlan]:
    """Plans the last chunk of a video of ``length`` tokens, whose layout is known, as it is of a request."""
    rows = min(length, shape.chunk_tokens or length)
    req_to_token = torch.arange(1, length + 1, dtype=torch.int32, device=shape.device)[None]
    frames = length // _SIDE**2
    sharing = prefill.sharing(shape.config, shape.heads // shape.kv_heads)
    layout = _core.Layout(
        length,
        [(2, [(0, length - 1)], (frames, _SIDE, _SIDE))],
        chunk_tokens=shape.chunk_tokens,
        tile_queries=smallest_tile(shape.config.tile_queries, sharing),
        cell_size=shape.config.cell_size,
    )
    on_device = DeviceLayout(layout, shape.config.tile_keys, shape.device)
    pool_row = torch.zeros(1, dtype=torch.int64, device=shape.device)
    return functools.partial(
        build,
        [SparseRequest(on_device, length - rows, rows, pool_row, 0)],
        req_to_token,
        tile_queries=shape.config.tile_queries,
        tile_keys=shape.config.tile_keys,
        probe_rows=shape.config.probe_rows,
        sharing=sharing,
    )


def _dense_runs(operands: Operands) -> list[Callable[[], object]]:
    """Dense causal attention of the query to its own and all earlier keys, by each kernel that may be the fastest."""
    rows, length = operands.query.shape[0], operands.key_pool.shape[0] - 1
    pools = operands.key_pool[1:], operands.value_pool[1:]
    q = operands.query.transpose(0, 1)[None]
    k, v = (x.transpose(0, 1)[None].repeat_interleave(operands.group, 1) for x in pools)

    def pytorch() -> None:
        own = slice(length - rows, length)
        functional.scaled_dot_product_attention(q, k[:, :, own], v[:, :, own], is_causal=True, scale=operands.scale)
        if length > rows:
            functional.scaled_dot_product_attention(q, k[:, :, :-rows], v[:, :, :-rows], scale=operands.scale)

    def cudnn() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            pytorch()

    if q.device.type != "cuda":
        return [pytorch]
    fa3 = _fa3(operands.query, *pools, operands.scale)
    return [pytorch, cudnn] + ([fa3] if fa3 is not None else [])


def _fa3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Callable[[], object] | None:
    """FA3 of SGLang's kernels, None where they cannot be imported; its causality is aligned at the last row and key."""
    try:
        kernels = importlib.import_module("sgl_kernel.flash_attn")
    except ImportError:
        return None
    bounds = [torch.tensor([0, len(x)], dtype=torch.int32, device=x.device) for x in (query, key)]
    return functools.partial(
        kernels.flash_attn_varlen_func,
        query,
        key,
        value,
        *bounds,
        max_seqlen_q=len(query),
        max_seqlen_k=len(key),
        softmax_scale=scale,
        causal=True,
    )


def _fa3_version() -> str:
    try:
        return metadata.version("sglang-kernel")
    except metadata.PackageNotFoundError:
        return "none"


def _fastest(runs: Sequence[Callable[[], object]], shape: Shape) -> float:
    """Seconds of the fastest of some ways to compute a layer, :attr:`Shape.layers` times behind one another.

    Of several ways, those that do not take these operands or this device are left out.

    Raises:
        Exception: of the last way, where none works.
    """
    best, problem = math.inf, None
    for run in runs:

        def layers(run: Callable[[], object] = run) -> None:
            for _ in range(shape.layers):
                run()

        try:
            with warnings.catch_warnings(action="ignore"):
                best = min(best, _seconds(layers, shape.device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            problem = error
    if math.isinf(best) and problem is not None:
        raise problem
    return best


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The faster of two runs after a warm-up, which alone counts where it takes long."""

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if device.type == "cuda":
        # What is compiled or looked up the first time is not what a layer takes.
        timed()
    first = timed()
    return first if first > _LONG else min(timed(), timed())


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mminference-sgl" / "crossover.json"


def _remembered(file: Path) -> dict[str, Crossover]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: Crossover(int(value["tokens"]), float(value["density"])) for key, value in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _remember(file: Path, known: dict[str, Crossover]) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {key: dataclasses.asdict(value) for key, value in known.items()}
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        logger.info("mminference: the crossover is measured at every start: %s", error)
