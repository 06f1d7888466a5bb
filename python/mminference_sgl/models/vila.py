"""LongVILA and NVILA in VILA's own file layout: SigLIP, two by two patches to a token, Qwen2 or Llama.

Facts: NVlabs/VILA ``llava/model/multimodal_projector/base_projector.py``, ``llava/model/encoders/video/tsp.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import nn
from torch.nn import functional

from mminference_sgl.models import siglip
from mminference_sgl.models.siglip import FRAMES_AT_A_TIME, SiglipTower
from mminference_sgl.models.video_language import VideoLanguageModel


def two_by_two(states: torch.Tensor) -> torch.Tensor:
    """Patches [T, side * side, C] -> tokens [T, ceil(side / 2) ** 2, 4 C]; odd sides are filled up with zeros.

    The channels of a token are those of its upper left, upper right, lower left and lower right patch.
    """
    frames, patches, width = states.shape
    side = round(patches**0.5)
    grid = functional.pad(states.view(frames, side, side, width), (0, 0, 0, side % 2, 0, side % 2))
    half = grid.shape[1] // 2
    return grid.view(frames, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(frames, half * half, 4 * width)


class _Projector(nn.Module):
    """Norm, linear, GELU, linear; ``layers`` is numbered as in the checkpoints, whose first layer has no weights."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        parts = (
            nn.Identity(),
            nn.LayerNorm(4 * width),
            nn.Linear(4 * width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
        )
        self.layers = nn.Sequential(*parts)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.layers(two_by_two(states))  # type: ignore[no-any-return]


class VilaModel(VideoLanguageModel):
    """Reads the three folders of a checkpoint as they are published."""

    FOLDERS: ClassVar[dict[str, str]] = {"llm": "", "vision_tower": "vision_tower.", "mm_projector": "mm_projector."}
    """Folders of a checkpoint, and what SGLang puts before the names of their weights."""
    allow_patterns_overrides: ClassVar[list[str]] = ["llm/*.safetensors"]

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix, language_prefix="llm")
        self.vision_tower = SiglipTower(config.vision_config, config.mm_vision_select_layer)
        self.mm_projector = _Projector(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.secondary_weights = [
            DefaultModelLoader.Source(
                config._name_or_path,
                None,
                prefix=prefix,
                allow_patterns_overrides=[f"{folder}/*.safetensors"],
            )
            for folder, prefix in self.FOLDERS.items()
            if prefix
        ]

    def encode(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Frames uint8 [n, pool, 3, H, W] of each -> [n * side * side, hidden size]: tokens are means over frames."""
        feature = torch.cat([item.feature for item in items])
        tokens = []
        groups = max(1, FRAMES_AT_A_TIME // feature.shape[1])
        for some in feature.split(groups):
            each = self.mm_projector(self.vision_tower(some.flatten(0, 1)))
            tokens.append(each.view(*some.shape[:2], *each.shape[1:]).mean(1))
        return torch.cat(tokens).flatten(0, 1)

    @classmethod
    def parameter_of(cls, config: Any, name: str) -> str | None:
        """See :class:`VideoLanguageModel`."""
        part, _, rest = name.partition(".")
        if part == "vision_tower":
            read = siglip.layers_read(config.vision_config, config.mm_vision_select_layer)
            known = siglip.parameter_of(rest, read)
            return known and f"vision_tower.{known}"
        return name if part == "mm_projector" else None

    @classmethod
    def tensors(cls, config: Any) -> dict[str, torch.Size]:
        """See :class:`VideoLanguageModel`."""
        with torch.device("meta"):
            projector = _Projector(config.vision_config.hidden_size, config.text_config.hidden_size).state_dict()
        tower = siglip.tensors(config.vision_config)
        return {f"vision_tower.{name}": shape for name, shape in tower.items()} | {
            f"mm_projector.{name}": weight.shape for name, weight in projector.items()
        }


class LlavaLlamaModel(VilaModel):
    """The name of checkpoints of VILA's repository."""


class VILAForCausalLM(VilaModel):
    """The name of checkpoints that bring code of their own."""


EntryClass = [LlavaLlamaModel, VILAForCausalLM]
