"""Tiny random checkpoints of families that SGLang serves, and of the models that this package adds.

All have 2 layers (Gemma 3 two sliding ones more, Qwen3.5 one full of 4), 4 query heads, 2 KV heads of size 32 (Kimi-VL
latent ones, Qwen3.5 of size 256) and a byte-level tokenizer; mixtures of experts have 4, two for a token. Their weights
are random, but scaled so that they are fit for comparing servers: attention is peaked (scores have a standard deviation
of about 3), so what a sparse backend drops shows; and logits are spread (standard deviation of about 4), so that greedy
tokens do not hang on rounding. They are stored in float32 and should be served in it, but for LLaVA: SGLang loads its
vision tower in float16, so all of it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from tiny_models import gemma, glm, internvl, kimi, llava, llava_video, nvila, qwen, videochat_flash, vila

BUILDERS: dict[str, Callable[[Path], None]] = {
    "qwen2_vl": qwen.build_qwen2_vl,
    "qwen2_5_vl": qwen.build_qwen2_5_vl,
    "qwen3_vl": qwen.build_qwen3_vl,
    "qwen3_vl_moe": qwen.build_qwen3_vl_moe,
    "qwen3_5": qwen.build_qwen3_5,
    "qwen3_5_moe": qwen.build_qwen3_5_moe,
    "glm4v": glm.build_4_1v,
    "glm4v_moe": glm.build_4_6v,
    "internvl": internvl.build_dense,
    "internvl_moe": internvl.build_moe,
    "llava_onevision": llava.build,
    "gemma3": gemma.build,
    "kimi_vl": kimi.build,
    "longvila": vila.build_qwen,
    "longvila_llama": vila.build_llama,
    "longvila_pooled": vila.build_pooled,
    "nvila": nvila.build,
    "nvila_lite": nvila.build_lite,
    "videochat_flash": videochat_flash.build,
    "llava_video": llava_video.build_grid,
    "llava_video_frame": llava_video.build_frame,
}


def path_of(name: str, cache: Path) -> Path:
    """The checkpoint's folder below `cache`, built there unless this package's present text has already built it."""
    text = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    folder = cache / hashlib.sha256(text).hexdigest()[:16] / name
    if not (folder / "complete").is_file():
        build(name, folder)
        (folder / "complete").touch()
    return folder


def build(name: str, folder: Path) -> None:
    """Write the checkpoint `name`, one of `BUILDERS`, with its tokenizer and processor files."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    BUILDERS[name](folder)
