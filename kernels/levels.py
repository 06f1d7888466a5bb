"""Levels of key tiles, and what the thresholds among them cost; see :mod:`.search`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEVELS = 63
"""Levels of candidates, 0 to 62: 21 octaves of energy per tile."""
ALWAYS = LEVELS
"""Level of what is read in any case, the highest threshold."""
PER_OCTAVE = 3
FAIR = 18
"""The level that begins where all causal tiles together would cost what is allowed. Six octaves below it is the last
one, which takes all that is less."""
LEAST = 4e-3
"""Mass beside which what is left no longer tells what a row would read: it could be its whole output that is lost."""
TINY = 1e-30
"""Energies are no smaller, so that there is a logarithm."""


@dataclass(frozen=True)
class Curves:
    """What each threshold costs: ``error`` and ``coverage`` [H, LEVELS + 1], ``tiles`` [G, LEVELS + 1] by list.

    ``error`` fp32: squared length of what a probe row's output loses, mean over the rows. ``coverage`` fp32: mass that
    is kept, mean over the rows. ``tiles`` int64: tiles that are read, those of the other pass among them.
    """

    error: torch.Tensor
    coverage: torch.Tensor
    tiles: torch.Tensor
