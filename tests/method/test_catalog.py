"""Pattern files: the shipped ones, the schema, and how rules resolve to head specs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mminference_sgl.method import catalog
from mminference_sgl.method.catalog import MODALITIES, PATTERNS, HeadSpec, PatternFile, load, parse
from mminference_sgl.method.config import Config, ConfigError, from_sources

SHIPPED = Path(__file__).parents[2] / "patterns"
CONCRETE = [pattern for pattern in PATTERNS if pattern != "auto"]


def content(*rules: Any, **more: Any) -> dict[str, Any]:
    return {"schema": 1, "id": "mine", "heads": list(rules), **more}


def pattern_of(*maps: dict[str, str]) -> PatternFile:
    """A pattern file with one rule per map, each for all layers and heads."""
    return parse(content(*({"map": entries} for entries in maps)), "mine.json")


# -- shipped files -----------------------------------------------------------------------------------------------------


def test_ids_are_the_shipped_files() -> None:
    assert catalog.ids() == sorted(path.stem for path in SHIPPED.glob("*.json"))
    assert {"auto", "dense", "a_shape", "vertical_slash", "grid"} <= set(catalog.ids())


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.json")))
def test_shipped_file_loads_and_resolves(name: str) -> None:
    pattern = load(name)
    assert pattern.id == name
    from_sources((name, pattern.config))
    specs = pattern.specs(63, range(128))
    assert len(specs) == 128
    assert json.loads((SHIPPED / f"{name}.json").read_text())["description"].endswith(".")


@pytest.mark.parametrize(
    ("name", "text", "media"),
    [
        ("auto", "dense", "auto"),
        ("dense", "dense", "dense"),
        ("a_shape", "dense", "a_shape"),
        ("grid", "dense", "grid"),
        ("vertical_slash", "vertical_slash", "vertical_slash"),
    ],
)
def test_what_the_shipped_patterns_mean(name: str, text: str, media: str) -> None:
    spec = load(name).spec(5, 3)
    assert spec.of("text") == (text, text)
    assert spec.of("media") == (media, media)


def test_the_default_pattern_is_shipped() -> None:
    assert Config().pattern in catalog.ids()


# -- finding files -----------------------------------------------------------------------------------------------------


def test_load_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "grid.json").write_text(json.dumps(content({"map": {"media": "a_shape"}})))
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "grid.json"), "./grid.json", "grid.json"):
        assert load(name).id == "mine"
    assert load("grid").id == "grid", "a bare id is the package's, whatever the working directory holds"


@pytest.mark.parametrize("name", ["gird", "Grid", "./missing.json", "missing.json", "no/such/file"])
def test_an_unknown_pattern_lists_the_known_ones(name: str) -> None:
    expected = f"no pattern {name!r}: neither a file nor one of {', '.join(catalog.ids())}"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load(name)


@pytest.mark.parametrize("data", [b"{", b"", b"\xff\xfe", b"{'schema': 1}"], ids=repr)
def test_a_file_that_is_not_json_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"^pattern file {re.escape(str(path))}: ."):
        load(str(path))


@pytest.mark.parametrize("name", ["{folder}", "x" * 300], ids=["folder", "too long"])
def test_a_path_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^pattern file .+: "):
        load(name.format(folder=f"{tmp_path}/"))


def test_a_schema_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content({"map": {"media": "griid"}})))
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}, heads\[0\]: media: unknown pattern 'griid'"):
        load(str(path))


# -- schema ------------------------------------------------------------------------------------------------------------


def test_a_full_file() -> None:
    rule = {"layers": [0, 1], "heads": [3], "map": {"media": "grid", "media->text": "dense"}}
    pattern = parse(content(rule, description="one line", config={"error": 0.5}), "mine.json")
    assert pattern.id == "mine"
    assert pattern.config == {"error": 0.5}
    assert [(r.layers, r.heads) for r in pattern.rules] == [(frozenset({0, 1}), frozenset({3}))]
    assert pattern.rules[0].entries == {("media", "media"): "grid", ("media", "text"): "dense"}


def test_config_and_description_may_be_left_out() -> None:
    assert parse(content(), "mine.json") == PatternFile("mine", (), {})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "must be a JSON object"),
        (None, "must be a JSON object"),
        ("grid", "must be a JSON object"),
        (content(title="x", author="y"), "unknown keys ['author', 'title']"),
        ({"id": "x", "heads": []}, "schema must be 1, got None"),
        (content() | {"schema": 2}, "schema must be 1, got 2"),
        (content() | {"schema": "1"}, "schema must be 1, got '1'"),
        ({"schema": 1, "heads": []}, "id must be a string"),
        (content() | {"id": 5}, "id must be a string"),
        ({"schema": 1, "id": "x"}, "heads must be a list of rules"),
        (content() | {"heads": {"map": {}}}, "heads must be a list of rules"),
        (content(config=[]), "config must be an object"),
        (content(config=None), "config must be an object"),
        (content(config={"pattern": "grid"}), "config must not name a pattern"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_refused(bad: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape('mine.json: ' + message)}$"):
        parse(bad, "mine.json")


IDS = "must be a list of non-negative integers, got "


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("grid", "must be an object"),
        ([], "must be an object"),
        ({}, "map must be an object"),
        ({"map": ["media"]}, "map must be an object"),
        ({"map": {}, "layer": [0]}, "unknown keys ['layer']"),
        ({"map": {"video": "grid"}}, "map key 'video' must be text, media or query->key of these"),
        ({"map": {"": "grid"}}, "map key '' must be text, media or query->key of these"),
        ({"map": {"media->": "grid"}}, "map key 'media->' must be text, media or query->key of these"),
        ({"map": {"->media": "grid"}}, "map key '->media' must be text, media or query->key of these"),
        ({"map": {"media -> text": "grid"}}, "map key 'media -> text' must be text, media or query->key of these"),
        ({"map": {"media->text->text": "a_shape"}}, "map key 'media->text->text' must be text, media or "),
        ({"map": {"media": "slash"}}, "media: unknown pattern 'slash'; known: " + ", ".join(PATTERNS)),
        ({"map": {"media->text": "off"}}, "media->text: unknown pattern 'off'; known: "),
        ({"map": {"media": None}}, "media: unknown pattern None; known: "),
        ({"map": {"media": ["grid"]}}, "media: unknown pattern ['grid']; known: "),
        ({"map": {}, "layers": 3}, "layers " + IDS + "3"),
        ({"map": {}, "layers": None}, "layers " + IDS + "None"),
        ({"map": {}, "layers": [0, -1]}, "layers " + IDS + "[0, -1]"),
        ({"map": {}, "layers": ["0"]}, "layers " + IDS + "['0']"),
        ({"map": {}, "heads": [1.0]}, "heads " + IDS + "[1.0]"),
        ({"map": {}, "heads": [True]}, "heads " + IDS + "[True]"),
        ({"map": {}, "heads": "all"}, "heads " + IDS + "'all'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_rule_is_refused_and_located(bad: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(content({"map": {}}, bad), "mine.json")
    assert str(caught.value).startswith(f"mine.json, heads[1]: {message}")


# -- rules -> head specs -----------------------------------------------------------------------------------------------


def test_without_rules_heads_run_the_default() -> None:
    assert pattern_of().spec(0, 0) == HeadSpec("dense", "dense", "auto", "auto")


@pytest.mark.parametrize("key", MODALITIES)
@pytest.mark.parametrize("query", MODALITIES)
def test_an_entry_for_one_pair_changes_that_pair_alone(query: str, key: str) -> None:
    base = {"text": "dense", "media": "dense"}
    spec = pattern_of(base, {f"{query}->{key}": "a_shape"}).spec(0, 0)
    found = {(q, k): spec.of(q)[MODALITIES.index(k)] for q in MODALITIES for k in MODALITIES}
    assert found == {(q, k): "a_shape" if (q, k) == (query, key) else "dense" for q in MODALITIES for k in MODALITIES}


def test_an_entry_for_a_query_modality_covers_all_keys() -> None:
    spec = pattern_of({"media": "grid"}).spec(0, 0)
    assert spec.of("media") == ("grid", "grid")
    assert spec.of("text") == ("dense", "dense")


@pytest.mark.parametrize(
    "entries",
    [{"media": "grid", "media->text": "dense"}, {"media->text": "dense", "media": "grid"}],
    ids=["general first", "special first"],
)
def test_within_a_map_the_special_entry_wins_in_any_order(entries: dict[str, str]) -> None:
    assert pattern_of(entries).spec(0, 0).of("media") == ("dense", "grid")


def test_between_rules_the_later_one_wins_even_if_it_is_less_special() -> None:
    assert pattern_of({"media->text": "dense"}, {"media": "grid"}).spec(0, 0).of("media") == ("grid", "grid")


def test_rules_apply_to_their_layers_and_heads() -> None:
    pattern = parse(
        content(
            {"map": {"media": "grid"}},
            {"layers": [1, 2], "map": {"media": "vertical_slash"}},
            {"heads": [3], "map": {"media": "a_shape"}},
            {"layers": [2], "heads": [3], "map": {"media": "dense"}},
        ),
        "mine.json",
    )
    found = {(layer, head): pattern.spec(layer, head).media_media for layer in range(4) for head in range(5)}
    for (layer, head), media in found.items():
        expected = "vertical_slash" if layer in {1, 2} else "grid"
        expected = "a_shape" if head == 3 else expected
        expected = "dense" if (layer, head) == (2, 3) else expected
        assert media == expected, (layer, head)


def test_an_empty_list_of_layers_or_heads_matches_none() -> None:
    pattern = parse(content({"layers": [], "map": {"media": "grid"}}, {"heads": [], "map": {"media": "dense"}}), "x")
    assert pattern.spec(0, 0).media_media == "auto"


def test_specs_take_global_head_ids() -> None:
    """The second of two ranks with four heads each: its heads are 4 to 7."""
    pattern = parse(content({"map": {"media": "dense"}}, {"heads": [1, 6], "map": {"media": "grid"}}), "x")
    assert [spec.media_media for spec in pattern.specs(0, range(4))] == ["dense", "grid", "dense", "dense"]
    assert [spec.media_media for spec in pattern.specs(0, range(4, 8))] == ["dense", "dense", "grid", "dense"]


@pytest.mark.parametrize("on_media", PATTERNS)
@pytest.mark.parametrize("on_text", PATTERNS)
@pytest.mark.parametrize("query", MODALITIES)
def test_which_patterns_mix(query: str, on_text: str, on_media: str) -> None:
    pattern = pattern_of({f"{query}->text": on_text, f"{query}->media": on_media})
    mixed_auto = (on_text == "auto") != (on_media == "auto")
    grid_on_text_rows = query == "text" and "grid" in {on_text, on_media}
    half_grid = on_text == "grid" and on_media != "grid"
    if mixed_auto or grid_on_text_rows or half_grid:
        with pytest.raises(ConfigError):
            pattern.specs(0, [0])
    else:
        assert pattern.specs(0, [0])[0].of(query) == (on_text, on_media)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"text": "grid"}, "grid is for media rows only"),
        ({"text->media": "grid"}, "grid is for media rows only"),
        ({"text->text": "grid", "text->media": "dense"}, "grid is for media rows only"),
        (
            {"media->text": "dense", "media->media": "auto"},
            "auto decides about all keys of media rows and cannot be mixed with 'dense' / 'auto'",
        ),
        (
            {"text->text": "auto"},
            "auto decides about all keys of text rows and cannot be mixed with 'auto' / 'dense'",
        ),
        ({"media->text": "grid", "media->media": "dense"}, "grid on text keys needs grid on media keys"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_impossible_mix_names_pattern_layer_and_head(entries: dict[str, str], message: str) -> None:
    pattern = parse(content({"layers": [7], "heads": [6], "map": entries}), "mine.json")
    assert len(pattern.specs(6, range(4, 8))) == 4
    assert len(pattern.specs(7, [4, 5, 7])) == 3
    expected = f"pattern 'mine', layer 7, head 6: {message}"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        pattern.specs(7, range(4, 8))


def test_a_mix_that_only_two_rules_together_make_is_found() -> None:
    pattern = pattern_of({"media": "auto"}, {"media->text": "dense"})
    with pytest.raises(ConfigError, match="auto decides about all keys of media rows"):
        pattern.specs(0, [0])


@pytest.mark.parametrize("on_media", CONCRETE)
def test_text_and_media_rows_resolve_on_their_own(on_media: str) -> None:
    spec = pattern_of({"text": "a_shape", "media": on_media}).specs(0, [0])[0]
    assert spec == HeadSpec("a_shape", "a_shape", on_media, on_media)
