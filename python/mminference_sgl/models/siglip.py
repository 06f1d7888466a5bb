"""A SigLIP tower whose frames are encoded in batches, up to the layer that the projector reads."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

FRAMES_AT_A_TIME = 32
"""At 27 x 27 patches of width 1152 their states are 54 MB in bf16; all states of a layer hold a few times that."""


class SiglipTower(nn.Module):
    """SigLIP without the layers behind the one that is read.

    ``select``: the hidden state that is read, from the end: -1 is the last layer's, -2 the one before.
    """

    def __init__(self, config: SiglipVisionConfig, select: int) -> None:
        super().__init__()
        shortened = SiglipVisionConfig(**config.to_dict())
        shortened.num_hidden_layers = layers_read(config, select)
        shortened.vision_use_head = False
        self.vision_model = SiglipVisionModel(shortened)
        self.vision_model.post_layernorm = nn.Identity()  # type: ignore[assignment]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels uint8 [T, 3, H, W] -> states [T, patches, width]."""
        weight = next(self.parameters())
        states = []
        for some in pixels.split(FRAMES_AT_A_TIME):
            # Mean and deviation 1/2, as in the preprocessor of every SigLIP.
            scaled = some.to(weight.device, torch.float32).div_(127.5).sub_(1).to(weight.dtype)
            states.append(self.vision_model(scaled).last_hidden_state)
        return torch.cat(states)


def layers_read(config: SiglipVisionConfig, select: int) -> int:
    """Layers up to the hidden state that is read."""
    return int(config.num_hidden_layers) + 1 + select


def parameter_of(name: str, layers: int) -> str:
    """The parameter of a tower of so many layers that a whole tower's weight sets; "" if it is behind them."""
    name = name.removeprefix("vision_model.")
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    behind = layer is not None and int(layer[1]) >= layers
    return "" if behind or name.startswith(("post_layernorm.", "head.")) else f"vision_model.{name}"


def tensors(config: SiglipVisionConfig) -> dict[str, torch.Size]:
    """Names and shapes of a whole tower as published."""
    with torch.device("meta"):
        return {f"vision_model.{name}": weight.shape for name, weight in SiglipVisionModel(config).state_dict().items()}
