"""LLaVA-Video: SigLIP's last state but one, projected, pooled by index, newlines, and the time instruction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from references.prompt import Prompt, Reference, below, tensors

MUTANTS = (
    "no newline",
    "newline before each row",
    "one column fewer",
    "one newline per frame",
    "one newline at the end",
    "rows and columns swapped",
    "another hidden state",
    "pooled before the projector",
    "frames reversed",
    "no time instruction",
)
_LANGUAGE = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")


class LlavaVideo(Reference):
    frames = 15

    def __init__(self, folder: Path, mutant: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, mutant, dtype)
        self.config = config = json.loads((folder / "config.json").read_text())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        weights = tensors(folder)
        text = {name: value for name, value in config.items() if name in Qwen2Config().to_dict()}
        text = {**text, "rope_theta": config["rope_theta"], "model_type": "qwen2"}
        language = {name: weight for name, weight in weights.items() if name.startswith(_LANGUAGE)}
        self.language = self.load(Qwen2ForCausalLM(Qwen2Config(**text)), language)
        vision = config["vision_config"]
        tower = SiglipVisionModel(SiglipVisionConfig(**vision))
        found = below(weights, "model.vision_tower.vision_tower.vision_model.")
        missing = tower.load_state_dict(found, strict=False)
        assert not missing.unexpected_keys
        assert all(name.startswith(("encoder.layers.2.", "head.")) for name in missing.missing_keys)
        self.tower = tower.to(dtype).eval()
        hidden = config["hidden_size"]
        first, last = nn.Linear(vision["hidden_size"], hidden), nn.Linear(hidden, hidden)
        self.load(first, below(weights, "model.mm_projector.0."))
        self.load(last, below(weights, "model.mm_projector.2."))
        self.projector = nn.Sequential(first, nn.GELU(), last)
        self.newline = weights["model.image_newline"].to(dtype)
        size = {"height": vision["image_size"], "width": vision["image_size"]}
        self.pixels = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3)

    def states(self, picture: np.ndarray) -> list[list[torch.Tensor]]:
        """By row and column."""
        pixels = self.pixels(images=[picture], return_tensors="pt")["pixel_values"].to(self.dtype)
        which = -3 if self.mutant == "another hidden state" else -2
        states = self.tower(pixels, output_hidden_states=True).hidden_states[which][0]
        side = math.isqrt(len(states))
        return [[states[row * side + column] for column in range(side)] for row in range(side)]

    def pool(self, tokens: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        side = len(tokens)
        if self.config["mm_spatial_pool_mode"] == "average":
            half = side // 2
            four = [(0, 0), (0, 1), (1, 0), (1, 1)]
            return [
                [sum(tokens[2 * row + r][2 * column + c] for r, c in four) / 4 for column in range(half)]
                for row in range(half)
            ]
        # Between the two nearest tokens of each direction, where the centre of the new token falls.
        half = math.ceil(side / 2)
        places = []
        for index in range(half):
            centre = min(max((index + 0.5) * side / half - 0.5, 0), side - 1)
            low = min(int(centre), side - 2)
            places.append((low, centre - low))
        found = []
        for low_row, right in places:
            row = []
            for low, share in places:
                upper = tokens[low_row][low] * (1 - share) + tokens[low_row][low + 1] * share
                lower = tokens[low_row + 1][low] * (1 - share) + tokens[low_row + 1][low + 1] * share
                row.append(upper * (1 - right) + lower * right)
            found.append(row)
        return found

    @torch.no_grad()
    def frame(self, picture: np.ndarray, last: bool) -> torch.Tensor:
        """A frame of a video: [tokens, hidden]."""
        grid = self.states(picture)
        if self.mutant == "pooled before the projector":
            grid = [[self.projector(one) for one in row] for row in self.pool(grid)]
        else:
            grid = self.pool([[self.projector(one) for one in row] for row in grid])
        if self.mutant == "rows and columns swapped":
            grid = [list(column) for column in zip(*grid, strict=True)]
        if self.mutant == "one column fewer":
            grid = [row[:-1] for row in grid]
        where = {
            "no newline": "no_token",
            "one newline per frame": "frame",
            "one newline at the end": "one_token",
        }.get(self.mutant, self.config["mm_newline_position"])
        tokens = []
        for row in grid:
            if where != "grid":
                tokens += row
            elif self.mutant == "newline before each row":
                tokens += [self.newline, *row]
            else:
                tokens += [*row, self.newline]
        if where == "frame" or (where == "one_token" and last):
            tokens.append(self.newline)
        return torch.stack(tokens)

    @torch.no_grad()
    def image(self, prompt: Prompt, pixels: np.ndarray) -> None:
        height, width = pixels.shape[:2]
        side = max(height, width)
        square = np.full((side, side, 3), 127, np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        tokens = [self.projector(one) for row in self.states(square) for one in row]
        prompt.medium(torch.stack([*tokens, self.newline]))
        prompt.text(self.tokenizer.encode("\n", add_special_tokens=False))

    def video(self, prompt: Prompt, video: Any) -> None:
        count, rate = len(video), video.avg_fps
        chosen = [int(index * (count - 1) / (self.frames - 1)) for index in range(self.frames)]
        shown = chosen[::-1] if self.mutant == "frames reversed" else chosen
        for number, index in enumerate(shown, 1):
            prompt.medium(self.frame(np.asarray(video[index]), number == self.frames))
        places = ",".join(f"{index / rate:.2f}s" for index in chosen)
        told = (
            f"The video lasts for {count / rate:.2f} seconds, and {self.frames} frames are uniformly sampled from it. "
            f"These frames are located at {places}.Please answer the following questions related to this video."
        )
        told = "" if self.mutant == "no time instruction" else told
        prompt.text(self.tokenizer.encode(f"{told}\n", add_special_tokens=False))


class LlavaVideoMoreFrames(LlavaVideo):
    """More than the shorter of the tests' videos has."""

    frames = 27
