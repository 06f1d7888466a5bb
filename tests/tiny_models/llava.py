"""LLaVA-OneVision: Qwen2 and a SigLIP tower of 13x13 patches, which are 7x7 tokens in a frame of a video."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tiny_models.parts import HALF, TEXT, chat_template, ids_of, spread, write_json, write_tokenizer

_SPECIAL = ("<image>",)
_CHAT = chat_template("<image>\n")
_IMAGE, _PATCH, _WIDTH = 182, 14, 64


def build(folder: Path) -> None:
    # SGLang tells the kind of tower by its name.
    tower = folder / "siglip"
    vision = {"hidden_size": _WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": _IMAGE, "patch_size": _PATCH}
    SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(tower)
    text = {**TEXT, "rope_theta": 1e6, "max_window_layers": 2, "use_sliding_window": False}
    language = Qwen2ForCausalLM(Qwen2Config(**text))
    spread(language, language.model, language.lm_head, _SPECIAL)
    hidden = TEXT["hidden_size"]
    weights = language.state_dict() | {
        "model.mm_projector.0.weight": torch.randn(hidden, _WIDTH) / _WIDTH**0.5,
        "model.mm_projector.0.bias": torch.randn(hidden) / 10,
        "model.mm_projector.2.weight": torch.randn(hidden, hidden) / hidden**0.5,
        "model.mm_projector.2.bias": torch.randn(hidden) / 10,
        "model.image_newline": torch.randn(hidden),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, _SPECIAL, _CHAT, processor_class="LlavaProcessor")
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "torch_dtype": "float16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "mm_hidden_size": _WIDTH,
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[_IMAGE * rows, _IMAGE * columns] for rows in range(1, 7) for columns in range(1, 7)],
        "image_token_index": ids_of(_SPECIAL)["<image>"],
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        **text,
    }
    write_json(folder / "config.json", config)
    image = {"image_processor_type": "SiglipImageProcessor", "processor_class": "LlavaProcessor", "resample": 3}
    image |= {"size": {"height": _IMAGE, "width": _IMAGE}, **HALF}
    write_json(folder / "preprocessor_config.json", image)
    processor = {"processor_class": "LlavaProcessor", "patch_size": _PATCH, "image_token": "<image>"}
    processor |= {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    write_json(folder / "processor_config.json", processor)
