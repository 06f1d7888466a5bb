"""VideoChat-Flash in its own file layout: 9 x 9 patches a frame, 324 or 81 of them merged to 64 tokens.

The language model's fields are flat, and the tower's weights end with the block that is read, as in published files;
`vision_config` is not in those.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tiny_models.parts import TEXT, chat_template, spread, write_json, write_tokenizer

PATCH, SIDE, WIDTH, LAYERS = 16, 9, 64, 3


def build(folder: Path) -> None:
    text = {**TEXT, "rope_theta": 1e6, "use_sliding_window": False}
    language = Qwen2ForCausalLM(Qwen2Config(**text))
    hidden = TEXT["hidden_size"]
    encoder = tower(WIDTH, 2 * WIDTH, LAYERS - 1)
    mlp = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    spread(nn.ModuleList([language, encoder, mlp]), language.model, language.lm_head, ())
    weights = language.state_dict()
    weights |= {f"model.vision_tower.vision_tower.encoder.{name}": w for name, w in encoder.state_dict().items()}
    weights |= {f"model.mm_projector.mlp.{name}": w for name, w in mlp.state_dict().items()}
    own = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, (), chat_template(""))
    root = {
        "architectures": ["VideoChatFlashQwenForCausalLM"],
        "model_type": "videochat_flash_qwen",
        "auto_map": {"AutoConfig": "modeling_videochat_flash.VideoChatFlashQwenConfig"},
        "torch_dtype": "float32",
        **text,
        "mm_vision_tower": "umt-hd-large",
        "mm_vision_select_layer": -2,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "tome16_mlp_hd64",
        "mm_local_num_frames": 4,
        "mm_patch_merge_type": "spatial_nopad",
        "mm_newline_position": "nothing",
        "mm_llm_compress": False,
        "frame_aspect_ratio": "square",
        "image_aspect_ratio": "anyres_nopad",
        "vision_encode_type": "video_image",
        "vision_config": {
            "image_size": PATCH * SIDE,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
        },
    }
    write_json(folder / "config.json", root)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))


def tower(width: int, inner: int, blocks: int) -> nn.Module:
    """Weights by the names of the published files; it computes nothing."""

    def block() -> nn.ModuleDict:
        mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        norms = {"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width)}
        return nn.ModuleDict({**norms, "attn": _Attention(width), "mlp": mlp})

    parts = {
        "patch_embed": nn.ModuleDict({"proj": nn.Conv3d(3, width, (1, PATCH, PATCH))}),
        "blocks": nn.ModuleList(block() for _ in range(blocks)),
        "vision_layernorm": nn.LayerNorm(width),
    }
    return nn.ModuleDict(parts)
