"""Entry point of block-sparse prefill attention: validates, and runs the passes with one implementation."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Protocol

import torch

from .operands import Operands
from .tiles import TileLists, TilePass


class Attend(Protocol):
    """One pass of one implementation: what each module of :data:`IMPLEMENTATIONS` has as ``attend``."""

    def __call__(
        self,
        operands: Operands,
        tile_pass: TilePass,
        lists: TileLists,
        out: torch.Tensor,
        lse: torch.Tensor,
        *,
        merge: bool,
    ) -> None:
        """Attention into the batch rows of the pass; other rows of ``out`` and ``lse`` are left alone.

        Args:
            lists: the listed key tiles of every query tile of the pass, for each head or all that share a list.
            out: [batch rows, H, Dv]. A row that sees no key has output 0.
            lse: [batch rows, H], natural logarithm, fp32 (fp64 for fp64 input). A row that sees no key has -inf.
            merge: what ``out`` and ``lse`` hold is attention over other keys of the same rows, and becomes the softmax
                over both.
        """
        ...


_MODULES = {"reference": ".reference", "torch": ".torch_tiles", "triton": ".attend", "fa4": ".fa4"}
"""Implementations and the module of each; a module is imported when it is first used."""

IMPLEMENTATIONS = tuple(_MODULES)


class ImplementationUnavailableError(RuntimeError):
    """An implementation that was asked for by name cannot run here; the message says why."""


def resolve(name: str, device: torch.device) -> str:
    """Turns ``auto`` into the implementation for a device and checks that a named one can run on it.

    ``auto`` is ``triton`` on CUDA: ``fa4`` has not been timed on any device.

    Raises:
        ImplementationUnavailableError: the named implementation is not available; nothing else is tried.
    """
    if name == "auto":
        return "triton" if device.type == "cuda" else "torch"
    reason = _unavailable(name, device)
    if reason:
        raise ImplementationUnavailableError(
            f"implementation {name!r} is not available: {reason}; "
            f"use one of {', '.join(other for other in _MODULES if other != name)} or 'auto'"
        )
    return name


def available_implementations(device: torch.device | None = None) -> dict[str, str]:
    """For each implementation ``"ok"`` or why it cannot run on a device (default: the GPU if there is one)."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: _unavailable(name, device) or "ok" for name in IMPLEMENTATIONS}


def sparse_prefill(
    operands: Operands, passes: Sequence[tuple[TilePass, TileLists]], out: torch.Tensor, implementation: str
) -> torch.Tensor:
    """Attention of all rows of the first pass, the passes merged exactly through their LSE.

    Args:
        passes: the sequence pass, whose rows are all rows to compute, then others over a part of the same rows.
            Their regions are disjoint, so no (row, key) pair counts twice.
        out: [batch rows, H, Dv]; the rows of the first pass are written, others left alone.
        implementation: a resolved name.

    Returns:
        The LSE fp32 [batch rows, H] over the listed keys, natural logarithm; only the rows of the first pass mean
        anything.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(operands, passes, out)
    lse = torch.empty(out.shape[:2], dtype=torch.float32, device=out.device)
    attend = _attend(implementation)
    for index, (tile_pass, lists) in enumerate(passes):
        attend(operands, tile_pass, lists, out, lse, merge=index > 0)
    return lse


def merge_pass(
    operands: Operands,
    tiles: tuple[TilePass, TileLists],
    out: torch.Tensor,
    lse: torch.Tensor,
    implementation: str,
) -> None:
    """One more pass over keys that ``out`` and ``lse`` do not hold yet; rows with an LSE of -inf hold none.

    Arguments as in :func:`sparse_prefill`; ``lse`` is what that returned.
    """
    _check(operands, [tiles], out)
    _attend(implementation)(operands, *tiles, out, lse, merge=True)


def _attend(implementation: str) -> Attend:
    attend: Attend = importlib.import_module(_MODULES[implementation], __package__).attend
    return attend


def _unavailable(name: str, device: torch.device) -> str:
    if name not in _MODULES:
        return f"this version has {', '.join(_MODULES)}"
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device, this is {device}"
    try:
        module = importlib.import_module(_MODULES[name], __package__)
    except ImportError as error:
        return f"its module does not import on {device}: {error}"
    return str(module.unavailable(device)) if name == "fa4" else ""


def _check(operands: Operands, passes: Sequence[tuple[TilePass, TileLists]], out: torch.Tensor) -> None:
    query, key_pool, value_pool = operands.query, operands.key_pool, operands.value_pool
    if query.dim() != 3 or key_pool.dim() != 3 or value_pool.dim() != 3:
        raise ValueError(f"query and pools must be 3-d, got {query.shape}, {key_pool.shape}, {value_pool.shape}")
    if query.shape[1] % key_pool.shape[1] or key_pool.shape[1] != value_pool.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads do not divide over {key_pool.shape[1]} key and "
            f"{value_pool.shape[1]} value heads"
        )
    if query.shape[2] != key_pool.shape[2]:
        raise ValueError(f"head size of query {query.shape[2]} and keys {key_pool.shape[2]} differ")
    if out.shape != (*query.shape[:2], value_pool.shape[2]):
        raise ValueError(f"out has shape {tuple(out.shape)}, must be rows x heads x head size of the values")
    for tile_pass, lists in passes:
        if query.shape[1] // key_pool.shape[1] % tile_pass.sharing:
            raise ValueError(
                f"{tile_pass.sharing} heads of {query.shape[1]} share a list, but {query.shape[1]} query heads on "
                f"{key_pool.shape[1]} KV heads do not divide into such"
            )
        shape = query.shape[1] // tile_pass.sharing, tile_pass.num_tiles
        if lists.sink.shape != shape:
            raise ValueError(f"lists are for {tuple(lists.sink.shape)} (heads, query tiles), the pass has {shape}")
