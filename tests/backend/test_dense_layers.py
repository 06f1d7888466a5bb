"""Models that mix sparse and sliding-window layers: the dense backend is prepared for every batch that it runs.

Forwards of a small model are driven by hand, its two layers one after the other, over a pool as SGLang makes it for
such models: keys of sliding layers lie in slots of their own.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import strict_dense
from fake_inputs import media, request

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WINDOW = 37
CONTEXT = 1024
FULL, SLIDING = 0, 1
"""The layers' ids."""


@dataclass
class Model:
    """The layers' queries, keys and values of each request's tokens, and a backend over a pool."""

    lengths: Sequence[int]
    backend: Any
    runner: Any
    layers: nn.ModuleList
    operands: dict[tuple[int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    done: list[int] = field(default_factory=list)

    @property
    def dense(self) -> strict_dense.StrictDenseAttnBackend:
        return self.backend.prefill_backend.dense

    @property
    def counters(self) -> Any:
        return self.backend.prefill_backend.counters

    def run(self, chunks: dict[int, int], mm_inputs: dict[int, Any], *, decode: bool = False) -> None:
        """The next `chunks` tokens of these requests in one batch; each layer's rows are compared with plain attention.

        Args:
            chunks: request to tokens.
            mm_inputs: request to its media.
            decode: the tokens come from decoding, one per request.
        """
        batch = self._batch(chunks, mm_inputs, decode=decode)
        self.backend.init_forward_metadata(batch)
        for layer in self.layers:
            q, k, v = (
                torch.cat([self._rows(layer.layer_id, operand, r, n) for r, n in chunks.items()])
                for operand in range(3)
            )
            out = self.backend.forward(q=q.flatten(1), k=k, v=v, layer=layer, forward_batch=batch)
            expected = torch.cat([self._attention(layer.layer_id, r, n) for r, n in chunks.items()])
            torch.testing.assert_close(out.view_as(q), expected, atol=1e-4, rtol=1e-4)
        for request_id, count in chunks.items():
            self.done[request_id] += count

    def _rows(self, layer: int, operand: int, request_id: int, count: int) -> torch.Tensor:
        first = self.done[request_id]
        return self.operands[layer, request_id][operand][first : first + count]

    def _attention(self, layer: int, request_id: int, count: int) -> torch.Tensor:
        first = self.done[request_id]
        q, k, v = (operand[: first + count].transpose(0, 1) for operand in self.operands[layer, request_id])
        k, v = (operand.repeat_interleave(HEADS // KV_HEADS, 0) for operand in (k, v))
        distance = torch.arange(first + count)[:, None] - torch.arange(first + count)
        seen = (distance >= 0) & ((distance <= WINDOW) | (layer == FULL))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.transpose(0, 1)[first:]

    def _batch(self, chunks: dict[int, int], mm_inputs: dict[int, Any], *, decode: bool) -> Any:
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        rows = torch.tensor(list(chunks))
        prefixes = [self.done[request_id] for request_id in chunks]
        lengths = [prefix + chunk for prefix, chunk in zip(prefixes, chunks.values(), strict=True)]
        positions = torch.cat([torch.arange(*bounds) for bounds in zip(prefixes, lengths, strict=True)])
        slots = self.runner.req_to_token_pool.req_to_token
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            batch_size=len(chunks),
            input_ids=positions,
            req_pool_indices=rows,
            seq_lens=torch.tensor(lengths),
            seq_lens_cpu=torch.tensor(lengths),
            out_cache_loc=slots[rows.repeat_interleave(torch.tensor(list(chunks.values()))), positions].long(),
            seq_lens_sum=sum(lengths),
            positions=positions,
        )
        if not decode:
            batch.extend_prefix_lens, batch.extend_prefix_lens_cpu = torch.tensor(prefixes), prefixes
            batch.extend_seq_lens, batch.extend_seq_lens_cpu = (
                torch.tensor(list(chunks.values())),
                list(chunks.values()),
            )
            batch.extend_num_tokens = len(positions)
            batch.mm_inputs = [mm_inputs.get(request_id) for request_id in chunks]
        return batch


@pytest.fixture
def model_of(monkeypatch: pytest.MonkeyPatch):
    """From lengths of requests, a model with a sparse layer and a sliding one on a strict dense backend."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

    settings = {"min_tokens": 64, "error": 0.0, "pattern": "auto"}
    monkeypatch.setenv("MMINFERENCE_CONFIG", json.dumps(settings))
    monkeypatch.setattr(strict_dense.dense, "create", strict_dense.StrictDenseAttnBackend)

    def model_of(*lengths: int) -> Model:
        case = kit.DenseAttentionCase(
            "mixed", "mminference", ForwardMode.EXTEND, HEADS, KV_HEADS, 1, lengths, sliding_window_size=WINDOW
        )
        shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden_size": HEADS * HEAD_DIM}
        config = kit.TinyModelConfig(**shape, context_len=CONTEXT, sliding_window_size=WINDOW)
        runner = kit.MockModelRunner(
            case=case,
            model_config=config,
            dtype=torch.float32,
            device="cpu",
            max_context_len=CONTEXT,
            head_dim=HEAD_DIM,
        )
        size = len(lengths) * CONTEXT
        pool = SWAKVPool(
            size=size,
            size_swa=size,
            page_size=1,
            dtype=torch.float32,
            head_num=KV_HEADS,
            head_dim=HEAD_DIM,
            swa_attention_layer_ids=[SLIDING],
            full_attention_layer_ids=[FULL],
            device="cpu",
            enable_alt_stream=False,
        )
        generator = torch.Generator().manual_seed(sum(lengths))
        slots, swa_slots = (torch.randperm(size, generator=generator) + 1 for _ in range(2))
        pool.register_mapping(torch.cat([torch.zeros(1, dtype=torch.long), swa_slots, torch.tensor([-1])]))
        runner.req_to_token_pool.req_to_token[: len(lengths)] = slots.view(len(lengths), CONTEXT)
        runner.token_to_kv_pool = pool
        layers = nn.ModuleList(
            RadixAttention(
                num_heads=HEADS,
                head_dim=HEAD_DIM,
                scaling=HEAD_DIM**-0.5,
                num_kv_heads=KV_HEADS,
                layer_id=layer_id,
                sliding_window_size=window,
            )
            for layer_id, window in ((FULL, -1), (SLIDING, WINDOW))
        )
        runner.model = layers
        model = Model(lengths, ATTENTION_BACKENDS["mminference"](runner), runner, layers, done=[0] * len(lengths))
        for layer in layers:
            for request_id, length in enumerate(lengths):
                model.operands[layer.layer_id, request_id] = tuple(
                    torch.randn(length, heads, HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
                )
        return model

    return model_of


def video(frames: int) -> Any:
    """Four tokens of text and a video of 6 x 10 tokens a frame."""
    return request(media("VIDEO", [(4, 4 + 60 * frames - 1)], video_grid_thw=torch.tensor([[frames, 12, 20]])))


BATCHES = {
    "one sparse": ({0: 401}, (0,)),
    "two sparse": ({0: 401, 1: 333}, (0, 1)),
    "sparse and dense": ({0: 401, 1: 333}, (0,)),
    "dense and sparse": ({0: 401, 1: 333}, (1,)),
    "two dense": ({0: 401, 1: 333}, ()),
}
"""By name, the tokens of each request and the requests that have a video."""


@pytest.mark.parametrize("name", BATCHES)
def test_sliding_layers_run_on_metadata_of_their_batch(model_of, name: str):
    chunks, sparse = BATCHES[name]
    model = model_of(*chunks.values())
    with torch.no_grad():
        model.run(chunks, {number: video(5) for number in sparse})
    assert model.counters["sparse"] == len(sparse)
    assert model.counters["sparse_layers"] == bool(sparse)
    assert model.counters["dense_layers:sliding window"] == bool(sparse)


def test_forwards_of_changing_batches(model_of):
    """Chunks of requests that come, go on to decode, and share batches with others, sparse and dense."""
    model = model_of(700, 500, 450)
    clips = {0: video(10), 1: video(6)}
    with torch.no_grad():
        model.run({0: 133, 2: 97}, clips)
        model.run({0: 200}, clips)
        model.run({1: 250, 0: 150}, clips)
        model.run({1: 249}, clips)
        model.run({2: 352}, clips)
        model.run({1: 1, 2: 1}, clips, decode=True)
        model.run({0: 217}, clips)
    assert model.done == [700, 500, 450]
    assert model.counters["sparse"] == 6


def test_nothing_of_a_request_outlives_its_forward(model_of):
    model = model_of(401, 333)
    clip = video(5)
    gone = weakref.ref(clip)
    with torch.no_grad():
        model.run({0: 401, 1: 333}, {0: clip})
    del clip
    gc.collect()
    assert gone() is None
    sparse = model.backend.prefill_backend
    assert len(sparse._layouts) == 0
    assert sparse._forward.plan is None


def test_a_layer_behind_the_last_one_is_prepared_for(model_of):
    """A model may use its layers in another order than their ids tell."""
    model = model_of(401)
    model.layers = nn.ModuleList(reversed(model.layers))
    with torch.no_grad():
        model.run({0: 401}, {0: video(5)})
    assert model.counters["dense_layers:behind the last one"] == 1


@pytest.mark.fault("rows of no request", "zero, whatever the memory held")
@pytest.mark.parametrize("others", [{}, {1: 333}], ids=["alone", "beside-dense"])
def test_rows_of_no_request_are_zero(model_of, monkeypatch: pytest.MonkeyPatch, others: dict[int, int]):
    """CUDA graphs pad a batch; what such rows hold goes on through the model."""
    chunks = {0: 401, **others}
    model = model_of(*chunks.values())
    batch = model._batch(chunks, {0: video(5)}, decode=False)
    padding = 7
    batch.out_cache_loc = torch.cat([batch.out_cache_loc, torch.zeros(padding, dtype=torch.long)])
    rows = sum(chunks.values()) + padding
    q, k, v = (torch.ones(rows, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, torch.nan))
    with torch.no_grad():
        model.backend.init_forward_metadata(batch)
        out = model.backend.forward(q=q.flatten(1), k=k, v=v, layer=model.layers[FULL], forward_batch=batch)
    assert out.isfinite().all()
    assert (out[-padding:] == 0).all()
    assert (out[:-padding] != 0).any(1).all()


CHUNK_ENDS = [
    *(1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 94),  # text, the first frame's rows and its end
    *(123, 124, 125, 307, 363, 364, 365, 573),  # between frames and inside
    *(603, 604, 605, 630, 667, 670),  # the video's end, and few rows behind it
]


@pytest.mark.parametrize("end", CHUNK_ENDS)
def test_chunks_may_end_anywhere(model_of, end: int):
    """Around every kind of border: the rows of each chunk are those of plain attention over what lies before."""
    model = model_of(671)
    with torch.no_grad():
        model.run({0: end}, {0: video(10)})
        model.run({0: 671 - end}, {0: video(10)})
    assert model.done == [671]
    assert model.counters["sparse"] == (end >= 64) + (671 - end >= 32)
