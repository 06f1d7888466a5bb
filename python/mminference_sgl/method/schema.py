"""What a JSON Schema says of pattern files, and its findings as one line: the place, what must be there, the value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

from mminference_sgl.method.config import ConfigError
from mminference_sgl.method.files import shown

FILE = Path(__file__).parents[1] / "patterns" / "schema.json"


def check(content: Any, source: str) -> None:
    """Checks the content of a pattern file; ``source`` names it in messages.

    Raises:
        ConfigError: it does not follow the schema; of several findings the outermost is told.
    """
    found = sorted(_validator().iter_errors(content), key=lambda error: len(error.absolute_path))
    if found:
        raise ConfigError(f"{source}: {_message(found[0])}")


@cache
def _validator() -> Any:
    def is_integer(_checker: object, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    # JSON Schema takes 1.0 for an integer.
    checker = Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer)
    strict = extend(Draft202012Validator, type_checker=checker)
    return strict(json.loads(FILE.read_text(encoding="utf-8")))


def _message(error: ValidationError) -> str:
    """The place, what must be there, and what is.

    Every part of the schema has a description that continues "must be".
    """
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in error.absolute_path).lstrip(".")
    schema: Mapping[str, Any] = error.schema
    if error.validator == "required":
        missing = next(key for key in schema["required"] if key not in error.instance)
        return f"{place}{'.' if place else ''}{missing} is missing, it must be {_described(schema, missing)}"
    if error.validator == "additionalProperties":
        known = sorted(schema["properties"])
        unknown = sorted(set(error.instance) - set(known))
        near = [match for key in unknown for match in get_close_matches(key, known, n=1)]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        return f"{place or 'the file'} has unknown keys {unknown}; known keys: {', '.join(known)}{hint}"
    if "propertyNames" in error.absolute_schema_path:
        return f"{place} key {shown(error.instance)} must be {schema['description']}"
    return f"{place or 'the file'} must be {schema['description']}, got {shown(error.instance)}"


def _described(schema: Mapping[str, Any], key: str) -> str:
    part = schema["properties"][key]
    if "$ref" in part:
        part = _validator().schema["$defs"][part["$ref"].rpartition("/")[2]]
    return str(part["description"])
