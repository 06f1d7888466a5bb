"""The planner in numpy, from the semantics that ``_core.pyi`` documents: the oracle of tests and benchmark.

Everything is vectorised over tokens; Python loops run over distinct frame sizes, requests and query tiles only. The
one idea: a token order is the tokens sorted by (run, position), so an order is a stable argsort of each token's run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.integer]
    Item = tuple[int, Sequence[tuple[int, int]], tuple[int, int, int] | None]

TEXT_DECIDES, MEDIA, INTERSTITIAL = 0, 1, 2


@dataclass(frozen=True)
class Order:
    """A permutation, its inverse and the offsets of its runs."""

    tokens: Ints
    inverse: Ints
    runs: Ints

    @classmethod
    def by_run(cls, run_of_token: NDArray[np.integer], runs: int) -> Order:
        """Sorts tokens by run, then position. Few runs fit uint16, which numpy sorts by radix."""
        narrow = run_of_token.astype(np.uint16) if runs < 1 << 16 else run_of_token
        tokens = np.argsort(narrow, kind="stable").astype(np.int32)
        inverse = np.empty_like(tokens)
        inverse[tokens] = np.arange(tokens.size, dtype=np.int32)
        ends = np.cumsum(np.bincount(run_of_token, minlength=runs))
        return cls(tokens, inverse, np.concatenate([[0], ends]))


@dataclass(frozen=True)
class KeyTiles:
    """Bounds of consecutive order positions, and bit m for each modality m among them."""

    min_pos: Ints
    max_pos: Ints
    modality_mask: Ints


@lru_cache(maxsize=256)
def places_of_cells(rows: int, cols: int, size: int) -> Ints:
    """Cell of each place (``row * cols + col``): consecutive ``size`` places of a generalised Hilbert curve."""
    walk = _gilbert(0, 0, cols, 0, 0, rows) if cols >= rows else _gilbert(0, 0, 0, rows, cols, 0)
    curve = np.array([y * cols + x for x, y in walk], dtype=np.int64)
    cell = np.empty(curve.size, dtype=np.int32)
    cell[curve] = np.arange(curve.size) // size
    return cell


def _gilbert(x: int, y: int, ax: int, ay: int, bx: int, by: int) -> Iterator[tuple[int, int]]:
    """J. Cerveny's curve over the rectangle at (x, y) spanned by the axis-parallel vectors a (travel) and b."""

    def sign(value: int) -> int:
        return (value > 0) - (value < 0)

    width, height = abs(ax + ay), abs(bx + by)
    dax, day, dbx, dby = sign(ax), sign(ay), sign(bx), sign(by)
    if height == 1:
        yield from ((x + i * dax, y + i * day) for i in range(width))
        return
    if width == 1:
        yield from ((x + i * dbx, y + i * dby) for i in range(height))
        return
    ax2, ay2, bx2, by2 = ax // 2, ay // 2, bx // 2, by // 2
    if 2 * width > 3 * height:
        if abs(ax2 + ay2) % 2 and width > 2:
            ax2, ay2 = ax2 + dax, ay2 + day
        yield from _gilbert(x, y, ax2, ay2, bx, by)
        yield from _gilbert(x + ax2, y + ay2, ax - ax2, ay - ay2, bx, by)
        return
    if abs(bx2 + by2) % 2 and height > 2:
        bx2, by2 = bx2 + dbx, by2 + dby
    yield from _gilbert(x, y, bx2, by2, ax2, ay2)
    yield from _gilbert(x + bx2, y + by2, ax, ay, bx - bx2, by - by2)
    corner = x + (ax - dax) + (bx2 - dbx), y + (ay - day) + (by2 - dby)
    yield from _gilbert(*corner, -bx2, -by2, ax2 - ax, ay2 - ay)


