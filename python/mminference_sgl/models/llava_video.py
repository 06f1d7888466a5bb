"""LLaVA-Video: SigLIP's last state but one, two linear layers, frames pooled two by two, newlines, Qwen2.

Facts: LLaVA-VL/LLaVA-NeXT ``llava/model/llava_arch.py``, ``llava/model/multimodal_projector/builder.py``,
``llava/model/multimodal_encoder/siglip_encoder.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from torch import nn
from torch.nn import functional

from mminference_sgl.backend.geometry import SPAN_TAILS
from mminference_sgl.models import siglip
from mminference_sgl.models.siglip import FRAMES_AT_A_TIME, SiglipTower
from mminference_sgl.models.video_language import VideoLanguageModel

_TOWER, _PROJECTOR, _NEWLINE = "model.vision_tower.vision_tower.", "model.mm_projector.", "model.image_newline"


def pooled(frames: torch.Tensor, mode: str) -> torch.Tensor:
    """Two by two tokens to one: [T, side, side, C] -> [T, h, h, C].

    ``average``: the means, without an odd side's last row and column. ``bilinear``: the frame shrunk to half the side,
    rounded up.
    """
    planes = frames.permute(0, 3, 1, 2)
    if mode == "average":
        smaller = functional.avg_pool2d(planes, 2)
    else:
        half = -(-frames.shape[1] // 2)
        smaller = functional.interpolate(planes, size=(half, half), mode="bilinear")
    return smaller.permute(0, 2, 3, 1)


def with_newline_column(frames: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """Every row followed by a newline: [T, rows, columns, C] and [C] -> [T, rows, columns + 1, C]."""
    return torch.cat([frames, newline.expand(*frames.shape[:2], 1, -1)], 2)


def in_line(frames: torch.Tensor, newline: torch.Tensor, tails: list[int]) -> torch.Tensor:
    """Frames [T, rows, columns, C] row by row, each followed by as many newlines as ``tails`` says: [tokens, C]."""
    parts = []
    for frame, tail in zip(frames, tails, strict=True):
        parts += [frame.flatten(0, 1), newline.expand(tail, -1)]
    return torch.cat(parts)


def _projector(config: Any) -> nn.Sequential:
    width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class LlavaVideoModel(VideoLanguageModel):
    """Reads a checkpoint as it is published: one folder, the tuned tower in it."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        config.check()
        super().__init__(config, quant_config, prefix, language_prefix="")
        self.vision_tower = SiglipTower(config.vision_config, config.mm_vision_select_layer)
        self.mm_projector = _projector(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))

    def encode(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Frames or pictures uint8 [n, 3, H, W] of each -> [tokens, hidden size]."""
        pixels = torch.cat([item.feature for item in items])
        tails = [tail for item in items for tail in item.model_specific_data[SPAN_TAILS]]
        of_video = items[0].is_video()
        frames = torch.cat([self._frames(some, of_video=of_video) for some in pixels.split(FRAMES_AT_A_TIME)])
        return in_line(frames, self.image_newline, tails)

    def _frames(self, pixels: torch.Tensor, *, of_video: bool) -> torch.Tensor:
        tokens = self.mm_projector(self.vision_tower(pixels))
        frames = tokens.unflatten(1, (self.config.whole_side, -1))
        if not of_video:
            return frames  # type: ignore[no-any-return]
        smaller = pooled(frames, self.config.mm_spatial_pool_mode)
        return with_newline_column(smaller, self.image_newline) if self.config.newline_column else smaller

    @classmethod
    def parameter_of(cls, config: Any, name: str) -> str | None:
        """See :class:`VideoLanguageModel`."""
        if name.startswith(_TOWER):
            read = siglip.layers_read(config.vision_config, config.mm_vision_select_layer)
            known = siglip.parameter_of(name.removeprefix(_TOWER), read)
            return known and f"vision_tower.{known}"
        return name.removeprefix("model.") if name.startswith((_PROJECTOR, _NEWLINE)) else None

    @classmethod
    def tensors(cls, config: Any) -> dict[str, torch.Size]:
        """See :class:`VideoLanguageModel`."""
        with torch.device("meta"):
            projector = _projector(config).state_dict()
        tower = siglip.tensors(config.vision_config)
        return (
            {f"{_TOWER}{name}": shape for name, shape in tower.items()}
            | {f"{_PROJECTOR}{name}": weight.shape for name, weight in projector.items()}
            | {_NEWLINE: torch.Size([config.text_config.hidden_size])}
        )


EntryClass = [LlavaVideoModel]
