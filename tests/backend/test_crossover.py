"""The crossover: found by measuring, remembered, and never a reason to fail."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from mminference_sgl.backend import crossover
from mminference_sgl.backend.crossover import DENSER, DENSITY, LENGTHS, MARGIN, Crossover, Shape, Timing
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config


def shape(chunk_tokens: int = 512) -> Shape:
    config = Config().for_chunks(chunk_tokens, 16)
    return Shape(4, 2, 32, torch.float32, torch.device("cpu"), chunk_tokens, "torch", config, sparse_layers=28)


@pytest.mark.parametrize("wins_at", LENGTHS)
def test_first_length_at_which_sparse_wins_by_the_margin(wins_at: int) -> None:
    def times(length: int, budget: float) -> Timing:
        return Timing(1.0, MARGIN if length >= wins_at else MARGIN - 0.01, budget)

    assert crossover.measured(times).tokens == wins_at


def test_sparse_that_never_wins_is_for_longer_requests_only() -> None:
    assert crossover.measured(lambda _, budget: Timing(1.0, 1.0, budget)).tokens == 2 * LENGTHS[-1]


def test_measuring_stops_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: 2.5 * next(clock))
    tried = []

    def times(length: int, budget: float) -> Timing:
        tried.append((length, budget))
        return Timing(1.0, 1.0, budget)

    assert crossover.measured(times).tokens == LENGTHS[2]
    # Two seconds each: four times as many would take too long.
    assert tried == [(LENGTHS[0], DENSITY), *((LENGTHS[1], budget) for budget in (DENSITY, DENSITY, DENSER))]


@pytest.mark.parametrize(
    ("few", "more", "density"),
    [
        (Timing(1.0, 2.0, 0.2), Timing(1.8, 2.0, 0.6), 0.7),
        # Less than was asked for: what was computed counts.
        (Timing(1.0, 2.0, 0.1), Timing(1.5, 2.0, 0.3), 0.5),
        (Timing(0.1, 2.0, 0.2), Timing(0.2, 2.0, 0.6), 1.0),
        (Timing(3.0, 2.0, 0.2), Timing(4.0, 2.0, 0.6), 0.2),
        (Timing(1.0, 2.0, 0.2), Timing(0.9, 2.0, 0.6), 1.0),
        (Timing(1.0, 2.0, 0.2), Timing(1.0, 2.0, 0.2), 1.0),
    ],
)
def test_density_at_which_sparse_takes_as_long_as_dense(few: Timing, more: Timing, density: float) -> None:
    found = crossover.measured(lambda _, budget: few if budget == DENSITY else more)
    assert found.density == pytest.approx(density)


@pytest.mark.parametrize(("seconds", "longer"), [(0.01, 4), (0.19, 4), (0.26, 2), (2.0, 1)])
def test_densities_are_compared_at_a_length_that_time_allows(seconds: float, longer: int) -> None:
    """Attention takes four times as long at twice the length."""
    tried = []

    def times(length: int, budget: float) -> Timing:
        tried.append((length, budget))
        return Timing(seconds / 2, seconds / 2 * (1 if length < LENGTHS[2] else 1.5), budget)

    assert crossover.measured(times).tokens == LENGTHS[2]
    assert tried[-2:] == [(longer * LENGTHS[2], DENSITY), (longer * LENGTHS[2], DENSER)]


def test_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "deep" / "crossover.json"
    monkeypatch.setattr(crossover, "_times", lambda shape, length, budget: Timing(budget, length / 10240, budget))
    # At 8K tokens, where dense takes .8 s and sparse as many as its budget.
    first = Crossover(4096, 0.8)
    assert crossover.of(shape(), file) == first
    assert json.loads(file.read_text()) == {shape().key: dataclasses.asdict(first)}
    monkeypatch.setattr(crossover, "_times", lambda *_: pytest.fail("measured again"))
    assert crossover.of(shape(), file) == first
    monkeypatch.setattr(crossover, "_times", lambda shape, length, budget: Timing(1.0, 2.0, budget))
    assert crossover.of(shape(1024), file).tokens == 1024, "another shape is measured by itself"
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


@pytest.mark.parametrize("content", ["", "no json", "[1]", '{"a": "b"}', '{"a": 4096}', '{"a": {}}', "\x00"])
def test_a_broken_file_is_measured_over(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "crossover.json"
    file.write_text(content)
    monkeypatch.setattr(crossover, "_times", lambda shape, length, budget: Timing(1.0, 2.0, budget))
    assert crossover.of(shape(), file).tokens == LENGTHS[0]
    assert json.loads(file.read_text())[shape().key]["tokens"] == LENGTHS[0]


def test_a_place_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(crossover, "_times", lambda shape, length, budget: Timing(1.0, 2.0, budget))
    assert crossover.of(shape(), tmp_path / "file" / "crossover.json").tokens == LENGTHS[0]


@pytest.mark.parametrize("chunk_tokens", [0, 512])
def test_both_sides_are_really_timed(chunk_tokens: int) -> None:
    few, more = (crossover._times(shape(chunk_tokens), 1024, budget) for budget in (DENSITY, DENSER))
    assert all(0 < seconds < 60 for timing in (few, more) for seconds in (timing.sparse, timing.dense))
    assert 0 < few.density < more.density < 1


def test_on_cuda_sparse_computes_the_stated_density() -> None:
    """Random operands need next to no tiles, but a budget that all of the mass is wanted for is used up."""
    given = dataclasses.replace(shape(1024), config=Config().for_chunks(1024, 32))
    operands, plan = crossover._problem(given, 4096)
    settings = dataclasses.replace(given, device=torch.device("cuda")).settings()
    (report,) = prefill.run_layer(operands, plan, [HeadSpec()] * 4, settings, torch.empty_like(operands.query), "torch")
    assert 0.5 < float(report.tiles / report.causal) / crossover.DENSITY < 1.1


def test_each_layer_bears_its_share_of_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Played: planning takes 8 seconds, a layer 1, however it is computed."""

    def seconds(run, device) -> float:
        run()
        return 8.0 if getattr(run, "func", None) is crossover.build else 1.0

    monkeypatch.setattr(crossover, "_seconds", seconds)
    for layers in (1, 2, 8, 32):
        timing = crossover._times(dataclasses.replace(shape(), sparse_layers=layers), 1024, DENSITY)
        assert (timing.sparse, timing.dense) == (1 + 8 / layers, 1.0)


