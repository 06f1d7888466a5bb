"""What a model says about the second half of a document, served or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reading:
    """By token of the second half, the first of which the last token of the first half foretells.

    ``logprob`` fp32: of the token that is there; ``top`` int64: the likeliest one. ``hidden`` fp32 [tokens, hidden
    size]: what the head read, None where a server keeps it.
    """

    logprob: torch.Tensor
    top: torch.Tensor
    hidden: torch.Tensor | None = None
