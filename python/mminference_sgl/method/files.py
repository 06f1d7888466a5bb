"""What users give: files are read, and values shown, within bounds."""

from __future__ import annotations

import stat
from pathlib import Path

LARGEST = 16 << 20
"""Bytes of a pattern or configuration file; the largest models' take a few hundred KiB."""
_LONGEST = 80
"""Characters of a value that a message shows."""


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read, or is no file; FileNotFoundError: it does not exist.
        ValueError: it is no UTF-8 text, or too large.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("is no file")
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"is larger than {LARGEST >> 20} MiB, the most that is read of such a file")
    return data.decode("utf-8")


def shown(value: object) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
