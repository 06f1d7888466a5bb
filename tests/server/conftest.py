"""Tiny models, the requests, and servers that are each started once in a session."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import serving
import tiny_models


@pytest.fixture(scope="session")
def model_path(pytestconfig: pytest.Config) -> serving.ModelPath:
    cache = Path(str(pytestconfig.cache.mkdir("tiny_models")))
    return functools.cache(lambda name: tiny_models.path_of(name, cache))


@pytest.fixture(scope="session")
def messages(tmp_path_factory: pytest.TempPathFactory) -> serving.Messages:
    return serving.messages(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="session")
def run_of(model_path: serving.ModelPath, messages: serving.Messages) -> serving.RunOf:
    @functools.cache
    def run_of(
        model: str, chunk: int, backend: str | None, args: tuple[str, ...] = (), plugins: str | None = None
    ) -> serving.Run:
        # The process that warm servers are forked from has imported this package.
        warm = plugins is None
        with serving.start(model_path(model), chunk, backend, args, warm=warm, SGLANG_PLUGINS=plugins) as server:
            return serving.ask_everything(server, messages)

    return run_of
