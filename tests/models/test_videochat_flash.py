"""VideoChat-Flash: what is served and what is refused, its frames, and that its tiny checkpoint can be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2Config

import tiny_models
from fake_inputs import Video
from mminference_sgl.backend.geometry import ModelGeometry, items_of
from mminference_sgl.method.items import VIDEO
from mminference_sgl.models.configs import UnsupportedCheckpointError, VideoChatFlashConfig
from mminference_sgl.processors.chat import VideoChatFlashChat
from mminference_sgl.processors.frames import middles
from mminference_sgl.processors.prompt import PLACEHOLDER, spans
from mminference_sgl.processors.videochat_flash import VideoChatFlashProcessor, number_of_frames
from references.videochat_flash import VideoChatFlash, merged, sampled
from serving import squares

PUBLISHED = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
    "mm_vision_tower": "umt-hd-large",
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_local_num_frames": 4,
    "mm_newline_position": "nothing",
    "mm_vision_select_layer": -2,
    "mm_llm_compress": False,
    "vision_encode_type": "video_image",
    "frame_aspect_ratio": "square",
}


def read(folder: Path, **changes: Any) -> VideoChatFlashConfig:
    AutoConfig.register("videochat_flash_qwen", VideoChatFlashConfig, exist_ok=True)
    names = {"architectures": ["VideoChatFlashQwenForCausalLM"], "model_type": "videochat_flash_qwen"}
    auto = {"AutoConfig": "modeling_videochat_flash.VideoChatFlashQwenConfig"}
    (folder / "config.json").write_text(json.dumps({**names, "auto_map": auto, **PUBLISHED, **changes}))
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    ("tower", "side"),
    [("umt-hd-large", 448), ("umt-large", 224), ("umt", 224), ("OpenGVLab/UMT-HD-Large", 448)],
)
def test_published_configurations(tmp_path: Path, tower: str, side: int) -> None:
    config = read(tmp_path, mm_vision_tower=tower)
    assert type(config) is VideoChatFlashConfig
    text, vision = config.text_config, config.vision_config
    assert isinstance(text, Qwen2Config)
    assert (text.hidden_size, text.num_key_value_heads, text.vocab_size) == (3584, 4, 152064)
    assert (text.rope_parameters["rope_theta"], config.eos_token_id, config.dtype) == (1e6, 151645, torch.bfloat16)
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (side, 16, 1024, 24)


def test_written_and_read_again(tmp_path: Path) -> None:
    config = read(tmp_path, mm_vision_tower="umt-large")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.text_config.to_dict() == config.text_config.to_dict()
    assert again.vision_config.to_dict() == config.vision_config.to_dict()


def test_sglang_sees_a_multimodal_model(tmp_path: Path) -> None:
    from sglang.srt.utils.hf_transformers.common import get_hf_text_config

    config = read(tmp_path)
    text = get_hf_text_config(config)
    assert text is config.text_config
    assert text is not config
    assert text.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("mm_llm_compress", True, "False"),
        ("mm_vision_tower", "internvideo2-1b", "umt-hd-large"),
        ("mm_vision_tower", "google/siglip-so400m-patch14-384", "umt-hd-large"),
        ("mm_vision_tower", None, "umt-hd-large"),
        ("mm_projector_type", "tome16_mlp_hd128", "tome16_mlp_hd64"),
        ("mm_projector_type", "mlp2x_gelu", "tome16_mlp_hd64"),
        ("mm_vision_select_layer", 3, "from the end"),
        ("mm_vision_select_layer", -25, "from the end"),
        ("mm_vision_select_layer", None, "from the end"),
        ("mm_local_num_frames", 8, "4"),
        ("mm_newline_position", "frame", "nothing"),
        ("vision_encode_type", "image", "video_image"),
        ("frame_aspect_ratio", "anyres_max_4", "square"),
        ("mm_use_im_start_end", True, "False"),
    ],
)
def test_refused_by_name(tmp_path: Path, name: str, value: Any, known: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=f"{name} {value!r} is not supported; known: .*{known}"):
        read(tmp_path, **{name: value})


def test_too_few_patches(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="patches of a frame 64 is not supported"):
        read(tmp_path, vision_config={"image_size": 128})


@pytest.mark.parametrize("most", [512, 64, 30, 4, 3])
@pytest.mark.parametrize(
    ("count", "rate", "frames"),
    [
        (1, 30.0, 4),
        (3, 30.0, 4),
        (4, 30.0, 4),
        (24, 4.0, 24),
        (30, 4.0, 28),
        (300, 30.0, 64),
        (2100, 30.0, 68),
        (2159, 30.0, 68),
        (2160, 30.0, 72),
        (90000, 25.0, 512),
        (100, 0.5, 100),
        (77, 0.0, 76),
    ],
)
def test_frames_are_middles_of_equal_parts(count: int, rate: float, most: int, frames: int) -> None:
    wanted = number_of_frames(count, rate, most, 4)
    assert wanted == max(4, min(frames, most // 4 * 4))
    indices = middles(count, wanted)
    indices += indices[-1:] * (-len(indices) % 4)
    assert indices == sampled(count, rate or 1.0, most)
    assert len(indices) == wanted
    assert all(0 <= index < count for index in indices)


def processor(most: int = 512) -> VideoChatFlashProcessor:
    """One that makes a token of every character, for a tower of 32 x 32 pixels."""
    made = VideoChatFlashProcessor.__new__(VideoChatFlashProcessor)
    made.size, made.clip, made.tokens, made.most = 32, 4, 64, most
    made.placeholder_id = 0
    made.mm_tokens = SimpleNamespace(get_combined_regex=lambda: re.compile("(<image>|<video>)"))
    made.asked = []

    def text_ids(text: str, *, first: bool = False) -> list[int]:
        made.asked.append((text, first))
        return [ord(one) for one in text]

    made.text_ids = text_ids
    return made


def test_prompt_and_items() -> None:
    """As ``chat`` of the published checkpoints' code writes it; text behind a video is tokenized in one piece."""
    one = processor()
    loaded = SimpleNamespace(
        images=[Image.new("RGB", (9, 5))],
        videos=[Video(30, 4.0), [np.zeros((5, 9, 3), dtype=np.uint8)] * 3],
        input_text="user\n<video>what is it?<image><video>end",
    )
    found = one.assemble(loaded)
    sentence = "\nThe video lasts for 7.50 seconds, and 28 frames are uniformly sampled from it. "
    assert one.asked == [("user\n", True), (f"{sentence}what is it?", False), ("\n", False), ("\nend", False)]
    *video, image, short = found.mm_items
    assert {(item.feature.shape, item.feature.dtype) for item in video} == {((1, 4, 3, 32, 32), torch.uint8)}
    assert torch.cat([item.feature for item in video])[:, :, 0, 0, 0].flatten().tolist() == sampled(30, 4.0)
    assert (image.feature.shape, short.feature.shape) == ((1, 1, 3, 32, 32), (1, 4, 3, 32, 32))
    spans = [span for item in found.mm_items for span in item.offsets]
    assert {last + 1 - first for first, last in spans} == {64}
    assert [item.offsets for item in video] == [[(5 + 64 * clip, 5 + 64 * clip + 63)] for clip in range(7)]
    assert sorted({place for first, last in spans for place in range(first, last + 1)}) == [
        place for place, token in enumerate(found.input_ids) if token == 0
    ]


