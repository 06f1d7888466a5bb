"""What the tiny models share: sizes, weights, the tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCABULARY = 384
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
"""Of each expert layer; configurations call the number of experts by different names."""
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""Pixels from -1 to 1."""

_SCORE_SCALE = 3.0
_LOGIT_SCALE = 4.0


def ids_of(special: tuple[str, ...]) -> dict[str, int]:
    """Ids of the special tokens, which come first in the vocabulary."""
    return {token: number for number, token in enumerate((END_OF_TEXT, START, END, *special))}


@torch.no_grad()
def spread(model: nn.Module, language: nn.Module, lm_head: nn.Module, special: tuple[str, ...]) -> None:
    """Random weights with which every part of `model` matters; see the package's docstring."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            # A layer's experts are one tensor, whose last dimension is what they read.
            inputs = weight.shape[-1] if weight.dim() == 3 else weight[0].numel()
            nn.init.normal_(weight, std=1 / math.sqrt(inputs))
        elif name.endswith("bias"):
            nn.init.normal_(weight, std=0.1)
    nn.init.normal_(language.embed_tokens.weight)
    for layer in language.layers:
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            # Its decays reach far, so that a state that is lost or comes from elsewhere shows.
            nn.init.uniform_(layer.linear_attn.A_log, -6, -1)
        elif hasattr(attention, "q_norm"):
            attention.q_norm.weight.fill_(_SCORE_SCALE)
        else:
            attention.q_proj.weight.mul_(_SCORE_SCALE)
    nn.init.normal_(lm_head.weight, std=_LOGIT_SCALE / math.sqrt(TEXT["hidden_size"]))
    # Their logit is 0, far below the largest: special tokens are never generated.
    lm_head.weight[: len(ids_of(special))] = 0


def chat_template(image: str, video: str = "") -> str:
    """A template that puts these texts where a message has media."""
    return (
        "{% for message in messages %}" + START + "{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% elif part['type'] == 'video' %}" + video + ""
        "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}" + END + "\n"
        "{% endfor %}{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
    )


def write_tokenizer(folder: Path, special: tuple[str, ...], chat: str, **settings: Any) -> None:
    """Byte-level BPE of `VOCABULARY` tokens, the special ones first; `settings` go to its configuration."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(ids_of(special)),
        show_progress=False,
    )
    words = [a + b for a in "aeiou" for b in "bcdfghjklmnpqrstvwxyz"]
    tokenizer.train_from_iterator([" ".join(["user", "assistant", "system", *words])] * 9, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert all(tokenizer.token_to_id(token) == number for token, number in ids_of(special).items())
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        chat_template=chat,
        additional_special_tokens=[START, END, *special],
    )
    fast.save_pretrained(folder)
    written = folder / "tokenizer_config.json"
    write_json(written, {**json.loads(written.read_text()), "tokenizer_class": "Qwen2TokenizerFast", **settings})
    write_json(folder / "chat_template.json", {"chat_template": chat})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
