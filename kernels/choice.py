"""What selection sees of one request (:class:`View`) and what it decides (:class:`Choice`), for all heads at once.

Shapes: ``H`` heads, ``P`` probe rows, ``t`` query tiles and ``n`` key tiles of the sequence pass, ``t'`` and ``n'`` of
the cell pass. Nothing here looks at single heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property

import torch

from .levels import FAIR, LEVELS, PER_OCTAVE, TINY, Curves
from .tiles import UNBOUNDED, Region, tile_visibility

LOYALTY = 0.1
"""Share of its price by which a pattern counts as cheaper to a head that ran it in the chunk before."""


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
class Levels:
    """A pattern's tiles for all heads by level: those of at least a head's threshold are read.

    ``near`` int8 [H, t, n] in sequence order and ``far`` int8 [H, t', n'] in cell order, [1, ...] where all heads have
    the same; ``far`` is None where nothing is read there. ``sink``, ``reach``: the near region of the sequence pass.
    ``pattern``: what to call it.
    """

    near: torch.Tensor
    far: torch.Tensor | None
    sink: int
    reach: int
    pattern: str = ""


@dataclass(frozen=True)
class Proposal:
    """A pattern's tiles, and what each threshold costs. ``searched``: whether the threshold makes a difference."""

    levels: Levels
    curves: Curves
    searched: bool


@dataclass(frozen=True)
class Choice:
    """Tiles for all heads.

    ``near`` bool [H, t, n] in sequence order, ``far`` bool [H, t', n'] in cell order or None;
    ``sink``, ``reach`` int32 [H]: the near region of the sequence pass, the far region of the cell pass is the rest.
    ``coverage`` fp32 [H]: share of the probe rows' mass that is kept. ``error`` fp32 [H]: energy that the probe rows'
    output loses, mean over the rows. ``tiles`` int64 [H]: computed tiles.
    """

    near: torch.Tensor
    far: torch.Tensor | None
    sink: torch.Tensor
    reach: torch.Tensor
    coverage: torch.Tensor
    error: torch.Tensor
    tiles: torch.Tensor


def dense(view: View, heads: int) -> Choice:
    """All causal tiles in the sequence pass."""
    device = view.keys.min_pos.device
    far = None
    if view.cell is not None:
        shape = (heads, view.cell.queries.min_pos.numel(), view.cell.keys.min_pos.numel())
        far = torch.zeros((), dtype=torch.bool, device=device).expand(shape)
    return Choice(
        near=view.near_tiles(0, UNBOUNDED).expand(heads, -1, -1),
        far=far,
        sink=torch.zeros(heads, dtype=torch.int32, device=device),
        reach=torch.full((heads,), UNBOUNDED, dtype=torch.int32, device=device),
        coverage=torch.ones(heads, device=device),
        error=torch.zeros(heads, device=device),
        tiles=view.causal_tiles.expand(heads),
    )


