"""README's table of models against the server tests."""

from __future__ import annotations

from pathlib import Path

import tiny_models
from readme import served_by

ROOT = Path(__file__).parents[2]
SERVER_TESTS = "".join(file.read_text() for file in sorted((ROOT / "tests" / "server").glob("test_*.py")))


def test_every_checkpoint_is_in_the_table_and_asked_on_a_server():
    named = [name for names in served_by().values() for name in names]
    assert sorted(named) == sorted(tiny_models.BUILDERS)
    assert [name for name in named if f'"{name}"' not in SERVER_TESTS] == []
