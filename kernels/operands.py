"""What a layer attends with: its query, the paged pools and the numbers they are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .tiles import KeyOrder

KEPT_BYTES = 2 << 30
"""Bound on the keys and values that operands keep in other orders."""


@dataclass(frozen=True)
class Operands:
    """Operands of one layer, for all heads of this rank or for a block of them.

    ``query`` [batch rows, H, D]. ``key_pool`` [slots, KV heads, D] and ``value_pool`` [slots, KV heads, Dv], in the
    query's dtype or in fp8 e4m3; the chunk's keys and values are already in them. ``scale``: what logits are multiplied
    by before the softmax. ``key_scale``, ``value_scale``: what the pools' elements are multiplied by.
    """

    query: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    scale: float
    key_scale: float = 1.0
    value_scale: float = 1.0
    _ordered: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def in_order(self, order: KeyOrder, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the order of a pass, contiguous by head: [KV heads, key tiles * tile_keys, D] each.

        Copied once, and kept for whoever asks next within :data:`KEPT_BYTES`: the probe and all passes over an order
        read the same. ``order``: of the forward's plan, which outlives the layer's operands.
        """
        key = id(order), dtype
        if key in self._ordered:
            return self._ordered[key]
        slots = order.slots.flatten()
        keys, values = (
            pool.index_select(0, slots).transpose(0, 1).to(dtype).contiguous()
            for pool in (self.key_pool, self.value_pool)
        )
        kept = sum(operand.nbytes for pair in self._ordered.values() for operand in pair)
        if kept + keys.nbytes + values.nbytes <= KEPT_BYTES:
            self._ordered[key] = keys, values
        return keys, values

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
        )
