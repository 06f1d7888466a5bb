"""``make soak``: mixed traffic with aborts on one server, and what the server keeps of it.

Some clients send text, images, videos and follow-up questions on a few videos without pause; one request in five is
given up, before its answer or within it. Meanwhile memory (PSS), threads and open files of every process of the server
are noted every few seconds. At the end caches are emptied, and what is left in them is told, with all gauges that the
backend has in ``/metrics``.

Memory, threads or files *grow* where, after the warm-up, the slope through the least values of equal pieces of time is
above zero with 99 % confidence and adds up to more than `TOLERANCE` of what was there. The warm-up is five minutes, or
half of a shorter run, which says little. The exit code is 1 where something grows, tokens stay in a cache, a request
fails or the log has errors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch

from benchmarks.demo.__main__ import FAST
from benchmarks.gpu.report import environment, markdown, parse_count, say
from benchmarks.serving.traffic import Request, Traffic
from benchmarks.toy.serving import server as toy_server
from mminference_sgl.testing import Server, ServerError

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 20261102
WARM_UP_S = 300.0
PIECES = 8
T_99 = 3.143
"""Of Student's distribution, one-sided, for as many pieces less two."""
TOLERANCE = 0.01
CONFIG = {"error": FAST, "min_tokens": 0}
"""So that short videos run sparse, too."""
POOL = 16384
"""Slots of the KV pool. Memory that was never written is not there: a large pool looks like growth until it is full."""
ABORTED = 0.2
KINDS = ("text", "image", "video", "follow-up")
_ERROR = re.compile(r"Traceback \(most recent call last\)|\b(?:ERROR|CRITICAL)\b|\b\w*(?:Error|Exception): ")
_GAUGES = re.compile(
    r"^(sglang:num_used_tokens|sglang:kv_evictable_tokens|mminference\w*)(?:\{.*\})? (\S+)$", re.MULTILINE
)


@dataclass
class Series:
    """One figure of one process over time."""

    process: str
    what: str
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def slope(self, since: float) -> tuple[float, float]:
        """A second's growth after `since`, and what it is known to within, by the least values of equal pieces.

        What requests hold while they run comes and goes; what stays is in the least values.
        """
        kept = [(t, v) for t, v in zip(self.times, self.values, strict=True) if t >= since]
        if len(kept) < 2 * PIECES:
            raise ValueError(f"{len(kept)} samples are too few for {PIECES} pieces")
        size = len(kept) / PIECES
        pieces = [kept[round(i * size) : round((i + 1) * size)] for i in range(PIECES)]
        x = [statistics.mean(t for t, _ in piece) for piece in pieces]
        y = [min(v for _, v in piece) for piece in pieces]
        slope, start = statistics.linear_regression(x, y)
        spread = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True)) / (PIECES - 2)
        return slope, T_99 * (spread / (statistics.pvariance(x) * PIECES)) ** 0.5

    def grows(self, since: float) -> bool:
        """Whether it does, outside noise."""
        slope, within = self.slope(since)
        return slope > within and slope * (self.times[-1] - since) > TOLERANCE * max(self.values)


class Client(threading.Thread):
    """Sends requests, one after the other, until it is told to stop."""

    def __init__(self, url: str, requests: dict[str, list[Request]], seed: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self._http = httpx.Client(base_url=url, timeout=120.0, trust_env=False)
        self._requests, self._rng, self._stop_asked = requests, random.Random(seed), stop
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def run(self) -> None:
        while not self._stop_asked.is_set():
            kind = self._rng.choice(KINDS)
            request = self._rng.choice(self._requests[kind])
            patience = self._rng.uniform(0.0, 0.5) if self._rng.random() < ABORTED else None
            try:
                self.counts[self._ask(kind, request, patience)] += 1
            except httpx.HTTPError as error:
                self.failures.append(f"{kind}: {error!r}")
        self._http.close()

    def _ask(self, kind: str, request: Request, patience: float | None) -> str:
        """Under which name the request counts; without patience its connection is closed."""
        row = {**request.row, "model": "default", "temperature": 0, "stream": True, "ignore_eos": True}
        if kind != "follow-up":
            # Another beginning, so that no prefix is found.
            first = {"role": "user", "content": str(self._rng.random())}
            row["messages"] = [first, *row["messages"]]
        timeout = httpx.Timeout(120.0) if patience is None else httpx.Timeout(120.0, read=0.05 + patience)
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=row, timeout=timeout) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if patience is not None and line:
                        return f"{kind}, aborted"
        except httpx.ReadTimeout:
            if patience is None:
                raise
            return f"{kind}, aborted"
        return kind


