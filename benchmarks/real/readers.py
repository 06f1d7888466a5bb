"""Who reads the documents: stock SGLang, or its offline twin."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.real import serving, twin
from benchmarks.real.model import LanguageModel
from mminference_sgl.method import catalog
from mminference_sgl.method.config import from_sources
from mminference_sgl.testing import ServerError, fallbacks, mean_density, prefills

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch

    from benchmarks.real.reading import Reading
    from mminference_sgl.method.prefill import LayerReport

CHUNK = 2048
SMALLEST_TILE = 16
"""Rows of the smallest query tile that a CPU is fast at, as in the backend."""


@dataclass(frozen=True)
class Sparse:
    """A reading under sparse prefill, what each chunk reported, and the density of the whole."""

    reading: Reading
    mean_density: float
    density: list[float]
    coverage: list[float]
    error: list[float]
    layers: list[LayerFigures] = field(default_factory=list)
    """The twin's, of the last chunk."""


@dataclass(frozen=True)
class LayerFigures:
    """What one layer of a chunk did: density, coverage, error, and how many of its heads saved nothing."""

    density: float
    coverage: float
    error: float
    dense_heads: int


class Reader(Protocol):
    """Reads prompts, int64 [tokens] each."""

    def dense(self, prompts: Sequence[torch.Tensor]) -> list[Reading]:
        """Under dense attention."""
        ...

    def sparse(self, prompts: Sequence[torch.Tensor], settings: Sequence[dict[str, Any]]) -> list[Sparse]:
        """Under the method, with settings of its own for each prompt."""
        ...

    def divergence(self, reading: Reading, reference: Reading) -> float | None:
        """Mean Kullback-Leibler divergence of next-token distributions in nats; None where readings are without."""
        ...


class Served:
    """Stock SGLang on the CPU, a server for dense attention and one for each of neighbouring settings.

    Raises:
        ServerError: a server does not start, refuses a prompt, or runs it dense where sparse was asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def dense(self, prompts: Sequence[torch.Tensor]) -> list[Reading]:
        """See :class:`Reader`."""
        with serving.server(self._folder, CHUNK, None) as running:
            return [serving.read(running, tokens) for tokens in prompts]

    def sparse(self, prompts: Sequence[torch.Tensor], settings: Sequence[dict[str, Any]]) -> list[Sparse]:
        """See :class:`Reader`."""
        found: list[Sparse] = []
        pairs = zip(settings, prompts, strict=True)
        for _, group in groupby(pairs, key=lambda pair: json.dumps(pair[0], sort_keys=True)):
            own = list(group)
            found += self._read_sparse([tokens for _, tokens in own], own[0][0])
        return found

    def divergence(self, reading: Reading, reference: Reading) -> float | None:
        """See :class:`Reader`."""
        del reading, reference
        return None

    def _read_sparse(self, prompts: Sequence[torch.Tensor], settings: dict[str, Any]) -> Iterator[Sparse]:
        with serving.server(self._folder, CHUNK, settings) as running:
            for tokens in prompts:
                mark = len(running.log())
                reading = serving.read(running, tokens)
                lines = prefills(running.log(mark))
                if not lines:
                    raise ServerError(f"no chunk of {len(tokens)} tokens ran sparse", running.log())
                yield _with_reports(reading, lines, len(tokens))
            if dense := fallbacks(running.log()):
                raise ServerError(f"a request ran dense: {dense[0].reason}: {dense[0].detail}", running.log())


class Twin:
    """A forward in plain PyTorch with the method in place of attention; dense readings are kept from run to run."""

    def __init__(self, folder: Path) -> None:
        self._model, self._name = LanguageModel(folder), folder.name

    def dense(self, prompts: Sequence[torch.Tensor]) -> list[Reading]:
        """See :class:`Reader`."""
        return [twin.dense(self._model, self._name, tokens, CHUNK) for tokens in prompts]

    def sparse(self, prompts: Sequence[torch.Tensor], settings: Sequence[dict[str, Any]]) -> list[Sparse]:
        """See :class:`Reader`."""
        return [self._read_sparse(*each) for each in zip(prompts, settings, strict=True)]

    def divergence(self, reading: Reading, reference: Reading) -> float | None:
        """See :class:`Reader`."""
        return float(twin.divergence(self._model, reading, reference).mean())

    def context(self, tokens: torch.Tensor, settings: dict[str, Any]) -> Sparse:
        """The first half under the method, the half that is judged densely: what a question finds behind a context."""
        return self._read_sparse(tokens, settings, until=len(tokens) // 2)

    def behind_media(self, tokens: torch.Tensor, settings: dict[str, Any], items: Sequence[twin.Item]) -> Sparse:
        """Media under the method, and what is judged behind them; texts as the pattern says."""
        _, spans, _ = items[-1]
        return self._read_sparse(tokens, settings, items=items, judged=spans[-1][1] + 1)

    def dense_behind(self, tokens: torch.Tensor, judged: int) -> Reading:
        """From token ``judged`` on, under dense attention."""
        return twin.dense(self._model, self._name, tokens, CHUNK, judged)

    def _read_sparse(
        self,
        tokens: torch.Tensor,
        settings: dict[str, Any],
        until: int | None = None,
        items: Sequence[twin.Item] = (),
        judged: int | None = None,
    ) -> Sparse:
        config = from_sources(("--set", settings)).for_chunks(CHUNK, SMALLEST_TILE)
        shape, pattern = self._model.shape, catalog.load(config.pattern)
        specs = [pattern.specs(layer, range(shape.heads)) for layer in range(shape.layers)]
        method = twin.Method(config, specs, len(tokens), CHUNK, shape, until, items)
        found = _with_reports(twin.read(self._model, tokens, CHUNK, method, judged), method.chunks, len(tokens))
        return replace(found, layers=[_figures(report) for report in method.chunks[-1].layers] if method.chunks else [])


def _figures(report: LayerReport) -> LayerFigures:
    return LayerFigures(
        float(report.tiles / report.causal), float(report.coverage), float(report.error), int(report.dense)
    )


def _with_reports(reading: Reading, chunks: Sequence[Any], length: int) -> Sparse:
    density, coverage, error = ([getattr(chunk, name) for chunk in chunks] for name in ("density", "coverage", "error"))
    return Sparse(reading, mean_density(chunks, length), density, coverage, error)
