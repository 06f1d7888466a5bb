"""The `mminference` command.

A command is a function that takes its options as annotated parameters and returns the exit status; its docstring is its
help. One line in :data:`COMMANDS` adds it. What is slow to import, SGLang and PyTorch, it imports in its body.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from mminference_sgl import __version__
from mminference_sgl.cli import check_model, doctor, heavy, patterns
from mminference_sgl.cli.report import one_line
from mminference_sgl.method.config import ConfigError

NAME = "mminference"
COMMANDS: dict[str, Callable[..., int]] = {
    "doctor": doctor.run,
    "check-model": check_model.run,
    "inspect": heavy.inspect,
    "plot": heavy.plot,
    "bench": heavy.bench,
    "search": heavy.search,
    "patterns list": patterns.list_all,
    "patterns show": patterns.show,
    "patterns validate": patterns.validate,
    "patterns diff": patterns.diff,
}
"""What is typed -> what runs."""
GROUPS = {"patterns": "List, show, check and compare pattern files."}
"""First words of commands of two."""
EXIT_CODES = "Exit codes: 0 ok, 1 broken or refused, 2 wrong usage."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        return int(_app()(args=arguments, prog_name=NAME, standalone_mode=False) or 0)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        path = NAME if context is None else context.command_path
        return _refuse(f"{one_line(error.format_message()).rstrip('.')}; see {path} --help", error.exit_code)
    except ConfigError as error:
        return _refuse(one_line(error), 1)


def _refuse(problem: str, status: int) -> int:
    print(f"{NAME}: {problem}", file=sys.stderr)
    return status


def _app() -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.callback(epilog=EXIT_CODES)(_options)
    groups = {name: typer.Typer(help=text, epilog=EXIT_CODES) for name, text in GROUPS.items()}
    for name, run in COMMANDS.items():
        group, _, command = name.rpartition(" ")
        (groups[group] if group else app).command(command, epilog=EXIT_CODES)(run)
    for name, group_app in groups.items():
        app.add_typer(group_app, name=name)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mminference-sgl {__version__}")
        raise typer.Exit


def _options(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Sparse multimodal prefill for SGLang."""
