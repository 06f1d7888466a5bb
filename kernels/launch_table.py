"""How the attend kernel is launched on a device: a table instead of autotuning when a server starts.

Nothing here has been timed yet. An entry is the first that compiles without spills and keeps the keys and values of a
further step under way, of 128 x 64, 128 x 32, 64 x 64, 64 x 32 and 64 x 16, through descriptors (TMA) before pointers,
with the head in one part before halves: rows first, because keys and values are read once per sub-tile. Triton shares
stages out along the chain from tile list to keys, so five keep two steps under way beside the one that is computed, or
one where the buffers of a product stay with it (``mma.sync``); there entries have seven if they fit.
``make tune`` measures on a GPU and rewrites :data:`TABLE`, with what it measured behind each line;
``python tests/kernels/aot.py`` compiles every entry without one and prints registers, stack and shared memory. No entry
may spill, need more shared memory than its architecture has, or leave nothing under way; the tests assert all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """``rows`` of a query tile per program, ``keys`` of a key tile per step, warps and pipeline stages.

    ``split``: the head comes in two halves, so that fewer registers hold operands of matrix instructions.
    ``descriptors``: keys and values come through tensor descriptors (TMA).
    """

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool = False
    descriptors: bool = False


@dataclass(frozen=True)
class Architecture:
    """Bytes of shared memory that one block and all blocks of a processor may use; registers are 65,536 everywhere."""

    block_shared: int
    total_shared: int


ARCHITECTURES = {
    80: Architecture(166912, 167936),
    86: Architecture(101376, 102400),
    89: Architecture(101376, 102400),
    90: Architecture(232448, 233472),
    100: Architecture(232448, 233472),
    120: Architecture(101376, 102400),
}
"""By compute capability, 90 for 9.0. Others take the entries of the next older one of these."""

HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head sizes with entries of their own; others take those of the next larger one."""

NATIVE_FP8 = 89
"""First architecture with instructions that convert e4m3."""

NATIVE_DESCRIPTORS = 90
"""First architecture with tensor descriptors (TMA)."""

TABLE: dict[tuple[int, int], Launch] = {
    # (architecture, head size): rows, keys, warps, stages
    (80, 64): Launch(128, 64, 8, 7),
    (80, 80): Launch(128, 32, 8, 7),
    (80, 96): Launch(128, 32, 8, 7),
    (80, 128): Launch(128, 32, 8, 5, split=True),
    (80, 256): Launch(64, 32, 8, 7),
    (86, 64): Launch(128, 64, 8, 7),
    (86, 80): Launch(128, 32, 8, 7),
    (86, 96): Launch(128, 32, 8, 7),
    (86, 128): Launch(128, 32, 8, 5, split=True),
    (86, 256): Launch(64, 16, 8, 7),
    (89, 64): Launch(128, 64, 8, 7),
    (89, 80): Launch(128, 32, 8, 7),
    (89, 96): Launch(128, 32, 8, 7),
    (89, 128): Launch(128, 32, 8, 5, split=True),
    (89, 256): Launch(64, 16, 8, 7),
    (90, 64): Launch(128, 64, 8, 5, descriptors=True),
    (90, 80): Launch(128, 64, 8, 5),
    (90, 96): Launch(128, 64, 8, 5),
    (90, 128): Launch(128, 64, 8, 5, descriptors=True),
    (90, 256): Launch(128, 32, 8, 5, split=True, descriptors=True),
    (100, 64): Launch(128, 64, 8, 3, descriptors=True),
    (100, 80): Launch(128, 64, 8, 5),
    (100, 96): Launch(128, 64, 8, 5),
    (100, 128): Launch(128, 64, 8, 5, descriptors=True),
    (100, 256): Launch(128, 64, 8, 3, split=True, descriptors=True),
    (120, 64): Launch(128, 64, 8, 7, descriptors=True),
    (120, 80): Launch(128, 32, 8, 7),
    (120, 96): Launch(64, 64, 8, 7),
    (120, 128): Launch(128, 64, 8, 5, split=True, descriptors=True),
    (120, 256): Launch(64, 16, 8, 7, descriptors=True),
}

OPTIONS = {"enable_fp_fusion": True}
"""Compiler options of every launch: products are fused with sums. Triton's own default is to change with 3.10."""

FLOAT32 = Launch(16, 16, 4, 3)
"""For fp32, which computes without tensor cores and exists for tests."""


def lookup(architecture: int, head_dim: int, element_size: int) -> Launch:
    """The entry for a device, the larger of a layer's two head sizes, and the bytes of the query's elements.

    Raises:
        ValueError: no architecture or head size of the table covers these.
    """
    known = max((arch for arch in ARCHITECTURES if arch <= architecture), default=None)
    width = min((size for size in HEAD_DIMS if size >= head_dim), default=None)
    if known is None or width is None:
        raise ValueError(
            f"no launch entry for compute capability {architecture / 10} and head size {head_dim}: "
            f"the kernels are made for {min(ARCHITECTURES) / 10} and newer and for heads up to {max(HEAD_DIMS)}"
        )
    return FLOAT32 if element_size == 4 else TABLE[known, width]


def fitted(launch: Launch, lanes: int, tile_keys: int) -> Launch:
    """An entry cut to a plan's tiles: no program has twice a query tile's lanes, and its keys divide a key tile."""
    rows = min(launch.rows, max(16, 1 << (lanes - 1).bit_length()))
    return launch._replace(
        rows=rows, keys=gcd(launch.keys, tile_keys), warps=max(1, launch.warps * rows // launch.rows)
    )


@cache
def device_architecture(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0; what is no GPU (the interpreter's memory) counts as the oldest."""
    if device.type != "cuda":
        return min(ARCHITECTURES)
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
