"""Selection: from the probe's attention mass to key tiles per (head, query tile), for one request and query modality.

Every pattern proposes a :class:`~.choice.Choice` for all heads at once. What a pattern may add beyond what it always
reads is a list of *candidates*, sets of tiles such as a column or a diagonal, ranked by mass per tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .choice import EXACT, SLACK, Choice, Limits, View, dense
from .probe import Probe
from .tiles import Region, element_mask

_SEARCH_STEPS = 5
"""Evaluations in search of the fewest candidates that reach the target, beyond the first two."""


def a_shape(view: View, probe: Probe, limits: Limits, *, sink: int, window: int) -> Choice:
    """Sink tokens and a local window of ``window`` keys, the row's own included (method: A-shape).

    Nothing is searched, so the only coverage it heeds is the exact one.
    """
    heads = probe.weights.shape[0]
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
    return _covering(choice, _near_weights(probe, sink, reach)[1].sum(-1), limits.coverage)


def vertical_slash(view: View, probe: Probe, limits: Limits, *, sink: int, window: int) -> Choice:
    """Key tiles that all rows read (columns) and key tiles at fixed distances from the row's own (diagonals).

    The columns of the sink and the diagonals of the window are always read; the others by probed mass.
    """
    base = dense(view, probe.weights.shape[0])
    if limits.coverage >= EXACT:
        return base
    tile, tiles = view.keys.tile_keys, view.keys.min_pos.numel()
    low, high = view.diagonals
    row_low, row_high = low[view.row_tiles], high[view.row_tiles]
    row_mass = probe.tile_mass

    always = torch.zeros(1, 2 * tiles, dtype=torch.bool, device=low.device)
    always[:, : -(-sink // tile)] = True
    always[:, tiles : tiles + 1 + -(-window // tile)] = True
    fixed = (always[:, None, :tiles] | _paint(always[:, tiles:], low, high, tiles)) & base.near[:1]
    fixed_at_rows = always[:, None, :tiles] | _paint(always[:, tiles:], row_low, row_high, tiles)

    causal = base.near[0]
    column_cost = causal.sum(0)
    diagonal_cost = (high.clamp_max(tiles) - low).clamp_min(0).sum(0)
    loose = row_mass * ~fixed_at_rows
    useful = _useful(loose, limits.coverage - (row_mass * fixed_at_rows).sum(-1))
    mass = torch.cat([useful, _diagonal_mass(useful, probe.rows.positions, tile)], dim=2).mean(1)
    cost = torch.cat([column_cost, diagonal_cost]).clamp_min(1)

    def reached(chosen: torch.Tensor) -> torch.Tensor:
        at_rows = chosen[:, None, :tiles] | _paint(chosen[:, tiles:], row_low, row_high, tiles) | fixed_at_rows
        return (row_mass * at_rows).sum(-1)

    def near(chosen: torch.Tensor) -> torch.Tensor:
        return (chosen[:, None, :tiles] | _paint(chosen[:, tiles:], low, high, tiles) | fixed) & base.near

    candidates = _Candidates(mass, cost, reached, lambda chosen: near(chosen).sum((1, 2)))
    chosen = _fewest(candidates, view.causal_tiles, limits)
    return _covering(replace(base, near=near(chosen)), reached(chosen), limits.coverage)


def grid(view: View, probe: Probe, limits: Limits, *, sink: int, reach: int, min_lines: int) -> Choice:
    """Same place in all frames (slash), places that all rows see (v-lines), rows that see all (h-lines).

    Always read are the sink, the last ``reach`` keys, the row's own included, and the query tile's own cells. By probed
    mass come v-lines, which are key tiles of the cell order, text tiles and other items' among them; h-lines, which are
    bands of query tiles that read everything; and neighbours, the cells before and behind a query tile's own. At least
    ``min_lines`` v-lines are taken.
    """
    cell = view.cell
    if cell is None:
        raise ValueError("the grid pattern needs a cell pass; these rows have none")
    heads = probe.weights.shape[0]
    base = dense(view, heads)
    near = view.near_tiles(sink, reach)
    visible = cell.far_tiles(sink, reach)
    base = replace(
        base,
        near=near.expand(heads, -1, -1),
        sink=torch.full_like(base.sink, sink),
        reach=torch.full_like(base.reach, reach),
    )
    if limits.coverage >= EXACT:
        return replace(base, far=visible.expand(heads, -1, -1))

    own, beside = cell.own, cell.beside
    rows = probe.rows.cell_tiles
    near_mass, far_mass = _split_mass(probe, sink, reach)
    start = near_mass + (far_mass * own[rows]).sum(-1)
    loose = far_mass * ~own[rows]
    rest = visible & ~own
    keys, bands = cell.keys.min_pos.numel(), cell.num_bands

    need = limits.coverage - start
    useful = _useful(loose, need)
    in_band = torch.nn.functional.one_hot(cell.band_of_row, bands).to(loose.dtype)
    share = _useful(loose.sum(-1), need) @ in_band / rows.numel()
    neighbours = _useful((loose * beside[rows]).sum(-1), need).mean(-1, keepdim=True)
    mass = torch.cat([useful.mean(1), share, neighbours], dim=1)
    band_cost = torch.zeros(bands, dtype=torch.int64, device=rest.device).index_add_(0, cell.bands, rest.sum(1))
    cost = torch.cat([rest.sum(0), band_cost, (rest & beside).sum()[None]]).clamp_min(1)

    def at(chosen: torch.Tensor, tile_bands: torch.Tensor, own_like: torch.Tensor) -> torch.Tensor:
        lines, whole, wide = chosen[:, :keys], chosen[:, keys:-1], chosen[:, -1]
        return lines[:, None] | whole[:, tile_bands, None] | (wide[:, None, None] & own_like)

    def reached(chosen: torch.Tensor) -> torch.Tensor:
        return start + (loose * at(chosen, cell.band_of_row, beside[rows])).sum(-1)

    def far(chosen: torch.Tensor) -> torch.Tensor:
        return (own | at(chosen, cell.bands, beside)) & visible

    candidates = _Candidates(mass, cost, reached, lambda chosen: near.sum() + far(chosen).sum((1, 2)))
    chosen = _fewest(candidates, view.causal_tiles, limits)
    if min_lines:
        chosen = chosen.scatter(1, mass[:, :keys].topk(min(min_lines, keys), dim=1).indices, value=True)
    return _covering(replace(base, far=far(chosen)), reached(chosen), limits.coverage)


def kept(view: View, probe: Probe, choice: Choice) -> torch.Tensor:
    """Keys that the probe rows see under a choice, element by element: bool [H, P, keys]."""
    heads, rows, length = probe.weights.shape
    keys = torch.arange(length, device=probe.weights.device)
    sink, reach = choice.sink[:, None, None], choice.reach[:, None, None]
    near = element_mask(Region.NEAR, probe.rows.positions[:, None], keys[None, :], sink, reach)
    seen = near & choice.near[:, view.row_tiles].repeat_interleave(probe.tile_keys, dim=-1)
    if choice.far is not None and view.cell is not None:
        known = probe.cell_tile.numel()
        index = probe.cell_tile.expand(heads, rows, -1)
        far = (keys <= probe.rows.positions[:, None]) & ~near
        seen[..., :known] |= choice.far[:, probe.rows.cell_tiles].gather(2, index) & far[..., :known]
    return seen


def measured(view: View, probe: Probe, choice: Choice, limits: Limits) -> Choice:
    """The choice with the coverage that its masks really keep; patterns by themselves know theirs."""
    return _covering(choice, (probe.weights * kept(view, probe, choice)).sum(-1), limits.coverage)


def _covering(choice: Choice, by_row: torch.Tensor, target: float) -> Choice:
    """The choice that keeps this mass of each probe row, fp32 [H, P]."""
    return replace(choice, coverage=by_row.mean(-1), missing=_missing(by_row, target))


def _missing(by_row: torch.Tensor, target: float) -> torch.Tensor:
    """Mass that the rows below the target lack of it, on average over all rows: fp32 [H, P] -> [H]."""
    return (target - by_row).clamp_min(0).mean(-1)


def _useful(mass: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """Mass of rows [H, P, ...] up to what they lack to the target [H, P]: more is no use to the row."""
    need = need.clamp_min(0).view(*need.shape, *[1] * (mass.dim() - 2))
    return torch.minimum(mass, need)


@dataclass(frozen=True)
class _Candidates:
    """Sets of tiles that may be added to what a pattern always reads.

    ``mass`` fp32 [H, m]: useful mass of each by itself; several may hold the same mass. ``cost`` int64 [m]: its tiles.
    ``reached``: chosen ones, bool [H, m] -> coverage by row, fp32 [H, P]; ``tiles``: -> tiles of the head, int64 [H].
    """

    mass: torch.Tensor
    cost: torch.Tensor
    reached: Callable[[torch.Tensor], torch.Tensor]
    tiles: Callable[[torch.Tensor], torch.Tensor]


def _fewest(candidates: _Candidates, causal: torch.Tensor, limits: Limits) -> torch.Tensor:
    """The fewest candidates, best mass per tile first, that take the rows to the target: bool [H, m].

    Rows below the target are not made up for by rows above it; over all rows :data:`~.choice.SLACK` may be missing. A
    head that cannot get there within ``max_density`` is diffuse: much mass in many tiles, whose loss costs little
    output. It gets those candidates that hold ``min_gain`` times the mass of an average causal tile, per tile. How many
    are needed is searched on the sum of masses, each step measured. ``causal``: tiles of dense attention, 0-d.
    """
    mass, cost = candidates.mass, candidates.cost
    budget = limits.max_density * causal
    nothing = torch.zeros_like(mass, dtype=torch.bool)
    gain = mass / cost
    rank = gain.argsort(dim=1, descending=True)
    total = mass.gather(1, rank).cumsum(1)
    before = torch.nn.functional.pad(total[:, :-1], (1, 0))

    def choose(amount: torch.Tensor) -> torch.Tensor:
        return nothing.scatter(1, rank, before < amount[:, None]) & (mass > 0)

    def missing(chosen: torch.Tensor) -> torch.Tensor:
        return _missing(candidates.reached(chosen), limits.coverage)

    # The sum of masses is at least what is added, so no amount below the missing one can do.
    low = (missing(nothing) - SLACK).clamp_min(0)
    high = total[:, -1] * (1 + 1e-4) + 1e-6
    best, least = choose(high), choose(low)
    possible, done = missing(best) <= SLACK, missing(least) <= SLACK
    best = torch.where(done[:, None], least, best)
    for _ in range(_SEARCH_STEPS):
        middle = (low.clamp_min(1e-4) * high).sqrt()
        tried = choose(middle)
        enough = missing(tried) <= SLACK
        best = torch.where((enough & ~done)[:, None], tried, best)
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    fixed = candidates.tiles(nothing)
    worth = (gain * causal >= limits.min_gain) & (mass > 0)
    affordable = (cost * worth).gather(1, rank).cumsum(1) <= (budget - fixed)[:, None]
    economical = worth & nothing.scatter(1, rank, affordable)
    within = torch.maximum(budget, fixed)
    return torch.where((possible & (candidates.tiles(best) <= within))[:, None], best, economical)


def _near_weights(probe: Probe, sink: int, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the probe rows' near region, sink and window: positions int64 [P, m] and weights fp32 [H, P, m].

    Of a position that is not there, or twice, the weight is 0.
    """
    positions = probe.rows.positions.long()[:, None]
    keys = probe.weights.shape[2]
    device = positions.device
    first = torch.arange(min(sink, keys), device=device).expand(positions.shape[0], -1)
    window = positions - torch.arange(min(reach, keys), device=device)
    index = torch.cat([first, window.clamp_min(0)], dim=1)
    seen = torch.cat([first <= positions, window >= sink], dim=1)
    weights = probe.weights.gather(2, index.expand(probe.weights.shape[0], -1, -1))
    return index, weights * seen


