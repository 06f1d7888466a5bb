"""LLaVA-Video without a server: which files are its own, what is refused, prompts, newlines, grids."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sglang.srt.managers.schedule_batch import MultimodalInputs
from sglang.srt.multimodal.processors.base_processor import MultimodalSpecialTokens
from sglang.srt.utils.hf_transformers.config import HfModelConfigParser

from fake_inputs import Video
from mminference_sgl import model_plugin
from mminference_sgl.backend.geometry import ModelGeometry, items_of
from mminference_sgl.method.items import IMAGE, VIDEO
from mminference_sgl.models.configs import LlavaVideoConfig, UnsupportedCheckpointError
from mminference_sgl.models.llava_video import in_line, pooled, with_newline_column
from mminference_sgl.processors import chat
from mminference_sgl.processors.llava_video import LlavaVideoProcessor, sampled, time_instruction
from tiny_models.parts import chat_template, write_tokenizer

PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "torch_dtype": "bfloat16",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "eos_token_id": 151645,
    "mm_hidden_size": 1152,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "image_aspect_ratio": "anyres_max_9",
    "add_faster_video": False,
    "add_time_instruction": True,
    "force_sample": True,
}
"""Fields of the 7B model."""
POSITIONS = ("grid", "frame", "one_token", "no_token")


def config_of(**fields: Any) -> LlavaVideoConfig:
    return LlavaVideoConfig(**{**PUBLISHED, "model_type": None, **fields})


def written(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **fields}))
    return folder


def parsed(folder: Path) -> Any:
    """As SGLang reads it with the hook."""
    return model_plugin.config_of_llava_video(
        HfModelConfigParser.parse, HfModelConfigParser(), str(folder), trust_remote_code=False, revision=None
    )


# -- configurations ----------------------------------------------------------------------------------------------------


def test_published_configuration(tmp_path):
    config = parsed(written(tmp_path))
    assert isinstance(config, LlavaVideoConfig)
    text, vision = config.text_config, config.vision_config
    assert (text.model_type, text.hidden_size, text.num_key_value_heads, text.vocab_size) == ("qwen2", 3584, 4, 152064)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (1152, 27, 384)
    assert (config.architectures, config.dtype, config.eos_token_id) == (["LlavaVideoModel"], torch.bfloat16, 151645)
    assert text.rope_parameters["rope_theta"] == 1e6
    assert (config.whole_side, config.side) == (27, 13)
    assert parsed(written(tmp_path, mm_spatial_pool_mode="bilinear")).side == 14


@pytest.mark.parametrize(
    "fields",
    [
        {"mm_newline_position": "one_token", "add_time_instruction": False},
        {"mm_newline_position": None, "add_time_instruction": None},
        {"mm_newline_position": "frame", "add_time_instruction": False},
    ],
    ids=["one_token", "neither", "frame"],
)
def test_onevision_stays_with_sglang(tmp_path, fields):
    folder = str(written(tmp_path, **fields))
    ours = parsed(tmp_path)
    stock = HfModelConfigParser().parse(folder, trust_remote_code=False)
    assert type(ours) is type(stock)
    assert ours.to_dict() == stock.to_dict()
    assert ours.architectures == ["LlavaQwenForCausalLM"]
    assert model_plugin.processor_of_llava_video(lambda *args, **kwargs: (args, kwargs), folder, revision=None) == (
        (folder,),
        {"revision": None},
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("add_faster_video", True),
        ("mm_projector_type", "linear"),
        ("mm_projector_type", None),
        ("mm_newline_position", "everywhere"),
        ("mm_spatial_pool_mode", "max"),
        ("mm_spatial_pool_stride", 4),
        ("mm_patch_merge_type", "flat"),
        ("mm_vision_select_layer", -1),
        ("mm_use_im_start_end", True),
        ("mm_vision_tower", "openai/clip-vit-large-patch14-336"),
        ("architectures", ["LlavaLlamaForCausalLM"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, field, value):
    folder = written(tmp_path, **{field: value})
    said = f"{field} {value if value is not None else 'linear'!r} is not supported"
    with pytest.raises(UnsupportedCheckpointError, match=re.escape(said)):
        parsed(folder)


def test_another_tower_by_its_own_configuration_is_refused():
    with pytest.raises(UnsupportedCheckpointError, match=r"vision_config\.model_type 'clip_vision_model'"):
        config_of(vision_config={"model_type": "clip_vision_model"})


def test_overridden_fields_are_checked_where_they_are_used():
    config = config_of()
    config.update({"mm_spatial_pool_mode": "max"})
    with pytest.raises(UnsupportedCheckpointError, match="mm_spatial_pool_mode 'max'"):
        config.check()


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, (), chat_template(""))
    return AutoTokenizer.from_pretrained(folder)


def processor_of(tokenizer: Any, config: LlavaVideoConfig, most: int) -> LlavaVideoProcessor:
    """Without what only a server knows."""
    made = object.__new__(LlavaVideoProcessor)
    made.hf_config, made.size, made.frames = config, config.vision_config.image_size, most
    made._tokenizer, made.placeholder_id = tokenizer, 2
    made.mm_tokens = MultimodalSpecialTokens(image_token="<image>", video_token="<video>").build(None)
    return made


def tiny(**fields: Any) -> LlavaVideoConfig:
    """5 x 5 patches."""
    return config_of(vision_config={"hidden_size": 8, "image_size": 70, "patch_size": 14}, **fields)


class Loaded:
    def __init__(self, text: str, images: Any = (), videos: Any = ()) -> None:
        self.input_text, self.images, self.videos = text, list(images), list(videos)


def test_prompt_is_the_readme_s(tokenizer):
    """The formula of LLaVA-NeXT's docs/LLaVA_Video_1003.md, tokenized as it does: around the placeholder."""
    total_frame_num, rate, most, asked = 41, 12.5, 7, "what is it?"
    video_time = total_frame_num / rate
    frame_idx = np.linspace(0, total_frame_num - 1, most, dtype=int).tolist()
    frame_time = ",".join([f"{i:.2f}s" for i in [i / rate for i in frame_idx]])
    readme = (
        f"The video lasts for {video_time:.2f} seconds, and {most} frames are uniformly sampled from it. These frames"
        f" are located at {frame_time}.Please answer the following questions related to this video."
    )
    system, user = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        f"{readme}\n{asked}",
    )
    wanted = [tokenizer.encode(part) for part in (system, f"{user}<|im_end|>\n<|im_start|>assistant\n")]
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": asked}]}
    text = chat.Chat(tokenizer, chat.LLAVA_VIDEO).tokenizer.apply_chat_template(
        [message], tokenize=False, add_generation_prompt=True
    )
    video = Video(total_frame_num, rate)
    output = processor_of(tokenizer, tiny(), most).assemble(Loaded(text, videos=[video]))
    tokens = most * 2 * 3
    first = len(wanted[0])
    assert output.input_ids == wanted[0] + [2] * tokens + wanted[1]
    assert [item.offsets for item in output.mm_items] == [
        [(first + 6 * number, first + 6 * number + 5)] for number in range(most)
    ]
    # Frames are flat pictures of their numbers.
    assert [int(item.feature.float().mean().round()) for item in output.mm_items] == frame_idx


