"""Geometry where no grid key tells it: M-RoPE coordinates, fixed squares, reserved tokens, opaque runs, clips.

M-RoPE positions come from SGLang's own function, given the grids that the items then lack.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from sglang.srt.layers.rotary_embedding import MRotaryEmbedding
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs

from fake_inputs import CPU, MERGED, cache_of, grid, media, request
from mminference_sgl import _core
from mminference_sgl.backend.geometry import MAX_FRAME_GAP, GeometryError, ModelGeometry, items_of
from mminference_sgl.method.items import AUDIO, IMAGE, VIDEO, Item

TEXT_ID, START_ID, END_ID, IMAGE_ID, VIDEO_ID = 1, 2, 3, 4, 5
INTERNVL = ModelGeometry(square=16)
ELEVEN = ModelGeometry(square=11)

Clip = tuple[str, tuple[int, int, int]]
"""Modality and grid after merging."""


@dataclass
class Prompt:
    """A prompt with media and its positions: ``qwen2_5_vl`` has one run per clip, ``qwen3_vl`` one per frame."""

    model: str
    clips: list[Clip]
    text: list[int]

    def __post_init__(self) -> None:
        ids: list[int] = [TEXT_ID] * self.text[0]
        self.spans: list[list[tuple[int, int]]] = []
        for (modality, (frames, rows, columns)), after in zip(self.clips, self.text[1:], strict=True):
            per_frame = self.model == "qwen3_vl" and modality == "VIDEO"
            spans = []
            for frame in range(frames if per_frame else 1):
                # Timestamps grow by a digit.
                ids += [TEXT_ID] * ((5 + (frame > 4)) * per_frame) + [START_ID]
                tokens = rows * columns * (1 if per_frame else frames)
                spans.append((len(ids), len(ids) + tokens - 1))
                ids += [IMAGE_ID if modality == "IMAGE" else VIDEO_ID] * tokens + [END_ID]
            self.spans.append(spans)
            ids += [TEXT_ID] * after
        grids = {
            kind: [(t, h * 2, w * 2) for modality, (t, h, w) in self.clips if modality == kind]
            for kind in ("IMAGE", "VIDEO")
        }
        self.positions = MRotaryEmbedding.get_rope_index(
            2,
            IMAGE_ID,
            VIDEO_ID,
            START_ID,
            self.model,
            tokens_per_second=2,
            input_ids=torch.tensor([ids]),
            image_grid_thw=grid(*grids["IMAGE"]) if grids["IMAGE"] else None,
            video_grid_thw=grid(*grids["VIDEO"]) if grids["VIDEO"] else None,
            second_per_grid_ts=None if self.model == "qwen3_vl" else torch.tensor([0.0833] * len(grids["VIDEO"])),
        )[0].squeeze(1)

    def inputs(self, *, item_per_span: bool, positions: torch.Tensor | None = None) -> MultimodalInputs:
        """Items without grid keys, images first as processors do."""
        items = []
        for kind in ("IMAGE", "VIDEO"):
            for (modality, _), spans in zip(self.clips, self.spans, strict=True):
                if modality == kind:
                    groups = [[span] for span in spans] if item_per_span else [spans]
                    items += [media(modality, group) for group in groups]
        return MultimodalInputs(mm_items=items, mrope_positions=self.positions if positions is None else positions)

    @property
    def expected(self) -> list[Item]:
        numbers = {"IMAGE": IMAGE, "VIDEO": VIDEO}
        found = zip(self.clips, self.spans, strict=True)
        listed: list[Item] = [(numbers[modality], spans, frame_grid) for (modality, frame_grid), spans in found]
        return sorted(listed, key=lambda item: item[0])


# -- M-RoPE ------------------------------------------------------------------------------------------------------------

QWEN2_PROMPT = Prompt(
    "qwen2_5_vl",
    [("VIDEO", (9, 5, 8)), ("IMAGE", (1, 13, 19)), ("VIDEO", (2, 3, 4)), ("IMAGE", (1, 1, 7))],
    [3, 0, 5, 1, 2],
)
QWEN3_PROMPT = Prompt("qwen3_vl", [("IMAGE", (1, 3, 5)), ("VIDEO", (7, 3, 4)), ("VIDEO", (3, 2, 4))], [4, 9, 70, 3])


@pytest.mark.parametrize("item_per_span", [False, True], ids=["an item per clip", "an item per span"])
@pytest.mark.parametrize("prompt", [QWEN2_PROMPT, QWEN3_PROMPT], ids=["qwen2.5-vl", "qwen3-vl"])
def test_grids_come_from_mrope(prompt: Prompt, item_per_span: bool) -> None:
    assert items_of(prompt.inputs(item_per_span=item_per_span), MERGED) == prompt.expected


sizes = strategies.integers(1, 7)
grids = strategies.tuples(sizes, sizes, sizes).filter(lambda shape: shape[1] * shape[2] > 1)
clips = strategies.one_of(
    grids.map(lambda shape: ("VIDEO", shape)), grids.map(lambda shape: ("IMAGE", (1, shape[1], shape[2])))
)


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    strategies.sampled_from(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]),
    strategies.lists(clips, min_size=1, max_size=5),
    strategies.data(),
)
def test_any_prompt_of_any_media_comes_from_mrope(model: str, given: list[Clip], data: strategies.DataObject) -> None:
    """Text of a clip's length between clips keeps frames of different videos apart."""
    gaps = data.draw(strategies.lists(strategies.integers(MAX_FRAME_GAP, 90), min_size=len(given), max_size=len(given)))
    prompt = Prompt(model, given, [0, *gaps])
    assert items_of(prompt.inputs(item_per_span=data.draw(strategies.booleans())), MERGED) == prompt.expected


