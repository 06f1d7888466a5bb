"""What the commands print with."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
"""The option that every command has, as its parameter ``as_json``."""
_NO_TERMINAL = 10_000
"""Columns of a file or pipe: lines are not broken there."""


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Two columns: a name and what there is to say of it."""
    print_table((), rows)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows below the names of their columns, if these have any."""
    table = Table(*columns, box=None, show_header=bool(columns), padding=(0, 0, 0, 2))
    for row in rows:
        # As text: brackets in it are no markup.
        table.add_row(*(Text(cell) for cell in row))
    show(table)


def show(table: Table) -> None:
    """A table on standard output; lines are broken to fit a terminal and nothing else."""
    if sys.stdout.isatty():
        Console(highlight=False).print(table)
        return
    written = io.StringIO()
    Console(file=written, width=_NO_TERMINAL, highlight=False, force_terminal=False).print(table)
    for line in written.getvalue().splitlines():
        print(line.rstrip())


def print_json(value: Any) -> None:
    """What a command found, on standard output and nothing beside it."""
    print(json.dumps(value, indent=2))


def one_line(error: object) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def quiet(*, as_json: bool = False) -> Iterator[None]:
    """SGLang and its dependencies warn at length when imported; a report is about the plugin.

    ``as_json``: what is printed inside goes to standard error, so that standard output is JSON alone.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), json_alone(as_json):
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def json_alone(as_json: bool) -> Iterator[None]:
    """With ``as_json``, what is printed inside goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
