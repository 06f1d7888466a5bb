"""Offline search of a pattern for every head, on calibration clips; knows neither SGLang nor models.

:func:`score` says for one layer of one chunk what every candidate pair of patterns costs each head and loses, at every
threshold; scores of chunks add up to those of a clip. :func:`choose` then takes for each head the map whose output is
off least within a budget of tiles, and :func:`measure` says what chosen maps really lose, layer by layer.

A map's two halves, the pairs that text rows and media rows run, cost and lose apart from one another, so all maps are
compared by scoring the halves only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from mminference_sgl.kernels.choice import Proposal
from mminference_sgl.kernels.levels import LEVELS
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import MODALITIES, HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import ForwardPlan

Array = npt.NDArray[np.float64]

PROBE_ONE_IN = 16
"""One row in so many is probed."""
ERROR = 0.05
"""Bound that levels are counted from: small, so that the thresholds reach from next to nothing to most of the tiles."""
WINDOWS = (128, 256, 512, 1024, 2048, 4096)
"""Windows of A-shape that are scored; a pattern file has one."""
CHEAP_TEXT = 0.25
"""Rows of text run dense where that costs no more than this share of a head's budget."""
TIE = 0.05
"""Share of the best map's error energy by which a simpler map may be worse: what the probe's estimate is good for."""
GOOD = 0.05
"""Error of a head's output below which maps are as good as one another."""
COMBINE = ("worst", "mean")

Pair = prefill.Pair


@dataclass(frozen=True)
class Candidate:
    """What rows of a modality may run: patterns on text keys and on media keys; ``window`` of A-shape, 0 without."""

    rows: str
    pair: Pair
    window: int = 0

    @property
    def kinds(self) -> set[str]:
        """The patterns in it."""
        return set(self.pair)


_PAIRS: Mapping[str, Sequence[Pair]] = {
    "text": (
        ("dense", "dense"),
        ("a_shape", "a_shape"),
        ("vertical_slash", "vertical_slash"),
        ("dense", "a_shape"),
        ("dense", "vertical_slash"),
        ("a_shape", "vertical_slash"),
        ("vertical_slash", "a_shape"),
    ),
    "media": (
        ("a_shape", "a_shape"),
        ("vertical_slash", "vertical_slash"),
        ("grid", "grid"),
        ("dense", "a_shape"),
        ("dense", "vertical_slash"),
        ("dense", "grid"),
        ("a_shape", "vertical_slash"),
        ("a_shape", "grid"),
        ("vertical_slash", "a_shape"),
    ),
}
"""By modality of the rows, the plainest first. On text keys a grid takes lines by loss, as vertical-slash does."""


@cache
def candidates() -> tuple[Candidate, ...]:
    """All candidates, in the order of the scores."""
    return tuple(
        Candidate(rows, pair, window)
        for rows in MODALITIES
        for pair in _PAIRS[rows]
        for window in (WINDOWS if "a_shape" in pair and "grid" not in pair else (0,))
    )


@dataclass(frozen=True)
class _Sums:
    """Figures that are summed over chunks, field by field."""

    def __add__(self, other: Self) -> Self:
        names = [f.name for f in dataclasses.fields(self)]
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True)
class Scores(_Sums):
    """What candidates cost and lose, of one layer, summed over chunks.

    ``error``, ``tiles`` [candidates, 2, H, thresholds]: energy that the rows' output loses, and tiles read, for
    up to two forms of a pattern (a grid's two windows). ``energy`` [2, H]: of the dense output, by the rows' modality.
    ``causal`` [2]: tiles that dense attention reads per head.
    """

    error: Array
    tiles: Array
    energy: Array
    causal: Array

    @classmethod
    def concatenate(cls, ranks: Sequence[Scores]) -> Scores:
        """Those of consecutive blocks of heads as one."""
        error, tiles = (np.concatenate([getattr(one, name) for one in ranks], axis=2) for name in ("error", "tiles"))
        return cls(error, tiles, np.concatenate([one.energy for one in ranks], axis=1), ranks[0].causal)


def search_config(config: Config) -> Config:
    """The configuration that candidates are scored with."""
    return dataclasses.replace(config, error=ERROR, text_error=ERROR)


