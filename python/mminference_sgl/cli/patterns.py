"""``mminference patterns``: which pattern files there are, what they say, whether they are valid, how two differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from mminference_sgl.cli.report import Json, one_line, print_json, print_rows, print_table
from mminference_sgl.method import catalog
from mminference_sgl.method.catalog import MODALITIES, HeadSpec, Ids, PatternFile
from mminference_sgl.method.config import ConfigError

Folder = Annotated[
    str | None,
    typer.Option("--folder", envvar="MMINFERENCE_PATTERNS", help="Folder of pattern files beside the shipped ones."),
]
Named = Annotated[str, typer.Argument(help="Id or path of a pattern file.", show_default=False)]

_Group = tuple[tuple[int, ...], tuple[int, ...], Any]
"""Layers, heads and what holds for all of these."""


def list_all(*, folder: Folder = None, as_json: Json = False) -> int:
    """List the pattern files of the package and of a folder: id, description, model and rules."""
    found = catalog.available(folder or None)
    if as_json:
        print_json([_facts(pattern) for pattern in found])
        return 0
    rows = [(pattern.id, pattern.description, str(pattern.model), str(len(pattern.rules))) for pattern in found]
    print_table(("id", "description", "model", "rules"), rows)
    return 0


def show(name: Named, *, folder: Folder = None, as_json: Json = False) -> int:
    """Show what the layers and heads of a pattern file run, and what it says of itself."""
    pattern = catalog.load(name, folder or None)
    layers, heads = Ids.of("layers", pattern), Ids.of("heads", pattern)
    groups = _groups(layers, heads, pattern.specs)
    if as_json:
        runs = [_placed(group, layers, heads) | asdict(group[2]) for group in groups]
        print_json(_facts(pattern) | {"runs": runs, "measured": list(pattern.measured)})
        return 0
    rows = [(key, _said(value)) for key, value in _facts(pattern).items() if value]
    if pattern.measured:
        rows.append(("measured", _measured(pattern.measured)))
    print_rows(rows)
    print()
    print_table(
        ("layers", "heads", *(f"{query} rows" for query in MODALITIES)),
        [(_label(ls, layers), _label(hs, heads), *(_runs(spec, q) for q in MODALITIES)) for ls, hs, spec in groups],
    )
    return 0


def validate(
    files: Annotated[list[Path], typer.Argument(help="Pattern files.", metavar="FILE...", show_default=False)],
    *,
    as_json: Json = False,
) -> int:
    """Check pattern files: the schema, and what it cannot say. Exits with 1 when one is refused."""
    problems = [_problem(file) for file in files]
    pairs = zip(files, problems, strict=True)
    if as_json:
        print_json([{"file": str(file), "ok": not problem, "error": problem} for file, problem in pairs])
    else:
        print_rows([("refused", problem) if problem else ("ok", str(file)) for file, problem in pairs])
    return 1 if any(problems) else 0


def diff(one: Named, other: Named, *, folder: Folder = None, as_json: Json = False) -> int:
    """Tell which layers and heads of two pattern files differ, and how, and which settings."""
    a, b = (catalog.load(name, folder or None) for name in (one, other))
    layers, heads = Ids.of("layers", a, b), Ids.of("heads", a, b)

    def both(layer: int, some: Sequence[int]) -> list[tuple[HeadSpec, HeadSpec]]:
        return list(zip(a.specs(layer, some), b.specs(layer, some), strict=True))

    runs = [group for group in _groups(layers, heads, both) if group[2][0] != group[2][1]]
    facts = {
        f"{part}.{key}": pair
        for part in ("model", "config")
        for key, pair in _differences(_flat(getattr(a, part)), _flat(getattr(b, part))).items()
    }
    if as_json:
        pairs = [_placed(group, layers, heads) | _sides(asdict(group[2][0]), asdict(group[2][1])) for group in runs]
        print_json({"runs": pairs, "settings": {key: _sides(*pair) for key, pair in facts.items()}})
        return 0
    if not runs and not facts:
        print("no difference")
        return 0
    if runs:
        rows = [
            (_label(ls, layers), _label(hs, heads), query, _runs(x, query), _runs(y, query))
            for ls, hs, (x, y) in runs
            for query in MODALITIES
            if x.of(query) != y.of(query)
        ]
        print_table(("layers", "heads", "rows", a.id, b.id), rows)
    if facts:
        print_table(("setting", a.id, b.id), [(key, _said(x), _said(y)) for key, (x, y) in facts.items()])
    return 0


def _problem(file: Path) -> str:
    """What is wrong with a file; nothing if it is valid."""
    try:
        pattern = catalog.read(file)
        heads = Ids.of("heads", pattern).ids
        for layer in Ids.of("layers", pattern).ids:
            pattern.specs(layer, heads)
    except FileNotFoundError:
        return f"{file}: no such file; mminference patterns list tells which are shipped"
    except ConfigError as error:
        return one_line(error)
    return ""


def _groups(layers: Ids, heads: Ids, values: Callable[[int, Sequence[int]], Sequence[Any]]) -> list[_Group]:
    """Layers and heads with equal values together: layers with equal rows, and within these heads."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for layer in layers.ids:
        rows.setdefault(tuple(values(layer, heads.ids)), []).append(layer)
    groups: list[_Group] = []
    for row, alike in rows.items():
        by_value: dict[Any, list[int]] = {}
        for head, value in zip(heads.ids, row, strict=True):
            by_value.setdefault(value, []).append(head)
        groups += [(tuple(alike), tuple(some), value) for value, some in by_value.items()]
    return groups


