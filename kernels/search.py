"""Search for the fewest tiles whose loss costs the probe rows' output no more than a bound.

A *candidate* is a set of tiles, such as a column or a diagonal. What a row would lose without all tiles that are not
read anyhow is shared out among them; a candidate's *level* is the logarithm of what its tiles have of it, per tile, in
steps of a third of an octave, and a tile's level is the highest of the candidates it is in. Tiles are taken from the
highest level down to a threshold, so summing what the probe rows' tiles hold by level tells once what every threshold
costs: :func:`curves`. Where heads share a list, a candidate has the highest of their levels. This is the portable form
and the specification of :mod:`.select_triton`.
"""

from __future__ import annotations

import torch

from .choice import CellTiles, CellView, SlashTiles
from .levels import ALWAYS, FAIR, LEAST, LEVELS, PER_OCTAVE, TINY, Curves


def columns_and_diagonals(
    held: torch.Tensor,
    size: torch.Tensor,
    row_of: torch.Tensor,
    slash: SlashTiles,
    causal: torch.Tensor,
    allowed: torch.Tensor,
    *,
    sharing: int = 1,
) -> torch.Tensor:
    """Levels of the sequence pass's tiles by columns and diagonals: int8 [G, t, n], -1 for tiles without a key.

    Args:
        held: by the probe rows' tiles, fp32 [HELD, H, P, n], see :mod:`.probe`.
        size: squared length of the probe rows' output, fp32 [H, P].
        row_of: which of the probed rows each head has, int64 [H, P].
        causal: tiles of dense attention, 0-d int64.
        allowed: energy per row that a head may lose, fp32 [H].
        sharing: heads that share a list.
    """
    energy = _shared_out(held, size, ~slash.fixed_at_rows[row_of])
    by_candidate = torch.cat([energy, _by_distance(energy, slash.row_own[row_of])], dim=2).mean(1)
    levels = shared(_levels(by_candidate, slash.cost, causal, allowed), sharing)
    columns, diagonals = levels.chunk(2, dim=1)
    levels = torch.maximum(columns[:, None], _on_diagonals(diagonals, slash.first, slash.last, slash.span))
    return levels.masked_fill_(slash.fixed, ALWAYS).masked_fill_(~slash.causal, -1)


def lines(
    held: torch.Tensor,
    size: torch.Tensor,
    row_of: torch.Tensor,
    cell: CellView,
    tiles: CellTiles,
    causal: torch.Tensor,
    allowed: torch.Tensor,
    *,
    min_lines: int,
    sharing: int = 1,
) -> torch.Tensor:
    """Levels of the cell pass's tiles by v-lines, h-lines and neighbours: int8 [G, t', n'], -1 outside the region.

    ``held``: in the far region, fp32 [HELD, H, P, n']. At least ``min_lines`` v-lines of a list are taken. Otherwise as
    :func:`columns_and_diagonals`.
    """
    energy = _shared_out(held, size, ~cell.own_at_rows[row_of])
    by_band = torch.bmm(energy.sum(-1).unsqueeze(1), cell.rows_in_band[row_of])[:, 0]
    neighbours = (energy * cell.beside_at_rows[row_of]).sum(-1).mean(-1, keepdim=True)
    levels = _levels(torch.cat([energy.mean(1), by_band, neighbours], dim=1), tiles.cost, causal, allowed)
    line, band, wide = torch.split(shared(levels, sharing), [energy.shape[2], cell.num_bands, 1], dim=1)
    if min_lines:
        best = line.half().topk(min(min_lines, line.shape[1]), dim=1).indices
        line = line.scatter(1, best, ALWAYS)
    # A band's few rows may miss what a neighbour's show: rows that read everything lie together, not band by band.
    band = torch.nn.functional.max_pool1d(band.float(), 3, stride=1, padding=1).to(torch.int8)
    on_tiles = torch.maximum(line[:, None], band[:, cell.bands, None])
    on_tiles = torch.where(cell.beside, torch.maximum(on_tiles, wide[..., None]), on_tiles)
    return on_tiles.masked_fill_(cell.own, ALWAYS).masked_fill_(~tiles.visible, -1)