def test_sglang_embeds_clip_by_clip_and_the_geometry_joins_them() -> None:
    loaded = SimpleNamespace(images=[], videos=[Video(30, 4.0)], input_text="<video>?")
    items = processor().assemble(loaded).mm_items
    assert [tuple(item.feature.shape[:2]) for item in items] == [(1, 4)] * 7
    assert items_of(SimpleNamespace(mm_items=items), ModelGeometry()) == [(VIDEO, [(0, 7 * 64 - 1)], None)]


def test_most_frames() -> None:
    loaded = SimpleNamespace(images=[], videos=[Video(200, 25.0)], input_text="<video>?")
    found = processor(most=18).assemble(loaded)
    assert len(found.mm_items) == 4
    assert "16 frames" in "".join(map(chr, found.input_ids))


def test_chat_template(tmp_path: Path) -> None:
    tiny_models.build("videochat_flash", tmp_path)
    AutoConfig.register("videochat_flash_qwen", VideoChatFlashConfig, exist_ok=True)
    chat = VideoChatFlashChat.from_pretrained(tmp_path)
    parts = [{"type": "video"}, {"type": "text", "text": " what is it? "}]
    text = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>what is it?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_run_is_cut_into_clips() -> None:
    ids = [7, *[PLACEHOLDER] * 12, 8, *[PLACEHOLDER] * 4]
    assert spans(ids, [4] * 4) == [(1, 4), (5, 8), (9, 12), (14, 17)]
    assert spans(ids) == [(1, 12), (14, 17)]


def test_tiny_weights_merge_the_same_pairs_in_both_precisions(tmp_path: Path) -> None:
    """Otherwise what the servers say of a prompt could not be compared."""
    tiny_models.build("videochat_flash", tmp_path)
    frames = [*squares(24, 24, 6, 8), *squares(30, 28, 6, 8)]
    clips = [frames[first : first + 4] for first in range(0, len(frames), 4)] + [[squares(5, 1, 5, 9)[0]]]
    exact, rounded = (VideoChatFlash(tmp_path, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for clip in clips:
        one, other = (merged(of.states(clip), 64, of.heads)[1] for of in (exact, rounded))
        assert one == other
