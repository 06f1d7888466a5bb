"""Samples: a long request now and then is told of once its figures are there, and a missed promise is a warning."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mminference_sgl.backend import samples
from mminference_sgl.backend.samples import Samples
from mminference_sgl.method.prefill import LayerReport


def request(keys: int) -> Any:
    return SimpleNamespace(prefix=keys - 8, chunk=8, num_keys=keys)


def report(index: int, error: float, tiles: int = 30) -> LayerReport:
    figures = (torch.tensor(x) for x in (tiles, 100, 0.9, error, 1, 3))
    return LayerReport(index, *figures)


@pytest.fixture(autouse=True)
def _listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=samples.logger.name)


def test_the_longest_request_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    found = Samples(0.1)
    reports = [report(0, 0.5), report(1, 0.04), report(1, 0.07, tiles=10)]
    found.take([request(samples.LONG), request(samples.LONG + 1)], reports)
    assert caplog.records == [], "nothing is waited for"
    found.tell()
    found.tell()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    for part in (
        f"prefix={samples.LONG - 7}",
        "layers=2",
        "density=0.2000",
        "error=0.0700",
        "guarded_heads=2",
        "dense_heads=6",
    ):
        assert part in record.getMessage()


def test_a_missed_promise_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    found = Samples(0.1)
    found.take([request(samples.LONG)], [report(0, 0.11)])
    found.tell()
    assert caplog.records[0].levelno == logging.WARNING
    assert "more than the error of 0.1 that was asked for" in caplog.text


def test_short_requests_and_those_too_soon_are_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(samples.time, "monotonic", lambda: clock.now)
    found = Samples(0.1)
    found.take([request(samples.LONG - 1)], [report(0, 0.01)])
    found.tell()
    assert caplog.records == []
    for clock.now in (100.0, 109.0, 110.0):
        found.take([request(samples.LONG)], [report(0, 0.01)])
        found.tell()
    assert len(caplog.records) == 2


def test_what_is_under_way_is_waited_for_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    found = Samples(0.1)
    found.take([request(samples.LONG)], [report(0, 0.01)])
    arrived = SimpleNamespace(query=lambda: False)
    found._pending = samples._Sample(**{**vars(found._pending), "ready": arrived})
    found.tell()
    assert caplog.records == []
    arrived.query = lambda: True
    found.tell()
    assert len(caplog.records) == 1
