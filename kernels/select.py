"""Selection: from the probe's attention mass to key tiles per (head, query tile), for one request and query modality.

Every pattern proposes a :class:`~.choice.Choice` for all heads at once; what it adds to what it always reads is found
by :mod:`.search`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from .choice import EXACT, CellTiles, CellView, Choice, Limits, SlashTiles, View, dense, within
from .probe import Probe, WeightProbe
from .search import Found, missing_mass
from .tiles import Region, element_mask


class Search(Protocol):
    """The two searches, see :mod:`.search`; a device may have its own."""

    def columns_and_diagonals(
        self, mass: torch.Tensor, slash: SlashTiles, causal: torch.Tensor, limits: Limits
    ) -> Found:
        """Columns and diagonals of the sequence pass."""
        ...

    def lines(
        self,
        mass: torch.Tensor,
        cell: CellView,
        tiles: CellTiles,
        near_count: torch.Tensor,
        causal: torch.Tensor,
        limits: Limits,
        *,
        min_lines: int,
    ) -> Found:
        """V-lines, h-lines and neighbours of the cell pass."""
        ...


def a_shape(view: View, probe: Probe, limits: Limits, *, sink: int, window: int) -> Choice:
    """Sink tokens and a local window of ``window`` keys, the row's own included (method: A-shape).

    Nothing is searched, so the only coverage it heeds is the exact one.
    """
    heads = probe.output.shape[0]
    if limits.coverage >= EXACT:
        return dense(view, heads)
    reach = max(window, 1)
    return _covering(within(view, heads, sink, reach), probe.near(sink, reach).sum(-1), limits.coverage)


def vertical_slash(view: View, probe: Probe, limits: Limits, search: Search, *, sink: int, window: int) -> Choice:
    """Key tiles that all rows read (columns) and key tiles at fixed distances from the row's own (diagonals).

    The columns of the sink and the diagonals of the window are always read; the others by probed mass.
    """
    base = dense(view, probe.output.shape[0])
    if limits.coverage >= EXACT:
        return base
    slash = view.slash_tiles(sink, window)
    found = search.columns_and_diagonals(probe.tile_mass, slash, view.causal_tiles, limits)
    return replace(base, near=found.tiles, coverage=found.coverage, missing=found.missing, tiles=found.count)


def grid(
    view: View, probe: Probe, limits: Limits, search: Search, *, sink: int, reaches: Sequence[int], min_lines: int
) -> list[Choice]:
    """Same place in all frames (slash), places that all rows see (v-lines), rows that see all (h-lines).

    Always read are the sink, the last ``reach`` keys, the row's own included, and the query tile's own cells. By probed
    mass come v-lines, which are key tiles of the cell order, text tiles and other items' among them; h-lines, which are
    bands of query tiles that read everything; and neighbours, the cells before and behind a query tile's own. At least
    ``min_lines`` v-lines are taken. Returns a choice for each reach.
    """
    cell = view.cell
    if cell is None:
        raise ValueError("the grid pattern needs a cell pass; these rows have none")
    heads = probe.output.shape[0]
    bases = [within(view, heads, sink, reach) for reach in reaches]
    tiles = [cell.tiles(sink, reach) for reach in reaches]
    if limits.coverage >= EXACT:
        return [
            replace(base, far=each.visible.expand(heads, -1, -1), tiles=base.tiles + each.visible.sum())
            for base, each in zip(bases, tiles, strict=True)
        ]
    choices = []
    masses = probe.far([(sink, reach) for reach in reaches])
    for base, each, mass, reach in zip(bases, tiles, masses, reaches, strict=True):
        near_count = view.count_near(sink, reach)
        found = search.lines(mass, cell, each, near_count, view.causal_tiles, limits, min_lines=min_lines)
        choices.append(
            replace(base, far=found.tiles, coverage=found.coverage, missing=found.missing, tiles=found.count)
        )
    return choices


def measured(view: View, probe: Probe, choice: Choice, limits: Limits) -> Choice:
    """The choice with the coverage that it really keeps and its tiles; patterns by themselves know theirs."""
    tiles = choice.near.sum((1, 2))
    by_row = (probe.near(choice.sink, choice.reach) * choice.near[:, view.row_tiles]).sum(-1)
    if choice.far is not None and view.cell is not None:
        by_row += (probe.far([(choice.sink, choice.reach)])[0] * choice.far[:, view.cell.row_tiles]).sum(-1)
        tiles = tiles + choice.far.sum((1, 2))
    return replace(_covering(choice, by_row, limits.coverage), tiles=tiles)


def _covering(choice: Choice, by_row: torch.Tensor, target: float) -> Choice:
    """The choice that keeps this mass of each probe row, fp32 [H, P]."""
    return replace(choice, coverage=by_row.mean(-1), missing=missing_mass(by_row, target))


def kept(view: View, probe: WeightProbe, choice: Choice) -> torch.Tensor:
    """Keys that the probe rows see under a choice, element by element: bool [H, P, keys]; what coverage means."""
    heads, rows, length = probe.weights.shape
    keys = torch.arange(length, device=probe.weights.device)
    sink, reach = choice.sink[:, None, None], choice.reach[:, None, None]
    near = element_mask(Region.NEAR, probe.rows.positions[:, None], keys[None, :], sink, reach)
    seen = near & choice.near[:, view.row_tiles].repeat_interleave(probe.tile_keys, dim=-1)
    if choice.far is not None and view.cell is not None:
        known = probe.cell_tile.numel()
        index = probe.cell_tile.expand(heads, rows, -1)
        far = (keys <= probe.rows.positions[:, None]) & ~near
        seen[..., :known] |= choice.far[:, view.cell.row_tiles].gather(2, index) & far[..., :known]
    return seen
