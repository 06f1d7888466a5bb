"""Length of requests and the cache of layouts."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import MultimodalInputs

from fake_inputs import CPU, cache_of, grid, media, request
from mminference_sgl import _core
from mminference_sgl.backend.layout import request_length
from mminference_sgl.method.items import IMAGE, VIDEO, Item
from mminference_sgl.method.plan import DeviceLayout

# -- length ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "last", "seen", "expected"),
    [
        (1000, 500, 200, 1000),
        (1000, 500, 1200, 1200),
        (None, 500, 200, 501),
        (None, 500, 501, 501),
        (None, 500, 600, 600),
        (400, 500, 200, 501),
        (None, None, 63, 63),
        (0, None, 63, 63),
    ],
)
def test_request_length(prompt: int | None, last: int | None, seen: int, expected: int) -> None:
    """The prompt where M-RoPE tells it, never less than what was seen or what the spans need."""
    items: list[Item] = [] if last is None else [(VIDEO, [(3, 9), (20, last)], None), (IMAGE, [(11, 12)], None)]
    assert request_length(request(prompt=prompt), items, seen) == expected


def test_request_length_without_positions_at_all() -> None:
    assert request_length(SimpleNamespace(), [], 7) == 7


# -- cache -------------------------------------------------------------------------------------------------------------


def video_request(prompt: int | None = 1000) -> MultimodalInputs:
    return request(media("VIDEO", [(5, 364)], video_grid_thw=grid((9, 10, 16))), prompt=prompt)


def test_chunks_of_a_request_share_one_layout() -> None:
    cache, inputs = cache_of(), video_request()
    first = cache.get(inputs, 300, CPU)
    assert isinstance(first, DeviceLayout)
    assert all(cache.get(inputs, seen, CPU) is first for seen in (301, 999, 1000, 300))
    assert len(cache) == 1


def test_equal_requests_have_layouts_of_their_own() -> None:
    cache, a, b = cache_of(), video_request(), video_request()
    assert cache.get(a, 300, CPU) is not cache.get(b, 300, CPU)
    assert len(cache) == 2


def test_a_request_that_grows_is_laid_out_anew() -> None:
    cache, inputs = cache_of(), video_request(None)
    lengths = [cache.get(inputs, seen, CPU).layout.length for seen in (100, 365, 400, 400, 900)]
    assert lengths == [365, 365, 400, 400, 900]
    assert len(cache) == 1
    assert cache.get(inputs, 900, CPU) is cache.get(inputs, 900, CPU)


def test_a_retracted_request_brings_a_longer_prompt() -> None:
    cache, inputs = cache_of(), video_request(1000)
    first = cache.get(inputs, 600, CPU)
    inputs.mrope_positions = torch.zeros(3, 1017, dtype=torch.long)
    second = cache.get(inputs, 600, CPU)
    assert (first.layout.length, second.layout.length) == (1000, 1017)
    assert len(cache) == 1


def test_a_session_that_appends_an_item_is_laid_out_anew() -> None:
    cache, inputs = cache_of(), video_request(1000)
    first = cache.get(inputs, 600, CPU)
    inputs.mm_items.append(media("IMAGE", [(500, 511)], image_grid_thw=grid((1, 6, 8))))
    second = cache.get(inputs, 600, CPU)
    assert (first.layout.num_items, second.layout.num_items) == (1, 2)
    assert cache.get(inputs, 700, CPU) is second
    assert len(cache) == 1


def test_layouts_are_freed_with_their_request() -> None:
    cache, a, b = cache_of(), video_request(), video_request(None)
    kept = cache.get(a, 300, CPU)
    cache.get(b, 400, CPU)
    cache.get(b, 500, CPU)
    assert len(cache) == 2
    del b
    gc.collect()
    assert len(cache) == 1
    assert cache.get(a, 300, CPU) is kept
    del a
    gc.collect()
    assert len(cache) == 0


def test_a_freed_request_leaves_nothing_to_the_next_one_in_its_place() -> None:
    """Objects of the same id one after another: each must get its own geometry."""
    cache = cache_of()
    for frames in range(1, 40):
        span = (5, 5 + 12 * frames - 1)
        inputs = request(media("VIDEO", [span], video_grid_thw=grid((frames, 6, 8))), prompt=1000)
        segments = cache.get(inputs, 600, CPU).layout.segments()
        assert segments[1].tolist() == [5, 12 * frames, 1000 - 5 - 12 * frames]
        del inputs
    gc.collect()
    assert len(cache) == 0


def test_a_failure_is_not_remembered() -> None:
    cache, inputs = cache_of(), video_request(1000)
    wrong = inputs.mm_items[0].model_specific_data
    wrong["video_grid_thw"] = grid((8, 10, 16))
    for _ in range(2):
        with pytest.raises(_core.LayoutError):
            cache.get(inputs, 600, CPU)
    wrong["video_grid_thw"] = grid((9, 10, 16))
    assert cache.get(inputs, 600, CPU).layout.num_items == 1
    del inputs, wrong
    gc.collect()
    assert len(cache) == 0


@pytest.mark.parametrize("inputs", [None, request(), request(prompt=1000)], ids=["no inputs", "no items", "prompt"])
def test_text_is_laid_out_but_not_kept(inputs: Any) -> None:
    cache = cache_of()
    layout = cache.get(inputs, 111, CPU)
    assert (layout.layout.length, layout.layout.num_items, layout.has_media) == (111, 0, False)
    assert len(cache) == 0


@pytest.mark.parametrize("cell_size", [1, 7, 40])
def test_the_sizes_of_the_cache_reach_the_layout(cell_size: int) -> None:
    layout = cache_of(cell_size=cell_size, tile_keys=32).get(video_request(), 100, CPU)
    assert layout.layout.cell_size(0) == cell_size
    assert layout.sequence_tiles.tile_keys == layout.cell_tiles.tile_keys == 32
    assert layout.sequence_tiles.min_pos.tolist() == list(range(0, 1000, 32))


def test_automatic_cells_follow_chunk_and_query_tile() -> None:
    """A cell has the places whose rows in a chunk fill a query tile, but no more than make a run of 256 keys."""
    sizes = [
        cache_of(chunk_tokens=chunk, tile_queries=queries).get(video_request(), 100, CPU).layout.cell_size(0)
        for chunk, queries in ((80, 64), (160, 64), (160, 16), (0, 64))
    ]
    assert sizes == [-(-256 // 9), 16, 4, 7]