def _label(some: Sequence[int], among: Ids) -> str:
    """Ids in few words: ``all``, ``0-3, 7``, ``2, others``."""
    if len(some) == len(among.ids):
        return "all"
    others = among.others and some[-1] == among.ids[-1]
    numbers = some[:-1] if others else some
    # Neighbours have the same distance from their place in the list.
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda entry: entry[1] - entry[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join([*words, "others"] if others else words)


def _placed(group: _Group, layers: Ids, heads: Ids) -> dict[str, list[int | str]]:
    """Layers and heads of a group for JSON."""
    found: dict[str, list[int | str]] = {}
    for name, some, among in (("layers", group[0], layers), ("heads", group[1], heads)):
        others = among.others and some[-1] == among.ids[-1]
        found[name] = [*some[:-1], "others"] if others else list(some)
    return found


def _runs(spec: HeadSpec, query: str) -> str:
    """What a head runs for a query modality."""
    on = spec.of(query)
    return on[0] if on[0] == on[1] else ", ".join(f"{p} on {key}" for p, key in zip(on, MODALITIES, strict=True))


def _facts(pattern: PatternFile) -> dict[str, Any]:
    """What a file says of itself."""
    return {
        "id": pattern.id,
        "description": pattern.description,
        "file": pattern.source,
        "model": {key: value for key, value in asdict(pattern.model).items() if value is not None},
        "rules": len(pattern.rules),
        "config": dict(pattern.config),
        "provenance": dict(pattern.provenance),
    }


def _measured(entries: Sequence[Mapping[str, Any]]) -> str:
    """Mean and largest of what was measured."""
    said = [f"{len(entries)} heads"]
    for key in ("error", "mass", "density"):
        values = [entry[key] for entry in entries if key in entry]
        if values:
            said.append(f"{key} {sum(values) / len(values):.4g} in the mean, {min(values):.4g} to {max(values):.4g}")
    return "; ".join(said)


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in _flat(value).items())
    return "" if value is None else str(value)


def _flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Settings by dotted key; lists by their length."""
    if not isinstance(settings, Mapping):
        settings = {key: value for key, value in asdict(settings).items() if value is not None}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{path}{key}.")
        else:
            found[path + key] = len(value) if isinstance(value, list) else value
    return found


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in (*a, *(b.keys() - a.keys())) if a.get(key) != b.get(key)}


def _sides(a: Any, b: Any) -> dict[str, Any]:
    return {"a": a, "b": b}
