"""Checks that the tree's layers hold: each part of the package uses only what stands below it, and nothing is a circle.

Part of ``make lint``. Reads imports from the sources, lazy ones and those for types included, as a reader would:

- ``python/mminference_sgl`` with the kernels it ships: :data:`LAYERS`, no circle between modules, and SGLang only where
  :data:`WITHOUT_SGLANG` does not forbid it;
- ``benchmarks``: no circle;
- ``rust/core``: no circle between the modules of the crate.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mminference_sgl"

LAYERS = (
    "plugin",
    "run",
    "cli",
    "testing",
    "model_plugin",
    "processors",
    "models",
    "portable",
    "backend",
    "method",
    "kernels",
    "_core",
    "",
)
"""Parts of the package from top to bottom; "" is the package's own ``__init__``."""
WITHOUT_SGLANG = ("method", "kernels")
"""Parts that know neither SGLang nor models."""

Graph = dict[str, set[str]]


def python_files(folder: Path) -> dict[str, Path]:
    """Dotted name below the folder's parent -> file; through the links by which the package ships top-level folders."""
    found = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            found |= {f"{folder.name}.{name}": file for name, file in python_files(child).items()}
        elif child.suffix in {".py", ".pyi"}:
            stem = child.stem
            found[folder.name if stem == "__init__" else f"{folder.name}.{stem}"] = child
    return found


def imported(file: Path, module: str) -> Iterator[str]:
    """Dotted names that a file imports: of a ``from a import b`` both ``a`` and ``a.b``."""
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(filter(None, (*parts[: len(parts) - node.level + 1], node.module)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def python_graph(folder: Path) -> tuple[Graph, Graph]:
    """Modules of a folder that each of them imports, and everything else that they import."""
    files = python_files(folder)
    names = {module: set(imported(file, module)) for module, file in files.items()}
    # `from package import module` names the package too, which it does not need beyond being its parent.
    inner = {
        module: {name for name in found & files.keys() if name != module and not module.startswith(f"{name}.")}
        for module, found in names.items()
    }
    for module, found in inner.items():
        parents = {name for name in found if any(other.startswith(f"{name}.") for other in found)}
        inner[module] = found - parents
    return inner, {module: found - files.keys() for module, found in names.items()}


def rust_graph(folder: Path) -> Graph:
    """Modules of a crate whose items each of them names, comments aside."""
    code = {
        file.stem: re.sub(r"//.*", "", file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("*.rs"))
        if file.stem != "lib"
    }
    return {name: set(re.findall(r"\bcrate::([a-z_]+)", text)) & code.keys() - {name} for name, text in code.items()}


def part_of(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def problems() -> Iterator[str]:
    """One line per import that a layer forbids, and per circle."""
    package, outside = python_graph(ROOT / "python" / PACKAGE)
    for module, found in package.items():
        part = part_of(module)
        if part not in LAYERS:
            yield f"{module}: {part!r} is in no layer; name it in LAYERS of {Path(__file__).name}"
            continue
        for name in sorted(found):
            if part_of(name) in LAYERS and LAYERS.index(part_of(name)) < LAYERS.index(part):
                yield f"{module} imports {name}, which stands above it"
        if part in WITHOUT_SGLANG and any(name.split(".")[0] == "sglang" for name in outside[module]):
            yield f"{module} imports SGLang, which {part}/ does not know"
    benchmarks, _ = python_graph(ROOT / "benchmarks")
    for graph in (package, benchmarks, rust_graph(ROOT / "rust" / "core" / "src")):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            yield "circle: " + " -> ".join(reversed(error.args[1]))


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    found = list(problems())
    print("\n".join(found) or "layers hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
