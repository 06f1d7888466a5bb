"""Pattern files: finds, loads and validates them, and resolves them to one head spec per layer and head.

The schema is described in patterns/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mminference_sgl.method.config import ConfigError

PATTERNS = ("dense", "a_shape", "vertical_slash", "grid", "auto")
MODALITIES = ("text", "media")
SCHEMA = 1
_FOLDER = Path(__file__).parents[1] / "patterns"


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
class PatternFile:
    """A validated pattern file. ``config``: settings it brings along."""

    id: str
    rules: tuple[Rule, ...]
    config: Mapping[str, Any]

    def spec(self, layer: int, head: int) -> HeadSpec:
        """The head spec of a layer and head, both global ids."""
        entries: dict[str, str] = {}
        for rule in self.rules:
            if (rule.layers is None or layer in rule.layers) and (rule.heads is None or head in rule.heads):
                entries.update({f"{query}_{key}": pattern for (query, key), pattern in rule.entries.items()})
        return HeadSpec(**entries)

    def specs(self, layer: int, heads: Sequence[int]) -> list[HeadSpec]:
        """Head specs of several heads of a layer.

        Raises:
            ConfigError: the rules combine to something that cannot be run.
        """
        found = [self.spec(layer, head) for head in heads]
        for head, spec in zip(heads, found, strict=True):
            _check_spec(spec, f"pattern {self.id!r}, layer {layer}, head {head}")
        return found


def load(name: str) -> PatternFile:
    """Loads a pattern by id (a file of the package) or by path.

    Raises:
        ConfigError: there is no such file, or it does not follow the schema; the message names the place.
    """
    path = _FOLDER / f"{name}.json"
    if "/" in name or name.endswith(".json"):
        path = Path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no pattern {name!r}: neither a file nor one of {', '.join(ids())}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"pattern file {path}: {error}") from None
    return parse(content, str(path))


def ids() -> list[str]:
    """Ids of the patterns that the package brings."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def parse(content: Any, source: str) -> PatternFile:
    """Validates the content of a pattern file; ``source`` names it in messages.

    Raises:
        ConfigError: it does not follow the schema.
    """
    _require(isinstance(content, dict), source, "must be a JSON object")
    unknown = set(content) - {"schema", "id", "description", "heads", "config", "model", "provenance", "measured"}
    _require(not unknown, source, f"unknown keys {sorted(unknown)}")
    _require(content.get("schema") == SCHEMA, source, f"schema must be {SCHEMA}, got {content.get('schema')!r}")
    _require(isinstance(content.get("id"), str), source, "id must be a string")
    heads, config = content.get("heads"), content.get("config", {})
    _require(isinstance(heads, list), source, "heads must be a list of rules")
    _require(isinstance(config, dict), source, "config must be an object")
    _require("pattern" not in config, source, "config must not name a pattern")
    rules = tuple(_rule(rule, f"{source}, heads[{index}]") for index, rule in enumerate(heads))
    return PatternFile(content["id"], rules, config)


def _rule(rule: Any, source: str) -> Rule:
    _require(isinstance(rule, dict), source, "must be an object")
    unknown = set(rule) - {"layers", "heads", "map"}
    _require(not unknown, source, f"unknown keys {sorted(unknown)}")
    mapping = rule.get("map")
    _require(isinstance(mapping, dict), source, "map must be an object")
    entries: dict[tuple[str, str], str] = {}
    # An entry for one key modality overrides that for all, whatever their order in the file.
    for pair, pattern in sorted(mapping.items(), key=lambda entry: "->" in entry[0]):
        query, arrow, key = pair.partition("->")
        keys = (key,) if arrow else MODALITIES
        known = query in MODALITIES and all(item in MODALITIES for item in keys)
        _require(known, source, f"map key {pair!r} must be text, media or query->key of these")
        _require(pattern in PATTERNS, source, f"{pair}: unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")
        entries.update({(query, item): pattern for item in keys})
    return Rule(_ids(rule, "layers", source), _ids(rule, "heads", source), entries)


def _ids(rule: Mapping[str, Any], name: str, source: str) -> frozenset[int] | None:
    if name not in rule:
        return None
    values = rule[name]
    ok = isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
    _require(ok, source, f"{name} must be a list of non-negative integers, got {values!r}")
    return frozenset(values)


def _check_spec(spec: HeadSpec, source: str) -> None:
    for query in MODALITIES:
        on_text, on_media = spec.of(query)
        _require(query == "media" or "grid" not in (on_text, on_media), source, "grid is for media rows only")
        _require(
            (on_text == "auto") == (on_media == "auto"),
            source,
            f"auto decides about all keys of {query} rows and cannot be mixed with {on_text!r} / {on_media!r}",
        )
        _require(on_text != "grid" or on_media == "grid", source, "grid on text keys needs grid on media keys")


def _require(ok: bool, source: str, message: str) -> None:
    if not ok:
        raise ConfigError(f"{source}: {message}")