def test_any_other_coordinate_is_not_believed() -> None:
    """Each coordinate of a clip, changed by one, spoils the raster: the clip is opaque, the others are not."""
    prompt = Prompt("qwen2_5_vl", [("VIDEO", (2, 3, 4)), ("VIDEO", (3, 2, 2))], [3, 2, 3])
    (start, end), other = prompt.spans[0][0], prompt.expected[1]
    for line, token in itertools.product((1, 2), range(start, end + 1)):
        for change in (-1, 1):
            positions = prompt.positions.clone()
            positions[line, token] += change
            items = items_of(prompt.inputs(item_per_span=True, positions=positions), MERGED)
            assert items == [(VIDEO, [(start, end)], None), other]


@pytest.mark.parametrize(
    "positions",
    [
        QWEN2_PROMPT.positions.to("meta"),
        QWEN2_PROMPT.positions[1:],
        QWEN2_PROMPT.positions[0],
        QWEN2_PROMPT.positions[:, :300],
        torch.zeros_like(QWEN2_PROMPT.positions),
        torch.arange(QWEN2_PROMPT.positions.shape[1]).expand(3, -1),
        "positions",
    ],
    ids=["on a device", "two lines", "one line", "too short", "all alike", "text", "no tensor"],
)
def test_positions_that_tell_nothing_leave_opaque_runs(positions: Any) -> None:
    inputs = QWEN2_PROMPT.inputs(item_per_span=True)
    inputs.mrope_positions = positions
    assert items_of(inputs, MERGED) == [(modality, spans, None) for modality, spans, _ in QWEN2_PROMPT.expected]


def test_audio_has_no_places() -> None:
    inputs = QWEN2_PROMPT.inputs(item_per_span=True)
    inputs.mm_items = [media("AUDIO", QWEN2_PROMPT.spans[0])]
    assert items_of(inputs, MERGED) == [(AUDIO, QWEN2_PROMPT.spans[0], None)]


