"""Qwen2-VL, Qwen2.5-VL, and Qwen3-VL and Qwen3.5, dense and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tiny_models.parts import EXPERTS, HALF, TEXT, VISION, chat_template, ids_of, spread, write_json, write_tokenizer

_SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_ID = ids_of(_SPECIAL)
_CHAT = chat_template(
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
)
_IDS = {
    "image_token_id": _ID["<|image_pad|>"],
    "video_token_id": _ID["<|video_pad|>"],
    "vision_start_token_id": _ID["<|vision_start|>"],
    "vision_end_token_id": _ID["<|vision_end|>"],
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
_TEXT_2 = {**TEXT, "rope_parameters": _ROPE, "max_window_layers": 2, "use_sliding_window": False}

_ROPE_3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
_TEXT_3 = {**TEXT, "head_dim": 32, "rope_parameters": _ROPE_3}
_VISION_3 = {**VISION, "patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}

_TEXT_3_5 = {
    **TEXT,
    # Three layers of Gated DeltaNet, then a full one, with heads as large as its checkpoints have.
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
    "head_dim": 256,
    "rope_parameters": {**_ROPE_3, "rope_theta": 1e7, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
_VISION_3_5 = {**_VISION_3, "deepstack_visual_indexes": []}


def build_qwen2_vl(folder: Path) -> None:
    vision = {name: VISION[name] for name in ("depth", "num_heads", "temporal_patch_size", "spatial_merge_size")}
    vision |= {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2, "patch_size": 14, "in_chans": 3}
    config = Qwen2VLConfig(text_config=_TEXT_2, vision_config=vision, vision_token_id=_ID["<|vision_pad|>"], **_IDS)
    _write(folder, Qwen2VLForConditionalGeneration(config), "Qwen2VLProcessor", "Qwen2VLVideoProcessor", 14)


def build_qwen2_5_vl(folder: Path) -> None:
    vision = {**VISION, "patch_size": 14, "spatial_patch_size": 14, "window_size": 112, "tokens_per_second": 2}
    vision["fullatt_block_indexes"] = [1]
    config = Qwen2_5_VLConfig(text_config=_TEXT_2, vision_config=vision, vision_token_id=_ID["<|vision_pad|>"], **_IDS)
    _write(folder, Qwen2_5_VLForConditionalGeneration(config), "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14)


def build_qwen3_vl(folder: Path) -> None:
    config = Qwen3VLConfig(text_config=_TEXT_3, vision_config=_VISION_3, **_IDS)
    _write(folder, Qwen3VLForConditionalGeneration(config), "Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)


def build_qwen3_5(folder: Path) -> None:
    config = Qwen3_5Config(text_config=_TEXT_3_5, vision_config=_VISION_3_5, **_IDS)
    _write(folder, Qwen3_5ForConditionalGeneration(config), "Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)


def build_qwen3_5_moe(folder: Path) -> None:
    text = {**_TEXT_3_5, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}
    config = Qwen3_5MoeConfig(text_config=text, vision_config=_VISION_3_5, **_IDS)
    _write(folder, Qwen3_5MoeForConditionalGeneration(config), "Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)


def build_qwen3_vl_moe(folder: Path) -> None:
    text = {**_TEXT_3, **EXPERTS, "num_experts": 4}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_VISION_3, **_IDS)
    _write(folder, Qwen3VLMoeForConditionalGeneration(config), "Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16)
    # Its checkpoints hold experts as [experts, inputs, outputs]; transformers reads them, but writes the transpose.
    weights = load_file(folder / "model.safetensors")
    weights |= {name: weight.mT.contiguous() for name, weight in weights.items() if ".experts." in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write(folder: Path, model: Any, processor: str, video_processor: str, patch_size: int) -> None:
    spread(model, model.model.language_model, model.lm_head, _SPECIAL)
    model.save_pretrained(folder)
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    write_tokenizer(folder, _SPECIAL, _CHAT, processor_class=processor, **tokens)
    common = {"processor_class": processor, "patch_size": patch_size, "temporal_patch_size": 2, "merge_size": 2, **HALF}
    image = {"image_processor_type": "Qwen2VLImageProcessorFast"}
    image["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    video = {"video_processor_type": video_processor, "do_sample_frames": False, "fps": 2}
    video["size"] = {"shortest_edge": 4096, "longest_edge": 25165824}
    write_json(folder / "preprocessor_config.json", {**common, **image})
    write_json(folder / "video_preprocessor_config.json", {**common, **video})
