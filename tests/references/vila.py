"""LongVILA: SigLIP's last state but one, two by two patches to a token, a newline behind each frame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from references.prompt import Prompt, Reference, below, tensors

MUTANTS = (
    "no newline",
    "rows and columns swapped",
    "another hidden state",
    "frames reversed",
    "one newline at the end",
)


def square_pixels(side: int) -> SiglipImageProcessor:
    """Transformers' preprocessing to a square."""
    size = {"height": side, "width": side}
    return SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)


class Vila(Reference):
    video_token = "<vila/video>"
    block, copies = 2, 1
    """Side of the square of patches that become a token, and how often the channels are repeated."""

    def __init__(self, folder: Path, mutant: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, mutant, dtype)
        self.config = config = json.loads((folder / "config.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        text = config["llm_cfg"]
        kind = {"qwen2": (Qwen2ForCausalLM, Qwen2Config), "llama": (LlamaForCausalLM, LlamaConfig)}[text["model_type"]]
        self.language = self.load(kind[0](kind[1](**text)), tensors(folder / "llm"))
        vision = config["vision_tower_cfg"]
        tower = below(tensors(folder / "vision_tower"), "vision_model.")
        self.tower = self.load(SiglipVisionModel(SiglipVisionConfig(**vision)), tower)
        width, hidden = vision["hidden_size"], text["hidden_size"]
        norm, first, last = nn.LayerNorm(4 * width), nn.Linear(4 * width, hidden), nn.Linear(hidden, hidden)
        weights = tensors(folder / "mm_projector")
        for part, name in ((norm, "layers.1."), (first, "layers.2."), (last, "layers.4.")):
            self.load(part, below(weights, name))
        self.projector = nn.Sequential(norm, first, nn.GELU(), last)
        self.pixels = square_pixels(vision["image_size"])

    @torch.no_grad()
    def frame(self, picture: np.ndarray) -> torch.Tensor:
        """Tokens of a frame, row by row: [side * side, hidden]."""
        pixels = self.pixels(images=[picture], return_tensors="pt")["pixel_values"].to(self.dtype)
        which = -1 if self.mutant == "another hidden state" else -2
        states = self.tower(pixels, output_hidden_states=True).hidden_states[which][0]
        side = round(len(states) ** 0.5)
        nothing = torch.zeros_like(states[0])
        tokens = []
        for row in range(0, side, self.block):
            for column in range(0, side, self.block):
                around = [(row + r, column + c) for r in range(self.block) for c in range(self.block)]
                if self.mutant == "rows and columns swapped":
                    around = [(row + r, column + c) for c in range(self.block) for r in range(self.block)]
                inside = [states[r * side + c] if r < side and c < side else nothing for r, c in around]
                tokens.append(torch.cat([patch.repeat(self.copies) for patch in inside]))
        return self.projector(torch.stack(tokens))

    def newline(self) -> list[int]:
        return list(self.tokenizer.encode("\n", add_special_tokens=False))

    def image(self, prompt: Prompt, pixels: np.ndarray) -> None:
        prompt.medium(self.frame(pixels))
        prompt.text(self.newline())

    def video(self, prompt: Prompt, video: Any) -> None:
        wanted = min(self.config["num_video_frames"], len(video))
        chosen = [round(index * (len(video) - 1) / (wanted - 1)) for index in range(wanted)]
        pool = self.config.get("video_encoder", {"pool_sizes": [[1]]})["pool_sizes"][0][0]
        while len(chosen) % pool:
            chosen.append(chosen[-1])
        frames = [self.frame(np.asarray(video[index])) for index in chosen]
        if self.mutant == "frames reversed":
            frames.reverse()
        for first in range(0, len(frames), pool):
            prompt.medium(torch.stack(frames[first : first + pool]).mean(0))
            last = first + pool >= len(frames)
            if self.mutant != "no newline" and (self.mutant != "one newline at the end" or last):
                prompt.text(self.newline())
