"""A dense backend that runs only the batch that it was prepared for.

Backends on GPUs keep page tables and lengths in their metadata, so what they compute for another batch is wrong. Those
of the CPU take both from the batch, and nothing shows. This one raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mminference_sgl.portable import dense

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class UnpreparedBatchError(RuntimeError):
    """A forward of a batch other than the one that metadata was made for last."""


class Prepared(NamedTuple):
    """What the metadata of a batch is made from: lists, one entry per request, `write` one per token."""

    mode: str
    rows: list[int]
    lengths: list[int]
    prefixes: list[int]
    chunks: list[int]
    write: list[int]

    def in_short(self) -> str:
        return f"{self.mode} of rows {self.rows} with {self.chunks} tokens after {self.prefixes}, {self.lengths} in all"

    @classmethod
    def of(cls, batch: ForwardBatch) -> Prepared:
        extends = batch.forward_mode.is_extend()
        return cls(
            batch.forward_mode.name,
            batch.req_pool_indices.tolist(),
            batch.seq_lens.tolist(),
            batch.extend_prefix_lens.tolist() if extends else [],
            batch.extend_seq_lens.tolist() if extends else [],
            batch.out_cache_loc.tolist(),
        )


class StrictDenseAttnBackend(dense.PortableDenseAttnBackend):
    """The CPU platform's backend, but for the check; `prepared` is what it was given last, None before that."""

    prepared: Prepared | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.prepared = Prepared.of(forward_batch)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        self._check(forward_batch, q)
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        self._check(forward_batch, q)
        out: torch.Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return out

    def _check(self, batch: ForwardBatch, q: torch.Tensor) -> None:
        asked, prepared = Prepared.of(batch), self.prepared
        if asked != prepared:
            raise UnpreparedBatchError(
                f"asked to run {asked.in_short()}, prepared for {prepared and prepared.in_short()}"
            )
        if q.shape[0] != len(asked.write):
            raise UnpreparedBatchError(f"{q.shape[0]} rows of queries for a batch of {len(asked.write)} tokens")


def install() -> None:
    """Serve with it wherever this process and those forked from it would serve with the CPU platform's backend."""
    dense.create = StrictDenseAttnBackend
