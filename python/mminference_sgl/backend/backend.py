"""SGLang attention backend: owns prefill, hands everything that is not sparse-eligible to a dense SGLang backend."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from mminference_sgl import BACKEND_NAME, _core
from mminference_sgl.backend import crossover, selfcheck
from mminference_sgl.backend.geometry import GeometryError, ModelGeometry
from mminference_sgl.backend.layout import LayoutCache
from mminference_sgl.backend.sglang_compat import agreed, default_dense_backend, head_offset, set_kv_buffer
from mminference_sgl.kernels import ops
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import MODALITIES, HeadSpec, PatternFile, load
from mminference_sgl.method.config import Config, ConfigError, environment_sources, from_sources, server_source
from mminference_sgl.method.plan import ForwardPlan, SparseRequest, build

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

_SMALLEST_QUERY_TILE = {"cpu": 16}
"""Rows below which a device's matrix unit is not filled; 64 where nothing else is known."""
_FEW_ROWS = 32
"""Chunks of fewer rows run dense."""
_KV_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn)


def create(runner: ModelRunner) -> AttentionBackend:
    """The factory behind ``--attention-backend mminference``.

    Prefill is ours; decode, and what prefill does not run sparse, is the dense backend that SGLang would have chosen.
    When the decode flag names another backend, SGLang composes the two itself and only prefill is asked for here.
    """
    _setup_logging()
    dense = ATTENTION_BACKENDS[default_dense_backend(runner)](runner)
    backend = MMInferenceAttnBackend(runner, dense)
    if runner.decode_attention_backend_str == BACKEND_NAME:
        return HybridAttnBackend(runner, backend, dense)
    return backend


def load_config(hf_config: object) -> tuple[Config, PatternFile]:
    """Settings of this server and the pattern they name.

    Raises:
        ConfigError: a setting or the pattern file cannot be used.
    """
    stronger = [server_source(hf_config), *environment_sources()]
    named = from_sources(*stronger).pattern
    # `off` never enters the sparse path, so it needs no rules of its own.
    pattern = load("dense" if named == "off" else named)
    return from_sources((f"pattern {pattern.id!r}", pattern.config), *stronger), pattern


@dataclass
class _Forward:
    """One forward that has sparse rows: the plan, and the rest of the batch for the dense backend."""

    plan: ForwardPlan
    dense_rows: torch.Tensor | None
    dense_batch: ForwardBatch | None
    full_batch: ForwardBatch
    started: float
    reports: list[prefill.LayerReport]
    on_dense_rows: bool = True


