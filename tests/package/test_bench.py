"""``mminference bench``: what it makes of the answers and the log of a server."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest

from mminference_sgl.cli import bench
from mminference_sgl.testing import ServerError

START = "mminference: model=M pattern=auto active=True min_tokens=1024 error=0.07\n"
PREFILL = (
    "mminference prefill request=0 prefix=0 chunk=1000 layers=2 density=0.5 coverage=0.9 error=0.05 guarded_heads=0 "
    "milliseconds=1.0\n"
)


class FakeServer:
    """Answers in the given seconds; writes a line of the first prefill of the video."""

    def __init__(self, seconds: list[float], *, log: str = START, ttft: float | None = 2.0) -> None:
        self.texts: list[str] = []
        self._seconds, self._log, self._ttft = iter(seconds), log, ttft

    def log(self, since: int = 0) -> str:
        return self._log[since:]

    def chat(self, messages, max_tokens, *, stream=False):
        self.texts.append("".join(part.get("text", "-") for part in messages[0]["content"]))
        if len(self.texts) > 1 and stream and self._log:
            self._log += PREFILL
        if stream:
            return SimpleNamespace(ttft=self._ttft, prompt_tokens=1000)
        return SimpleNamespace(forward_s=next(self._seconds))


def test_figures_of_a_sparse_server() -> None:
    server = FakeServer([9.0, 3.0, 1.0, 2.0])
    found = bench._measure(server, "mminference", "clip.mp4", "warm-up.mp4", 3)
    assert (found.ttft, found.prefill) == ([2.0], 2.0)
    assert found.prefills == [3.0, 1.0, 2.0], "the warm-up counts for nothing"
    assert found.density == pytest.approx(0.5, abs=1e-3)
    assert (found.tokens, found.min_tokens) == (1000, 1024)
    assert len(set(server.texts)) == len(server.texts), "a text that was there before would hit the radix cache"


def test_figures_of_a_dense_server() -> None:
    found = bench._measure(FakeServer([9.0, 1.0], log=""), "dense", "clip.mp4", "warm-up.mp4", 1)
    assert (found.density, found.min_tokens) == (1.0, None)


def test_no_token_is_an_error() -> None:
    with pytest.raises(ServerError, match="no token"):
        bench._measure(FakeServer([9.0], ttft=None), "dense", "clip.mp4", "warm-up.mp4", 1)


def test_what_ran_dense_is_said(capsys) -> None:
    one = bench.Figures("dense", 1000, [2.0], [0.8, 1.0, 1.25], 1.0, None)
    for density, said in ((1.0, True), (0.5, False)):
        bench._print([one, bench.Figures("mminference", 1000, [1.0], [0.5, 0.4, 0.6], density, 2048)], "M")
        out = " ".join(capsys.readouterr().out.split())
        assert ("Nothing ran sparse" in out) == said
        assert "2048" in out
        assert "0.50 (0.32 to 0.75)" in out


def test_servers_take_turns_and_count_together(monkeypatch, capsys) -> None:
    started = []

    @contextlib.contextmanager
    def server(_model, backend, *_, **__):
        started.append(backend)
        yield FakeServer([float(len(started))] * 4, log=START if backend else "")

    monkeypatch.setattr(bench, "server", server)
    assert bench.run("M", "clip.mp4", repeats=1, rounds=2, as_json=True) == 0
    assert started == [None, "mminference"] * 2
    dense, sparse = json.loads(capsys.readouterr().out)
    assert (dense["prefills"], sparse["prefills"]) == ([1.0, 3.0], [2.0, 4.0])
