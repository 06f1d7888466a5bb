"""Per-forward plan: from layouts and chunk bounds to the device tensors that selection and attention read.

Built once per forward in ``init_forward_metadata``; every layer of the forward uses the same plan. The flat arrays of
the Rust plan reach the device in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from mminference_sgl import _core
from mminference_sgl.kernels.choice import CellView, KeyTiles, QueryTiles, View
from mminference_sgl.kernels.probe import ProbeKeys, ProbeRows
from mminference_sgl.kernels.tiles import ABSENT, KeyOrder, Region, TilePass
from mminference_sgl.method.stride import StrideSearch

KIND_TEXT = 0
"""Token kind of text that decides; media tokens and the text between two frames of one item are the media kinds."""

LEAST_OF_HEAD = 32
"""Probe rows that a head has at least where heads take turns."""
FEWEST_SEARCHED = 512
"""Rows of a chunk, if it has as many, that the offline search probes at least: heads are compared by what they say."""

_GOLDEN = (5**0.5 - 1) / 2
"""Its multiples spread evenly over the unit interval, whatever their number."""

Int32Array = npt.NDArray[np.int32]


class DeviceLayout:
    """A request's layout with its order arrays on the device: uploaded once per request, read by every forward.

    ``tokens`` int32 [length]: cell order -> token position; ``key_tile`` int32 [length]: token position -> cell-order
    key tile; ``cell_tiles`` and ``sequence_tiles``: bounds and modalities of the key tiles of both orders; ``arrival``
    int32 [n]: key tiles of the cell order as they get their first key.
    ``search``: that for the strides of runs without a grid, None where there are none.
    """

    def __init__(self, layout: _core.Layout, tile_keys: int, device: torch.device) -> None:
        self.layout = layout
        self.has_media = layout.num_items > 0
        self._picks: dict[tuple[int, str], torch.Tensor] = {}
        self.stride = layout.max_frame_stride
        self.search: StrideSearch | None = None
        self.sequence_tiles = _key_tiles(layout.key_tiles("sequence", tile_keys), tile_keys, device)
        if self.has_media:
            self.tokens = _to_device(layout.order("cell"), device)
            self.key_tile = _to_device(layout.key_tile_of_token("cell", tile_keys), device)
            bounds = layout.key_tiles("cell", tile_keys)
            self.cell_tiles = _key_tiles(bounds, tile_keys, device)
            first = bounds[0]
            arrival = np.argsort(first, kind="stable").astype(np.int32)
            self._arrives = first[arrival]
            self.arrival = _to_device(arrival, device)

    def arrived(self, num_keys: int) -> int:
        """How many cell-order key tiles hold keys of the request's first ``num_keys``."""
        return int(np.searchsorted(self._arrives, num_keys))

    def carried_picks(self, layer: int | None, modality: str, heads: int, device: torch.device) -> torch.Tensor:
        """What ``auto`` picked for each head in the last chunk, int64 [H], -1 for nothing; written in place.

        ``layer`` None carries nothing.
        """
        nothing = torch.full((heads,), -1, device=device)
        return nothing if layer is None else self._picks.setdefault((layer, modality), nothing)


@dataclass(frozen=True)
class SparseRequest:
    """One request of the batch that runs sparse.

    ``pool_row`` [1] integer on the device: its row of ``req_to_token``.
    ``row_start``: where its rows begin in the batch.
    """

    layout: DeviceLayout
    prefix: int
    chunk: int
    pool_row: torch.Tensor
    row_start: int

    @property
    def num_keys(self) -> int:
        """Keys in the pool once the chunk's are written."""
        return self.prefix + self.chunk


@dataclass(frozen=True)
class GroupTiles:
    """Query tiles of a row group: what selection sees of them, and where they are among the two passes' tiles."""

    view: View
    near: slice
    far: slice


@dataclass(frozen=True)
class RowGroup(GroupTiles):
    """Rows of one request and one query modality; the tiles are those for lists of single heads.

    ``row_slots``: its row slots in the sequence pass. ``keys``: the request's, for the probe.
    """

    request: int
    modality: str
    probe_rows: ProbeRows
    keys: ProbeKeys
    row_slots: slice


@dataclass(frozen=True)
class Tiling:
    """All rows in query tiles for lists that ``sharing`` heads share; ``groups`` as the plan's."""

    sharing: int
    near: TilePass
    far: TilePass | None
    groups: Sequence[GroupTiles]

    @property
    def passes(self) -> list[TilePass]:
        """The sequence pass, and the cell pass if there is one."""
        return [self.near] if self.far is None else [self.near, self.far]


