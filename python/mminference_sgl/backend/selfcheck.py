"""A tiny problem for each attention implementation, to see on a machine whether it runs and computes.

``python -m mminference_sgl.backend.selfcheck`` is what :func:`check` starts for implementations that must prove
themselves in a process of their own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import torch

from mminference_sgl import _core
from mminference_sgl.kernels import ops
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.items import VIDEO
from mminference_sgl.method.plan import DeviceLayout, ForwardPlan, SparseRequest, build

ISOLATED = ("flashinfer",)
"""Implementations on internal interfaces of others: a mistake could hang or corrupt the process that tries them."""

_HEADS, _KV_HEADS, _HEAD_DIM, _TILE = 4, 2, 64, 64
_TOKENS, _ISOLATED_TOKENS = 400, 1000
_PROBE_ROWS = 32
_BUILD_SECONDS, _RUN_SECONDS = 1800.0, 180.0

logger = logging.getLogger(__name__)


def check_implementations() -> dict[str, str]:
    """For each implementation `ok`, or why it does not work on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: check(name, device) if state == "ok" else state
        for name, state in ops.available_implementations(device).items()
    }


def check(
    implementation: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int = _HEAD_DIM
) -> str:
    """`ok`, or what is wrong with an available implementation on a device.

    ``dtype`` defaults to bf16 on CUDA and fp32 elsewhere. Those of :data:`ISOLATED` run in a process of their own with
    a time limit; what they compile for ``dtype`` and ``head_dim`` is then there for this process too.
    """
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if implementation in ISOLATED:
        return isolated(implementation, device, dtype, head_dim)
    return _check_here(implementation, device, dtype, head_dim, _TOKENS, contiguous=False)


def isolated(
    implementation: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    build_seconds: float = _BUILD_SECONDS,
    run_seconds: float = _RUN_SECONDS,
) -> str:
    """As :func:`check`, in processes of their own, one that compiles and one that runs, each with a time limit."""
    logger.info(
        "mminference: %s is compiled for %s and head size %d, which takes minutes the first time, and checked",
        implementation,
        dtype,
        head_dim,
    )
    for stage, seconds in (("build", build_seconds), ("run", run_seconds)):
        arguments = [stage, implementation, str(device), str(dtype).removeprefix("torch."), str(head_dim)]
        verdict = _in_a_process(arguments, seconds)
        if verdict != "ok":
            return f"{verdict} ({stage} on {device}); use 'triton' or 'auto'"
    return "ok"


def main(arguments: Sequence[str]) -> str:
    """One stage of :func:`isolated`: builds the implementation, or checks it on gathered keys and on whole pages."""
    stage, implementation, device_name, dtype_name, size = arguments
    device, dtype, head_dim = torch.device(device_name), getattr(torch, dtype_name), int(size)
    if stage == "build":
        return _build(implementation, dtype, head_dim)
    verdict = "ok"
    for contiguous in (False, True):
        if verdict == "ok":
            tokens = _ISOLATED_TOKENS
            verdict = _check_here(implementation, device, dtype, head_dim, tokens, contiguous=contiguous)
    return verdict


def _build(implementation: str, dtype: torch.dtype, head_dim: int) -> str:
    if implementation != "flashinfer":
        return "ok"
    from mminference_sgl.kernels import flashinfer_tiles

    reason = flashinfer_tiles.unsupported(dtype, head_dim)
    if reason:
        return f"does not take this model: {reason}"
    try:
        flashinfer_tiles.paged_run(dtype, head_dim)
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


def _check_here(
    implementation: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int, *, contiguous: bool
) -> str:
    """A layer of one request, text around a video, in both passes, and what selection says of it."""
    tiles = -(-tokens // _TILE)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(rows, heads, head_dim, generator=generator).to(device, dtype)
        for rows, heads in ((tokens, _HEADS), *(((tiles * _TILE + 1), _KV_HEADS),) * 2)
    )
    slots = torch.arange(1, tokens + 1, device=device)
    if not contiguous:
        slots = slots.flip(0)
    out = torch.full_like(query, torch.nan)
    try:
        plan = _plan(slots, contiguous=contiguous)
        # The guard would mend what is wrong.
        exact, sparse = (Config(coverage=coverage, error_ceiling=1e9) for coverage in (1.0, 0.9))
        grid, auto = [HeadSpec(media_text="grid", media_media="grid")] * _HEADS, [HeadSpec()] * _HEADS
        operands = Operands(query, key, value, head_dim**-0.5)
        prefill.run_layer(operands, plan, grid, exact, out, implementation)
        error = (out.double() - _dense(query, key[slots], value[slots])).abs().max().item()
        kept, expected = (
            prefill.select_layer(operands, plan, auto, sparse, name)[1][0].coverage.item()
            for name in (implementation, "torch")
        )
    except Exception as problem:  # noqa: BLE001 - the caller reports it
        return f"fails on {device}: {type(problem).__name__}: {problem}"
    # A wrong result is off by about 1; rounding by less than a hundredth of that.
    if not error < 0.05:
        return f"computes wrong on {device}: off by {error:.2g}"
    # Rounding may take a tile more or less.
    return "ok" if abs(kept - expected) < 0.05 else f"selects wrong on {device}: {kept:.3f} kept, not {expected:.3f}"


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention in fp64: [tokens, heads, head_dim]."""
    group = _HEADS // _KV_HEADS
    q, k, v = (
        x.double().repeat_interleave(times, 1).transpose(0, 1)
        for x, times in ((query, 1), (key, group), (value, group))
    )
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=query.device).triu(1)
    weights = (q @ k.mT * query.shape[2] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
    out: torch.Tensor = (weights @ v).transpose(0, 1)
    return out


def _plan(slots: torch.Tensor, *, contiguous: bool) -> ForwardPlan:
    """One request in one chunk, token i in slot ``slots[i]``: a video of 3 x 6 places, and words before and behind."""
    device, tokens = slots.device, slots.numel()
    words, places = 3, 3 * 6
    frames = (tokens - 2 * words) // places
    item = (VIDEO, [(words, words + frames * places - 1)], (frames, 3, 6))
    layout = _core.Layout(tokens, [item], chunk_tokens=0, tile_queries=_TILE)
    request = SparseRequest(DeviceLayout(layout, _TILE, device), 0, tokens, torch.zeros(1, dtype=torch.int64), 0)
    pages = _TILE if contiguous else 1
    return build(
        [request], slots[None].int(), tile_queries=_TILE, tile_keys=_TILE, probe_rows=_PROBE_ROWS, page_size=pages
    )


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1:])}\n")