class MMInferenceAttnBackend(AttentionBackend):
    """Sparse prefill for requests with media, dense for everything else.

    ``counters`` counts requests and layers by what became of them: ``sparse``, ``sparse_layers``, ``guarded_heads``,
    ``dense:<reason>``, and runs by whether a ``stride:`` was ``found`` in them or ``none``.
    """

    def __init__(self, runner: ModelRunner, dense: AttentionBackend) -> None:
        """Reads the configuration and says in one log line what will happen.

        Raises:
            ConfigError: the configuration cannot be used; the server stops with this line.
        """
        super().__init__()
        self.dense = dense
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.kv_index_translator = getattr(dense, "kv_index_translator", None)
        self.needs_cpu_seq_lens = True
        self.data_type = runner.kv_cache_dtype
        self.counters: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._forward: _Forward | None = None
        self._specs: dict[tuple[int, int], list[HeadSpec]] = {}
        device = torch.device(runner.device)
        hf_config = runner.model_config.hf_config
        try:
            self.config, self._pattern = load_config(hf_config)
            self.implementation = self._working_implementation(runner, device)
            self._check_pattern(runner)
        except (ConfigError, ops.ImplementationUnavailableError) as error:
            raise SystemExit(f"mminference: {error}") from None
        self._device = device
        self._page_size = int(runner.server_args.page_size or 1)
        chunk_tokens = max(0, int(runner.server_args.chunked_prefill_size or 0))
        self.config = self.config.for_chunks(chunk_tokens, _SMALLEST_QUERY_TILE.get(device.type, 64))
        self._head_offset = head_offset(runner)
        self._layouts = LayoutCache(
            ModelGeometry.of(hf_config),
            chunk_tokens=chunk_tokens,
            tile_queries=self.config.tile_queries,
            tile_keys=self.config.tile_keys,
            cell_size=self.config.cell_size,
            counters=self.counters,
        )
        dense_layers, self._last_layer = self._survey(runner.model)
        self._min_tokens = self._crossover(runner, chunk_tokens, sparse_layers=dense_layers[""])
        self._announce(runner, dense_layers)

    # -- what SGLang calls ---------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plans the forward: which requests run sparse, and the dense backend's metadata for the others."""
        self._forward = None
        sparse = self._sparse_requests(forward_batch)
        if not sparse:
            self.dense.init_forward_metadata(forward_batch)
            return
        started = time.perf_counter()
        plan = build(
            list(sparse.values()),
            self.req_to_token_pool.req_to_token,
            tile_queries=self.config.tile_queries,
            tile_keys=self.config.tile_keys,
            probe_rows=self.config.probe_rows,
            page_size=self._page_size,
        )
        rest = [i for i in range(forward_batch.batch_size) if i not in sparse]
        rows, batch = _sub_batch(forward_batch, rest) if rest else (None, None)
        if batch is not None:
            self.dense.init_forward_metadata(batch)
        self._forward = _Forward(plan, rows, batch, forward_batch, started, [], on_dense_rows=batch is not None)
        self.counters["sparse"] += len(sparse)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Graph capture and replay are the dense backend's."""
        self._forward = None
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """See :meth:`init_forward_metadata_out_graph`."""
        self.dense.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """See :meth:`init_forward_metadata_out_graph`."""
        self.dense.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """See :meth:`init_forward_metadata_out_graph`."""
        return int(self.dense.get_cuda_graph_seq_len_fill_value())

    def support_triton(self) -> bool:
        """As the dense backend."""
        return bool(self.dense.support_triton())

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
            return self._dense_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        reason = layer_reason(layer, self.token_to_kv_pool, kwargs)
        if reason or k is None or v is None:
            self.counters["dense_layers:" + (reason or "no keys of its own")] += 1
            self._point_dense_at(forward, rows_only=False)
            return self._dense_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if save_kv_cache:
            set_kv_buffer(self.token_to_kv_pool, layer, forward_batch, k, v)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = torch.empty_like(query)
        reports = prefill.run_layer(
            query,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            forward.plan,
            self._layer_specs(layer),
            self.config,
            layer.scaling,
            out,
            self.implementation,
            layer.layer_id,
            key_scale=_scale(layer.k_scale_float),
            value_scale=_scale(layer.v_scale_float),
        )
        if forward.dense_rows is not None:
            self._point_dense_at(forward, rows_only=True)
            rows = forward.dense_rows
            part = self._dense_extend(q[rows], k[rows], v[rows], layer, forward.dense_batch, False, **kwargs)
            out[rows] = part.view(-1, *out.shape[1:])
        self.counters["sparse_layers"] += 1
        forward.reports.extend(reports)
        if layer.layer_id == self._last_layer:
            self._report(forward)
        return out.view(q.shape)

    def _dense_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.dense.forward_extend(*args, **kwargs)
        return out

    # -- which requests ------------------------------------------------------------------------------------------------

    def _sparse_requests(self, batch: ForwardBatch) -> dict[int, SparseRequest]:
        """Batch index -> what the plan needs, for the requests that run sparse in this forward."""
        if not self.config.active or not batch.forward_mode.is_extend_without_speculative():
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
                self.counters[f"dense:{reason}"] += 1
            else:
                try:
                    layout = self._layouts.get(mm_inputs, prefix + chunk, self._device)
                    pool_row = batch.req_pool_indices[index : index + 1]
                    found[index] = SparseRequest(layout, prefix, chunk, pool_row, row_start)
                except (GeometryError, _core.LayoutError) as error:
                    self._fall_back("geometry", error)
            row_start += chunk
        return found

    def _request_reason(self, prefix: int, chunk: int, mm_inputs: Any) -> str:
        """Why a request runs dense by rule, empty if it may run sparse."""
        if prefix + chunk < self._min_tokens:
            return "short"
        if chunk < _FEW_ROWS:
            return "few rows"
        has_media = mm_inputs is not None and bool(mm_inputs.mm_items)
        if not has_media and "text" not in self._sparse_modalities:
            return "text only"
        return "" if self._sparse_modalities else "pattern"

    def _fall_back(self, reason: str, error: Exception) -> None:
        """A request that cannot be planned runs dense: counted always, logged once per reason."""
        self.counters[f"dense:{reason}"] += 1
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
            self._specs[key] = self._pattern.specs(layer.layer_id, heads)
        return self._specs[key]

    def _working_implementation(self, runner: ModelRunner, device: torch.device) -> str:
        """The implementation to use, proven on a tiny problem where it was compiled for this very machine.

        One that is proven in a process of its own is compiled for this model there.

        Raises:
            ops.ImplementationUnavailableError: it was named and cannot run or computes wrong. If it was not named, the
                server stays up and prefills densely.
        """
        implementation = ops.resolve(self.config.implementation, device)
        state = "ok"
        if implementation in selfcheck.ISOLATED:
            state = selfcheck.check(implementation, device, self.data_type, int(runner.model_config.head_dim))
        elif device.type == "cuda":
            state = selfcheck.check(implementation, device)
        if state != "ok":
            if self.config.implementation != "auto":
                raise ops.ImplementationUnavailableError(f"implementation {implementation!r} {state}")
            logger.warning("mminference: prefill is dense: implementation %r %s", implementation, state)
            self.config = dataclasses.replace(self.config, enabled=False)
        return implementation

    def _crossover(self, runner: ModelRunner, chunk_tokens: int, *, sparse_layers: int) -> int:
        """Tokens below which requests run dense: the setting, or what this machine was measured to gain from."""
        if self.config.min_tokens is not None:
            return self.config.min_tokens
        if not (self.config.active and self._sparse_modalities and sparse_layers):
            return 0
        layer = next(
            m for m in runner.model.modules() if isinstance(m, RadixAttention) and m.layer_id == self._last_layer
        )
        shape = crossover.Shape(
            heads=layer.tp_q_head_num,
            kv_heads=layer.tp_k_head_num,
            head_dim=layer.qk_head_dim,
            dtype=runner.model_config.dtype,
            device=self._device,
            chunk_tokens=chunk_tokens,
            implementation=self.implementation,
            config=self.config,
        )
        return agreed(lambda: crossover.min_tokens(shape))

    def _check_pattern(self, runner: ModelRunner) -> None:
        """Resolves every head once, so that a pattern that cannot be run stops the server and not a request."""
        config = runner.model_config.hf_text_config
        layers = int(getattr(config, "num_hidden_layers", 1))
        specs = [self._pattern.specs(layer, range(int(config.num_attention_heads))) for layer in range(layers)]
        self._sparse_modalities = {
            modality
            for modality in MODALITIES
            if any(spec.of(modality) != ("dense", "dense") for layer_specs in specs for spec in layer_specs)
        }

    def _survey(self, model: torch.nn.Module) -> tuple[Counter[str], int]:
        """Reasons of the model's dense layers, and the id of the last sparse one."""
        reasons: Counter[str] = Counter()
        last = 0
        for module in model.modules():
            if isinstance(module, RadixAttention):
                reason = layer_reason(module, self.token_to_kv_pool, {})
                reasons[reason] += 1
                if not reason:
                    last = max(last, module.layer_id)
        return reasons, last

    def _point_dense_at(self, forward: _Forward, *, rows_only: bool) -> None:
        """Gives the dense backend the metadata of the rest of the batch, or of all of it for a dense layer.

        It holds one at a time; only a model that mixes sparse and dense layers ever switches.
        """
        if forward.on_dense_rows != rows_only:
            self.dense.init_forward_metadata(forward.dense_batch if rows_only else forward.full_batch)
            forward.on_dense_rows = rows_only

    # -- what the operator sees ----------------------------------------------------------------------------------------

    def _announce(self, runner: ModelRunner, layers: Counter[str]) -> None:
        dense_layers = {reason: count for reason, count in layers.items() if reason}
        architectures = getattr(runner.model_config.hf_config, "architectures", None) or ["unknown"]
        logger.info(
            "mminference: model=%s pattern=%s active=%s min_tokens=%d coverage=%g max_density=%g error_ceiling=%g "
            "implementation=%s dense=%s sparse_layers=%d dense_layers=%s",
            architectures[0],
            self._pattern.id,
            self.config.active,
            self._min_tokens,
            self.config.coverage,
            self.config.max_density,
            self.config.error_ceiling,
            self.implementation,
            type(self.dense).__name__,
            layers[""],
            dense_layers or "none",
        )

    def _report(self, forward: _Forward) -> None:
        """One debug line per sparse request; the only place that waits for the device, and only when asked to log."""
        if not logger.isEnabledFor(logging.DEBUG):
            return
        for index, request in enumerate(forward.plan.requests):
            reports = [report for report in forward.reports if report.request == index]
            tiles, causal = (sum(float(getattr(r, name)) for r in reports) for name in ("tiles", "causal"))
            guarded = int(sum(int(r.guarded) for r in reports))
            self.counters["guarded_heads"] += guarded
            logger.debug(
                "mminference prefill request=%d prefix=%d chunk=%d layers=%d density=%.4f coverage=%.4f error=%.4f "
                "guarded_heads=%d milliseconds=%.1f",
                index,
                request.prefix,
                request.chunk,
                len(reports),
                tiles / causal,
                _mean(reports, "coverage"),
                max(float(r.error) for r in reports),
                guarded,
                (time.perf_counter() - forward.started) * 1e3,
            )


