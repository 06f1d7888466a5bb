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


_FAULTS: dict[str, tuple[str, str]] = {}
"""By test, what goes wrong and what must happen then."""
_SAID: dict[str, list[str]] = {}
"""By what goes wrong, how each of its tests ended."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    for item in items:
        fault = item.get_closest_marker("fault")
        if fault is not None:
            _FAULTS[item.nodeid] = fault.args
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.nodeid in _FAULTS and (report.when == "call" or report.failed):
        _SAID.setdefault(_FAULTS[report.nodeid][0], []).append(report.outcome)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr != "fault":
        return
    terminalreporter.section("faults")
    for name, outcome in dict(_FAULTS.values()).items():
        said = _SAID.get(name, ["not run"])
        verdict = "ok" if set(said) == {"passed"} else ", ".join(said)
        terminalreporter.line(f"{name:42} -> {outcome} ({verdict}, {len(said)})")


@pytest.fixture(autouse=True)
def _small_problems_run_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems need most of their tiles, so that on a CPU dense attention would nearly always be quicker."""
    from mminference_sgl.kernels import stages

    monkeypatch.setattr(stages, "CPU_EASE", stages.EASE)
