"""Metrics: what has been counted is exported once, and exporting costs next to nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from prometheus_client import REGISTRY

from mminference_sgl.backend import metrics
from mminference_sgl.backend.figures import ChunkFigures
from mminference_sgl.backend.metrics import INFO, PREFIX, Metrics
from mminference_sgl.method.stage_clock import STAGES, StageClock

LABELS = {"model_name": "m", "tp_rank": "0"}
CHUNK = ChunkFigures(
    None,  # type: ignore[arg-type]
    0,
    509,
    2,
    tiles=30.0,
    causal=100.0,
    coverage=0.97,
    error=0.02,
    densities={0: 0.1, 1: 0.5},
    guarded={1: 3},
    dense=4,
)


@pytest.fixture
def exporter() -> Iterator[Metrics]:
    """In the process's own registry, which is empty again afterwards."""
    metrics._families.cache_clear()
    made = Metrics(LABELS, dict.fromkeys(INFO.labels, "x"))
    yield made
    for family in made._families.values():
        REGISTRY.unregister(family)
    metrics._families.cache_clear()


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(PREFIX + name, {**LABELS, **labels})


def test_totals_are_exported_once(exporter: Metrics) -> None:
    counters = {"sparse": 2, "dense:few rows": 1, "sparse_layers": 4, "dense_layers:sliding window": 4}
    counters |= {"guarded_heads:7": 3, "stride:found": 1}
    for _ in range(2):
        exporter.publish(counters, {"sparse": 900, "dense:few rows": 3}, {"plan": 0.5}, 6)
    exporter.publish({**counters, "sparse": 3}, {"sparse": 1400, "dense:few rows": 3}, {"plan": 0.75}, 5)
    assert sample("prefill_chunks_total", form="sparse", reason="") == 3
    assert sample("prefill_tokens_total", form="sparse", reason="") == 1400
    assert sample("prefill_tokens_total", form="dense", reason="few rows") == 3
    assert sample("layer_forwards_total", form="dense", reason="sliding window") == 4
    assert sample("guarded_heads_total", layer="7") == 3
    assert sample("stride_searches_total", result="found") == 1
    assert sample("stage_seconds_total", stage="plan") == 0.75
    assert sample("layouts") == 5


def test_figures_are_observed(exporter: Metrics) -> None:
    exporter.observe([CHUNK, CHUNK])
    assert sample("density_sum") == pytest.approx(0.6)
    assert sample("density_bucket", le="0.2") == 0
    assert sample("density_bucket", le="0.3") == 2
    assert sample("coverage_count") == 2
    assert sample("error_bucket", le="0.01") == 0


def test_two_backends_of_a_process_share_the_families(exporter: Metrics) -> None:
    again = Metrics(LABELS, dict.fromkeys(INFO.labels, "x"))
    for one in (exporter, again):
        one.publish({"sparse": 1}, {"sparse": 10}, {}, 0)
    assert sample("prefill_tokens_total", form="sparse", reason="") == 20


def test_a_clock_tells_each_stage_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = StageClock(torch.device("cpu")), iter([1.0, 3.0, 3.5, 10.0, 11.0, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    for stage in ("probe", "select", "", "probe", "attend", ""):
        clock.enter(stage)
    assert clock.seconds() == {"probe": 3.0, "select": 0.5, "attend": 1.0}


def test_a_forward_costs_less_than_a_millisecond(exporter: Metrics) -> None:
    """The worst: 64 layers, and the guard went off in each of them."""
    counters = {"sparse": 0, **{f"guarded_heads:{layer}": 0 for layer in range(64)}}
    seconds = dict.fromkeys(STAGES, 0.0)
    best = float("inf")
    for _ in range(50):
        began = time.perf_counter()
        clock = StageClock(torch.device("cpu"))
        for _ in range(64):
            for stage in (*STAGES, ""):
                clock.enter(stage)
        clock.seconds()
        counters = {key: count + 1 for key, count in counters.items()}
        seconds = {key: passed + 0.1 for key, passed in seconds.items()}
        exporter.observe([CHUNK])
        exporter.publish(counters, {"sparse": counters["sparse"]}, seconds, 1)
        best = min(best, time.perf_counter() - began)
    print(f"metrics: {best * 1e6:.0f} microseconds a forward")
    assert best < 1e-3
