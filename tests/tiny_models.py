"""Tiny random Qwen2.5-VL and Qwen3-VL checkpoints that SGLang serves.

Both have 2 layers, 4 query heads, 2 KV heads of size 32 and a byte-level tokenizer. Their weights are random, but
scaled so that they are fit for comparing servers: attention is peaked (scores have a standard deviation of about 3),
so what a sparse backend drops shows; and logits are spread (standard deviation of about 4), so that greedy tokens do
not hang on rounding. They are stored in float32 and should be served in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

NAMES = ("qwen2_5_vl", "qwen3_vl")

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_ID = {token: number for number, token in enumerate(_SPECIAL)}
_VOCABULARY = 384
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "bos_token_id": _ID["<|endoftext|>"],
    "eos_token_id": _ID["<|im_end|>"],
    "tie_word_embeddings": False,
}
_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_IDS = {
    "image_token_id": _ID["<|image_pad|>"],
    "video_token_id": _ID["<|video_pad|>"],
    "vision_start_token_id": _ID["<|vision_start|>"],
    "vision_end_token_id": _ID["<|vision_end|>"],
    "tie_word_embeddings": False,
}
_SCORE_SCALE = 3.0
_LOGIT_SCALE = 4.0


def path_of(name: str, cache: Path) -> Path:
    """The checkpoint's folder below `cache`, built there unless this file's present text has already built it."""
    folder = cache / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16] / name
    if not (folder / "complete").is_file():
        build(name, folder)
        (folder / "complete").touch()
    return folder


def build(name: str, folder: Path) -> None:
    """Write the checkpoint `name`, one of `NAMES`, with its tokenizer and processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if name == "qwen2_5_vl":
        _write_processor(folder, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", patch_size=14)
        model = _qwen2_5_vl()
    elif name == "qwen3_vl":
        _write_processor(folder, "Qwen3VLProcessor", "Qwen3VLVideoProcessor", patch_size=16)
        model = _qwen3_vl()
    else:
        raise ValueError(f"no tiny model {name!r}; there are {', '.join(NAMES)}")
    _spread(model)
    model.save_pretrained(folder)


def _qwen2_5_vl() -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    text = {**_TEXT, "rope_parameters": rope, "max_window_layers": 2, "use_sliding_window": False}
    vision = {**_VISION, "patch_size": 14, "spatial_patch_size": 14, "window_size": 112, "tokens_per_second": 2}
    vision["fullatt_block_indexes"] = [1]
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_token_id=_ID["<|vision_pad|>"], **_IDS)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Qwen3VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**_TEXT, "head_dim": 32, "rope_parameters": rope}
    vision = {**_VISION, "patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_IDS))


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Random weights with which every part of the model matters; see the module's docstring."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    language = model.model.language_model
    nn.init.normal_(language.embed_tokens.weight)
    for layer in language.layers:
        attention = layer.self_attn
        if hasattr(attention, "q_norm"):
            attention.q_norm.weight.fill_(_SCORE_SCALE)
        else:
            attention.q_proj.weight.mul_(_SCORE_SCALE)
    nn.init.normal_(model.lm_head.weight, std=_LOGIT_SCALE / math.sqrt(_TEXT["hidden_size"]))
    # Their logit is 0, far below the largest: special tokens are never generated.
    model.lm_head.weight[: len(_SPECIAL)] = 0


def _write_processor(folder: Path, processor: str, video_processor: str, patch_size: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(_SPECIAL),
        show_progress=False,
    )
    words = [a + b for a in "aeiou" for b in "bcdfghjklmnpqrstvwxyz"]
    tokenizer.train_from_iterator([" ".join(["user", "assistant", "system", *words])] * 9, trainer)
    assert tokenizer.get_vocab_size() == _VOCABULARY
    assert all(tokenizer.token_to_id(token) == number for token, number in _ID.items())
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT,
        additional_special_tokens=list(_SPECIAL[1:]),
    )
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    names = {"tokenizer_class": "Qwen2TokenizerFast", "processor_class": processor}
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **names, **tokens}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": _CHAT}))
    common = {
        "processor_class": processor,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    image = {"image_processor_type": "Qwen2VLImageProcessorFast"}
    image["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    video = {"video_processor_type": video_processor, "do_sample_frames": False, "fps": 2}
    video["size"] = {"shortest_edge": 4096, "longest_edge": 25165824}
    (folder / "preprocessor_config.json").write_text(json.dumps({**common, **image}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**common, **video}))