def curves(held: torch.Tensor, size: torch.Tensor, levels: torch.Tensor, row_tiles: torch.Tensor) -> Curves:
    """What each threshold costs.

    Args:
        held: what the pass's tiles hold in its region, fp32 [HELD, H, P, n]; what lies outside of it is kept anyhow.
        size: squared length of the probe rows' output, fp32 [H, P].
        levels: int8 [G, t, n].
        row_tiles: each head's probe rows' query tile, int64 [H, P].
    """
    of_head = torch.arange(held.shape[1], device=held.device) // (held.shape[1] // levels.shape[0])
    at_rows = levels[of_head[:, None], row_tiles].long() + 1
    by_level = held.new_zeros(*held.shape[:3], LEVELS + 2)
    by_level.scatter_add_(3, at_rows.expand(held.shape), held)
    lost = by_level.cumsum_(3)[..., :-1]
    return Curves(_loss(lost, size).mean(1), 1 - lost[0].mean(1), _tiles(levels))


def shared(levels: torch.Tensor, sharing: int) -> torch.Tensor:
    """Levels of lists from those of heads, the highest of each that share: int8 [H, m] -> [G, m]."""
    return levels if sharing == 1 else levels.view(-1, sharing, levels.shape[1]).amax(1)


def _shared_out(held: torch.Tensor, size: torch.Tensor, loose: torch.Tensor) -> torch.Tensor:
    """What a row would lose without all of its loose tiles, by tile as each alone would cost: bool to fp32 [H, P, n].

    Small losses add up, and what is left of the mass counts for more the less it is.
    """
    alone = _loss(held, size) * loose
    together = _loss((held * loose).sum(3, keepdim=True), size)
    return alone.mul_(together / alone.sum(2, keepdim=True).clamp_min(TINY))


def _loss(held: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Squared length of what a row's output loses without keys that hold this: [HELD, H, P, n], [H, P] -> [H, P, n].

    Exact up to the projections, but where next to nothing is left: there it becomes the whole output.
    """
    energy = held[1].square()
    for projection in held[2:]:
        energy.addcmul_(projection, projection)
    energy.addcmul_(held[0].square().square_(), size[..., None], value=LEAST**2)
    return energy.div_((1 - held[0]).square_().add_(LEAST**2))


def _levels(energy: torch.Tensor, cost: torch.Tensor, causal: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Levels of candidates by energy, fp32 [H, m], and tiles, [m]: int8 [H, m], -1 for those without energy.

    ``causal``: tiles of dense attention, 0-d, so that ``energy * causal / cost`` is what dense attention would lose if
    all its tiles were alike.
    """
    gain = energy * (causal / cost) / allowed[:, None]
    level = gain.clamp_min(TINY).log2_().mul_(PER_OCTAVE).floor_().add_(FAIR).clamp_(0, LEVELS - 1)
    return torch.where(energy > TINY, level, -1).to(torch.int8)


def _tiles(levels: torch.Tensor) -> torch.Tensor:
    """Number of tiles at every threshold: int8 [G, t, n] -> int64 [G, LEVELS + 1]."""
    lists, bins = levels.shape[0], LEVELS + 2
    by_list = torch.arange(1, lists * bins, bins, device=levels.device)[:, None]
    counted = torch.bincount((levels.flatten(1) + by_list).flatten(), minlength=lists * bins)
    return counted.view(lists, bins).flip(-1).cumsum(-1).flip(-1)[:, 1:]


def _by_distance(mass: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Mass by distance in tiles from the row's own tile, int64 [H, P], from that by tile: both fp32 [H, P, n]."""
    source = own[..., None] - torch.arange(mass.shape[2], device=mass.device)
    picked = mass.gather(2, source.clamp_min(0))
    return picked * (source >= 0)


def _on_diagonals(levels: torch.Tensor, first: torch.Tensor, last: torch.Tensor, span: int) -> torch.Tensor:
    """Highest level of the diagonals that touch each key tile: int8 [G, n] -> [G, q, n].

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
