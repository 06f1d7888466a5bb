"""A small Qwen2.5-VL for prompts of several clips: its shape, its tokenizer, its files, and its first weights.

Shape and start are chosen so that training from nothing takes minutes:

- The residual stream starts with tokens of standard deviation 2, so that what the first layer writes does not drown
  which token it is.
- Four heads of the first layer, a group, start as *slash heads*, by biases of their queries and keys: rotary pairs
  that turn by the right angle attend to the token at a fixed offset, whatever is there. Their frequencies leave every
  axis a neighbour that can be told apart (base 1000, four pairs for time, two for rows), and enough that turn so slowly
  that content is found from afar.
- The words of the keys start near the textures that they name, and one group of the second layer attends to what is
  like itself (queries start as keys), but to no text, itself least of all: so a key finds its texture from the start.
- Attention of the vision tower writes nothing, so that tiles are embedded independently.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.clips.prompts import ANY, NUMBERS, OFFSETS, SIGNS, TASKS, written
from benchmarks.toy.scenes import COLOURS, KEYS

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 512, 4, 8, 2, 512
HEAD_DIM = HIDDEN // HEADS
VOCABULARY = 512
THETA, SECTIONS = 1000.0, (4, 2, 26)
TOKENS_PER_SECOND = 12
"""Temporal ids advance by one per patch: a clip without metadata counts as 24 frames per second."""
EMBEDDING_STD = 2.0
BOUNDS = {"min_pixels": 3136, "max_pixels": 1204224}

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_SLASH_LOGIT = (8.0, 45.0, 70.0)
"""Attention logits per rotary pair of an axis with which slash heads start."""
_SLASH_COLUMNS = 4
"""Rotary pairs of the column axis that take part."""
_TEXT_STD, _AWAY_FROM_TEXT = 1.0, 16.0
"""What all texts have in common, and how much heads that look for what is alike are kept from it."""
_BEFORE = (1, 1, 1)
"""Offset of the token before, for texts."""
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words() -> list[str]:
    """What is one token each, besides bytes and special tokens."""
    coloured = [written(task, colour) for task in (*OFFSETS, "memo") for colour in COLOURS]
    keys = [f" {word}" for word in (*KEYS, ANY)]
    return [*coloured, *keys, *SIGNS, *NUMBERS, *TASKS, "user", "assistant", "system"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and the words of the prompts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([*SPECIAL, *PADS])
    fast.add_tokens([AddedToken(word, normalized=False) for word in words()])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_TEMPLATE,
        additional_special_tokens=[*SPECIAL[1:], *PADS],
    )


def build(tokens: PreTrainedTokenizerFast, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model with its first weights, in fp32."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def number(token: str) -> int:
        return int(tokens.convert_tokens_to_ids(token))

    rope = {"type": "mrope", "rope_type": "default", "mrope_section": list(SECTIONS), "rope_theta": THETA}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 131072,
            "rope_parameters": rope,
            "bos_token_id": number("<|endoftext|>"),
            "eos_token_id": number("<|im_end|>"),
            "tie_word_embeddings": False,
            "max_window_layers": LAYERS,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [],
            "in_channels": 3,
            "tokens_per_second": TOKENS_PER_SECOND,
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        vision_token_id=number("<|vision_pad|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).float()
    _start_vision(model.model.visual)
    _start_language(model)
    return model


@torch.no_grad()
def align(model: Any, tokens: PreTrainedTokenizerFast, bank: torch.Tensor) -> None:
    """Puts the words of the keys near their textures; ``bank``: embeddings [textures, colours, variants, hidden]."""
    language = model.model.language_model
    means = bank.mean((1, 2))
    directions = means[1:] - means.mean(0)
    directions *= EMBEDDING_STD / directions.std()
    weight = language.embed_tokens.weight
    for key, direction in zip(KEYS, directions, strict=True):
        number = tokens.convert_tokens_to_ids(f" {key}")
        weight[number] = (weight[number] + 2 * direction) / math.sqrt(5)
    # What all texts have in common lies where no visual token has anything.
    _, _, directions = torch.linalg.svd(bank.flatten(0, 2), full_matrices=False)
    text = functional.normalize(torch.randn(HIDDEN // 2) @ directions[HIDDEN // 2 :], dim=0)
    weight += _TEXT_STD * math.sqrt(HIDDEN) * text
    attention, group, slowest = language.layers[1].self_attn, HEADS // KV_HEADS, HEAD_DIM // 2 - 1
    alike = attention.k_proj.weight[:HEAD_DIM]
    alike -= (alike @ text)[:, None] * text
    alike[slowest] = text
    for head in range(group):
        own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        attention.q_proj.weight[own] = 2 * alike
        attention.q_proj.weight[own][slowest] = 0
        attention.q_proj.bias[own][slowest] = -_AWAY_FROM_TEXT


def save(model: Qwen2_5_VLForConditionalGeneration, tokens: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in bfloat16, with all that processors need."""
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)
    tokens.save_pretrained(folder)
    files = {
        "tokenizer_config.json": {
            **json.loads((folder / "tokenizer_config.json").read_text()),
            "tokenizer_class": "Qwen2TokenizerFast",
            "processor_class": "Qwen2_5_VLProcessor",
            "image_token": PADS[0],
            "video_token": PADS[1],
        },
        "preprocessor_config.json": _pictures("image_processor_type", "Qwen2VLImageProcessor"),
        "video_preprocessor_config.json": _pictures("video_processor_type", "Qwen2VLVideoProcessor")
        | {
            "do_sample_frames": False,
            "size": {"shortest_edge": BOUNDS["min_pixels"], "longest_edge": BOUNDS["max_pixels"] * 64},
        },
        "chat_template.json": {"chat_template": _TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def _pictures(kind: str, processor: str) -> dict[str, Any]:
    return {
        kind: processor,
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": _MEAN,
        "image_std": _STD,
    } | BOUNDS


def patches(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles, 0 to 255, [n, 2 frames, 3, 28, 28], as the processor gives them to the tower: [4 n, 1176]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    scaled = ((tiles / 255 - mean) / std).view(-1, 2, 3, 2, 14, 2, 14)
    return scaled.permute(0, 3, 5, 2, 1, 4, 6).reshape(-1, 3 * 2 * 14 * 14)


def frequencies() -> torch.Tensor:
    """Of each rotary pair, in radians per position: fp32 [HEAD_DIM / 2]."""
    return 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)


def axes() -> torch.Tensor:
    """Which position turns each rotary pair, 0 time, 1 row, 2 column: int64 [HEAD_DIM / 2]."""
    return torch.arange(3).repeat_interleave(torch.tensor(SECTIONS))


@torch.no_grad()
def _start_vision(tower: Any) -> None:
    block = tower.blocks[0]
    for parameter in (block.attn.proj.weight, block.attn.proj.bias):
        parameter.zero_()
    nn.init.normal_(tower.patch_embed.proj.weight, std=1 / math.sqrt(3 * 2 * 14 * 14))
    for module in (*block.mlp.modules(), *tower.merger.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))


@torch.no_grad()
def _start_language(model: Any) -> None:
    """Weights of unit gain (0.02 is too small for a model as narrow as this), and the slash heads."""
    language = model.model.language_model
    for name, weight in language.named_parameters():
        if weight.dim() == 2:
            std = EMBEDDING_STD if "embed" in name else 1 / math.sqrt(weight.shape[1])
            nn.init.normal_(weight, std=std / math.sqrt(2 * LAYERS) if "o_proj" in name or "down_proj" in name else std)
    nn.init.normal_(model.lm_head.weight, std=1 / math.sqrt(HIDDEN))

    axis, half = axes(), HEAD_DIM // 2
    logits = torch.tensor(_SLASH_LOGIT)[axis]
    logits[sum(SECTIONS[:2]) + _SLASH_COLUMNS :] = 0
    amplitude = (logits * math.sqrt(HEAD_DIM)).sqrt()
    attention, group = language.layers[0].self_attn, HEADS // KV_HEADS
    offsets = [offset for offset in OFFSETS.values() if any(offset)] + [_BEFORE]
    for head, offset in enumerate(offsets):
        own, shared = (slice(n * HEAD_DIM, (n + 1) * HEAD_DIM) for n in (head, head // group))
        angle = -frequencies() * torch.tensor(offset).float()[axis]
        attention.q_proj.bias[own] = torch.cat([amplitude * angle.cos(), amplitude * angle.sin()])
        attention.k_proj.bias[shared] = torch.cat([amplitude, torch.zeros(half)])
        attention.q_proj.weight[own] *= 0.1
    for head in range(math.ceil(len(offsets) / group)):
        attention.k_proj.weight[head * HEAD_DIM : (head + 1) * HEAD_DIM] *= 0.1