def test_mrope_settles_a_grid_that_contradicts_its_spans() -> None:
    inputs = QWEN2_PROMPT.inputs(item_per_span=True)
    for item in inputs.mm_items:
        key = "image_grid_thw" if item.is_image() else "video_grid_thw"
        item.model_specific_data[key] = grid((3, 4, 4))
    assert items_of(inputs, MERGED) == QWEN2_PROMPT.expected
    inputs.mrope_positions = None
    with pytest.raises(_core.LayoutError, match="does not match"):
        cache_of().get(inputs, 100, CPU)


# -- fixed squares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "square"),
    [
        ({"force_image_size": 448, "downsample_ratio": 0.5, "vision": {"patch_size": 14, "image_size": 336}}, 16),
        ({"force_image_size": None, "downsample_ratio": 0.5, "vision": {"patch_size": 14, "image_size": 448}}, 16),
        ({"downsample_ratio": 0.5, "vision": {"patch_size": [28, 28], "image_size": [448, 448]}}, 8),
        ({"downsample_ratio": 1, "vision": {"patch_size": 32, "image_size": 448}}, 14),
        ({"architectures": ["LlavaQwenForCausalLM"], "vision": {"patch_size": 14, "image_size": 384}}, 0),
        ({"downsample_ratio": 0.5, "vision": {"patch_size": 14}}, 0),
        ({"downsample_ratio": "0.5", "vision": {"patch_size": 14, "image_size": 448}}, 0),
        ({"downsample_ratio": 0.5, "vision": {"patch_size": 0, "image_size": []}}, 0),
        ({"architectures": None, "vision": {"patch_size": 14, "image_size": 448}}, 0),
    ],
    ids=repr,
)
def test_the_square_of_a_model(config: dict[str, Any], square: int) -> None:
    vision = SimpleNamespace(**config["vision"])
    rest = {name: value for name, value in config.items() if name != "vision"}
    assert ModelGeometry.of(SimpleNamespace(vision_config=vision, **rest)) == ModelGeometry(2, square)


def spans_of(start: int, frames: int, tokens: int, stride: int) -> list[tuple[int, int]]:
    return [(at, at + tokens - 1) for at in range(start, start + frames * stride, stride)]


def test_internvl_frames_are_one_clip() -> None:
    spans = spans_of(9, 5, 256, 268)
    assert items_of(request(media("VIDEO", spans)), INTERNVL) == [(VIDEO, spans, (5, 16, 16))]


def test_internvl_frames_of_several_tiles_are_one_below_the_other() -> None:
    spans = spans_of(9, 5, 3 * 256, 780)
    assert items_of(request(media("VIDEO", spans)), INTERNVL) == [(VIDEO, spans, (5, 48, 16))]


def test_internvl_tiles_of_an_image_are_planes_of_their_own() -> None:
    items = items_of(request(media("IMAGE", [(4, 4 + 3 * 256 - 1)])), INTERNVL)
    assert items == [(IMAGE, [(start, start + 255)], (1, 16, 16)) for start in (4, 260, 516)]


@pytest.mark.parametrize("modality", ["IMAGE", "VIDEO", "AUDIO"])
@pytest.mark.parametrize("tokens", [1, 255, 257, 400])
def test_runs_of_no_whole_squares_are_opaque(modality: str, tokens: int) -> None:
    items = items_of(request(media(modality, [(4, 3 + tokens)])), INTERNVL)
    assert items == [({"IMAGE": IMAGE, "VIDEO": VIDEO, "AUDIO": AUDIO}[modality], [(4, 3 + tokens)], None)]


def test_audio_of_a_whole_square_is_opaque() -> None:
    assert items_of(request(media("AUDIO", [(4, 259)])), INTERNVL) == [(AUDIO, [(4, 259)], None)]


def test_items_of_a_frame_each_are_one_clip_also_out_of_order() -> None:
    spans = spans_of(3, 8, 121, 122)
    given = [media("IMAGE", [(1500, 1620)]), *(media("VIDEO", [span]) for span in reversed(spans))]
    assert items_of(request(*given), ELEVEN) == [(IMAGE, [(1500, 1620)], (1, 11, 11)), (VIDEO, spans, (8, 11, 11))]