def test_on_cuda_no_more_layers_are_timed_than_there_are() -> None:
    cuda = dataclasses.replace(shape(), device=torch.device("cuda"))
    assert [dataclasses.replace(cuda, sparse_layers=layers).layers for layers in (1, 3, 8)] == [1, 3, crossover.LAYERS]


def test_layers_run_behind_one_another_and_the_fastest_kernel_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def refuses() -> None:
        ran.append("refuses")
        raise RuntimeError("No available kernel.")

    runs = [refuses, lambda: ran.append("slow"), lambda: ran.append("fast")]
    monkeypatch.setattr(crossover, "_seconds", lambda run, device: (run(), {"slow": 2.0, "fast": 1.0}[ran[-1]])[1])
    cuda = dataclasses.replace(shape(), device=torch.device("cuda"))
    assert crossover._fastest(runs, cuda) == 1.0
    assert ran == ["refuses"] + ["slow"] * crossover.LAYERS + ["fast"] * crossover.LAYERS
    ran.clear()
    assert crossover._fastest(runs[1:], shape()) == 1.0
    assert ran == ["slow", "fast"]
    with pytest.raises(RuntimeError, match="No available kernel"):
        crossover._fastest([refuses], cuda)


@pytest.mark.parametrize("chunk_tokens", [0, 512])
def test_dense_kernels_compute_the_same_chunk(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FA3, played here, gets rows and keys that end together; PyTorch's two calls see the same pairs."""
    operands, _ = crossover._problem(shape(chunk_tokens), 1024)
    seen: list[int] = []

    def played(q, k, v, bounds_q, bounds_k, *, max_seqlen_q, max_seqlen_k, softmax_scale, causal) -> torch.Tensor:
        assert bounds_q.tolist() == [0, max_seqlen_q]
        assert bounds_k.tolist() == [0, max_seqlen_k]
        assert causal
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        seen.append(int((~future).sum()))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        scores = (q.transpose(0, 1) @ k.mT * softmax_scale).masked_fill(future, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1)

    monkeypatch.setitem(sys.modules, "sgl_kernel", types.ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", types.SimpleNamespace(flash_attn_varlen_func=played))
    run = crossover._fa3(operands.query, operands.key_pool[1:], operands.value_pool[1:], operands.scale)
    assert run is not None
    rows = chunk_tokens or 1024
    assert run().shape == operands.query.shape
    pairs: list[int] = []

    def counted(q, k, v, *, is_causal=False, scale) -> None:
        pairs.append(q.shape[2] * (q.shape[2] + 1) // 2 if is_causal else q.shape[2] * k.shape[2])

    monkeypatch.setattr(crossover.functional, "scaled_dot_product_attention", counted)
    (pytorch,) = crossover._dense_runs(operands)
    pytorch()
    assert sum(pairs) == seen[0] == rows * (1024 - rows) + rows * (rows + 1) // 2


def test_what_the_measurement_depends_on_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    cuda = dataclasses.replace(shape(), device=torch.device("cuda"))
    before = cuda.key
    monkeypatch.setattr(crossover, "_fa3_version", lambda: "another")
    assert before != cuda.key
    assert "FA3" not in shape().key
    assert dataclasses.replace(shape(), sparse_layers=8).key != shape().key
