"""Search for the fewest tiles that hold the mass: which candidates a head takes beyond what it always reads.

A *candidate* is a set of tiles, such as a column or a diagonal. Its *level* is the logarithm of its useful mass per
tile, in steps of a third of an octave; a tile's level is the highest of the candidates it is in. Candidates are taken
from the highest level down to a threshold, so summing the mass of the probe rows' tiles by level tells once what every
threshold reaches. This is the portable form and the specification of :mod:`.search_triton`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .choice import SLACK, CellTiles, CellView, Limits, SlashTiles

LEVELS = 63
"""Levels of candidates, 0 to 62: 21 octaves of mass per tile."""
ALWAYS = LEVELS
"""Level of what is read in any case, the highest threshold."""
PER_OCTAVE = 3
WORTH = 18
"""The level that begins at ``min_gain``. Six octaves below it is the last one, which takes all that is less."""


@dataclass(frozen=True)
class Found:
    """Tiles for all heads of a block: those whose level is at least the head's threshold.

    ``levels`` int8 [H, t, n], -1 for tiles that may not be read; ``threshold`` int32 [H].
    ``coverage``, ``missing`` fp32 [H]: see :class:`~.choice.Choice`. ``count`` int64 [H]: tiles of the head, those of
    the other pass among them.
    """

    levels: torch.Tensor
    threshold: torch.Tensor
    coverage: torch.Tensor
    missing: torch.Tensor
    count: torch.Tensor

    @property
    def tiles(self) -> torch.Tensor:
        """The tiles to read, bool [H, t, n]."""
        return self.levels >= self.threshold[:, None, None]


def columns_and_diagonals(mass: torch.Tensor, slash: SlashTiles, causal: torch.Tensor, limits: Limits) -> Found:
    """Columns and diagonals of the sequence pass by the probe rows' mass, fp32 [H, P, n].

    ``causal``: tiles of dense attention, 0-d int64.
    """
    loose = mass * ~slash.fixed_at_rows
    start = 1 - loose.sum(-1)
    useful = _useful(loose, limits.coverage - start)
    levels = _levels(torch.cat([useful, _by_distance(useful, slash)], dim=2).mean(1), slash.cost, causal, limits)
    columns, diagonals = levels.chunk(2, dim=1)
    row_first, row_last = slash.first[slash.row_tiles], slash.last[slash.row_tiles]
    at_rows = torch.maximum(columns[:, None], _on_diagonals(diagonals, row_first, row_last, slash.span))
    on_tiles = torch.maximum(columns[:, None], _on_diagonals(diagonals, slash.first, slash.last, slash.span))
    on_tiles = on_tiles.masked_fill_(slash.fixed, ALWAYS).masked_fill_(~slash.causal, -1)
    return _found(on_tiles, _reached(start, loose, at_rows), _tiles(on_tiles), causal, limits)


def lines(
    mass: torch.Tensor,
    cell: CellView,
    tiles: CellTiles,
    near_count: torch.Tensor,
    causal: torch.Tensor,
    limits: Limits,
    *,
    min_lines: int,
) -> Found:
    """V-lines, h-lines and neighbours of the cell pass by the probe rows' mass in the far region, fp32 [H, P, n'].

    ``near_count``: tiles that the sequence pass reads, 0-d int64. At least ``min_lines`` v-lines are taken.
    """
    loose = mass * ~cell.own_at_rows
    start = 1 - loose.sum(-1)
    need = limits.coverage - start
    by_line = _useful(loose, need).mean(1)
    by_band = _useful(loose.sum(-1), need) @ cell.rows_in_band
    neighbours = _useful((loose * cell.beside_at_rows).sum(-1), need).mean(-1, keepdim=True)
    levels = _levels(torch.cat([by_line, by_band, neighbours], dim=1), tiles.cost, causal, limits)
    if min_lines:
        take_lines(levels[:, : by_line.shape[1]], min_lines)
    line, band, wide = torch.split(levels, [by_line.shape[1], cell.num_bands, 1], dim=1)

    at_rows = torch.maximum(line[:, None], band[:, cell.band_of_row, None])
    at_rows = torch.where(cell.beside_at_rows, torch.maximum(at_rows, wide[..., None]), at_rows)
    on_tiles = torch.maximum(line[:, None], band[:, cell.bands, None])
    on_tiles = torch.where(cell.beside, torch.maximum(on_tiles, wide[..., None]), on_tiles)
    on_tiles = on_tiles.masked_fill_(cell.own, ALWAYS).masked_fill_(~tiles.visible, -1)
    return _found(on_tiles, _reached(start, loose, at_rows), near_count + _tiles(on_tiles), causal, limits)


def take_lines(levels: torch.Tensor, count: int) -> None:
    """Takes the ``count`` v-lines of the highest levels, int8 [H, n'], in any case."""
    best = levels.half().topk(min(count, levels.shape[1]), dim=1).indices
    levels.scatter_(1, best, ALWAYS)


def missing_mass(by_row: torch.Tensor, target: float) -> torch.Tensor:
    """Mass that the rows below the target lack of it, on average over all rows: fp32 [H, P, ...] -> [H, ...]."""
    return (target - by_row).clamp_min(0).mean(1)


def _found(
    levels: torch.Tensor, reached: torch.Tensor, tiles: torch.Tensor, causal: torch.Tensor, limits: Limits
) -> Found:
    threshold = _threshold(reached, tiles, causal, limits)
    by_row = reached.gather(2, threshold[:, None, None].expand(-1, reached.shape[1], 1))[..., 0]
    count = tiles.gather(1, threshold[:, None])[:, 0]
    return Found(levels, threshold.int(), by_row.mean(1), missing_mass(by_row, limits.coverage), count)


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


def _threshold(reached: torch.Tensor, tiles: torch.Tensor, causal: torch.Tensor, limits: Limits) -> torch.Tensor:
    """The threshold of each head, int64 [H]: the highest that takes the rows to the target.

    Rows below the target are not made up for by rows above it; over all rows :data:`~.choice.SLACK` may be missing. A
    head that cannot get there within ``max_density`` is diffuse: much mass in many tiles, whose loss costs little
    output. It gets those candidates that hold ``min_gain`` times the mass of an average causal tile, per tile, level by
    level as far as that allows. By threshold: ``reached`` fp32 [H, P, LEVELS + 1] and ``tiles`` int64 [H, LEVELS + 1].
    ``causal``: tiles of dense attention, 0-d.
    """
    enough = (missing_mass(reached, limits.coverage) <= SLACK).sum(1)
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