def _split_mass(probe: Probe, sink: int, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass of the probe rows in their near region, fp32 [H, P], and in the far one by cell-order tile, [H, P, n']."""
    heads = probe.weights.shape[0]
    index, weights = _near_weights(probe, sink, reach)
    mass = probe.cell_mass.clone()
    tile = probe.cell_tile[index.clamp_max(probe.cell_tile.numel() - 1)]
    mass.scatter_add_(2, tile.expand(heads, -1, -1), -weights)
    return weights.sum(-1), mass.clamp_min_(0)


def _diagonal_mass(row_mass: torch.Tensor, positions: torch.Tensor, tile: int) -> torch.Tensor:
    """Mass by distance in tiles from the row's own tile, from mass by tile: fp32 [H, P, n] -> [H, P, n]."""
    heads, rows, tiles = row_mass.shape
    source = torch.div(positions, tile, rounding_mode="floor")[:, None] - torch.arange(tiles, device=row_mass.device)
    picked = row_mass.gather(2, source.clamp_min(0).long().expand(heads, rows, -1))
    return picked * (source >= 0)


def _paint(chosen: torch.Tensor, low: torch.Tensor, high: torch.Tensor, tiles: int) -> torch.Tensor:
    """Marks the key tiles of the chosen diagonals: ``chosen`` bool [H, diagonals] -> bool [H, t, tiles]."""
    heads, queries = chosen.shape[0], low.shape[0]
    steps = torch.zeros(heads, queries, tiles + 1, dtype=torch.int32, device=chosen.device)
    amount = chosen[:, None, :].int().expand(-1, queries, -1)
    steps.scatter_add_(2, low.clamp_max(tiles).expand(heads, -1, -1), amount)
    steps.scatter_add_(2, high.clamp_max(tiles).expand(heads, -1, -1), -amount)
    return steps[..., :tiles].cumsum(-1) > 0
