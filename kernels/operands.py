"""What a layer attends with: its query, the paged pools and the numbers they are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Operands:
    """Operands of one layer, for all heads of this rank or for a block of them; nothing is copied.

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
        kv_heads = slice(heads.start // self.group, -(-heads.stop // self.group))
        return replace(
            self,
            query=self.query[:, heads],
            key_pool=self.key_pool[:, kv_heads],
            value_pool=self.value_pool[:, kv_heads],
        )
