"""Pattern files: the shipped ones, the schema, and how rules resolve to head specs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from mminference_sgl.method import catalog, files
from mminference_sgl.method.catalog import MODALITIES, PATTERNS, HeadSpec, Ids, Model, PatternFile, load, parse
from mminference_sgl.method.config import Config, ConfigError, from_sources

FOLDER = Path(__file__).parents[2] / "patterns"
ANY_MODEL = sorted(path.stem for path in FOLDER.glob("*.json") if path.name != "schema.json")
SHIPPED = sorted([*ANY_MODEL, *(f"{path.stem}-searched" for path in FOLDER.glob("models/*.json"))])
CONCRETE = [pattern for pattern in PATTERNS if pattern != "auto"]


def content(*rules: Any, **more: Any) -> dict[str, Any]:
    return {"schema": 1, "id": "mine", "heads": list(rules), **more}


def pattern_of(*maps: dict[str, str]) -> PatternFile:
    """A pattern file with one rule per map, each for all layers and heads."""
    return parse(content(*({"map": entries} for entries in maps)), "mine.json")


# -- shipped files -----------------------------------------------------------------------------------------------------


def test_ids_are_the_shipped_files() -> None:
    assert catalog.ids() == SHIPPED
    assert {"auto", "dense", "a_shape", "vertical_slash", "grid"} <= set(catalog.ids())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_loads_and_resolves(name: str) -> None:
    pattern = load(name)
    assert pattern.id == name
    from_sources((name, pattern.config))
    layer, heads = (pattern.model.layers or 64) - 1, pattern.model.heads or 128
    assert len(pattern.specs(layer, range(heads))) == heads
    assert pattern.description.endswith(".")


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


@pytest.mark.parametrize(
    "name", ["gird", "Grid", "schema", "x" * 300, "./missing.json", "missing.json", "no/such/file"]
)
def test_an_unknown_pattern_lists_the_known_ones(name: str) -> None:
    expected = f"no pattern {files.shown(name)}: neither a file nor one of {', '.join(catalog.ids())}"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load(name)


@pytest.mark.parametrize(
    "data",
    [b"{", b"", b"\xff\xfe", b"{'schema': 1}", b'{"schema": NaN}', b'{"id": "a", "id": "b"}', b"[" * 100_000],
    ids=["brace", "empty", "utf-16", "quotes", "NaN", "twins", "deep"],
)
def test_a_file_that_is_not_json_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"^pattern file {re.escape(str(path))}: ."):
        load(str(path))


@pytest.mark.parametrize("name", ["{folder}", "x" * 300 + ".json"], ids=["folder", "too long"])
def test_a_path_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^pattern file .+: "):
        load(name.format(folder=f"{tmp_path}/"))


def test_a_schema_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content({"map": {"media": "griid"}})))
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: heads\[0\]\.map\.media must be .*, got 'griid'$"):
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


NOT_OBJECT = "the file must be a JSON object, got "
ID = "id must be a string that is not empty, other than off and searched, got "
CONFIG = "config must be an object of configuration keys other than pattern and pattern_folder, got "


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], NOT_OBJECT + "[]"),
        (None, NOT_OBJECT + "None"),
        ("grid", NOT_OBJECT + "'grid'"),
        (content(modle={}, author="y"), "the file has unknown keys ['author', 'modle']; known keys: config, descr"),
        (content(modle={}), "the file has unknown keys ['modle']; known keys: config, description, heads, id, me"),
        ({"id": "x", "heads": []}, "schema is missing, it must be 1, the version of the schema"),
        (content() | {"schema": 2}, "schema must be 1, the version of the schema, got 2"),
        (content() | {"schema": "1"}, "schema must be 1, the version of the schema, got '1'"),
        (content() | {"schema": True}, "schema must be 1, the version of the schema, got True"),
        ({"schema": 1, "heads": []}, "id is missing, it must be a string that is not empty, "),
        (content() | {"id": 5}, ID + "5"),
        (content() | {"id": ""}, ID + "''"),
        (content() | {"id": "off"}, ID + "'off'"),
        (content() | {"id": "searched"}, ID + "'searched'"),
        (content(description=1), "description must be a string, got 1"),
        ({"schema": 1, "id": "x"}, "heads is missing, it must be a list of rules"),
        (content() | {"heads": {"map": {}}}, "heads must be a list of rules, got {'map': {}}"),
        (content(config=[]), CONFIG + "[]"),
        (content(config=None), CONFIG + "None"),
        (
            content(config={"pattern": "grid"}),
            "config.pattern must be left out: a pattern file does not name another, g",
        ),
        (content(config={"pattern_folder": "x"}), "config.pattern_folder must be left out: a pattern file does not na"),
        (
            content(config={"eror": 0.5}),
            "config: unknown key 'eror'; known keys: cell_size, dense_above, enabled, error, ",
        ),
        (content(config={"error": -1}), "config: error must be a number of at least 0.0 and at most 1000.0, got -1"),
        (content(model=[]), "model must be an object, got []"),
        (
            content(model={"layer": 28}),
            "model has unknown keys ['layer']; known keys: architecture, head_dim, heads, id",
        ),
        (content(model={"layers": "28"}), "model.layers must be an integer of at least 1, got '28'"),
        (content(model={"heads": 0}), "model.heads must be an integer of at least 1, got 0"),
        (content(model={"id": ""}), "model.id must be a string that is not empty, got ''"),
        (content(provenance={"when": 1}), "provenance has unknown keys ['when']; known keys: clips, combine, date"),
        (content(provenance={"clips": [{"tokens": 5}]}), "provenance.clips[0].sha256 is missing, it must be 64 hexade"),
        (
            content(provenance={"clips": [{"sha256": "0" * 64}]}),
            "provenance.clips[0].tokens is missing, it must be an i",
        ),
        (content(provenance={"clips": [{"sha256": "abc", "tokens": 1}]}), "provenance.clips[0].sha256 must be 64 hexa"),
        (
            content(provenance={"density": 1.5}),
            "provenance.density must be a number of at least 0 and at most 1, got 1.5",
        ),
        (
            content(provenance={"date": "May"}),
            "provenance.date must be a date such as 2026-01-31, with or without a ti",
        ),
        (content(measured=[{"layer": 0}]), "measured[0].head is missing, it must be a non-negative integer"),
        (
            content(measured=[{"layer": 0, "head": 0, "error": -0.5}]),
            "measured[0].error must be a number of at least 0",
        ),
        (
            content(measured=[{"layer": 3, "head": 1}, {"layer": 3, "head": 2}, {"layer": 3, "head": 1}]),
            "measured[2] is layer 3, head 1, as measured[0] is; leave one out",
        ),
        (
            content({"layers": [27, 28], "map": {}}, model={"layers": 28}),
            "heads[0].layers names 28, model has 28 layers: 0 to 27",
        ),
        (
            content({"map": {}}, {"heads": [4], "map": {}}, model={"heads": 4}),
            "heads[1].heads names 4, model has 4 heads: 0 to 3",
        ),
        (
            content(model={"layers": 2}, measured=[{"layer": 2, "head": 9}]),
            "measured[0].layer names 2, model has 2 layers: 0 to 1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_file_is_refused(bad: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(bad, "mine.json")
    assert str(caught.value).startswith(f"mine.json: {message}")
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_is_told_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"unknown keys \['modle'\].*; did you mean model\?$"):
        parse(content(modle={}), "mine.json")


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(content() | {"heads": {"x": "y" * 5000}}, "mine.json")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("grid", " must be an object with a map, got 'grid'"),
        ([], " must be an object with a map, got []"),
        ({}, ".map is missing, it must be an object of query modality "),
        (
            {"map": ["media"]},
            ".map must be an object of query modality or query->key modality to pattern, got ['media']",
        ),
        (
            {"map": {}, "layer": [0]},
            " has unknown keys ['layer']; known keys: heads, layers, map; did you mean layers?",
        ),
        ({"map": {"video": "grid"}}, ".map key 'video' must be text, media or query->key of these"),
        ({"map": {"": "grid"}}, ".map key '' must be text, media or query->key of these"),
        ({"map": {"media->": "grid"}}, ".map key 'media->' must be text, media or query->key of these"),
        ({"map": {"->media": "grid"}}, ".map key '->media' must be text, media or query->key of these"),
        ({"map": {"media -> text": "grid"}}, ".map key 'media -> text' must be text, media or query->key of these"),
        ({"map": {"media->text->text": "a_shape"}}, ".map key 'media->text->text' must be text, media or "),
        ({"map": {"media": "slash"}}, f".map.media must be one of {', '.join(PATTERNS)}, got 'slash'"),
        ({"map": {"media->text": "off"}}, f".map.media->text must be one of {', '.join(PATTERNS)}, got 'off'"),
        ({"map": {"media": None}}, f".map.media must be one of {', '.join(PATTERNS)}, got None"),
        ({"map": {"media": ["grid"]}}, f".map.media must be one of {', '.join(PATTERNS)}, got ['grid']"),
        ({"map": {}, "layers": 3}, ".layers must be a list of non-negative integers, each once, got 3"),
        ({"map": {}, "layers": None}, ".layers must be a list of non-negative integers, each once, got None"),
        ({"map": {}, "layers": [0, 2, 0]}, ".layers must be a list of non-negative integers, each once, got [0, 2, 0]"),
        ({"map": {}, "layers": [0, -1]}, ".layers[1] must be a non-negative integer, got -1"),
        ({"map": {}, "layers": ["0"]}, ".layers[0] must be a non-negative integer, got '0'"),
        ({"map": {}, "heads": [1.0]}, ".heads[0] must be a non-negative integer, got 1.0"),
        ({"map": {}, "heads": [True]}, ".heads[0] must be a non-negative integer, got True"),
        ({"map": {}, "heads": "all"}, ".heads must be a list of non-negative integers, each once, got 'all'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_rule_is_refused_and_located(bad: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(content({"map": {}}, bad), "mine.json")
    assert str(caught.value).startswith(f"mine.json: heads[1]{message}")


def test_the_schema_is_a_schema_and_knows_the_patterns() -> None:
    written = json.loads((FOLDER / "schema.json").read_text())
    Draft202012Validator.check_schema(written)
    rule = written["$defs"]["rule"]["properties"]["map"]
    assert tuple(rule["additionalProperties"]["enum"]) == PATTERNS
    pairs = [f"{query}->{key}" for query in MODALITIES for key in MODALITIES]
    assert rule["propertyNames"]["enum"] == [*MODALITIES, *pairs]
    assert set(written["properties"]["model"]["properties"]) == set(asdict(Model()))


def test_every_part_of_the_schema_says_what_must_be_there() -> None:
    """Else a message could not."""

    def parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield schema
        for key in ("items", "propertyNames", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                yield from parts(schema[key])
        for key in ("properties", "$defs"):
            for part in schema.get(key, {}).values():
                yield from parts(part)

    written = json.loads((FOLDER / "schema.json").read_text())
    assert [part for part in parts(written) if "description" not in part and "$ref" not in part] == []


# -- files for one model -----------------------------------------------------------------------------------------------

QWEN = {"architecture": "Qwen", "layers": 4, "heads": 8, "kv_heads": 2, "head_dim": 16}
SERVED = Model(id="/models/Qwen-7B", **QWEN)


def folder_of(tmp_path: Path, **models: dict[str, Any] | None) -> str:
    """A folder with a pattern file per id, each for a model or for any."""
    for name, model in models.items():
        made = content() | {"id": name} | ({} if model is None else {"model": model})
        (tmp_path / f"file of {name}.json").write_text(json.dumps(made))
    return str(tmp_path)


def test_what_a_file_says_of_its_making_is_kept() -> None:
    said = {
        "model": {"id": "Qwen/Qwen-7B", **QWEN},
        "provenance": {
            "version": "0.1.0",
            "clips": [{"sha256": "0f" * 32, "tokens": 4096}],
            "density": 0.1,
            "objective": "error",
            "combine": "mean",
            "date": "2026-11-27T10:00:00Z",
            "device": "a CPU",
        },
        "measured": [{"layer": 3, "head": 7, "error": 0.01, "mass": 0.9, "density": 0.1}],
    }
    pattern = parse(content(**said), "mine.json")
    assert asdict(pattern.model) == said["model"]
    assert pattern.provenance == said["provenance"]
    assert list(pattern.measured) == said["measured"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"architecture": "Llama"}, "architecture is Llama in the file and Qwen in the model"),
        ({"layers": 28}, "layers is 28 in the file and 4 in the model"),
        (
            {"heads": 28, "kv_heads": 4},
            "heads is 28 in the file and 8 in the model; kv_heads is 4 in the file and 2 in",
        ),
        ({"head_dim": 128}, "head_dim is 128 in the file and 16 in the model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_for_another_model_is_refused_with_both_numbers(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pattern 'mine' is for another model: {message}.*; name a pattern that"):
        parse(content(model=said), "mine.json").check(SERVED)


def test_rules_beyond_the_served_model_are_refused() -> None:
    parse(content({"layers": [3], "heads": [7], "map": {}}), "mine.json").check(SERVED)
    with pytest.raises(
        ConfigError, match=r"^pattern 'mine': heads\[0\]\.heads names 8, the model has 8 heads: 0 to 7$"
    ):
        parse(content({"layers": [3], "heads": [8], "map": {}}), "mine.json").check(SERVED)


def test_another_id_of_the_same_shape_is_no_other_model() -> None:
    parse(content(model={"id": "Qwen-7B-Chat", **QWEN}), "mine.json").check(SERVED)


def test_a_folder_s_files_are_found_by_id_not_by_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, one=None)
    assert load("one", folder).id == "one"
    assert load("grid", folder).id == "grid"
    with pytest.raises(ConfigError, match=r"^no pattern 'two': neither a file nor one of a_shape, .*, one, "):
        load("two", folder)


def test_two_files_with_one_id_are_refused_with_both_paths(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, grid=None)
    with pytest.raises(
        ConfigError, match=r"^two pattern files have the id 'grid': .*/grid\.json and .*/file of grid\.j"
    ):
        load("auto", folder)


def test_the_package_s_own_folder_is_not_read_twice() -> None:
    assert catalog.ids(str(FOLDER)) == SHIPPED


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^pattern_folder '.*/none' is no folder"):
        load("auto", f"{tmp_path}/none")


@pytest.mark.parametrize("model_id", ["/models/Qwen-7B", "Qwen-7B"])
def test_searched_takes_the_file_that_names_the_model_before_one_of_its_shape(model_id: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, by_id={"id": model_id}, by_shape=QWEN, other={"id": "Qwen-72B"})
    assert load("searched", folder, SERVED).id == "by_id"


def test_searched_takes_the_file_of_the_model_s_shape(tmp_path: Path) -> None:
    other = QWEN | {"layers": 5}
    folder = folder_of(tmp_path, by_shape=QWEN, other=other, named={"id": "Qwen-7B", **other}, partly={"layers": 4})
    assert load("searched", folder, SERVED).id == "by_shape"


def test_searched_refuses_where_nothing_fits_and_lists_what_is_there(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, other=QWEN | {"layers": 5})
    with pytest.raises(ConfigError) as caught:
        load("searched", folder, SERVED)
    text = str(caught.value)
    assert f"none in the package and {folder} is for this model (id /models/Qwen-7B, architecture Qwen, " in text
    assert "grid (any model); other (architecture Qwen, layers 5, " in text
    assert text.endswith("name a pattern, or 'auto', or a folder with one for this model in MMINFERENCE_PATTERNS")


def test_a_file_of_the_folder_comes_before_one_of_the_package(tmp_path: Path) -> None:
    shipped = load("searched", None, catalog.read(FOLDER / "models" / "toy.json").model)
    assert shipped.id == "toy-searched"
    model = {"id": "toy", **{name: getattr(shipped.model, name) for name in ("architecture", "layers", "heads")}}
    assert load("searched", folder_of(tmp_path, mine=model), shipped.model).id == "mine"


def test_searched_refuses_to_choose(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, one=QWEN, two=QWEN)
    with pytest.raises(ConfigError, match=r"several are for this model \(.*\): one, two; name one of them$"):
        load("searched", folder, SERVED)


@pytest.mark.parametrize(
    ("rule", "model", "layers", "heads"),
    [
        ({}, {}, Ids((0,), True), Ids((0,), True)),
        ({"layers": [5, 1]}, {}, Ids((1, 5, 6), True), Ids((0,), True)),
        ({"heads": [2]}, {"heads": 4}, Ids((0,), True), Ids((0, 1, 2, 3), False)),
        ({"layers": [1]}, {"layers": 2, "heads": 1}, Ids((0, 1), False), Ids((0,), False)),
    ],
)
def test_ids_that_show_all_that_rules_do(rule, model, layers, heads) -> None:
    pattern = parse(content({"map": {}, **rule}, model=model), "mine.json")
    assert (Ids.of("layers", pattern), Ids.of("heads", pattern)) == (layers, heads)


def test_ids_of_two_files_are_those_of_models_that_both_fit() -> None:
    one, two = (parse(content({"layers": [layer], "map": {}}), "mine.json") for layer in (1, 4))
    assert Ids.of("layers", one, two) == Ids((1, 4, 5), others=True)
    small = parse(content(model={"layers": 3}), "mine.json")
    assert Ids.of("layers", one, two, small) == Ids((0, 1, 2), others=False)


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
