"""Paired comparison of right and wrong answers to the same questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_Z = 1.959964
"""Of a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Difference:
    """Share of right answers, and how far it is from the reference's: ``low`` to ``high`` with 95 % confidence.

    ``lost``, ``won``: questions that only the reference answers rightly, or only the other one.
    """

    asked: int
    share: float
    lost: int
    won: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Difference of the shares; negative where answers are lost."""
        return (self.won - self.lost) / self.asked


def difference(right: Sequence[bool], reference: Sequence[bool]) -> Difference:
    """Agresti and Min's interval for a difference of paired proportions (Statistics in Medicine 24, 2005).

    Half an observation is added to each of the four counts, so that answers that all agree still leave an interval.

    Raises:
        ValueError: answers to other numbers of questions, or to none.
    """
    if len(right) != len(reference) or not right:
        raise ValueError(f"{len(right)} answers cannot be paired with {len(reference)}")
    ours, theirs = np.array(right), np.array(reference)
    lost, won = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    count = len(ours) + 2
    mean = (won - lost) / count
    width = _Z * np.sqrt(won + lost + 1 - (won - lost) ** 2 / count) / count
    return Difference(len(ours), float(ours.mean()), lost, won, float(mean - width), float(mean + width))