def layer_reason(layer: RadixAttention, pool: Any, kwargs: dict[str, Any]) -> str:
    """Why a layer is dense; empty if it may run sparse: causal decoder attention without extras, a plain KV pool."""
    if layer.attn_type != AttentionType.DECODER or layer.is_cross_attention:
        return "not causal decoder attention"
    if layer.sliding_window_size is not None and layer.sliding_window_size > -1:
        return "sliding window"
    if layer.use_irope or layer.logit_cap:
        return "irope or logit cap"
    if layer.qk_head_dim != layer.v_head_dim or layer.tp_k_head_num != layer.tp_v_head_num:
        return "key and value heads differ"
    if layer.tp_q_head_num % layer.tp_k_head_num:
        return "heads do not group"
    if pool.dtype not in _KV_DTYPES or getattr(pool, "is_quantized_kv_cache", False):
        return f"KV cache dtype {pool.dtype}"
    if not hasattr(pool, "get_key_buffer"):
        return "KV pool without key buffers"
    if any(value is not None and value is not False for value in kwargs.values()):
        return "extra arguments " + ", ".join(sorted(k for k, x in kwargs.items() if x is not None))
    return ""


def _scale(of_layer: float | None) -> float:
    """What the elements of an fp8 pool are multiplied by; checkpoints without scales have none."""
    return 1.0 if of_layer is None else of_layer


