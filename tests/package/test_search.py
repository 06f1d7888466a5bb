"""The command's own part of the search, against a server made of planted layers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.method.cases import PLANTS
from benchmarks.method.forward import forward
from benchmarks.method.planted import GEOMETRIES, one_video, plant
from mminference_sgl import cli
from mminference_sgl.backend import recording
from mminference_sgl.backend.recording import Recorder
from mminference_sgl.cli import search
from mminference_sgl.method import catalog
from mminference_sgl.method.config import Config
from mminference_sgl.method.stride import StrideSearch

LAYERS = (("lines", "vertical-slash"), ("vertical-slash", "slash"))
FOUND = ({0: "grid", 1: "vertical_slash"}, {0: "vertical_slash", 1: "grid"})
TOKENS, CHUNK, DENSITY = 4096, 2048, 0.25
CONFIG = Config(tile_queries=32)
MODEL = {
    "architecture": "Planted",
    "layers": len(LAYERS),
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 128,
    "sparse_layers": [0, 1],
    "ranks": 2,
    "chunk_tokens": CHUNK,
    "device": "cpu",
}
DATE = "2026-01-02"


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("0.mp4", "1.mp4", "2.mp4")]
    for path in paths:
        path.write_text(path.name)
    return paths


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Has ``engine`` answer with planted layers, one head a rank, that stop ``after`` so many new records.

    ``opaque``: nobody knows the video's grid.
    """
    start = SimpleNamespace(config=CONFIG, implementation="torch", sharing=())
    survey = SimpleNamespace(sparse=frozenset(MODEL["sparse_layers"]))
    monkeypatch.setattr(recording, "_model", lambda *_: MODEL)
    monkeypatch.setattr(recording, "head_offset", lambda runner: runner)
    made: list[str] = []

    def serve(after: int | None = None, *, opaque: bool = False) -> list[str]:
        made.clear()

        def engine(model_path, text, folder, server_arguments):
            recorders = [Recorder(folder, start, rank, survey) for rank in range(MODEL["ranks"])]

            def ask(clip: Path, frame_stride: int) -> int:
                strides = Strides(frame_stride) if opaque else None
                for bounds in ((first, min(first + CHUNK, TOKENS)) for first in range(0, TOKENS, CHUNK)):
                    for layer, names in enumerate(LAYERS):
                        _prefill(recorders, layer, names, int(clip.stem), bounds, made, after, strides)
                return TOKENS

            return _Context(ask)

        monkeypatch.setattr(search, "engine", engine)
        return made

    return serve


class Strides:
    """What the backend's cache of layouts does with a clip whose grid nobody knows."""

    def __init__(self, given: int) -> None:
        self.given = given
        self.search: StrideSearch | None = None

    def items(self, known):
        """The items of a scene as one learns them."""
        opaque = [(modality, spans, None) for modality, spans, _ in known]
        if self.search is not None:
            self.search.conclude(Counter())
        self.search = StrideSearch.of(opaque, self.search, self.given)
        return self.search.applied(opaque)


class _Context:
    def __init__(self, ask: search.Ask) -> None:
        self.ask = ask

    def __enter__(self) -> search.Ask:
        return self.ask

    def __exit__(self, *error: object) -> None:
        pass


def _prefill(recorders, layer, names, seed, bounds, made, after, strides=None) -> None:
    scene = one_video(GEOMETRIES["longvila" if strides is None else "llava-video"], TOKENS)
    bounds = bounds[0], min(bounds[1], scene.length)
    problem = plant(scene, [PLANTS[name] for name in names], heads=2, kv_heads=2, seed=10 * seed + layer)
    if strides is not None:
        problem = dataclasses.replace(problem, scene=dataclasses.replace(scene, items=strides.items(scene.items)))
    one = forward(problem, *bounds, CONFIG, np.arange(scene.length), chunk=CHUNK)
    if strides is not None:
        one.plan.requests[0].layout.search = strides.search
    query, key, value = (x.transpose(0, 1) for x in (problem.query, problem.key, problem.value))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=problem.scale)
    dense = dense.transpose(0, 1)[slice(*bounds)]
    # The plan's own slots: the pool of the problem is a permutation.
    slots = torch.from_numpy(np.random.default_rng(0).permutation(scene.length) + 1)[None].int()
    for rank, recorder in enumerate(recorders):
        recorder.begin({0: one.plan.requests[0]}, 1, slots)
        if recorder.wants(layer):
            if after is not None and len(made) == after:
                raise KeyboardInterrupt
            head = slice(rank, rank + 1)
            recorder.layer(layer, one.operands.block(head), dense[:, head])
            made.append(f"{recorder._task.into} {layer} {bounds} {rank}")


