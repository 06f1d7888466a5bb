"""What the README says, for tests that hold it to that."""

from __future__ import annotations

import re
from pathlib import Path

_ROW = re.compile(r"^\| .+? \| (SGLang.*?|this package) \| (`.+`) \|$", re.MULTILINE)


def served_by() -> dict[str, list[str]]:
    """Names of tiny checkpoints by who serves them, as the table of models has it."""
    found: dict[str, list[str]] = {}
    for served, checkpoints in _ROW.findall((Path(__file__).parents[1] / "README.md").read_text()):
        found.setdefault(served, []).extend(re.findall(r"`(\w+)`", checkpoints))
    return found
