"""The keys of one forward's requests in an order, tile after tile, from the slots of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from mminference_sgl.kernels.tiles import ABSENT, KeyOrder
from mminference_sgl.method.upload import Packer, Uploaded


class Starts:
    """Where the requests' key tiles begin: in the order of all, and in each one's own; parts of what is uploaded."""

    def __init__(self, counts: Sequence[int], packer: Packer) -> None:
        self.all = packer.add(np.cumsum([0, *counts]))
        self.own = [packer.add(np.array([0, count])) for count in counts]


@dataclass(frozen=True)
class Part:
    """One request's key tiles: slots int64 and positions int32 [n, tile_keys]; the others as in :class:`KeyOrder`."""

    slots: torch.Tensor
    positions: torch.Tensor
    arrival: torch.Tensor
    arrived: int

    @property
    def count(self) -> int:
        """Key tiles."""
        return self.slots.shape[0]


def in_sequence(slots: torch.Tensor, tile_keys: int) -> Part:
    """Keys in sequence order; ``slots`` int64 [num_keys]."""
    positions = torch.arange(slots.numel(), dtype=torch.int32, device=slots.device)
    tiles = _tiled(slots, positions, tile_keys)
    count = tiles[0].shape[0]
    return Part(*tiles, torch.arange(count, dtype=torch.int32, device=slots.device), count)


def in_order(slots: torch.Tensor, tokens: torch.Tensor, arrival: torch.Tensor, arrived: int, tile_keys: int) -> Part:
    """Keys in the order ``tokens`` int32 [length]; ``slots`` int64 [num_keys].

    Tokens that later chunks will bring have their place already and point to the first key.
    """
    present = tokens < slots.numel()
    tiles = _tiled(slots[torch.where(present, tokens, 0)], tokens, tile_keys)
    return Part(*tiles, arrival, arrived)


def no_keys(slots: torch.Tensor, tile_keys: int) -> Part:
    """That of a request without a cell order."""
    nothing = slots[:0].int()
    return Part(*_tiled(slots[:0], nothing, tile_keys), nothing, 0)


def key_orders(parts: Sequence[Part], starts: Starts, uploaded: Uploaded) -> tuple[KeyOrder, list[KeyOrder]]:
    """The order of all requests, and its part that is each one's."""
    slots, positions = (torch.cat([getattr(part, name) for part in parts]) for name in ("slots", "positions"))
    first = np.cumsum([0, *(part.count for part in parts)])[:-1].tolist()
    held, later = [], []
    for part, tile in zip(parts, first, strict=True):
        held.append(part.arrival[: part.arrived] + tile)
        later.append(part.arrival[part.arrived :] + tile)
    order = KeyOrder(
        slots=slots,
        positions=positions,
        tile_min=positions.amin(1),
        tile_max=positions.amax(1),
        tile_indptr=uploaded.int32[starts.all],
        widest=max(part.count for part in parts),
        arrival=torch.cat(held + later),
        arrived=sum(part.arrived for part in parts),
    )
    return order, [
        order.of_request(slice(tile, tile + part.count), uploaded.int32[own], part.arrival, part.arrived)
        for part, tile, own in zip(parts, first, starts.own, strict=True)
    ]


def _tiled(slots: torch.Tensor, positions: torch.Tensor, tile_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    padding = -slots.numel() % tile_keys
    return (
        torch.cat([slots, slots[:1].expand(padding)]).view(-1, tile_keys),
        functional.pad(positions, (0, padding), value=ABSENT).view(-1, tile_keys),
    )