@dataclass(frozen=True)
class Budget:
    """What the heads of a layer may lose together.

    ``energy`` fp32 [H]: that of each head's dense output, mean over the probe rows. ``bound``: the largest error of the
    heads' output together, relative to it; 0 leaves nothing out. ``max_density``: tiles that are computed over causal
    ones, whatever the bound, over all heads; what is always read is not counted. ``ease``: share of its price by which
    dense attention counts as cheaper than as many tiles.
    """

    energy: torch.Tensor
    bound: float
    max_density: float = 1.0
    ease: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether nothing may be left out."""
        return self.bound == 0.0

    @property
    def allowed(self) -> torch.Tensor:
        """What each head would be allowed to lose by itself: energy per row, fp32 [H]."""
        return (self.energy * self.bound**2).clamp_min(TINY)


PRICES = 64
"""Prices that are tried, a third of an octave apart."""


def decide(
    view: View, proposals: Sequence[Proposal], wanted: torch.Tensor, budget: Budget, previous: torch.Tensor
) -> tuple[Choice, torch.Tensor]:
    """One proposal and one threshold for each head, so that together they stay within the budget with few tiles.

    At a price per tile, each head has that proposal and threshold, or dense attention, whose error and price together
    are least. The highest price at which the heads stay within the budget is the one, so a head gets tiles where they
    help the layer's output most; what is left of the budget goes to heads that the next higher price would have sooner.
    Heads with one proposal and nothing to search have that, and neither draw on the budget nor add to it.

    Args:
        wanted: which heads may have which proposal, bool [proposals, H]; heads without any run dense.
        previous: each head's proposal in the chunk before, int64 [H], -1 for none; another one must be cheaper by more
            than :data:`LOYALTY`, so that heads between two patterns do not change with every chunk.

    Returns:
        The choice, and the index of each head's proposal, int64 [H], -1 for dense attention.
    """
    heads, device = wanted.shape[1], wanted.device
    fixed = (wanted & ~mask_of(tuple(proposal.searched for proposal in proposals), device)[:, None]).any(0)
    energy = budget.energy.masked_fill(fixed, 0.0)
    mean = energy.mean().clamp_min(TINY)
    step = torch.arange(PRICES, device=device)
    price = torch.exp2((step - FAIR) / PER_OCTAVE)
    price *= mean * budget.bound**2 / view.causal_tiles
    if budget.exact:
        price = torch.ones_like(price)

    def every(name: str, when_dense: torch.Tensor) -> torch.Tensor:
        """What each proposal has at each threshold, and dense attention behind them: [H, options]."""
        curves = torch.cat([getattr(proposal.curves, name) for proposal in proposals], dim=1)
        return torch.cat([curves, when_dense.expand(heads, 1)], dim=1)

    thresholds = LEVELS + 1
    error, coverage = every("error", price.new_zeros(1)), every("coverage", price.new_ones(1))
    tiles = every("tiles", view.causal_tiles)
    bound_to = wanted.any(0) if budget.exact else fixed
    barred = torch.cat([~wanted.T.repeat_interleave(thresholds, dim=1), bound_to[:, None]], dim=1)
    loyal = (previous[:, None] == torch.arange(len(proposals), device=device)).repeat_interleave(thresholds, dim=1)
    favour = torch.nn.functional.pad(1 - LOYALTY * loyal, (0, 1), value=1 - budget.ease)
    paid = (error * favour).masked_fill(barred, torch.inf)[..., None] + (tiles * favour)[..., None] * price
    option = paid.argmin(1)
    lost = error.gather(1, option).masked_fill(fixed[:, None], 0.0)
    allowed = budget.bound**2 * energy.sum()
    best = ((lost.sum(0) <= allowed) * (step + 1)).amax().sub_(1).clamp_min_(0)
    if budget.max_density < 1.0:
        too_many = tiles.gather(1, option).sum(0) > budget.max_density * heads * view.causal_tiles
        best = torch.maximum(best, too_many.sum().clamp_max(PRICES - 1))
    option = _fill(option, lost, tiles, best, allowed)
    pick = torch.div(option, thresholds, rounding_mode="floor")
    pick = torch.where(pick == len(proposals), -1, pick)
    threshold = option % thresholds

    everything, is_dense = dense(view, heads), pick < 0
    near, far = everything.near & is_dense[:, None, None], everything.far
    sink, reach = everything.sink, everything.reach
    for index, proposal in enumerate(proposals):
        own, levels = pick == index, proposal.levels
        # No level is as high as the threshold of heads that have something else.
        least = torch.where(own, threshold, LEVELS + 1).to(torch.int8)[:, None, None]
        near |= levels.near >= least
        if levels.far is not None and far is not None:
            far = far | (levels.far >= least)
        sink, reach = torch.where(own, levels.sink, sink), torch.where(own, levels.reach, reach)
    coverage, error, tiles = (every.gather(1, option[:, None])[:, 0] for every in (coverage, error, tiles))
    return Choice(near, far, sink.int(), reach.int(), coverage, error, tiles), pick


def _fill(
    option: torch.Tensor, lost: torch.Tensor, tiles: torch.Tensor, best: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Options at the best price, or at the next higher one for those heads that gain most by it, int64 [H].

    ``option``, ``lost`` [H, prices]; ``tiles`` [H, options]; ``best``, ``allowed`` 0-d.
    """
    index = torch.stack([best, (best + 1).clamp_max(PRICES - 1)]).expand(option.shape[0], 2)
    option, lost = option.gather(1, index), lost.gather(1, index)
    more, fewer = lost[:, 1] - lost[:, 0], -tiles.gather(1, option).diff(dim=1)[:, 0]
    order = (more / fewer.clamp_min(1)).argsort()
    affordable = lost[:, 0].sum() + more[order].cumsum(0) <= allowed
    dearer = torch.zeros_like(affordable).scatter_(0, order, affordable)
    return torch.where(dearer, option[:, 1], option[:, 0])


def concatenate(blocks: Sequence[Proposal]) -> Proposal:
    """A pattern's proposals for consecutive blocks of heads as one for all of them."""
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    far = None
    if first.levels.far is not None:
        far = _shared_or_all([block.levels.far for block in blocks if block.levels.far is not None])
    near = _shared_or_all([block.levels.near for block in blocks])
    error, coverage, tiles = (
        torch.cat([getattr(block.curves, name) for block in blocks]) for name in ("error", "coverage", "tiles")
    )
    levels = replace(first.levels, near=near, far=far)
    return Proposal(levels, Curves(error, coverage, tiles), first.searched)


def _shared_or_all(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    return levels[0] if levels[0].shape[0] == 1 else torch.cat(list(levels))


@cache
def mask_of(flags: tuple[bool, ...], device: torch.device) -> torch.Tensor:
    """Flags as a bool tensor; kept, since bringing it to a device would wait for what runs there."""
    return torch.tensor(flags, device=device)


def _visible(region: Region, queries: QueryTiles, keys: KeyTiles, sink: int, reach: int) -> torch.Tensor:
    sinks, reaches = (
        torch.full((1, 1), value, dtype=torch.int32, device=queries.min_pos.device) for value in (sink, reach)
    )
    bounds = queries.min_pos, queries.max_pos, keys.min_pos, keys.max_pos
    return tile_visibility(region, *bounds, sinks, reaches)[0]
