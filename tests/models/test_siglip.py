"""The tower that reads frames in batches, against transformers' whole one."""

from __future__ import annotations

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from mminference_sgl.models import siglip
from mminference_sgl.models.siglip import SiglipTower

CONFIG = SiglipVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=42, patch_size=14
)


@pytest.fixture(scope="module")
def whole() -> SiglipVisionModel:
    torch.manual_seed(0)
    return SiglipVisionModel(CONFIG).eval()


def tower_of(whole: SiglipVisionModel, select: int) -> SiglipTower:
    tower = SiglipTower(CONFIG, select)
    layers = siglip.layers_read(CONFIG, select)
    weights = {
        siglip.parameter_of(f"vision_model.{name}", layers): weight for name, weight in whole.state_dict().items()
    }
    weights.pop("")
    tower.load_state_dict(weights)
    return tower


@pytest.mark.parametrize("select", [-1, -2, -3])
@torch.no_grad()
def test_the_hidden_state_that_is_asked_for(whole: SiglipVisionModel, select: int):
    pixels = torch.randint(256, (5, 3, 42, 42), dtype=torch.uint8)
    wanted = whole((pixels / 255 - 0.5) / 0.5, output_hidden_states=True).hidden_states[select]
    torch.testing.assert_close(tower_of(whole, select)(pixels), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_more_frames_at_a_time_than_the_bound(whole: SiglipVisionModel, monkeypatch: pytest.MonkeyPatch):
    tower = tower_of(whole, -2)
    pixels = torch.randint(256, (70, 3, 42, 42), dtype=torch.uint8)
    seen: list[int] = []
    forward = tower.vision_model.forward
    monkeypatch.setattr(tower.vision_model, "forward", lambda scaled: (seen.append(len(scaled)), forward(scaled))[1])
    states = tower(pixels)
    assert seen == [32, 32, 6]
    torch.testing.assert_close(states[40:41], tower(pixels[40:41]), rtol=1e-5, atol=1e-5)


def test_tensors_are_those_of_a_whole_tower(whole: SiglipVisionModel):
    assert siglip.tensors(CONFIG) == {f"vision_model.{name}": w.shape for name, w in whole.state_dict().items()}
