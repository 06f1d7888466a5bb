"""Per-forward plan: from layouts and chunk bounds to the device tensors that selection and attention read.

Built once per forward in ``init_forward_metadata``; every layer of the forward uses the same plan. The host decides
everything first; what it computed, the flat arrays of the Rust plan among it, then reaches the device in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mminference_sgl import _core
from mminference_sgl.kernels.choice import CellView, KeyTiles, QueryTiles, View
from mminference_sgl.kernels.probe import ProbeKeys, ProbeRows
from mminference_sgl.kernels.tiles import KeyOrder, Region, TilePass
from mminference_sgl.method.key_orders import Part, Starts, in_order, in_sequence, key_orders, no_keys
from mminference_sgl.method.probe_rows import ChosenRows, Int32Array, choose, rows_to_probe, turns_of
from mminference_sgl.method.stride import StrideSearch
from mminference_sgl.method.upload import Packer, Uploaded

CARRYING_LAYERS = 512
"""Layers of a model whose picks are carried over from chunk to chunk, the first ones."""
KIND_TEXT = 0
"""Token kind of text that decides; media tokens and the text between two frames of one item are the media kinds."""


class DeviceLayout:
    """A request's layout with its order arrays on the device: uploaded once per request, read by every forward.

    ``tokens`` int32 [length]: cell order -> token position; ``key_tile`` int32 [length]: token position -> cell-order
    key tile; ``cell_tiles`` and ``sequence_tiles``: bounds and modalities of the key tiles of both orders; ``arrival``
    int32 [n]: key tiles of the cell order as they get their first key.
    ``search``: that for the strides of runs without a grid, None where there are none.
    ``resting``: layers with nothing to save -> the forwards that found it and the prefixes until which it holds.
    """

    def __init__(self, layout: _core.Layout, tile_keys: int, device: torch.device) -> None:
        self.layout = layout
        self.has_media = layout.num_items > 0
        self._picks: dict[str, torch.Tensor] = {}
        self._end = 0
        self.stride = layout.max_frame_stride
        self.search: StrideSearch | None = None
        self.resting: dict[int, list[tuple[int, int]]] = {}
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

    @property
    def num_cell_tiles(self) -> int:
        """Key tiles of the cell order, 0 without media."""
        return self.cell_tiles.min_pos.numel() if self.has_media else 0

    def arrived(self, num_keys: int) -> int:
        """How many cell-order key tiles hold keys of the request's first ``num_keys``."""
        return int(np.searchsorted(self._arrives, num_keys))

    def begin(self, prefix: int, num_keys: int) -> None:
        """A chunk begins behind ``prefix`` keys and ends with ``num_keys``.

        Where the request does not go on, but begins again, as after it was retracted, nothing is carried over.
        """
        if prefix < self._end:
            for picks in self._picks.values():
                picks.fill_(-1)
            self.resting.clear()
        self._end = num_keys

    def carried_picks(self, modality: str, heads: int) -> torch.Tensor:
        """What each head picked in the last chunk, by layer: int64 [CARRYING_LAYERS, H], -1 for nothing.

        Written in place.
        """
        if modality not in self._picks:
            shape = CARRYING_LAYERS, heads
            self._picks[modality] = torch.full(shape, -1, device=self.sequence_tiles.min_pos.device)
        return self._picks[modality]


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

    Query tiles for lists of single heads are the plan's own; ``shared`` are others of the same rows. ``prepared``: what
    selection makes once for all layers, by what their heads run, in ``memory``.
    """

    requests: Sequence[SparseRequest]
    near: TilePass
    far: TilePass | None
    groups: Sequence[RowGroup]
    shared: Sequence[Tiling] = ()
    prepared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    memory: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

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
        probe_one_in: one row in so many, at least :data:`.probe_rows.FEWEST_SEARCHED` of a chunk, is probed instead of
            what serving can afford, see :func:`.rows_to_probe`.
        sharing: numbers of heads that may share a list, ascending; a query tile of such lists has as many rows as its
            lanes hold, at least one.
    """
    packer = Packer()
    tilings = [
        _Planned(requests, shared, rows_per_tile(tile_queries, shared), tile_keys, packer) for shared in (1, *sharing)
    ]
    near_starts = Starts([-(-request.num_keys // tile_keys) for request in requests], packer)
    far_starts = Starts([request.layout.num_cell_tiles for request in requests], packer)
    groups = []
    for index, request in enumerate(requests):
        count = min(probe_rows, rows_to_probe(request.chunk, probe_one_in))
        # Searches compare heads by what each shows.
        searched = probe_one_in > 0 or request.layout.search is not None
        turns = 1 if searched else turns_of(count, max(sharing, default=1))
        for modality in ("text", "media"):
            near, far = tilings[0].tiles_of(index, modality)
            if near.start < near.stop:
                rows = choose(tilings[0].on_host, near, far, count, turns)
                groups.append(_Group(index, modality, rows, tilings, packer))
    uploaded = packer.upload(req_to_token.device)
    near_keys, far_keys, probe_keys = _keys(
        requests, req_to_token, near_starts, far_starts if tilings[0].has_cells else None, uploaded, tile_keys
    )
    visible = [_visible(request, request.layout.sequence_tiles) for request in requests]
    single, *shared = (
        Tiling(
            planned.sharing,
            *planned.passes(near_keys, far_keys, uploaded),
            [
                planned.tiles(group, group.tilings[number], requests[group.request], visible[group.request], uploaded)
                for group in groups
            ],
        )
        for number, planned in enumerate(tilings)
    )
    row_groups = [
        RowGroup(
            tiles.view,
            tiles.near,
            tiles.far,
            group.request,
            group.modality,
            group.probed(requests[group.request].layout, uploaded),
            probe_keys[group.request],
            tilings[0].row_slots(tiles.near),
        )
        for group, tiles in zip(groups, single.groups, strict=True)
    ]
    return ForwardPlan(requests, single.near, single.far, row_groups, shared)


@dataclass(frozen=True)
class _TiledGroup:
    """A row group in query tiles of one size, on the host: ``near`` and ``far`` of the two passes.

    ``row_tiles``, ``cell_row_tiles``, ``bands``: parts of what is uploaded, see :class:`View` and :class:`CellView`.
    """

    near: slice
    far: slice
    span: int
    row_tiles: slice
    cell_row_tiles: slice
    bands: slice


class _Group:
    """A row group on the host, in query tiles of all sizes."""

    def __init__(
        self, request: int, modality: str, rows: ChosenRows, tilings: Sequence[_Planned], packer: Packer
    ) -> None:
        self.request, self.modality = request, modality
        self.num_bands, self._turns = rows.band_slots.size, rows.turns
        self._first = int(rows.positions.min())
        self._rows, self.positions = packer.add(rows.rows), packer.add(rows.positions)
        self.band_of_row = packer.add(rows.bands_at(rows.far_slots))
        self.tilings = [planned.add(request, modality, rows, packer) for planned in tilings]

    def probed(self, layout: DeviceLayout, uploaded: Uploaded) -> ProbeRows:
        """The rows to probe."""
        rows, has_cells = uploaded.int64[self._rows], self.modality == "media"
        return ProbeRows(
            rows=rows,
            positions=uploaded.int32[self.positions],
            first=self._first,
            key_tile=layout.key_tile.long() if has_cells else rows[:0],
            key_tiles=layout.num_cell_tiles if has_cells else 0,
            turns=self._turns,
        )


class _Planned:
    """The Rust plan of one size of query tiles: on the host, and as a part of what is uploaded."""

    def __init__(
        self, requests: Sequence[SparseRequest], sharing: int, rows: int, tile_keys: int, packer: Packer
    ) -> None:
        planned = _core.plan(
            [(r.layout.layout, r.prefix, r.chunk, r.row_start) for r in requests],
            tile_queries=rows,
            tile_keys=tile_keys,
        )
        self.sharing, self._rows, self._tile_keys = sharing, rows, tile_keys
        self._host, self._fields = planned.buffer, planned.fields()
        self._first = packer.add(self._host).start

    def on_host(self, name: str) -> Int32Array:
        """A field of the plan."""
        offset, length = self._fields[name]
        return self._host[offset : offset + length]

    def _part(self, name: str) -> slice:
        """Where a field is in what is uploaded."""
        offset, length = self._fields[name]
        return slice(self._first + offset, self._first + offset + length)

    @property
    def has_cells(self) -> bool:
        """Whether there is a cell pass."""
        return self._fields["cell.tile_request"][1] > 0

    def tiles_of(self, request: int, modality: str) -> tuple[slice, slice]:
        """The query tiles of a request's rows of a modality in the two passes; text has none in the second."""
        near = self.on_host("seq.tile_request") == request
        near &= (self.on_host("seq.tile_kind") == KIND_TEXT) == (modality == "text")
        far = _span(self.on_host("cell.tile_request") == request)
        return _span(near), far if modality == "media" else slice(far.start, far.start)

    def row_slots(self, near: slice) -> slice:
        """Row slots of query tiles of the sequence pass."""
        indptr = self.on_host("seq.row_indptr")
        return slice(int(indptr[near.start]), int(indptr[near.stop]))

    def add(self, request: int, modality: str, rows: ChosenRows, packer: Packer) -> _TiledGroup:
        """A row group in these tiles, with the rows that were chosen to be probed."""
        near, far = self.tiles_of(request, modality)
        ends = (self.on_host(f"seq.tile_{end}_pos")[near] // self._tile_keys for end in ("max", "min"))
        indptr = self.on_host("cell.row_indptr")
        return _TiledGroup(
            near=near,
            far=far,
            span=int(np.subtract(*ends).max()) + 1,
            row_tiles=packer.add(_tiles_at(self.on_host("seq.row_indptr"), near, rows.near_slots)),
            cell_row_tiles=packer.add(_tiles_at(indptr, far, rows.far_slots)),
            bands=packer.add(rows.bands_at(indptr[far])),
        )

    def passes(self, near: KeyOrder, far: KeyOrder | None, uploaded: Uploaded) -> tuple[TilePass, TilePass | None]:
        """The sequence pass and the cell pass over keys in their orders."""
        return (
            self._pass("seq", Region.NEAR, near, uploaded),
            self._pass("cell", Region.FAR, far, uploaded) if far is not None else None,
        )

    def _pass(self, prefix: str, region: Region, keys: KeyOrder, uploaded: Uploaded) -> TilePass:
        return TilePass(
            region=region,
            keys=keys,
            rows=uploaded.int64[self._part(f"{prefix}.rows")],
            positions=uploaded.int32[self._part(f"{prefix}.positions")],
            indptr=uploaded.int32[self._part(f"{prefix}.row_indptr")],
            request=uploaded.int32[self._part(f"{prefix}.tile_request")],
            min_pos=uploaded.int32[self._part(f"{prefix}.tile_min_pos")],
            max_pos=uploaded.int32[self._part(f"{prefix}.tile_max_pos")],
            tile_queries=self._rows,
            sharing=self.sharing,
        )

    def tiles(
        self, group: _Group, tiled: _TiledGroup, request: SparseRequest, visible: KeyTiles, uploaded: Uploaded
    ) -> GroupTiles:
        """What selection sees of a row group in these tiles; ``visible``: the request's key tiles of the first pass."""
        cell = None
        if group.num_bands:
            cell = CellView(
                queries=self._queries("cell", tiled.far, uploaded),
                keys=request.layout.cell_tiles,
                own_lo=uploaded.int32[self._part("cell.own_lo")][tiled.far],
                own_hi=uploaded.int32[self._part("cell.own_hi")][tiled.far],
                row_tiles=uploaded.int64[tiled.cell_row_tiles],
                bands=uploaded.int64[tiled.bands],
                band_of_row=uploaded.int64[group.band_of_row],
                num_bands=group.num_bands,
                stride=request.layout.stride,
            )
        view = View(
            queries=self._queries("seq", tiled.near, uploaded),
            keys=visible,
            row_tiles=uploaded.int64[tiled.row_tiles],
            row_positions=uploaded.int32[group.positions],
            span=tiled.span,
            cell=cell,
            sharing=self.sharing,
        )
        return GroupTiles(view, tiled.near, tiled.far)

    def _queries(self, prefix: str, tiles: slice, uploaded: Uploaded) -> QueryTiles:
        low, high = (uploaded.int32[self._part(f"{prefix}.tile_{end}_pos")][tiles] for end in ("min", "max"))
        return QueryTiles(low, high)


def _tiles_at(indptr: Int32Array, tiles: slice, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The query tiles of row slots, counted from the first of ``tiles``."""
    return np.searchsorted(indptr[tiles.start : tiles.stop + 1], slots, side="right") - 1


def _keys(
    requests: Sequence[SparseRequest],
    req_to_token: torch.Tensor,
    near_starts: Starts,
    far_starts: Starts | None,
    uploaded: Uploaded,
    tile_keys: int,
) -> tuple[KeyOrder, KeyOrder | None, list[ProbeKeys]]:
    """The two passes' keys, and each request's; ``far_starts`` is None without a cell pass."""
    slots = [req_to_token[request.pool_row][0, : request.num_keys].long() for request in requests]
    sequence = [in_sequence(held, tile_keys) for held in slots], near_starts
    if far_starts is None:
        ((near, own),) = key_orders([sequence], uploaded)
        return near, None, [ProbeKeys(keys, None) for keys in own]
    cells = [_in_cells(request, held, tile_keys) for request, held in zip(requests, slots, strict=True)], far_starts
    (near, own), (far, own_cells) = key_orders([sequence, cells], uploaded)
    of_requests = zip(requests, own, own_cells, strict=True)
    return near, far, [ProbeKeys(keys, cells if r.layout.has_media else None) for r, keys, cells in of_requests]


def _in_cells(request: SparseRequest, slots: torch.Tensor, tile_keys: int) -> Part:
    layout = request.layout
    if not layout.has_media:
        return no_keys(slots, tile_keys)
    return in_order(slots, layout.tokens, layout.arrival, layout.arrived(request.num_keys), tile_keys)


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


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
