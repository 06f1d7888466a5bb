"""SGLang's own load generator, ``sglang.benchmark.serving``, against one server."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from benchmarks.serving.traffic import write
from mminference_sgl.testing import ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.serving.traffic import Request


@dataclass(frozen=True)
class Arrivals:
    """How requests come: Poisson at `rate` a second, or all at once; at most `concurrency` are in the server."""

    rate: float = float("inf")
    concurrency: int | None = None


@dataclass(frozen=True)
class Sample:
    """One request's times, in seconds."""

    kind: str
    ttft: float
    gaps: list[float]
    """From one token to the next."""
    prompt_tokens: int
    right: bool


@dataclass(frozen=True)
class Load:
    """What one run of the generator found."""

    samples: list[Sample]
    duration: float
    target: float
    """Of the time to first token, in seconds."""

    @property
    def goodput(self) -> float:
        """Requests a second that met the target."""
        return sum(sample.ttft <= self.target for sample in self.samples) / self.duration


def command(
    url: str, dataset: Path, output: Path, count: int, arrivals: Arrivals, target: float, seed: int
) -> list[str]:
    """The command line, without the interpreter; SGLang's client warms up with the first request unless told not to."""
    arguments = [
        *("sglang.benchmark.serving", "--backend", "sglang-oai-chat", "--base-url", url),
        *("--dataset-name", "openai", "--dataset-path", str(dataset), "--num-prompts", str(count)),
        *("--request-rate", str(arrivals.rate), "--warmup-requests", "0", "--seed", str(seed)),
        *("--goodput", f"ttft:{target * 1e3:g}", "--output-file", str(output), "--output-details", "--disable-tqdm"),
    ]
    if arrivals.concurrency is not None:
        arguments += ["--max-concurrency", str(arrivals.concurrency)]
    return arguments


def run(url: str, requests: Sequence[Request], arrivals: Arrivals, target: float, seed: int = 0) -> Load:
    """Send the requests.

    The generator runs in this process: starting it means importing SGLang, which takes longer than most runs.

    Raises:
        ServerError: a request failed.
    """
    from sglang.benchmark import serving

    with tempfile.TemporaryDirectory(prefix="mminference-load-") as folder:
        dataset, output = write(Path(folder) / "requests.jsonl", requests), Path(folder) / "result.jsonl"
        arguments = command(url, dataset, output, len(requests), arrivals, target, seed)
        said = io.StringIO()
        with mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(said):
            serving.cli_main()
        found = json.loads(output.read_text())
    failed = [error for error in found["errors"] if error]
    if failed or found["completed"] != len(requests):
        raise ServerError(f"{len(requests) - found['completed']} of {len(requests)} requests failed: {failed[:1]}")
    rows = zip(requests, found["ttfts"], found["itls"], found["input_lens"], found["generated_texts"], strict=True)
    samples = [Sample(r.kind, ttft, gaps, tokens, r.is_right(text)) for r, ttft, gaps, tokens, text in rows]
    if any(sample.ttft == 0 for sample in samples):
        raise ServerError("an answer has no token")
    load = Load(samples, found["duration"], target)
    if abs(load.goodput - found["request_goodput"]) > 0.01 * max(load.goodput, found["request_goodput"]):
        raise ServerError(f"goodput {load.goodput}, SGLang says {found['request_goodput']}")
    return load
