"""Who reads the documents: stock SGLang, or its offline twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.real import serving, twin
from benchmarks.real.model import LanguageModel
from mminference_sgl.method import catalog
from mminference_sgl.method.config import from_sources
from mminference_sgl.testing import ServerError, fallbacks, prefills

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from benchmarks.real.reading import Reading

CHUNK = 2048
SMALLEST_TILE = 16
"""Rows of the smallest query tile that a CPU is fast at, as in the backend."""


@dataclass(frozen=True)
class Sparse:
    """A reading under sparse prefill, and what each chunk reported."""

    reading: Reading
    density: list[float]
    coverage: list[float]
    error: list[float]


class Reader(Protocol):
    """Reads prompts, int64 [tokens] each."""

    def dense(self, prompts: Sequence[torch.Tensor]) -> list[Reading]:
        """Under dense attention."""
        ...

    def sparse(self, prompts: Sequence[torch.Tensor]) -> list[Sparse]:
        """Under the method."""
        ...


class Served:
    """Stock SGLang on the CPU, dense and sparse in turn.

    Raises:
        ServerError: a server does not start, refuses a prompt, or runs it dense where sparse was asked for.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings

    def dense(self, prompts: Sequence[torch.Tensor]) -> list[Reading]:
        """See :class:`Reader`."""
        with serving.server(self._folder, CHUNK, None) as running:
            return [serving.read(running, tokens) for tokens in prompts]

    def sparse(self, prompts: Sequence[torch.Tensor]) -> list[Sparse]:
        """See :class:`Reader`."""
        found = []
        with serving.server(self._folder, CHUNK, self._settings) as running:
            for tokens in prompts:
                mark = len(running.log())
                reading = serving.read(running, tokens)
                lines = prefills(running.log(mark))
                if not lines:
                    raise ServerError(f"no chunk of {len(tokens)} tokens ran sparse", running.log())
                found.append(_with_reports(reading, lines))
            if dense := fallbacks(running.log()):
                raise ServerError(f"a request ran dense: {dense[0].reason}: {dense[0].detail}", running.log())
        return found


class Twin:
    """A forward in plain PyTorch with the method in place of attention; dense readings are kept from run to run."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._model, self._name = LanguageModel(folder), folder.name
        self._config = from_sources(("--set", settings)).for_chunks(CHUNK, SMALLEST_TILE)
        shape, pattern = self._model.shape, catalog.load(self._config.pattern)
        self._specs = [pattern.specs(layer, range(shape.heads)) for layer in range(shape.layers)]

    def dense(self, prompts: Sequence[torch.Tensor]) -> list[Reading]:
        """See :class:`Reader`."""
        return [twin.dense(self._model, self._name, tokens, CHUNK) for tokens in prompts]

    def sparse(self, prompts: Sequence[torch.Tensor]) -> list[Sparse]:
        """See :class:`Reader`."""
        found = []
        for tokens in prompts:
            method = twin.Method(self._config, self._specs, len(tokens), CHUNK, self._model.shape.scale)
            found.append(_with_reports(twin.read(self._model, tokens, CHUNK, method), method.chunks))
        return found


def _with_reports(reading: Reading, chunks: Sequence[Any]) -> Sparse:
    density, coverage, error = ([getattr(chunk, name) for chunk in chunks] for name in ("density", "coverage", "error"))
    return Sparse(reading, density, coverage, error)
