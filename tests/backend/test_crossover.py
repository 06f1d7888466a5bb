"""The crossover: found by measuring, remembered, and never a reason to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mminference_sgl.backend import crossover
from mminference_sgl.backend.crossover import LENGTHS, MARGIN, Shape
from mminference_sgl.method.config import Config


def shape(chunk_tokens: int = 512) -> Shape:
    config = Config().for_chunks(chunk_tokens, 16)
    return Shape(4, 2, 32, torch.float32, torch.device("cpu"), chunk_tokens, "torch", config)


@pytest.mark.parametrize("wins_at", LENGTHS)
def test_first_length_at_which_sparse_wins_by_the_margin(wins_at: int) -> None:
    def times(length: int) -> tuple[float, float]:
        return 1.0, MARGIN if length >= wins_at else MARGIN - 0.01

    assert crossover.measured(times) == wins_at


def test_sparse_that_never_wins_is_for_longer_requests_only() -> None:
    assert crossover.measured(lambda _: (1.0, 1.0)) == 2 * LENGTHS[-1]


def test_measuring_stops_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: 2.5 * next(clock))
    tried = []

    def times(length: int) -> tuple[float, float]:
        tried.append(length)
        return 1.0, 1.0

    assert crossover.measured(times) == LENGTHS[1]
    assert tried == [LENGTHS[0]]


def test_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "crossover.json"
    monkeypatch.setattr(crossover, "_times", lambda shape, length: (1.0, length / 2048))
    assert crossover.min_tokens(shape(), file) == 4096
    assert json.loads(file.read_text()) == {shape().key: 4096}
    monkeypatch.setattr(crossover, "_times", lambda shape, length: pytest.fail("measured again"))
    assert crossover.min_tokens(shape(), file) == 4096
    monkeypatch.setattr(crossover, "_times", lambda shape, length: (1.0, 2.0))
    assert crossover.min_tokens(shape(1024), file) == 1024, "another shape is measured by itself"
    assert set(json.loads(file.read_text())) == {shape().key, shape(1024).key}


def test_key_holds_what_the_cpu_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in crossover._CPU_CAPS:
        monkeypatch.delenv(variable, raising=False)
    keys = [shape().key]
    for variable in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.setenv(variable, "AVX2")
        keys.append(shape().key)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX7")
    keys.append(shape().key)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1009)
    keys.append(shape().key)
    assert len(set(keys)) == len(keys)
    assert all(shape().key == keys[-1] for _ in range(2))


def test_key_holds_the_model_of_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr(crossover, "_CPU_FILE", file)
    unknown = shape().key
    file.write_text("processor\t: 0\nmodel name\t: A Processor 9\nflags\t: fpu\n")
    assert "A Processor 9" in shape().key
    assert shape().key != unknown


@pytest.mark.parametrize("content", ["", "no json", "[1]", '{"a": "b"}', "\x00"])
def test_a_broken_file_is_measured_over(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "crossover.json"
    file.write_text(content)
    monkeypatch.setattr(crossover, "_times", lambda shape, length: (1.0, 2.0))
    assert crossover.min_tokens(shape(), file) == LENGTHS[0]
    assert json.loads(file.read_text()) == {shape().key: LENGTHS[0]}


def test_a_place_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(crossover, "_times", lambda shape, length: (1.0, 2.0))
    assert crossover.min_tokens(shape(), tmp_path / "file" / "crossover.json") == LENGTHS[0]


@pytest.mark.parametrize("chunk_tokens", [0, 512])
def test_both_sides_are_really_timed(chunk_tokens: int) -> None:
    sparse, dense = crossover._times(shape(chunk_tokens), 1024)
    assert 0 < sparse < 60
    assert 0 < dense < 60