def score(
    operands: Operands, plan: ForwardPlan, config: Config, implementation: str = "torch", layer: int | None = None
) -> Scores:
    """Scores all candidates for all heads of one layer; a search for strides listens, if there is one.

    ``plan``: of one request, with as many probe rows as one can afford (:data:`PROBE_ONE_IN`). Heads are probed in
    blocks, so that memory is that of one block whatever the number of heads.
    """
    config, known, heads = search_config(config), candidates(), operands.heads
    shape = len(known), 2, heads, LEVELS + 1
    scores = Scores(np.zeros(shape), np.zeros(shape), np.zeros((2, heads)), np.zeros(2))
    for group in plan.groups:
        modality, rows = MODALITIES.index(group.modality), group.row_slots.stop - group.row_slots.start
        causal = int(group.view.causal_tiles)
        scores.causal[modality] += causal
        for block, selection in prefill.selections(operands, plan, group, config, implementation, layer):
            scores.energy[modality, block] += _host(selection.budget.energy) * rows
            for window in (0, *WINDOWS):
                own = [i for i, one in enumerate(known) if one.rows == group.modality and one.window == window]
                forms: dict[Pair, list[Proposal]] = {}
                pairs = [known[i].pair for i in own]
                for pair, proposal in prefill.propose(selection, with_window(config, window), pairs):
                    forms.setdefault(pair, []).append(proposal)
                for i in own:
                    found = forms.get(known[i].pair)
                    for form in range(2):
                        if found is None:
                            scores.tiles[i, form, block] += causal
                            continue
                        curves = found[min(form, len(found) - 1)].curves
                        scores.error[i, form, block] += _host(curves.error) * rows
                        scores.tiles[i, form, block] += _host(curves.tiles)
    return scores


def _host(values: torch.Tensor) -> Array:
    return values.double().cpu().numpy()


def with_window(config: Config, window: int) -> Config:
    """The configuration with another window of A-shape, 0 for its own."""
    if not window:
        return config
    shape = dataclasses.replace(config.patterns.a_shape, window=window)
    return dataclasses.replace(config, patterns=dataclasses.replace(config.patterns, a_shape=shape))


@dataclass(frozen=True)
class Chosen:
    """Maps of a layer's heads; ``error`` [H]: relative error of each head's output that the scores foresee."""

    specs: list[HeadSpec]
    error: Array


def window_for(layers: Iterable[Sequence[Scores]], density: float, combine: str = "worst") -> int:
    """The window of A-shape for all heads of all layers, each with its scores by clip; see :func:`choose`.

    Of those whose maps' error energies have the least geometric mean, up to :data:`TIE`, the one that most heads run
    A-shape with, and of these the smallest. Errors below :data:`GOOD` are as good as one another.
    """
    heads = 0
    total, users = np.zeros(len(WINDOWS)), np.zeros(len(WINDOWS))
    for clips in layers:
        for index, window in enumerate(WINDOWS):
            found = choose(clips, density, window, combine)
            error = np.where(np.isfinite(found.error), np.maximum(found.error, GOOD), 1.0)
            total[index] += 2 * np.log(error).sum()
            users[index] += sum(spec.of("media") == ("a_shape", "a_shape") for spec in found.specs)
        heads += len(found.specs)
    return WINDOWS[int(np.where(total <= total.min() + heads * np.log1p(TIE), users, -1).argmax())]


def choose(clips: Sequence[Scores], density: float, window: int, combine: str = "worst") -> Chosen:
    """The map of each head of a layer.

    Each candidate counts with the least error among thresholds whose tiles keep to the density, relative to the head's
    dense output; those that cannot keep to it are out. A map's error energy is the sum over text and media rows;
    over clips the worst or the mean counts. Of maps within :data:`TIE` of the best, or within :data:`GOOD` of dense
    attention, the simplest is taken: by boundary, then by the number of patterns, then by the order of
    :func:`candidates`. Rows for which no candidate can keep to the density run dense if they are text, else ``auto``.

    Args:
        clips: scores of the layer, one per calibration clip.
        density: tiles to read, as a share of causal tiles, of the text rows and of the media rows by themselves.
        window: of A-shape.
        combine: one of :data:`COMBINE`.
    """
    known = candidates()
    lost = np.stack([_lost(clip, density) for clip in clips])
    energy = lost.max(0) if combine == "worst" else lost.mean(0)
    cheap = all(clip.causal[0] <= CHEAP_TEXT * density * clip.causal.sum() for clip in clips)
    rows: dict[str, list[int]] = {
        modality: [i for i, one in enumerate(known) if one.rows == modality and one.window in {0, window}]
        for modality in MODALITIES
    }
    dense = rows["text"][0]
    beyond = np.isinf(energy[rows["text"]]).all(0)
    energy[dense] = np.where(beyond, 0.0, energy[dense])
    if cheap:
        rows["text"], energy[dense] = [dense], 0.0
    maps = sorted(product(rows["text"], rows["media"]), key=lambda pair: _complexity(known[pair[0]], known[pair[1]]))
    text, media = (list(side) for side in zip(*maps, strict=True))
    together = energy[text] + energy[media]
    best = together.min(0)
    # The first of those that are as good, in the order of simplicity.
    taken = (together <= np.maximum(best * (1 + TIE), GOOD**2)).argmax(0)
    specs = []
    for head, pick in enumerate(taken):
        if np.isfinite(best[head]):
            specs.append(HeadSpec(*known[text[pick]].pair, *known[media[pick]].pair))
        else:
            own = energy[rows["text"], head].argmin()
            specs.append(HeadSpec(*known[rows["text"][own]].pair))
    return Chosen(specs, np.sqrt(together[taken, np.arange(len(taken))]))


