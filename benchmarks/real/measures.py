"""How far sparse prefill is from dense prefill on one document, with the interval of what one document can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from benchmarks.real.reading import Reading

BLOCK = 64
"""Neighbouring tokens are not independent; blocks of so many are taken as if they were."""
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Distance:
    """Of a reading from the dense one.

    ``nll``: mean negative log-likelihood in nats, ``dense_nll`` that of the dense one. ``loss``: share of it that is
    lost, ``interval``: half the width of its 95 % interval. ``agreement``: share of tokens with the same likeliest one.
    """

    dense_nll: float
    nll: float
    loss: float
    interval: float
    agreement: float


def distance(reading: Reading, reference: Reading) -> Distance:
    """The distance of one document's reading; the interval is Student's over blocks of tokens."""
    from scipy.stats import t

    nll, dense_nll = -float(reading.logprob.mean()), -float(reference.logprob.mean())
    lost = (reference.logprob - reading.logprob).double().numpy()
    blocks = len(lost) // BLOCK
    means = lost[: blocks * BLOCK].reshape(blocks, BLOCK).mean(1)
    half_width = t.ppf((1 + _CONFIDENCE) / 2, blocks - 1) * means.std(ddof=1) / np.sqrt(blocks)
    agreement = float((reading.top == reference.top).float().mean())
    return Distance(dense_nll, nll, (nll - dense_nll) / dense_nll, float(half_width) / dense_nll, agreement)
