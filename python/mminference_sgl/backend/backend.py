"""SGLang attention backend: owns prefill, hands everything that is not sparse-eligible to a dense SGLang backend."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention

from mminference_sgl import __version__, _core
from mminference_sgl.backend import capture
from mminference_sgl.backend.figures import ChunkFigures, Figures
from mminference_sgl.backend.geometry import GeometryError, ModelGeometry
from mminference_sgl.backend.interface import delegate
from mminference_sgl.backend.layers import Survey, layer_reason
from mminference_sgl.backend.layout import LayoutCache
from mminference_sgl.backend.metrics import Metrics
from mminference_sgl.backend.recording import Recorder
from mminference_sgl.backend.resting import Resting
from mminference_sgl.backend.samples import Samples
from mminference_sgl.backend.sglang_compat import head_offset, metric_labels, set_kv_buffer
from mminference_sgl.backend.start import Start
from mminference_sgl.backend.sub_batch import sub_batch, without_media
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.plan import ForwardPlan, SparseRequest, build, smallest_tile
from mminference_sgl.method.stage_clock import StageClock

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

_FEW_ROWS = 32
"""Chunks of fewer rows run dense."""
_NO_GAIN = "nothing to save"
_OUT_OF_MEMORY = "out of memory"
_NO_MEMORY_ON_HOST = "can't allocate memory"
"""What PyTorch says of a CPU, where it raises no error of its own."""


@dataclass
class _Forward:
    """One forward that has sparse rows: the plan, and what the dense backend computes of the batch.

    ``plan`` None once the last layer is done, so that nothing of a request outlives its forward; ``over`` says why.
    ``rows``: of all requests; those behind are padding. ``dense_is_for``: the batch whose metadata the dense backend
    holds. ``reports``: of each layer so far, with its id.
    """

    plan: ForwardPlan | None
    rows: int
    dense_rows: torch.Tensor | None
    dense_batch: ForwardBatch | None
    full_batch: ForwardBatch
    started: float
    clock: StageClock | None
    dense_is_for: ForwardBatch | None
    reports: list[tuple[int, list[prefill.LayerReport]]] = field(default_factory=list)
    over: str = "behind the last one"


@delegate
class MMInferenceAttnBackend(AttentionBackend):
    """Sparse prefill for requests with media, dense for everything else.

    ``counters`` counts chunks of requests by what became of them: ``sparse`` or ``dense:<reason>``; layers as
    ``sparse_layers`` or ``dense_layers:<reason>``; heads that the guard sent to dense as ``guarded_heads:<layer>``; and
    runs by whether a ``stride:`` was ``found`` in them or ``none``. ``tokens`` counts the chunks' tokens under the
    chunks' names, ``seconds`` what a stage has taken, if anybody wants to know.
    """

    def __init__(self, runner: ModelRunner, dense: AttentionBackend, layers: Survey) -> None:
        """Settles how the server prefills and says it in one log line.

        Raises:
            ConfigError, ops.ImplementationUnavailableError: see :meth:`.Start.of`.
        """
        # Members that the base class sets are the dense backend's.
        self.dense = dense
        super().__init__()
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.data_type = runner.kv_cache_dtype
        self.counters: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._in_flight: deque[tuple[int, Figures, StageClock | None]] = deque()
        self._forwards = 0
        self._logged: set[str] = set()
        self._forward: _Forward | None = None
        self._specs: dict[tuple[int, int], list[HeadSpec]] = {}
        self._layers = layers
        self._device = torch.device(runner.device)
        self._start = start = Start.of(runner, layers)
        self._samples = Samples(start.config.bound("media"))
        self._resting = Resting(start.dense_above, self._device)
        self._head_offset = head_offset(runner)
        self._run_layer = capture.recording(prefill.run_layer, os.environ, self._head_offset)
        self._layouts = LayoutCache(
            ModelGeometry.of(runner.model_config.hf_config),
            chunk_tokens=start.chunk_tokens,
            tile_queries=smallest_tile(start.config.tile_queries, start.sharing),
            tile_keys=start.config.tile_keys,
            cell_size=start.config.cell_size,
            frame_stride=start.config.frame_stride,
            counters=self.counters,
        )
        self._recorder = Recorder.of_environment(start, runner, layers)
        labels = metric_labels(runner)
        self._metrics = Metrics(labels, self._info()) if labels is not None else None
        self._announce(runner)

    # -- what SGLang calls ---------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plans the forward: which requests run sparse, and the dense backend's metadata for the others."""
        self._forward = None
        self._forwards += 1
        sparse = self._sparse_requests(forward_batch)
        if self._recorder is not None:
            self._recorder.begin(sparse, forward_batch.batch_size, self.req_to_token_pool.req_to_token)
            sparse = {}
        started = time.perf_counter()
        plan = self._plan(list(sparse.values())) if sparse else None
        self._tell()
        if plan is None:
            self.dense.init_forward_metadata(forward_batch)
            return
        rest = [i for i in range(forward_batch.batch_size) if i not in sparse]
        rows, batch = sub_batch(forward_batch, rest, self.kv_index_translator) if rest else (None, None)
        if batch is not None:
            self.dense.init_forward_metadata(batch)
        whole = without_media(forward_batch)
        all_rows = sum(forward_batch.extend_seq_lens_cpu)
        clock = StageClock(self._device) if self._metrics is not None else None
        self._forward = _Forward(plan, all_rows, rows, batch, whole, started, clock, dense_is_for=batch)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Graph capture and replay are the dense backend's."""
        self._forward = None
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

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
        """Decode is dense."""
        out: torch.Tensor = self.dense.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return out

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
        """Prefill of one layer: the plan's rows sparse, the other rows of the batch dense."""
        forward = self._forward
        if forward is None:
            out = self._dense_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
            if self._recorder is not None and self._recorder.wants(layer.layer_id):
                operands = self._operands(q, layer)
                self._recorder.layer(layer.layer_id, operands, out.view_as(operands.query))
            return out
        if forward.plan is None or k is None or v is None:
            reason = "no keys of its own" if forward.plan is not None else forward.over
        else:
            reason = layer_reason(layer, self.token_to_kv_pool, kwargs)
            resting = self._resting.requests(layer.layer_id, forward.plan.requests, self._forwards)
            if not reason and len(resting) == len(forward.plan.requests):
                reason = _NO_GAIN
                forward.reports.append((layer.layer_id, prefill.dense_reports(forward.plan, layer.tp_q_head_num)))
        if reason:
            self.counters[f"dense_layers:{reason}"] += 1
            self._prepare_dense(forward, forward.full_batch)
            out = self._dense_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        else:
            assert k is not None
            assert v is not None
            if save_kv_cache:
                set_kv_buffer(self.token_to_kv_pool, layer, forward_batch, k, v)
            sparse = self._sparse_extend(forward, q, k, v, layer, resting, kwargs)
            if sparse is None:
                self._prepare_dense(forward, forward.full_batch)
                sparse = self._dense_extend(q, k, v, layer, forward_batch, False, **kwargs)
            out = sparse
        if layer.layer_id == self._layers.last and forward.plan is not None:
            self._finish(forward)
        return out

    def _sparse_extend(
        self,
        forward: _Forward,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        resting: frozenset[int],
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """None if memory ran out: then this layer and the ones behind it are dense, for all requests of the batch."""
        assert forward.plan is not None
        operands = self._operands(q, layer)
        given = operands, forward.plan, self._layer_specs(layer), self._start.config
        number, implementation = layer.layer_id, self._start.implementation
        try:
            out = torch.empty_like(operands.query)
            out[forward.rows :] = 0
            reports = self._run_layer(*given, out, implementation, number, clock=forward.clock, dense=resting)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self._fall_back(_OUT_OF_MEMORY, error, *(request.chunk for request in forward.plan.requests))
            forward.plan, forward.reports, forward.over = None, [], _OUT_OF_MEMORY
            self._tell()
            return None
        if forward.dense_rows is not None:
            self._prepare_dense(forward, forward.dense_batch)
            rows = forward.dense_rows
            part = self._dense_extend(q[rows], k[rows], v[rows], layer, forward.dense_batch, False, **kwargs)
            out[rows] = part.view(-1, *out.shape[1:])
        self.counters["sparse_layers"] += 1
        forward.reports.append((layer.layer_id, reports))
        return out.view(q.shape)

    def _operands(self, q: torch.Tensor, layer: RadixAttention) -> Operands:
        return Operands(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            layer.scaling,
            _scale(layer.k_scale_float),
            _scale(layer.v_scale_float),
        )

    def _dense_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.dense.forward_extend(*args, **kwargs)
        return out

    # -- which requests ------------------------------------------------------------------------------------------------

    def _sparse_requests(self, batch: ForwardBatch) -> dict[int, SparseRequest]:
        """Batch index -> what the plan needs, for the requests that run sparse in this forward."""
        if not batch.forward_mode.is_extend_without_speculative():
            return {}
        prefixes, chunks = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
        if prefixes is None or chunks is None:
            return {}
        found: dict[int, SparseRequest] = {}
        row_start = 0
        for index, (prefix, chunk) in enumerate(zip(prefixes, chunks, strict=True)):
            mm_inputs = batch.mm_inputs[index] if batch.mm_inputs else None
            reason = self._request_reason(prefix, chunk, mm_inputs)
            if reason:
                self._count(f"dense:{reason}", chunk)
            else:
                try:
                    layout = self._layouts.get(mm_inputs, prefix + chunk, self._device)
                    layout.begin(prefix, prefix + chunk)
                    pool_row = batch.req_pool_indices[index : index + 1]
                    found[index] = SparseRequest(layout, prefix, chunk, pool_row, row_start)
                except (GeometryError, _core.LayoutError) as error:
                    self._fall_back("geometry", error, chunk)
            row_start += chunk
        return found

    def _plan(self, requests: list[SparseRequest]) -> ForwardPlan | None:
        """The plan of a forward, None if memory ran out."""
        config, started = self._start.config, time.perf_counter()
        try:
            return build(
                requests,
                self.req_to_token_pool.req_to_token,
                tile_queries=config.tile_queries,
                tile_keys=config.tile_keys,
                probe_rows=config.probe_rows,
                sharing=self._start.sharing,
            )
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self._fall_back(_OUT_OF_MEMORY, error, *(request.chunk for request in requests))
            return None
        finally:
            self.seconds["plan"] += time.perf_counter() - started

    def _count(self, became: str, *chunks: int) -> None:
        """Counts chunks of so many tokens by what became of them."""
        self.counters[became] += len(chunks)
        self.tokens[became] += sum(chunks)

    def _request_reason(self, prefix: int, chunk: int, mm_inputs: Any) -> str:
        """Why a request runs dense by rule, empty if it may run sparse."""
        if not self._start.config.active:
            return "off"
        if prefix + chunk < self._start.min_tokens:
            return "short"
        if chunk < _FEW_ROWS:
            return "few rows"
        has_media = mm_inputs is not None and bool(mm_inputs.mm_items)
        if not has_media and "text" not in self._start.modalities:
            return "text only"
        return "" if self._start.modalities else "pattern"

    def _fall_back(self, reason: str, error: Exception, *chunks: int) -> None:
        """Chunks that cannot be planned run dense: counted always, logged once per reason."""
        self._count(f"dense:{reason}", *chunks)
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("mminference: request runs dense: %s: %s", reason, error)

    # -- layers and heads ----------------------------------------------------------------------------------------------

    def _layer_specs(self, layer: RadixAttention) -> list[HeadSpec]:
        """Head specs of this rank's query heads; pattern files count layers and heads over all ranks."""
        key = (layer.layer_id, layer.tp_q_head_num)
        if key not in self._specs:
            first = self._head_offset * layer.tp_q_head_num
            heads = range(first, first + layer.tp_q_head_num)
            self._specs[key] = self._start.pattern.specs(layer.layer_id, heads)
        return self._specs[key]

    def _prepare_dense(self, forward: _Forward, batch: ForwardBatch | None) -> None:
        """Gives the dense backend the metadata of the batch it is about to compute: all of it, or the dense rows.

        It holds one at a time; only a model that mixes sparse and dense layers ever switches.
        """
        if forward.dense_is_for is not batch:
            self.dense.init_forward_metadata(batch)
            forward.dense_is_for = batch

    # -- what the operator sees ----------------------------------------------------------------------------------------

    def _announce(self, runner: ModelRunner) -> None:
        start, config = self._start, self._start.config
        architectures = getattr(runner.model_config.hf_config, "architectures", None) or ["unknown"]
        logger.info(
            "mminference: model=%s pattern=%s active=%s min_tokens=%d dense_above=%.2f error=%g text_error=%g "
            "implementation=%s dense=%s chunk_tokens=%d sparse_layers=%d dense_layers=%s",
            architectures[0],
            start.pattern.id,
            config.active,
            start.min_tokens,
            start.dense_above,
            config.bound("media"),
            config.bound("text"),
            start.implementation,
            type(self.dense).__name__,
            start.chunk_tokens,
            len(self._layers.sparse),
            dict(self._layers.dense) or "none",
        )

    def _info(self) -> dict[str, Any]:
        """Settings that a dashboard shows."""
        start, config = self._start, self._start.config
        return {
            "version": __version__,
            "pattern": start.pattern.id,
            "implementation": start.implementation,
            "dense_backend": type(self.dense).__name__,
            "active": config.active,
            "min_tokens": start.min_tokens,
            "error": config.bound("media"),
            "text_error": config.bound("text"),
        }

    def _finish(self, forward: _Forward) -> None:
        """The last layer is done: its figures are under way; only a log at level debug waits for them."""
        assert forward.plan is not None
        requests = forward.plan.requests
        chunks = [request.chunk for request in requests]
        if forward.reports:
            self._count("sparse", *chunks)
            figures = Figures(requests, forward.reports)
            if logger.isEnabledFor(logging.DEBUG):
                _log(figures.read(), time.perf_counter() - forward.started)
            self._in_flight.append((self._forwards, figures, forward.clock))
        else:
            self._count("dense:layers", *chunks)
        forward.plan, forward.reports = None, []
        self._tell()

    def _tell(self) -> None:
        """Counts, samples and exports what has arrived; waits for what is due, which has long been there."""
        while self._in_flight and (
            self._in_flight[0][1].arrived or self._resting.is_due(self._in_flight[0][0], self._forwards)
        ):
            number, figures, clock = self._in_flight.popleft()
            chunks = figures.read()
            self._resting.note(chunks, number)
            for chunk in chunks:
                self.counters.update({f"guarded_heads:{layer}": heads for layer, heads in chunk.guarded.items()})
            self._samples.tell(chunks)
            if self._metrics is not None:
                self._metrics.observe(chunks)
            if clock is not None:
                for stage, seconds in clock.seconds().items():
                    self.seconds[stage] += seconds
        if self._metrics is not None:
            self._metrics.publish(self.counters, self.tokens, self.seconds, len(self._layouts))


def _log(chunks: list[ChunkFigures], seconds: float) -> None:
    """One line per sparse request of a forward."""
    for index, chunk in enumerate(chunks):
        logger.debug("mminference prefill request=%d %s milliseconds=%.1f", index, chunk.words, seconds * 1e3)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY_ON_HOST in str(error)


def _scale(of_layer: float | None) -> float:
    """What the elements of an fp8 pool are multiplied by; checkpoints without scales have none."""
    return 1.0 if of_layer is None else of_layer
