"""Figures of the README and of docs/ are those of the committed result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.figures import __main__ as figures


@pytest.mark.parametrize("page", figures.PAGES)
def test_tables_are_those_of_the_result_files(page: str) -> None:
    assert figures.rendered(page) == (figures.ROOT / page).read_text(), "make figures"


def test_every_table_stands_on_a_page() -> None:
    text = "".join((figures.ROOT / page).read_text() for page in figures.PAGES)
    # As whole blocks: what is not one would never be written.
    assert {name for _, name, _ in figures._BLOCK.findall(text)} == set(figures.TABLES)
    assert text.count("<!-- end of figures -->") == len(figures.TABLES)


def test_another_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (figures.ROOT / "README.md").read_text()
    assert "1.000" in text
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PAGES", ("README.md",))
    (tmp_path / "README.md").write_text(text.replace("| 1.000 |", "| 0.999 |", 1))
    assert figures.main(["--check"]) == 1
    (tmp_path / "README.md").write_text(text)
    assert figures.main(["--check"]) == 0


def test_plots_are_those_of_the_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = figures.PICTURES
    monkeypatch.setattr(figures, "PICTURES", tmp_path)
    figures.draw()
    for drawn in tmp_path.glob("*.svg"):
        # Another version of matplotlib may set the same text at other places.
        texts = [re.findall(r"<!-- (.*?) -->", path.read_text()) for path in (drawn, committed / drawn.name)]
        assert texts[0] == texts[1], drawn.name
    assert {path.name for path in tmp_path.iterdir()} == {"speed.svg", "answers.svg"}
