"""Without a GPU, SGLang runs on this package's CPU platform: inside pytest and in the servers that tests start."""

from __future__ import annotations

import os

import pytest

from mminference_sgl.portable.cpu import wait_briefly

# Before PyTorch is imported: OpenMP looks once.
wait_briefly(os.environ)

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Before anything imports SGLang, which looks once.
    os.environ.setdefault("SGLANG_PLATFORM", "portable_cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _small_problems_run_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems need most of their tiles, so that on a CPU dense attention would nearly always be quicker."""
    from mminference_sgl.kernels import stages

    monkeypatch.setattr(stages, "CPU_EASE", stages.EASE)