def run(clips: list[Path], output: Path, **options) -> int:
    given = {"density": DENSITY, "held_out": clips[2], "date": DATE, **options}
    return search.run("planted", clips[:2], "what", output, **given)


def test_a_search_finds_what_was_planted(server, clips, tmp_path, capsys):
    server()
    assert run(clips, tmp_path / "out.json") == 0
    content = json.loads((tmp_path / "out.json").read_text())
    file = catalog.parse(content, "out.json")
    for layer, heads in enumerate(FOUND):
        assert {head: file.spec(layer, head).media_media for head in heads} == heads
    assert content["provenance"]["date"] == DATE
    assert [clip["tokens"] for clip in content["provenance"]["clips"]] == [TOKENS, TOKENS]
    assert [(one["layer"], one["head"]) for one in content["measured"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for one in content["measured"]:
        assert 0 < one["error"] < 0.5
        assert one["density"] < 2 * DENSITY
        assert 0.5 < one["mass"] <= 1
    out = capsys.readouterr().out
    assert "calibration: error" in out
    assert "held out: error" in out


def test_an_interrupted_search_goes_on_to_the_same_file(server, clips, tmp_path):
    made = server()
    assert run(clips, tmp_path / "whole.json") == 0
    everything = len(made)
    # In the scores of the second clip, and in the measuring of the first.
    counts = []
    for after in (11, 11, None):
        made = server(after)
        assert run(clips, tmp_path / "parts.json") == (0 if after is None else 130)
        counts.append(len(made))
    assert counts[:2] == [11, 11]
    assert sum(counts) == everything
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    # Another density needs no scores again.
    made = server()
    assert run(clips, tmp_path / "parts.json", density=0.5) == 0
    assert made
    assert all(one.startswith("measured") for one in made)


def test_a_stride_that_is_found_is_used_and_written(server, clips, tmp_path):
    stride = GEOMETRIES["llava-video"].area
    made = server(opaque=True)
    assert run(clips, tmp_path / "whole.json") == 0
    content = json.loads((tmp_path / "whole.json").read_text())
    assert content["config"]["frame_stride"] == stride
    file = catalog.parse(content, "whole.json")
    for layer, heads in enumerate(FOUND):
        assert {head: file.spec(layer, head).media_media for head in heads} == heads
    everything = len(made)
    # Cut off behind the first chunk of the first clip, a search listens to it again.
    made = server(5, opaque=True)
    assert run(clips, tmp_path / "parts.json") == 130
    made = server(opaque=True)
    assert run(clips, tmp_path / "parts.json") == 0
    assert len(made) > everything - 5
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_strides_that_differ_are_not_written():
    assert search.frame_stride([[182], [], [182, 182]]) == 182
    assert search.frame_stride([[182], [196]]) == 0
    assert search.frame_stride([[], []]) == 0


def test_records_of_another_search_are_refused(server, clips, tmp_path, capsys):
    server()
    folder = tmp_path / "records"
    search._same_search(folder, {"model": "other"})
    arguments = ["--model-path", "planted", "--video", str(clips[0]), "--text", "what", "--folder", str(folder)]
    assert cli.main(["search", *arguments, "-o", str(tmp_path / "out.json")]) == 1
    assert "another search" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_with_json_standard_output_is_json_alone(server, clips, tmp_path, capsys):
    server()
    output = str(tmp_path / "out.json")
    arguments = ["--model-path", "planted", "--video", str(clips[0]), "--text", "what", "--density", str(DENSITY)]
    assert cli.main(["search", *arguments, "-o", output, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"ok": True, "pattern": output}
    assert f"written: {output}" in printed.err
