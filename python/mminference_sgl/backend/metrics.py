"""Prometheus metrics in SGLang's registry: what the backend counts anyhow, for ``/metrics`` of a server that has them.

Nothing is counted here. What the backend counts on the host is compared with what has been exported, once a forward;
what a device counts is observed when it has arrived (:mod:`.figures`), and nothing waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mminference_sgl.backend.figures import ChunkFigures

PREFIX = "mminference:"
DENSITY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.0)
COVERAGE_BUCKETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
ERROR_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Metric:
    """``kind``: a class of ``prometheus_client``. ``labels``: besides those of the process."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_FORM = ("form", "reason")
TOKENS = Metric("prefill_tokens", "Counter", "Tokens prefilled: sparse, or dense and why.", _FORM)
CHUNKS = Metric("prefill_chunks", "Counter", "Chunks of requests prefilled: sparse, or dense and why.", _FORM)
LAYERS = Metric("layer_forwards", "Counter", "Layers of forwards with sparse rows: sparse, or dense and why.", _FORM)
GUARDED = Metric("guarded_heads", "Counter", "Heads that the guard sent to dense, by layer.", ("layer",))
STRIDES = Metric("stride_searches", "Counter", "Searches for the stride of a video without a grid.", ("result",))
SECONDS = Metric("stage_seconds", "Counter", "Seconds of planning on the host and of layers' stages.", ("stage",))
DENSITY = Metric("density", "Histogram", "Computed over causal tiles of a sparse chunk.", buckets=DENSITY_BUCKETS)
COVERAGE = Metric("coverage", "Histogram", "Probe rows' mass kept by a sparse chunk.", buckets=COVERAGE_BUCKETS)
ERROR = Metric("error", "Histogram", "Largest error of a layer in a sparse chunk.", buckets=ERROR_BUCKETS)
LAYOUTS = Metric("layouts", "Gauge", "Layouts of requests in memory, as of the last prefill.")
INFO = Metric(
    "info",
    "Gauge",
    "1, with the settings of this server.",
    ("version", "pattern", "implementation", "dense_backend", "active", "min_tokens", "error", "text_error"),
)
METRICS = (TOKENS, CHUNKS, LAYERS, GUARDED, STRIDES, SECONDS, DENSITY, COVERAGE, ERROR, LAYOUTS, INFO)


def exported_names() -> frozenset[str]:
    """Names of the samples in ``/metrics``, as queries say them."""
    suffixes = {"Counter": ("_total",), "Histogram": ("_bucket", "_count", "_sum"), "Gauge": ("",)}
    return frozenset(PREFIX + metric.name + suffix for metric in METRICS for suffix in suffixes[metric.kind])


_COUNTED = {
    "sparse": (CHUNKS, ("sparse",)),
    "dense": (CHUNKS, ("dense",)),
    "sparse_layers": (LAYERS, ("sparse",)),
    "dense_layers": (LAYERS, ("dense",)),
    "guarded_heads": (GUARDED, ()),
    "stride": (STRIDES, ()),
}
"""What the backend counts under ``name`` or ``name:detail``: the metric, and its labels before the detail."""


class Metrics:
    """The metrics of one process; ``labels``: those of all its samples."""

    def __init__(self, labels: Mapping[str, str], info: Mapping[str, Any]) -> None:
        self._labels = dict(labels)
        self._families = _families(tuple(labels))
        self._children: dict[tuple[Metric, tuple[str, ...]], Any] = {}
        self._exported: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self._of(INFO, *(str(info[name]) for name in INFO.labels)).set(1)
        # Series are there from the start, so that a rate is one from the first event on.
        for metric in (TOKENS, CHUNKS, LAYERS):
            self._of(metric, "sparse", "")
        for result in ("found", "none"):
            self._of(STRIDES, result)
        for metric in (DENSITY, COVERAGE, ERROR, LAYOUTS):
            self._of(metric)

    def publish(
        self, counters: Mapping[str, int], tokens: Mapping[str, int], seconds: Mapping[str, float], layouts: int
    ) -> None:
        """Exports what the backend has counted so far; ``tokens`` as ``counters`` counts chunks."""
        for key, total in counters.items():
            name, _, detail = key.partition(":")
            metric, values = _COUNTED[name]
            self._export(metric, (*values, detail), total)
        for key, total in tokens.items():
            form, _, reason = key.partition(":")
            self._export(TOKENS, (form, reason), total)
        for stage, passed in seconds.items():
            self._export(SECONDS, (stage,), passed)
        self._of(LAYOUTS).set(layouts)

    def observe(self, chunks: Sequence[ChunkFigures]) -> None:
        """Exports figures of a forward that have arrived."""
        for chunk in chunks:
            self._of(DENSITY).observe(chunk.density)
            self._of(COVERAGE).observe(chunk.coverage)
            self._of(ERROR).observe(chunk.error)

    def _export(self, metric: Metric, values: tuple[str, ...], total: float) -> None:
        more = total - self._exported.get((metric, values), 0)
        if more:
            self._of(metric, *values).inc(more)
            self._exported[metric, values] = total

    def _of(self, metric: Metric, *values: str) -> Any:
        if (metric, values) not in self._children:
            labels = {**self._labels, **dict(zip(metric.labels, values, strict=True))}
            self._children[metric, values] = self._families[metric].labels(**labels)
        return self._children[metric, values]


@functools.cache
def _families(labels: tuple[str, ...]) -> dict[Metric, Any]:
    """One family per metric in a process: a registry takes a name once."""
    # Only now does the variable that makes it write for other processes surely stand.
    import prometheus_client

    made = {}
    for metric in METRICS:
        more: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
        if metric.kind == "Gauge":
            more["multiprocess_mode"] = "mostrecent"
        kind = getattr(prometheus_client, metric.kind)
        made[metric] = kind(PREFIX + metric.name, metric.help, [*labels, *metric.labels], **more)
    return made
