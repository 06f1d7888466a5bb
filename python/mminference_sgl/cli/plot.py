"""``mminference plot``: pictures of captures, see :mod:`mminference_sgl.backend.capture`.

Rows and keys are pooled to the picture's points by their largest weight, so that lines stay visible however thin they
are; what is even and faint looks fainter than it is in sum.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mminference_sgl.backend.capture import Capture, HeadSummary, files, load, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("map", "permuted", "tiles", "overview", "curves")
POINTS = 256
"""Points of a map in either direction, at most."""
LEAST = -5.0
"""Logarithm (base 10) of the weight at the dark end of the colours."""
_ROWS_AT_A_TIME = 512
_NEAR, _FAR = (0.1, 0.45, 0.9), (1.0, 0.5, 0.0)
_LETTERS = {"dense": "D", "grid": "G", "vertical_slash": "V", "a_shape": "A"}


def run(
    path: Path, out: Path, *, kind: str = "map", layer: int | None = None, head: int = 0, rows: str = "media"
) -> int:
    """Draw one picture; 0 if it was made, else 1.

    Args:
        path: a folder of captures, or one of them.
        out: a file whose suffix says the format, such as .png or .svg.
        kind: one of :data:`KINDS`.
        layer: id; None is the first captured one.
        head: id over all ranks.
        rows: modality of the rows.

    Of several chunks the last one is drawn, in the overview all of them.
    """
    if kind not in KINDS:
        print(f"kind must be one of {', '.join(KINDS)}, got {kind!r}", file=sys.stderr)
        return 1
    if importlib.util.find_spec("matplotlib") is None:
        print("mminference plot needs matplotlib: pip install 'mminference-sgl[plot]'", file=sys.stderr)
        return 1
    if not path.exists() or not files(path):
        print(f"{path}: no captures", file=sys.stderr)
        return 1
    if kind == "overview":
        figure = overview(summary(map(load, files(path))))
    else:
        found = _find(path, layer, head, rows)
        if found is None:
            wanted = "any layer" if layer is None else f"layer {layer}"
            print(f"{path}: no capture of {wanted}, head {head}, rows of {rows}", file=sys.stderr)
            return 1
        figure = draw(found, kind, head - found.about.first_head)
    save(figure, out)
    return 0


def save(figure: Figure, out: Path) -> None:
    """Writes a figure; a PNG with 128 colours, which takes a quarter of the space."""
    figure.savefig(out, dpi=100)
    if out.suffix.lower() == ".png":
        from PIL import Image

        with Image.open(out) as image:
            small = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(out, optimize=True)


def draw(capture: Capture, kind: str, head: int) -> Figure:
    """A picture of one head, counted within the capture; any of :data:`KINDS` but the overview."""
    if kind == "curves":
        return curves(capture, head)
    orders = {"map": ["sequence"], "permuted": ["cell"], "tiles": ["sequence", "cell"]}[kind]
    figure, axes = make_figure(len(orders), f"{_name(capture, head)}\n{figures(capture, head)}")
    for axis, order in zip(axes, orders, strict=True):
        panel(axis, capture, head, order, tiles=kind == "tiles")
    return figure


def before_and_after(capture: Capture, head: int, title: str) -> Figure:
    """One head's map by position, in cell order, and with what is read of it, in the order in which that is tiles."""
    figure, axes = make_figure(3, f"{title}\n{figures(capture, head)}")
    panel(axes[0], capture, head, "sequence", tiles=False)
    panel(axes[1], capture, head, "cell", tiles=False)
    panel(axes[2], capture, head, "cell" if capture.far[head].any() else "sequence", tiles=True)
    return figure


