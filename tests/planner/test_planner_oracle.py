"""The Rust planner agrees with its numpy oracle on random requests, batches and chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mminference_sgl import _core
from oracle_layout import OracleLayout, plan

CASES = 150
"""Random batches per family; each has one or several requests, and each request several chunks."""

IMAGE, VIDEO, AUDIO = 1, 2, 3
TILE_KEYS = (1, 16, 63, 64)


@dataclass(frozen=True)
class Request:
    length: int
    items: list[tuple[int, list[tuple[int, int]], tuple[int, int, int] | None]]


class Draw:
    """Random geometry. Each family is a method of this class."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def int(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(self.rng.integers(low, high + 1))

    def grid(self, frames: int) -> tuple[int, int, int]:
        side = (self.int(1, 24), self.int(1, 24))
        return (frames, *((1, side[1]) if self.int(0, 5) == 0 else side))

    def one_span(self) -> Request:
        grid = self.grid(self.int(1, 30))
        start, tokens = self.int(0, 40), int(np.prod(grid))
        return Request(start + tokens + self.int(0, 60), [(VIDEO, [(start, start + tokens - 1)], grid)])

    def timestamps(self) -> Request:
        grid = self.grid(self.int(1, 30))
        lengths = [grid[1] * grid[2]] * grid[0]
        return self._lay([(VIDEO, lengths, grid)], gap=(0, 9))

    def images(self) -> Request:
        grids = [self.grid(1) for _ in range(self.int(1, 20))]
        return self._lay([(IMAGE, [g[1] * g[2]], g) for g in grids], gap=(0, 30))

    def cut_frames(self) -> Request:
        """Spans that end inside frames."""
        grid = self.grid(self.int(1, 12))
        return self._lay([(VIDEO, self._cut(int(np.prod(grid))), grid)], gap=(0, 9))

    def without_grid(self) -> Request:
        items = [(self.int(IMAGE, AUDIO), self._cut(self.int(1, 300)), None) for _ in range(self.int(0, 4))]
        return self._lay(items, gap=(0, 9))

    def interleaved(self) -> Request:
        """Items of every kind whose spans lie between those of others, listed in any order."""
        items = []
        for _ in range(self.int(2, 6)):
            grid = self.grid(self.int(1, 9))
            known = self.int(0, 3) > 0
            frames = [grid[1] * grid[2]] * grid[0]
            lengths = frames if self.int(0, 1) else self._cut(sum(frames))
            items.append((self.int(IMAGE, AUDIO), lengths, grid if known else None))
        request = self._lay(items, gap=(0, 9), weave=True)
        self.rng.shuffle(request.items)
        for _, spans, _ in request.items:
            self.rng.shuffle(spans)
        return Request(request.length, [(m, [(int(a), int(b)) for a, b in s], g) for m, s, g in request.items])

    def mixed(self) -> Request:
        return getattr(self, str(self.rng.choice(FAMILIES[:-1])))()

    def _cut(self, tokens: int) -> list[int]:
        ends = np.unique([*self.rng.integers(1, tokens + 1, self.int(0, 6)), tokens])
        return np.diff(ends, prepend=0).tolist()

    def _lay(self, items: list, *, gap: tuple[int, int], weave: bool = False) -> Request:
        """Places spans of the given lengths one after another, or in random turns."""
        turns = np.repeat(np.arange(len(items)), [len(lengths) for _, lengths, _ in items])
        if weave:
            self.rng.shuffle(turns)
        laid = [(modality, [], grid) for modality, _, grid in items]
        position = self.int(0, 20)
        for number in turns:
            spans = laid[number][1]
            length = items[number][1][len(spans)]
            spans.append((position, position + length - 1))
            position += length + self.int(*gap)
        return Request(max(1, position + self.int(0, 50)), laid)


FAMILIES = ["one_span", "timestamps", "images", "cut_frames", "without_grid", "interleaved", "mixed"]


