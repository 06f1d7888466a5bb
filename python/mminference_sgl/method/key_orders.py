"""The keys of one forward's requests in an order, tile after tile, from the slots of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from mminference_sgl.kernels.tiles import ABSENT, ForwardKeys, KeyOrder
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


Orders = tuple[KeyOrder, list[KeyOrder]]
"""The order of all requests, and its part that is each one's."""


def key_orders(orders: Sequence[tuple[Sequence[Part], Starts]], uploaded: Uploaded) -> list[Orders]:
    """Orders that are copied together, from the requests' parts of each."""
    every = [part for parts, _ in orders for part in parts]
    slots, positions = (torch.cat([getattr(part, name) for part in every]) for name in ("slots", "positions"))
    first = np.cumsum([0, *(part.count for part in every)]).tolist()
    here = [part.arrival[: part.arrived] + tile for part, tile in zip(every, first, strict=False)]
    all_keys = ForwardKeys(slots, positions, torch.cat(here))
    low, high = positions.amin(1), positions.amax(1)

    def order(tiles: slice, starts: slice, widest: int, arrival: torch.Tensor, arrived: int) -> KeyOrder:
        return KeyOrder(all_keys, tiles, low[tiles], high[tiles], uploaded.int32[starts], widest, arrival, arrived)

    found, at = [], 0
    for parts, starts in orders:
        begin, held, later, own = first[at], [], [], []
        for index, part in enumerate(parts):
            tile = first[at + index]
            held.append(part.arrival[: part.arrived] + (tile - begin))
            later.append(part.arrival[part.arrived :] + (tile - begin))
            tiles = slice(tile, tile + part.count)
            own.append(order(tiles, starts.own[index], part.count, part.arrival, part.arrived))
        at += len(parts)
        arrival, arrived = torch.cat(held + later), sum(part.arrived for part in parts)
        widest = max(part.count for part in parts)
        found.append((order(slice(begin, first[at]), starts.all, widest, arrival, arrived), own))
    return found


def _tiled(slots: torch.Tensor, positions: torch.Tensor, tile_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    padding = -slots.numel() % tile_keys
    return (
        torch.cat([slots, slots[:1].expand(padding)]).view(-1, tile_keys),
        functional.pad(positions, (0, padding), value=ABSENT).view(-1, tile_keys),
    )