def overview(lines: Sequence[HeadSummary]) -> Figure:
    """Heads by layers: density and error as colours, the pattern as a letter."""
    lines = [line for line in lines if line.rows == ("media" if any(one.rows == "media" for one in lines) else "text")]
    layers = sorted({line.layer for line in lines})
    heads = max(line.head for line in lines) + 1
    figure, axes = make_figure(2, "heads by layers; " + ", ".join(f"{v} {k}" for k, v in _LETTERS.items()), scale=0.8)
    for axis, name, colours in ((axes[0], "density", "viridis"), (axes[1], "error", "magma")):
        values = torch.full((len(layers), heads), torch.nan)
        for line in lines:
            values[layers.index(line.layer), line.head] = getattr(line, name)
        top = 1.0 if name == "density" else float(values.nan_to_num().max())
        image = axis.imshow(values.numpy(), cmap=colours, vmin=0, vmax=top or 1.0, aspect="auto")
        figure.colorbar(image, ax=axis, label=name)
        if len(lines) <= 400:
            for line in lines:
                at = line.head, layers.index(line.layer)
                dark = getattr(line, name) < 0.6 * top
                letter = _LETTERS.get(line.pattern, "+")
                axis.text(*at, letter, ha="center", va="center", color="white" if dark else "black", fontsize=8)
        step = max(1, len(layers) // 16)
        axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axis.set(xlabel="head", ylabel="layer", title=name)
    return figure


def curves(capture: Capture, head: int) -> Figure:
    """What each pattern would lose, and keep, at each density; the mark is what was chosen."""
    figure, axes = make_figure(2, _name(capture, head), scale=0.8)
    causal, pick = capture.about.causal_tiles, int(capture.picked[head])
    for axis, name, chosen in ((axes[0], "error", capture.estimate), (axes[1], "coverage", capture.coverage)):
        values = capture.curve_error if name == "error" else capture.curve_coverage
        for index, (pattern, reach, sharing) in enumerate(capture.about.patterns):
            if values[index, head].isnan().any():
                continue
            says = f"{pattern}, window {reach}" if pattern == "grid" else pattern
            says += f", {sharing} heads" if sharing > 1 else ""
            density = capture.curve_tiles[index, head] / causal
            axis.plot(density.numpy(), values[index, head].numpy(), marker=".", label=says)
        if pick >= 0 and not capture.guarded[head]:
            axis.plot(float(capture.density[head]), float(chosen[head]), "k*", ms=12, label="chosen")
        axis.set(xlabel="density (tiles over causal tiles)", ylabel=name, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_title("relative error of the probe rows, estimated")
    axes[1].set_title("mass that the probe rows keep")
    return figure


def pooled(
    capture: Capture, head: int, order: str, points: int = POINTS
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Largest weight of each point, and whether a pass reads a key in it that its row sees.

    ``order``: of rows and keys, "sequence" or "cell". Returns weights fp32 [height, width], and bool [height, width]
    for the sequence pass and for the cell pass.
    """
    keys = torch.arange(capture.key.shape[0])
    rows = torch.arange(len(capture.positions))
    if order == "cell":
        keys = capture.cell_order
        rank = torch.empty_like(keys).scatter_(0, keys, torch.arange(len(keys)))
        rows = rank[capture.positions.long()].argsort()
    height, width = min(points, len(rows)), min(points, len(keys))
    columns, lines = (
        np.arange(points) * count // points for points, count in ((width, len(keys)), (height, len(rows)))
    )
    narrow: list[list[npt.NDArray[Any]]] = [[], [], []]
    for part in torch.split(rows, _ROWS_AT_A_TIME):
        kept = capture.kept(head, part)
        for found, values in zip(narrow, (capture.weights(head, part), kept == 1, kept == 2), strict=True):
            found.append(np.maximum.reduceat(values[:, keys].numpy(), columns, axis=1))
    weights, near, far = (np.maximum.reduceat(np.concatenate(found), lines, axis=0) for found in narrow)
    return weights, near, far


def panel(axis: Axes, capture: Capture, head: int, order: str, *, tiles: bool) -> None:
    """One map: of weights, or of the keys that are read over the weights in grey; ``order`` as in :func:`pooled`."""
    weights, near, far = pooled(capture, head, order)
    rows = len(capture.positions)
    extent = (0, capture.key.shape[0], rows, 0)
    shown = np.log10(np.maximum(weights, 10**LEAST))
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    image = axis.imshow(shown, cmap="gray" if tiles else "magma", vmin=LEAST, vmax=0, **style)
    if tiles:
        for seen, colour in ((near, _NEAR), (far, _FAR)):
            alpha = 0.55 * seen[..., None]
            axis.imshow(np.concatenate([np.broadcast_to(colour, (*seen.shape, 3)), alpha], axis=2), **style)
        axis.set_title("read: blue sequence pass, orange cell pass", fontsize=9)
    else:
        axis.set_title("by position" if order == "sequence" else "in cell order", fontsize=9)
        axis.figure.colorbar(image, ax=axis, label="weight, power of ten", fraction=0.046, pad=0.02)
    if order == "sequence":
        # Rows of one modality need not be consecutive tokens.
        ticks = [rows * part // 5 for part in range(5)]
        axis.set_yticks(ticks, [str(int(capture.positions[tick])) for tick in ticks])
        axis.set(xlabel="key (token position)", ylabel="row (token position)")
    else:
        axis.set(xlabel="keys, place by place", ylabel="rows, place by place", xticks=[], yticks=[])


def make_figure(panels: int, title: str, scale: float = 1.0) -> tuple[Figure, list[Axes]]:
    """An empty figure with so many panels beside one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.6 * panels if panels > 1 else 5.6, 4.6 * scale + 0.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def _name(capture: Capture, head: int) -> str:
    about = capture.about
    return f"layer {about.layer}, head {about.first_head + head}, tokens {about.prefix} to {about.prefix + about.chunk}"


def figures(capture: Capture, head: int) -> str:
    """What a head runs, and what that does, in a line."""
    guarded = ", computed again densely" if capture.guarded[head] else ""
    return (
        f"{capture.pattern(head)}{guarded}: density {float(capture.density[head]):.2f}, "
        f"coverage {float(capture.coverage[head]):.2f}, error {float(capture.error[head]):.3f}"
    )


def _find(path: Path, layer: int | None, head: int, rows: str) -> Capture | None:
    """The last capture of a layer that has the head."""
    found = None
    for file in files(path):
        one = load(file)
        about = one.about
        layer = about.layer if layer is None else layer
        if about.layer == layer and about.modality == rows and 0 <= head - about.first_head < one.heads:
            found = one
    return found
