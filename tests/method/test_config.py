"""Configuration: what each key accepts, which source wins, and what the operator reads when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mminference_sgl.method.catalog import Model
from mminference_sgl.method.config import (
    IMPLEMENTATIONS,
    LARGEST_ERROR,
    LARGEST_INTEGER,
    Config,
    ConfigError,
    GridBudget,
    PatternBudgets,
    environment_sources,
    from_sources,
    server_source,
)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("MMINFERENCE_")]:
        monkeypatch.delenv(variable)


NOT_INTEGERS: tuple[Any, ...] = (True, False, 1.5, "64", None, [1], {})
NOT_NUMBERS: tuple[Any, ...] = (True, "0.5", None, [0.5], {})
TILE_SIZES = (16, 32, 64, 128)

GOOD: dict[str, tuple[Any, ...]] = {
    "enabled": (True, False),
    "min_tokens": (None, 0, 1, 1000, LARGEST_INTEGER),
    "dense_above": (None, 0, 0.6, 1),
    "pattern": ("auto", "off", "grid", "/some/file.json", "searched"),
    "pattern_folder": (None, "/some/folder", "patterns"),
    "implementation": IMPLEMENTATIONS,
    "error": (0, 0.0, 0.5, 1, LARGEST_ERROR),
    "text_error": (0, 0.0, 0.5, 1, LARGEST_ERROR),
    "error_ceiling": (None, 0, 0.05, 1, 1000.0, float("inf")),
    "max_density": (0, 0.08, 1, 1.0),
    "probe_rows": (1, 63, LARGEST_INTEGER),
    "tile_queries": (0, *TILE_SIZES),
    "tile_keys": TILE_SIZES,
    "cell_size": (0, 1, 17, LARGEST_INTEGER),
    "frame_stride": (0, 196, LARGEST_INTEGER),
    "sharing": (True, False),
    "patterns.a_shape.sink": (0, 111, LARGEST_INTEGER),
    "patterns.a_shape.window": (0, 111, LARGEST_INTEGER),
    "patterns.vertical_slash.sink": (0, 111, LARGEST_INTEGER),
    "patterns.vertical_slash.window": (0, 111, LARGEST_INTEGER),
    "patterns.grid.sink": (0, 111, LARGEST_INTEGER),
    "patterns.grid.window": (0, 111, LARGEST_INTEGER),
    "patterns.grid.window_frames": (0, 3),
    "patterns.grid.min_lines": (0, 111, LARGEST_INTEGER),
}
"""Values that each key accepts; both bounds where there are any."""

NATURAL = (-1, LARGEST_INTEGER + 1, *NOT_INTEGERS)
SHARE = (-0.01, 1.01, 2, float("nan"), float("inf"), *NOT_NUMBERS)

BAD: dict[str, tuple[Any, ...]] = {
    "enabled": (1, 0, "true", None),
    "min_tokens": tuple(value for value in NATURAL if value is not None),
    "dense_above": tuple(value for value in SHARE if value is not None),
    "pattern": ("", None, 5, True, ["grid"], {"id": "grid"}),
    "pattern_folder": ("", 5, True, ["patterns"]),
    "implementation": ("", "cuda", "Torch", None, 1, ["torch"]),
    "error": (-0.01, LARGEST_ERROR + 1, float("nan"), float("inf"), *NOT_NUMBERS),
    "text_error": (-0.01, LARGEST_ERROR + 1, float("nan"), float("inf"), *NOT_NUMBERS),
    "error_ceiling": (-0.01, float("nan"), float("-inf"), *(x for x in NOT_NUMBERS if x is not None)),
    "max_density": SHARE,
    "probe_rows": (0, *NATURAL),
    "tile_queries": (8, 48, 256, -64, 64.0, *NOT_INTEGERS),
    "tile_keys": (0, 8, 48, 256, -64, 64.0, *NOT_INTEGERS),
    "cell_size": NATURAL,
    "frame_stride": NATURAL,
    "sharing": (0, 1, "true", None),
    "patterns.a_shape.sink": NATURAL,
    "patterns.a_shape.window": NATURAL,
    "patterns.vertical_slash.sink": NATURAL,
    "patterns.vertical_slash.window": NATURAL,
    "patterns.grid.sink": NATURAL,
    "patterns.grid.window": NATURAL,
    "patterns.grid.window_frames": NATURAL,
    "patterns.grid.min_lines": NATURAL,
}
"""Values that each key refuses."""


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting of a configuration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}{field.name}.")
        else:
            yield path + field.name, value


def nested(key: str, value: Any) -> dict[str, Any]:
    """A settings mapping that holds one dotted key."""
    *parents, last = key.split(".")
    settings = {last: value}
    for part in reversed(parents):
        settings = {part: settings}
    return settings


def pairs(table: Mapping[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}={value!r}") for key, values in table.items() for value in values]


# -- single keys -------------------------------------------------------------------------------------------------------


def test_every_key_has_good_and_bad_values_here() -> None:
    keys = {key for key, _ in leaves(Config())}
    assert set(GOOD) == keys
    assert set(BAD) == keys


def test_defaults_are_valid_and_active() -> None:
    config = Config()
    assert config == from_sources()
    assert config.active


@pytest.mark.parametrize(("key", "value"), pairs(GOOD))
def test_accepts(key: str, value: Any) -> None:
    config = from_sources(("somewhere", nested(key, value)))
    expected = dict(leaves(Config())) | {key: value}
    assert dict(leaves(config)) == expected


@pytest.mark.parametrize(("key", "value"), pairs(BAD))
def test_refuses_and_names_source_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        from_sources(("somewhere", nested(key, value)))
    message = str(caught.value)
    assert message.startswith(f"somewhere: {key} must be ")
    assert message.endswith(f", got {value!r}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("enabled", 1, "true or false"),
        ("min_tokens", -1, f"an integer of at least 0 and at most {LARGEST_INTEGER}"),
        ("probe_rows", 0, f"an integer of at least 1 and at most {LARGEST_INTEGER}"),
        ("implementation", "cuda", "one of auto, reference, torch, triton, fa4"),
        ("implementation", "flashinfer", "one of auto, reference, torch, triton, fa4 (fa4 has replaced flashinfer)"),
        ("max_density", 1.5, "a number of at least 0.0 and at most 1.0"),
        ("error_ceiling", -1, "a number of at least 0.0"),
        ("tile_keys", 65, "one of 16, 32, 64, 128"),
    ],
)
def test_message_says_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^here: {key} must be {re.escape(allowed)}, got {re.escape(repr(value))}$"):
        from_sources(("here", {key: value}))


@pytest.mark.parametrize("value", [3, "grid", None, [], True], ids=repr)
@pytest.mark.parametrize("key", ["patterns", "patterns.grid"])
def test_nested_settings_must_be_objects(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^here: {key} must be an object, got {re.escape(repr(value))}$"):
        from_sources(("here", nested(key, value)))


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("errror", "cell_size, dense_above, enabled, error"),
        ("", "cell_size, dense_above, enabled, error"),
        ("active", "cell_size, dense_above, enabled, error"),
        ("patterns.dense", "a_shape, grid, vertical_slash"),
        ("patterns.grid.windows", "min_lines, sink, window, window_frames"),
        ("patterns.a_shape.window_frames", "sink, window"),
    ],
)
def test_unknown_keys_are_named_with_their_path_and_the_known_ones(key: str, known: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_sources(("here", nested(key, 1)))
    assert str(caught.value).startswith(f"here: unknown key {key!r}; known keys: {known}")


def test_one_bad_key_among_good_ones_is_enough() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'patterns\.grid\.lines'"):
        from_sources(("here", {"error": 0.9, "patterns": {"grid": {"sink": 1, "lines": 2}}}))


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().error = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "active"),
    [
        ({}, True),
        ({"enabled": False}, False),
        ({"pattern": "off"}, False),
        ({"pattern": "dense"}, True),
        ({"enabled": False, "pattern": "grid"}, False),
    ],
    ids=str,
)
def test_active(settings: dict[str, Any], active: bool) -> None:
    assert from_sources(("here", settings)).active is active


# -- several sources ---------------------------------------------------------------------------------------------------


def test_later_sources_override_earlier_ones_key_by_key() -> None:
    config = from_sources(
        ("weak", {"error": 0.5, "min_tokens": 1, "patterns": {"grid": {"sink": 1, "min_lines": 1}}}),
        ("middle", {"error": 0.6, "patterns": {"grid": {"sink": 2}, "a_shape": {"sink": 2}}}),
        ("strong", {"error": 0.7}),
    )
    assert (config.error, config.min_tokens) == (0.7, 1)
    assert config.patterns.grid == GridBudget(sink=2, min_lines=1)
    assert config.patterns.a_shape.sink == 2
    assert config.patterns.vertical_slash == PatternBudgets().vertical_slash


def test_a_bad_value_is_an_error_even_where_a_stronger_source_overrides_it() -> None:
    with pytest.raises(ConfigError, match=r"^weak: error must be .* got -2$"):
        from_sources(("weak", {"error": -2}), ("strong", {"error": 0.5}))


def test_a_bad_value_is_blamed_on_its_own_source() -> None:
    with pytest.raises(ConfigError, match=r"^strong: max_density must be"):
        from_sources(("weak", {"error": 0.5}), ("strong", {"max_density": "all"}))


@pytest.fixture
def pattern_file(tmp_path: Path) -> Path:
    """A pattern file that brings four settings along."""
    path = tmp_path / "mine.json"
    settings = {"error": 0.11, "max_density": 0.21, "probe_rows": 31, "cell_size": 41}
    path.write_text(json.dumps({"schema": 1, "id": "mine", "heads": [], "config": settings}))
    return path


def test_environment_beats_server_json_beats_pattern_file_beats_defaults(
    pattern_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mminference_sgl.backend.start import load_config

    server = {"pattern": str(pattern_file), "error": 0.12, "max_density": 0.22, "min_tokens": 12}
    monkeypatch.setenv("MMINFERENCE_CONFIG", json.dumps({"error": 0.13}))
    config, pattern = load_config(SimpleNamespace(mminference=server))
    assert pattern.id == "mine"
    assert config.error == 0.13, "the environment is strongest"
    assert config.max_density == 0.22, "the server's JSON beats the pattern file"
    assert config.probe_rows == 31, "the pattern file beats the defaults"
    assert config.tile_keys == Config().tile_keys
    assert config.pattern == str(pattern_file)


def test_the_pattern_of_the_strongest_source_is_the_one_whose_settings_count(
    pattern_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mminference_sgl.backend.start import load_config

    monkeypatch.setenv("MMINFERENCE_PATTERN", "grid")
    config, pattern = load_config(SimpleNamespace(mminference={"pattern": str(pattern_file)}))
    assert pattern.id == "grid"
    assert config.error == Config().error


def test_a_bad_setting_in_a_pattern_file_names_the_pattern(pattern_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mminference_sgl.backend.start import load_config

    content = json.loads(pattern_file.read_text())
    content["config"] = {"error": "most"}
    pattern_file.write_text(json.dumps(content))
    monkeypatch.setenv("MMINFERENCE_PATTERN", str(pattern_file))
    with pytest.raises(ConfigError, match=r"/mine\.json: config: error must be .* got 'most'$"):
        load_config(SimpleNamespace())


def test_a_pattern_for_the_served_model_is_found_in_the_folder(
    pattern_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mminference_sgl.backend.start import load_config

    shape = {"architecture": "Qwen", "layers": 4, "heads": 8}
    pattern_file.write_text(json.dumps(json.loads(pattern_file.read_text()) | {"model": shape}))
    monkeypatch.setenv("MMINFERENCE_PATTERN", "searched")
    with pytest.raises(ConfigError, match=r"^pattern 'searched': none in the package is for this model"):
        load_config(SimpleNamespace(), Model(**shape))
    monkeypatch.setenv("MMINFERENCE_PATTERNS", str(pattern_file.parent))
    config, pattern = load_config(SimpleNamespace(), Model(**shape))
    assert pattern.id == "mine"
    assert config.error == 0.11
    monkeypatch.setenv("MMINFERENCE_PATTERN", "mine")
    with pytest.raises(
        ConfigError, match=r"^pattern 'mine' is for another model: layers is 4 in the file and 5 in the"
    ):
        load_config(SimpleNamespace(), Model(**shape | {"layers": 5}))


def test_pattern_off_needs_no_file_and_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    from mminference_sgl.backend.start import load_config

    monkeypatch.setenv("MMINFERENCE_PATTERN", "off")
    config, _ = load_config(SimpleNamespace())
    assert config.pattern == "off"
    assert not config.active


# -- server JSON -------------------------------------------------------------------------------------------------------


def test_server_source_reads_the_model_configuration() -> None:
    name, settings = server_source(SimpleNamespace(mminference={"error": 0.5}))
    assert name == "--json-model-override-args mminference"
    assert settings == {"error": 0.5}


@pytest.mark.parametrize("hf_config", [SimpleNamespace(), SimpleNamespace(mminference=None), object()], ids=str)
def test_server_source_without_settings_is_empty(hf_config: object) -> None:
    assert server_source(hf_config)[1] == {}


@pytest.mark.parametrize("value", ["grid", "", 5, 0, True, False, ["error"], []], ids=repr)
def test_server_source_must_be_an_object(value: Any) -> None:
    expected = re.escape(f"--json-model-override-args mminference: must be an object, got {value!r}")
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        server_source(SimpleNamespace(mminference=value))


def test_a_bad_server_setting_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--json-model-override-args mminference: unknown key 'covrage'"):
        from_sources(server_source(SimpleNamespace(mminference={"covrage": 1})))


# -- environment -------------------------------------------------------------------------------------------------------


def configured(**environ: str) -> Config:
    return from_sources(*environment_sources(environ))


def test_an_empty_environment_has_no_sources() -> None:
    assert environment_sources({}) == []
    blank = {"MMINFERENCE_CONFIG": " ", "MMINFERENCE_DISABLE": "", "MMINFERENCE_PATTERN": "  ", "COVERAGE": "0.1"}
    assert environment_sources(blank) == []


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMINFERENCE_MIN_TOKENS", "77")
    assert from_sources(*environment_sources()).min_tokens == 77


def test_mminference_config_inline() -> None:
    config = configured(MMINFERENCE_CONFIG=' {"error": 0.5, "patterns": {"grid": {"min_lines": 3}}}\n')
    assert (config.error, config.patterns.grid.min_lines) == (0.5, 3)


def test_mminference_config_path(tmp_path: Path) -> None:
    path = tmp_path / "settings with space.json"
    path.write_text('\n{"error": 0.25}')
    assert configured(MMINFERENCE_CONFIG=str(path)).error == 0.25


@pytest.mark.parametrize("text", ['{"error": 0.5', "{error: 0.5}", "{} {}", '{"error": .5}'])
@pytest.mark.parametrize("as_file", [False, True], ids=["inline", "file"])
def test_mminference_config_that_is_not_json(text: str, as_file: bool, tmp_path: Path) -> None:
    value = text
    if as_file:
        (tmp_path / "c.json").write_text(text)
        value = str(tmp_path / "c.json")
    with pytest.raises(ConfigError, match=r"^MMINFERENCE_CONFIG: not valid JSON: .*line 1") as caught:
        configured(MMINFERENCE_CONFIG=value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "5", '"grid"', "null", "true"])
def test_mminference_config_file_must_hold_an_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^MMINFERENCE_CONFIG: must be a JSON object, got "):
        configured(MMINFERENCE_CONFIG=str(tmp_path / "c.json"))


def test_mminference_config_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for value in (tmp_path / "missing.json", tmp_path, binary, "[1]", "x" * 5000):
        with pytest.raises(ConfigError, match=r"^MMINFERENCE_CONFIG: neither a JSON object nor a readable file: "):
            configured(MMINFERENCE_CONFIG=str(value))


def test_a_bad_key_in_mminference_config_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"^MMINFERENCE_CONFIG: unknown key 'patterns.grid.x'"):
        configured(MMINFERENCE_CONFIG='{"patterns": {"grid": {"x": 1}}}')


def test_shorthands_set_their_keys() -> None:
    config = configured(MMINFERENCE_MIN_TOKENS=" 123 ", MMINFERENCE_PATTERN=" grid ", MMINFERENCE_IMPL="reference")
    assert config == Config(min_tokens=123, pattern="grid", implementation="reference")


def test_shorthands_beat_mminference_config() -> None:
    inline = '{"min_tokens": 1, "pattern": "dense", "implementation": "torch", "error": 0.5}'
    shorthands = {"MMINFERENCE_MIN_TOKENS": "2", "MMINFERENCE_PATTERN": "grid", "MMINFERENCE_IMPL": "reference"}
    config = configured(MMINFERENCE_CONFIG=inline, **shorthands)
    assert config == Config(min_tokens=2, pattern="grid", implementation="reference", error=0.5)


@pytest.mark.parametrize("value", ["many", "1.5", "1e3", "0x10", "true"])
def test_min_tokens_shorthand_must_be_an_integer(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^MMINFERENCE_MIN_TOKENS: must be an integer, got '{value}'$"):
        configured(MMINFERENCE_MIN_TOKENS=value)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MMINFERENCE_MIN_TOKENS", "-1", "min_tokens must be an integer of at least 0 and at most 1073741824, got -1"),
        ("MMINFERENCE_IMPL", "cuda", "implementation must be one of .*, got 'cuda'"),
    ],
)
def test_a_bad_shorthand_names_its_variable(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{variable}: {message}$"):
        configured(**{variable: value})


@pytest.mark.parametrize("value", ["1", "true", "yes", "TRUE", " Yes "])
def test_disable_beats_everything(value: str) -> None:
    assert not configured(MMINFERENCE_CONFIG='{"enabled": true}', MMINFERENCE_DISABLE=value).enabled


@pytest.mark.parametrize("value", ["", "0", "false", "no", "NO", "  "])
def test_disable_off_leaves_the_setting_alone(value: str) -> None:
    assert configured(MMINFERENCE_DISABLE=value).enabled
    assert not configured(MMINFERENCE_CONFIG='{"enabled": false}', MMINFERENCE_DISABLE=value).enabled


@pytest.mark.parametrize("value", ["2", "on", "off", "disable", "-1"])
def test_disable_with_another_value_is_an_error(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^MMINFERENCE_DISABLE: must be 0 or 1, got '{value}'$"):
        configured(MMINFERENCE_DISABLE=value)


# -- documentation -----------------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_documentation_has_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len({key for key, _ in rows})
    assert {key: json.loads(default) for key, default in rows} == dict(leaves(Config()))


def test_the_documentation_examples_are_accepted() -> None:
    examples = re.findall(r"--json-model-override-args '(.*?)'", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert examples
    for example in examples:
        settings = json.loads(example)
        assert set(settings) == {"mminference"}
        from_sources(server_source(SimpleNamespace(**settings)))
    for inline in re.findall(r"MMINFERENCE_CONFIG='(.*?)'", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL):
        configured(MMINFERENCE_CONFIG=inline)


@pytest.mark.parametrize(
    ("chunk", "smallest", "expected"),
    [
        (0, 16, 128),
        (8192, 16, 128),
        (8191, 16, 64),
        (2048, 16, 32),
        (2048, 64, 64),
        (509, 16, 16),
        (1 << 20, 64, 128),
    ],
)
def test_query_tiles_are_a_64th_of_the_chunk(chunk: int, smallest: int, expected: int) -> None:
    assert Config().for_chunks(chunk, smallest).tile_queries == expected
    assert Config(tile_queries=32).for_chunks(chunk, smallest).tile_queries == 32
