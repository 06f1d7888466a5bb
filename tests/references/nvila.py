"""NVILA: SigLIP's last state but one three times over, two by two patches to a token; Lite: once, three by three."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from references.prompt import below, tensors
from references.vila import Vila, square_pixels

FRAMES = 24


class Nvila(Vila):
    def __init__(self, folder: Path, mutant: str = "", dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.mutant, self.dtype = folder, mutant, dtype
        config = json.loads((folder / "config.json").read_text())
        self.config = {"num_video_frames": FRAMES}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        weights = tensors(folder)
        text, vision = config["text_config"], config["vision_config"]
        self.language = self.load(Qwen2ForCausalLM(Qwen2Config(**text)), below(weights, "llm."))
        tower = SiglipVisionModel(SiglipVisionConfig(**vision))
        self.tower = self.load(tower, below(weights, "vision_tower.vision_model."))
        self.block, self.copies = (3, 1) if config["model_type"] == "nvila_lite" else (2, 3)
        own = below(weights, "mm_projector.layers.")
        layers: list[nn.Module] = []
        for number in range(1, max(int(name.split(".")[0]) for name in own) + 1):
            weight = own.get(f"{number}.weight")
            if weight is None:
                layers.append(nn.GELU())
            else:
                layer = nn.LayerNorm(len(weight)) if weight.dim() == 1 else nn.Linear(weight.shape[1], weight.shape[0])
                layers.append(self.load(layer, below(own, f"{number}.")))
        self.projector = nn.Sequential(*layers)
        self.pixels = square_pixels(vision["image_size"])
