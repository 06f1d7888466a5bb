"""Geometry of requests as SGLang's processors leave it, family by family, where a grid key tells it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sglang.srt.managers.schedule_batch import MultimodalDataItem

from fake_inputs import CPU, MERGED, cache_of, frame_spans, grid, media, own, request
from mminference_sgl import _core
from mminference_sgl.backend.geometry import GeometryError, ModelGeometry, items_of
from mminference_sgl.method.items import AUDIO, IMAGE, VIDEO, Item
from mminference_sgl.method.stride import MIN_RUN, StrideSearch

# -- families ----------------------------------------------------------------------------------------------------------

QWEN3_SPANS = frame_spans(10, 11, 24, [9, 9, 10])
INTERNVL_SPANS = frame_spans(20, 5, 256, [12, 13])


def adjacent(start: int, count: int, length: int) -> list[tuple[int, int]]:
    return [(at, at + length - 1) for at in range(start, start + count * length, length)]


FAMILIES: dict[str, tuple[list[MultimodalDataItem], list[Item]]] = {
    "qwen2.5-vl image": (
        [media("IMAGE", [(15, 78)], image_grid_thw=grid((1, 16, 16)))],
        [(IMAGE, [(15, 78)], (1, 8, 8))],
    ),
    "qwen2.5-vl video is one run": (
        [media("VIDEO", [(5, 364)], video_grid_thw=grid((9, 10, 16)), second_per_grid_ts=[0.08])],
        [(VIDEO, [(5, 364)], (9, 5, 8))],
    ),
    "qwen2.5-vl two videos in one item": (
        [media("VIDEO", [(5, 364), (367, 390)], video_grid_thw=grid((9, 10, 16), (2, 6, 8)))],
        [(VIDEO, [(5, 364)], (9, 5, 8)), (VIDEO, [(367, 390)], (2, 3, 4))],
    ),
    "two one-frame videos in one item": (
        [media("VIDEO", [(5, 24), (30, 41)], video_grid_thw=grid((1, 8, 10), (1, 6, 8)))],
        [(VIDEO, [(5, 24)], (1, 4, 5)), (VIDEO, [(30, 41)], (1, 3, 4))],
    ),
    "images in one item": (
        [media("IMAGE", [(3, 14), (16, 31), (40, 40)], image_grid_thw=grid((1, 6, 8), (1, 8, 8), (1, 2, 2)))],
        [(IMAGE, [(3, 14)], (1, 3, 4)), (IMAGE, [(16, 31)], (1, 4, 4)), (IMAGE, [(40, 40)], (1, 1, 1))],
    ),
    "images in items of their own": (
        [
            media("IMAGE", [(3, 14)], image_grid_thw=grid((1, 6, 8))),
            media("IMAGE", [(16, 31)], image_grid_thw=grid((1, 8, 8))),
        ],
        [(IMAGE, [(3, 14)], (1, 3, 4)), (IMAGE, [(16, 31)], (1, 4, 4))],
    ),
    "qwen3-vl a span per frame": (
        [media("VIDEO", QWEN3_SPANS, video_grid_thw=grid((11, 8, 12)))],
        [(VIDEO, QWEN3_SPANS, (11, 4, 6))],
    ),
    "qwen3-vl two videos": (
        [
            media("VIDEO", QWEN3_SPANS, video_grid_thw=grid((11, 8, 12))),
            media("VIDEO", frame_spans(600, 2, 6, [9]), video_grid_thw=grid((2, 4, 6))),
        ],
        [(VIDEO, QWEN3_SPANS, (11, 4, 6)), (VIDEO, frame_spans(600, 2, 6, [9]), (2, 2, 3))],
    ),
    "two videos of a span per frame in one item": (
        [media("VIDEO", frame_spans(0, 5, 6, [4]), video_grid_thw=grid((3, 4, 6), (2, 4, 6)))],
        [
            (VIDEO, frame_spans(0, 5, 6, [4])[:3], (3, 2, 3)),
            (VIDEO, frame_spans(0, 5, 6, [4])[3:], (2, 2, 3)),
        ],
    ),
    "qwen3-omni video and audio": (
        [
            media("VIDEO", [(5, 52)], video_grid_thw=grid((4, 6, 8))),
            media("AUDIO", [(60, 99)], feature_attention_mask=torch.ones(1, 400)),
        ],
        [(VIDEO, [(5, 52)], (4, 3, 4)), (AUDIO, [(60, 99)], None)],
    ),
    "internvl video has no grid": (
        [media("VIDEO", INTERNVL_SPANS)],
        [(VIDEO, [span], None) for span in INTERNVL_SPANS],
    ),
    "internvl tiles are one run": (
        [media("IMAGE", [(4, 4 + 256 * 7 - 1)])],
        [(IMAGE, [(4, 4 + 256 * 7 - 1)], None)],
    ),
    "an item per frame without a grid": (
        [media("VIDEO", [(3 + 122 * frame, 123 + 122 * frame)]) for frame in range(3)],
        [(VIDEO, [(3 + 122 * frame, 123 + 122 * frame)], None) for frame in range(3)],
    ),
    "own: an item per frame": (
        [
            *(own("VIDEO", [(3 + 5 * frame, 6 + 5 * frame)], [(1, 2, 2)], [frame]) for frame in range(3)),
            *(own("VIDEO", [(18 + 5 * frame, 21 + 5 * frame)], [(1, 2, 2)], [frame]) for frame in range(2)),
        ],
        [
            (VIDEO, [(3 + 5 * frame, 6 + 5 * frame) for frame in range(3)], (3, 2, 2)),
            (VIDEO, [(18, 21), (23, 26)], (2, 2, 2)),
        ],
    ),
    "own: one run, and what belongs to no frame": (
        [own("VIDEO", [(2, 13), (14, 14)], [(2, 2, 3), (1, 1, 1)], [0, 0])],
        [(VIDEO, [(2, 13)], (2, 2, 3)), (VIDEO, [(14, 14)], (1, 1, 1))],
    ),
    "own: frames of other sizes, and a frame that is missing": (
        [
            own(
                "VIDEO",
                [(0, 3), (4, 9), (12, 15), (16, 19)],
                [(1, 2, 2), (1, 2, 3), (1, 2, 2), (1, 2, 2)],
                [0, 1, 2, 4],
            )
        ],
        [
            (VIDEO, [(0, 3)], (1, 2, 2)),
            (VIDEO, [(4, 9)], (1, 2, 3)),
            (VIDEO, [(12, 15)], (1, 2, 2)),
            (VIDEO, [(16, 19)], (1, 2, 2)),
        ],
    ),
    "own: an image is no frame of the video behind it": (
        [own("IMAGE", [(0, 3)], [(1, 2, 2)], [0]), own("VIDEO", [(4, 7), (9, 12)], [(1, 2, 2)] * 2, [0, 1])],
        [(IMAGE, [(0, 3)], (1, 2, 2)), (VIDEO, [(4, 7), (9, 12)], (2, 2, 2))],
    ),
    "kimi image_grid_hws": (
        [media("IMAGE", [(7, 12), (20, 27)], image_grid_hws=grid((4, 6), (8, 4)))],
        [(IMAGE, [(7, 12)], (1, 2, 3)), (IMAGE, [(20, 27)], (1, 4, 2))],
    ),
    "kimi grid_thws": (
        [media("IMAGE", [(7, 12)], grid_thws=grid((1, 4, 6)))],
        [(IMAGE, [(7, 12)], (1, 2, 3))],
    ),
    "our own, a span per frame": (
        [own("VIDEO", frame_spans(0, 5, 6, [1]), [[1, 2, 3]] * 5)],
        [(VIDEO, frame_spans(0, 5, 6, [1]), (5, 2, 3))],
    ),
    "our own, clips without places": (
        [own("VIDEO", adjacent(7, 5, 64), [None] * 5)],
        [(VIDEO, [(7, 7 + 5 * 64 - 1)], None)],
    ),
    "our own, an item per clip without places": (
        [own("VIDEO", [span], [None], [number]) for number, span in enumerate(adjacent(7, 5, 64))],
        [(VIDEO, [(7, 7 + 5 * 64 - 1)], None)],
    ),
    "our own, two videos and an image without places, all side by side": (
        [
            own("VIDEO", adjacent(7, 3, 64), [None] * 3),
            own("VIDEO", adjacent(7 + 3 * 64, 2, 64), [None] * 2),
            own("IMAGE", adjacent(7 + 5 * 64, 1, 64), [None]),
        ],
        [
            (VIDEO, [(7, 7 + 3 * 64 - 1)], None),
            (VIDEO, [(7 + 3 * 64, 7 + 5 * 64 - 1)], None),
            (IMAGE, [(7 + 5 * 64, 7 + 6 * 64 - 1)], None),
        ],
    ),
    "our own, clips without places and text between": (
        [own("VIDEO", [(0, 63), (64, 127), (130, 193)], [None] * 3)],
        [(VIDEO, [(0, 127)], None), (VIDEO, [(130, 193)], None)],
    ),
    "our own, a clip with places and one without": (
        [own("VIDEO", [(0, 63), (64, 127)], [[1, 8, 8], None])],
        [(VIDEO, [(0, 63)], (1, 8, 8)), (VIDEO, [(64, 127)], None)],
    ),
    "by modality, not by position": (
        [
            media("IMAGE", [(396, 411)], image_grid_thw=grid((1, 8, 8))),
            media("IMAGE", [(500, 511)], image_grid_thw=grid((1, 6, 8))),
            media("VIDEO", [(4, 363)], video_grid_thw=grid((9, 10, 16))),
        ],
        [(IMAGE, [(396, 411)], (1, 4, 4)), (IMAGE, [(500, 511)], (1, 3, 4)), (VIDEO, [(4, 363)], (9, 5, 8))],
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_items_of(family: str) -> None:
    given, expected = FAMILIES[family]
    assert items_of(request(*given), MERGED) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_items_of_can_be_laid_out(family: str) -> None:
    """The planner, which checks spans against grids, takes every family, and finds each token's item again."""
    given, expected = FAMILIES[family]
    layout = cache_of().get(request(*given, prompt=2000), 100, CPU).layout
    assert (layout.length, layout.num_items) == (2000, len(expected))
    start, length, modality, item = layout.segments()
    found = {(s, s + n - 1): (m, i) for s, n, m, i in zip(start, length, modality, item, strict=True) if i >= 0}
    wanted = {span: (m, number) for number, (m, spans, _) in enumerate(expected) for span in spans}
    assert found == wanted
    for number, (_, _, frame_grid) in enumerate(expected):
        assert (layout.cell_size(number) > 0) is (frame_grid is not None)


