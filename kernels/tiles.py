"""Data that selection and attention exchange: key orders, query tiles, tile lists.

Shapes use these letters: ``H`` query heads, ``G`` lists per query tile, ``T`` query tiles of a pass, ``R`` requests,
``D`` head size. A query tile is up to ``tile_queries`` rows of the chunk; a key tile is ``tile_keys`` keys that are
consecutive in an order. Neighbouring query heads of one KV head may *share* a list: a *lane* is a (row, head) of a tile
that reads it, and ``H = G * sharing``. All index tensors live on the device of the KV pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

UNBOUNDED = 1 << 30
"""A reach that covers every earlier key: the row sees all keys of its tiles up to its own position."""

ABSENT = (1 << 31) - 1
"""Token position of the padding at the end of a short key tile: in the future of every row."""


class Region(Enum):
    """Which keys of its tiles a pass may see; the two regions split the causal keys of a row by position.

    With ``sink`` and ``reach`` of a query tile, a key at position ``k`` is *near* the row at ``q`` when
    ``k <= q and (k < sink or k > q - reach)``, and *far* when ``sink <= k <= q - reach``.
    """

    NEAR = "near"
    FAR = "far"


@dataclass(frozen=True)
class ForwardKeys:
    """Keys of every sparse request of one forward, tile after tile of one order and then of the other.

    A layer copies all of them at once (:meth:`.operands.Operands.in_order`) into ``copies``.

    ``slots`` int64 [n, tile_keys]: rows of the KV pool. Tokens that are not there (yet) have that of one that is:
    they weigh 0, but 0 * NaN is no 0, and others' memory may hold anything.
    ``positions`` int32 [n, tile_keys]: token positions, :data:`ABSENT` where a tile is short.
    ``arrived`` int32 [a]: the tiles that hold keys by now; no others are ever read.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    arrived: torch.Tensor
    copies: dict[Any, tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class KeyOrder:
    """Keys of every sparse request of one forward, or of one of them, in one token order, request after request.

    ``all_keys``: the keys of the forward, of which these are ``tiles``, n of them.
    ``tile_min``, ``tile_max`` int32 [n]: smallest and largest position in each key tile (a short tile's is ABSENT).
    ``tile_indptr`` int32 [R + 1]: where a request's key tiles begin; ``widest``: most key tiles of any request.
    ``arrival`` int32 [n]: its key tiles, the first ``arrived`` of which hold keys by now.
    """

    all_keys: ForwardKeys
    tiles: slice
    tile_min: torch.Tensor
    tile_max: torch.Tensor
    tile_indptr: torch.Tensor
    widest: int
    arrival: torch.Tensor
    arrived: int

    @property
    def slots(self) -> torch.Tensor:
        """Those of these tiles, see :class:`ForwardKeys`."""
        return self.all_keys.slots[self.tiles]

    @property
    def positions(self) -> torch.Tensor:
        """Those of these tiles, see :class:`ForwardKeys`."""
        return self.all_keys.positions[self.tiles]

    @property
    def tile_keys(self) -> int:
        """Keys of a tile."""
        return self.all_keys.slots.shape[1]


@dataclass(frozen=True)
class TilePass:
    """Query tiles of one pass over the sparse requests of one forward.

    ``rows`` int64 [n]: batch row of each row slot; ``positions`` int32 [n]: its token position.
    ``indptr`` int32 [T + 1]: row slots of each query tile; ``request`` int32 [T].
    ``min_pos``, ``max_pos`` int32 [T]: smallest and largest token position among a tile's rows.
    ``sharing``: query heads that share each list.
    """

    region: Region
    keys: KeyOrder
    rows: torch.Tensor
    positions: torch.Tensor
    indptr: torch.Tensor
    request: torch.Tensor
    min_pos: torch.Tensor
    max_pos: torch.Tensor
    tile_queries: int
    sharing: int = 1

    @property
    def num_tiles(self) -> int:
        """Query tiles."""
        return self.request.numel()

    @property
    def lanes(self) -> int:
        """Most lanes of a query tile."""
        return self.tile_queries * self.sharing


@dataclass(frozen=True)
class Started:
    """A launch over the lists of some passes over the same keys.

    Of each row and head, one of the passes at most has tiles; in a launch that does not merge, one of several has.

    ``table`` int64: the passes one after another, see :data:`.work_triton.PASS`; none where this is done by the launch
    of another pass. ``programs``: most lists and rests of lists of a pass; ``pieces``: rests of all passes;
    ``lanes``: most lanes of a query tile.
    """

    table: torch.Tensor
    programs: int
    pieces: int
    lanes: int


@dataclass(frozen=True)
class Work:
    """What the programs of a launch over lists do, W of them; all on the device.

    ``order`` int32 [W]: a program's list. Where lists are split, ``first`` and ``until`` int32 [W]: the entries of it
    that the program reads, none for those that are left over. The first ``pieces`` of the programs have rests of
    lists, each list's one after another. ``given`` int32 [G * T]: the order of lists of about the same length.
    ``started``: the launch, and ``row`` int64: what kernels read of the pass, from what is ``kept``.
    """

    order: torch.Tensor
    first: torch.Tensor
    until: torch.Tensor
    given: torch.Tensor
    pieces: int = 0
    row: torch.Tensor | None = None
    started: Started | None = None
    kept: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class TileLists:
    """For every query tile, and all heads that share, the key tiles they read: list ``g * T + t``.

    A list has its *full* tiles first, those of which every row of the query tile sees every key, so that no positions
    need comparing; then the others. Both parts ascend. Lists may lie anywhere, share entries and leave gaps: how much
    memory they need is then known before what they hold.

    ``begin``, ``count``, ``full`` int32 [G * T]: first entry of each list, its tiles, and how many of these are full.
    ``tiles`` int32 [capacity]: key tile, counted within the request.
    ``sink``, ``reach`` int32 [G, T]: bounds of the near region (see :class:`Region`). ``work``: how they are started,
    if that is known.
    """

    begin: torch.Tensor
    count: torch.Tensor
    full: torch.Tensor
    tiles: torch.Tensor
    sink: torch.Tensor
    reach: torch.Tensor
    work: Work | None = None

    def tiles_of(self, index: int) -> torch.Tensor:
        """The tiles of one list; waits for the device."""
        begin = int(self.begin[index])
        return self.tiles[begin : begin + int(self.count[index])]


def tile_visibility(
    region: Region,
    query_min: torch.Tensor,
    query_max: torch.Tensor,
    key_min: torch.Tensor,
    key_max: torch.Tensor,
    sink: torch.Tensor,
    reach: torch.Tensor,
) -> torch.Tensor:
    """Whether a key tile holds a key of ``region`` for some row, from position bounds alone.

    ``query_*`` int32 [t], ``key_*`` int32 [n], ``sink`` and ``reach`` int32 [G, t]. Returns bool [G, t, n].
    """
    q_min, q_max = query_min[None, :, None], query_max[None, :, None]
    k_min, k_max = key_min[None, None, :], key_max[None, None, :]
    sink, reach = sink[..., None], reach[..., None]
    if region is Region.NEAR:
        return (k_min <= q_max) & ((k_min < sink) | (k_max > q_min - reach))
    return (k_max >= sink) & (k_min <= q_max - reach)


def lists_from_map(tile_pass: TilePass, selected: torch.Tensor, sink: torch.Tensor, reach: torch.Tensor) -> TileLists:
    """Turns a tile map into :class:`TileLists`.

    ``selected`` bool [G, T, n]: key tile ``n`` counted within the tile's request; ``sink``, ``reach`` int32 [G, T].
    """
    keys = tile_pass.keys
    first = keys.tile_indptr[tile_pass.request.long()].long()
    key_tile = (first[:, None] + torch.arange(selected.shape[2], device=selected.device)).clamp_max(
        keys.tile_min.numel() - 1
    )
    key_min, key_max = keys.tile_min[key_tile], keys.tile_max[key_tile]
    query_min, query_max = tile_pass.min_pos[:, None], tile_pass.max_pos[:, None]
    sinks, reaches = sink[..., None], reach[..., None]
    if tile_pass.region is Region.NEAR:
        full = (key_max <= query_min) & ((key_max < sinks) | (key_min > query_max - reaches))
    else:
        full = (key_min >= sinks) & (key_max <= query_min - reaches)
    parts = torch.stack([selected & full, selected & ~full], dim=2)
    counts = parts.sum(-1, dtype=torch.int32).flatten(0, 1)
    count = counts.sum(1)
    begin = (count.cumsum(0) - count).int()
    return TileLists(begin, count.int(), counts[:, 0].contiguous(), parts.nonzero()[:, 3].int(), sink, reach)


def dense_lists(tile_pass: TilePass, wanted: torch.Tensor) -> TileLists:
    """All causal tiles of a sequence pass where ``wanted`` bool [G, T] holds, empty lists elsewhere.

    In sequence order these are the first so many tiles, the full ones before the others: all lists share their entries.
    """
    keys, listed = tile_pass.keys, wanted.flatten()
    heads = wanted.shape[0]
    count, full = (
        torch.where(listed, torch.div(bound, keys.tile_keys, rounding_mode="floor").repeat(heads), 0).int()
        for bound in (tile_pass.max_pos + keys.tile_keys, tile_pass.min_pos + 1)
    )
    sink = torch.zeros(wanted.shape, dtype=torch.int32, device=wanted.device)
    tiles = torch.arange(keys.widest, dtype=torch.int32, device=wanted.device)
    return TileLists(torch.zeros_like(count), count, full, tiles, sink, torch.full_like(sink, UNBOUNDED))


def element_mask(
    region: Region,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    sink: torch.Tensor | int,
    reach: torch.Tensor | int,
) -> torch.Tensor:
    """The definition of :class:`Region`, element by element; arguments broadcast against one another."""
    near = (key_positions < sink) | (key_positions > query_positions - reach)
    causal = key_positions <= query_positions
    return causal & near if region is Region.NEAR else causal & ~near