def check_layout(layout: _core.Layout, oracle: OracleLayout) -> None:
    segments = dict(zip(("start", "length", "modality", "item"), layout.segments(), strict=True))
    for name, array in (segments | {"kind": layout.segment_kinds()}).items():
        np.testing.assert_array_equal(array, getattr(oracle, f"segment_{name}"), name)
    np.testing.assert_array_equal(layout.kinds(), oracle.kinds)
    np.testing.assert_array_equal(layout.run_items(), oracle.run_items)
    assert layout.num_cells == oracle.run_items.size - 1
    strides = [oracle.frame_stride(item) for item in range(layout.num_items)]
    assert [layout.frame_stride(item) for item in range(layout.num_items)] == strides
    assert layout.max_frame_stride == max(strides, default=0)
    assert [layout.cell_size(i) for i in range(layout.num_items)] == [
        oracle.cell_size(i) for i in range(layout.num_items)
    ]
    for name in ("sequence", "modality", "cell"):
        order = oracle.order(name)
        np.testing.assert_array_equal(layout.order(name), order.tokens, name)
        np.testing.assert_array_equal(layout.inverse(name), order.inverse, name)
        np.testing.assert_array_equal(layout.runs(name), order.runs, name)
        for tile_keys in TILE_KEYS:
            of_token = layout.key_tile_of_token(name, tile_keys)
            np.testing.assert_array_equal(of_token, order.inverse // tile_keys, f"{name} tiles of {tile_keys}")
            tiles = oracle.key_tiles(name, tile_keys, order.tokens)
            expected = (tiles.min_pos, tiles.max_pos, tiles.modality_mask)
            for got, wanted in zip(layout.key_tiles(name, tile_keys), expected, strict=True):
                np.testing.assert_array_equal(got, wanted, f"{name} key tiles of {tile_keys}")


def check_plan(requests: list, tile_queries: int, tile_keys: int) -> None:
    ours = _core.plan(
        [(layout, *chunk) for layout, _, *chunk in requests], tile_queries=tile_queries, tile_keys=tile_keys
    )
    wanted = plan([(oracle, *chunk) for _, oracle, *chunk in requests], tile_queries=tile_queries, tile_keys=tile_keys)
    fields = ours.fields()
    assert fields.keys() == wanted.keys()
    for name, (offset, length) in fields.items():
        assert offset % 16 == 0
        np.testing.assert_array_equal(ours.buffer[offset : offset + length], wanted[name], name)


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_and_plans_agree(family: str) -> None:
    for seed in range(CASES):
        draw = Draw(seed)
        batch = [getattr(draw, family)() for _ in range(draw.int(1, 4) if family == "mixed" else 1)]
        tile_queries = draw.int(1, 140)
        sizes = {
            "chunk_tokens": draw.int(0, 1) * draw.int(1, 900),
            "tile_queries": tile_queries,
            "cell_size": draw.int(0, 1) * draw.int(0, 30),
        }
        pairs = [(_core.Layout(r.length, r.items, **sizes), OracleLayout(r.length, r.items, **sizes)) for r in batch]
        for pair in pairs:
            check_layout(*pair)
        # The whole request, then chunk by chunk with cuts anywhere; rows of others lie between.
        cuts = [sorted({0, *draw.rng.integers(0, r.length, 3).tolist(), r.length}) for r in batch]
        steps = [[(0, r.length) for r in batch]]
        steps += [[(c[min(k, len(c) - 2)], c[min(k, len(c) - 2) + 1]) for c in cuts] for k in range(4)]
        for step in steps:
            row, requests = draw.int(0, 5), []
            for (layout, oracle), (prefix, end) in zip(pairs, step, strict=True):
                requests.append((layout, oracle, prefix, end - prefix, row))
                row += end - prefix + draw.int(0, 3)
            check_plan(requests, tile_queries, int(draw.rng.choice(TILE_KEYS)))


def test_an_empty_batch_agrees() -> None:
    check_plan([], 128, 64)
