"""VideoChat-Flash: transformers' VideoMAE as the tower, and a merging that walks the pairs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    VideoMAEConfig,
    VideoMAEModel,
)
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from references.prompt import Prompt, Reference, below, tensors

MUTANTS = (
    "frames of a clip reversed",
    "clips reversed",
    "another hidden state",
    "unweighted mean",
    "rows and columns swapped",
    "halves paired",
    "heads not averaged",
    "other rounds",
    "positions of one frame",
    "no sentence about time",
)
TRAINED = 14
CLIP, TOKENS = 4, 64
TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "tie_word_embeddings",
)


class VideoChatFlash(Reference):
    video_token = "<video>"

    def __init__(self, folder: Path, mutant: str = "", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, mutant, dtype)
        self.config = config = json.loads((folder / "config.json").read_text())
        # As it is: the automatic one would ask whether it may run the code that the configuration names.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        weights = tensors(folder)
        vision = config["vision_config"]
        language = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
        language = {name: weight for name, weight in language.items() if "mm_projector" not in name}
        self.language = self.load(Qwen2ForCausalLM(Qwen2Config(**{name: config[name] for name in TEXT})), language)
        blocks = vision["num_hidden_layers"] + 1 + config["mm_vision_select_layer"]
        self.tower = videomae(below(weights, "model.vision_tower.vision_tower.encoder."), vision, blocks)
        if mutant == "another hidden state":
            del self.tower.encoder.layer[-1]
        self.tower.to(dtype)
        self.heads, self.side = vision["num_attention_heads"], vision["image_size"] // 16
        width, hidden = vision["hidden_size"], config["hidden_size"]
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.load(self.projector, below(weights, "model.mm_projector.mlp."))
        self.pixels = SiglipImageProcessor(
            size={"height": vision["image_size"], "width": vision["image_size"]},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
            resample=3,
        )

    @torch.no_grad()
    def states(self, frames: list[np.ndarray]) -> torch.Tensor:
        """Patches of a clip, frame by frame, row by row: [patches, width]."""
        pixels = self.pixels(images=frames, return_tensors="pt")["pixel_values"].to(self.dtype)
        if self.mutant == "frames of a clip reversed":
            pixels = pixels.flip(0)
        if self.mutant == "rows and columns swapped":
            pixels = pixels.transpose(2, 3)
        table = positions(len(frames), self.side, self.tower.config.hidden_size)
        if self.mutant == "positions of one frame":
            table = table[: self.side**2].repeat(len(frames), 1)
        self.tower.embeddings.position_embeddings = table[None]
        return self.tower(pixels[None]).last_hidden_state[0]

    def clip(self, frames: list[np.ndarray]) -> torch.Tensor:
        """Tokens of a clip: [64, hidden]."""
        with torch.no_grad():
            return self.projector(merged(self.states(frames), TOKENS, self.heads, self.mutant)[0])

    def image(self, prompt: Prompt, pixels: np.ndarray) -> None:
        prompt.medium(self.clip([pixels]))
        prompt.behind = "\n"

    def video(self, prompt: Prompt, video: Any) -> None:
        chosen = sampled(len(video), video.avg_fps)
        frames = [np.asarray(video[index]) for index in chosen]
        clips = [self.clip(frames[first : first + CLIP]) for first in range(0, len(frames), CLIP)]
        if self.mutant == "clips reversed":
            clips.reverse()
        for clip in clips:
            prompt.medium(clip)
        seconds = len(video) / video.avg_fps
        prompt.behind = f"\nThe video lasts for {seconds:.2f} seconds, and {len(frames)} frames are uniformly sampled"
        prompt.behind += " from it. "
        if self.mutant == "no sentence about time":
            prompt.behind = "\n"


def videomae(weights: dict[str, torch.Tensor], vision: dict[str, Any], blocks: int) -> VideoMAEModel:
    """UMT's weights in transformers' model."""
    config = VideoMAEConfig(
        image_size=vision["image_size"],
        patch_size=16,
        num_frames=CLIP,
        tubelet_size=1,
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_hidden_layers=blocks,
        num_attention_heads=vision["num_attention_heads"],
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
    )
    tower = VideoMAEModel(config)
    tower.layernorm.eps = 1e-12
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "vision_layernorm": "layernorm",
    }
    for number in range(blocks):
        names |= {
            f"blocks.{number}.{theirs}": f"encoder.layer.{number}.{ours}"
            for theirs, ours in {
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "attn.proj": "attention.output.dense",
                "mlp.fc1": "intermediate.dense",
                "mlp.fc2": "output.dense",
            }.items()
        }
    state = {
        f"{ours}.{end}": weights[f"{theirs}.{end}"] for theirs, ours in names.items() for end in ("weight", "bias")
    }
    for number in range(blocks):
        attention = f"encoder.layer.{number}.attention.attention"
        matrices = weights[f"blocks.{number}.attn.qkv.weight"].chunk(3)
        for part, matrix in zip(("query", "key", "value"), matrices, strict=True):
            state[f"{attention}.{part}.weight"] = matrix
        state[f"{attention}.query.bias"] = weights[f"blocks.{number}.attn.q_bias"]
        state[f"{attention}.value.bias"] = weights[f"blocks.{number}.attn.v_bias"]
    tower.load_state_dict(state)
    return tower.eval()


def positions(frames: int, side: int, width: int) -> torch.Tensor:
    """The trained table of 4 x 14 x 14 places, its first frames made larger or smaller one by one."""
    table = get_sinusoid_encoding_table(CLIP * TRAINED * TRAINED, width)[0].double().numpy()
    table = table.reshape(CLIP, TRAINED, TRAINED, width)[:frames]
    if side != TRAINED:
        lines = np.array([bicubic(place, side, TRAINED) for place in range(side)])
        table = np.einsum("ip,jq,tpqc->tijc", lines, lines, table)
    return torch.from_numpy(table.reshape(frames * side * side, width).astype(np.float32))


def bicubic(place: int, to: int, of: int) -> list[float]:
    """How much each of `of` samples counts for one of `to`: Keys' cubic with -3/4, the outermost samples repeated."""
    a, weights = -0.75, [0.0] * of
    centre = (place + 0.5) * of / to - 0.5
    for sample in range(math.floor(centre) - 1, math.floor(centre) + 3):
        far = abs(centre - sample)
        near = (a + 2) * far**3 - (a + 3) * far**2 + 1
        weight = near if far <= 1 else a * far**3 - 5 * a * far**2 + 8 * a * far - 4 * a
        weights[min(max(sample, 0), of - 1)] += weight
    return weights


