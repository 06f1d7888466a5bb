"""Selection: from the probe's attention mass to key tiles per (head, query tile), for one request and query modality.

Every pattern proposes a :class:`~.choice.Choice` for all heads at once. What a pattern may add beyond what it always
reads is a list of *candidates*, sets of tiles such as a column or a diagonal. A candidate's *level* is the logarithm of
its useful mass per tile, in steps of a third of an octave; a tile's level is the highest of the candidates it is in.
Candidates are taken from the highest level down to a threshold, so summing the mass of the probe rows' tiles by level
tells once what every threshold reaches.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .choice import EXACT, SLACK, Choice, Limits, SlashTiles, View, dense
from .probe import Probe, WeightProbe
from .tiles import Region, element_mask

LEVELS = 63
"""Levels of candidates, 0 to 62: 21 octaves of mass per tile."""
ALWAYS = LEVELS
"""Level of what is read in any case, the highest threshold."""
PER_OCTAVE = 3
WORTH = 18
"""The level that begins at ``min_gain``. Six octaves below it is the last one, which takes all that is less."""


def a_shape(view: View, probe: Probe, limits: Limits, *, sink: int, window: int) -> Choice:
    """Sink tokens and a local window of ``window`` keys, the row's own included (method: A-shape).

    Nothing is searched, so the only coverage it heeds is the exact one.
    """
    heads = probe.output.shape[0]
    base = dense(view, heads)
    if limits.coverage >= EXACT:
        return base
    reach = max(window, 1)
    choice = replace(
        base,
        near=view.near_tiles(sink, reach).expand(heads, -1, -1),
        sink=torch.full_like(base.sink, sink),
        reach=torch.full_like(base.reach, reach),
    )
    return _covering(choice, probe.near(sink, reach).sum(-1), limits.coverage)


def vertical_slash(view: View, probe: Probe, limits: Limits, *, sink: int, window: int) -> Choice:
    """Key tiles that all rows read (columns) and key tiles at fixed distances from the row's own (diagonals).

    The columns of the sink and the diagonals of the window are always read; the others by probed mass.
    """
    base = dense(view, probe.output.shape[0])
    if limits.coverage >= EXACT:
        return base
    slash = view.slash_tiles(sink, window)
    loose = probe.tile_mass * ~slash.fixed_at_rows
    start = 1 - loose.sum(-1)
    useful = _useful(loose, limits.coverage - start)
    mass = torch.cat([useful, _by_distance(useful, slash)], dim=2).mean(1)
    levels = _levels(mass, slash.cost, view.causal_tiles, limits)
    columns, diagonals = levels.chunk(2, dim=1)

    at_rows = torch.maximum(columns[:, None], _on_diagonals(diagonals, slash.row_first, slash.row_last, slash.span))
    on_tiles = torch.maximum(columns[:, None], _on_diagonals(diagonals, slash.first, slash.last, slash.span))
    on_tiles = on_tiles.masked_fill_(slash.fixed, ALWAYS).masked_fill_(~slash.causal, -1)
    reached = _reached(start, loose, at_rows)
    threshold = _threshold(reached, _tiles(on_tiles), view.causal_tiles, limits)
    choice = replace(base, near=on_tiles >= threshold[:, None, None])
    return _covering(choice, _at(reached, threshold), limits.coverage)


def grid(view: View, probe: Probe, limits: Limits, *, sink: int, reach: int, min_lines: int) -> Choice:
    """Same place in all frames (slash), places that all rows see (v-lines), rows that see all (h-lines).

    Always read are the sink, the last ``reach`` keys, the row's own included, and the query tile's own cells. By probed
    mass come v-lines, which are key tiles of the cell order, text tiles and other items' among them; h-lines, which are
    bands of query tiles that read everything; and neighbours, the cells before and behind a query tile's own. At least
    ``min_lines`` v-lines are taken.
    """
    if view.cell is None:
        raise ValueError("the grid pattern needs a cell pass; these rows have none")
    cell = view.cell
    heads = probe.output.shape[0]
    tiles = cell.tiles(sink, reach)
    base = dense(view, heads)
    near = view.near_tiles(sink, reach)
    base = replace(
        base,
        near=near.expand(heads, -1, -1),
        sink=torch.full_like(base.sink, sink),
        reach=torch.full_like(base.reach, reach),
    )
    if limits.coverage >= EXACT:
        return replace(base, far=tiles.visible.expand(heads, -1, -1))

    loose = probe.far(sink, reach) * ~cell.own_at_rows
    start = 1 - loose.sum(-1)
    need = limits.coverage - start
    lines = _useful(loose, need).mean(1)
    share = _useful(loose.sum(-1), need) @ cell.rows_in_band
    neighbours = _useful((loose * cell.beside_at_rows).sum(-1), need).mean(-1, keepdim=True)
    mass = torch.cat([lines, share, neighbours], dim=1)
    levels = _levels(mass, tiles.cost, view.causal_tiles, limits)
    if min_lines:
        top = lines.topk(min(min_lines, lines.shape[1]), dim=1).indices
        levels.scatter_(1, top, ALWAYS)
    line, band, wide = torch.split(levels, [lines.shape[1], cell.num_bands, 1], dim=1)

    at_rows = torch.maximum(line[:, None], band[:, cell.band_of_row, None])
    at_rows = torch.where(cell.beside_at_rows, torch.maximum(at_rows, wide[..., None]), at_rows)
    on_tiles = torch.maximum(line[:, None], band[:, cell.bands, None])
    on_tiles = torch.where(cell.beside, torch.maximum(on_tiles, wide[..., None]), on_tiles)
    on_tiles = on_tiles.masked_fill_(cell.own, ALWAYS).masked_fill_(~tiles.visible, -1)
    reached = _reached(start, loose, at_rows)
    threshold = _threshold(reached, near.sum() + _tiles(on_tiles), view.causal_tiles, limits)
    choice = replace(base, far=on_tiles >= threshold[:, None, None])
    return _covering(choice, _at(reached, threshold), limits.coverage)


def measured(view: View, probe: Probe, choice: Choice, limits: Limits) -> Choice:
    """The choice with the coverage that it really keeps; patterns by themselves know theirs."""
    by_row = (probe.near(choice.sink, choice.reach) * choice.near[:, view.row_tiles]).sum(-1)
    if choice.far is not None and view.cell is not None:
        by_row += (probe.far(choice.sink, choice.reach) * choice.far[:, view.cell.row_tiles]).sum(-1)
    return _covering(choice, by_row, limits.coverage)


def _covering(choice: Choice, by_row: torch.Tensor, target: float) -> Choice:
    """The choice that keeps this mass of each probe row, fp32 [H, P]."""
    return replace(choice, coverage=by_row.mean(-1), missing=_missing(by_row, target))


def _missing(by_row: torch.Tensor, target: float) -> torch.Tensor:
    """Mass that the rows below the target lack of it, on average over all rows: fp32 [H, P, ...] -> [H, ...]."""
    return (target - by_row).clamp_min(0).mean(1)


def _useful(mass: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """Mass of rows [H, P, ...] up to what they lack to the target [H, P]: more is no use to the row."""
    need = need.clamp_min(0).view(*need.shape, *[1] * (mass.dim() - 2))
    return torch.minimum(mass, need)


def _levels(mass: torch.Tensor, cost: torch.Tensor, causal: torch.Tensor, limits: Limits) -> torch.Tensor:
    """Levels of candidates by mass, fp32 [H, m], and tiles, [m]: int8 [H, m], -1 for those without mass.

    ``causal``: tiles of dense attention, 0-d, so that ``mass * causal / cost`` is in units of an average tile's mass.
    """
    gain = mass * (causal / cost / (limits.min_gain or 1.0))
    level = gain.log2().mul_(PER_OCTAVE).floor_().add_(WORTH).clamp_(0, LEVELS - 1)
    return torch.where(mass > 0, level, -1).to(torch.int8)


def _reached(start: torch.Tensor, mass: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """What each row has at every threshold: fp32 [H, P, LEVELS + 1].

    ``start`` [H, P]: what it has anyhow. ``mass``, ``level`` [H, P, n]: by tile.
    """
    by_level = mass.new_zeros(*mass.shape[:2], LEVELS + 2).scatter_add_(2, level.long() + 1, mass)
    return start[..., None] + _from_above(by_level)


def _tiles(level: torch.Tensor) -> torch.Tensor:
    """Number of tiles at every threshold: int8 [H, t, n] -> int64 [H, LEVELS + 1]."""
    heads, bins = level.shape[0], LEVELS + 2
    by_head = torch.arange(1, heads * bins, bins, device=level.device)[:, None]
    counted = torch.bincount((level.flatten(1) + by_head).flatten(), minlength=heads * bins)
    return _from_above(counted.view(heads, bins))


def _from_above(by_level: torch.Tensor) -> torch.Tensor:
    """Sums over all levels from each threshold up; the first entry, what is in no candidate, is dropped."""
    return by_level.flip(-1).cumsum(-1).flip(-1)[..., 1:]


def _at(reached: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return reached.gather(2, threshold[:, None, None].expand(-1, reached.shape[1], 1))[..., 0]


def _threshold(reached: torch.Tensor, tiles: torch.Tensor, causal: torch.Tensor, limits: Limits) -> torch.Tensor:
    """The threshold of each head, int64 [H]: the highest that takes the rows to the target.

    Rows below the target are not made up for by rows above it; over all rows :data:`~.choice.SLACK` may be missing. A
    head that cannot get there within ``max_density`` is diffuse: much mass in many tiles, whose loss costs little
    output. It gets those candidates that hold ``min_gain`` times the mass of an average causal tile, per tile, level by
    level as far as that allows. By threshold: ``reached`` fp32 [H, P, LEVELS + 1] and ``tiles`` int64 [H, LEVELS + 1].
    ``causal``: tiles of dense attention, 0-d.
    """
    enough = (_missing(reached, limits.coverage) <= SLACK).sum(1)
    affordable = (tiles <= torch.maximum(limits.max_density * causal, tiles[:, -1:])).sum(1)
    best, lowest = enough - 1, LEVELS + 1 - affordable
    return torch.where(best >= lowest, best, lowest.clamp_min(WORTH if limits.min_gain else 0))


def _by_distance(mass: torch.Tensor, slash: SlashTiles) -> torch.Tensor:
    """Mass by distance in tiles from the row's own tile, from mass by tile: fp32 [H, P, n] -> [H, P, n]."""
    source = slash.row_own[:, None] - torch.arange(mass.shape[2], device=mass.device)
    picked = mass.gather(2, source.clamp_min(0).expand(mass.shape))
    return picked * (source >= 0)


