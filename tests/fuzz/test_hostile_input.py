"""Hostile input: what users or media send is used, or refused with the error that is meant for it; nothing else.

A few hundred executions here; `make fuzz` runs a million of each (``FUZZ_EXECUTIONS``).
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import mminference_sgl
from mminference_sgl import _core
from mminference_sgl.backend.geometry import GeometryError, ModelGeometry
from mminference_sgl.backend.layout import LayoutCache
from mminference_sgl.method import catalog, config, schema
from mminference_sgl.method.config import ConfigError

PACKAGE = Path(mminference_sgl.__file__).parent
LONGEST_LINE = 2000
fuzzed = hypothesis.settings(
    max_examples=int(os.environ.get("FUZZ_EXECUTIONS", "200")),
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**30, 2**31, 2**63, 2**64, 10**400])
    | st.floats()
    | st.text(max_size=20)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)
MODEL_FILE = json.loads((schema.FILE.parent / "models" / "toy.json").read_text(encoding="utf-8"))
KEYS = sorted(json.loads(schema.FILE.read_text(encoding="utf-8"))["properties"])


def refused(error: Exception) -> None:
    """As one line of a length that a log takes."""
    assert str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < LONGEST_LINE


# -- pattern files -----------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something lies in a JSON document, the first few entries of every list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


PLACES = places(MODEL_FILE)[1:]


@st.composite
def spoiled(draw: st.DrawFn) -> Any:
    """A file that is right but for one to three places."""
    content = json.loads(json.dumps(MODEL_FILE))
    for path in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        parent = content
        try:
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = draw(anything)
        except (TypeError, KeyError, IndexError):
            continue  # An earlier one has taken the place away.
    return content


def parse(content: Any) -> None:
    try:
        pattern = catalog.parse(content, "a file")
        pattern.specs(0, range(4))
    except ConfigError as error:
        refused(error)


@fuzzed
@hypothesis.given(spoiled())
def test_spoiled_pattern_files(content: Any) -> None:
    parse(content)


@fuzzed
@hypothesis.given(st.dictionaries(st.sampled_from(KEYS), anything) | anything)
def test_any_json_as_a_pattern_file(content: Any) -> None:
    parse(content)


@fuzzed
@hypothesis.given(
    data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | anything.map(repr).map(str.encode)
)
def test_any_bytes_as_a_pattern_file(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    try:
        catalog.read(path)
    except ConfigError as error:
        refused(error)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "a pipe", "a hole"])
def test_files_without_an_end_are_not_read(name: str, tmp_path: Path) -> None:
    path = Path(name)
    if name == "a pipe":
        path = tmp_path / "pipe.json"
        os.mkfifo(path)
    if name == "a hole":
        path = tmp_path / "hole.json"
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"is no file|is larger than 16 MiB"):
        catalog.read(path)


# -- configuration -----------------------------------------------------------------------------------------------------

SETTINGS = ["error", "min_tokens", "pattern", "patterns", "tile_keys", "enabled", "probe_rows", "implementation"]
VARIABLES = ["CONFIG", "PATTERN", "PATTERNS", "IMPL", "MIN_TOKENS", "FRAME_STRIDE", "DISABLE"]


@fuzzed
@hypothesis.given(st.dictionaries(st.sampled_from(SETTINGS) | st.text(max_size=9), anything, max_size=4) | anything)
def test_any_server_json(settings: Any) -> None:
    try:
        config.from_sources(config.server_source(SimpleNamespace(mminference=settings)))
    except ConfigError as error:
        refused(error)


texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=60)


@fuzzed
@hypothesis.given(
    st.dictionaries(
        st.sampled_from([f"MMINFERENCE_{name}" for name in VARIABLES]),
        texts | anything.map(json.dumps) | st.sampled_from(["{" * 9, '{"error":' * 2000, "{" + "9" * 5000]),
    )
)
def test_any_environment(environment: dict[str, str]) -> None:
    try:
        config.from_sources(*config.environment_sources(environment))
    except ConfigError as error:
        refused(error)


# -- media -------------------------------------------------------------------------------------------------------------

number = st.integers(-4, 600) | st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**63), 10**30])
span = st.tuples(number, number) | anything
grid = st.lists(st.tuples(number, number, number), max_size=3) | anything
data = st.dictionaries(
    st.sampled_from(["video_grid_thw", "image_grid_thw", "second_per_grid_ts", "pre_chunked_input_ids"]), grid
)
item = st.builds(
    SimpleNamespace,
    modality=st.sampled_from(["IMAGE", "VIDEO", "AUDIO"]).map(lambda name: SimpleNamespace(name=name)) | anything,
    offsets=st.lists(span, max_size=5) | anything,
    model_specific_data=data | st.none(),
)


class Inputs(SimpleNamespace):
    """Stands for SGLang's ``MultimodalInputs``."""

    __hash__ = object.__hash__


@fuzzed
@hypothesis.given(st.lists(item, min_size=1, max_size=3), st.integers(1, 600), st.booleans())
def test_any_mm_items(items: list[Any], seen: int, positions: bool) -> None:
    inputs = Inputs(mm_items=items)
    if positions:
        inputs.mrope_positions = torch.zeros(3, seen, dtype=torch.long)
    layouts = LayoutCache(ModelGeometry(2), chunk_tokens=64, tile_queries=32, tile_keys=32, cell_size=0)
    try:
        layout = layouts.get(inputs, seen, torch.device("cpu"))
    except (GeometryError, _core.LayoutError):
        return
    assert layout.layout.length >= seen


@pytest.mark.fault("10,000 spans of one token", "planned in well under a second")
def test_ten_thousand_spans_of_one_token() -> None:
    spans = [(at, at) for at in range(3, 30_003, 3)]
    video = SimpleNamespace(modality=SimpleNamespace(name="VIDEO"), offsets=spans, model_specific_data={})
    layouts = LayoutCache(ModelGeometry(2), chunk_tokens=512, tile_queries=32, tile_keys=64, cell_size=0)
    layout = layouts.get(Inputs(mm_items=[video]), 30_003, torch.device("cpu")).layout
    assert layout.length == 30_003
    assert sorted(layout.order("cell").tolist()) == list(range(30_003))


# -- code --------------------------------------------------------------------------------------------------------------

CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_that_is_read_becomes_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in CODE, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert not any(one.arg == "allow_pickle" for one in node.keywords), f"line {node.lineno}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not UNSAFE & {name.partition(".")[0] for name in names}
