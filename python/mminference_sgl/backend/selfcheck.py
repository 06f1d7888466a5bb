"""A small problem for an attention implementation, to see on a machine whether it runs and computes what is served.

What is served is a layer's shape on this rank (:class:`Served`): the kernels that a request would run are those that
are checked. They are compiled for it, so that no request waits for that.

``python -m mminference_sgl.backend.selfcheck`` is what :func:`check` starts for implementations that must prove
themselves in a process of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from mminference_sgl import _core
from mminference_sgl.kernels import ops
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.items import VIDEO
from mminference_sgl.method.plan import DeviceLayout, ForwardPlan, SparseRequest, build, smallest_tile

ISOLATED = ("fa4",)
"""Implementations on kernels of others: a mistake could hang or corrupt the process that tries them."""

_TOKENS, _ISOLATED_TOKENS = 400, 1000
_KEY_SCALE, _VALUE_SCALE = 0.5, 2.0
_PROBE_ROWS = 32
_BOUNDARIES = HeadSpec("a_shape", "vertical_slash", "vertical_slash", "grid")
_BUILD_SECONDS, _RUN_SECONDS = 600.0, 180.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """One layer of a server: heads of this rank, dtypes of query and KV pool, tiles of the plan."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pool_dtype: torch.dtype
    tile_queries: int = 128
    tile_keys: int = 64

    @classmethod
    def usual(cls, device: torch.device) -> Served:
        """What stands for all models where none is served: bf16 on CUDA, fp32 elsewhere."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(4, 2, 128, dtype, dtype)

    @property
    def text(self) -> str:
        """As one argument of a command."""
        return json.dumps([str(value).removeprefix("torch.") for value in astuple(self)])

    @classmethod
    def parse(cls, text: str) -> Served:
        """Back from :attr:`text`."""
        *shape, dtype, pool_dtype, tile_queries, tile_keys = json.loads(text)
        heads, kv_heads, head_dim = map(int, shape)
        dtypes = getattr(torch, dtype), getattr(torch, pool_dtype)
        return cls(heads, kv_heads, head_dim, *dtypes, int(tile_queries), int(tile_keys))


def check_implementations() -> dict[str, str]:
    """For each implementation `ok`, or why it does not work on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: check(name, device) if state == "ok" else state
        for name, state in ops.available_implementations(device).items()
    }


def check(implementation: str, device: torch.device, served: Served | None = None) -> str:
    """`ok`, or what is wrong with an available implementation on a device; ``served`` None takes the usual shape.

    Triton's kernels are compiled here, some seconds each the first time on a machine. Those of :data:`ISOLATED` run in
    a process of their own with a time limit, and are compiled in this one when they were right there.
    """
    served = served or Served.usual(device)
    if implementation in ISOLATED:
        verdict = isolated(implementation, device, served)
        return verdict if verdict != "ok" else _build(implementation, device, served)
    return _check_here(implementation, device, served, _TOKENS)


def isolated(
    implementation: str,
    device: torch.device,
    served: Served,
    build_seconds: float = _BUILD_SECONDS,
    run_seconds: float = _RUN_SECONDS,
) -> str:
    """As :func:`check`, in processes of their own, one that compiles and one that runs, each with a time limit."""
    logger.info("mminference: %s is compiled for %s, which may take a minute, and checked", implementation, served)
    for stage, seconds in (("build", build_seconds), ("run", run_seconds)):
        arguments = [stage, implementation, str(device), served.text]
        verdict = _in_a_process(arguments, seconds)
        if verdict != "ok":
            return f"{verdict} ({stage} on {device}); use 'triton' or 'auto'"
    return "ok"


def main(arguments: Sequence[str]) -> str:
    """One stage of :func:`isolated`: builds the implementation, or checks it."""
    stage, implementation, device, text = arguments
    served = Served.parse(text)
    if stage == "build":
        return _build(implementation, torch.device(device), served)
    return _check_here(implementation, torch.device(device), served, _ISOLATED_TOKENS)


