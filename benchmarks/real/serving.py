"""A language model behind a real SGLang server, which tells the likelihood of a document's second half."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.real.reading import Reading
from mminference_sgl.testing import Server, ServerError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def server(model: Path, chunk: int, config: Mapping[str, Any] | None) -> Server:
    """A server in float32 that prefills in chunks; ``config`` None is SGLang's own dense attention."""
    return Server(
        model,
        attention_backend=None if config is None else "mminference",
        chunked_prefill_size=chunk,
        max_total_tokens=16384,
        args=["--dtype", "float32", "--disable-radix-cache"],
        env={"MMINFERENCE_CONFIG": json.dumps(config or {}), "MMINFERENCE_LOG": "debug"},
    )


def read(running: Server, tokens: torch.Tensor) -> Reading:
    """What the served model says about the second half of a document.

    Raises:
        ServerError: it answers for another number of tokens.
    """
    half = len(tokens) // 2
    answer = running.generate(input_ids=tokens.tolist(), max_tokens=1, top_logprobs=1, logprob_start_len=half - 1)
    # The first entry is that of a token without predecessors in what was asked for.
    values = answer.meta["input_token_logprobs"][1:]
    tops = answer.meta["input_top_logprobs"][1:]
    if [token for _, token, _ in values] != tokens[half:].tolist():
        raise ServerError(f"{len(values)} log-probabilities of the prompt, not {len(tokens) - half}", running.log())
    return Reading(torch.tensor([value for value, _, _ in values]), torch.tensor([top[0][1] for top in tops]))
