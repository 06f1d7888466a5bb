"""What a layer attends with: its query, the paged pools and the numbers they are multiplied by."""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from .sketch import HELD, signs
from .tiles import ForwardKeys, KeyOrder

COPIED_BYTES = 1 << 30
"""Bound on the keys and values that are held in token orders, beyond which KV heads take turns."""


class Copies(NamedTuple):
    """Keys [KV heads, key tiles * tile_keys, D] and values [..., Dv] in a token order, the keys of a head contiguous.

    ``parts`` [..., HELD]: 1 and the projected value of each key, see :mod:`.sketch`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    parts: torch.Tensor


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

    def in_order(self, order: KeyOrder, dtype: torch.dtype) -> Copies:
        """Keys and values in a token order."""
        keys = slice(order.tiles.start * order.tile_keys, order.tiles.stop * order.tile_keys)
        return Copies(*(copied[:, keys] for copied in self.copies(order.all_keys, dtype)))

    def copies(self, every: ForwardKeys, dtype: torch.dtype) -> Copies:
        """Keys and values in all orders, one behind the other.

        Copied once per layer, for all of its heads while they stay within :data:`COPIED_BYTES`: the probe and all
        passes read the same. The memory is the forward's, and the next layer's to fill.
        """
        if self._whole is not None and self._whole[0].copy_bytes(every) <= COPIED_BYTES:
            whole, heads = self._whole
            return Copies(*(copied[heads] for copied in whole.copies(every, dtype)))
        shape = self.kv_heads, self.key_pool.shape[2], self.value_pool.shape[2], dtype
        owner, held = every.copies.get(shape, (None, None))
        copies: Copies | None = held
        if copies is None:
            size, device = (self.kv_heads, every.slots.numel()), self.key_pool.device
            copies = Copies(*(torch.empty(*size, width, dtype=dtype, device=device) for width in (*shape[1:3], HELD)))
        if owner is None or owner() is not self:
            cpu = self.key_pool.device.type == "cpu"
            copy = _copy if cpu else importlib.import_module(".copy_triton", __package__).copy
            copy(self.key_pool, self.value_pool, self.value_scale, every, copies)
            every.copies[shape] = weakref.ref(self), copies
        return copies

    def copy_bytes(self, every: ForwardKeys) -> int:
        """Bytes that the copies of all heads take in all token orders, in the query's dtype."""
        size = self.key_pool.shape[2] + self.value_pool.shape[2] + HELD
        return every.slots.numel() * self.kv_heads * size * self.query.element_size()

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
    key_pool: torch.Tensor, value_pool: torch.Tensor, value_scale: float, every: ForwardKeys, copies: Copies
) -> None:
    tiles = slice(None) if len(every.arrived) == len(every.slots) else every.arrived.long()
    slots = every.slots[tiles]
    keys, values, parts = (copied.view(copied.shape[0], *every.slots.shape, -1) for copied in copies)
    for pool, ordered in ((key_pool, keys), (value_pool, values)):
        rows = pool.index_select(0, slots.flatten()).view(*slots.shape, *pool.shape[1:])
        rows = rows.movedim(2, 0).to(ordered.dtype)
        ordered[:, tiles] = rows
    parts[:, tiles, :, 0] = 1
    parts[:, tiles, :, 1:] = torch.matmul(rows, signs(rows.shape[3], rows.device).to(rows.dtype)) * value_scale
