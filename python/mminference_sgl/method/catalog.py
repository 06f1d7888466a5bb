"""Pattern files: finds, loads and validates them, and resolves them to one head spec per layer and head.

patterns/README.md describes them, patterns/schema.json is their schema; here is what a schema cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

from mminference_sgl.method import files, schema
from mminference_sgl.method.config import ConfigError, from_sources

PATTERNS = ("dense", "a_shape", "vertical_slash", "grid", "auto")
MODALITIES = ("text", "media")
DEFAULT = "auto"
SEARCHED = "searched"
"""Names the pattern that is for the served model, whatever its id."""
_FOLDERS = (schema.FILE.parent, schema.FILE.parent / "models")
"""Of the package's files: those for any model, and those that were searched for one."""


@dataclass(frozen=True)
class HeadSpec:
    """What one head does: a map (query modality, key modality) -> pattern."""

    text_text: str = "dense"
    text_media: str = "dense"
    media_text: str = "auto"
    media_media: str = "auto"

    def of(self, query: str) -> tuple[str, str]:
        """Patterns of a query modality's rows for (text keys, media keys)."""
        return (self.text_text, self.text_media) if query == "text" else (self.media_text, self.media_media)


@dataclass(frozen=True)
class Rule:
    """Overrides for some layers and heads; ``None`` means all of them. ``entries``: (query, key) -> pattern."""

    layers: frozenset[int] | None
    heads: frozenset[int] | None
    entries: Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class Model:
    """What is known of a model; in a pattern file, what it was made for. ``None``: nothing is said.

    ``id``: as a server's ``--model-path`` names it. Heads are counted over all tensor-parallel ranks.
    """

    id: str | None = None
    architecture: str | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    def __str__(self) -> str:
        """All that is said, in one line."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return ", ".join(f"{name} {value}" for name, value in said.items()) or "any model"

    def differences(self, served: Model) -> list[str]:
        """Where both say something and not the same, ids aside: ids find files, the shape says whether they fit."""
        return [
            f"{name} is {said} in the file and {found} in the model"
            for (name, said), found in zip(asdict(self).items(), astuple(served), strict=True)
            if name != "id" and said is not None and found is not None and said != found
        ]

    def named(self, served: Model) -> bool:
        """Whether the served model's id, or the last part of its path, is the one that the file names."""
        return self.id is not None and served.id is not None and self.id in {served.id, Path(served.id).name}

    def shaped(self, served: Model) -> bool:
        """Whether the file names architecture, layers and heads, and they are those of the served model."""
        needed = self.architecture, self.layers, self.heads
        return None not in needed and needed == (served.architecture, served.layers, served.heads)


@dataclass(frozen=True)
class PatternFile:
    """A validated pattern file.

    ``config``: settings it brings along. ``provenance`` and ``measured``: how it was made, for readers alone.
    ``source``: where it was read.
    """

    id: str
    rules: tuple[Rule, ...]
    config: Mapping[str, Any]
    description: str = ""
    model: Model = Model()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    source: str = field(default="", compare=False, repr=False)

    def spec(self, layer: int, head: int) -> HeadSpec:
        """The head spec of a layer and head, both global ids."""
        return self._resolve(layer, [head])[0]

    def specs(self, layer: int, heads: Sequence[int]) -> list[HeadSpec]:
        """Head specs of several heads of a layer.

        Raises:
            ConfigError: the rules combine to something that cannot be run.
        """
        found = self._resolve(layer, heads)
        for head, spec in zip(heads, found, strict=True):
            _check_spec(spec, f"pattern {self.id!r}, layer {layer}, head {head}")
        return found

    def check(self, served: Model) -> None:
        """Checks that the file is for a model.

        Raises:
            ConfigError: it is for another one, or has rules for layers or heads that the model lacks.
        """
        differences = self.model.differences(served)
        if differences:
            remedy = f"name a pattern that is for {served.architecture or 'it'}, or {DEFAULT!r}"
            raise ConfigError(f"pattern {self.id!r} is for another model: {'; '.join(differences)}; {remedy}")
        _check_ids(self, served, f"pattern {self.id!r}", "the model")

    def _resolve(self, layer: int, heads: Sequence[int]) -> list[HeadSpec]:
        rules = [rule for rule in self.rules if rule.layers is None or layer in rule.layers]
        found = []
        for head in heads:
            entries: dict[str, str] = {}
            for rule in rules:
                if rule.heads is None or head in rule.heads:
                    entries.update({f"{query}_{key}": pattern for (query, key), pattern in rule.entries.items()})
            found.append(HeadSpec(**entries))
        return found


