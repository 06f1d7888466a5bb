"""What selection sees of one request (:class:`View`) and what it decides (:class:`Choice`), for all heads at once.

Shapes: ``H`` heads, ``R`` probe rows of which each head has ``P``, ``t`` query tiles and ``n`` key tiles of the
sequence pass, ``t'`` and ``n'`` of the cell pass. Nothing here looks at single heads.
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
    ``row_tiles`` int64 [R]: the probe rows' query tile.
    ``bands`` int64 [t']: the band of each query tile, ascending from 0. A band is consecutive query tiles for which
    the same probe rows stand. ``band_of_row`` int64 [R]: the band of each probe row.
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
        """Key tiles of the cells of each probe row's query tile: bool [R, n']."""
        return self.own[self.row_tiles]

    @cached_property
    def beside_at_rows(self) -> torch.Tensor:
        """The same with those before and behind them: bool [R, n']."""
        return self.beside[self.row_tiles]

    @cached_property
    def rows_in_band(self) -> torch.Tensor:
        """Share of all probe rows that each one is in its band: fp32 [R, bands]."""
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
    them. ``row_tiles``, ``row_own`` int64 [R]: query tile and key tile of the probe rows.
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
        """Those of the probe rows' query tiles: bool [R, n]."""
        return self.fixed[self.row_tiles]


@dataclass(frozen=True)
class View:
    """One request's tiles for the query rows of one modality; made once per forward, as what follows from it.

    ``queries`` and ``keys`` are those of the sequence pass. ``row_tiles`` int64 [R]: the probe rows' query tile in it;
    ``row_positions`` int32 [R]: the rows' token positions. ``span``: most key tiles that the rows of a query tile lie
    in, first to last. ``cell`` is None where the rows take no part in a cell pass. ``sharing``: heads of a list.
    """

    queries: QueryTiles
    keys: KeyTiles
    row_tiles: torch.Tensor
    row_positions: torch.Tensor
    span: int
    cell: CellView | None
    sharing: int = 1
    _near: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)
    _near_counts: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)
    _slash: dict[tuple[int, int], SlashTiles] = field(default_factory=dict, repr=False)

    @property
    def causal_tiles(self) -> torch.Tensor:
        """Number of tiles that dense attention of these rows computes per list, a 0-d int64 tensor."""
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
    """A pattern's tiles for all lists by level: those of at least a list's threshold are read.

    ``near`` int8 [G, t, n] in sequence order and ``far`` int8 [G, t', n'] in cell order, [1, ...] where all lists have
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
class Offer:
    """Proposals for lists that ``view.sharing`` heads each share; ``wanted`` bool [proposals, G]: who may have what."""

    view: View
    proposals: Sequence[Proposal]
    wanted: torch.Tensor

    @cached_property
    def curves(self) -> Curves:
        """Those of all proposals one behind the other: [H or G, options]."""
        error, coverage, tiles = (
            torch.cat([getattr(proposal.curves, name) for proposal in self.proposals], dim=1)
            for name in ("error", "coverage", "tiles")
        )
        return Curves(error, coverage, tiles)


@dataclass(frozen=True)
class Map:
    """Tiles of lists that ``sharing`` heads each share.

    ``near`` bool [G, t, n] in sequence order, ``far`` bool [G, t', n'] in cell order or None;
    ``sink``, ``reach`` int32 [G]: the near region of the sequence pass, the far region of the cell pass is the rest.
    """

    near: torch.Tensor
    far: torch.Tensor | None
    sink: torch.Tensor
    reach: torch.Tensor
    sharing: int


@dataclass(frozen=True)
class Choice(Map):
    """Tiles for all heads: in lists of their own, and in ``shared`` ones, those of more heads last; one of them each.

    ``coverage`` fp32 [H]: share of the probe rows' mass that is kept. ``error`` fp32 [H]: energy that the probe rows'
    output loses, mean over the rows. ``tiles`` fp32 [H]: computed tiles, those of a shared list in equal parts.
    """

    coverage: torch.Tensor
    error: torch.Tensor
    tiles: torch.Tensor
    shared: Sequence[Map] = ()


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
        sharing=1,
        coverage=torch.ones(heads, device=device),
        error=torch.zeros(heads, device=device),
        tiles=view.causal_tiles.float().expand(heads),
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
    def is_limited(self) -> bool:
        """Whether tiles are limited, whatever they would keep."""
        return self.max_density < 1.0

    @property
    def allowed(self) -> torch.Tensor:
        """What each head would be allowed to lose by itself: energy per row, fp32 [H]."""
        return (self.energy * self.bound**2).clamp_min(TINY)


PRICES = 64
"""Prices that are tried, a third of an octave apart."""


def decide(offers: Sequence[Offer], budget: Budget, previous: torch.Tensor) -> tuple[Choice, torch.Tensor]:
    """One proposal and one threshold for each head, or for all that share, so that few tiles keep within the budget.

    At a price per tile, each list has that proposal and threshold, or each head dense attention, whose error and price
    together are least; and the heads of a KV group are in lists of their own or in shared ones, whatever costs less.
    The highest price at which the heads stay within the budget is the one, so a head gets tiles where they help the
    layer's output most; what is left of the budget goes to lists that the next higher price would have sooner.
    Where tiles are limited, nothing but tiles counts at the last price, so that the limit holds whatever the bound.
    Heads with one proposal and nothing to search have that, and neither draw on the budget nor add to it.

    Args:
        offers: lists of single heads first, then shared ones, each with more heads than those before.
        previous: each head's proposal in the chunk before, int64 [H], counted over all offers, -1 for none; another one
            must be cheaper by more than :data:`LOYALTY`, so that heads between two patterns do not change with every
            chunk.

    Returns:
        The choice, and the index of each head's proposal, counted likewise, int64 [H], -1 for dense attention.
    """
    view, device, heads = offers[0].view, previous.device, previous.numel()
    groups = heads // offers[-1].view.sharing
    searched = mask_of(tuple(proposal.searched for proposal in offers[0].proposals), device)
    fixed = (offers[0].wanted & ~searched[:, None]).any(0)
    energy = budget.energy.masked_fill(fixed, 0.0)
    mean = energy.mean().clamp_min(TINY)
    step = torch.arange(PRICES, device=device)
    price = torch.exp2((step - FAIR) / PER_OCTAVE)
    price *= mean * budget.bound**2 / view.causal_tiles
    if budget.exact:
        price = torch.ones_like(price)
    bound_to = offers[0].wanted.any(0) if budget.exact else fixed

    first, bills = 0, []
    for offer in offers:
        bills.append(_Bill.of(offer, first, price, budget, bound_to, fixed, previous))
        first += len(offer.proposals)

    def by_group(name: str) -> torch.Tensor:
        """A figure of every bill, summed over the lists of each KV group: [bills, groups, prices]."""
        return torch.stack([getattr(bill, name).view(groups, -1, PRICES).sum(1) for bill in bills])

    which = by_group("paid").argmin(0, keepdim=True)
    lost = by_group("lost").gather(0, which)[0].sum(0)
    allowed = budget.bound**2 * energy.sum()
    best = ((lost <= allowed) * (step + 1)).amax().sub_(1).clamp_min_(0)
    if budget.is_limited:
        read = by_group("read").gather(0, which)[0].sum(0)
        too_many = read > budget.max_density * heads * view.causal_tiles
        best = torch.maximum(best, too_many.sum().clamp_max(PRICES - 1))
    which = which[0].index_select(1, best[None])[:, 0]
    uses = [(which == index).repeat_interleave(bill.paid.shape[0] // groups) for index, bill in enumerate(bills)]
    dearer = torch.split(_fill(bills, uses, best, allowed), [use.numel() for use in uses])
    parts = [bill.taken(use, best, more) for bill, use, more in zip(bills, uses, dearer, strict=True)]
    # Heads whose lists are not used have 0 in every figure.
    pick = torch.stack([part.pick for part in parts]).amax(0)
    coverage, error, tiles = (
        torch.stack([getattr(part, name) for part in parts]).sum(0) for name in ("coverage", "error", "tiles")
    )
    own, *shared = (part.map for part in parts)
    return Choice(own.near, own.far, own.sink, own.reach, 1, coverage, error, tiles, shared), pick


@dataclass(frozen=True)
class _Part:
    """What an offer's lists that are used come to; figures and ``pick`` by head, 0 and -1 where they are not used."""

    map: Map
    pick: torch.Tensor
    coverage: torch.Tensor
    error: torch.Tensor
    tiles: torch.Tensor


