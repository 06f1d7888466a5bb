"""Gemma 3: two sliding and two full layers in turn, a SigLIP tower, 12x12 tokens per image."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, SiglipVisionConfig, SiglipVisionModel

from tiny_models.parts import HALF, TEXT, chat_template, ids_of, spread, write_json, write_tokenizer

_SPECIAL = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
_ID = ids_of(_SPECIAL)
_CHAT = chat_template("<start_of_image>")
_IMAGE, _PATCH, _WIDTH, _TOKENS = 336, 14, 64, 144
_WINDOW = 200


def build(folder: Path) -> None:
    ropes = {"sliding_attention": 1e4, "full_attention": 1e6}
    text = {
        **TEXT,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": _WINDOW,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": base} for kind, base in ropes.items()},
    }
    language = Gemma3ForCausalLM(Gemma3TextConfig(**text))
    spread(language, language.model, language.lm_head, _SPECIAL)
    # The model multiplies embeddings by the root of their size.
    language.model.embed_tokens.weight.data /= math.sqrt(TEXT["hidden_size"])
    for layer in language.model.layers:
        layer.post_feedforward_layernorm.weight.data.fill_(-0.7)
    vision = {"hidden_size": _WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": _IMAGE, "patch_size": _PATCH, "vision_use_head": False}
    tower = SiglipVisionModel(SiglipVisionConfig(**vision))
    weights = {f"language_model.{name}": weight for name, weight in language.state_dict().items()}
    weights |= {f"vision_tower.vision_model.{name}": weight for name, weight in tower.state_dict().items()}
    weights["multi_modal_projector.mm_input_projection_weight"] = torch.randn(_WIDTH, TEXT["hidden_size"]) / 8
    weights["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(_WIDTH)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    names = {"boi_token": _SPECIAL[0], "image_token": _SPECIAL[1], "eoi_token": _SPECIAL[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "Gemma3Processor"}
    write_tokenizer(folder, _SPECIAL, _CHAT, **settings, extra_special_tokens=names, **names)
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "torch_dtype": "float32",
        "boi_token_index": _ID["<start_of_image>"],
        "image_token_index": _ID["<image_soft_token>"],
        "eoi_token_index": _ID["<end_of_image>"],
        "mm_tokens_per_image": _TOKENS,
        "tie_word_embeddings": False,
        "text_config": {"model_type": "gemma3_text", **text},
        "vision_config": {"model_type": "siglip_vision_model", **vision},
    }
    write_json(folder / "config.json", config)
    image = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor", **HALF}
    write_json(folder / "preprocessor_config.json", {**image, "size": {"height": _IMAGE, "width": _IMAGE}})
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": _TOKENS}
    write_json(folder / "processor_config.json", processor)