def merged(
    states: torch.Tensor, target: int, heads: int, mutant: str = ""
) -> tuple[torch.Tensor, list[list[tuple[int, int]]]]:
    """Tokens [target, width], and by round the pairs that were merged, the most alike first."""
    tokens, sizes = list(states), [1] * len(states)
    history = []
    while len(tokens) > target:
        last = len(tokens) - target <= len(tokens) // 2
        count = len(tokens) - target if last else len(tokens) // 2
        if mutant == "other rounds":
            count = min(len(tokens) - target, len(tokens) // 3)
        directions = []
        for token in tokens:
            mean = token if mutant == "heads not averaged" else token.reshape(heads, -1).mean(0)
            directions.append(mean / mean.norm())
        even, odd = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
        if mutant == "halves paired":
            even, odd = list(range(len(even))), list(range(len(even), len(tokens)))
        table = torch.stack([directions[one] for one in even]) @ torch.stack([directions[one] for one in odd]).T
        best = []
        for one, likeness in zip(even, table.tolist(), strict=True):
            best.append((max(likeness), one, odd[likeness.index(max(likeness))]))
        best.sort(key=lambda pair: -pair[0])
        pairs = [(one, other) for _, one, other in best[:count]]
        history.append(pairs)
        for one, other in pairs:
            total = sizes[one] + sizes[other]
            left, right = (1, 1) if mutant == "unweighted mean" else (sizes[one], sizes[other])
            tokens[other] = (tokens[one] * left + tokens[other] * right) / (left + right)
            sizes[other] = total
        keep = [one for _, one, _ in best[count:]] + odd
        tokens, sizes = [tokens[index] for index in keep], [sizes[index] for index in keep]
    return torch.stack(tokens), history


def sampled(count: int, rate: float, most: int = 512) -> list[int]:
    """A frame a second, at least 64, in whole clips; from the middles of equal parts."""
    wanted = max(64, math.floor(count / rate / CLIP) * CLIP)
    wanted = max(CLIP, min(wanted, most - most % CLIP, count - count % CLIP))
    parts = min(wanted, count)
    step = count / parts  # in floating point, where a whole number may come out a little smaller, as the authors do
    ends = [*(math.floor(part * step) for part in range(parts)), count]
    chosen = [(ends[part] + ends[part + 1] - 1) // 2 for part in range(parts)]
    return chosen + [chosen[-1]] * (wanted - parts)