def _lost(clip: Scores, density: float) -> Array:
    """Least relative error energy of each candidate within the density: [candidates, H], inf where none is."""
    modality = np.array([MODALITIES.index(one.rows) for one in candidates()])
    energy, causal = clip.energy[modality], clip.causal[modality]
    within = clip.tiles <= density * causal[:, None, None, None]
    least = np.where(within, clip.error, np.inf).min((1, 3))
    # Rows that a clip does not have lose nothing.
    return np.where(causal[:, None] > 0, least / np.maximum(energy, 1e-30), 0.0)


BOUNDARIES = ("no", "k", "q", "2d")
"""Boundaries between modalities, the simplest first."""


def boundary(spec: HeadSpec) -> str:
    """What a map depends on: one of :data:`BOUNDARIES`.

    Rows of text have no place in a frame, so to them vertical-slash is what a grid is to media rows: lines by loss.
    """
    media = spec.of("media")
    text: Pair = tuple(  # type: ignore[assignment]
        "grid" if (own, other) == ("vertical_slash", "grid") else own
        for own, other in zip(spec.of("text"), media, strict=True)
    )
    by_query = text != media
    by_key = text[0] != text[1] or media[0] != media[1]
    if by_query and by_key:
        return "2d"
    return "q" if by_query else "k" if by_key else "no"


def _complexity(text: Candidate, media: Candidate) -> tuple[int, int]:
    spec = HeadSpec(*text.pair, *media.pair)
    return BOUNDARIES.index(boundary(spec)), len(text.kinds | media.kinds)


@dataclass(frozen=True)
class Measured(_Sums):
    """What maps lose and read, of one layer, summed over chunks: [H] each.

    ``error``, ``energy``: of the output, all rows. ``mass``: kept, summed over rows. ``tiles``, ``causal``; ``rows``.
    """

    error: Array
    energy: Array
    mass: Array
    tiles: Array
    causal: Array
    rows: Array

    @classmethod
    def concatenate(cls, ranks: Sequence[Measured]) -> Measured:
        """That of consecutive blocks of heads as one."""
        names = [f.name for f in dataclasses.fields(Measured)]
        return cls(*(np.concatenate([getattr(one, name) for one in ranks]) for name in names))

    def figures(self) -> list[dict[str, float]]:
        """By head: the relative ``error`` of the output, the share of ``mass`` that is kept, the ``density``."""
        figures = {
            "error": np.sqrt(self.error / np.maximum(self.energy, 1e-30)),
            "mass": self.mass / np.maximum(self.rows, 1),
            "density": self.tiles / np.maximum(self.causal, 1),
        }
        return [{name: round(float(v[head]), 5) for name, v in figures.items()} for head in range(len(self.rows))]


def measure(
    operands: Operands,
    plan: ForwardPlan,
    specs: Sequence[HeadSpec],
    config: Config,
    dense: torch.Tensor,
    implementation: str = "torch",
) -> Measured:
    """Computes a layer with chosen maps at the density of ``config.max_density``, without a guard.

    Args:
        operands: of all heads of this rank.
        plan: of one request.
        specs: one per head.
        config: its ``patterns`` and ``max_density`` count; its error bounds do not.
        dense: [batch rows, H, Dv], the exact output.
        implementation: a resolved name.
    """
    config = search_config(config)
    out = torch.zeros_like(dense)
    reports = prefill.run_heads(operands, plan, specs, config, out, implementation)
    heads = operands.heads
    sums = {f.name: np.zeros(heads) for f in dataclasses.fields(Measured)}
    for report in reports:
        rows = plan.near.rows[report.group.row_slots]
        exact = dense[rows].double()
        sums["error"] += _host((out[rows].double() - exact).square().sum((0, 2)))
        sums["energy"] += _host(exact.square().sum((0, 2)))
        sums["mass"] += _host(report.coverage) * len(rows)
        sums["tiles"] += _host(report.tiles)
        sums["causal"] += int(report.causal)
        sums["rows"] += len(rows)
    return Measured(**sums)


def rules(specs: Mapping[int, Sequence[HeadSpec]]) -> list[dict[str, Any]]:
    """Rules of a pattern file, schema 1: for each layer one rule per map, with the heads that have it.

    A layer whose heads all have one map names no heads.
    """
    found: list[dict[str, Any]] = []
    for layer in sorted(specs):
        by_map: dict[HeadSpec, list[int]] = {}
        for head, spec in enumerate(specs[layer]):
            by_map.setdefault(spec, []).append(head)
        for spec, heads in by_map.items():
            named = {} if len(by_map) == 1 else {"heads": heads}
            found.append({"layers": [layer], **named, "map": _map(spec)})
    return found


def _map(spec: HeadSpec) -> dict[str, str]:
    entries: dict[str, str] = {}
    for query in MODALITIES:
        on_text, on_media = spec.of(query)
        if on_text == on_media:
            entries[query] = on_text
        else:
            entries |= {f"{query}->text": on_text, f"{query}->media": on_media}
    return entries
