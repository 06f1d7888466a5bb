"""What surrounds attention in a layer, by implementation: selection and the guard's pass."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_FUSED = ("triton", "fa4")
EASE = 0.1
"""Until a GPU has told: dense attention must be clearly dearer, as what it computes is known to be right."""
CPU_EASE = 0.4
"""There dense attention takes 0.5 to 0.6 of the time of as many tiles that are gathered."""


class Stages(NamedTuple):
    """``prepare``: selection in a few launches, see :class:`.prepared.Prepared`; None for the portable one.

    ``waits``: whether the host may ask the device for a value, because both are the same.
    ``repair``: the implementation for the guard's pass, whose lists are nearly always empty.
    """

    prepare: Callable[..., Any] | None
    waits: bool
    repair: str


def stages_of(implementation: str) -> Stages:
    """The stages that go with an implementation of attention: those in Triton on devices, or the portable ones."""
    if implementation not in _FUSED:
        return Stages(None, waits=True, repair=implementation)
    prepare = importlib.import_module(".prepared", __package__).Prepared
    return Stages(prepare, waits=False, repair="triton")


def ease_on(device: torch.device) -> float:
    """Share of its tiles' price by which dense attention is cheaper on a device than as many tiles of lists."""
    return CPU_EASE if device.type == "cpu" else EASE
