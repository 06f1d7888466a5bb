"""LongVILA in VILA's own file layout: 13 x 13 patches become 7 x 7 tokens and a newline for each frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tiny_models.parts import HALF, TEXT, chat_template, spread, write_json, write_tokenizer

IMAGE, PATCH, WIDTH, FRAMES = 182, 14, 64, 24
_LLAMA_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def build_qwen(folder: Path) -> None:
    """Qwen2, and rotary positions scaled as in the 1M checkpoint."""
    text = {**TEXT, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}, "use_sliding_window": False}
    _write(folder, Qwen2ForCausalLM(Qwen2Config(**text)), "Qwen2ForCausalLM", text, ())


def build_llama(folder: Path) -> None:
    """Llama 3, whose tokenizer puts a begin of text before everything."""
    text = {**TEXT, "rope_theta": 5e5}
    _write(folder, LlamaForCausalLM(LlamaConfig(**text)), "LlamaForCausalLM", text, _LLAMA_SPECIAL)


def build_pooled(folder: Path) -> None:
    """A TSP video encoder, which makes one frame of four, in a checkpoint that brings code of its own."""
    text = {**TEXT, "rope_theta": 1e6, "use_sliding_window": False}
    encoder = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[4, 1, 1]], "end_tokens": "\n"}
    language = Qwen2ForCausalLM(Qwen2Config(**text))
    _write(folder, language, "Qwen2ForCausalLM", text, (), model_type="vila", video_encoder=encoder)


def siglip(image: int, width: int, layers: int, inner: int = 128) -> tuple[dict[str, Any], SiglipVisionModel]:
    """A tower's configuration and a tower with random weights."""
    vision = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": 4, "image_size": image, "patch_size": PATCH}
    return vision, SiglipVisionModel(SiglipVisionConfig(**vision))


def original(tower: nn.Module) -> dict[str, torch.Tensor]:
    """A tower's weights by the names of the published files."""
    return {f"vision_model.{name}": weight for name, weight in tower.state_dict().items()}


def projector(width: int, hidden: int) -> nn.Sequential:
    """Numbered as in the published files, whose first layer has no weights."""
    parts = nn.Identity(), nn.LayerNorm(4 * width), nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden)
    return nn.Sequential(*parts)


def _write(
    folder: Path, language: nn.Module, name: str, text: dict[str, Any], special: tuple[str, ...], **config: Any
) -> None:
    vision, tower = siglip(IMAGE, WIDTH, 3)
    mlp = projector(WIDTH, TEXT["hidden_size"])
    spread(nn.ModuleList([language, tower, mlp]), language.model, language.lm_head, special)
    weights = {
        "llm": language.state_dict(),
        "vision_tower": original(tower),
        "mm_projector": {f"layers.{key}": weight for key, weight in mlp.state_dict().items()},
    }
    for part, tensors in weights.items():
        (folder / part).mkdir(exist_ok=True)
        own = {key: weight.contiguous() for key, weight in tensors.items()}
        save_file(own, folder / part / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder / "llm", special, chat_template(""), **({"bos_token": special[0]} if special else {}))
    write_json(
        folder / "vision_tower" / "preprocessor_config.json", {"size": {"height": IMAGE, "width": IMAGE}, **HALF}
    )
    kind = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}[name]
    root = {
        "architectures": ["VILAForCausalLM" if config.get("model_type") == "vila" else "LlavaLlamaModel"],
        "model_type": "llava_llama",
        "llm_cfg": {"architectures": [name], "model_type": kind, "torch_dtype": "float32", **text},
        "vision_tower_cfg": {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", **vision},
        "mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"},
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "num_video_frames": FRAMES,
        "fps": 0.0,
        **config,
    }
    write_json(folder / "config.json", root)
