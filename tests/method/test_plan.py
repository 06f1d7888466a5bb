"""The plan of a forward against a slow derivation from spans, grids and chunk bounds alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mminference_sgl import _core
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import ABSENT, KeyOrder, Region, TilePass
from mminference_sgl.method.plan import DeviceLayout, ForwardPlan, RowGroup, SparseRequest, build
from mminference_sgl.method.probe_rows import LEAST_OF_HEAD, rows_to_probe

IMAGE, VIDEO, AUDIO = 1, 2, 3
TEXT_KIND, MEDIA_KIND, INTERSTITIAL_KIND = 0, 1, 2
CPU = torch.device("cpu")

Item = tuple[int, list[tuple[int, int]], tuple[int, int, int] | None]


# -- batches -----------------------------------------------------------------------------------------------------------


def timestamped(start: int, frames: int, rows: int, cols: int) -> Item:
    """A span per frame; the text before a frame grows by a token after the sixth."""
    spans = []
    for frame in range(frames):
        start += 4 + (frame > 5)
        spans.append((start, start + rows * cols - 1))
        start += rows * cols
    return VIDEO, spans, (frames, rows, cols)


def one_run(start: int, frames: int, rows: int, cols: int) -> Item:
    return VIDEO, [(start, start + frames * rows * cols - 1)], (frames, rows, cols)


def image(start: int, rows: int, cols: int) -> Item:
    return IMAGE, [(start, start + rows * cols - 1)], (1, rows, cols)


@dataclass(frozen=True)
class Request:
    """What a plan is made from, as one writes it down."""

    length: int
    items: Sequence[Item]
    prefix: int
    chunk: int

    @property
    def keys(self) -> int:
        return self.prefix + self.chunk


STAMPED = timestamped(11, 13, 5, 7)
"""Frames of 35 tokens from 15, 54, ..., 210, then 250, 290, ...: 39 apart, later 40."""

BATCHES: dict[str, list[Request]] = {
    "video from its start": [Request(600, [one_run(10, 9, 6, 8)], 0, 600)],
    "timestamps, cut inside frames": [Request(700, [STAMPED], 111, 250)],
    "prefix and chunk end between frames": [Request(700, [STAMPED], 52, 157)],
    "image and text": [Request(400, [image(21, 9, 7)], 0, 333)],
    "text only": [Request(300, [], 0, 111)],
    "text only, long prefix": [Request(300, [], 201, 63)],
    "text behind a video": [Request(700, [one_run(10, 9, 6, 8)], 500, 100)],
    "inside one frame": [Request(700, [one_run(10, 9, 6, 8)], 60, 17)],
    "one row": [Request(700, [one_run(10, 9, 6, 8)], 399, 1)],
    "audio has no grid": [Request(500, [(AUDIO, [(30, 329)], None)], 0, 450)],
    "two videos, an image and audio": [
        Request(
            1200,
            [image(900, 5, 5), one_run(5, 7, 4, 9), timestamped(300, 11, 6, 7), (AUDIO, [(1000, 1099)], None)],
            203,
            901,
        )
    ],
    "mixed": [
        Request(700, [STAMPED], 111, 250),
        Request(400, [image(21, 9, 7)], 0, 333),
        Request(300, [], 37, 200),
        Request(600, [one_run(10, 9, 6, 8)], 500, 64),
        Request(1111, [one_run(3, 63, 1, 17)], 1000, 111),
    ],
    "text first, media later": [Request(90, [], 0, 90), Request(400, [image(21, 9, 7)], 16, 70)],
}

SIZES = {
    "64x16": (64, 16, 0, 16, 1),
    "32x64": (32, 64, 0, 64, 1),
    "16x16 cells of 3": (16, 16, 3, 1, 1),
    "128x128": (128, 128, 5, 7, 1),
    "64x16 by 7": (64, 16, 0, 16, 7),
    "32x64 by 2": (32, 64, 4, 64, 2),
}
"""Lanes of a query tile, key tile, cell size (0: automatic), probe rows, and how many heads share a list."""


@dataclass(frozen=True)
class Case:
    requests: Sequence[Request]
    sparse: Sequence[SparseRequest]
    req_to_token: torch.Tensor
    plan: ForwardPlan
    tile_queries: int
    tile_keys: int
    probe_rows: int
    shared: int


def make(
    requests: Sequence[Request],
    *,
    tile_queries: int,
    tile_keys: int,
    cell_size: int = 0,
    probe_rows: int = 16,
    shared: int = 1,
) -> Case:
    """Plans a batch in which rows of dense requests lie between the sparse ones and pool rows are not batch indices.

    Where heads share lists, the plan is that of their query tiles: what holds of single heads' tiles holds of these.
    """
    generator = torch.Generator().manual_seed(7)
    context = max(request.length for request in requests) + 5
    pool_rows = torch.randperm(2 * len(requests) + 1, generator=generator)[: len(requests)]
    req_to_token = torch.randperm((2 * len(requests) + 1) * context, generator=generator).int().view(-1, context) + 1
    sparse, row = [], 3
    for index, request in enumerate(requests):
        layout = _core.Layout(
            request.length, request.items, chunk_tokens=256, tile_queries=tile_queries, cell_size=cell_size
        )
        device_layout = DeviceLayout(layout, tile_keys, CPU)
        sparse.append(SparseRequest(device_layout, request.prefix, request.chunk, pool_rows[index : index + 1], row))
        row += request.chunk + 11 * index
    sizes = {"tile_queries": tile_queries, "tile_keys": tile_keys, "probe_rows": probe_rows}
    plan = build(sparse, req_to_token, **sizes, sharing=(shared,) if shared > 1 else ())
    if shared > 1:
        (tiling,) = plan.shared
        assert all(tile_pass.sharing == shared for tile_pass in tiling.passes)
        groups = [
            dataclasses.replace(group, view=tiles.view, near=tiles.near, far=tiles.far)
            for group, tiles in zip(plan.groups, tiling.groups, strict=True)
        ]
        assert all(group.view.sharing == shared for group in groups)
        plan = dataclasses.replace(plan, near=tiling.near, far=tiling.far, groups=groups)
    return Case(requests, sparse, req_to_token, plan, tile_queries // shared, tile_keys, probe_rows, shared)


@pytest.fixture(scope="module", params=[(b, s) for b in BATCHES for s in SIZES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    batch, size = request.param
    names = ("tile_queries", "tile_keys", "cell_size", "probe_rows", "shared")
    return make(BATCHES[batch], **dict(zip(names, SIZES[size], strict=True)))


# -- the slow derivation -----------------------------------------------------------------------------------------------


def kinds_of(request: Request) -> list[int]:
    """Kind of each token: of an item, inside an item's extent, or text that decides."""
    kinds = [TEXT_KIND] * request.length
    for _, spans, _ in request.items:
        for position in range(min(spans)[0], max(spans)[1] + 1):
            kinds[position] = INTERSTITIAL_KIND
    for _, spans, _ in request.items:
        for start, end in spans:
            kinds[start : end + 1] = [MEDIA_KIND] * (end - start + 1)
    return kinds