# -- clips -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gap", "clips"), [(0, 1), (1, 1), (MAX_FRAME_GAP, 1), (MAX_FRAME_GAP + 1, 2), (500, 2)])
def test_text_between_frames_parts_clips(gap: int, clips: int) -> None:
    spans = [(0, 120), (121 + gap, 241 + gap)]
    items = items_of(request(*(media("VIDEO", [span]) for span in spans)), ELEVEN)
    assert len(items) == clips
    assert [span for _, found, _ in items for span in found] == spans


def test_an_image_between_two_frames_parts_clips() -> None:
    frames, image = [(0, 120), (160, 280)], (125, 155)
    items = items_of(request(media("VIDEO", frames), media("IMAGE", [image])), ELEVEN)
    assert items == [(VIDEO, [frames[0]], (1, 11, 11)), (VIDEO, [frames[1]], (1, 11, 11)), (IMAGE, [image], None)]


def test_an_opaque_run_between_two_frames_parts_clips() -> None:
    spans = [(0, 120), (122, 140), (142, 262)]
    grids = [found for _, _, found in items_of(request(media("VIDEO", spans)), ELEVEN)]
    assert grids == [(1, 11, 11), None, (1, 11, 11)]


def test_images_are_no_clip() -> None:
    spans = [(0, 120), (122, 242)]
    assert len(items_of(request(media("IMAGE", spans)), ELEVEN)) == 2


def test_frames_of_other_sizes_part_clips() -> None:
    prompt = Prompt("qwen3_vl", [("VIDEO", (3, 2, 4)), ("VIDEO", (2, 4, 2)), ("VIDEO", (2, 2, 4))], [2, 0, 0, 2])
    assert items_of(prompt.inputs(item_per_span=True), MERGED) == prompt.expected


def test_two_videos_of_several_frames_each_stay_two() -> None:
    prompt = Prompt("qwen2_5_vl", [("VIDEO", (3, 2, 4)), ("VIDEO", (3, 2, 4))], [2, 0, 2])
    assert items_of(prompt.inputs(item_per_span=True), MERGED) == prompt.expected


def test_two_videos_with_grids_stay_two_though_of_one_frame() -> None:
    given = media("VIDEO", [(5, 24), (26, 45)], video_grid_thw=grid((1, 8, 10), (1, 8, 10)))
    assert len(items_of(request(given), MERGED)) == 2


# -- LLaVA -------------------------------------------------------------------------------------------------------------


def llava(modality: str, starts: list[int], lengths: list[int], aspect: str = "pad") -> MultimodalInputs:
    """Items without offsets; the model's padding has left where it reserved tokens."""
    items = [media(modality, None, image_sizes=[(384, 384)], image_aspect_ratio=aspect) for _ in starts]
    inputs = MultimodalInputs(mm_items=items, image_pad_len=lengths)
    inputs.image_offsets = starts
    return inputs


def test_llava_frames_are_one_clip() -> None:
    starts = list(range(16, 16 + 20 * 197, 197))
    spans = [(start, start + 195) for start in starts]
    assert items_of(llava("VIDEO", starts, [196] * 20), MERGED) == [(VIDEO, spans, (20, 14, 14))]


def test_llava_frames_that_are_not_pooled_hold_less_than_they_reserve() -> None:
    starts = list(range(16, 16 + 16 * 730, 730))
    items = items_of(llava("VIDEO", starts, [729] * 16), MERGED)
    assert items == [(VIDEO, [(start, start + 728)], None) for start in starts]


def test_llava_images_are_planes() -> None:
    items = items_of(llava("IMAGE", [16, 800], [729, 729]), MERGED)
    assert items == [(IMAGE, [(start, start + 728)], (1, 27, 27)) for start in (16, 800)]


def test_more_llava_images_than_are_written_whole_are_opaque() -> None:
    starts = list(range(16, 16 + 17 * 197, 197))
    assert all(found is None for _, _, found in items_of(llava("IMAGE", starts, [196] * 17), MERGED))