def test_frames_with_timestamps_keep_their_real_distance() -> None:
    layout = cache_of().get(request(*FAMILIES["qwen3-vl a span per frame"][0], prompt=500), 100, CPU).layout
    starts = [start for start, _ in QWEN3_SPANS]
    distances = {b - a for a, b in itertools.pairwise(starts)}
    assert distances == {33, 34}
    assert layout.max_frame_stride == 34
    kinds = layout.kinds()
    assert set(kinds[: starts[0]]) == {0}
    assert all(kinds[start:end].tolist() == [1] * (end - start) for start, end in QWEN3_SPANS)
    assert set(kinds[QWEN3_SPANS[0][1] + 1 : starts[1]]) == {2}, "a timestamp between two frames"
    assert set(kinds[QWEN3_SPANS[-1][1] + 1 :]) == {0}


def test_clips_without_places_are_long_enough_to_search_for_a_stride() -> None:
    spans = adjacent(7, MIN_RUN // 64, 64)
    (item,) = items_of(request(own("VIDEO", spans, [None] * len(spans))), MERGED)
    assert StrideSearch.of([item], None) is not None
    assert StrideSearch.of([(VIDEO, [span], None) for span in spans], None) is None


def test_items_listed_by_modality_are_laid_out_by_position() -> None:
    given, _ = FAMILIES["by modality, not by position"]
    layout = cache_of().get(request(*given, prompt=520), 100, CPU).layout
    assert layout.segments()[2].tolist() == [0, VIDEO, 0, IMAGE, 0, IMAGE, 0]
    run_items = layout.run_items().tolist()
    assert list(dict.fromkeys(run_items)) == [-1, 2, 0, 1], "in cell order: text, then items by their first token"


@pytest.mark.parametrize(
    "rows",
    [
        grid((2, 4, 6)),
        grid((2, 4, 6)).int(),
        grid((2, 4, 6)).double(),
        grid((2, 4, 6))[0],
        grid((2, 4, 6))[None],
        np.array([[2, 4, 6]]),
        [[2, 4, 6]],
        [2, 4, 6],
        ((2, 4, 6),),
    ],
    ids=["int64", "int32", "float64", "flat", "nested", "numpy", "lists", "list", "tuples"],
)
def test_a_grid_may_come_in_any_container(rows: Any) -> None:
    assert items_of(request(media("VIDEO", [(0, 11)], video_grid_thw=rows)), MERGED) == [(VIDEO, [(0, 11)], (2, 2, 3))]


@pytest.mark.parametrize(
    "offsets",
    [[[0, 11]], ((0, 11),), [np.array([0, 11])], [torch.tensor([0, 11])], torch.tensor([[0, 11]])],
    ids=repr,
)
def test_offsets_may_be_any_pairs(offsets: Any) -> None:
    items = items_of(request(media("VIDEO", offsets, video_grid_thw=grid((2, 4, 6)))), MERGED)
    assert items == [(VIDEO, [(0, 11)], (2, 2, 3))]
    assert all(type(bound) is int for bound in items[0][1][0])


@pytest.mark.parametrize("rows", [None, torch.zeros(0, 3)], ids=["none", "empty"])
def test_a_grid_without_rows_is_no_grid(rows: Any) -> None:
    assert items_of(request(media("VIDEO", [(0, 11)], video_grid_thw=rows)), MERGED) == [(VIDEO, [(0, 11)], None)]


def test_the_merge_size_divides_rows_and_columns_but_not_frames() -> None:
    inputs = request(media("VIDEO", [(0, 53)], video_grid_thw=grid((9, 6, 9))))
    assert items_of(inputs, ModelGeometry(3)) == [(VIDEO, [(0, 53)], (9, 2, 3))]
    assert items_of(inputs, ModelGeometry(1)) == [(VIDEO, [(0, 53)], (9, 6, 9))], "handed on for the planner to refuse"
    with pytest.raises(_core.LayoutError, match="grid 9 x 3 x 4 does not match its 54 span tokens"):
        cache_of().get(inputs, 100, CPU)


@pytest.mark.parametrize(
    ("spans", "rows", "expected"),
    [
        ([(0, 9), (20, 33)], [(2, 4, 6), (2, 4, 6)], (4, 2, 3)),
        ([(0, 9), (20, 33), (40, 41)], [(3, 4, 6), (2, 4, 4)], (5, 2, 3)),
    ],
    ids=["a span per grid", "other numbers"],
)
def test_grids_that_match_no_span_are_handed_on_with_all_spans(spans: Any, rows: Any, expected: Any) -> None:
    """The planner then compares the sums and names them."""
    inputs = request(media("VIDEO", spans, video_grid_thw=grid(*rows)))
    assert items_of(inputs, MERGED) == [(VIDEO, spans, expected)]


def test_several_images_of_a_legacy_modality() -> None:
    item = SimpleNamespace(modality=SimpleNamespace(name="MULTI_IMAGES"), offsets=[(1, 4)], model_specific_data=None)
    assert items_of(SimpleNamespace(mm_items=[item]), MERGED) == [(IMAGE, [(1, 4)], None)]


# -- requests that cannot be laid out ----------------------------------------------------------------------------------

VIDEO_GRID = grid((2, 4, 6))
GOOD = media("IMAGE", [(100, 105)], image_grid_thw=grid((1, 4, 6)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (media("VIDEO", [(0, 11)], video_grid_thw=VIDEO_GRID, pre_chunked_input_ids=[1, 2]), "its tokens are pruned"),
        (media("VIDEO", [(0, 11)], pre_chunked_input_ids=None), "its tokens are pruned"),
        (media("IMAGE", None, image_sizes=[(336, 336)]), "no token spans"),
        (media("IMAGE", []), "no token spans"),
        (SimpleNamespace(modality="DEPTH", offsets=[(0, 3)], model_specific_data={}), "unknown modality 'DEPTH'"),
    ],
    ids=["pruned", "pruned key alone", "llava without offsets", "empty offsets", "modality"],
)
def test_spans_that_cannot_be_known(bad: Any, message: str) -> None:
    with pytest.raises(GeometryError, match=f"^item 1: {message}"):
        items_of(request(GOOD, bad), MERGED)


@pytest.mark.parametrize(
    "offsets",
    [
        5,
        "abc",
        [None],
        [3],
        [(1,)],
        [(1, 2, 3)],
        [("a", "b")],
        [(None, 3)],
        [(0, float("nan"))],
        [(0, float("inf"))],
    ],
    ids=repr,
)
def test_garbage_in_offsets(offsets: Any) -> None:
    with pytest.raises(GeometryError, match=r"^item 1: offsets or grid cannot be read: "):
        items_of(request(GOOD, media("VIDEO", offsets, video_grid_thw=VIDEO_GRID)), MERGED)


@pytest.mark.parametrize(
    "rows",
    [
        5,
        "abc",
        object(),
        [None],
        [],
        [[1, 2, 3], [1]],
        [[1, 2, 3, 4]],
        [[1]],
        [["1", "2", "3"]],
        torch.tensor(7),
        torch.zeros(1, 0),
        torch.full((1, 3), torch.nan),
        torch.full((1, 3), torch.inf),
        torch.ones(1, 3, dtype=torch.complex64),
    ],
    ids=repr,
)
def test_garbage_in_grids(rows: Any) -> None:
    with pytest.raises(GeometryError, match=r"^item 1: offsets or grid cannot be read: "):
        items_of(request(GOOD, media("VIDEO", [(0, 11)], video_grid_thw=rows)), MERGED)


def test_a_grid_on_a_device_is_not_read() -> None:
    rows = torch.ones(1, 3, device="meta")
    with pytest.raises(GeometryError, match="video_grid_thw is on meta; reading it would wait for the device"):
        items_of(request(media("VIDEO", [(0, 11)], video_grid_thw=rows)), MERGED)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([media("VIDEO", [(0, 11)], video_grid_thw=grid((3, 4, 6)))], "item 0: grid 3 x 2 x 3 does not match its 12 "),
        ([GOOD, media("VIDEO", [(0, 11)], video_grid_thw=grid((2, 4, 4)))], "item 1: grid 2 x 2 x 2 does not match"),
        (
            [media("VIDEO", [(0, 5), (9, 15)], video_grid_thw=VIDEO_GRID)],
            "item 0: grid 2 x 2 x 3 does not match its 13",
        ),
        ([media("VIDEO", [(0, 5), (9, 9), (11, 15)], video_grid_thw=grid((2, 4, 4)))], "grid 2 x 2 x 2 does not match"),
        ([media("IMAGE", [(0, 11)], image_grid_thw=grid((1, 0, 6)))], "item 0: grid 1 x 0 x 3 has a dimension below 1"),
        ([media("IMAGE", [(0, 11)], image_grid_thw=grid((1, 1, 6)))], "item 0: grid 1 x 0 x 3 has a dimension below 1"),
        ([media("IMAGE", [(0, 11)], image_grid_thw=grid((-1, 4, 6)))], "grid -1 x 2 x 3 has a dimension below 1"),
        ([media("IMAGE", [(0, 11)], image_grid_thw=grid((1, 2**40, 2**40)))], "does not match its 12 span tokens"),
        ([GOOD, media("VIDEO", [(105, 110)])], r"item 1: span \(105, 110\) overlaps span \(100, 105\) of item 0"),
        ([GOOD, GOOD], r"span \(100, 105\) overlaps span \(100, 105\)"),
        ([media("VIDEO", [(7, 3)])], r"item 0: span \(7, 3\) is reversed"),
        ([media("VIDEO", [(-1, 3)])], r"item 0: span \(-1, 3\) is outside 0\.\."),
        ([media("VIDEO", [(0, 2**40)])], r"length 1099511627777 is outside"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_what_the_planner_refuses(items: list[Any], message: str) -> None:
    cache = cache_of()
    inputs = request(*items)
    with pytest.raises(_core.LayoutError, match=message):
        cache.get(inputs, 200, CPU)
    assert len(cache) == 0


@pytest.mark.parametrize(
    "item",
    [
        media("VIDEO", [(0, 2**70)]),
        media("VIDEO", [(-(2**70), 3)]),
        media("VIDEO", [(0, 3)], video_grid_thw=[[2**40] * 3]),
    ],
    ids=["end", "start", "grid"],
)
def test_numbers_beyond_every_integer_never_escape_as_something_else(item: Any) -> None:
    """The backend runs a request dense on these two errors; any other would take the server down."""
    with pytest.raises((GeometryError, _core.LayoutError)):
        cache_of().get(request(item), 200, CPU)


# -- model geometry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "merge"),
    [
        (SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=3)), 3),
        (SimpleNamespace(thinker_config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=4))), 4),
        (
            SimpleNamespace(
                vision_config=SimpleNamespace(patch_size=14),
                thinker_config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=1)),
            ),
            1,
        ),
        (SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=0)), 2),
        (SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size="2")), 2),
        (SimpleNamespace(vision_config=None), 2),
        (SimpleNamespace(), 2),
        (transformers.Qwen2_5_VLConfig(), 2),
        (transformers.Qwen3VLConfig(vision_config={"spatial_merge_size": 5}), 5),
        (transformers.Qwen2Config(), 2),
    ],
    ids=[
        "vision",
        "thinker",
        "thinker where vision has none",
        "zero",
        "string",
        "none",
        "text model",
        "Qwen2.5-VL",
        "Qwen3-VL",
        "Qwen2",
    ],
)
def test_model_geometry(config: object, merge: int) -> None:
    assert ModelGeometry.of(config) == ModelGeometry(merge)