def _build(implementation: str, device: torch.device, served: Served) -> str:
    """Compiles what is compiled ahead of its first use: for single heads' lists, and for those that a group shares."""
    if implementation != "fa4":
        return "ok"
    from mminference_sgl.kernels import fa4

    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else fa4.CAPABILITIES[0][0]
    reason = fa4.unsupported(served.dtype, served.head_dim, served.head_dim, served.tile_keys, major)
    if reason:
        return f"does not take this model: {reason}"
    group = served.heads // served.kv_heads
    shared = prefill.sharing(Config(tile_queries=served.tile_queries), group)
    try:
        for sharing in (1, *shared):
            fa4.build(served.dtype, served.head_dim, served.tile_keys, group // sharing, major)
    except Exception as problem:  # noqa: BLE001 - the caller reports it
        return f"does not compile: {type(problem).__name__}: {str(problem)[-500:]}"
    return "ok"


def _in_a_process(arguments: Sequence[str], seconds: float) -> str:
    """The last line that :func:`main` printed in a process of its own, or how that ended."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        command = [sys.executable, "-m", "mminference_sgl.backend.selfcheck", *arguments]
        # Compilers that the process starts end with it, as they are of the same session.
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            # A process that waits for a hung device may not end at all.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            return f"was not done after {seconds:g} s"
        out.seek(0)
        lines = out.read().split("\n")
    said = [line for line in lines if line.strip()][-1:]
    return "".join(said) if status == 0 else f"ended with status {status}: {''.join(said)}"


def _check_here(implementation: str, device: torch.device, served: Served, tokens: int) -> str:
    """A layer of one request, text around a video, in both passes, and what selection says of it."""
    tile = served.tile_keys
    pages = -(-tokens // tile) + 1
    # Page 0 is the pool's padding.
    slots = torch.arange(tile, tile + tokens, device=device).flip(0)
    # The guard would mend what is wrong.
    exact, sparse = (Config(error=error, error_ceiling=1e9) for error in (0.0, 0.5))
    grid = [HeadSpec(media_text="grid", media_media="grid")] * served.heads
    # Boundaries between text and media are measured in another way than heads that have none.
    mixed = [(HeadSpec(), _BOUNDARIES)[head % 2] for head in range(served.heads)]
    try:
        operands = _operands(served, tokens, pages * tile, device)
        out = torch.full_like(operands.query, torch.nan)
        sharing = prefill.sharing(Config(tile_queries=served.tile_queries), operands.group)
        plan = _plan(slots, served, sharing)
        prefill.run_layer(operands, plan, grid, exact, out, implementation)
        error = (out.double() - _dense(operands, slots)).abs().max().item()
        kept, expected = (
            prefill.select_layer(operands, plan, mixed, sparse, name)[1][0].coverage.item()
            for name in (implementation, "torch")
        )
    except Exception as problem:  # noqa: BLE001 - the caller reports it
        return f"fails on {device}: {type(problem).__name__}: {problem}"
    # A wrong result is off by about 1; rounding by less than a hundredth of that.
    if not error < 0.05:
        return f"computes wrong on {device}: off by {error:.2g}"
    # Rounding may take a tile more or less.
    return "ok" if abs(kept - expected) < 0.05 else f"selects wrong on {device}: {kept:.3f} kept, not {expected:.3f}"


def _operands(served: Served, tokens: int, slots: int, device: torch.device) -> Operands:
    """Random operands of one layer; what an fp8 pool stands for is as large as what others hold."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(rows, heads, served.head_dim, generator=generator).to(device)
        for rows, heads in ((tokens, served.heads), (slots, served.kv_heads), (slots, served.kv_heads))
    )
    scales = (_KEY_SCALE, _VALUE_SCALE) if served.pool_dtype.itemsize == 1 else (1.0, 1.0)
    keys, values = ((pool / scale).to(served.pool_dtype) for pool, scale in zip((key, value), scales, strict=True))
    return Operands(query.to(served.dtype), keys, values, served.head_dim**-0.5, *scales)


def _dense(operands: Operands, slots: torch.Tensor) -> torch.Tensor:
    """Causal attention in fp64: [tokens, heads, head_dim]."""
    q, k, v = (
        x.double().repeat_interleave(times, 1).transpose(0, 1)
        for x, times in (
            (operands.query, 1),
            (operands.key_pool[slots], operands.group),
            (operands.value_pool[slots], operands.group),
        )
    )
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=slots.device).triu(1)
    scores = q @ k.mT * (operands.scale * operands.key_scale)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1) * operands.value_scale
    out: torch.Tensor = (weights @ v).transpose(0, 1)
    return out


def _plan(slots: torch.Tensor, served: Served, sharing: tuple[int, ...]) -> ForwardPlan:
    """One request in one chunk, token i in slot ``slots[i]``: a video of 3 x 6 places, and words before and behind."""
    device, tokens = slots.device, slots.numel()
    words, places = 3, 3 * 6
    frames = (tokens - 2 * words) // places
    item = (VIDEO, [(words, words + frames * places - 1)], (frames, 3, 6))
    rows = smallest_tile(served.tile_queries, sharing)
    layout = _core.Layout(tokens, [item], chunk_tokens=0, tile_queries=rows)
    on_device = DeviceLayout(layout, served.tile_keys, device)
    return build(
        [SparseRequest(on_device, 0, tokens, torch.zeros(1, dtype=torch.int64), 0)],
        slots[None].int(),
        tile_queries=served.tile_queries,
        tile_keys=served.tile_keys,
        probe_rows=_PROBE_ROWS,
        sharing=sharing,
    )


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1:])}\n")