def _sub_batch(batch: ForwardBatch, indices: Sequence[int]) -> tuple[torch.Tensor, ForwardBatch]:
    """The part of an extend batch that holds only some requests, and the batch rows of theirs, int64."""
    prefixes, chunks = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk)
    device = batch.req_pool_indices.device
    rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices]).to(device)
    index = torch.tensor(indices, device=device)
    part = copy.copy(batch)
    part.batch_size = len(indices)
    part.extend_prefix_lens_cpu = [prefixes[i] for i in indices]
    part.extend_seq_lens_cpu = [chunks[i] for i in indices]
    part.extend_num_tokens = int(rows.numel())
    part.seq_lens_sum = sum(prefixes[i] + chunks[i] for i in indices)
    for name in ("req_pool_indices", "seq_lens", "extend_prefix_lens", "extend_seq_lens", "orig_seq_lens"):
        value = getattr(batch, name, None)
        if value is not None:
            setattr(part, name, value[index])
    if batch.seq_lens_cpu is not None:
        part.seq_lens_cpu = batch.seq_lens_cpu[torch.tensor(indices)]
    part.extend_start_loc = torch.zeros_like(part.extend_seq_lens)
    part.extend_start_loc[1:] = part.extend_seq_lens.cumsum(0)[:-1]
    for name in ("input_ids", "positions", "out_cache_loc"):
        value = getattr(batch, name, None)
        if value is not None:
            setattr(part, name, value[rows])
    part.mm_inputs = [batch.mm_inputs[i] for i in indices] if batch.mm_inputs else None
    return rows, part


def _mean(reports: Sequence[prefill.LayerReport], name: str) -> float:
    return sum(float(getattr(report, name)) for report in reports) / len(reports)


def _setup_logging() -> None:
    """``MMINFERENCE_LOG`` sets this package's log level, whatever SGLang's is."""
    level = os.environ.get("MMINFERENCE_LOG", "").upper()
    if level:
        package = logging.getLogger("mminference_sgl")
        try:
            package.setLevel(level)
        except ValueError as error:
            raise SystemExit(f"mminference: MMINFERENCE_LOG: {error}") from None
        for handler in logging.getLogger().handlers:
            handler.setLevel(min(handler.level, package.level))
