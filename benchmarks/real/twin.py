"""The server's offline twin: a document prefilled in chunks with the method in place of attention, layer by layer."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.real import model as dense_model
from benchmarks.real.reading import Reading
from benchmarks.real.weights import cache
from mminference_sgl import _core
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import plan as planning
from mminference_sgl.method import prefill

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.real.model import Attend, LanguageModel, Shape
    from mminference_sgl.method.catalog import HeadSpec
    from mminference_sgl.method.config import Config

Item = tuple[int, list[tuple[int, int]], tuple[int, int, int] | None]
"""Modality, spans, grid."""
CPU = torch.device("cpu")
_ROWS_AT_A_TIME = 256
"""Rows whose logits are held."""


@dataclass(frozen=True)
class ChunkReport:
    """One chunk's reports, by layer; ``prefix``: tokens before it."""

    prefix: int
    chunk: int
    layers: list[prefill.LayerReport]

    @property
    def density(self) -> float:
        """Computed tiles over causal ones."""
        return float(sum(r.tiles for r in self.layers) / sum(r.causal for r in self.layers))

    @property
    def coverage(self) -> float:
        """Mean over layers and heads."""
        return float(torch.stack([r.coverage for r in self.layers]).mean())

    @property
    def error(self) -> float:
        """Largest over the layers."""
        return float(torch.stack([r.error for r in self.layers]).max())


class Method:
    """The method as attention of one document: a plan for each chunk, and what its layers reported.

    ``config``: with ``tile_queries`` filled in; ``specs``: by layer, one per query head. ``until``: the token position
    from which on chunks are dense, None for none.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[Sequence[HeadSpec]],
        length: int,
        chunk: int,
        shape: Shape,
        until: int | None = None,
        items: Sequence[Item] = (),
    ) -> None:
        self.config, self.scale = config, shape.scale
        self._until = length if until is None else until
        self._specs, self._chunk = specs, chunk
        self._sharing = prefill.sharing(config, shape.heads // shape.kv_heads)
        layout = _core.Layout(
            length,
            items,
            chunk_tokens=chunk,
            tile_queries=planning.smallest_tile(config.tile_queries, self._sharing),
            cell_size=config.cell_size,
        )
        self._layout = planning.DeviceLayout(layout, config.tile_keys, CPU)
        self._slots = torch.arange(1, length + 1, dtype=torch.int32)[None]
        self.chunks: list[ChunkReport] = []
        self.plan: planning.ForwardPlan | None = None

    def __call__(
        self, layer: int, start: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attention of one layer, see :class:`~.model.Attend`."""
        if start >= self._until or start + len(query) < (self.config.min_tokens or 0):
            return dense_model.dense(layer, start, query, keys, values)
        if self.plan is None or self.plan.requests[0].prefix != start:
            self.plan = self._planned(start, len(query))
            self.chunks.append(ChunkReport(start, len(query), []))
        out = torch.empty_like(query)
        specs = self._specs[layer]
        operands = Operands(query, keys, values, self.scale)
        reports = prefill.run_layer(operands, self.plan, specs, self.config, out, "torch", layer=layer)
        self.chunks[-1].layers.extend(reports)
        return out

    def _planned(self, start: int, rows: int) -> planning.ForwardPlan:
        request = planning.SparseRequest(self._layout, start, rows, torch.tensor([0]), 0)
        return planning.build(
            [request],
            self._slots,
            tile_queries=self.config.tile_queries,
            tile_keys=self.config.tile_keys,
            probe_rows=self.config.probe_rows,
            sharing=self._sharing,
        )


@torch.inference_mode()
def read(model: LanguageModel, tokens: torch.Tensor, chunk: int, attend: Attend, judged: int | None = None) -> Reading:
    """Prefills a document and reads it from token ``judged`` on, or the second half of it."""
    stream, first = model.stream(len(tokens)), len(tokens) // 2 if judged is None else judged
    hidden = torch.cat([model.prefill(stream, part, attend) for part in tokens.split(chunk)])[first - 1 : -1]
    logprobs, tops = [], []
    for rows, targets in zip(hidden.split(_ROWS_AT_A_TIME), tokens[first:].split(_ROWS_AT_A_TIME), strict=True):
        logits = model.logits(rows)
        logprobs.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
        tops.append(logits.argmax(-1))
    return Reading(torch.cat(logprobs), torch.cat(tops), hidden)


def dense(model: LanguageModel, name: str, tokens: torch.Tensor, chunk: int, judged: int | None = None) -> Reading:
    """The reading under dense attention; kept in the cache, as it is the same under all settings.

    ``name``: of the model.
    """
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    digest += "" if judged is None else f"-{judged}"
    path = cache() / "dense" / f"{name}-{digest}-{torch.__version__}.pt"
    if not path.exists():
        reading = read(model, tokens, chunk, dense_model.dense, judged)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{time.monotonic_ns()}")
        torch.save([reading.logprob, reading.top, reading.hidden], scratch)
        scratch.replace(path)
    return Reading(*torch.load(path))


@torch.inference_mode()
def divergence(model: LanguageModel, reading: Reading, reference: Reading) -> torch.Tensor:
    """Kullback-Leibler divergence of next-token distributions from the reference's, in nats: fp32 [tokens]."""
    assert reading.hidden is not None
    assert reference.hidden is not None
    parts = []
    for rows, other in zip(reference.hidden.split(_ROWS_AT_A_TIME), reading.hidden.split(_ROWS_AT_A_TIME), strict=True):
        wanted, got = model.logits(rows).log_softmax(-1), model.logits(other).log_softmax(-1)
        parts.append((wanted.exp() * (wanted - got)).sum(-1))
    return torch.cat(parts)
