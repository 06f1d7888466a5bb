"""Selection: from what the probe rows' tiles hold to the tiles that patterns propose, for one request and modality.

Every pattern proposes :class:`~.choice.Levels` for all heads at once, found by :mod:`.search`; :func:`.choice.decide`
then picks a pattern and a threshold for each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from .choice import Budget, CellTiles, CellView, Choice, Levels, Proposal, SlashTiles, View
from .levels import ALWAYS, LEVELS, Curves
from .probe import Probe, Reach, WeightProbe
from .tiles import UNBOUNDED, Region, element_mask


class Search(Protocol):
    """The search, see :mod:`.search`; a device may have its own."""

    def columns_and_diagonals(
        self,
        held: torch.Tensor,
        size: torch.Tensor,
        row_of: torch.Tensor,
        slash: SlashTiles,
        causal: torch.Tensor,
        allowed: torch.Tensor,
        *,
        sharing: int,
    ) -> torch.Tensor:
        """Levels by columns and diagonals of the sequence pass."""
        ...

    def lines(
        self,
        held: torch.Tensor,
        size: torch.Tensor,
        row_of: torch.Tensor,
        cell: CellView,
        tiles: CellTiles,
        causal: torch.Tensor,
        allowed: torch.Tensor,
        *,
        min_lines: int,
        sharing: int,
    ) -> torch.Tensor:
        """Levels by v-lines, h-lines and neighbours of the cell pass."""
        ...

    def curves(self, held: torch.Tensor, size: torch.Tensor, levels: torch.Tensor, row_tiles: torch.Tensor) -> Curves:
        """What each threshold costs."""
        ...


@dataclass(frozen=True)
class Selection:
    """What patterns are proposed from: a request's rows of one modality, and some heads' probe of them.

    The view says how many of the heads share a list.
    """

    view: View
    probe: Probe
    budget: Budget
    search: Search
    _far: dict[tuple[Reach, ...], list[torch.Tensor]] = field(default_factory=dict, repr=False)

    def of(self, view: View) -> Selection:
        """The same rows in other query tiles; what keys hold of them is asked for once."""
        return replace(self, view=view)

    def a_shape(self, *, sink: int, window: int) -> Proposal:
        """Sink tokens and a local window of ``window`` keys, the row's own included (method: A-shape).

        Nothing is searched; only where nothing may be left out, everything is read.
        """
        if self.budget.exact:
            return self.proposal(self.vertical_slash(sink=sink, window=window))
        region = sink, max(window, 1)
        lost = (self.probe.held - self.probe.near(region)).sum(-1)
        # One tile that is not read holds all that is lost.
        never = torch.full((lost.shape[1], 1, 1), -1, dtype=torch.int8, device=lost.device)
        rows = torch.zeros_like(self.probe.row_of)
        curves = self.search.curves(lost[..., None], self.size, never, rows)
        tiles = self.view.count_near(*region).expand(self._lists, LEVELS + 1)
        levels = replace(self.window_levels(*region), pattern="a_shape")
        return Proposal(levels, replace(curves, tiles=tiles), searched=False)

    @cached_property
    def size(self) -> torch.Tensor:
        """Squared length of the probe rows' output: fp32 [H, P]."""
        return self.probe.output.square().sum(2)

    def window_levels(self, sink: int, reach: int) -> Levels:
        """All near tiles of a sink and a reach, and no others."""
        near = self.view.near_tiles(sink, reach)
        return Levels(_always(near), None, sink, reach)

    def dense_levels(self) -> Levels:
        """All causal tiles."""
        return replace(self.window_levels(0, UNBOUNDED), pattern="dense")

    def vertical_slash(self, *, sink: int, window: int) -> Levels:
        """Key tiles that all rows read (columns) and key tiles at fixed distances from the row's own (diagonals).

        The columns of the sink and the diagonals of the window are always read.
        """
        if self.budget.exact:
            return self.dense_levels()
        view = self.view
        slash = view.slash_tiles(sink, window)
        given = self.probe.held, self.size, self.probe.row_of, slash, view.causal_tiles, self.budget.allowed
        levels = self.search.columns_and_diagonals(*given, sharing=view.sharing)
        return Levels(levels, None, 0, UNBOUNDED, "vertical_slash")

    def grid(self, *, sink: int, reaches: Sequence[int], min_lines: int) -> list[tuple[Levels, torch.Tensor]]:
        """Same place in all frames (slash), places that all rows see (v-lines), rows that see all (h-lines).

        Always read are the sink, the last ``reach`` keys, the row's own included, and the query tile's own cells. By
        what their loss would cost come v-lines, which are key tiles of the cell order, text tiles and other items'
        among them; h-lines, which are bands of query tiles that read everything; and neighbours, the cells before and
        behind a query tile's own. At least ``min_lines`` v-lines are taken. Returns levels for each reach, with what
        the far region's tiles hold.
        """
        view, cell = self.view, self.view.cell
        if cell is None:
            raise ValueError("the grid pattern needs a cell pass; these rows have none")
        regions = tuple((sink, reach) for reach in reaches)
        if regions not in self._far:
            self._far[regions] = self.probe.far(regions)
        found = []
        for region, held in zip(regions, self._far[regions], strict=True):
            tiles = cell.tiles(*region)
            if self.budget.exact:
                far = _always(tiles.visible)
            else:
                given = held, self.size, self.probe.row_of, cell, tiles, view.causal_tiles, self.budget.allowed
                far = self.search.lines(*given, min_lines=min_lines, sharing=view.sharing)
            found.append((replace(self.window_levels(*region), far=far, pattern="grid"), held))
        return found

    def proposal(self, levels: Levels, far_held: torch.Tensor | None = None) -> Proposal:
        """With what the thresholds cost; ``far_held``: what tiles of the far region hold, of levels that read some."""
        if levels.far is None:
            return Proposal(levels, self._curves(self.probe.held, levels.near, self.view.row_tiles), searched=True)
        assert far_held is not None
        assert self.view.cell is not None
        curves = self._curves(far_held, levels.far, self.view.cell.row_tiles)
        tiles = curves.tiles + self.view.count_near(levels.sink, levels.reach)
        return Proposal(levels, replace(curves, tiles=tiles), searched=True)

    def _curves(self, held: torch.Tensor, levels: torch.Tensor, row_tiles: torch.Tensor) -> Curves:
        """``row_tiles`` int64 [R]: the probe rows' query tile."""
        levels = levels.expand(self._lists, -1, -1)
        return self.search.curves(held, self.size, levels, row_tiles[self.probe.row_of])

    @property
    def _lists(self) -> int:
        """Lists of a query tile, for the heads that were probed."""
        return self.probe.output.shape[0] // self.view.sharing


