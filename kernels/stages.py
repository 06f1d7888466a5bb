"""What surrounds attention in a layer, by implementation: the probe, the search for tiles and the building of lists."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import probe, search, tiles
from .operands import Operands
from .probe import Probe, ProbeKeys, ProbeRows
from .select import Search
from .tiles import TileLists, TilePass

_FUSED = ("triton", "fa4")
EASE = 0.1
"""Until a GPU has told: dense attention must be clearly dearer, as what it computes is known to be right."""
CPU_EASE = 0.4
"""There dense attention takes 0.5 to 0.6 of the time of as many tiles that are gathered."""


class Stages(NamedTuple):
    """``probe``: see :func:`.probe.run`; ``search``: see :mod:`.search`; ``lists``: see :func:`.tiles.lists_from_map`.

    ``shares``: whether attention takes lists that several heads share.
    ``waits``: whether the host may ask the device for a value, because both are the same.
    ``repair``: the implementation for the guard's pass, whose lists are nearly always empty.
    """

    probe: Callable[[Operands, ProbeKeys, ProbeRows], Probe]
    search: Search
    lists: Callable[[TilePass, torch.Tensor, torch.Tensor, torch.Tensor], TileLists]
    waits: bool
    repair: str
    shares: bool


def stages_of(implementation: str) -> Stages:
    """The stages that go with an implementation of attention: those in Triton on devices, or the portable ones."""
    if implementation not in _FUSED:
        return Stages(probe.run, search, tiles.lists_from_map, waits=True, repair=implementation, shares=True)
    probe_triton, search_triton, lists_triton = (
        importlib.import_module(f".{name}_triton", __package__) for name in ("probe", "search", "lists")
    )
    run, lists = probe_triton.run, lists_triton.lists_from_map
    return Stages(run, search_triton, lists, waits=False, repair="triton", shares=True)


def ease_on(device: torch.device) -> float:
    """Share of its tiles' price by which dense attention is cheaper on a device than as many tiles of lists."""
    return CPU_EASE if device.type == "cpu" else EASE