@pytest.mark.parametrize("aspect", ["anyres", "anyres_max_9"])
def test_an_image_in_tiles_is_opaque(aspect: str) -> None:
    """Also if its tokens, base image and unpadded rows with newlines, happen to be a square number."""
    assert items_of(llava("IMAGE", [16], [729 + 40 * 18], aspect), MERGED) == [(IMAGE, [(16, 1464)], None)]
    assert items_of(llava("IMAGE", [16], [1600], aspect), MERGED) == [(IMAGE, [(16, 1615)], None)]


@pytest.mark.parametrize(
    ("starts", "lengths", "message"),
    [
        ([16], [729, 729], "offsets or grid cannot be read: 1 offsets and 2 lengths for 1 items"),
        ([], [], "no token spans"),
        (None, [729], "no token spans"),
        ([16], None, "no token spans"),
        (["a"], [729], "offsets or grid cannot be read"),
    ],
)
def test_llava_without_reserved_tokens(starts: Any, lengths: Any, message: str) -> None:
    inputs = llava("IMAGE", [16], [729])
    inputs.image_offsets, inputs.image_pad_len = starts, lengths
    with pytest.raises(GeometryError, match=f"^item 0: {message}"):
        items_of(inputs, MERGED)


@pytest.mark.parametrize("pad", [0, -3])
def test_llava_images_without_tokens_are_refused_by_the_planner(pad: int) -> None:
    with pytest.raises(_core.LayoutError, match="is reversed"):
        cache_of().get(llava("IMAGE", [16], [pad]), 100, CPU)


# -- all of them -------------------------------------------------------------------------------------------------------

spans_strategy = strategies.lists(
    strategies.tuples(strategies.integers(1, 70), strategies.sampled_from([1, 7, 120, 121, 242, 256, 512])),
    min_size=1,
    max_size=12,
)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    spans_strategy,
    strategies.sampled_from([MERGED, INTERNVL, ELEVEN]),
    strategies.data(),
)
def test_no_token_is_lost_and_all_can_be_laid_out(
    gaps_and_lengths: list[tuple[int, int]], geometry: ModelGeometry, data: strategies.DataObject
) -> None:
    """Whatever comes without a grid key, the same tokens come out, and the planner takes them."""
    items: list[MultimodalDataItem] = []
    tokens: dict[int, int] = {}
    end = 0
    for gap, length in gaps_and_lengths:
        start, end = end + gap, end + gap + length
        modality = data.draw(strategies.sampled_from(["IMAGE", "VIDEO", "AUDIO"]))
        as_list = data.draw(strategies.booleans())
        span: Any = [start, end - 1] if as_list else (start, end - 1)
        items.append(media(modality, [span]))
        tokens.update(dict.fromkeys(range(start, end), {"IMAGE": IMAGE, "VIDEO": VIDEO, "AUDIO": AUDIO}[modality]))
    found = items_of(request(*data.draw(strategies.permutations(items))), geometry)
    assert {
        token: modality for modality, spans, _ in found for first, last in spans for token in range(first, last + 1)
    } == tokens
    layout = _core.Layout(end, found, chunk_tokens=64, tile_queries=32)
    assert layout.num_items == len(found)


def test_a_prompt_cut_inside_a_span_is_planned_as_the_whole_is() -> None:
    """SGLang may cut a prompt that is too long; positions and offsets still tell of all of it."""
    inputs = QWEN3_PROMPT.inputs(item_per_span=False)
    whole = QWEN3_PROMPT.positions.shape[1]
    cut = QWEN3_PROMPT.spans[1][4][0] + 5
    layout = cache_of().get(inputs, cut, CPU).layout
    assert layout.length == whole
    planned = _core.plan([(layout, 0, cut, 0)], tile_queries=16, tile_keys=16)
    offset, length = planned.fields()["seq.positions"]
    assert sorted(planned.buffer[offset : offset + length].tolist()) == list(range(cut))
