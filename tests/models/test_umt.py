"""UMT against transformers' VideoMAE."""

from __future__ import annotations

import pytest
import torch

from mminference_sgl.models import umt
from mminference_sgl.models.configs import VideoChatFlashConfig
from mminference_sgl.models.umt import UmtTower, positions
from references.videochat_flash import positions as reference_positions
from references.videochat_flash import videomae
from tiny_models.videochat_flash import tower

BLOCKS = 3


def config(side: int, width: int = 32) -> VideoChatFlashConfig:
    vision = {"image_size": 16 * side, "hidden_size": width, "intermediate_size": 2 * width}
    return VideoChatFlashConfig(vision_config=vision | {"num_hidden_layers": BLOCKS + 1, "num_attention_heads": 4})


@pytest.mark.parametrize("frames", [4, 1])
@pytest.mark.parametrize("side", [14, 28, 9])
def test_the_same_as_videomae(side: int, frames: int) -> None:
    torch.manual_seed(side)
    weights = {name: torch.randn_like(w) / 4 for name, w in tower(32, 64, BLOCKS).double().state_dict().items()}
    vision = config(side).vision_config
    ours = UmtTower(vision, -2).double()
    ours.load_state_dict(weights)
    theirs = videomae(weights, vision.to_dict(), BLOCKS).double()
    theirs.embeddings.position_embeddings = reference_positions(frames, side, 32)[None]
    pixels = torch.randint(256, (2, frames, 3, 16 * side, 16 * side), dtype=torch.uint8)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
    scaled = (pixels / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    with torch.no_grad():
        found, wanted = ours(pixels), theirs(scaled).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("frames", "side", "width"), [(4, 14, 32), (1, 14, 32), (4, 28, 32), (1, 28, 64), (4, 9, 64)])
def test_positions(frames: int, side: int, width: int) -> None:
    torch.testing.assert_close(positions(frames, side, width), reference_positions(frames, side, width))


def test_more_frames_than_a_clip() -> None:
    with pytest.raises(ValueError, match="8 frames are more than a clip's 4"):
        positions(8, 14, 32)


def test_blocks_behind_the_one_that_is_read() -> None:
    ours = UmtTower(config(9).vision_config, -2)
    assert len(ours.blocks) == BLOCKS
    assert umt.parameter_of("blocks.3.attn.q_bias", 3) == ""
    assert umt.parameter_of("blocks.2.attn.q_bias", 3) == "blocks.2.attn.q_bias"
    assert set(dict(ours.named_parameters())) == set(tower(32, 64, BLOCKS).state_dict())
