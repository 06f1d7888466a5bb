"""NVILA and NVILA-Lite: 7 x 7 patches become 4 x 4 or 3 x 3 tokens, and a newline for each frame.

SGLang's classes have the width of the published towers built in. Configuration and processor are code of the
checkpoint's own, as in the published ones; here it is only what serving asks for.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tiny_models.parts import TEXT, chat_template, ids_of, spread, write_json, write_tokenizer
from tiny_models.vila import original, siglip

IMAGE, WIDTH = 98, 1152
_SPECIAL = ("<image>", "<vila/video>")
_CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config, SiglipVisionConfig

class Config(PretrainedConfig):
    model_type = "MODEL_TYPE"

    def __init__(self, text_config=None, vision_config=None, image_token_id=-1, video_token_id=-1, **kwargs):
        self.text_config = Qwen2Config(**(text_config or {}))
        self.vision_config = SiglipVisionConfig(**(vision_config or {}))
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        super().__init__(**kwargs)
"""
_PROCESSOR = '''
import torch
from transformers import AutoTokenizer, BatchFeature, SiglipImageProcessor

class Processor:
    """Whole images: SIDE x SIDE tokens and a newline."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokenizer.image_token, tokenizer.video_token = "<image>", "<vila/video>"
        self.chat_template = tokenizer.chat_template
        size = {"height": IMAGE, "width": IMAGE}
        self.image_processor = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    @classmethod
    def register_for_auto_class(cls, *args):
        pass

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        return cls(AutoTokenizer.from_pretrained(path))

    def __call__(self, text, images, return_tensors):
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        image = self.tokenizer.convert_tokens_to_ids("<image>")
        ids = [image] * SIDE**2 + self.tokenizer.encode("\\n", add_special_tokens=False)
        return BatchFeature({"input_ids": torch.tensor([ids]), "pixel_values": pixels})
'''


def build(folder: Path) -> None:
    layers = nn.Identity(), nn.LayerNorm(12 * WIDTH), nn.Linear(12 * WIDTH, 128), nn.GELU(), nn.Linear(128, 128)
    _write(folder, "NVILAForConditionalGeneration", "nvila", 4, nn.Sequential(*layers))


def build_lite(folder: Path) -> None:
    narrow = (nn.LayerNorm(9 * WIDTH), nn.Linear(9 * WIDTH, 3 * WIDTH), nn.GELU(), nn.LayerNorm(3 * WIDTH))
    layers = nn.Identity(), *narrow, nn.Linear(3 * WIDTH, 128), nn.GELU(), nn.Linear(128, 128)
    _write(folder, "NVILALiteForConditionalGeneration", "nvila_lite", 3, nn.Sequential(*layers))


def _write(folder: Path, architecture: str, kind: str, side: int, projector: nn.Sequential) -> None:
    vision, tower = siglip(IMAGE, WIDTH, 2, inner=64)
    text = {**TEXT, "rope_theta": 1e6, "use_sliding_window": False}
    language = Qwen2ForCausalLM(Qwen2Config(**text))
    spread(nn.ModuleList([language, tower, projector]), language.model, language.lm_head, _SPECIAL)
    weights = {f"llm.{name}": weight for name, weight in language.state_dict().items()}
    weights |= {f"vision_tower.{name}": weight for name, weight in original(tower).items()}
    weights |= {f"mm_projector.layers.{name}": weight for name, weight in projector.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, _SPECIAL, chat_template("<image>", "<vila/video>"))
    (folder / "configuration_tiny.py").write_text(_CONFIGURATION.replace("MODEL_TYPE", kind))
    (folder / "processing_tiny.py").write_text(_PROCESSOR.replace("SIDE", str(side)).replace("IMAGE", str(IMAGE)))
    own = {"AutoConfig": "configuration_tiny.Config", "AutoProcessor": "processing_tiny.Processor"}
    config = {
        "architectures": [architecture],
        "model_type": kind,
        "auto_map": own,
        "torch_dtype": "float32",
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "image_token_id": ids_of(_SPECIAL)["<image>"],
        "video_token_id": ids_of(_SPECIAL)["<vila/video>"],
    }
    write_json(folder / "config.json", config)
    write_json(folder / "processor_config.json", {"processor_class": "Processor", "auto_map": own})