@dataclass(frozen=True)
class Ids:
    """Layers, or heads, that show all that rules do. ``others``: the last stands for all that no rule names."""

    ids: tuple[int, ...]
    others: bool

    @classmethod
    def of(cls, name: str, *patterns: PatternFile) -> Ids:
        """The ``layers`` or ``heads`` of the model, where a file says how many it has, else those that rules name."""
        counts = [count for pattern in patterns if (count := getattr(pattern.model, name)) is not None]
        if counts:
            return cls(tuple(range(min(counts))), others=False)
        named = {item for pattern in patterns for rule in pattern.rules for item in getattr(rule, name) or ()}
        return cls((*sorted(named), max(named, default=-1) + 1), others=True)


def load(name: str, folder: str | None = None, served: Model | None = None) -> PatternFile:
    """Loads a pattern by path, by id, or, named ``searched``, the one that is for the served model.

    Args:
        name: what the configuration's ``pattern`` says.
        folder: pattern files beside the shipped ones.
        served: the model that ``searched`` is about.

    Raises:
        ConfigError: there is no such file, or it does not follow the schema; the message names the place.
    """
    if name == SEARCHED:
        return _searched(available(folder), served or Model(), folder)
    if "/" in name or name.endswith(".json"):
        try:
            return read(Path(name))
        except FileNotFoundError:
            found = {}
    else:
        found = {pattern.id: pattern for pattern in available(folder)}
    if name not in found:
        raise ConfigError(f"no pattern {files.shown(name)}: neither a file nor one of {', '.join(ids(folder))}")
    return found[name]


def read(path: Path) -> PatternFile:
    """Reads one file.

    Raises:
        FileNotFoundError: it does not exist.
        ConfigError: it cannot be read or does not follow the schema.
    """
    try:
        content = json.loads(files.read_text(path), parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"pattern file {path}: {error}") from None
    return parse(content, str(path))


def available(folder: str | None = None) -> list[PatternFile]:
    """The patterns that the package brings and those of a folder, by id.

    Raises:
        ConfigError: the folder is none, a file does not follow the schema, or two have one id.
    """
    folders = [*_FOLDERS] if folder is None else [*_FOLDERS, Path(folder)]
    if folder is not None and not folders[-1].is_dir():
        raise ConfigError(
            f"pattern_folder {files.shown(folder)} is no folder: name one with pattern files, or leave it out"
        )
    found: dict[str, PatternFile] = {}
    for path in dict.fromkeys(file.resolve() for place in folders for file in sorted(place.glob("*.json"))):
        if path.name == schema.FILE.name:
            continue
        pattern = read(path)
        if pattern.id in found:
            both = f"{found[pattern.id].source} and {path}"
            raise ConfigError(f"two pattern files have the id {pattern.id!r}: {both}; rename one")
        found[pattern.id] = pattern
    return [found[name] for name in sorted(found)]


def ids(folder: str | None = None) -> list[str]:
    """Ids of the patterns that there are."""
    return [pattern.id for pattern in available(folder)]


