"""A decoder of the Llama family in plain PyTorch, prefilled in chunks, with attention left to the caller."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FAMILIES = ("llama", "qwen2", "qwen3")


class Attend(Protocol):
    """Attention of one layer over one chunk."""

    def __call__(
        self, layer: int, start: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Rows from token position ``start`` on: query [n, H, D] to output [n, H, D].

        ``keys``, ``values`` [1 + length, KV heads, D] by slot, which is the token position and one; those of later
        chunks are not there yet.
        """
        ...


@dataclass(frozen=True)
class Shape:
    """What a layer's attention is made of."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read from a language model's configuration."""
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        return cls(config["num_hidden_layers"], heads, config.get("num_key_value_heads", heads), head_dim)

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_dim**-0.5)


@dataclass
class Stream:
    """A prompt on its way through the model: every layer's keys and values so far, by slot."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    done: int = 0
    residuals: list[list[torch.Tensor]] = field(default_factory=list)


class LanguageModel:
    """Weights of a folder in Hugging Face's format, in fp32.

    Raises:
        ValueError: a model family that is not of :data:`FAMILIES`.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        if config["model_type"] not in FAMILIES:
            raise ValueError(f"cannot run a model of type {config['model_type']!r}, only {', '.join(FAMILIES)}")
        self._weights: dict[str, torch.Tensor] = {}
        for part in sorted(folder.glob("*.safetensors")):
            self._weights |= {name: weight.float() for name, weight in load_file(part).items()}
        self.shape = Shape.of(config)
        self.context = int(config["max_position_embeddings"])
        self._eps = float(config["rms_norm_eps"])
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        head_dim = self.shape.head_dim
        self._frequencies = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)

    def stream(self, length: int) -> Stream:
        """Room for a prompt of so many tokens."""
        shape = (length + 1, self.shape.kv_heads, self.shape.head_dim)
        pools = [[torch.zeros(shape) for _ in range(self.shape.layers)] for _ in range(2)]
        return Stream(*pools)

    def prefill(self, stream: Stream, tokens: torch.Tensor, attend: Attend, *, keep: bool = False) -> torch.Tensor:
        """Runs the next tokens, int64 [n], and returns what the head reads of them, fp32 [n, hidden].

        ``keep`` notes the residual stream before every layer and behind the last one.
        """
        start, end = stream.done, stream.done + len(tokens)
        rotation = self._rotation(start, end)
        hidden = self._weights["model.embed_tokens.weight"][tokens]
        residuals = [hidden] if keep else []
        for layer in range(self.shape.layers):
            hidden = self._layer(layer, hidden, rotation, stream, attend)
            if keep:
                residuals.append(hidden)
        if keep:
            stream.residuals.append(residuals)
        stream.done = end
        return self._norm("model.norm", hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of rows of hidden states: fp32 [n, vocabulary]."""
        head = self._weights.get("lm_head.weight", self._weights["model.embed_tokens.weight"])
        return hidden @ head.T

    def _layer(
        self,
        layer: int,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        stream: Stream,
        attend: Attend,
    ) -> torch.Tensor:
        name, rows = f"model.layers.{layer}", len(hidden)
        normed = self._norm(f"{name}.input_layernorm", hidden)
        query, key, value = (
            self._linear(f"{name}.self_attn.{part}_proj", normed).view(rows, -1, self.shape.head_dim) for part in "qkv"
        )
        query, key = self._norm(f"{name}.self_attn.q_norm", query), self._norm(f"{name}.self_attn.k_norm", key)
        slots = slice(stream.done + 1, stream.done + 1 + rows)
        stream.keys[layer][slots], stream.values[layer][slots] = rotate(key, *rotation), value
        output = attend(layer, stream.done, rotate(query, *rotation), stream.keys[layer], stream.values[layer])
        hidden = hidden + self._linear(f"{name}.self_attn.o_proj", output.flatten(1))
        normed = self._norm(f"{name}.post_attention_layernorm", hidden)
        gate, up = (self._linear(f"{name}.mlp.{part}_proj", normed) for part in ("gate", "up"))
        return hidden + self._linear(f"{name}.mlp.down_proj", functional.silu(gate) * up)

    def _rotation(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        angle = (torch.arange(start, end).double()[:, None] * self._frequencies).repeat(1, 2)[:, None]
        return angle.cos().float(), angle.sin().float()

    def _linear(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """RMS norm; the norms of queries and keys are not in every family."""
        weight = self._weights.get(f"{name}.weight")
        return rows if weight is None else functional.rms_norm(rows, weight.shape, weight, self._eps)


def dense(layer: int, start: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Dense attention, see :class:`Attend`."""
    del layer
    end = start + len(query)
    k, v = (pool[1 : end + 1].transpose(0, 1)[None] for pool in (keys, values))
    mask = torch.arange(end) <= torch.arange(start, end)[:, None]
    out = functional.scaled_dot_product_attention(query.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def rotate(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding: rows [..., D] by angles of D values, those of its halves alike."""
    first, second = rows.chunk(2, dim=-1)
    return rows * cos + torch.cat([-second, first], dim=-1) * sin
