"""Samples: a long request now and then is told of, and a missed promise is a warning."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mminference_sgl.backend import samples
from mminference_sgl.backend.figures import ChunkFigures, Figures
from mminference_sgl.backend.samples import Samples
from mminference_sgl.method.prefill import LayerReport


def request(keys: int) -> Any:
    return SimpleNamespace(layout=keys, prefix=keys - 8, chunk=8)


def report(index: int, error: float, tiles: int = 30, guarded: int = 1) -> LayerReport:
    figures = (torch.tensor(x) for x in (tiles, 100, 0.9, error, guarded, 3))
    return LayerReport(index, *figures)


def chunks(keys: int, error: float) -> list[ChunkFigures]:
    return Figures([request(keys)], [(0, [report(0, error)])]).read()


@pytest.fixture(autouse=True)
def _listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=samples.logger.name)


def test_figures_are_by_request_whatever_order_layers_report_in() -> None:
    layers = [(3, [report(1, 0.04, guarded=0), report(0, 0.5)]), (7, [report(0, 0.2), report(1, 0.07, tiles=10)])]
    first, second = Figures([request(20), request(30)], layers).read()
    assert (first.prefix, first.num_keys, second.prefix, second.num_keys) == (12, 20, 22, 30)
    assert (first.layers, second.layers) == (2, 2)
    assert (first.layout, second.layout) == (20, 30)
    assert (first.density, second.density) == (0.3, 0.2)
    assert second.densities == pytest.approx({3: 0.3, 7: 0.1})
    assert (first.error, second.error) == pytest.approx((0.5, 0.07))
    assert (first.guarded, second.guarded) == ({3: 1, 7: 1}, {7: 1})
    assert (first.dense, second.dense) == (6, 6)


def test_figures_under_way_are_waited_for_by_readers_alone() -> None:
    figures = Figures([request(20)], [(0, [report(0, 0.1)])])
    assert figures.arrived
    waits: list[str] = []
    figures._ready = SimpleNamespace(query=lambda: False, synchronize=lambda: waits.append("waited"))
    assert not figures.arrived
    assert waits == []
    figures.read()
    assert waits == ["waited"]


def test_the_longest_request_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    found = Samples(0.1)
    both = [*chunks(samples.LONG, 0.5), *chunks(samples.LONG + 1, 0.07)]
    found.tell(both)
    found.tell(both)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    for part in (
        f"prefix={samples.LONG - 7}",
        "layers=1",
        "density=0.3000",
        "error=0.0700",
        "guarded_heads=1",
        "dense_heads=3",
    ):
        assert part in record.getMessage()


def test_a_missed_promise_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Samples(0.1).tell(chunks(samples.LONG, 0.11))
    assert caplog.records[0].levelno == logging.WARNING
    assert "more than the error of 0.1 that was asked for" in caplog.text


def test_short_requests_and_those_too_soon_are_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(samples.time, "monotonic", lambda: clock.now)
    found = Samples(0.1)
    found.tell([])
    found.tell(chunks(samples.LONG - 1, 0.01))
    assert caplog.records == []
    for clock.now in (100.0, 109.0, 110.0):
        found.tell(chunks(samples.LONG, 0.01))
    assert len(caplog.records) == 2
