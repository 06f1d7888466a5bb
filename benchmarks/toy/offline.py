"""The toy model in transformers: queries, keys and values of every layer for one video, without a server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.toy.serving import CHECKPOINT

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.toy.scenes import Scene

_PATCH = 14
_FRAMES_AT_A_TIME = 32


@dataclass(frozen=True)
class Layer:
    """One layer's operands after the rotary embedding: query [tokens, H, D], key and value [tokens, KV heads, D]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Prefill:
    """A densely prefilled video: its first token, tokens of the prompt, and each layer's operands in fp32."""

    first: int
    length: int
    layers: list[Layer]


@torch.inference_mode()
def prefill(scene: Scene, frames: np.ndarray) -> Prefill:
    """Prefills a scene's prompt up to the end of the video with dense attention, positions as SGLang counts them."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    layers: list[Layer] = []

    def attention(
        _: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any, scaling: float, **___: Any
    ) -> Any:
        layers.append(Layer(*(x[0].transpose(0, 1) for x in (q, k, v)), scaling))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("captured", attention)
    language = model.model.language_model
    language.config._attn_implementation = "captured"

    before, after = (
        torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        for text in ("<|im_start|>user\n<|vision_start|>", "<|vision_end|>")
    )
    embed = language.embed_tokens
    embeddings = torch.cat([embed(before), _embed(model, scene, frames), embed(after)])
    place = torch.stack(torch.unravel_index(torch.arange(scene.tokens), scene.colours.shape)) + len(before)
    behind = torch.arange(len(after)) + place.max() + 1
    positions = torch.cat([torch.arange(len(before)).expand(3, -1), place, behind.expand(3, -1)], dim=1)
    language(inputs_embeds=embeddings[None], position_ids=positions[:, None], use_cache=False)
    return Prefill(len(before), len(embeddings), layers)


def _embed(model: Any, scene: Scene, frames: np.ndarray) -> torch.Tensor:
    """Visual tokens [tokens, hidden size]; the tower sees no farther than a tile, so parts can be embedded alone."""
    settings = json.loads((CHECKPOINT / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[name]) for name in ("image_mean", "image_std"))
    _, rows, cols = scene.colours.shape
    parts = []
    for some in torch.from_numpy(frames).split(_FRAMES_AT_A_TIME):
        patches = ((some.float() / 255 - mean) / std).view(-1, 2, rows, 2, _PATCH, cols, 2, _PATCH, 3)
        patches = patches.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * _PATCH * _PATCH)
        grid = torch.tensor([[len(some) // 2, 2 * rows, 2 * cols]])
        parts.append(model.model.visual(patches, grid_thw=grid).pooler_output)
    return torch.cat(parts)
