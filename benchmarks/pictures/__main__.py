"""``make pictures``: those of docs/patterns-in-pictures.md, from planted heads and from the toy model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.pictures.captures import planted_captures, toy_captures
from mminference_sgl.backend.capture import summary
from mminference_sgl.cli import plot
from mminference_sgl.method.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.figure import Figure

FOLDER = Path(__file__).parents[2] / "docs" / "pictures"
TOKENS = 8192


def pictures() -> Iterator[tuple[str, Figure]]:
    """Name and figure of each."""
    (grid,) = planted_captures("no-window", TOKENS)
    yield "grid", plot.before_and_after(grid, 0, "A planted grid head")
    yield "curves", plot.curves(grid, 0)
    (slash,) = planted_captures("vertical-slash", TOKENS // 2)
    yield "vertical-slash", plot.before_and_after(slash, 0, "A planted vertical-slash head")
    even = Config(text_error=Config().error)
    text, media = sorted(
        planted_captures("2d-boundary", TOKENS, config=even), key=lambda one: one.about.modality == "media"
    )
    titles = "media rows by position", "media rows in cell order, what is read", "text rows by position, what is read"
    lines = [f"{one.about.modality} rows: {plot.figures(one, 0)}" for one in (media, text)]
    figure, axes = plot.make_figure(3, "\n".join(["A planted 2D-boundary head", *lines]))
    plot.panel(axes[0], media, 0, "sequence", tiles=False)
    plot.panel(axes[1], media, 0, "cell", tiles=True)
    plot.panel(axes[2], text, 0, "sequence", tiles=True)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
    yield "2d-boundary", figure
    layers = toy_captures(np.random.default_rng(0))
    yield "toy-slash", plot.before_and_after(layers[0], 1, "Toy model, layer 0, head 1, second half of a video")
    yield "toy-overview", plot.overview(summary(layers))


def main(argv: Sequence[str] | None = None) -> int:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: that of the documentation)")
    folder = parser.parse_args(argv).out
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures():
        path = folder / f"{name}.png"
        plot.save(figure, path)
        print(f"{path} {path.stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
