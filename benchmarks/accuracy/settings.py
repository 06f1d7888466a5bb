"""What one could compute instead, at the same density."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.toy.serving import GUARD_OFF

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMNS = Path(__file__).with_name("columns.json")
"""Columns and diagonals for media rows, text rows dense."""
ALL_ROWS = "vertical_slash, all rows"
SINK = 64
TILE_ROWS, TILE_KEYS = 128, 64
"""Of a tile: rows where chunks are long, and keys."""


def rivals(
    density: float, length: int, pattern: Path | None = None, rows: int = TILE_ROWS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What else one could compute at a density; what keeps to the default error with fewer tiles computes fewer.

    ``pattern``: a file with a pattern for each head; ``rows``: of a query tile.
    """
    capped = {"error_ceiling": GUARD_OFF, "max_density": density}
    yield "grid", {"pattern": "grid", **capped}
    yield "vertical_slash", {"pattern": str(COLUMNS), **capped}
    yield ALL_ROWS, {"pattern": "vertical_slash", **capped}
    if pattern is not None:
        yield "searched", {"pattern": str(pattern), **capped}
    control = {"sink": SINK, "window": window(density, length, rows)}
    yield "a_shape", {"pattern": "a_shape", "error_ceiling": GUARD_OFF, "patterns": {"a_shape": control}}


def window(density: float, length: int, rows: int = TILE_ROWS) -> int:
    """The widest window of an A-shape that computes at most at a density, counted in whole tiles; one row at least."""
    low, high = 1, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a_shape_density(middle, length, rows) <= density else (low, middle - 1)
    return low


def a_shape_density(window: int, length: int, rows: int) -> float:
    """Tiles that a sink and a window need, over causal tiles."""
    first = np.arange(0, length, rows)
    end = np.minimum(first + rows, length)
    causal = -(-end // TILE_KEYS)
    begin = np.maximum(first - window + 1, 0) // TILE_KEYS
    return float((causal - begin + np.minimum(begin, -(-SINK // TILE_KEYS))).sum() / causal.sum())