def _on_diagonals(levels: torch.Tensor, first: torch.Tensor, last: torch.Tensor, span: int) -> torch.Tensor:
    """Highest level of the diagonals that touch each key tile: int8 [H, n] -> [H, q, n].

    Rows whose key tiles are ``first`` to ``last``, int64 [q], at most ``span`` of them, have key tile ``j`` on the
    diagonals ``first - j`` to ``last - j``. The maximum over so many is that of two powers of two that overlap.
    """
    heads, tiles = levels.shape
    steps = max(span - 1, 0).bit_length()
    table = [torch.nn.functional.pad(levels, (span, 2 * span), value=-1)]
    for step in range(steps):
        table.append(torch.maximum(table[-1], torch.nn.functional.pad(table[-1][:, 1 << step :], (0, 1 << step))))
    width = table[0].shape[1]
    flat = torch.stack(table, dim=1).flatten(1)
    length = last - first + 1
    power = torch.zeros_like(length)
    for step in range(1, steps + 1):
        power += length >= 1 << step
    away = torch.arange(tiles, device=levels.device)
    low = (first[:, None] - away + span).clamp(0, width - 1)
    high = (last[:, None] - away + span + 1 - (1 << power)[:, None]).clamp(0, width - 1)
    index = power[:, None] * width + torch.stack([low, high])
    found = flat.gather(1, index.flatten().expand(heads, -1)).view(heads, 2, *low.shape)
    return torch.maximum(found[:, 0], found[:, 1])


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
