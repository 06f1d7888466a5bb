"""Selection: from the probe's attention mass to key tiles per (head, query tile), for one request and query modality.

Every pattern proposes a :class:`Choice` for all heads at once; :func:`combine` picks each head's own by its head spec,
and :func:`evaluate` measures what the probe rows keep of it, element by element. Nothing here looks at single heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .probe import Probe
from .tiles import UNBOUNDED, Region, element_mask, tile_visibility

EXACT = 1.0
"""Coverage at which every causal tile is selected and budgets do not count: the result is dense attention."""


@dataclass(frozen=True)
class Limits:
    """What the configuration allows: target ``coverage`` and ``max_density``, computed tiles over causal tiles."""

    coverage: float
    max_density: float


@dataclass(frozen=True)
class QueryTiles:
    """Query tiles of one request, one modality and one pass: position bounds int32 [t]."""

    min_pos: torch.Tensor
    max_pos: torch.Tensor


@dataclass(frozen=True)
class KeyTiles:
    """Key tiles of one request in one order.

    Position bounds int32 [n] and whether text or media is in them, bool [n].
    """

    min_pos: torch.Tensor
    max_pos: torch.Tensor
    has_text: torch.Tensor
    has_media: torch.Tensor
    tile_keys: int


@dataclass(frozen=True)
class CellView:
    """The cell order of one request as selection needs it.

    ``own_lo``, ``own_hi`` int32 [t]: the key tiles of the cells that a query tile holds, ``[own_lo, own_hi)``.
    ``key_tile`` int32 [length]: token position -> key tile.
    ``stride``: tokens from a frame to the next, the largest of the request.
    """

    queries: QueryTiles
    keys: KeyTiles
    own_lo: torch.Tensor
    own_hi: torch.Tensor
    key_tile: torch.Tensor
    stride: int


@dataclass(frozen=True)
class View:
    """One request's tiles for the query rows of one modality.

    ``queries`` and ``keys`` are those of the sequence pass. ``row_tiles`` int64 [P]: the probe rows' query tile in it.
    ``cell`` is None where the rows take no part in a cell pass.
    """

    queries: QueryTiles
    keys: KeyTiles
    row_tiles: torch.Tensor
    cell: CellView | None


@dataclass(frozen=True)
class Choice:
    """Tiles for all heads.

    ``near`` bool [H, t, n] in sequence order, ``far`` bool [H, t', n'] in cell order or None;
    ``sink``, ``reach`` int32 [H]: the near region of the sequence pass, the far region of the cell pass is the rest.
    ``coverage`` fp32 [H]: estimated share of the probe rows' mass that is kept.
    """

    near: torch.Tensor
    far: torch.Tensor | None
    sink: torch.Tensor
    reach: torch.Tensor
    coverage: torch.Tensor

    def tiles(self) -> torch.Tensor:
        """Computed tiles per head, int64 [H]."""
        near = self.near.sum((1, 2))
        return near if self.far is None else near + self.far.sum((1, 2))


def causal_tiles(view: View) -> torch.Tensor:
    """Number of tiles that dense attention of these rows computes per head, a 0-d int64 tensor."""
    return (view.keys.min_pos[None, :] <= view.queries.max_pos[:, None]).sum()


def dense(view: View, heads: int) -> Choice:
    """All causal tiles in the sequence pass."""
    device = view.keys.min_pos.device
    reach = torch.full((heads,), UNBOUNDED, dtype=torch.int32, device=device)
    sink = torch.zeros_like(reach)
    far = None
    if view.cell is not None:
        shape = (heads, view.cell.queries.min_pos.numel(), view.cell.keys.min_pos.numel())
        far = torch.zeros(shape, dtype=torch.bool, device=device)
    return Choice(_near(view, sink, reach), far, sink, reach, torch.ones(heads, device=device))


def a_shape(view: View, probe: Probe, limits: Limits, *, sink: int, window: int) -> Choice:
    """Sink tokens and a local window of ``window`` keys, the row's own included (method: A-shape).

    Nothing is searched, so the only coverage it heeds is the exact one.
    """
    base = dense(view, probe.weights.shape[0])
    if limits.coverage >= EXACT:
        return base
    sinks, reach = torch.full_like(base.sink, sink), torch.full_like(base.reach, max(window, 1))
    coverage = _near_mass(probe, sink, max(window, 1)).mean(-1)
    return replace(base, near=_near(view, sinks, reach), sink=sinks, reach=reach, coverage=coverage)


def vertical_slash(view: View, probe: Probe, limits: Limits, *, sink: int, window: int) -> Choice:
    """Key tiles that all rows read (columns) and key tiles at fixed distances from the row (diagonals), by probed mass.

    Columns and diagonals compete by mass per tile they cost. Their masses overlap, so the smallest of a few nominal
    targets whose tiles really reach the coverage is taken, within the budget.
    """
    base = dense(view, probe.weights.shape[0])
    if limits.coverage >= EXACT:
        return base
    tile, tiles = view.keys.tile_keys, view.keys.min_pos.numel()
    rows = QueryTiles(view.queries.min_pos[view.row_tiles], view.queries.max_pos[view.row_tiles])
    row_mass = probe.tile_mass()
    diagonal_mass = _diagonal_mass(probe, tile, tiles)

    low, high = _diagonal_tiles(view.queries, tile, tiles)
    causal = causal_tiles(view).float()
    column_cost = (view.keys.min_pos[None, :] <= view.queries.max_pos[:, None]).sum(0).float()
    diagonal_cost = (high - low).sum(0).float()
    mass = torch.cat([row_mass.mean(1), diagonal_mass], dim=1)
    cost = torch.cat([column_cost, diagonal_cost]).clamp_min_(1)
    always = torch.zeros_like(cost, dtype=torch.bool)
    always[: -(-sink // tile)] = True
    always[tiles : tiles + 1 + -(-window // tile)] = True
    # Diagonals side by side share tiles: what is always there is counted as painted, the rest item by item.
    fixed = (always[None, None, :tiles] | _paint(always[None, tiles:], low, high, tiles)) & base.near[:1]
    budget = limits.max_density * causal - fixed.sum()
    rank = (mass / cost).masked_fill(always, float("inf")).argsort(dim=1, descending=True)
    sorted_mass = mass.gather(1, rank).cumsum(1)
    affordable = cost.masked_fill(always, 0)[rank].cumsum(1) <= budget
    always = always.expand_as(mass)
    kept_always = always.gather(1, rank)

    best: torch.Tensor | None = None
    coverage = torch.zeros_like(base.coverage)
    row_low, row_high = _diagonal_tiles(rows, tile, tiles)
    for nominal in (limits.coverage, 1.4 * limits.coverage, 2.0):
        needed = torch.nn.functional.pad(sorted_mass[:, :-1] < nominal, (1, 0), value=True)
        chosen = torch.zeros_like(always).scatter_(1, rank, (needed & affordable) | kept_always)
        at_rows = chosen[:, None, :tiles] | _paint(chosen[:, tiles:], row_low, row_high, tiles)
        reached = (row_mass * at_rows).sum(-1).mean(-1)
        if best is None:
            best, coverage = chosen, reached
        else:
            better = coverage < limits.coverage
            best = torch.where(better[:, None], chosen, best)
            coverage = torch.where(better, reached, coverage)
    assert best is not None
    near = best[:, None, :tiles] | _paint(best[:, tiles:], low, high, tiles)
    return replace(base, near=near & base.near, coverage=coverage)


def grid(view: View, probe: Probe, limits: Limits, *, sink: int, window_frames: int, min_lines: int) -> Choice:
    """Same place in all frames (slash), places that all rows see (v-lines), a window of frames and the sink.

    The slash is the query tile's own cells; v-lines are key tiles of the cell order, text tiles among them, taken by
    the probed mass that window, sink and own cells leave, until the coverage or the budget is reached. At least
    ``min_lines`` of them are taken. The window is ``window_frames`` frame strides and the key right behind them, so
    with one frame the same place one frame back is inside.
    """
    cell = view.cell
    if cell is None:
        raise ValueError("the grid pattern needs a cell pass; these rows have none")
    reach = min(cell.stride * window_frames + 1, UNBOUNDED)
    base = dense(view, probe.weights.shape[0])
    sinks, reaches = torch.full_like(base.sink, sink), torch.full_like(base.reach, reach)
    near = _near(view, sinks, reaches)
    visible = tile_visibility(
        Region.FAR,
        cell.queries.min_pos,
        cell.queries.max_pos,
        cell.keys.min_pos,
        cell.keys.max_pos,
        sinks[:1, None],
        reaches[:1, None],
    )[0]
    if limits.coverage >= EXACT:
        far = visible.expand_as(_far_like(base))
        return replace(base, near=near, far=far, sink=sinks, reach=reaches)

    key_index = torch.arange(cell.keys.min_pos.numel(), device=visible.device)
    own = (key_index >= cell.own_lo[:, None]) & (key_index < cell.own_hi[:, None])
    near_mass = _near_mass(probe, sink, reach)
    far_mass = _far_tile_mass(probe, cell, sink, reach)
    own_at_rows = own[probe.rows.cell_tiles]
    own_mass = (far_mass * own_at_rows).sum(-1)
    start = (near_mass + own_mass).mean(-1)

    line_mass = (far_mass * ~own_at_rows).mean(1)
    order = line_mass.argsort(dim=1, descending=True)
    sorted_mass = line_mass.gather(1, order).cumsum(1)
    line_cost = (visible & ~own).sum(0)
    fixed_cost = near.sum((1, 2)) + (visible & own).sum()
    budget = limits.max_density * causal_tiles(view) - fixed_cost
    affordable = line_cost[order].cumsum(1) <= budget[:, None]
    missing = torch.nn.functional.pad(start[:, None] + sorted_mass[:, :-1], (1, 0)) < limits.coverage
    missing[:, :1] = start[:, None] < limits.coverage
    rank = torch.arange(order.shape[1], device=order.device)
    taken = (missing & affordable) | (rank < min_lines)
    lines = torch.zeros_like(taken).scatter_(1, order, taken)
    coverage = start + (line_mass * lines).sum(1)
    far = (own | lines[:, None]) & visible
    return replace(base, near=near, far=far, sink=sinks, reach=reaches, coverage=coverage)


def cheapest(choices: list[Choice], coverage: float) -> tuple[Choice, torch.Tensor]:
    """Per head the choice that reaches ``coverage`` with the fewest tiles, or the one that comes closest to it.

    Returns the merged choice and the index of each head's pick, int64 [H]. Earlier choices win ties.
    """
    tiles = torch.stack([choice.tiles() for choice in choices]).double()
    reached = torch.stack([choice.coverage for choice in choices]).double()
    # Reaching the target beats everything; below it more coverage is better, above it fewer tiles.
    score = torch.where(reached >= coverage, 2.0 + 1.0 / (1.0 + tiles), reached.clamp_max(1.0))
    pick = score.argmax(0)
    merged = choices[0]
    for index, choice in enumerate(choices[1:], start=1):
        merged = where(pick == index, choice, merged)
    return merged, pick


def never_beyond_dense(view: View, choice: Choice) -> Choice:
    """Heads whose tiles would be as many as dense attention computes run dense."""
    beyond = choice.tiles() >= causal_tiles(view)
    return where(beyond, dense(view, beyond.numel()), choice)


def concatenate(parts: list[Choice]) -> Choice:
    """Choices for consecutive blocks of heads as one for all of them."""
    if len(parts) == 1:
        return parts[0]
    far = [part.far for part in parts if part.far is not None]
    return Choice(
        torch.cat([part.near for part in parts]),
        torch.cat(far) if far else None,
        torch.cat([part.sink for part in parts]),
        torch.cat([part.reach for part in parts]),
        torch.cat([part.coverage for part in parts]),
    )


def where(heads: torch.Tensor, chosen: Choice, other: Choice) -> Choice:
    """``chosen`` for the heads where the bool [H] mask holds, ``other`` elsewhere."""
    wide = heads[:, None, None]
    far = other.far if chosen.far is None else chosen.far
    if chosen.far is not None and other.far is not None:
        far = torch.where(wide, chosen.far, other.far)
    return Choice(
        torch.where(wide, chosen.near, other.near),
        far,
        torch.where(heads, chosen.sink, other.sink),
        torch.where(heads, chosen.reach, other.reach),
        torch.where(heads, chosen.coverage, other.coverage),
    )


def combine(view: View, on_text: Choice, on_media: Choice, *, text_pattern: str, media_pattern: str) -> Choice:
    """One choice out of a pattern for text keys and another for media keys (the paper's K- and 2D-boundary).

    With a grid on the media, text keys behind the window are read in the cell pass, where they are tiles of their own:
    all of them for ``dense``, none for ``a_shape``, by mass otherwise. Without one, each key tile of the sequence pass
    is read if the pattern of a modality it holds asks for it, and a row sees what either pattern's region admits.
    """
    if media_pattern == "grid":
        assert view.cell is not None
        assert on_media.far is not None
        text_tiles = view.cell.keys.has_text
        if text_pattern == "a_shape":
            return replace(on_media, far=on_media.far & ~(text_tiles & ~view.cell.keys.has_media))
        if text_pattern == "dense":
            visible = tile_visibility(
                Region.FAR,
                view.cell.queries.min_pos,
                view.cell.queries.max_pos,
                view.cell.keys.min_pos,
                view.cell.keys.max_pos,
                on_media.sink[:, None],
                on_media.reach[:, None],
            )
            return replace(on_media, far=on_media.far | (visible & text_tiles))
        return on_media
    near = (on_text.near & view.keys.has_text) | (on_media.near & view.keys.has_media)
    return Choice(
        near,
        on_media.far,
        torch.maximum(on_text.sink, on_media.sink),
        torch.maximum(on_text.reach, on_media.reach),
        torch.minimum(on_text.coverage, on_media.coverage),
    )


def evaluate(view: View, probe: Probe, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """What the probe rows keep under a choice, exactly.

    Returns the coverage fp32 [H] (mean over probe rows) and the squared output error fp32 [H] (summed over them).
    """
    kept = _kept_elements(view, probe, choice).float().mul_(probe.weights)
    return kept.sum(-1).mean(-1), probe.error_energy(kept)


def guard(
    view: View, choice: Choice, error: torch.Tensor, energy: torch.Tensor, ceiling: float
) -> tuple[Choice, torch.Tensor]:
    """Sends the layer's worst heads to dense until the relative output error of the probe rows is below ``ceiling``.

    The error is that of all heads together, so a head counts with its weight in the layer's output.
    ``error`` fp32 [H] as from :func:`evaluate`; ``energy``: square of the dense output of the same rows over all heads,
    0-d. Returns the choice and which heads went dense, bool [H].
    """
    allowed = ceiling * ceiling * energy
    worst = error.argsort(descending=True)
    sorted_error = error[worst]
    remaining = sorted_error.sum() - sorted_error.cumsum(0) + sorted_error
    heads = torch.zeros_like(error, dtype=torch.bool).scatter_(0, worst, remaining > allowed)
    return where(heads, dense(view, error.numel()), choice), heads


def _near(view: View, sink: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
    """Tiles of the sequence pass that hold a key of the near region: bool [H, t, n]."""
    heads = sink.numel()
    uniform = tile_visibility(
        Region.NEAR,
        view.queries.min_pos,
        view.queries.max_pos,
        view.keys.min_pos,
        view.keys.max_pos,
        sink[:1, None],
        reach[:1, None],
    )
    return uniform.expand(heads, -1, -1)


def _far_like(choice: Choice) -> torch.Tensor:
    assert choice.far is not None
    return choice.far


def _near_mass(probe: Probe, sink: int, reach: int) -> torch.Tensor:
    """Mass of the probe rows in their near region: fp32 [H, P]."""
    positions = probe.rows.positions[:, None].long()
    oldest = (positions + 1 - reach).clamp_min(0)
    bounds = torch.cat([positions + 1, oldest, torch.minimum(oldest, torch.full_like(oldest, sink))], dim=1)
    all_mass, behind, in_sink = probe.mass_before(bounds).unbind(-1)
    return all_mass - behind + in_sink


def _far_tile_mass(probe: Probe, cell: CellView, sink: int, reach: int) -> torch.Tensor:
    """Mass of the probe rows in their far region, per key tile of the cell order: fp32 [H, P, n]."""
    heads, rows, keys = probe.weights.shape
    positions = torch.arange(keys, device=probe.weights.device)
    far = element_mask(Region.FAR, probe.rows.positions[:, None], positions[None, :], sink, reach)
    weights = (probe.weights * far.float()).view(heads * rows, keys)
    known = min(keys, cell.key_tile.numel())
    index = cell.key_tile[:known].long().expand(heads * rows, -1)
    mass = weights.new_zeros(heads * rows, cell.keys.min_pos.numel())
    return mass.scatter_add_(1, index, weights[:, :known]).view(heads, rows, -1)


def _kept_elements(view: View, probe: Probe, choice: Choice) -> torch.Tensor:
    """Keys that the probe rows see under a choice: bool [H, P, keys]."""
    heads, rows, length = probe.weights.shape
    keys = torch.arange(length, device=probe.weights.device)
    sink, reach = choice.sink[:, None, None], choice.reach[:, None, None]
    near = element_mask(Region.NEAR, probe.rows.positions[:, None], keys[None, :], sink, reach)
    listed = choice.near[:, view.row_tiles].repeat_interleave(probe.tile_keys, dim=-1)
    kept = near & listed
    if choice.far is not None and view.cell is not None:
        known = min(length, view.cell.key_tile.numel())
        index = view.cell.key_tile[:known].long().expand(heads, rows, -1)
        far = (keys <= probe.rows.positions[:, None]) & ~near
        kept[..., :known] |= choice.far[:, probe.rows.cell_tiles].gather(2, index) & far[..., :known]
    return kept


def _diagonal_mass(probe: Probe, tile: int, buckets: int) -> torch.Tensor:
    """Mean mass at distances ``[b * tile, (b + 1) * tile)`` behind the probe rows: fp32 [H, buckets]."""
    bucket = torch.arange(buckets + 1, device=probe.weights.device)
    before = probe.mass_before(probe.rows.positions[:, None].long() + 1 - bucket * tile)
    return (before[..., :-1] - before[..., 1:]).mean(1)


def _diagonal_tiles(queries: QueryTiles, tile: int, buckets: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key tiles ``[low, high)`` that bucket ``b`` of distances touches for each query tile: int64 [t, buckets] each."""
    bucket = torch.arange(buckets, device=queries.min_pos.device)
    oldest = queries.min_pos[:, None].long() - bucket * tile - (tile - 1)
    newest = queries.max_pos[:, None].long() - bucket * tile
    low = torch.div(oldest.clamp_min(0), tile, rounding_mode="floor")
    high = torch.div(newest.clamp_min(-1), tile, rounding_mode="floor") + 1
    return low, torch.maximum(high, low)


def _paint(chosen: torch.Tensor, low: torch.Tensor, high: torch.Tensor, tiles: int) -> torch.Tensor:
    """Marks the key tiles of the chosen diagonals: ``chosen`` bool [H, buckets] -> bool [H, t, tiles]."""
    heads, queries = chosen.shape[0], low.shape[0]
    steps = torch.zeros(heads, queries, tiles + 1, dtype=torch.int32, device=chosen.device)
    amount = chosen[:, None, :].int().expand(-1, queries, -1)
    steps.scatter_add_(2, low.clamp_max(tiles).expand(heads, -1, -1), amount)
    steps.scatter_add_(2, high.clamp_max(tiles).expand(heads, -1, -1), -amount)
    return steps[..., :tiles].cumsum(-1) > 0
