"""LLaVA-Video as it is published: 13 x 13 patches are 6 x 6 tokens or 7 x 7 in a frame of a video."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tiny_models.parts import TEXT, chat_template, spread, write_json, write_tokenizer
from tiny_models.vila import IMAGE, WIDTH, original, siglip


def build_grid(folder: Path) -> None:
    """Means of four tokens, a newline behind every row."""
    _write(folder, mm_newline_position="grid", mm_spatial_pool_mode="average")


def build_frame(folder: Path) -> None:
    """Shrunk frames, a newline behind each."""
    _write(folder, mm_newline_position="frame", mm_spatial_pool_mode="bilinear")


def _write(folder: Path, **config: str) -> None:
    vision, tower = siglip(IMAGE, WIDTH, 3)
    text = {**TEXT, "rope_theta": 1e6, "rope_scaling": None, "max_window_layers": 2, "use_sliding_window": False}
    language, hidden = Qwen2ForCausalLM(Qwen2Config(**text)), TEXT["hidden_size"]
    projector = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    spread(nn.ModuleList([language, tower, projector]), language.model, language.lm_head, ())
    # The last layer and the head are not published, since nothing reads them.
    read = {
        name: weight
        for name, weight in original(tower).items()
        if not name.startswith(("vision_model.encoder.layers.2.", "vision_model.head."))
    }
    weights = {
        **language.state_dict(),
        **{f"model.vision_tower.vision_tower.{name}": weight for name, weight in read.items()},
        **{f"model.mm_projector.{name}": weight for name, weight in projector.state_dict().items()},
        "model.image_newline": torch.randn(hidden),
    }
    own = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, (), chat_template(""))
    root = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "image_aspect_ratio": "anyres_max_9",
        "mm_hidden_size": WIDTH,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_stride": 2,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "add_faster_video": False,
        "add_time_instruction": True,
        "faster_token_stride": 10,
        "force_sample": True,
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        **text,
        **config,
    }
    write_json(folder / "config.json", root)