def on_text_keys(view: View, grid: Levels, pattern: str) -> Levels:
    """A grid's levels with another pattern on text keys (the paper's K- and 2D-boundary).

    Text keys behind the window are read in the cell pass, where they are tiles of their own: all of them for ``dense``,
    none for ``a_shape``, by what their loss costs otherwise.
    """
    assert view.cell is not None
    assert grid.far is not None
    keys = view.cell.keys
    if pattern == "a_shape":
        return replace(grid, far=grid.far.masked_fill(keys.has_text & ~keys.has_media, -1))
    if pattern == "dense":
        visible = view.cell.tiles(grid.sink, grid.reach).visible
        return replace(grid, far=grid.far.masked_fill(visible & keys.has_text, ALWAYS))
    return grid


def union(view: View, on_text: Levels, on_media: Levels) -> Levels:
    """One pattern on text keys and another on media keys, both in the sequence pass.

    Each key tile is read if the pattern of a modality it holds asks for it, and a row sees what either pattern's region
    admits.
    """
    near = torch.maximum(
        on_text.near.masked_fill(~view.keys.has_text, -1), on_media.near.masked_fill(~view.keys.has_media, -1)
    )
    sink, reach = max(on_text.sink, on_media.sink), max(on_text.reach, on_media.reach)
    return Levels(near, None, sink, reach, f"{on_text.pattern}+{on_media.pattern}")


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