def test_model_geometry_of_a_thinker() -> None:
    config = transformers.Qwen3OmniMoeConfig(thinker_config={"vision_config": {"spatial_merge_size": 3}})
    assert ModelGeometry.of(config).merge == 3


# -- what this package's own processors say ----------------------------------------------------------------------------


def test_own_frames_that_touch_are_one_clip():
    """An item per frame, and the next video directly behind."""
    frames = [own("VIDEO", [(start, start + 11)], [(1, 3, 4)], [number]) for number, start in enumerate((5, 17, 29))]
    other = own("VIDEO", [(41, 52), (53, 64)], [(1, 3, 4)] * 2)
    found = items_of(request(*frames, other), ModelGeometry())
    assert found == [
        (VIDEO, [(5, 16), (17, 28), (29, 40)], (3, 3, 4)),
        (VIDEO, [(41, 52), (53, 64)], (2, 3, 4)),
    ]
    layout = _core.Layout(70, found, chunk_tokens=64, tile_queries=16, cell_size=0)
    assert [layout.frame_stride(number) for number in range(2)] == [12, 12]


def test_own_tails_lie_outside_the_grid():
    image = own("IMAGE", [(0, 12)], [(1, 3, 4)], tails=[1])
    video = own("VIDEO", [(20, 32), (33, 45)], [(1, 3, 4)] * 2, tails=[1, 1])
    found = items_of(request(image, video), ModelGeometry())
    assert found == [(IMAGE, [(0, 11)], (1, 3, 4)), (VIDEO, [(20, 31), (33, 44)], (2, 3, 4))]


def test_own_numbers_that_do_not_match_the_spans():
    for tails in ([1, 1], ["?"]):
        with pytest.raises(GeometryError):
            items_of(request(own("VIDEO", [(0, 12)], [(1, 3, 4)], tails=tails)), ModelGeometry())
