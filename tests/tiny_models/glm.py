"""GLM-4.1V and GLM-4.6V."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
)

from tiny_models.parts import EXPERTS, HALF, TEXT, VISION, chat_template, ids_of, spread, write_json, write_tokenizer

_SPECIAL = (
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)
_ID = ids_of(_SPECIAL)
_CHAT = chat_template(
    "<|begin_of_image|><|image|><|end_of_image|>",
    "<|begin_of_video|><|video|><|end_of_video|>",
)


_IDS = {
    "image_token_id": _ID["<|image|>"],
    "video_token_id": _ID["<|video|>"],
    "image_start_token_id": _ID["<|begin_of_image|>"],
    "image_end_token_id": _ID["<|end_of_image|>"],
    "video_start_token_id": _ID["<|begin_of_video|>"],
    "video_end_token_id": _ID["<|end_of_video|>"],
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
_TEXT = {**TEXT, "rope_parameters": _ROPE, "pad_token_id": 0}
_VISION = {**VISION, "patch_size": 14, "image_size": 336}


def build_4_1v(folder: Path) -> None:
    """A timestamp is a whole number."""
    config = Glm4vConfig(text_config=_TEXT, vision_config=_VISION, **_IDS)
    _write(folder, Glm4vForConditionalGeneration(config), "Glm4v")


def build_4_6v(folder: Path) -> None:
    """Experts behind a dense layer, as in GLM-4.5V; a timestamp is seconds with one decimal and the word for them."""
    text = {**_TEXT, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 32}
    config = Glm4vMoeConfig(text_config=text, vision_config=_VISION, **_IDS)
    _write(folder, Glm4vMoeForConditionalGeneration(config), "Glm46V")


def _write(folder: Path, model: Any, processor: str) -> None:
    spread(model, model.model.language_model, model.lm_head, _SPECIAL)
    model.save_pretrained(folder)
    names = {"processor_class": f"{processor}Processor"}
    write_tokenizer(folder, _SPECIAL, _CHAT, tokenizer_class="PreTrainedTokenizerFast", **names)
    size = {"shortest_edge": 12544, "longest_edge": 9633792}
    common = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "size": size, **names, **HALF}
    image = {"image_processor_type": f"{processor}ImageProcessor"}
    video = {"fps": 2, "max_duration": 300, "do_sample_frames": True}
    video["video_processor_type"] = f"{processor}VideoProcessor"
    write_json(folder / "preprocessor_config.json", {**common, **image})
    write_json(folder / "video_preprocessor_config.json", {**common, **video})