def parse(content: Any, source: str) -> PatternFile:
    """Validates the content of a pattern file; ``source`` names it in messages.

    Raises:
        ConfigError: it does not follow the schema, or says what a schema cannot refuse.
    """
    schema.check(content, source)
    config = content.get("config", {})
    from_sources((f"{source}: config", config))
    pattern = PatternFile(
        id=content["id"],
        rules=tuple(_rule(rule) for rule in content["heads"]),
        config=config,
        description=content.get("description", ""),
        model=Model(**content.get("model", {})),
        provenance=content.get("provenance", {}),
        measured=tuple(content.get("measured", ())),
        source=source,
    )
    _check_ids(pattern, pattern.model, source, "model")
    places: dict[tuple[int, int], int] = {}
    for index, entry in enumerate(pattern.measured):
        first = places.setdefault((entry["layer"], entry["head"]), index)
        if first != index:
            where = f"layer {entry['layer']}, head {entry['head']}"
            raise ConfigError(f"{source}: measured[{index}] is {where}, as measured[{first}] is; leave one out")
    return pattern


def _searched(patterns: Sequence[PatternFile], served: Model, folder: str | None) -> PatternFile:
    """The one pattern that is for a model: by the model's id, else by its architecture and shape.

    Those of the folder come before those of the package.
    """
    fitting = [pattern for pattern in patterns if not pattern.model.differences(served)]
    for fits in (Model.named, Model.shaped):
        found = [pattern for pattern in fitting if fits(pattern.model, served)]
        own = [pattern for pattern in found if folder and Path(pattern.source).parent == Path(folder).resolve()]
        found = own or found
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(pattern.id for pattern in found)
            raise ConfigError(
                f"pattern {SEARCHED!r}: several are for this model ({served}): {several}; name one of them"
            )
    there = "; ".join(f"{pattern.id} ({pattern.model})" for pattern in patterns)
    where = "the package" if folder is None else f"the package and {folder}"
    remedy = f"name a pattern, or {DEFAULT!r}, or a folder with one for this model in MMINFERENCE_PATTERNS"
    raise ConfigError(
        f"pattern {SEARCHED!r}: none in {where} is for this model ({served}); there are {there}; {remedy}"
    )


def _rule(rule: Mapping[str, Any]) -> Rule:
    entries: dict[tuple[str, str], str] = {}
    # An entry for one key modality overrides that for all, whatever their order in the file.
    for pair, pattern in sorted(rule["map"].items(), key=lambda entry: "->" in entry[0]):
        query, arrow, key = pair.partition("->")
        entries.update({(query, item): pattern for item in ((key,) if arrow else MODALITIES)})
    layers, heads = (frozenset(rule[name]) if name in rule else None for name in ("layers", "heads"))
    return Rule(layers, heads, entries)


def _check_ids(pattern: PatternFile, model: Model, source: str, owner: str) -> None:
    """Refuses layers and heads that a model lacks, where it says how many it has."""
    named = [
        (f"heads[{index}].{name}", name, ids)
        for index, rule in enumerate(pattern.rules)
        for name, ids in (("layers", rule.layers), ("heads", rule.heads))
    ] + [
        (f"measured[{index}].{name}", f"{name}s", {entry[name]})
        for index, entry in enumerate(pattern.measured)
        for name in ("layer", "head")
    ]
    for place, name, values in named:
        count = getattr(model, name)
        largest = max(values or (), default=0)
        if count is not None and largest >= count:
            raise ConfigError(f"{source}: {place} names {largest}, {owner} has {count} {name}: 0 to {count - 1}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of two entries with one key Python would drop the first."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {files.shown(key)} is there twice in one object")
        found[key] = value
    return found


def _check_spec(spec: HeadSpec, source: str) -> None:
    for query in MODALITIES:
        on_text, on_media = spec.of(query)
        if query == "text" and "grid" in {on_text, on_media}:
            raise ConfigError(f"{source}: grid is for media rows only")
        if (on_text == "auto") != (on_media == "auto"):
            mixed = f"{on_text!r} / {on_media!r}"
            raise ConfigError(f"{source}: auto decides about all keys of {query} rows and cannot be mixed with {mixed}")
        if on_text == "grid" and on_media != "grid":
            raise ConfigError(f"{source}: grid on text keys needs grid on media keys")