def places_of(request: Request) -> dict[int, tuple[int, int]]:
    """Token position -> (item, place in the frame), for items with a grid."""
    places = {}
    for number, (_, spans, frame_grid) in enumerate(request.items):
        if frame_grid is not None:
            tokens = [position for start, end in sorted(spans) for position in range(start, end + 1)]
            area = frame_grid[1] * frame_grid[2]
            assert len(tokens) == frame_grid[0] * area
            places.update({position: (number, ordinal % area) for ordinal, position in enumerate(tokens)})
    return places


def stride_of(request: Request) -> int:
    """Largest distance between the first tokens of two frames in a row; the frame's size where there is one frame."""
    strides = [0]
    for _, spans, frame_grid in request.items:
        if frame_grid is not None:
            tokens = [position for start, end in sorted(spans) for position in range(start, end + 1)]
            starts = tokens[:: frame_grid[1] * frame_grid[2]]
            strides += [b - a for a, b in itertools.pairwise(starts)] or [frame_grid[1] * frame_grid[2]]
    return max(strides)


def rows_of(tile_pass: TilePass, tile: int) -> list[tuple[int, int]]:
    """(batch row, token position) of a query tile's rows."""
    slots = slice(int(tile_pass.indptr[tile]), int(tile_pass.indptr[tile + 1]))
    return list(zip(tile_pass.rows[slots].tolist(), tile_pass.positions[slots].tolist(), strict=True))


