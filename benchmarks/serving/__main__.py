"""``make bench-serving``: load on servers of the toy model, dense and sparse in turns.

All servers are up at once and asked one after the other, so that what else a machine does is in the figures of all of
them alike. Each answers the same requests; no video or text is sent to a server twice but in follow-ups.

- *prefill*: a video in a fresh prompt, and then the same video behind another text: that misses the radix cache but
  finds the video's embeddings, so the scheduler's time from the first chunk to the first token is the language model
  alone. One video a round.
- *text*, *image*: one request at a time; nothing in them runs sparse.
- *follow-up*: questions about one video, one at a time; all but the first find it in the radix cache.
- *concurrency*: videos, so many at a time.
- *poisson*: videos that arrive by chance, at rates around what the dense server can do at most: one over its time to
  first token on its own. Goodput counts answers whose first token comes within twice that time.
- *mixed*: text, images and videos by chance.

Load is sent by SGLang's ``sglang.benchmark.serving``. ITL is the time from one token to the next. Answers of the toy
are checked: one is *right* when it begins with the colour that was asked for.

``--output`` gets a table, a picture, ``results.json`` with everything, and ``requests.csv`` with a line per request.
The exit code is 1 when answers of dense and sparse servers differ in more than a tenth of a kind of request, or a
request ran dense because it could not be planned; with ``--check-speed`` also when a wanted figure is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.demo.__main__ import FAST
from benchmarks.gpu.report import environment, parse_count, say
from benchmarks.gpu.serving import time_video
from benchmarks.serving.figures import Results, claims, load_table, prefill_table, record
from benchmarks.serving.load import Arrivals, run
from benchmarks.serving.plots import draw
from benchmarks.serving.traffic import Traffic
from benchmarks.toy.serving import server as toy_server
from mminference_sgl.testing import Server, ServerError, fallbacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.serving.traffic import Request

SEED = 20261101
SETUPS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "mminference": ("mminference", {}),
    f"error {FAST}": ("mminference", {"error": FAST}),
}
"""Server -> backend and settings."""
TRAFFIC = {
    "text": ("", "Text, one at a time"),
    "image": ("", "Short images, one at a time"),
    "follow-up": ("", "Follow-up questions on one video, one at a time"),
    "concurrency": ("concurrency", "Videos, so many at a time"),
    "poisson": ("arrivals, 1/s", "Videos, Poisson arrivals"),
    "mixed": ("", "Text, images and videos, Poisson arrivals"),
}
"""Kind of traffic -> what its setting is, title of its table."""
ONE_AT_A_TIME = Arrivals(concurrency=1)
TARGET = 2.0
"""Time to first token that counts as good, over that of a dense server with nothing else to do."""
WARM_UP_TOKENS = 2048
SAME = 0.9
QUICK = [
    *("--tokens", "2K", "--load-tokens", "1K", "--rounds", "1", "--small", "4", "--follow-ups", "2"),
    *("--concurrency", "1", "2", "--rates", "1", "--videos", "2", "--mixed", "4"),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load test; the module's docstring says what the exit code means."""
    options = _arguments(argv)
    began = time.monotonic()
    results = Results(list(SETUPS))
    try:
        with tempfile.TemporaryDirectory(prefix="mminference-serving-") as folder, ExitStack() as stack:
            servers: dict[str, Server] = {}
            for name, (backend, config) in SETUPS.items():
                servers[name] = stack.enter_context(toy_server(backend, config, options.chunk))
                say(f"{name}: ready after {servers[name].start_seconds:.0f} s")
            measure(results, servers, Traffic(Path(folder), SEED), options)
            for name, server in servers.items():
                results.fallbacks[name] = [f"{f.reason}: {f.detail}" for f in fallbacks(server.log())]
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    text = report(results)
    print(text)
    write(options.output, results, text, options)
    say(f"done in {time.monotonic() - began:.0f} s, written to {options.output}")
    wrong = list(failures(results))
    print("\n".join(f"FAILED: {line}" for line in wrong))
    return int(bool(wrong) or (options.check_speed and not all(claim.holds for claim in claims(results))))


