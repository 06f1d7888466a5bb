"""Selection: from what the probe rows' tiles hold to the tiles that patterns propose, for one request and modality.

A :class:`Form` says where a pattern's tiles get their levels from; :mod:`.search` finds them for all heads at once, and
:func:`.choice.decide` picks a form and a threshold for each head. This is the portable way and the specification of
:mod:`.select_triton`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from . import search
from .choice import Budget, Choice, Levels, Proposal, View
from .levels import ALWAYS, LEVELS, Curves
from .probe import ProbeKeys, ProbeRows, Reach, WeightProbe
from .tiles import Region, element_mask


class Tiles(Protocol):
    """Where the query tiles of a row group are among those of the two passes of a tiling."""

    @property
    def near(self) -> slice:
        """In the sequence pass."""
        ...

    @property
    def far(self) -> slice:
        """In the cell pass."""
        ...


class Near(NamedTuple):
    """Keys of the sequence pass: all tiles of the near region of a sink and a reach."""

    sink: int
    reach: int


class Slash(NamedTuple):
    """Keys of the sequence pass: columns and diagonals by level, those of the sink and the window in any case.

    Columns are key tiles that all rows read, diagonals such at fixed distances from the row's own.
    """

    sink: int
    window: int


class Far(NamedTuple):
    """Tiles of the cell pass: those that a grid reads beyond its near region.

    Same place in all frames (slash), places that all rows see (v-lines), rows that see all (h-lines). Always read are
    the query tile's own cells. By what their loss would cost come v-lines, which are key tiles of the cell order, text
    tiles and other items' among them; h-lines, which are bands of query tiles that read everything; and neighbours, the
    cells before and behind a query tile's own. At least ``min_lines`` v-lines are taken of each list. ``exact``:
    everything is read.

    ``on_text``: tiles of text keys alone are read by level, never (``a_shape``), or, with all that hold some, always
    (``dense``): the paper's K- and 2D-boundary.
    """

    on_text: str
    min_lines: int
    exact: bool


@dataclass(frozen=True)
class Form:
    """What a pattern may read, of which a head picks one: where tiles get their levels from.

    ``on_text``, ``on_media``: of key tiles in the sequence pass that hold a modality; a tile of both has the higher
    level. ``sink``, ``reach``: the near region. ``far`` is None where nothing is read in the cell pass. ``searched``:
    whether a threshold makes a difference.
    """

    pattern: str
    on_text: Near | Slash
    on_media: Near | Slash
    sink: int
    reach: int
    far: Far | None = None
    searched: bool = True


@dataclass(frozen=True)
class FormsOffer:
    """Forms for the lists of a tiling; ``wanted``: by form, which lists may have it."""

    view: View
    forms: Sequence[Form]
    wanted: Sequence[Sequence[bool]]


@dataclass(frozen=True)
class Task:
    """A row group whose tiles are to be selected, for :mod:`.select_triton`.

    ``row_slots``: its row slots in the sequence pass. ``offers``: by tiling. ``tiles``: by how many heads share, the
    group's query tiles in the two passes. ``bound``: error that is allowed; ``ceiling``: beyond which heads go dense.
    ``max_density``, ``ease``: as in :class:`~.choice.Budget`. ``picks`` int64 [layers, H]: what was picked in the chunk
    before. ``searched``: whether some head of the layer does not run dense.
    """

    request: int
    rows: ProbeRows
    row_slots: slice
    keys: ProbeKeys
    offers: Sequence[FormsOffer]
    tiles: Mapping[int, Tiles]
    bound: float
    max_density: float
    ease: float
    ceiling: float
    picks: torch.Tensor
    searched: bool

    def wants(self, head: int) -> bool:
        """Whether a head may have some form."""
        offer = self.offers[0]
        return any(flags[head] for flags in offer.wanted)

    def fixed(self, head: int) -> bool:
        """Whether a head has a form whose threshold makes no difference."""
        offer = self.offers[0]
        return any(flags[head] and not form.searched for form, flags in zip(offer.forms, offer.wanted, strict=True))


@dataclass(frozen=True)
class Selection:
    """What patterns are proposed from: a request's rows of one modality, and some heads' probe of them.

    The view says how many of the heads share a list.
    """

    view: View
    probe: WeightProbe
    budget: Budget
    _far: dict[Reach, torch.Tensor] = field(default_factory=dict, repr=False)

    def of(self, view: View) -> Selection:
        """The same rows in other query tiles; what keys hold of them is asked for once."""
        return replace(self, view=view)

    @cached_property
    def size(self) -> torch.Tensor:
        """Squared length of the probe rows' output: fp32 [H, P]."""
        return self.probe.output.square().sum(2)

    def proposal(self, form: Form) -> Proposal:
        """A form's levels, with what the thresholds cost."""
        levels, view = self.levels(form), self.view
        if not form.searched:
            # One tile that is not read holds all that is lost.
            lost = (self.probe.held - self.probe.near((form.sink, form.reach))).sum(-1, keepdim=True)
            never = torch.full((lost.shape[1], 1, 1), -1, dtype=torch.int8, device=lost.device)
            curves = search.curves(lost, self.size, never, torch.zeros_like(self.probe.row_of))
            tiles = view.count_near(form.sink, form.reach).expand(self._lists, LEVELS + 1)
        elif levels.far is None:
            curves = self._curves(self.probe.held, levels.near, view.row_tiles)
            tiles = curves.tiles
        else:
            assert view.cell is not None
            curves = self._curves(self._far_held((form.sink, form.reach)), levels.far, view.cell.row_tiles)
            tiles = curves.tiles + view.count_near(form.sink, form.reach)
        return Proposal(levels, replace(curves, tiles=tiles), form.searched)

    def levels(self, form: Form) -> Levels:
        """The levels of all tiles."""
        near = self._near_levels(form.on_media)
        if form.on_text != form.on_media:
            keys, on_text = self.view.keys, self._near_levels(form.on_text)
            near = torch.maximum(on_text.masked_fill(~keys.has_text, -1), near.masked_fill(~keys.has_media, -1))
        far = None if form.far is None else self._far_levels(form.far, form.sink, form.reach)
        return Levels(near, far, form.sink, form.reach, form.pattern)

    def _near_levels(self, source: Near | Slash) -> torch.Tensor:
        view = self.view
        if isinstance(source, Near):
            return _always(view.near_tiles(*source))
        given = self.probe.held, self.size, self.probe.row_of, view.slash_tiles(*source), view.causal_tiles
        return search.columns_and_diagonals(*given, self.budget.allowed, sharing=view.sharing)

    def _far_levels(self, far: Far, sink: int, reach: int) -> torch.Tensor:
        view, cell = self.view, self.view.cell
        if cell is None:
            raise ValueError("the grid pattern needs a cell pass; these rows have none")
        tiles, keys = cell.tiles(sink, reach), cell.keys
        if far.exact:
            return _always(tiles.visible)
        given = self._far_held((sink, reach)), self.size, self.probe.row_of, cell, tiles, view.causal_tiles
        levels = search.lines(*given, self.budget.allowed, min_lines=far.min_lines, sharing=view.sharing)
        if far.on_text == "a_shape":
            return levels.masked_fill_(keys.has_text & ~keys.has_media, -1)
        if far.on_text == "dense":
            return levels.masked_fill_(tiles.visible & keys.has_text, ALWAYS)
        return levels

    def _far_held(self, region: Reach) -> torch.Tensor:
        if region not in self._far:
            self._far[region] = self.probe.far(region)
        return self._far[region]

    def _curves(self, held: torch.Tensor, levels: torch.Tensor, row_tiles: torch.Tensor) -> Curves:
        """``row_tiles`` int64 [R]: the probe rows' query tile."""
        levels = levels.expand(self._lists, -1, -1)
        return search.curves(held, self.size, levels, row_tiles[self.probe.row_of])

    @property
    def _lists(self) -> int:
        """Lists of a query tile, for the heads that were probed."""
        return self.probe.output.shape[0] // self.view.sharing


def _always(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles that are read in any case, bool [t, n], as levels [1, t, n]."""
    return torch.where(tiles, ALWAYS, -1).to(torch.int8)[None]


def kept(view: View, probe: WeightProbe, choice: Choice) -> torch.Tensor:
    """Keys that the probe rows see under a choice, element by element: bool [H, P, keys]; what coverage means."""
    heads, rows, length = probe.weights.shape
    keys = torch.arange(length, device=probe.weights.device)
    sink, reach = choice.sink[:, None, None], choice.reach[:, None, None]
    positions, head = probe.rows.positions[probe.row_of][..., None], torch.arange(heads, device=keys.device)[:, None]
    near = element_mask(Region.NEAR, positions, keys, sink, reach)
    seen = near & choice.near[head, view.row_tiles[probe.row_of]].repeat_interleave(probe.tile_keys, dim=-1)
    if choice.far is not None and view.cell is not None:
        known = probe.cell_tile.numel()
        index = probe.cell_tile.expand(heads, rows, -1)
        far = (keys <= positions) & ~near
        seen[..., :known] |= choice.far[head, view.cell.row_tiles[probe.row_of]].gather(2, index) & far[..., :known]
    return seen
