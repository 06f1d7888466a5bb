"""The Grafana dashboard in docs/ asks for metrics that there are, and docs/metrics.md names all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mminference_sgl.backend.metrics import METRICS, PREFIX, exported_names

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAME = re.compile(rf"{PREFIX}\w+")


def queries() -> list[str]:
    board: dict[str, Any] = json.loads((DOCS / "grafana-dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [*asked, *(one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query")]


@pytest.mark.parametrize("query", queries())
def test_names_in_a_query_exist(query: str) -> None:
    names = set(NAME.findall(query))
    assert names
    assert names <= exported_names()


def test_every_metric_is_shown_and_described() -> None:
    shown = {name for query in queries() for name in NAME.findall(query)}
    text = (DOCS / "metrics.md").read_text(encoding="utf-8")
    for metric in METRICS:
        assert any(name.startswith(PREFIX + metric.name) for name in shown), metric.name
        assert f"`{PREFIX}{metric.name}" in text, metric.name
