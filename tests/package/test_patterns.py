"""`mminference patterns` on the shipped files, on files of a folder, and on broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mminference_sgl.cli import main
from mminference_sgl.method import catalog

FOLDER = Path(__file__).parents[2] / "patterns"
SHAPE = {"architecture": "Qwen", "layers": 4, "heads": 8}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MMINFERENCE_PATTERNS", raising=False)


@pytest.fixture
def patterns(capsys: pytest.CaptureFixture[str]):
    """Runs a command that shall end with a status; returns what it printed, as JSON if it is asked for."""

    def run(*arguments: object, status: int = 0) -> Any:
        assert main(["patterns", *map(str, arguments)]) == status
        written = capsys.readouterr()
        if written.err:
            return written.err
        return json.loads(written.out) if "--json" in arguments else written.out

    return run


@pytest.fixture
def file(tmp_path: Path):
    """Writes a pattern file."""

    def write(name: str, *rules: Any, **more: Any) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"schema": 1, "id": name, "heads": list(rules), **more}))
        return path

    return write


def lines(text: str) -> list[list[str]]:
    """Cells of the lines of a table."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


# -- list --------------------------------------------------------------------------------------------------------------


def test_list_tells_of_every_shipped_file(patterns):
    header, *rows = lines(patterns("list"))
    assert header == ["id", "description", "model", "rules"]
    assert [row[0] for row in rows] == catalog.ids()
    assert rows[0] == ["a_shape", catalog.load("a_shape").description, "any model", "1"]


@pytest.mark.parametrize("by", ["option", "environment"])
def test_list_adds_a_folder(by, file, patterns, monkeypatch):
    path = file("mine", {"map": {}}, {"map": {}}, description="about [heads]", model=SHAPE)
    if by == "environment":
        monkeypatch.setenv("MMINFERENCE_PATTERNS", str(path.parent))
    given = ["--folder", path.parent] if by == "option" else []
    rows = lines(patterns("list", *given))
    assert ["mine", "about [heads]", "architecture Qwen, layers 4, heads 8", "2"] in rows
    (mine,) = (entry for entry in patterns("list", "--json", *given) if entry["id"] == "mine")
    assert (mine["model"], mine["rules"], mine["file"]) == (SHAPE, 2, str(path))


def test_list_of_no_folder_is_refused(patterns, tmp_path):
    said = patterns("list", "--folder", tmp_path / "none", status=1)
    assert said.startswith("mminference: pattern_folder ")
    assert said.count("\n") == 1


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_puts_layers_and_heads_with_the_same_together(file, patterns):
    path = file(
        "mine",
        {"map": {"media": "grid"}},
        {"layers": [0, 1, 3], "heads": [2, 3, 4, 7], "map": {"media->text": "dense"}},
        config={"error": 0.05, "patterns": {"grid": {"window": 128}}},
        model=SHAPE,
        measured=[{"layer": 0, "head": 1, "error": 0.01}, {"layer": 0, "head": 2, "error": 0.03, "mass": 0.5}],
    )
    about, table = patterns("show", path).split("\n\n")
    assert ["config", "error 0.05, patterns.grid.window 128"] in lines(about)
    assert ["measured", "2 heads; error 0.02 in the mean, 0.01 to 0.03; mass 0.5 in the mean, 0.5 to 0.5"] in lines(
        about
    )
    assert lines(table) == [
        ["layers", "heads", "text rows", "media rows"],
        ["0-1, 3", "0-1, 5-6", "dense", "grid"],
        ["0-1, 3", "2-4, 7", "dense", "dense on text, grid on media"],
        ["2", "all", "dense", "grid"],
    ]


def test_show_without_a_model_tells_of_others(file, patterns):
    path = file("mine", {"map": {"media": "grid"}}, {"layers": [5], "heads": [0, 2], "map": {"media": "dense"}})
    table = patterns("show", path).split("\n\n")[1]
    assert lines(table)[1:] == [
        ["5", "0, 2", "dense", "dense"],
        ["5", "others", "dense", "grid"],
        ["others", "all", "dense", "grid"],
    ]
    runs = patterns("show", path, "--json")["runs"]
    assert runs[0] == {
        "layers": [5],
        "heads": [0, 2],
        "text_text": "dense",
        "text_media": "dense",
        "media_text": "dense",
        "media_media": "dense",
    }
    assert [run["layers"] for run in runs] == [[5], [5], ["others"]]
    assert [run["heads"] for run in runs] == [[0, 2], ["others"], [0, 2, "others"]]


def test_show_of_an_unknown_id_names_the_known_ones(patterns):
    said = patterns("show", "gird", status=1)
    assert said == f"mminference: no pattern 'gird': neither a file nor one of {', '.join(catalog.ids())}\n"


# -- validate ----------------------------------------------------------------------------------------------------------


def test_shipped_files_are_valid(patterns):
    files = sorted(path for path in FOLDER.glob("*.json") if path.name != "schema.json")
    assert lines(patterns("validate", *files)) == [["ok", str(path)] for path in files]


def whole(*rules: Any, **more: Any) -> str:
    return json.dumps({"schema": 1, "id": "mine", "heads": list(rules), **more})