class OracleLayout:
    """Segments and token orders of one request.

    Arrays per item are indexed by rank, the item's place among the first tokens; ``number`` is its index in the list
    that was given. ``ordinal`` of a media token: tokens of its item before it.
    """

    def __init__(
        self, length: int, items: Sequence[Item], *, chunk_tokens: int, tile_queries: int, cell_size: int = 0
    ) -> None:
        self.length = length
        self.num_items = len(items)
        spans = [np.asarray(item_spans, dtype=np.int64).reshape(-1, 2) for _, item_spans, _ in items]
        counts = [part.shape[0] for part in spans]
        number = np.repeat(np.arange(len(items)), counts)
        start, end = np.concatenate([*spans, np.zeros((0, 2), dtype=np.int64)]).T
        by_start = np.argsort(start)
        number, start, end = number[by_start], start[by_start], end[by_start] + 1

        self.number = number[np.sort(np.unique(number, return_index=True)[1])]
        rank_of_number = np.argsort(self.number)
        rank = rank_of_number[number]
        self._place_items(items, rank, start, end, chunk_tokens, tile_queries, cell_size)
        self._cut_segments(rank, start, end)

    def _place_items(
        self,
        items: Sequence[Item],
        rank: Ints,
        start: Ints,
        end: Ints,
        chunk_tokens: int,
        tile_queries: int,
        cell_size: int,
    ) -> None:
        """Frame grids, cell sizes and runs of the items."""
        by_rank = [items[number] for number in self.number]
        self.modality = np.array([0, *(item[0] for item in by_rank)], dtype=np.int64)
        tokens = np.bincount(rank, end - start, self.num_items).astype(np.int64)
        self.has_grid = np.array([item[2] is not None for item in by_rank], dtype=bool)
        grids = np.array([item[2] or (0, 1, 1) for item in by_rank], dtype=np.int64).reshape(-1, 3)
        self.frames = np.where(self.has_grid, grids[:, 0], tokens)
        self.area = grids[:, 1] * grids[:, 2]

        first = np.full(self.num_items, self.length, dtype=np.int64)
        np.minimum.at(first, rank, start)
        self.last_end = np.zeros(self.num_items, dtype=np.int64)
        np.maximum.at(self.last_end, rank, end)
        # A place shows up once per frame of a chunk that covers whole frames.
        seen = np.minimum(chunk_tokens, self.last_end - first)
        repeats = -(-seen // self.area) if chunk_tokens else self.frames
        automatic = np.maximum(tile_queries // np.maximum(repeats, 1), 1)
        # All frames of a cell are a run of 256 keys, and no more than that takes.
        automatic = np.minimum(automatic, -(-256 // self.frames))
        self.cell_sizes = np.minimum(cell_size or automatic, self.area)
        cells = -(-self.area // self.cell_sizes)
        self.first_run = np.concatenate([[1], 1 + np.cumsum(cells)])
        self.run_items = np.concatenate([[-1], np.repeat(self.number, cells)])

        frame_sizes = list(zip(*grids[:, 1:].T.tolist(), self.cell_sizes.tolist(), strict=True))
        distinct = {key: places_of_cells(*key) for key in dict.fromkeys(frame_sizes)}
        offsets = np.cumsum([0, *(cell.size for cell in distinct.values())])
        offset_of = dict(zip(distinct, offsets.tolist(), strict=False))
        self.cell_of_place = np.concatenate([*distinct.values(), np.zeros(0, dtype=np.int32)])
        self.table = np.array([offset_of[key] for key in frame_sizes], dtype=np.int64)

    def _cut_segments(self, rank: Ints, start: Ints, end: Ints) -> None:
        """Segments from disjoint spans in ascending order: spans that touch are merged, gaps are text."""
        follows = np.zeros(rank.size, dtype=bool)
        follows[1:] = (start[1:] == end[:-1]) & (rank[1:] == rank[:-1])
        rank, start = rank[~follows], start[~follows]
        end = end[np.append(~follows, True)[1:]] if follows.size else end

        gap_start, gap_end = np.append(0, end), np.append(start, self.length)
        # Text is inside an item if one that has started ends later.
        reach = np.append(0, np.maximum.accumulate(self.last_end[rank]))
        gap_kind = np.where(gap_start < reach, INTERSTITIAL, TEXT_DECIDES)
        there = gap_start < gap_end
        starts = np.concatenate([gap_start[there], start])
        order = np.argsort(starts)
        self.segment_start = starts[order]
        self.segment_length = np.diff(self.segment_start, append=self.length)
        self.segment_rank = np.concatenate([np.full(there.sum(), -1), rank])[order]
        self.segment_kind = np.concatenate([gap_kind[there], np.full(rank.size, MEDIA)])[order]
        self.segment_item = np.append(self.number, -1)[self.segment_rank]
        self.segment_modality = self.modality[self.segment_rank + 1]
        by_rank = np.argsort(self.segment_rank, kind="stable")
        lengths = self.segment_length[by_rank]
        before = np.cumsum(lengths) - lengths
        ranks = self.segment_rank[by_rank]
        self.segment_ordinal = np.empty_like(before)
        self.segment_ordinal[by_rank] = before - before[np.searchsorted(ranks, ranks)]

    def _per_token(self, of_segment: Ints, dtype: type[np.generic] = np.int32) -> Ints:
        return np.repeat(of_segment.astype(dtype), self.segment_length)

    @cached_property
    def kinds(self) -> Ints:
        """Kind of every token."""
        return self._per_token(self.segment_kind, np.uint8)

    @cached_property
    def cell_run(self) -> Ints:
        """Run in cell order of every token."""
        run = np.zeros(self.length, dtype=np.int32)
        if self.num_items == 0:
            return run
        media = self.segment_rank >= 0
        rank, lengths = self.segment_rank[media], self.segment_length[media]

        def per_media_token(of_segment: Ints) -> Ints:
            return np.repeat(of_segment.astype(np.int32), lengths)

        token = np.arange(lengths.sum(), dtype=np.int32)
        ordinal = token + per_media_token(self.segment_ordinal[media] - (np.cumsum(lengths) - lengths))
        place = ordinal % per_media_token(self.area[rank])
        cell = self.cell_of_place[place + per_media_token(self.table[rank])]
        run[self._per_token(media, np.bool_)] = cell + per_media_token(self.first_run[rank])
        return run

    def order(self, name: str) -> Order:
        """The order ``name``; each call sorts anew."""
        if name == "sequence":
            return Order.by_run(np.zeros(self.length, dtype=np.int32), 1)
        if name == "modality":
            return Order.by_run(self._per_token(self.segment_modality), 4)
        return Order.by_run(self.cell_run, self.run_items.size)

    @cached_property
    def cell_order(self) -> Order:
        """The cell order, sorted once."""
        return self.order("cell")

    def frame_stride(self, number: int) -> int:
        """Largest distance between the first tokens of consecutive frames of the caller's item."""
        rank = int(np.flatnonzero(self.number == number)[0])
        if not self.has_grid[rank]:
            return 0
        mine = self.segment_rank == rank
        lengths = self.segment_length[mine]
        tokens = np.arange(lengths.sum()) + np.repeat(
            self.segment_start[mine] - (np.cumsum(lengths) - lengths), lengths
        )
        return int(np.diff(tokens[:: self.area[rank]]).max(initial=0)) or int(self.area[rank])

    def cell_size(self, number: int) -> int:
        """Places of the cells of the caller's item, 0 without a grid."""
        rank = int(np.flatnonzero(self.number == number)[0])
        return int(self.cell_sizes[rank] * self.has_grid[rank])

    def key_tiles(self, name: str, tile_keys: int, tokens: Ints) -> KeyTiles:
        """Bounds and modalities of the tiles of ``tokens``, the order ``name``."""
        edges = np.arange(0, self.length, tile_keys)
        bits = self._per_token(1 << self.segment_modality, np.uint8)
        return KeyTiles(
            np.minimum.reduceat(tokens, edges),
            np.maximum.reduceat(tokens, edges),
            np.bitwise_or.reduceat(bits if name == "sequence" else bits[tokens], edges),
        )


@dataclass
class _Pass:
    """Tiles of one pass as a list per field, request by request."""

    positions: list[Ints]
    rows: list[Ints]
    lengths: list[Ints]
    request: list[Ints]
    kind: list[Ints]
    own_lo: list[Ints]
    own_hi: list[Ints]

    @classmethod
    def empty(cls) -> _Pass:
        return cls(*([np.zeros(0, dtype=np.int64)] for _ in range(7)))

    def add(
        self, request: int, kind: int, positions: Ints, shift: int, lengths: Ints, own: tuple[Ints | int, Ints | int]
    ) -> None:
        """Adds tiles of ``lengths`` rows each at ``positions``."""
        self.positions.append(positions)
        self.rows.append(positions + shift)
        self.lengths.append(lengths)
        self.request.append(np.full(lengths.size, request))
        self.kind.append(np.full(lengths.size, kind))
        self.own_lo.append(np.broadcast_to(own[0], lengths.shape))
        self.own_hi.append(np.broadcast_to(own[1], lengths.shape))

    def fields(self, name: str, *, own: bool) -> dict[str, Ints]:
        positions = np.concatenate(self.positions)
        indptr = np.concatenate([[0], np.cumsum(np.concatenate(self.lengths))])
        arrays = {
            "rows": np.concatenate(self.rows),
            "positions": positions,
            "row_indptr": indptr,
            "tile_request": np.concatenate(self.request),
            "tile_kind": np.concatenate(self.kind),
            "tile_min_pos": np.minimum.reduceat(positions, indptr[:-1]) if positions.size else positions,
            "tile_max_pos": np.maximum.reduceat(positions, indptr[:-1]) if positions.size else positions,
        }
        if own:
            arrays |= {"own_lo": np.concatenate(self.own_lo), "own_hi": np.concatenate(self.own_hi)}
        return {f"{name}.{key}": array for key, array in arrays.items()}


def plan(
    requests: Sequence[tuple[OracleLayout, int, int, int]], *, tile_queries: int, tile_keys: int
) -> dict[str, Ints]:
    """Fields of the plan of (layout, prefix, chunk, row offset) per request."""
    seq, cell = _Pass.empty(), _Pass.empty()
    for number, (layout, prefix, chunk, row_offset) in enumerate(requests):
        shift = row_offset - prefix
        positions = np.arange(prefix, prefix + chunk)
        kinds = layout.kinds[prefix : prefix + chunk]
        for kind, rows in ((MEDIA, positions[kinds != TEXT_DECIDES]), (TEXT_DECIDES, positions[kinds == TEXT_DECIDES])):
            seq.add(number, kind, rows, shift, _cut(rows.size, tile_queries), (0, 0))
        interstitial = positions[kinds == INTERSTITIAL]
        text = (0, -(-layout.cell_order.runs[1] // tile_keys))
        cell.add(number, INTERSTITIAL, interstitial, shift, _cut(interstitial.size, tile_queries), text)
        media = positions[kinds == MEDIA]
        media = media[np.argsort(layout.cell_order.inverse[media])]
        lengths, first, last = _pack(layout, media, tile_queries)
        runs = layout.cell_order.runs
        cell.add(number, MEDIA, media, shift, lengths, (runs[first] // tile_keys, -(-runs[last + 1] // tile_keys)))
    return seq.fields("seq", own=False) | cell.fields("cell", own=True)


def _cut(rows: int, size: int) -> Ints:
    """Lengths of tiles of ``size`` rows, the last one maybe fewer."""
    return np.minimum(size, rows - np.arange(0, rows, size))


def _pack(layout: OracleLayout, media: Ints, tile_queries: int) -> tuple[Ints, Ints, Ints]:
    """Rows, first run and last run of each tile of whole cells; ``media`` in cell order.

    Cells of one item share a tile while they fit, next-fit, so where a tile starts depends on where the one before it
    ended: the only loop over tiles.
    """
    runs, counts = np.unique(layout.cell_run[media], return_counts=True)
    ends = np.cumsum(counts)
    begins = ends - counts
    # One past the last cell that a tile which begins with cell i can hold: by rows, and by item.
    item = np.cumsum(np.diff(layout.run_items[runs], prepend=layout.run_items[runs[:1]]) != 0)
    stop = np.minimum(
        np.searchsorted(ends, begins + tile_queries, side="right"), np.searchsorted(item, item, side="right")
    )
    lengths: list[Ints] = []
    first: list[int] = []
    last: list[int] = []
    cell = 0
    while cell < runs.size:
        if counts[cell] > tile_queries:
            parts = _cut(int(counts[cell]), tile_queries)
            upto = cell + 1
        else:
            upto = int(stop[cell])
            parts = np.array([ends[upto - 1] - begins[cell]])
        lengths.append(parts)
        first += [int(runs[cell])] * parts.size
        last += [int(runs[upto - 1])] * parts.size
        cell = upto
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *lengths]), np.array(first, dtype=np.int64), np.array(last, dtype=np.int64)
