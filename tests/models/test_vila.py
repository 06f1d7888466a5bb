"""LongVILA without a server: which frames a video gives, and what is refused."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fake_inputs import Video
from mminference_sgl.models.configs import UnsupportedCheckpointError, VilaConfig
from mminference_sgl.models.vila import two_by_two
from mminference_sgl.processors import frames
from mminference_sgl.processors.vila import VilaProcessor


def processor(pool: int = 1, **video: Any) -> VilaProcessor:
    found = VilaProcessor.__new__(VilaProcessor)
    found.video_config = video
    found.side, found.pool, found.size, found.newline = 2, pool, 4, [7]
    found.frames, found.rate = found.number_of_frames(8), found.frame_rate(0.0)
    return found


def taken(medium: Any) -> list[int]:
    return medium.feature[:, :, 0, 0, 0].flatten().tolist()


@pytest.mark.parametrize(
    ("count", "rate", "settings", "wanted"),
    [
        (100, 25.0, {}, [0, 14, 28, 42, 57, 71, 85, 99]),
        (5, 25.0, {}, [0, 1, 2, 3, 4]),
        (1, 25.0, {}, [0]),
        (100, 25.0, {"num_frames": 3}, [0, 50, 99]),
        (100, 25.0, {"fps": 1}, [0, 25, 50, 75]),
        (100, 25.0, {"fps": 5, "num_frames": 4}, [0, 5, 10, 15]),
        (6, 2.0, {"fps": 10}, [0, 1, 2, 3, 4, 5]),
        (9, 0.0, {"fps": 1}, [0, 1, 2, 3, 5, 6, 7, 8]),
    ],
)
def test_frames_that_a_video_gives(count: int, rate: float, settings: dict[str, Any], wanted: list[int]):
    medium = processor(**settings).video(Video(count, rate))
    assert taken(medium) == wanted
    assert medium.ids == ([-1] * 4 + [7]) * len(wanted)
    assert medium.grids == [(1, 2, 2)] * len(wanted)
    assert medium.first_frames == list(range(len(wanted)))


@pytest.mark.parametrize(("count", "wanted"), [(5, [0, 1, 2, 3, 4, 4, 4, 4]), (8, list(range(8))), (1, [0] * 4)])
def test_the_last_frame_fills_a_group(count: int, wanted: list[int]):
    medium = processor(pool=4).video(Video(count, 25.0))
    assert taken(medium) == wanted
    assert len(medium.grids) == len(wanted) // 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 0}, "whole number from 1, not 0"),
        ({"num_frames": "8"}, "whole number from 1, not '8'"),
        ({"num_frames": True}, "whole number from 1, not True"),
        ({"fps": -1}, "number from 0, not -1"),
        ({"fps": "2"}, "number from 0, not '2'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        processor(**settings)


def test_many_frames_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    video = Video(100, 25.0)
    whole = video.get_frames_at
    monkeypatch.setattr(video, "get_frames_at", lambda indices: (asked.append(len(indices)), whole(indices))[1])
    assert frames.squares(video, range(40), 4).shape == (40, 3, 4, 4)
    assert asked == [16, 16, 8]


@pytest.mark.parametrize("side", [1, 2, 5, 6])
def test_two_by_two_is_upper_left_upper_right_lower_left_lower_right(side: int):
    states = torch.arange(1, 2 * side * side * 3 + 1).view(2, side * side, 3).float()
    found, half = two_by_two(states), -(-side // 2)
    assert found.shape == (2, half * half, 12)
    grid = states.view(2, side, side, 3)
    for row in range(half):
        for column in range(half):
            token = found[:, row * half + column].view(2, 4, 3)
            for corner in range(4):
                r, c = 2 * row + corner // 2, 2 * column + corner % 2
                wanted = grid[:, r, c] if r < side and c < side else torch.zeros(2, 3)
                assert torch.equal(token[:, corner], wanted)


PUBLISHED: dict[str, Any] = {
    "llm_cfg": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"},
    "vision_tower_cfg": {"model_type": "siglip_vision_model", "image_size": 448, "patch_size": 14},
    "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
}


@pytest.mark.parametrize(("image", "side"), [(448, 16), (384, 14)])
def test_tokens_of_the_published_towers(image: int, side: int):
    config = VilaConfig(**PUBLISHED | {"vision_tower_cfg": PUBLISHED["vision_tower_cfg"] | {"image_size": image}})
    assert (config.side, config.pool, str(config.dtype)) == (side, 1, "torch.bfloat16")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llm_cfg": "llm"}, "llm_cfg 'llm'"),
        ({"s2": True}, "s2 True"),
        ({"dynamic_s2": True}, "dynamic_s2 True"),
        ({"mm_vision_select_layer": 3}, "mm_vision_select_layer 3"),
        ({"mm_projector_cfg": {}}, "mm_projector_type None"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], message: str):
    with pytest.raises(UnsupportedCheckpointError, match=message):
        VilaConfig(**PUBLISHED | fields)


def test_a_video_without_frames_is_refused():
    found = processor()
    found.mm_tokens = None

    async def loaded(**_: Any) -> Any:
        return SimpleNamespace(images=[], videos=[Video(0, 25.0)], input_text="<vila/video>")

    found.load_mm_data = loaded
    with pytest.raises(ValueError, match="no frames"):
        asyncio.run(found.process_mm_data_async(None, None, "<vila/video>", SimpleNamespace(video_data=["a"])))
