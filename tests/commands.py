"""Shell commands of the documentation: which there are, and whether what they name exists."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "patterns/README.md",
]
_BLOCK = re.compile(r"(?:<!-- needs: ([^>]*?) -->\s*)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("make", "mminference", "python", "pip", "export", "pre-commit", "docker", "cargo")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Command:
    """One command: its page, its words without the program's folder and variables before it, and what it needs."""

    page: str
    words: tuple[str, ...]
    needs: str

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands(page: Path) -> Iterator[Command]:
    """All commands of a page's code blocks; blocks of other languages and of output have none."""
    for needs, language, text in _BLOCK.findall(page.read_text()):
        if language in {"bash", "sh", "console"}:
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True) if _is_command(line) else []
                while words and _ASSIGNMENT.match(words[0]):
                    words = words[1:]
                if words:
                    words[0] = words[0].removeprefix(".venv/bin/")
                    yield Command(page.name, tuple(words), needs)


def _is_command(line: str) -> bool:
    first = [word for word in line.split() if not _ASSIGNMENT.match(word)][:1]
    return bool(first) and first[0].removeprefix(".venv/bin/") in _PROGRAMS


def targets() -> set[str]:
    """Of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def unknown_options(command: str | Command) -> list[str]:
    """Options that the program of a command does not have; of programs of this repository, SGLang and make."""
    words = list(command.words) if isinstance(command, Command) else shlex.split(command)
    if "--" in words:
        words = words[: words.index("--")]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[0] == "make":
        return _unknown_to_make(words[1:])
    if words[0] == "mminference":
        return sorted(given - _options_of_mminference(words[1:]))
    if words[:2] == ["python", "-m"]:
        if words[2].partition(".")[0] not in ("benchmarks", "examples", "mminference_sgl", "sglang"):
            return []
        known = _options_of_module(words[2])
        # argparse takes beginnings, such as --tp.
        return sorted(option for option in given if not any(name.startswith(option) for name in known))
    if words[0] == "python" and not (ROOT / words[1]).is_file():
        return [words[1]]
    return []


def _unknown_to_make(words: list[str]) -> list[str]:
    """Targets that there are not, and options in BENCH_ARGS and its like that their module does not have."""
    named = [word for word in words if not _ASSIGNMENT.match(word)]
    unknown = [word for word in named if word not in targets()]
    recipes = (ROOT / "Makefile").read_text()
    for word in words:
        if word.startswith(("BENCH_ARGS=", "DEMO_ARGS=")):
            modules = re.findall(rf"^{named[0]}:.*\n\t.* -m (benchmarks\S*)", recipes, re.MULTILINE)
            given = [option for option in word.partition("=")[2].split() if option.startswith("--")]
            known = {option for module in modules for option in _options_of_module(module)}
            unknown += [option for option in given if option not in known]
    return unknown


@functools.cache
def _options_of_sglang() -> frozenset[str]:
    import argparse

    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return frozenset(parser._option_string_actions)


def _options_of_module(module: str) -> frozenset[str]:
    """As far as they are in its source; of one that only hands on, those of SGLang's server."""
    if module.startswith(("sglang.launch_server", "mminference_sgl.run")):
        return _options_of_sglang()
    if module.startswith("sglang"):
        import importlib.util

        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return frozenset()
        return frozenset(re.findall(r'"(--[\w-]+)"', Path(spec.origin).read_text()))
    path = ROOT / Path(*module.split("."))
    sources = [path.with_suffix(".py"), path / "__main__.py"]
    text = "".join(source.read_text() for source in sources if source.is_file())
    return frozenset(re.findall(r'"(--[\w-]+)"', text)) if text else frozenset()


def _options_of_mminference(words: list[str]) -> set[str]:
    import typer.main

    from mminference_sgl import cli

    command = typer.main.get_command(cli._app())
    for word in words:
        subcommands = getattr(command, "commands", {})
        if word not in subcommands:
            break
        command = subcommands[word]
    return {"--help", *(option for parameter in command.params for option in parameter.opts)}
