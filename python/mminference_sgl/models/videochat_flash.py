"""VideoChat-Flash: UMT, the patches of a clip of four frames merged to 64 tokens, Qwen2.

Facts: OpenGVLab/VideoChat-Flash ``llava/model/llava_arch.py``,
``llava/model/multimodal_projector/tome16_mlp_hd64.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem
from torch import nn

from mminference_sgl.models import umt
from mminference_sgl.models.token_merging import merge
from mminference_sgl.models.umt import UmtTower
from mminference_sgl.models.video_language import VideoLanguageModel

_TOWER, _PROJECTOR = "model.vision_tower.vision_tower.encoder.", "model.mm_projector."
CLIPS_AT_A_TIME = 4
"""At 28 x 28 patches a frame, states of width 1024 are 26 MB in bf16, and the merging needs about 300 MB in fp32."""


class _Projector(nn.Module):
    """Merges tokens; then linear, GELU, linear."""

    def __init__(self, width: int, hidden: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp(merge(states, self.tokens, self.heads))  # type: ignore[no-any-return]


class VideoChatFlashQwenForCausalLM(VideoLanguageModel):
    """The name of the published checkpoints."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config, quant_config, prefix, language_prefix="")
        vision = config.vision_config
        self.vision_tower = UmtTower(vision, config.mm_vision_select_layer)
        self.mm_projector = _Projector(
            vision.hidden_size, config.text_config.hidden_size, vision.num_attention_heads, config.clip_tokens
        )

    def encode(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Clips uint8 [n, T, 3, H, W] of each, T 4 or of an image 1 -> [n * 64, hidden size]."""
        clips = [clip for item in items for clip in item.feature.split(1)]
        batches = (torch.cat(clips[at : at + CLIPS_AT_A_TIME]) for at in range(0, len(clips), CLIPS_AT_A_TIME))
        return torch.cat([self.mm_projector(self.vision_tower(batch)) for batch in batches]).flatten(0, 1)

    @classmethod
    def parameter_of(cls, config: Any, name: str) -> str | None:
        """See :class:`VideoLanguageModel`."""
        read = umt.blocks_read(config.vision_config, config.mm_vision_select_layer)
        for theirs, ours in ((_TOWER, "vision_tower."), (_PROJECTOR, "mm_projector.")):
            if name.startswith(theirs):
                rest = name.removeprefix(theirs)
                known = umt.parameter_of(rest, read) if theirs == _TOWER else rest
                return known and f"{ours}{known}"
        return None

    @classmethod
    def tensors(cls, config: Any) -> dict[str, torch.Size]:
        """See :class:`VideoLanguageModel`."""
        with torch.device("meta"):
            projector = _Projector(config.vision_config.hidden_size, config.text_config.hidden_size, 1, 1).state_dict()
        return {f"{_TOWER}{name}": shape for name, shape in umt.tensors(config.vision_config).items()} | {
            f"{_PROJECTOR}{name}": weight.shape for name, weight in projector.items()
        }


EntryClass = VideoChatFlashQwenForCausalLM
