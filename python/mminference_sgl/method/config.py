"""Configuration: one frozen dataclass; environment > server JSON > pattern file > defaults.

Every source is a mapping with the same keys. Unknown keys and bad values raise :class:`ConfigError`, whose message
names the source, the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mminference_sgl.method import files

IMPLEMENTATIONS = ("auto", "reference", "torch", "triton", "fa4")
ENV_CONFIG = "MMINFERENCE_CONFIG"
ENV_DISABLE = "MMINFERENCE_DISABLE"
ENV_SHORTHANDS = {
    "MMINFERENCE_MIN_TOKENS": "min_tokens",
    "MMINFERENCE_PATTERN": "pattern",
    "MMINFERENCE_PATTERNS": "pattern_folder",
    "MMINFERENCE_IMPL": "implementation",
    "MMINFERENCE_FRAME_STRIDE": "frame_stride",
}
_INTEGERS = ("min_tokens", "frame_stride")
SERVER_JSON_KEY = "mminference"
TILE_SIZES = (16, 32, 64, 128)
LARGEST_ERROR = 1000.0
"""As much as any."""
LARGEST_INTEGER = 1 << 30
"""No sequence is longer, and sums of two still fit the int32 that positions have on the device."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the operator."""


@dataclass(frozen=True)
class AShapeBudget:
    """A-shape: the first ``sink`` keys and the last ``window`` keys, the row's own included."""

    sink: int = 128
    window: int = 4096


@dataclass(frozen=True)
class VerticalSlashBudget:
    """Vertical-slash: always the first ``sink`` keys and the last ``window`` ones; columns and diagonals by mass."""

    sink: int = 64
    window: int = 64


@dataclass(frozen=True)
class GridBudget:
    """Grid: ``sink`` keys, ``window`` keys or up to ``window_frames`` frames, own cells, ``min_lines`` v-line tiles."""

    sink: int = 64
    window: int = 64
    window_frames: int = 1
    min_lines: int = 0


@dataclass(frozen=True)
class PatternBudgets:
    """Budgets per pattern."""

    a_shape: AShapeBudget = field(default_factory=AShapeBudget)
    vertical_slash: VerticalSlashBudget = field(default_factory=VerticalSlashBudget)
    grid: GridBudget = field(default_factory=GridBudget)


@dataclass(frozen=True)
class Config:
    """All settings of one server, fixed for its life. docs/configuration.md says what each does."""

    enabled: bool = True
    min_tokens: int | None = None
    dense_above: float | None = None
    pattern: str = "auto"
    pattern_folder: str | None = None
    implementation: str = "auto"
    error: float = 0.07
    text_error: float = 0.01
    error_ceiling: float | None = None
    max_density: float = 1.0
    probe_rows: int = 256
    tile_queries: int = 0
    tile_keys: int = 64
    cell_size: int = 0
    frame_stride: int = 0
    sharing: bool = True
    patterns: PatternBudgets = field(default_factory=PatternBudgets)

    def __post_init__(self) -> None:
        """Checks every value.

        Raises:
            ConfigError: a value is of the wrong type or out of range.
        """
        _check(isinstance(self.enabled, bool), "enabled", self.enabled, "true or false")
        if self.min_tokens is not None:
            _check_int("min_tokens", self.min_tokens, 0)
        if self.dense_above is not None:
            _check_float("dense_above", self.dense_above, 0.0, 1.0)
        named = isinstance(self.pattern, str) and self.pattern != ""  # type: ignore[redundant-expr]
        _check(named, "pattern", self.pattern, "an id, a path, searched, auto or off")
        folder = self.pattern_folder
        named = folder is None or (isinstance(folder, str) and folder != "")  # type: ignore[redundant-expr]
        _check(named, "pattern_folder", folder, "null or the path of a folder")
        _check(
            self.implementation in IMPLEMENTATIONS,
            "implementation",
            self.implementation,
            "one of "
            + ", ".join(IMPLEMENTATIONS)
            + " (fa4 has replaced flashinfer)" * (self.implementation == "flashinfer"),
        )
        _check_float("error", self.error, 0.0, LARGEST_ERROR)
        _check_float("text_error", self.text_error, 0.0, LARGEST_ERROR)
        if self.error_ceiling is not None:
            _check_float("error_ceiling", self.error_ceiling, 0.0, None)
        _check_float("max_density", self.max_density, 0.0, 1.0)
        _check_int("probe_rows", self.probe_rows, 1)
        for name, sizes in (("tile_queries", (0, *TILE_SIZES)), ("tile_keys", TILE_SIZES)):
            value = getattr(self, name)
            _check(type(value) is int and value in sizes, name, value, "one of " + ", ".join(map(str, sizes)))
        _check_int("cell_size", self.cell_size, 0)
        _check_int("frame_stride", self.frame_stride, 0)
        _check(isinstance(self.sharing, bool), "sharing", self.sharing, "true or false")
        for pattern in dataclasses.fields(self.patterns):
            budget = getattr(self.patterns, pattern.name)
            for item in dataclasses.fields(budget):
                _check_int(f"patterns.{pattern.name}.{item.name}", getattr(budget, item.name), 0)

    def for_chunks(self, chunk_tokens: int, smallest: int) -> Config:
        """The configuration with ``tile_queries`` filled in for prefill chunks of this many tokens (0: no chunks).

        A query tile of the cell pass reads its own cells, which are ``tile_queries / chunk_tokens`` of a frame, so the
        tiles of small chunks are small: 1/64 of the chunk, at least ``smallest``, which is what a device is fast at.
        """
        if self.tile_queries:
            return self
        fitting = [size for size in TILE_SIZES if smallest <= size and (not chunk_tokens or 64 * size <= chunk_tokens)]
        return dataclasses.replace(self, tile_queries=max(fitting, default=smallest))

    def bound(self, modality: str) -> float:
        """Largest error of a layer's output over rows of a modality that selection allows, relative to it."""
        return self.error if modality == "media" else min(self.error, self.text_error)

    def ceiling(self, modality: str) -> float:
        """The error of a layer beyond which heads are computed again, densely."""
        if self.error_ceiling is not None:
            return self.error_ceiling
        # Where nothing is left out there is rounding to see.
        return self.bound(modality) or math.inf

    @property
    def active(self) -> bool:
        """Whether any request may run sparse."""
        return self.enabled and self.pattern != "off"