BROKEN = {
    "not JSON": ("{", "pattern file {file}: Expecting property name"),
    "not a number": (whole(measured=[{"layer": 0, "head": 0, "error": float("nan")}]), "NaN is no number of JSON"),
    "a key twice": ('{"schema": 1, "id": "a", "id": "b", "heads": []}', "key 'id' is there twice in one object"),
    "not an object": ("[]", "{file}: the file must be a JSON object, got []"),
    "another version": (whole(schema=2), "{file}: schema must be 1, the version of the schema, got 2"),
    "no rules": ('{"schema": 1, "id": "a"}', "{file}: heads is missing, it must be a list of rules"),
    "an unknown key": (whole(modle={}), "{file}: the file has unknown keys ['modle']; known keys: "),
    "an unknown modality": (whole({"map": {"video": "grid"}}), "{file}: heads[0].map key 'video' must be text, media"),
    "an unknown pattern": (whole({"map": {"media": "gird"}}), "{file}: heads[0].map.media must be one of dense, "),
    "a negative layer": (
        whole({"layers": [-1], "map": {}}),
        "{file}: heads[0].layers[0] must be a non-negative integer",
    ),
    "a layer twice": (whole({"layers": [1, 1], "map": {}}), "{file}: heads[0].layers must be a list of non-negative i"),
    "a layer beyond": (
        whole({"layers": [4], "map": {}}, model=SHAPE),
        "{file}: heads[0].layers names 4, model has 4 layers: 0 to 3",
    ),
    "a head beyond": (
        whole({"heads": [8], "map": {}}, model=SHAPE),
        "{file}: heads[0].heads names 8, model has 8 heads: 0 to 7",
    ),
    "a bad shape": (whole(model={"layers": "4"}), "{file}: model.layers must be an integer of at least 1, got '4'"),
    "an unknown setting": (whole(config={"eror": 0.1}), "{file}: config: unknown key 'eror'; known keys: "),
    "a bad setting": (whole(config={"error": -1}), "{file}: config: error must be a number of at least 0.0 and"),
    "another pattern": (whole(config={"pattern": "grid"}), "{file}: config.pattern must be left out: a pattern file"),
    "a measurement twice": (
        whole(measured=[{"layer": 0, "head": 0}] * 2),
        "{file}: measured[1] is layer 0, head 0, as measured[0] is; leave one out",
    ),
    "a bad clip": (
        whole(provenance={"clips": [{"sha256": "x", "tokens": 1}]}),
        "{file}: provenance.clips[0].sha256 must be 64 hexadecimal digits, got 'x'",
    ),
    "a mix": (
        whole({"map": {"media": "auto"}}, {"layers": [2], "heads": [5], "map": {"media->text": "dense"}}, model=SHAPE),
        "pattern 'mine', layer 2, head 5: auto decides about all keys of media rows",
    ),
    "a mix elsewhere": (
        whole({"map": {"text": "grid"}}, {"layers": [0], "map": {"text": "dense"}}),
        "pattern 'mine', layer 1, head 0: grid is for media rows only",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_with_its_own_message(kind, tmp_path, patterns):
    text, message = BROKEN[kind]
    path = tmp_path / "mine.json"
    path.write_text(text)
    ((verdict, said),) = (line.split(maxsplit=1) for line in patterns("validate", path, status=1).splitlines())
    assert verdict == "refused"
    assert message.format(file=path) in said
    others = [other.format(file=path) for name, (_, other) in BROKEN.items() if name != kind]
    assert not [other for other in others if other in said]


def test_validate_tells_of_all_files(file, patterns, tmp_path):
    good, bad = file("good"), file("bad", {"map": {"media": "gird"}})
    missing = tmp_path / "missing.json"
    found = patterns("validate", good, bad, missing, "--json", status=1)
    assert [(entry["file"], entry["ok"]) for entry in found] == [
        (str(good), True),
        (str(bad), False),
        (str(missing), False),
    ]
    assert found[2]["error"].startswith(f"{missing}: no such file; ")


# -- diff --------------------------------------------------------------------------------------------------------------


def test_diff_tells_layers_heads_and_how(file, patterns):
    base = {"map": {"media": "grid"}}
    one = file("one", base, config={"error": 0.05}, model=SHAPE)
    two = file("two", base, {"layers": [1, 2], "heads": [3], "map": {"media->text": "dense", "text": "a_shape"}})
    runs, settings = (
        [line for line in lines(patterns("diff", one, two)) if (line[0] in {"setting", "config.error"}) == which]
        for which in (False, True)
    )
    assert runs[:3] == [
        ["layers", "heads", "rows", "one", "two"],
        ["1-2", "3", "text", "dense", "a_shape"],
        ["1-2", "3", "media", "grid", "dense on text, grid on media"],
    ]
    assert settings == [["setting", "one", "two"], ["config.error", "0.05"]]
    found = patterns("diff", one, two, "--json")
    assert [(run["layers"], run["heads"]) for run in found["runs"]] == [([1, 2], [3])]
    assert found["runs"][0]["a"]["media_text"] == "grid"
    assert found["runs"][0]["b"]["media_text"] == "dense"
    assert found["settings"]["config.error"] == {"a": 0.05, "b": None}
    assert found["settings"]["model.layers"] == {"a": 4, "b": None}


def test_diff_is_of_what_runs_not_of_how_it_is_said(file, patterns):
    one = file("one", {"map": {"media": "grid"}}, {"layers": [1], "map": {"media": "dense"}})
    two = file("two", {"map": {"media": "dense"}}, {"layers": [0, 2], "map": {"media": "grid"}}, model={"layers": 3})
    assert patterns("diff", one, one) == "no difference\n"
    assert patterns("diff", one, two, "--json")["runs"] == []


def test_diff_of_shipped_files(patterns):
    assert lines(patterns("diff", "auto", "grid"))[1:] == [["all", "all", "media", "auto", "grid"]]