def observe(server: Server, now: float, series: dict[tuple[str, str], Series]) -> None:
    """Note memory in MiB, threads and open files of all processes."""
    for process in server.processes():
        # Processes come and go.
        with contextlib.suppress(OSError, StopIteration):
            name, folder = f"{process.name} {process.pid}", process.folder
            rollup = (folder / "smaps_rollup").read_text().splitlines()
            pss = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) / 1024
            figures = {
                "memory, MiB": pss,
                "threads": len(list((folder / "task").iterdir())),
                "files": len(list((folder / "fd").iterdir())),
            }
            for what, value in figures.items():
                one = series.setdefault((name, what), Series(name, what))
                one.times.append(now)
                one.values.append(float(value))


def caches(server: Server) -> dict[str, float]:
    """What the server says that it holds."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, value in _GAUGES.findall(httpx.get(f"{server.url}/metrics", trust_env=False).text):
        found[name] += float(value)
    return dict(found)


def unexpected(log: str) -> list[str]:
    """Lines of the log that tell of an error."""
    return [line for line in log.splitlines() if _ERROR.search(line)]


def soak(server: Server, requests: dict[str, list[Request]], options: argparse.Namespace) -> dict[str, Any]:
    """Traffic for so many minutes, and what was seen meanwhile."""
    series: dict[tuple[str, str], Series] = {}
    stop = threading.Event()
    clients = [Client(server.url, requests, SEED + i, stop) for i in range(options.clients)]
    began = time.monotonic()
    for client in clients:
        client.start()
    times: list[float] = []
    # A machine that is busy with other things looks less often, and needs longer for as many samples.
    while (now := time.monotonic() - began) < 60 * options.minutes or len(times) < 6 * PIECES:
        observe(server, now, series)
        times.append(now)
        time.sleep(options.every)
    stop.set()
    for client in clients:
        client.join()
    held = caches(server)
    server.flush_cache()
    # Something to measure the caches by, since gauges are set by forwards.
    server.chat([requests["text"][0].message], 1)
    server.flush_cache()
    return {
        "series": series,
        "counts": sum((client.counts for client in clients), Counter()),
        "failures": [failure for client in clients for failure in client.failures],
        "held": held,
        "emptied": caches(server),
        "errors": unexpected(server.log()),
        "since": min(WARM_UP_S, times[len(times) // 2]),
    }


def report(found: dict[str, Any]) -> tuple[str, list[str]]:
    """Tables, and what is wrong."""
    since, rows, wrong = found["since"], [], []
    last = max(one.times[-1] for one in found["series"].values())
    for one in found["series"].values():
        # Helpers of the start are gone by now, and what began late is none of the server's own.
        if one.times[0] > since or one.times[-1] < last:
            continue
        slope, within = one.slope(since)
        if one.grows(since):
            wrong.append(f"{one.process}: {one.what} grow by {3600 * slope:.1f} an hour")
        if one.what.startswith("memory") or slope:
            at_start, at_end = (statistics.median(v) for v in (one.values[:PIECES], one.values[-PIECES:]))
            rows.append(
                [
                    one.process,
                    one.what,
                    f"{at_start:.0f}",
                    f"{at_end:.0f}",
                    f"{3600 * slope:+.1f} +- {3600 * within:.1f}",
                ]
            )
    requests = markdown(["requests", "count"], [[name, str(n)] for name, n in sorted(found["counts"].items())])
    growth = markdown(["process", "of", "start", "end", "slope after the warm-up, an hour"], rows)
    names = sorted(found["held"] | found["emptied"])
    kept = markdown(
        ["gauge", "at the end", "emptied"],
        [[name, *(f"{found[when].get(name, 0):g}" for when in ("held", "emptied"))] for name in names],
    )
    used = found["emptied"].get("sglang:num_used_tokens", 0.0)
    if used:
        wrong.append(f"{used:g} tokens stay in the KV pool")
    wrong += [f"request failed: {line}" for line in found["failures"][:5]]
    wrong += [f"log: {line}" for line in found["errors"][:5]]
    return "\n\n".join((requests, growth, kept)), wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak test; the module's docstring says what the exit code means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=3, help="requests at a time")
    parser.add_argument("--tokens", type=parse_count, default=2048, help="of the longest videos")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between samples")
    parser.add_argument("--output", type=Path, default=Path("out/soak"))
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="mminference-soak-") as folder:
            traffic = Traffic(Path(folder), SEED)
            requests = {
                "text": traffic.texts(50),
                "image": traffic.images(20),
                "video": [traffic.videos(1, tokens)[0] for tokens in (1024, 1024, options.tokens, options.tokens)],
                "follow-up": traffic.follow_ups(12, options.tokens),
            }
            with toy_server(
                "mminference", CONFIG, 1024, ["--max-total-tokens", str(POOL)], MMINFERENCE_LOG="info"
            ) as server:
                say(f"ready after {server.start_seconds:.0f} s")
                found = soak(server, requests, options)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    text, wrong = report(found)
    print(text + "\n")
    print("\n".join(f"FAILED: {line}" for line in wrong) or "nothing grows, nothing failed")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "soak.md").write_text(text + "\n")
    series = [vars(one) for one in found.pop("series").values()]
    record = environment(torch.device("cpu")) | found | {"series": series, "wrong": wrong}
    (options.output / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