@dataclass(frozen=True)
class _Bill:
    """What an offer's lists choose at each price and what it costs: [G, prices] each.

    ``options`` int64: proposals by threshold, dense attention behind them where the lists are those of single heads.
    ``paid``: error and price; ``lost``: error of the heads that are searched for; ``read``: tiles.
    ``first``: index of the first proposal over all offers.
    """

    offer: Offer
    first: int
    option: torch.Tensor
    paid: torch.Tensor
    lost: torch.Tensor
    read: torch.Tensor

    @classmethod
    def of(
        cls,
        offer: Offer,
        first: int,
        price: torch.Tensor,
        budget: Budget,
        bound_to: torch.Tensor,
        fixed: torch.Tensor,
        previous: torch.Tensor,
    ) -> _Bill:
        """``bound_to``: heads that may not run dense. ``fixed``: see :func:`decide`; bool [H]."""
        proposals, sharing = offer.proposals, offer.view.sharing
        thresholds, alone = LEVELS + 1, sharing == 1
        error, tiles = offer.curves.error, offer.curves.tiles
        error = error.view(-1, sharing, error.shape[1]).sum(1)
        barred = ~offer.wanted.T.repeat_interleave(thresholds, dim=1)
        number = torch.arange(first, first + len(proposals), device=price.device)
        loyal = (previous[::sharing, None] == number).repeat_interleave(thresholds, dim=1)
        favour = 1 - LOYALTY * loyal
        if alone:
            lists = error.shape[0]
            error = torch.cat([error, error.new_zeros(lists, 1)], dim=1)
            tiles = torch.cat([tiles, offer.view.causal_tiles.expand(lists, 1)], dim=1)
            barred = torch.cat([barred, bound_to[:, None]], dim=1)
            favour = torch.nn.functional.pad(favour, (0, 1), value=1 - budget.ease)
        costs = (error * favour).masked_fill(barred, torch.inf)[..., None] + (tiles * favour)[..., None] * price
        if budget.is_limited:
            costs[..., -1] = tiles.float().masked_fill(barred, torch.inf)
        paid, option = costs.min(1)
        lost = error.gather(1, option).masked_fill(fixed[::sharing, None], 0.0)
        return cls(offer, first, option, paid, lost, tiles.gather(1, option))

    def taken(self, use: torch.Tensor, best: torch.Tensor, dearer: torch.Tensor) -> _Part:
        """The lists that are used, bool [G], at the best price or, where ``dearer``, at the next one."""
        view, proposals, sharing = self.offer.view, self.offer.proposals, self.offer.view.sharing
        thresholds = LEVELS + 1
        at = self.option.index_select(1, torch.stack([best, _next(best)]))
        option = torch.where(dearer, at[:, 1], at[:, 0])
        pick = torch.div(option, thresholds, rounding_mode="floor")
        is_dense, threshold = use & (pick == len(proposals)), option % thresholds

        everything = dense(view, use.numel())
        near, far = everything.near & is_dense[:, None, None], everything.far
        sink, reach = everything.sink, everything.reach
        for index, proposal in enumerate(proposals):
            own, levels = use & (pick == index), proposal.levels
            # No level is as high as the threshold of lists that have something else.
            least = torch.where(own, threshold, thresholds).to(torch.int8)[:, None, None]
            near |= levels.near >= least
            if levels.far is not None and far is not None:
                far = far | (levels.far >= least)
            sink, reach = torch.where(own, levels.sink, sink), torch.where(own, levels.reach, reach)

        def by_head(values: torch.Tensor) -> torch.Tensor:
            return values.repeat_interleave(sharing, dim=0)

        # Behind the options of the curves is dense attention, which keeps everything.
        at = torch.where(pick == len(proposals), 0, option)[:, None]
        curves = self.offer.curves
        coverage, error = (every.gather(1, by_head(at))[:, 0] for every in (curves.coverage, curves.error))
        tiles = torch.where(is_dense, view.causal_tiles, curves.tiles.gather(1, at)[:, 0])
        used, everything_kept = by_head(use), by_head(is_dense)
        return _Part(
            Map(near, far, sink.int(), reach.int(), sharing),
            by_head(torch.where(use & ~is_dense, self.first + pick, -1)),
            torch.where(everything_kept, 1.0, coverage) * used,
            torch.where(everything_kept, 0.0, error) * used,
            by_head(tiles / sharing) * used,
        )


