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


def rivals(density: float, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """What else one could compute at a density; what keeps to the default error with fewer tiles computes fewer."""
    capped = {"error_ceiling": GUARD_OFF, "max_density": density}
    yield "grid", {"pattern": "grid", **capped}
    yield "vertical_slash", {"pattern": str(COLUMNS), **capped}
    yield ALL_ROWS, {"pattern": "vertical_slash", **capped}
    # A row sees its window: of a triangle of n columns that is 1 - (1 - w / n)^2.
    window = max(1, int(length * (1 - np.sqrt(1 - min(density, 1)))) - 64)
    yield (
        "a_shape",
        {"pattern": "a_shape", "error_ceiling": GUARD_OFF, "patterns": {"a_shape": {"sink": 64, "window": window}}},
    )
