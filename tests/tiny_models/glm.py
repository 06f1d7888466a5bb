"""GLM-4.1V."""

from __future__ import annotations

from pathlib import Path

from transformers import Glm4vConfig, Glm4vForConditionalGeneration

from tiny_models.parts import HALF, TEXT, VISION, chat_template, ids_of, spread, write_json, write_tokenizer

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


def build(folder: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    text = {**TEXT, "rope_parameters": rope, "pad_token_id": 0}
    config = Glm4vConfig(
        text_config=text,
        vision_config={**VISION, "patch_size": 14, "image_size": 336},
        image_token_id=_ID["<|image|>"],
        video_token_id=_ID["<|video|>"],
        image_start_token_id=_ID["<|begin_of_image|>"],
        image_end_token_id=_ID["<|end_of_image|>"],
        video_start_token_id=_ID["<|begin_of_video|>"],
        video_end_token_id=_ID["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    model = Glm4vForConditionalGeneration(config)
    spread(model, model.model.language_model, model.lm_head, _SPECIAL)
    model.save_pretrained(folder)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "Glm4vProcessor"}
    write_tokenizer(folder, _SPECIAL, _CHAT, **settings)
    size = {"shortest_edge": 12544, "longest_edge": 9633792}
    common = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "processor_class": "Glm4vProcessor"}
    common |= {"size": size, **HALF}
    image = {"image_processor_type": "Glm4vImageProcessor"}
    video = {"video_processor_type": "Glm4vVideoProcessor", "fps": 2, "max_duration": 300, "do_sample_frames": True}
    write_json(folder / "preprocessor_config.json", {**common, **image})
    write_json(folder / "video_preprocessor_config.json", {**common, **video})
