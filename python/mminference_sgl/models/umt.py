"""UMT: a vision transformer in which the patches of all frames of a clip attend to each other.

Facts: OpenGVLab/VideoChat-Flash ``llava/model/multimodal_encoder/umt/vit.py``. The same computation is transformers'
``VideoMAEModel`` with tubelets of one frame, another table of positions and another epsilon of the last norm; the tests
compare the two. Modules are named as in the checkpoints.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn import functional
from transformers import VideoMAEConfig

TABLE = (4, 14, 14)
"""Frames, rows and columns of the positions that UMT was trained with."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def positions(frames: int, side: int, width: int) -> torch.Tensor:
    """Table of positions of the first frames of a clip, fp32 [frames * side * side, width].

    Sines at even channels and cosines at odd ones, of the place's number among all places of a clip. Another side than
    the table's own: bicubic, frame by frame.
    """
    if frames > TABLE[0]:
        raise ValueError(f"{frames} frames are more than a clip's {TABLE[0]}")
    place = torch.arange(frames * TABLE[1] * TABLE[2], dtype=torch.float64)[:, None]
    angle = place / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].float()
    if side != TABLE[1]:
        grid = table.view(frames, *TABLE[1:], width).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
        table = grid.permute(0, 2, 3, 1).reshape(frames * side * side, width)
    return table


class _Attention(nn.Module):
    """Queries and values have a bias, keys have none."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        mixed = functional.linear(states, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(states)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, config: VideoMAEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.attn = _Attention(width, config.num_attention_heads)
        self.mlp = _Mlp(width, config.intermediate_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states + self.attn(self.norm1(states))
        return states + self.mlp(self.norm2(states))  # type: ignore[no-any-return]


class _Patches(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))


class UmtTower(nn.Module):
    """UMT without the blocks behind the one that is read.

    ``select``: the block whose output is read, from the end: -1 is the last, -2 the one before. The last norm stands
    behind it.
    """

    def __init__(self, config: VideoMAEConfig, select: int) -> None:
        super().__init__()
        width = config.hidden_size
        patch, size = (of if isinstance(of, int) else of[0] for of in (config.patch_size, config.image_size))
        self.side = size // patch
        self.patch_embed = _Patches(width, patch)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(blocks_read(config, select)))
        self.vision_layernorm = nn.LayerNorm(width, eps=1e-12)
        self._tables: dict[int, torch.Tensor] = {}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Clips uint8 [n, T, 3, H, W], T 4 or of an image 1 -> states [n, T * patches of a frame, width]."""
        weight = self.patch_embed.proj.weight
        mean, deviation = (weight.new_tensor(of, dtype=torch.float32)[:, None, None] * 255 for of in (MEAN, DEVIATION))
        scaled = pixels.to(weight.device, torch.float32).sub_(mean).div_(deviation).to(weight.dtype)
        states = self.patch_embed.proj(scaled.transpose(1, 2)).flatten(2).transpose(1, 2)
        states = states + self._table(pixels.shape[1], states)
        for block in self.blocks:
            states = block(states)
        return self.vision_layernorm(states)  # type: ignore[no-any-return]

    def _table(self, frames: int, like: torch.Tensor) -> torch.Tensor:
        # No buffer: the loader of a model may leave those that are not in the checkpoint unset.
        known = self._tables.get(frames)
        if known is None or known.device != like.device or known.dtype != like.dtype:
            known = positions(frames, self.side, like.shape[-1]).to(like)
            self._tables[frames] = known
        return known


def blocks_read(config: VideoMAEConfig, select: int) -> int:
    """Blocks up to the one whose output is read."""
    return int(config.num_hidden_layers) + 1 + select


def parameter_of(name: str, blocks: int) -> str:
    """The parameter of a tower of so many blocks that a whole tower's weight sets; "" if it is behind them."""
    block = re.match(r"blocks\.(\d+)\.", name)
    return "" if block is not None and int(block[1]) >= blocks else name


def tensors(config: VideoMAEConfig) -> dict[str, torch.Size]:
    """Names and shapes of a whole tower as published."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in UmtTower(config, -1).state_dict().items()}