def chunk_rows(case: Case, index: int, *kinds: int) -> list[tuple[int, int]]:
    """(batch row, token position) of a request's chunk rows of some kinds, ascending."""
    request, kind = case.requests[index], kinds_of(case.requests[index])
    first = case.sparse[index].row_start - request.prefix
    return [(first + p, p) for p in range(request.prefix, request.keys) if kind[p] in kinds]


def keys_of(case: Case, index: int, positions: Sequence[int]) -> tuple[list[int], list[int]]:
    """Pool slots and positions of keys in whole tiles; 0 for those that are not there (yet)."""
    request, pool_row = case.requests[index], int(case.sparse[index].pool_row)
    padding = -len(positions) % case.tile_keys
    slots = [int(case.req_to_token[pool_row, p]) if p < request.keys else 0 for p in positions]
    return slots + [0] * padding, list(positions) + [ABSENT] * padding


def check_keys(case: Case, keys: KeyOrder, wanted: Sequence[Sequence[int]]) -> None:
    """``wanted``: token positions in order, per request."""
    expected = [keys_of(case, index, positions) for index, positions in enumerate(wanted)]
    slots, positions = ([value for own in part for value in own] for part in zip(*expected, strict=True))
    assert (keys.slots.dtype, keys.positions.dtype) == (torch.int64, torch.int32)
    assert keys.tile_keys == case.tile_keys
    assert keys.slots.shape == keys.positions.shape == (len(slots) // case.tile_keys, case.tile_keys)
    assert keys.positions.flatten().tolist() == positions
    found = iter(keys.slots.flatten().tolist())
    for own, _ in expected:
        present = set(own) - {0}
        for slot, other in zip(own, found, strict=False):
            assert other == slot or (slot == 0 and other in present), "only what the request wrote is read"
    tiles = [positions[at : at + case.tile_keys] for at in range(0, len(positions), case.tile_keys)]
    assert keys.tile_min.tolist() == [min(tile) for tile in tiles]
    assert keys.tile_max.tolist() == [max(tile) for tile in tiles]
    counts = [len(own[0]) // case.tile_keys for own in expected]
    assert keys.tile_indptr.tolist() == [sum(counts[:at]) for at in range(len(counts) + 1)]
    assert keys.tile_indptr.dtype == torch.int32
    assert keys.widest == max(counts)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_near_keys_are_prefix_and_chunk_in_sequence(case: Case) -> None:
    check_keys(case, case.plan.near.keys, [range(request.keys) for request in case.requests])
    bounds = case.plan.near.keys.tile_indptr.tolist()
    for group in case.plan.groups:
        own = slice(*bounds[group.request : group.request + 2])
        assert torch.equal(group.keys.sequence.slots, case.plan.near.keys.slots[own])


def test_far_keys_are_the_whole_layout_in_cell_order(case: Case) -> None:
    """Tokens of later chunks keep their place and position, so they are in the future; their slot is another's."""
    media_rows = any(chunk_rows(case, index, MEDIA_KIND, INTERSTITIAL_KIND) for index in range(len(case.requests)))
    assert (case.plan.far is not None) is media_rows
    if case.plan.far is not None:
        orders = [
            s.layout.layout.order("cell").tolist() if r.items else []
            for r, s in zip(case.requests, case.sparse, strict=True)
        ]
        assert all(
            sorted(order) == list(range(r.length)) for order, r in zip(orders, case.requests, strict=True) if order
        )
        check_keys(case, case.plan.far.keys, orders)


# -- rows --------------------------------------------------------------------------------------------------------------


def check_tiles(case: Case, tile_pass: TilePass) -> None:
    assert tile_pass.tile_queries == case.tile_queries
    assert (tile_pass.rows.dtype, tile_pass.positions.dtype) == (torch.int64, torch.int32)
    assert int(tile_pass.indptr[-1]) == tile_pass.rows.numel() == tile_pass.positions.numel()
    for tile in range(tile_pass.num_tiles):
        positions = [position for _, position in rows_of(tile_pass, tile)]
        assert 1 <= len(positions) <= case.tile_queries
        assert int(tile_pass.min_pos[tile]) == min(positions)
        assert int(tile_pass.max_pos[tile]) == max(positions)


def test_every_row_is_in_the_near_pass_once(case: Case) -> None:
    near = case.plan.near
    assert near.region is Region.NEAR
    check_tiles(case, near)
    wanted = [row for i in range(len(case.requests)) for row in chunk_rows(case, i, 0, 1, 2)]
    found = list(zip(near.rows.tolist(), near.positions.tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert sorted(found) == sorted(wanted)


def test_every_media_row_is_in_the_far_pass_once(case: Case) -> None:
    wanted = [row for i in range(len(case.requests)) for row in chunk_rows(case, i, MEDIA_KIND, INTERSTITIAL_KIND)]
    far = case.plan.far
    if far is None:
        assert not wanted
        return
    assert far.region is Region.FAR
    check_tiles(case, far)
    found = list(zip(far.rows.tolist(), far.positions.tolist(), strict=True))
    assert len(set(found)) == len(found)
    assert sorted(found) == sorted(wanted)


# -- row groups --------------------------------------------------------------------------------------------------------


def test_groups_are_the_modalities_of_each_chunk(case: Case) -> None:
    wanted = []
    for index in range(len(case.requests)):
        for modality, kinds in (("text", (TEXT_KIND,)), ("media", (MEDIA_KIND, INTERSTITIAL_KIND))):
            rows = chunk_rows(case, index, *kinds)
            if rows:
                wanted.append((index, modality, rows))
    assert [(group.request, group.modality) for group in case.plan.groups] == [entry[:2] for entry in wanted]
    for group, (index, modality, rows) in zip(case.plan.groups, wanted, strict=True):
        near = [row for tile in range(group.near.start, group.near.stop) for row in rows_of(case.plan.near, tile)]
        assert near == rows, "rows of a group ascend"
        sizes = case.plan.near.indptr.diff()[group.near].tolist()
        assert all(size == case.tile_queries for size in sizes[:-1]), "only the last tile of a group is short"
        assert (case.plan.near.request[group.near] == index).all()
        far = group.far.stop - group.far.start
        if modality == "text":
            assert far == 0
        else:
            assert case.plan.far is not None
            far_rows = [row for tile in range(group.far.start, group.far.stop) for row in rows_of(case.plan.far, tile)]
            assert sorted(far_rows) == rows
            assert (case.plan.far.request[group.far] == index).all()


def test_groups_partition_the_tiles_of_both_passes(case: Case) -> None:
    for tile_pass, slices in (
        (case.plan.near, [group.near for group in case.plan.groups]),
        (case.plan.far, [group.far for group in case.plan.groups]),
    ):
        tiles = sorted(tile for own in slices for tile in range(own.start, own.stop))
        assert tiles == list(range(0 if tile_pass is None else tile_pass.num_tiles))


def test_views_show_the_group_and_the_keys_there_are(case: Case) -> None:
    for group in case.plan.groups:
        request = case.requests[group.request]
        near, view = case.plan.near, group.view
        assert view.queries.min_pos.tolist() == near.min_pos[group.near].tolist()
        assert view.queries.max_pos.tolist() == near.max_pos[group.near].tolist()
        media = {p for _, spans, _ in request.items for start, end in spans for p in range(start, end + 1)}
        tiles = [range(at, at + case.tile_keys) for at in range(0, request.keys, case.tile_keys)]
        assert view.keys.tile_keys == case.tile_keys
        assert view.keys.min_pos.tolist() == [tile.start for tile in tiles]
        assert view.keys.max_pos.tolist() == [min(tile.stop, request.keys) - 1 for tile in tiles]
        there = [[p for p in tile if p < request.length] for tile in tiles]
        assert view.keys.has_text.tolist() == [any(p not in media for p in tile) for tile in there]
        assert view.keys.has_media.tolist() == [any(p in media for p in tile) for tile in there]
        assert (view.cell is None) is (group.modality == "text")


def test_cell_views_hold_the_cells_of_their_rows(case: Case) -> None:
    for group in case.plan.groups:
        cell, far = group.view.cell, case.plan.far
        if cell is None:
            continue
        assert far is not None
        request, layout = case.requests[group.request], case.sparse[group.request].layout.layout
        order, runs = layout.order("cell").tolist(), layout.runs("cell").tolist()
        run_of = {p: run for run, start in enumerate(runs[:-1]) for p in order[start : runs[run + 1]]}
        assert cell.stride == stride_of(request)
        key_tile = group.probe_rows.key_tile
        assert key_tile.tolist() == [order.index(p) // case.tile_keys for p in range(request.length)]
        tiles = [order[at : at + case.tile_keys] for at in range(0, request.length, case.tile_keys)]
        assert group.probe_rows.key_tiles == len(tiles)
        assert cell.keys.min_pos.tolist() == [min(tile) for tile in tiles]
        assert cell.keys.max_pos.tolist() == [max(tile) for tile in tiles]
        places = places_of(request)
        for local, tile in enumerate(range(group.far.start, group.far.stop)):
            positions = [position for _, position in rows_of(far, tile)]
            assert int(cell.queries.min_pos[local]) == min(positions)
            assert int(cell.queries.max_pos[local]) == max(positions)
            own = range(int(cell.own_lo[local]), int(cell.own_hi[local]))
            touched = sorted({run_of[position] for position in positions})
            assert own.start == runs[touched[0]] // case.tile_keys
            assert own.stop == -(-runs[touched[-1] + 1] // case.tile_keys)
            same_place = {places[position] for position in positions if position in places}
            needed = {int(key_tile[p]) for p, place in places.items() if place in same_place}
            assert needed <= set(own), "the same place in every frame, before and after the chunk"


# -- probe rows --------------------------------------------------------------------------------------------------------


def positions_by_tile(tile_pass: TilePass, tiles: slice) -> list[set[int]]:
    return [{position for _, position in rows_of(tile_pass, tile)} for tile in range(tiles.start, tiles.stop)]


def probed(group: RowGroup) -> list[tuple[int, int]]:
    return list(zip(group.probe_rows.rows.tolist(), group.probe_rows.positions.tolist(), strict=True))


def test_probe_rows_are_rows_of_their_group_and_know_their_tiles(case: Case) -> None:
    for group in case.plan.groups:
        kinds = (TEXT_KIND,) if group.modality == "text" else (MEDIA_KIND, INTERSTITIAL_KIND)
        own, picked = chunk_rows(case, group.request, *kinds), probed(group)
        assert 1 <= len(picked) <= case.probe_rows
        assert len(set(picked)) == len(picked)
        assert set(picked) <= set(own)
        assert (group.probe_rows.rows.dtype, group.probe_rows.positions.dtype) == (torch.int64, torch.int32)
        near = positions_by_tile(case.plan.near, group.near)
        for (_, position), tile in zip(picked, group.view.row_tiles.tolist(), strict=True):
            assert position in near[tile]
        if group.modality == "text":
            assert group.view.cell is None
            continue
        assert case.plan.far is not None
        far = positions_by_tile(case.plan.far, group.far)
        for (_, position), tile in zip(picked, group.view.cell.row_tiles.tolist(), strict=True):
            assert position in far[tile]


def test_text_probes_spread_over_the_text(case: Case) -> None:
    for group in case.plan.groups:
        if group.modality == "text":
            rows = chunk_rows(case, group.request, TEXT_KIND)
            count = min(case.probe_rows, rows_to_probe(case.requests[group.request].chunk), len(rows))
            picked = [rows.index(row) for row in probed(group)]
            assert len(picked) == count
            for part, place in enumerate(picked):
                assert part * len(rows) // count <= place < (part + 1) * len(rows) // count
            assert picked[-1] == len(rows) - 1, "the row that answers"


@pytest.mark.parametrize(("shared", "turns"), [(1, 1), (2, 2), (3, 2), (7, 4)])
def test_heads_take_turns_at_the_probe_rows(shared: int, turns: int) -> None:
    """Neighbours see all rows between them, each head as many, and every head the text row that answers."""
    requests = [Request(16400, [], 0, 16400), Request(16391, [one_run(5, 128, 8, 16)], 3, 16388)]
    case = make(requests, tile_queries=128, tile_keys=64, probe_rows=128, shared=shared)
    query, pool = torch.empty(1, 2 * shared, 8), torch.empty(1, 2, 8)
    operands = Operands(query, pool, pool, 1.0)
    assert {group.modality for group in case.plan.groups} == {"text", "media"}
    for group in case.plan.groups:
        rows, few = group.probe_rows, len(chunk_rows(case, group.request, TEXT_KIND)) < 128
        if group.modality == "text" and few:
            continue
        assert rows.turns == turns
        row_of = rows.of_heads(operands)
        assert row_of.shape == (2 * shared, rows.per_head)
        assert rows.per_head >= LEAST_OF_HEAD
        for head in range(2 * shared):
            assert len(set(row_of[head].tolist())) == rows.per_head
            block = rows.of_heads(operands.block(slice(head, head + 1)))
            assert torch.equal(block[0], row_of[head]), "the same for a part of a group"
        for kv_head in range(2):
            seen = row_of[kv_head * shared :][:turns].flatten().tolist()
            assert sorted(seen) == list(range(len(rows.rows)))
        if group.modality == "text":
            assert set(rows.positions[row_of][:, -1].tolist()) == {case.requests[group.request].length - 1}


def test_text_probes_lie_at_all_places_of_their_tiles() -> None:
    case = make([Request(4096, [], 0, 4096)], tile_queries=32, tile_keys=64, probe_rows=64)
    (group,) = case.plan.groups
    places = np.bincount(np.array([position for _, position in probed(group)]) % 64 // 16, minlength=4)
    assert places.min() >= 12, places


def test_media_probes_stand_for_bands(case: Case) -> None:
    """Bands are consecutive query tiles of the cell pass, as even as can be; their probe rows are rows of theirs."""
    for group in case.plan.groups:
        cell, far = group.view.cell, case.plan.far
        if cell is None:
            continue
        assert far is not None
        bands = cell.bands.tolist()
        assert len(bands) == group.far.stop - group.far.start
        assert bands == sorted(bands)
        assert set(cell.band_of_row.tolist()) == set(range(cell.num_bands)), "every band is probed"
        if case.shared > 1:
            # Their bands are those of single heads' tiles: a tile is in the one that its first row is in.
            assert set(bands) <= set(range(cell.num_bands))
            at_rows = cell.bands[cell.row_tiles]
            assert (at_rows <= cell.band_of_row).all()
            assert (at_rows == cell.band_of_row).float().mean() >= 0.5
            continue
        assert set(bands) == set(range(cell.num_bands))
        sizes = [bands.count(band) for band in range(cell.num_bands)]
        assert max(sizes) - min(sizes) <= 1
        wanted = min(case.probe_rows, rows_to_probe(case.requests[group.request].chunk))
        assert cell.num_bands == min(wanted, len(bands))
        for row, band in zip(probed(group), cell.band_of_row.tolist(), strict=True):
            own = [rows_of(far, group.far.start + tile) for tile, of in enumerate(bands) if of == band]
            assert row in [item for rows in own for item in rows]


def test_media_probes_spread_over_time() -> None:
    """Of a video in one chunk every quarter has its share of the probe rows, and so has every quarter of the frame."""
    case = make([Request(2010, [one_run(4, 30, 8, 8)], 0, 2010)], tile_queries=32, tile_keys=16, probe_rows=64)
    (group,) = [group for group in case.plan.groups if group.modality == "media"]
    positions = np.array([position for _, position in probed(group)]) - 4
    assert len(positions) >= 30
    for share in (positions // 64 * 4 // 30, positions % 64 // 16):
        counts = np.bincount(share, minlength=4)
        assert counts.min() >= 0.15 * len(positions), counts


# -- copies ------------------------------------------------------------------------------------------------------------

META = torch.device("meta")
"""Has no values: whoever asks a tensor there for one, or for a shape that depends on one, fails."""


class Copies(TorchDispatchMode):
    """Operations that read tensors of the host and others, or write others: to :data:`META`, what copies to a device.

    ``found``: (operation, whether nothing waits for it) of each. Memory that is said to be pinned is not, here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []
        self._pinned: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        pinned = named.pop("pin_memory", False)
        result = func(*args, **named)
        if pinned:
            self._pinned.add(result.untyped_storage().data_ptr())
        tensors = [leaf for leaf in tree_leaves((args, named, result)) if isinstance(leaf, torch.Tensor)]
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if 0 < len(on_host) < len(tensors):
            from_pinned = all(tensor.untyped_storage().data_ptr() in self._pinned for tensor in on_host)
            self.found.append((str(func), from_pinned and bool(named.get("non_blocking"))))
        return result


class Literals(TorchFunctionMode):
    """Calls that make a tensor of Python's numbers, which no operation shows."""

    def __init__(self, found: list[tuple[str, bool]]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.Tensor.new_tensor) and result.device.type != "cpu"
        indexed = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device.type != "cpu"
        if made or (indexed and any(isinstance(leaf, list | np.ndarray) for leaf in _index(args[1]))):
            self._found.append((func.__name__, False))
        return result


def _index(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def copies_of(work: Callable[[], object]) -> list[tuple[str, bool]]:
    with Copies() as copies, Literals(copies.found):
        work()
    return copies.found


@pytest.mark.parametrize("batch", BATCHES)
def test_a_plan_reaches_the_device_in_one_copy(batch: str) -> None:
    sparse = []
    for request in BATCHES[batch]:
        layout = _core.Layout(request.length, request.items, chunk_tokens=256, tile_queries=16)
        pool_row = torch.zeros(1, dtype=torch.int64, device=META)
        sparse.append(SparseRequest(DeviceLayout(layout, 16, META), request.prefix, request.chunk, pool_row, 0))
    req_to_token = torch.zeros(9, 2000, dtype=torch.int32, device=META)
    sizes = {"tile_queries": 32, "tile_keys": 16, "probe_rows": 16}
    assert copies_of(lambda: build(sparse, req_to_token, **sizes, sharing=(2,))) == [("aten._to_copy.default", True)]


def test_copies_are_found() -> None:
    """What the test above relies on."""
    device, host = torch.zeros(4, dtype=torch.int64, device=META), torch.arange(2)
    for work in (
        lambda: host.to(META, non_blocking=True),
        lambda: torch.as_tensor(np.arange(2), device=META),
        lambda: device[:2].copy_(host, non_blocking=True),
        lambda: device[host],
        lambda: device.new_tensor([0, 3]),
        lambda: torch.tensor([0, 3], device=META),
        lambda: device[[0, 1]],
    ):
        assert [free for _, free in copies_of(work)] == [False]
    for work in (device[0].item, device.nonzero, lambda: device[device > 0], device.tolist, device.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            copies_of(work)


# -- layouts and errors ------------------------------------------------------------------------------------------------


def test_a_text_layout_has_no_cell_order() -> None:
    layout = DeviceLayout(_core.Layout(111, [], chunk_tokens=0, tile_queries=16), 16, CPU)
    assert (layout.has_media, layout.stride) == (False, 0)
    assert not hasattr(layout, "tokens")
    assert layout.sequence_tiles.max_pos.tolist()[-1] == 110


def test_plans_of_consecutive_chunks_cover_the_request() -> None:
    """One layout, chunk after chunk: every token is a row exactly once, and keys only ever grow."""
    request = Request(700, [STAMPED], 0, 700)
    layout = DeviceLayout(_core.Layout(700, request.items, chunk_tokens=111, tile_queries=32), 16, CPU)
    req_to_token = torch.arange(1, 701, dtype=torch.int32)[None]
    seen: list[int] = []
    for prefix in range(0, 700, 111):
        chunk = min(111, 700 - prefix)
        sparse = SparseRequest(layout, prefix, chunk, torch.tensor([0]), 0)
        plan = build([sparse], req_to_token, tile_queries=32, tile_keys=16, probe_rows=8)
        assert sparse.num_keys == prefix + chunk
        assert sorted(plan.near.rows.tolist()) == list(range(chunk))
        seen += sorted(plan.near.positions.tolist())
        if plan.far is not None:
            future = plan.far.keys.positions >= prefix + chunk
            slots = plan.far.keys.slots
            assert torch.isin(slots[future], slots[~future]).all()
            assert (plan.far.keys.slots[~future] == plan.far.keys.positions[~future] + 1).all()
    assert seen == list(range(700))


@pytest.mark.parametrize(
    ("prefix", "chunk", "message"),
    [
        (500, 201, r"request 0: prefix 500 \+ chunk 201 exceeds"),
        (0, 0, "request 0: .*chunk"),
        (-1, 5, "request 0: prefix -1"),
    ],
)
def test_a_chunk_that_the_layout_does_not_hold_is_refused(prefix: int, chunk: int, message: str) -> None:
    layout = DeviceLayout(_core.Layout(700, [], chunk_tokens=0, tile_queries=16), 16, CPU)
    request = SparseRequest(layout, prefix, chunk, torch.tensor([0]), 0)
    with pytest.raises(_core.LayoutError, match=message):
        build([request], torch.zeros(1, 800, dtype=torch.int32), tile_queries=16, tile_keys=16, probe_rows=8)