def from_sources(*sources: tuple[str, Mapping[str, Any]]) -> Config:
    """Builds a configuration; later sources override earlier ones.

    Args:
        sources: (name for messages, settings), weakest first.

    Raises:
        ConfigError: an unknown key or a bad value; the message starts with the name of its source.
    """
    config = Config()
    for name, settings in sources:
        try:
            config = _replace(config, settings, "")
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    return config


def server_source(hf_config: object) -> tuple[str, Mapping[str, Any]]:
    """Settings given as ``--json-model-override-args '{"mminference": {...}}'``, found on the model's ``hf_config``.

    Raises:
        ConfigError: they are not an object.
    """
    name = f"--json-model-override-args {SERVER_JSON_KEY}"
    settings = getattr(hf_config, SERVER_JSON_KEY, None)
    if settings is None:
        return name, {}
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{name}: must be an object, got {files.shown(settings)}")
    return name, settings


def environment_sources(environ: Mapping[str, str] | None = None) -> list[tuple[str, Mapping[str, Any]]]:
    """Settings from the environment, weakest first: MMINFERENCE_CONFIG, the shorthands, MMINFERENCE_DISABLE.

    Raises:
        ConfigError: MMINFERENCE_CONFIG is neither JSON nor a readable JSON file, or a shorthand is not of its type.
    """
    environ = os.environ if environ is None else environ
    sources: list[tuple[str, Mapping[str, Any]]] = []
    inline = environ.get(ENV_CONFIG, "").strip()
    if inline:
        sources.append((ENV_CONFIG, _json_or_path(inline)))
    for variable, key in ENV_SHORTHANDS.items():
        text = environ.get(variable, "").strip()
        if text:
            sources.append((variable, {key: _integer(variable, text) if key in _INTEGERS else text}))
    disable = environ.get(ENV_DISABLE, "").strip().lower()
    if disable not in {"", "0", "false", "no", "1", "true", "yes"}:
        raise ConfigError(f"{ENV_DISABLE}: must be 0 or 1, got {files.shown(disable)}")
    if disable in {"1", "true", "yes"}:
        sources.append((ENV_DISABLE, {"enabled": False}))
    return sources


def _json_or_path(text: str) -> Mapping[str, Any]:
    if not text.startswith("{"):
        try:
            text = files.read_text(Path(text))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{ENV_CONFIG}: neither a JSON object nor a readable file: {error}") from None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{ENV_CONFIG}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{ENV_CONFIG}: must be a JSON object, got {files.shown(settings)}")
    return settings


def _integer(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{variable}: must be an integer, got {files.shown(text)}") from None


def _replace(target: Any, settings: Mapping[str, Any], path: str) -> Any:
    """``dataclasses.replace`` with unknown keys refused and nested objects merged."""
    known = {item.name for item in dataclasses.fields(target)}
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"unknown key {files.shown(path + key)}; known keys: {', '.join(sorted(known))}")
        current = getattr(target, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path + key} must be an object, got {files.shown(value)}")
            changes[key] = _replace(current, value, f"{path}{key}.")
        else:
            changes[key] = value
    return dataclasses.replace(target, **changes)


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {wanted}, got {files.shown(value)}")


def _check_int(name: str, value: object, low: int) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= LARGEST_INTEGER
    _check(ok, name, value, f"an integer of at least {low} and at most {LARGEST_INTEGER}")


def _check_float(name: str, value: object, low: float, high: float | None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = number and low <= float(value) and (high is None or float(value) <= high)  # type: ignore[arg-type]
    _check(ok, name, value, f"a number of at least {low}" + ("" if high is None else f" and at most {high}"))