def test_text_behind_is_tokenized_with_what_follows(tokenizer):
    config = tiny(add_time_instruction=False)
    output = processor_of(tokenizer, config, 3).assemble(Loaded("a<video>\n b", videos=[Video(9, 2.0)]))
    assert output.input_ids[-len(tokenizer.encode("\n\n b")) :] == tokenizer.encode("\n\n b")
    assert len(output.input_ids) == 1 + 3 * 6 + len(tokenizer.encode("\n\n b"))


def test_frames_without_a_rate_have_no_time(tokenizer):
    pictures = [np.zeros((20, 30, 3), np.uint8)] * 4
    output = processor_of(tokenizer, tiny(), 3).assemble(Loaded("<video>b", videos=[pictures]))
    assert output.input_ids[-len(tokenizer.encode("\nb")) :] == tokenizer.encode("\nb")
    assert len(output.input_ids) == 3 * 6 + len(tokenizer.encode("\nb"))


@pytest.mark.parametrize(
    ("count", "rate", "force", "indices", "seconds"),
    [
        (10, 2.0, True, [0, 3, 6, 9], [0.0, 1.5, 3.0, 4.5]),
        (10, 2.0, False, [0, 3, 6, 9], [0.0, 1.5, 3.0, 4.5]),
        (8, 2.0, False, [0, 2, 4, 6], [0.0, 1.0, 2.0, 3.0]),
        (7, 2.4, False, [0, 2, 4, 6], [0.0, 1.0, 2.0, 3.0]),
        (3, 0.4, False, [0, 1, 2], [0.0, 1.0, 2.0]),
        (3, 2.0, True, [0, 0, 1, 2], [0.0, 0.0, 0.5, 1.0]),
        (1, 2.0, True, [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
        (10, 0.0, False, [0, 3, 6, 9], []),
    ],
    ids=["forced", "too many", "one a second", "rounded rate", "slow", "too few", "one frame", "no rate"],
)
def test_sampling(count, rate, force, indices, seconds):
    assert sampled(count, rate, 4, force=force) == (indices, seconds)


def test_time_instruction_of_one_frame():
    assert time_instruction(0.5, [0.0]) == (
        "The video lasts for 0.50 seconds, and 1 frames are uniformly sampled from it. These frames are located at"
        " 0.00s.Please answer the following questions related to this video."
    )


# -- tokens and grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["average", "bilinear"])
@pytest.mark.parametrize("position", POSITIONS)
def test_embeddings_and_grids_fit_the_spans(tokenizer, position, mode):
    config = tiny(mm_newline_position=position, mm_spatial_pool_mode=mode)
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    output = processor_of(tokenizer, config, 3).assemble(Loaded("ab<image><video>c", [picture], [Video(9, 2.0)]))
    image, *frames = output.mm_items
    assert len(frames) == 3
    side = {"average": 2, "bilinear": 3}[mode]
    columns = side + (position == "grid")
    clip = items_of(MultimodalInputs(mm_items=output.mm_items), ModelGeometry.of(config))
    assert [(kind, grid) for kind, _, grid in clip] == [(IMAGE, (1, 5, 5)), (VIDEO, (3, side, columns))]
    tails = [item.model_specific_data["mminference_span_tails"] for item in frames]
    assert tails == {"frame": [[1]] * 3, "one_token": [[0], [0], [1]]}.get(position, [[0]] * 3)
    for item, (tail,) in zip(frames, tails, strict=True):
        ((first, last),) = item.offsets
        assert last - first + 1 == side * columns + tail
    assert image.offsets[0][1] - image.offsets[0][0] + 1 == 26
    assert {(item.feature.dtype, item.feature.shape) for item in output.mm_items} == {
        (torch.uint8, torch.Size([1, 3, 70, 70]))
    }


def test_a_picture_that_is_a_frame_is_told_from_it(tokenizer):
    black = np.zeros((20, 20, 3), np.uint8)
    loaded = Loaded("<image><video>", [Image.fromarray(black)], [[black, black]])
    items = processor_of(tokenizer, tiny(), 2).assemble(loaded).mm_items
    for item in items:
        item.set_pad_value()
    image, one, other = (set(item.padding_values()) for item in items)
    assert one == other
    assert not image & one


def test_a_picture_is_widened_to_a_square(tokenizer):
    picture = Image.fromarray(np.full((20, 40, 3), 255, np.uint8))
    medium = processor_of(tokenizer, tiny(), 2).image(picture)
    column = medium.feature[0, 0, :, 35].tolist()
    assert (column[:10], column[30:40], column[-10:]) == ([127] * 10, [255] * 10, [127] * 10)


def test_means_of_four():
    frames = torch.randn(2, 5, 5, 3)
    found = pooled(frames, "average")
    assert found.shape == (2, 2, 2, 3)
    for row in range(2):
        for column in range(2):
            four = [frames[:, 2 * row + r, 2 * column + c] for r in range(2) for c in range(2)]
            torch.testing.assert_close(found[:, row, column], sum(four) / 4)


def test_bilinear_rounds_up():
    assert pooled(torch.randn(1, 27, 27, 2), "bilinear").shape == (1, 14, 14, 2)
    ramp = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 5, 5, 1)
    # Centres of three cells on a side of five.
    wanted = torch.tensor([1 / 3, 2.0, 11 / 3])
    torch.testing.assert_close(pooled(ramp, "bilinear")[0, :, :, 0], wanted.expand(3, 3))


@pytest.mark.parametrize("position", POSITIONS)
def test_newlines(position):
    frames, newline = torch.arange(12.0).view(3, 2, 2, 1), torch.tensor([-1.0])
    if position == "grid":
        frames = with_newline_column(frames, newline)
    tails = {"frame": [1, 1, 1], "one_token": [0, 0, 1]}.get(position, [0, 0, 0])
    wanted = {
        "grid": [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1, 8, 9, -1, 10, 11, -1],
        "frame": [0, 1, 2, 3, -1, 4, 5, 6, 7, -1, 8, 9, 10, 11, -1],
        "one_token": [*range(12), -1],
        "no_token": [*range(12)],
    }[position]
    assert in_line(frames, newline, tails)[:, 0].tolist() == wanted


def test_tokens_of_64_frames():
    """11,648 and 13,440."""
    for mode, tokens in (("average", 182), ("bilinear", 210)):
        config = config_of(mm_spatial_pool_mode=mode)
        assert config.side * (config.side + config.newline_column) == tokens
        assert config.side == (math.floor if mode == "average" else math.ceil)(27 / 2)
