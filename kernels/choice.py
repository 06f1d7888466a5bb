"""What selection sees of one request (:class:`View`) and what it decides (:class:`Choice`), for all heads at once.

Shapes: ``H`` heads, ``P`` probe rows, ``t`` query tiles and ``n`` key tiles of the sequence pass, ``t'`` and ``n'`` of
the cell pass. Nothing here looks at single heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from .tiles import UNBOUNDED, Region, tile_visibility

EXACT = 1.0
"""Coverage at which every causal tile is selected and budgets do not count: the result is dense attention."""
LOYALTY = 0.1
"""Share of its tiles by which a pattern counts as cheaper to a head that ran it in the chunk before."""
SLACK = 0.005
"""Mass that rows below the target may lack of it, on average over all rows, where a head counts as reaching it."""


@dataclass(frozen=True)
class Limits:
    """What the configuration allows.

    ``coverage``: target share of each row's mass; ``max_density``: computed tiles over causal tiles; ``min_gain``: mass
    per tile, in units of an average causal tile's, that makes a tile worth computing for a head that cannot reach the
    target.
    """

    coverage: float
    max_density: float
    min_gain: float


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
class CellTiles:
    """Tiles of the cell pass for one far region.

    ``visible`` bool [t', n']: those that hold a key of it.
    ``cost`` int64 [n' + bands + 1]: tiles beyond a query tile's own that each v-line, each h-line and the neighbours
    add, at least 1.
    """

    visible: torch.Tensor
    cost: torch.Tensor


@dataclass(frozen=True)
class CellView:
    """The cell order of one request as selection needs it; made once per forward, as what follows from it.

    ``own_lo``, ``own_hi`` int32 [t']: the key tiles of the cells that a query tile holds, ``[own_lo, own_hi)``.
    ``row_tiles`` int64 [P]: the probe rows' query tile.
    ``bands`` int64 [t']: the band of each query tile, ascending from 0. A band is consecutive query tiles for which
    the same probe rows stand. ``band_of_row`` int64 [P]: the band of each probe row.
    ``stride``: tokens from a frame to the next, the largest of the request.
    """

    queries: QueryTiles
    keys: KeyTiles
    own_lo: torch.Tensor
    own_hi: torch.Tensor
    row_tiles: torch.Tensor
    bands: torch.Tensor
    band_of_row: torch.Tensor
    num_bands: int
    stride: int
    _tiles: dict[tuple[int, int], CellTiles] = field(default_factory=dict, repr=False)

    def tiles(self, sink: int, reach: int) -> CellTiles:
        """Tiles of the cell pass for the far region of a sink and a reach."""
        if (sink, reach) not in self._tiles:
            visible = _visible(Region.FAR, self.queries, self.keys, sink, reach)
            rest = visible & ~self.own
            by_band = torch.zeros(self.num_bands, dtype=torch.int64, device=rest.device)
            by_band.index_add_(0, self.bands, rest.sum(1))
            cost = torch.cat([rest.sum(0), by_band, (rest & self.beside).sum()[None]]).clamp_min(1)
            self._tiles[sink, reach] = CellTiles(visible, cost)
        return self._tiles[sink, reach]

    @cached_property
    def own_at_rows(self) -> torch.Tensor:
        """Key tiles of the cells of each probe row's query tile: bool [P, n']."""
        return self.own[self.row_tiles]

    @cached_property
    def beside_at_rows(self) -> torch.Tensor:
        """The same with those before and behind them: bool [P, n']."""
        return self.beside[self.row_tiles]

    @cached_property
    def rows_in_band(self) -> torch.Tensor:
        """Share of all probe rows that each one is in its band: fp32 [P, bands]."""
        rows = self.band_of_row.numel()
        return torch.nn.functional.one_hot(self.band_of_row, self.num_bands).float() / rows

    @cached_property
    def own(self) -> torch.Tensor:
        """Key tiles of the cells of each query tile: bool [t', n']."""
        return self._around(0)

    @cached_property
    def beside(self) -> torch.Tensor:
        """The own key tiles, and as many before and behind them: bool [t', n']."""
        return self._around(1)

    def _around(self, margin: int) -> torch.Tensor:
        key_tile = torch.arange(self.keys.min_pos.numel(), device=self.own_lo.device)
        width = margin * (self.own_hi - self.own_lo)[:, None]
        return (key_tile >= self.own_lo[:, None] - width) & (key_tile < self.own_hi[:, None] + width)


@dataclass(frozen=True)
class SlashTiles:
    """Tiles of the sequence pass for columns and diagonals.

    Diagonal ``b`` is, for each row, the key tile ``b`` tiles before its own.

    ``first``, ``last`` int64 [t]: key tiles of the earliest and the latest row of each query tile, at most ``span`` of
    them. ``row_tiles``, ``row_own`` int64 [P]: query tile and key tile of the probe rows.
    ``causal`` bool [t, n]: tiles that dense attention computes.
    ``sink_tiles``, ``window_tiles``: read anyhow are so many key tiles at the start, and before ``first``.
    ``cost`` int64 [2 * n]: causal tiles of each column and each diagonal, at least 1.
    """

    first: torch.Tensor
    last: torch.Tensor
    span: int
    row_tiles: torch.Tensor
    row_own: torch.Tensor
    causal: torch.Tensor
    sink_tiles: int
    window_tiles: int
    cost: torch.Tensor

    @cached_property
    def fixed(self) -> torch.Tensor:
        """Tiles of the sink and the window: bool [t, n]."""
        key_tile = torch.arange(self.causal.shape[1], device=self.causal.device)
        window = (key_tile >= self.first[:, None] - self.window_tiles) & (key_tile <= self.last[:, None])
        return window | (key_tile < self.sink_tiles)

    @cached_property
    def fixed_at_rows(self) -> torch.Tensor:
        """Those of the probe rows' query tiles: bool [P, n]."""
        return self.fixed[self.row_tiles]


@dataclass(frozen=True)
class View:
    """One request's tiles for the query rows of one modality; made once per forward, as what follows from it.

    ``queries`` and ``keys`` are those of the sequence pass. ``row_tiles`` int64 [P]: the probe rows' query tile in it;
    ``row_positions`` int32 [P]: the rows' token positions. ``span``: most key tiles that the rows of a query tile lie
    in, first to last. ``cell`` is None where the rows take no part in a cell pass.
    """

    queries: QueryTiles
    keys: KeyTiles
    row_tiles: torch.Tensor
    row_positions: torch.Tensor
    span: int
    cell: CellView | None
    _near: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)
    _near_counts: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)
    _slash: dict[tuple[int, int], SlashTiles] = field(default_factory=dict, repr=False)
    made: dict[tuple[int, int, int], Choice] = field(default_factory=dict, repr=False)
    """(heads, sink, reach) -> :func:`within`."""

    @property
    def causal_tiles(self) -> torch.Tensor:
        """Number of tiles that dense attention of these rows computes per head, a 0-d int64 tensor."""
        return self.count_near(0, UNBOUNDED)

    def count_near(self, sink: int, reach: int) -> torch.Tensor:
        """Number of :meth:`near_tiles`, a 0-d int64 tensor."""
        if (sink, reach) not in self._near_counts:
            self._near_counts[sink, reach] = self.near_tiles(sink, reach).sum()
        return self._near_counts[sink, reach]

    def near_tiles(self, sink: int, reach: int) -> torch.Tensor:
        """Tiles of the sequence pass that hold a key of the near region: bool [t, n]."""
        if (sink, reach) not in self._near:
            self._near[sink, reach] = _visible(Region.NEAR, self.queries, self.keys, sink, reach)
        return self._near[sink, reach]

    def slash_tiles(self, sink: int, window: int) -> SlashTiles:
        """What columns and diagonals are, where the first ``sink`` and the last ``window`` keys are read anyhow."""
        if (sink, window) not in self._slash:
            tile, key_tile = self.keys.tile_keys, torch.arange(self.keys.min_pos.numel(), device=self.row_tiles.device)
            first, last, row_own = (
                torch.div(positions, tile, rounding_mode="floor").long()
                for positions in (self.queries.min_pos, self.queries.max_pos, self.row_positions)
            )
            causal = self.near_tiles(0, UNBOUNDED)
            low, high = ((bound[:, None] - key_tile).clamp_min(0) for bound in (first, last + 1))
            cost = torch.cat([causal.sum(0), (high - low).sum(0)]).clamp_min(1)
            self._slash[sink, window] = SlashTiles(
                first, last, self.span, self.row_tiles, row_own, causal, -(-sink // tile), -(-window // tile), cost
            )
        return self._slash[sink, window]


@dataclass(frozen=True)
class Choice:
    """Tiles for all heads.

    ``near`` bool [H, t, n] in sequence order, ``far`` bool [H, t', n'] in cell order or None;
    ``sink``, ``reach`` int32 [H]: the near region of the sequence pass, the far region of the cell pass is the rest.
    ``coverage`` fp32 [H]: share of the probe rows' mass that is kept.
    ``missing`` fp32 [H]: mass that the rows below the target lack of it, on average over all rows.
    ``tiles`` int64 [H]: computed tiles.
    """

    near: torch.Tensor
    far: torch.Tensor | None
    sink: torch.Tensor
    reach: torch.Tensor
    coverage: torch.Tensor
    missing: torch.Tensor
    tiles: torch.Tensor


def dense(view: View, heads: int) -> Choice:
    """All causal tiles in the sequence pass."""
    return within(view, heads, 0, UNBOUNDED)


def within(view: View, heads: int, sink: int, reach: int) -> Choice:
    """All near tiles of a sink and a reach, and no others; its coverage is yet to be measured unless that is all."""
    if (heads, sink, reach) not in view.made:
        device = view.keys.min_pos.device
        far = None
        if view.cell is not None:
            shape = (heads, view.cell.queries.min_pos.numel(), view.cell.keys.min_pos.numel())
            far = torch.zeros((), dtype=torch.bool, device=device).expand(shape)
        coverage = torch.ones(heads, device=device)
        view.made[heads, sink, reach] = Choice(
            near=view.near_tiles(sink, reach).expand(heads, -1, -1),
            far=far,
            sink=torch.full((heads,), sink, dtype=torch.int32, device=device),
            reach=torch.full((heads,), reach, dtype=torch.int32, device=device),
            coverage=coverage,
            missing=torch.zeros_like(coverage),
            tiles=view.count_near(sink, reach).expand(heads),
        )
    return view.made[heads, sink, reach]


def cheapest(
    view: View, choices: list[Choice], limits: Limits, previous: torch.Tensor | None = None
) -> tuple[Choice, torch.Tensor]:
    """Per head the choice that reaches the target with the fewest tiles.

    Where none does, the one whose mass is worth its tiles most, at the price of ``min_gain``. ``previous`` int64 [H]:
    each head's pick in the chunk before, -1 for none; another one must be cheaper by more than :data:`LOYALTY`, so that
    heads between two patterns do not change with every chunk. Returns the merged choice and the index of each head's
    pick, int64 [H]. Earlier choices win ties.
    """
    tiles = torch.stack([choice.tiles for choice in choices]).double()
    if previous is not None:
        kept = previous == torch.arange(len(choices), device=previous.device)[:, None]
        tiles = torch.where(kept, tiles * (1 - LOYALTY), tiles)
    reached = torch.stack([choice.missing for choice in choices]) <= SLACK
    coverage = torch.stack([choice.coverage for choice in choices]).double()
    worth = coverage - limits.min_gain * tiles / view.causal_tiles
    pick = torch.where(reached, 2.0 + 1.0 / (1.0 + tiles), worth).argmax(0)
    merged = choices[0]
    for index, choice in enumerate(choices[1:], start=1):
        merged = where(pick == index, choice, merged)
    return merged, pick


def never_beyond_dense(view: View, choice: Choice) -> Choice:
    """Heads whose tiles would be as many as dense attention computes run dense."""
    beyond = choice.tiles >= view.causal_tiles
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
        torch.cat([part.missing for part in parts]),
        torch.cat([part.tiles for part in parts]),
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
        torch.where(heads, chosen.missing, other.missing),
        torch.where(heads, chosen.tiles, other.tiles),
    )


def combine(view: View, on_text: Choice, on_media: Choice, *, text_pattern: str, media_pattern: str) -> Choice:
    """One choice out of a pattern for text keys and another for media keys (the paper's K- and 2D-boundary).

    With a grid on the media, text keys behind the window are read in the cell pass, where they are tiles of their own:
    all of them for ``dense``, none for ``a_shape``, by mass otherwise. Without one, each key tile of the sequence pass
    is read if the pattern of a modality it holds asks for it, and a row sees what either pattern's region admits.
    The result's coverage and tiles are yet to be measured.
    """
    if media_pattern == "grid":
        assert view.cell is not None
        assert on_media.far is not None
        text_tiles = view.cell.keys.has_text
        if text_pattern == "a_shape":
            return replace(on_media, far=on_media.far & ~(text_tiles & ~view.cell.keys.has_media))
        if text_pattern == "dense":
            queries, keys = view.cell.queries, view.cell.keys
            bounds = queries.min_pos, queries.max_pos, keys.min_pos, keys.max_pos
            visible = tile_visibility(Region.FAR, *bounds, on_media.sink[:, None], on_media.reach[:, None])
            return replace(on_media, far=on_media.far | (visible & text_tiles))
        return on_media
    near = (on_text.near & view.keys.has_text) | (on_media.near & view.keys.has_media)
    return Choice(
        near,
        on_media.far,
        torch.maximum(on_text.sink, on_media.sink),
        torch.maximum(on_text.reach, on_media.reach),
        torch.minimum(on_text.coverage, on_media.coverage),
        torch.maximum(on_text.missing, on_media.missing),
        torch.maximum(on_text.tiles, on_media.tiles),
    )


def _visible(region: Region, queries: QueryTiles, keys: KeyTiles, sink: int, reach: int) -> torch.Tensor:
    sinks, reaches = (
        torch.full((1, 1), value, dtype=torch.int32, device=queries.min_pos.device) for value in (sink, reach)
    )
    bounds = queries.min_pos, queries.max_pos, keys.min_pos, keys.max_pos
    return tile_visibility(region, *bounds, sinks, reaches)[0]