def measure(results: Results, servers: dict[str, Server], traffic: Traffic, options: argparse.Namespace) -> None:
    """Fill in the results."""
    for server in servers.values():
        time_video(server, traffic.video(WARM_UP_TOKENS)[0], 1)
    for tokens in options.tokens:
        for round_number in range(options.rounds):
            video, _ = traffic.video(tokens)
            for name, server in in_turns(servers, round_number):
                timing = time_video(server, video, 1)
                server.flush_cache()
                results.prefills.setdefault(name, {}).setdefault(tokens, []).append(timing)
                say(f"prefill, {tokens} tokens, {name}: {timing.language_model:.2f} s, TTFT {timing.ttft:.2f} s")

    tokens = options.load_tokens
    idle = [time_video(servers["dense"], traffic.video(tokens)[0], 1).ttft for _ in range(options.rounds)]
    target = TARGET * sorted(idle)[len(idle) // 2]

    def load(name: str, make: Callable[[], list[Request]], arrivals: Arrivals, setting: float | None = None) -> None:
        for round_number in range(options.rounds):
            requests = make()
            for server_name, server in in_turns(servers, round_number):
                server.flush_cache()
                found = run(server.url, requests, arrivals, target, SEED + round_number)
                point = results.add(name, server_name, setting, found)
                say(f"{name} {setting or ''}, {server_name}: TTFT p50 {point.ttft(50):.3f} s")

    capacity = TARGET / target
    if "text" in options.traffic:
        load("text", lambda: traffic.texts(options.small), ONE_AT_A_TIME)
    if "image" in options.traffic:
        load("image", lambda: traffic.images(options.small), ONE_AT_A_TIME)
    if "follow-up" in options.traffic:
        load("follow-up", lambda: traffic.follow_ups(options.follow_ups, tokens), ONE_AT_A_TIME)
    for count in options.concurrency if "concurrency" in options.traffic else ():
        videos = max(options.videos, count)
        load("concurrency", lambda n=videos: traffic.videos(n, tokens), Arrivals(concurrency=count), count)
    for share in options.rates if "poisson" in options.traffic else ():
        arrivals = Arrivals(rate=share * capacity)
        load("poisson", lambda: traffic.videos(options.videos, tokens), arrivals, arrivals.rate)
    if "mixed" in options.traffic:
        load("mixed", lambda: traffic.mixed(options.mixed, tokens), Arrivals(rate=2 * capacity))


def in_turns(servers: dict[str, Server], round_number: int) -> Iterator[tuple[str, Server]]:
    """All servers, each round beginning with another one."""
    names = list(servers)
    start = round_number % len(names)
    yield from ((name, servers[name]) for name in (*names[start:], *names[:start]))


def report(results: Results) -> str:
    """The tables and what became of the claims."""
    parts = ["Prefill of one video", prefill_table(results)]
    for traffic, (setting, title) in TRAFFIC.items():
        if points := results.of(traffic):
            target = f"; first token in time within {points[0].runs[0].target:.2f} s"
            parts += [title + target, load_table(results, traffic, setting)]
    parts += ["Wanted", "\n".join(f"- {claim}" for claim in claims(results))]
    return "\n\n".join(parts)


def failures(results: Results) -> Iterator[str]:
    """What makes the figures worthless."""
    for name, found in results.fallbacks.items():
        yield from (f"{name}: a request ran dense: {line}" for line in found)
    for point in results.points:
        dense = results.point(point.traffic, results.servers[0], point.setting)
        right, base = (sum(s.right for s in p.samples) for p in (point, dense))
        if right < SAME * base:
            yield f"{point.server}, {point.traffic}: {right} right answers, dense {base}"


def write(folder: Path, results: Results, text: str, options: argparse.Namespace) -> None:
    """Table, picture, JSON and CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    found = environment(torch.device("cpu")) | {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "commit": commit(),
        "options": {key: str(value) for key, value in vars(options).items()},
    }
    title = f"{found['device']}, {found['cores']} cores, {found['cpu']}, commit {found['commit']}, {found['time']}"
    (folder / "results.md").write_text(f"{title}\n\n{text}\n")
    (folder / "results.json").write_text(json.dumps(found | record(results), indent=1) + "\n")
    with (folder / "requests.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["traffic", "setting", "server", "round", "kind", "ttft_s", "mean_itl_s", "right"])
        for point in results.points:
            for number, load in enumerate(point.runs):
                for s in load.samples:
                    itl = sum(s.gaps) / len(s.gaps) if s.gaps else ""
                    rows.writerow([point.traffic, point.setting, point.server, number, s.kind, s.ttft, itl, s.right])
    draw(results, folder / "results.png")


def commit() -> str:
    """Of this checkout, with a plus where it has changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "-uno") else "")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tokens", type=parse_count, nargs="+", default=[16384, 32768], help="of the videos whose prefill is timed")
    add("--load-tokens", type=parse_count, default=16384, help="of the videos of all other traffic")
    add("--traffic", nargs="*", choices=TRAFFIC, default=list(TRAFFIC), help="beside the prefill of single videos")
    add("--rounds", type=int, default=3)
    add("--small", type=int, default=30, help="texts and images a round")
    add("--follow-ups", type=int, default=12, help="a round")
    add("--concurrency", type=int, nargs="*", default=[1, 2, 4])
    add("--rates", type=float, nargs="*", default=[0.5, 1.0, 1.5, 2.0], help="over what the dense server can do")
    add("--videos", type=int, default=8, help="of a run of the sweeps")
    add("--mixed", type=int, default=24, help="requests of mixed traffic a round")
    add("--chunk", type=int, default=8192, help="chunked prefill size; -1 is one chunk")
    add("--output", type=Path, default=Path("out/serving"))
    add("--check-speed", action="store_true", help="exit with 1 when a wanted figure is missed")
    add("--quick", action="store_true", help="short videos, few of them: shows that it works; figures mean nothing")
    given = list(sys.argv[1:] if argv is None else argv)
    return parser.parse_args([*QUICK, *given] if "--quick" in given else given)


if __name__ == "__main__":
    sys.exit(main())