def _next(price: torch.Tensor) -> torch.Tensor:
    return (price + 1).clamp_max(PRICES - 1)


def _fill(
    bills: Sequence[_Bill], uses: Sequence[torch.Tensor], best: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Lists for which the next higher price fits into what is left, those that gain most by it: bool [lists].

    Of all bills' lists one behind the other; ``uses`` bool [G] each: which are used. ``best``, ``allowed`` 0-d.
    """
    prices = torch.stack([best, _next(best)])
    lost, read = (
        torch.cat([getattr(bill, name).index_select(1, prices) for bill in bills]) for name in ("lost", "read")
    )
    used = torch.cat(list(uses))
    more, fewer = (lost[:, 1] - lost[:, 0]) * used, (read[:, 0] - read[:, 1]).clamp_min(1)
    order = (more / fewer).argsort()
    affordable = (lost[:, 0] * used).sum() + more[order].cumsum(0) <= allowed
    return torch.zeros_like(used).scatter_(0, order, affordable)


def concatenate(blocks: Sequence[Proposal]) -> Proposal:
    """A pattern's proposals for consecutive blocks of heads as one for all of them."""
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    lists = [block.curves.tiles.shape[0] for block in blocks]
    far = None
    if first.levels.far is not None:
        far = _for_all([block.levels.far for block in blocks if block.levels.far is not None], lists)
    near = _for_all([block.levels.near for block in blocks], lists)
    error, coverage, tiles = (
        torch.cat([getattr(block.curves, name) for block in blocks]) for name in ("error", "coverage", "tiles")
    )
    levels = replace(first.levels, near=near, far=far)
    return Proposal(levels, Curves(error, coverage, tiles), first.searched)


def _for_all(levels: Sequence[torch.Tensor], lists: Sequence[int]) -> torch.Tensor:
    """Levels of blocks of so many lists as one; those that one block's lists have in common are all lists'."""
    common = [own for own, count in zip(levels, lists, strict=True) if own.shape[0] != count]
    return common[0] if common else torch.cat(list(levels))


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
