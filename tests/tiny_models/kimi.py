"""Kimi-VL: latent attention (MLA) behind a MoonViT tower.

Its processor comes as code with the checkpoints, so there is one here, which `register` makes known.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, BatchFeature, DeepseekV3Config, DeepseekV3ForCausalLM, ProcessorMixin

from mminference_sgl.portable.cpu import DENSE_BACKEND_NAME
from tiny_models.parts import TEXT, chat_template, ids_of, spread, write_json, write_tokenizer

_PAD = "<|media_pad|>"
_SPECIAL = (_PAD, "<|media_start|>", "<|media_end|>")
_CHAT = chat_template(f"<|media_start|>{_PAD}<|media_end|>")
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "rope_theta": 1e4,
}
"""Kimi-VL has none; without one, SGLang makes no rotary embedding of latent attention on a CPU."""
_LAYERS, _WIDTH, _INNER, _PATCH, _MERGE, _SIDE = 2, 64, 128, 14, 2, 16


class Processor(ProcessorMixin):
    """Pictures of whole squares of 28 pixels, patch by patch, and as many placeholders as they are tokens."""

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any, **settings: Any) -> None:
        super().__init__(tokenizer, **settings)

    def __call__(self, images: Any = None, text: Any = None, **_settings: Any) -> BatchFeature:
        pixels, grids = [], []
        for image in images or ():
            width, height = (max(1, side // (_MERGE * _PATCH)) * _MERGE * _PATCH for side in image.size)
            values = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
            scaled = torch.from_numpy(values.copy()).float() / 127.5 - 1
            rows, columns = height // _PATCH, width // _PATCH
            patches = scaled.view(rows, _PATCH, columns, _PATCH, 3).permute(0, 2, 4, 1, 3)
            pixels.append(patches.reshape(rows * columns, 3, _PATCH, _PATCH))
            grids.append((rows, columns))
        parts = (text if isinstance(text, str) else text[0]).split(_PAD)
        counts = [rows * columns // _MERGE**2 for rows, columns in grids]
        expanded = parts[0] + "".join(_PAD * count + part for count, part in zip(counts, parts[1:], strict=True))
        data = {"input_ids": torch.tensor([self.tokenizer.encode(expanded, add_special_tokens=False)])}
        if images:
            data |= {"pixel_values": torch.cat(pixels), "image_grid_hws": torch.tensor(grids)}
        return BatchFeature(data)


def register() -> None:
    """Make the model one that a CPU can serve, in this process and those forked from it.

    Without a prefix SGLang attends by heads, whose keys are not in the pool; SGLang's native backend reads the pool.
    """
    from sglang.srt.configs.kimi_vl import KimiVLConfig
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AutoProcessor.register(KimiVLConfig, Processor, exist_ok=True)
    AttentionBackendRegistry.register(DENSE_BACKEND_NAME, lambda *_: AttnForwardMethod.MLA)


def build(folder: Path) -> None:
    text = {
        **TEXT,
        "num_key_value_heads": TEXT["num_attention_heads"],
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "first_k_dense_replace": _LAYERS,
        "rope_theta": 1e4,
        "rope_scaling": _YARN,
    }
    language = DeepseekV3ForCausalLM(DeepseekV3Config(**text))
    spread(language, language.model, language.lm_head, _SPECIAL)
    weights = {f"language_model.{name}": weight for name, weight in language.state_dict().items()}
    save_file(weights | _vision() | _projector(), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, _SPECIAL, _CHAT, tokenizer_class="PreTrainedTokenizerFast")
    vision = {
        "patch_size": _PATCH,
        "init_pos_emb_height": _SIDE,
        "init_pos_emb_width": _SIDE,
        "num_attention_heads": 4,
        "num_hidden_layers": _LAYERS,
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "merge_kernel_size": [_MERGE, _MERGE],
    }
    experts = {"n_routed_experts": None, "n_shared_experts": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    description = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "torch_dtype": "float32",
        "media_placeholder_token_id": ids_of(_SPECIAL)[_PAD],
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "moonvit", **vision},
        "text_config": {"model_type": "deepseek_v3", "use_mla": True, **text, **experts},
    }
    write_json(folder / "config.json", description)
    write_json(folder / "processor_config.json", {"processor_class": "Processor"})


def _vision() -> dict[str, torch.Tensor]:
    weights = {
        "patch_embed.proj.weight": _normal(_WIDTH, 3, _PATCH, _PATCH),
        "patch_embed.proj.bias": _bias(_WIDTH),
        "patch_embed.pos_emb.weight": torch.randn(_SIDE, _SIDE, _WIDTH),
        "encoder.final_layernorm.weight": torch.ones(_WIDTH),
        "encoder.final_layernorm.bias": _bias(_WIDTH),
    }
    linears = {
        "wqkv": (3 * _WIDTH, _WIDTH),
        "wo": (_WIDTH, _WIDTH),
        "mlp.fc0": (_INNER, _WIDTH),
        "mlp.fc1": (_WIDTH, _INNER),
    }
    for layer in range(_LAYERS):
        prefix = f"encoder.blocks.{layer}."
        for name, (rows, columns) in linears.items():
            weights |= {f"{prefix}{name}.weight": _normal(rows, columns), f"{prefix}{name}.bias": _bias(rows)}
        for name in ("norm0", "norm1"):
            weights |= {f"{prefix}{name}.weight": torch.ones(_WIDTH), f"{prefix}{name}.bias": _bias(_WIDTH)}
    return {f"vision_tower.{name}": weight for name, weight in weights.items()}


def _projector() -> dict[str, torch.Tensor]:
    joined, hidden = _MERGE**2 * _WIDTH, TEXT["hidden_size"]
    weights = {
        "pre_norm.weight": torch.ones(_WIDTH),
        "pre_norm.bias": _bias(_WIDTH),
        "linear_1.weight": _normal(joined, joined),
        "linear_1.bias": _bias(joined),
        "linear_2.weight": _normal(hidden, joined),
        "linear_2.bias": _bias(hidden),
    }
    return {f"multi_modal_projector.{name}": weight for name, weight in weights.items()}


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


def _bias(size: int) -> torch.Tensor:
    return torch.randn(size) / 10
