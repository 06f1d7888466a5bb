"""What a layer attends with: its query, the paged pools and the numbers they are multiplied by."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass, field, replace

import torch

from .tiles import KeyOrder

COPIED_BYTES = 1 << 29
"""Bound on the keys and values that are held in one token order, beyond which KV heads take turns."""


@dataclass(frozen=True)
class Operands:
    """Operands of one layer, for all heads of this rank or for a block of them.

    ``query`` [batch rows, H, D]. ``key_pool`` [slots, KV heads, D] and ``value_pool`` [slots, KV heads, Dv], in the
    query's dtype or in fp8 e4m3; the chunk's keys and values are already in them. ``scale``: what logits are multiplied
    by before the softmax, positive. ``key_scale``, ``value_scale``: what the pools' elements are multiplied by.
    ``first``: place of the first head in its GQA group, which comes in parts if it is not 0.
    """

    query: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    scale: float
    key_scale: float = 1.0
    value_scale: float = 1.0
    first: int = 0
    _whole: tuple[Operands, slice] | None = field(default=None, repr=False, compare=False)

    def in_order(self, order: KeyOrder, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in a token order: [KV heads, key tiles * tile_keys, D] and [..., Dv], contiguous by head.

        Copied once per layer, for all of its heads while they stay within :data:`COPIED_BYTES`: the probe and all
        passes over an order read the same. The memory is the order's, and the next layer's to fill.
        """
        if self._whole is not None and self._whole[0].copy_bytes(order) <= COPIED_BYTES:
            whole, own = self._whole
            keys, values = whole.in_order(order, dtype)
            return keys[own], values[own]
        if order.part_of is not None:
            larger, tiles = order.part_of
            own = slice(tiles.start * order.tile_keys, tiles.stop * order.tile_keys)
            keys, values = self.in_order(larger, dtype)
            return keys[:, own], values[:, own]
        shape = self.kv_heads, self.key_pool.shape[2], self.value_pool.shape[2], dtype
        held = order.copies.get(shape)
        if held is None:
            size = self.kv_heads, order.slots.numel()
            keys, values = (
                torch.empty(*size, pool.shape[2], dtype=dtype, device=pool.device)
                for pool in (self.key_pool, self.value_pool)
            )
        else:
            owner, keys, values = held
            if owner() is self:
                return keys, values
        copy = _copy if keys.device.type == "cpu" else importlib.import_module(".copy_triton", __package__).copy
        copy(self.key_pool, self.value_pool, order, keys, values)
        order.copies[shape] = weakref.ref(self), keys, values
        return keys, values

    def copy_bytes(self, order: KeyOrder) -> int:
        """Bytes that the keys and values of all heads take in a token order, in the query's dtype."""
        size = self.key_pool.shape[2] + self.value_pool.shape[2]
        return order.slots.numel() * self.kv_heads * size * self.query.element_size()

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.key_pool.shape[1]

    @property
    def group(self) -> int:
        """GQA group: query heads per KV head."""
        return self.heads // self.kv_heads

    def block(self, heads: slice) -> Operands:
        """Those of a block of query heads: of a part of one GQA group, of one, or of several whole ones."""
        if heads.stop - heads.start == self.heads:
            return self
        kv_heads = slice(heads.start // self.group, -(-heads.stop // self.group))
        return replace(
            self,
            query=self.query[:, heads],
            key_pool=self.key_pool[:, kv_heads],
            value_pool=self.value_pool[:, kv_heads],
            first=self.first + heads.start % self.group,
            _whole=(self, kv_heads),
        )


def _copy(
    key_pool: torch.Tensor, value_pool: torch.Tensor, order: KeyOrder, keys: torch.Tensor, values: torch.Tensor
) -> None:
    tiles = slice(None) if order.arrived == len(order.slots) else order.arrival[: order.arrived].long()
    slots = order.slots[tiles]
    for pool, ordered in ((key_pool, keys), (value_pool, values)):
        rows = pool.index_select(0, slots.flatten()).view(*slots.shape, *pool.shape[1:])
        ordered.view(ordered.shape[0], *order.slots.shape, -1)[:, tiles] = rows.movedim(2, 0).to(ordered.dtype)