@dataclass(frozen=True)
class ForwardPlan:
    """Everything geometric about one forward.

    Query tiles for lists of single heads are the plan's own; ``shared`` are others of the same rows.
    """

    requests: Sequence[SparseRequest]
    near: TilePass
    far: TilePass | None
    groups: Sequence[RowGroup]
    shared: Sequence[Tiling] = ()

    @property
    def tilings(self) -> list[Tiling]:
        """All of them, that of single heads first."""
        return [Tiling(1, self.near, self.far, self.groups), *self.shared]


def rows_per_tile(lanes: int, sharing: int) -> int:
    """Rows of a query tile of so many lanes, for lists that so many heads share."""
    return max(1, lanes // sharing)


def smallest_tile(lanes: int, sharing: Sequence[int]) -> int:
    """Rows of the smallest query tile of a plan with these numbers of heads that share: what cells suit."""
    return rows_per_tile(lanes, max(sharing, default=1))


def build(
    requests: Sequence[SparseRequest],
    req_to_token: torch.Tensor,
    *,
    tile_queries: int,
    tile_keys: int,
    probe_rows: int,
    probe_one_in: int = 0,
    sharing: Sequence[int] = (),
) -> ForwardPlan:
    """Plans one forward over its sparse requests.

    Args:
        requests: at least one.
        req_to_token: [pool rows, context] integer; slots of each request's tokens.
        tile_queries: most lanes of a query tile.
        probe_rows: most rows to probe per request and modality.
        probe_one_in: one row in so many, at least :data:`FEWEST_SEARCHED` of a chunk, is probed instead of what serving
            can afford, see :func:`rows_to_probe`.
        sharing: numbers of heads that may share a list, ascending; a query tile of such lists has as many rows as its
            lanes hold, at least one.
    """
    device = req_to_token.device
    near_parts, far_parts = [], []
    for request in requests:
        own = req_to_token[request.pool_row][0, : request.num_keys].long()
        near_parts.append(_sequence_tiles(request, own, tile_keys))
        far_parts.append(_cell_tiles(request, own, tile_keys))
    near_keys = _key_order(near_parts)
    single, *others = (
        _Planned(requests, shared, rows_per_tile(tile_queries, shared), tile_keys, device) for shared in (1, *sharing)
    )
    far_keys = _key_order(far_parts) if single.has_cells else None
    near, far = single.passes(near_keys, far_keys)
    tilings: list[list[GroupTiles]] = [[] for _ in others]
    groups: list[RowGroup] = []
    for index, request in enumerate(requests):
        has_media = request.layout.has_media
        cell_keys = _of_request(far_keys, far_parts, index) if far_keys is not None and has_media else None
        keys = ProbeKeys(_of_request(near_keys, near_parts, index), cell_keys)
        for modality in ("text", "media"):
            near_slice, far_slice = single.tiles_of(index, modality)
            if near_slice.start == near_slice.stop:
                continue
            has_cells = modality == "media"
            wanted = (
                max(FEWEST_SEARCHED, request.chunk // probe_one_in) if probe_one_in else rows_to_probe(request.chunk)
            )
            # A search looks at what single heads show.
            searched = probe_one_in or request.layout.search is not None
            wanted = min(probe_rows, wanted)
            turns = 1 if searched else turns_of(wanted, max(sharing, default=1))
            rows = _probe_rows(single.on_host, near_slice, far_slice, wanted, turns)
            positions = torch.from_numpy(rows.positions).to(device)
            probed = ProbeRows(
                rows=torch.from_numpy(rows.rows).to(device),
                positions=positions,
                first=int(rows.positions.min()),
                key_tile=(request.layout.key_tile if has_cells else single.uploaded[:0]).long(),
                key_tiles=request.layout.cell_tiles.min_pos.numel() if has_cells else 0,
                turns=rows.turns,
            )
            view = single.view(request, near_slice, far_slice, rows, positions)
            near_indptr = single.on_host("seq.row_indptr")
            slots_of_rows = slice(*(int(near_indptr[tile]) for tile in (near_slice.start, near_slice.stop)))
            groups.append(RowGroup(view, near_slice, far_slice, index, modality, probed, keys, slots_of_rows))
            for planned, tiles in zip(others, tilings, strict=True):
                near_slice, far_slice = planned.tiles_of(index, modality)
                tiles_view = planned.view(request, near_slice, far_slice, rows, positions)
                tiles.append(GroupTiles(tiles_view, near_slice, far_slice))
    shared = [
        Tiling(planned.sharing, *planned.passes(near_keys, far_keys), tiles)
        for planned, tiles in zip(others, tilings, strict=True)
    ]
    return ForwardPlan(requests, near, far, groups, shared)


class _Planned:
    """The Rust plan of one size of query tiles: on the host, and on the device in one copy."""

    def __init__(
        self, requests: Sequence[SparseRequest], sharing: int, rows: int, tile_keys: int, device: torch.device
    ) -> None:
        planned = _core.plan(
            [(r.layout.layout, r.prefix, r.chunk, r.row_start) for r in requests],
            tile_queries=rows,
            tile_keys=tile_keys,
        )
        self.sharing, self._rows, self._tile_keys, self._device = sharing, rows, tile_keys, device
        self._host, self._fields = planned.buffer, planned.fields()
        self.uploaded = _to_device(self._host, device)

    def on_host(self, name: str) -> Int32Array:
        """A field of the plan."""
        offset, length = self._fields[name]
        return self._host[offset : offset + length]

    def on_device(self, name: str) -> torch.Tensor:
        """A field of the plan."""
        offset, length = self._fields[name]
        return self.uploaded[offset : offset + length]

    @property
    def has_cells(self) -> bool:
        """Whether there is a cell pass."""
        return self._fields["cell.tile_request"][1] > 0

    def passes(self, near: KeyOrder, far: KeyOrder | None) -> tuple[TilePass, TilePass | None]:
        """The sequence pass and the cell pass over keys in their orders."""
        return (
            self._pass("seq", Region.NEAR, near),
            self._pass("cell", Region.FAR, far) if far is not None else None,
        )

    def _pass(self, prefix: str, region: Region, keys: KeyOrder) -> TilePass:
        return TilePass(
            region=region,
            keys=keys,
            rows=self.on_device(f"{prefix}.rows").long(),
            positions=self.on_device(f"{prefix}.positions"),
            indptr=self.on_device(f"{prefix}.row_indptr"),
            request=self.on_device(f"{prefix}.tile_request"),
            min_pos=self.on_device(f"{prefix}.tile_min_pos"),
            max_pos=self.on_device(f"{prefix}.tile_max_pos"),
            tile_queries=self._rows,
            sharing=self.sharing,
        )

    def tiles_of(self, request: int, modality: str) -> tuple[slice, slice]:
        """The query tiles of a request's rows of a modality in the two passes; text has none in the second."""
        near = self.on_host("seq.tile_request") == request
        near &= (self.on_host("seq.tile_kind") == KIND_TEXT) == (modality == "text")
        far = _span(self.on_host("cell.tile_request") == request)
        return _span(near), far if modality == "media" else slice(far.start, far.start)

    def view(self, request: SparseRequest, near: slice, far: slice, rows: _ProbeRows, positions: torch.Tensor) -> View:
        """What selection sees of a row group in these tiles, with the rows that were chosen to be probed."""
        cell = None
        if rows.far_slots.size:
            indptr = self.on_host("cell.row_indptr")
            cell = CellView(
                queries=self._queries("cell", far),
                keys=request.layout.cell_tiles,
                own_lo=self.on_device("cell.own_lo")[far],
                own_hi=self.on_device("cell.own_hi")[far],
                row_tiles=self._tiles_at(indptr, far, rows.far_slots),
                bands=torch.from_numpy(rows.bands_at(indptr[far])).to(self._device),
                band_of_row=torch.from_numpy(rows.bands_at(rows.far_slots)).to(self._device),
                num_bands=rows.band_slots.size,
                stride=request.layout.stride,
            )
        ends = (self.on_host(f"seq.tile_{end}_pos")[near] // self._tile_keys for end in ("max", "min"))
        return View(
            queries=self._queries("seq", near),
            keys=_visible(request, request.layout.sequence_tiles),
            row_tiles=self._tiles_at(self.on_host("seq.row_indptr"), near, rows.near_slots),
            row_positions=positions,
            span=int(np.subtract(*ends).max()) + 1,
            cell=cell,
            sharing=self.sharing,
        )

    def _queries(self, prefix: str, tiles: slice) -> QueryTiles:
        low, high = (self.on_device(f"{prefix}.tile_{end}_pos")[tiles] for end in ("min", "max"))
        return QueryTiles(low, high)

    def _tiles_at(self, indptr: Int32Array, tiles: slice, slots: npt.NDArray[np.int64]) -> torch.Tensor:
        """The query tiles of row slots, counted from the first of ``tiles``."""
        found = np.searchsorted(indptr[tiles.start : tiles.stop + 1], slots, side="right") - 1
        return torch.from_numpy(found).to(self._device)


@dataclass(frozen=True)
class _Tiled:
    """One request's key tiles: slots int64 and positions int32 [n, tile_keys]; the others as in :class:`KeyOrder`."""

    slots: torch.Tensor
    positions: torch.Tensor
    arrival: torch.Tensor
    arrived: int

    @property
    def count(self) -> int:
        """Key tiles."""
        return self.slots.shape[0]


def _tiled(slots: torch.Tensor, positions: torch.Tensor, tile_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    padding = -slots.numel() % tile_keys
    return (
        torch.cat([slots, slots[:1].expand(padding)]).view(-1, tile_keys),
        functional.pad(positions, (0, padding), value=ABSENT).view(-1, tile_keys),
    )


def _sequence_tiles(request: SparseRequest, slots: torch.Tensor, tile_keys: int) -> _Tiled:
    positions = torch.arange(request.num_keys, dtype=torch.int32, device=slots.device)
    tiles = _tiled(slots, positions, tile_keys)
    count = tiles[0].shape[0]
    return _Tiled(*tiles, torch.arange(count, dtype=torch.int32, device=slots.device), count)


def _cell_tiles(request: SparseRequest, slots: torch.Tensor, tile_keys: int) -> _Tiled:
    """Keys in cell order; tokens that later chunks will bring have their place already and point to the first key."""
    layout = request.layout
    if not layout.has_media:
        nothing = slots[:0].int()
        return _Tiled(*_tiled(slots[:0], nothing, tile_keys), nothing, 0)
    present = layout.tokens < request.num_keys
    tiles = _tiled(slots[torch.where(present, layout.tokens, 0)], layout.tokens, tile_keys)
    return _Tiled(*tiles, layout.arrival, layout.arrived(request.num_keys))


def _key_order(requests: Sequence[_Tiled]) -> KeyOrder:
    slots, positions = (torch.cat([getattr(own, name) for own in requests]) for name in ("slots", "positions"))
    first = np.cumsum([0, *(own.count for own in requests)])[:-1].tolist()
    held, later = [], []
    for own, tile in zip(requests, first, strict=True):
        held.append(own.arrival[: own.arrived] + tile)
        later.append(own.arrival[own.arrived :] + tile)
    return KeyOrder(
        slots=slots,
        positions=positions,
        tile_min=positions.amin(1),
        tile_max=positions.amax(1),
        tile_indptr=_indptr([own.count for own in requests], slots.device),
        widest=max(own.count for own in requests),
        arrival=torch.cat(held + later),
        arrived=sum(own.arrived for own in requests),
    )


def _of_request(order: KeyOrder, parts: Sequence[_Tiled], index: int) -> KeyOrder:
    """The part of an order that is one request's."""
    first, own = sum(part.count for part in parts[:index]), parts[index]
    return order.of_request(slice(first, first + own.count), own.arrival, own.arrived)


def rows_to_probe(chunk: int) -> int:
    """Probe rows of a chunk: one in 128, which is 0.8 % of dense attention; 64 of chunks
    below 8K tokens, one in 32 below 2K, at least 16.
    """
    return max(16, min(64, chunk // 32), chunk // 128)


def turns_of(rows: int, sharing: int) -> int:
    """Heads, of so many that may share a list, among which the probe rows are divided: a power of two.

    What the heads read together needs all rows, to find those that read everything; what one of them reads it shows
    with :data:`LEAST_OF_HEAD`.
    """
    return 1 << (max(1, min(sharing, rows // LEAST_OF_HEAD)).bit_length() - 1)


@dataclass(frozen=True)
class _ProbeRows:
    """Probe rows on the host: batch rows and positions, see :class:`ProbeRows`.

    ``near_slots``, ``far_slots``: their row slots in the two passes, which are the same whatever the query tiles' size;
    none of the latter without a cell pass. ``band_slots``: first row slot of each band, ascending. ``turns``: see
    :class:`ProbeRows`.
    """

    rows: npt.NDArray[np.int64]
    positions: Int32Array
    near_slots: npt.NDArray[np.int64]
    far_slots: npt.NDArray[np.int64]
    band_slots: npt.NDArray[np.int64]
    turns: int

    def bands_at(self, slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The bands of row slots of the cell pass."""
        return np.searchsorted(self.band_slots, slots, side="right") - 1


def _probe_rows(on_host: Callable[[str], Int32Array], near: slice, far: slice, count: int, turns: int) -> _ProbeRows:
    """Chooses the rows to probe: for media spread over the chunk's places and times, for text over its length.

    Rows of text lie at another place of each of as many equal parts, the last row of all among them: the last rows
    alone stand for nothing but themselves. Media: the cell pass is cut into as many bands of consecutive query tiles as
    rows are wanted. The rows that stand for a band are taken from all its rows alike, at another moment in each band:
    what the probe rows hold on average is then what the chunk's rows hold.
    """
    tiles = far.stop - far.start
    near_indptr = on_host("seq.row_indptr")
    first, end = int(near_indptr[near.start]), int(near_indptr[near.stop])
    if tiles == 0:
        count = min(count, end - first)
        bounds = first + np.arange(count + 1) * (end - first) // count
        place = np.arange(count) * _GOLDEN % 1
        slots = bounds[:-1] + (place * np.diff(bounds)).astype(np.int64)
        turns = min(turns, count)
        # Every head sees the last row.
        slots[count - turns :] = end - 1
        slots = _in_turns(slots, turns)
        nothing = np.zeros(0, dtype=np.int64)
        rows, positions = on_host("seq.rows")[slots], on_host("seq.positions")[slots]
        return _ProbeRows(rows.astype(np.int64), positions.copy(), slots, nothing, nothing, turns)
    num_bands = min(count, tiles)
    starts = far.start + np.searchsorted(np.arange(tiles) * num_bands // tiles, np.arange(num_bands + 1))
    indptr = on_host("cell.row_indptr").astype(np.int64)
    sizes = np.diff(indptr[starts])
    lane, band = np.divmod(np.arange(count // num_bands * num_bands), num_bands)
    moment = (lane + np.arange(1, num_bands + 1)[band] * _GOLDEN % 1) / (count // num_bands)
    slots = np.unique(indptr[starts[band]] + np.minimum(moment * sizes[band], sizes[band] - 1).astype(np.int64))
    slots = _in_turns(slots, turns)
    rows, positions = on_host("cell.rows")[slots], on_host("cell.positions")[slots]
    # Row slots ascend in the sequence pass, so a position finds its slot.
    near_slots = first + np.searchsorted(on_host("seq.positions")[first:end], positions)
    return _ProbeRows(rows.astype(np.int64), positions.copy(), near_slots, slots, indptr[starts[:-1]], turns)


def _in_turns(slots: npt.NDArray[np.int64], turns: int) -> npt.NDArray[np.int64]:
    """As many for every turn: the last slot is in more of them where the number does not divide."""
    return np.append(slots, np.repeat(slots[-1:], -len(slots) % turns))


def _key_tiles(
    bounds: tuple[Int32Array, Int32Array, npt.NDArray[np.uint8]], tile_keys: int, device: torch.device
) -> KeyTiles:
    """Key tiles of an order, from what the layout says of them."""
    low, high, mask = bounds
    modalities = _to_device(mask, device)
    return KeyTiles(
        min_pos=_to_device(low, device),
        max_pos=_to_device(high, device),
        has_text=(modalities & 1) != 0,
        has_media=(modalities & ~1) != 0,
        tile_keys=tile_keys,
    )


def _visible(request: SparseRequest, tiles: KeyTiles) -> KeyTiles:
    """The sequence-order tiles that hold keys by now; the last one ends with the chunk."""
    count = -(-request.num_keys // tiles.tile_keys)
    return KeyTiles(
        min_pos=tiles.min_pos[:count],
        max_pos=tiles.max_pos[:count].clamp_max(request.num_keys - 1),
        has_text=tiles.has_text[:count],
        has_media=tiles.has_media[:count],
        tile_keys=tiles.tile_keys,
    )


def _span(mask: npt.NDArray[np.bool_]) -> slice:
    """The contiguous range where the mask holds."""
    where = np.flatnonzero(mask)
    return slice(0, 0) if where.size == 0 else slice(int(where[0]), int(where[-1]) + 1)


def _indptr(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
