"""What the commands print with."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """SGLang and its dependencies warn at length when imported; a report is about the plugin."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
