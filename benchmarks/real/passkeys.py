"""Passkeys: a number that one sentence of a long prose document tells, asked for at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.real.documents import DOCUMENTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from benchmarks.real.reading import Reading

DEPTHS = 10
_DIGITS = 5
_SEED = 20260511


@dataclass(frozen=True)
class Passkey:
    """A prompt with the answer behind it, int64 [length]; ``depth``: share of the document before the sentence.

    ``answer``: tokens of the answer, the last ones of the prompt.
    """

    tokens: torch.Tensor
    depth: float
    answer: int

    def found(self, reading: Reading) -> bool:
        """Whether every token of the answer is the likeliest one after those before it."""
        return bool((reading.top[-self.answer :] == self.tokens[-self.answer :]).all())


def passkeys(tokenizer: PreTrainedTokenizerBase, half: str, length: int) -> list[Passkey]:
    """One prompt of ``length`` tokens for each of :data:`DEPTHS` depths, from the start of a document to its end."""
    rng = np.random.default_rng([_SEED, length])
    filler = next(d for d in DOCUMENTS if d.half == half and d.kind == "prose").tokens(tokenizer, length)

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    prompts = []
    for place in range(DEPTHS):
        depth = place / (DEPTHS - 1)
        key = "".join(map(str, rng.integers(10, size=_DIGITS)))
        told = encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
        asked, answer = encode("\n\nWhat is the pass key? The pass key is"), encode(f" {key}")
        room = length - len(told) - len(asked) - len(answer)
        before = int(depth * room)
        tokens = torch.cat([filler[:before], told, filler[before:room], asked, answer])
        prompts.append(Passkey(tokens, depth, len(answer)))
    return prompts
