"""The part of an extend batch that the dense backend computes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

PER_REQUEST = ("req_pool_indices", "seq_lens", "extend_prefix_lens", "extend_seq_lens", "orig_seq_lens")
PER_REQUEST_ON_HOST = ("seq_lens_cpu",)
PER_ROW = ("input_ids", "positions", "out_cache_loc")
"""Tensors of a batch by what their first dimension counts."""


def without_media(batch: ForwardBatch) -> ForwardBatch:
    """A batch that may be kept without keeping the requests' pixels and embeddings alive."""
    part = copy.copy(batch)
    part.mm_inputs = None
    part.input_embeds = None
    return part


def sub_batch(batch: ForwardBatch, indices: Sequence[int], translator: Any = None) -> tuple[torch.Tensor, ForwardBatch]:
    """The part of an extend batch that holds only some requests, and the batch rows of theirs, int64.

    ``translator``: the runner's ``KVIndexTranslator``, where SGLang has them.
    """
    prefixes, chunks = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk)
    device = batch.req_pool_indices.device
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices]).to(device)
    on_host = torch.tensor(indices)
    index = on_host.to(device)
    part = without_media(batch)
    part.batch_size = len(indices)
    part.extend_prefix_lens_cpu = [prefixes[i] for i in indices]
    part.extend_seq_lens_cpu = [chunks[i] for i in indices]
    part.extend_num_tokens = int(rows.numel())
    part.seq_lens_sum = sum(prefixes[i] + chunks[i] for i in indices)
    for names, chosen in ((PER_REQUEST, index), (PER_REQUEST_ON_HOST, on_host), (PER_ROW, rows)):
        for name in names:
            value = getattr(batch, name, None)
            if value is not None:
                setattr(part, name, value[chosen])
    part.extend_start_loc = torch.zeros_like(part.extend_seq_lens)
    part.extend_start_loc[1:] = part.extend_seq_lens.cumsum(0)[:-1]
    if translator is not None:
        # The whole batch's would tell where its first requests' keys are.
        part.kv_loc_plan = translator.own_plan(part)
    return rows, part
