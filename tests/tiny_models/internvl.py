"""InternVL with a Qwen3 language model, dense and with experts: 8x8 tokens per tile of 448x448 pixels."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tiny_models.parts import EXPERTS, TEXT, chat_template, spread, write_json, write_tokenizer

_SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<|video_pad|>")
_CHAT = chat_template("<image>\n", "<video>\n")
_TEXT = {**TEXT, "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_LAYERS, _WIDTH, _INNER, _PATCH, _SIDE = 2, 64, 128, 28, 16


def build_dense(folder: Path) -> None:
    _build(folder, Qwen3ForCausalLM(Qwen3Config(**_TEXT)))


def build_moe(folder: Path) -> None:
    _build(folder, Qwen3MoeForCausalLM(Qwen3MoeConfig(**_TEXT, **EXPERTS, num_experts=4)))


def _build(folder: Path, language: PreTrainedModel) -> None:
    spread(language, language.model, language.lm_head, _SPECIAL)
    # Saved by itself first: that is where its layers' experts become tensors of their own, as in checkpoints.
    language.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    weights = {f"language_model.{name}": weight for name, weight in saved.items()}
    save_file(weights | _vision() | _projector(), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, _SPECIAL, _CHAT)
    write_json(folder / "config.json", _config(language.config.to_dict()))


def _config(language: dict[str, object]) -> dict[str, object]:
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_attention_heads": 4,
        "num_hidden_layers": _LAYERS,
        "image_size": _PATCH * _SIDE,
        "patch_size": _PATCH,
        "qk_normalization": False,
        "qkv_bias": True,
        "norm_type": "layer_norm",
        "num_channels": 3,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "torch_dtype": "float32",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": _PATCH * _SIDE,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "vision_config": vision,
        "llm_config": language,
    }


def _vision() -> dict[str, torch.Tensor]:
    """The vision tower, for which transformers has no class of this layout."""
    embeddings = {
        "class_embedding": _normal(1, 1, _WIDTH),
        "position_embedding": _normal(1, _SIDE * _SIDE + 1, _WIDTH),
        "patch_embedding.weight": _normal(_WIDTH, 3, _PATCH, _PATCH),
        "patch_embedding.bias": _bias(_WIDTH),
    }
    weights = {f"vision_model.embeddings.{name}": weight for name, weight in embeddings.items()}
    linears = {
        "attn.qkv": (3 * _WIDTH, _WIDTH),
        "attn.proj": (_WIDTH, _WIDTH),
        "mlp.fc1": (_INNER, _WIDTH),
        "mlp.fc2": (_WIDTH, _INNER),
    }
    for layer in range(_LAYERS):
        prefix = f"vision_model.encoder.layers.{layer}."
        for name, (rows, columns) in linears.items():
            weights |= {f"{prefix}{name}.weight": _normal(rows, columns), f"{prefix}{name}.bias": _bias(rows)}
        for name in ("norm1", "norm2"):
            weights |= {f"{prefix}{name}.weight": torch.ones(_WIDTH), f"{prefix}{name}.bias": _bias(_WIDTH)}
        weights |= {f"{prefix}ls1": torch.ones(_WIDTH), f"{prefix}ls2": torch.ones(_WIDTH)}
    return weights


def _projector() -> dict[str, torch.Tensor]:
    """From four neighbouring patches to a token."""
    joined, hidden = 4 * _WIDTH, TEXT["hidden_size"]
    return {
        "mlp1.0.weight": torch.ones(joined),
        "mlp1.0.bias": _bias(joined),
        "mlp1.1.weight": _normal(hidden, joined),
        "mlp1.1.bias": _bias(hidden),
        "mlp1.3.weight": _normal(hidden, hidden),
        "mlp1.3.bias": _bias(hidden),
    }


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]) if len(shape) != 3 else 1)


def _bias(size: int) -> torch.Tensor:
    return torch.randn(size) / 10
