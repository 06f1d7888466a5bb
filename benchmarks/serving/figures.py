"""What the load test says: percentiles, claims that hold or are missed, tables."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.report import markdown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu.serving import Timing
    from benchmarks.serving.load import Load, Sample

WANTED_PREFILL = {16384: 0.4, 32768: 0.3}
"""Video tokens -> share of the dense language model's prefill that is wanted at most."""
WANTED_ALIKE = 1.03
"""Time to first token of what does not run sparse, over dense."""
WANTED_FOLLOW_UP = 1.0
WANTED_GOODPUT = 1.5
PERCENTILES = (50, 90, 99)


@dataclass
class Point:
    """One kind of traffic on one server: its runs, a round each."""

    traffic: str
    server: str
    setting: float | None
    """Concurrency of a sweep, requests a second of Poisson arrivals."""
    runs: list[Load] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        return [sample for run in self.runs for sample in run.samples]

    @property
    def goodput(self) -> float:
        """Requests a second that met the target, over all rounds."""
        return sum(run.goodput * run.duration for run in self.runs) / sum(run.duration for run in self.runs)

    def ttft(self, percent: float, kind: str | None = None) -> float:
        """Percentile of the time to first token; of all requests, or of a kind."""
        return float(np.percentile([s.ttft for s in self.samples if kind in {None, s.kind}], percent))


@dataclass
class Results:
    """All that a run has found, by server."""

    servers: list[str]
    """The first is dense."""
    prefills: dict[str, dict[int, list[Timing]]] = field(default_factory=dict)
    """Server -> video tokens -> a timing each round."""
    points: list[Point] = field(default_factory=list)
    fallbacks: dict[str, list[str]] = field(default_factory=dict)

    def point(self, traffic: str, server: str, setting: float | None = None) -> Point:
        """What was found, without runs where nothing was."""
        wanted = Point(traffic, server, setting)
        return next((p for p in self.points if (p.traffic, p.server, p.setting) == (traffic, server, setting)), wanted)

    def add(self, traffic: str, server: str, setting: float | None, run: Load) -> Point:
        """One more run."""
        point = self.point(traffic, server, setting)
        if not point.runs:
            self.points.append(point)
        point.runs.append(run)
        return point

    def of(self, traffic: str) -> list[Point]:
        """Points of a kind of traffic, those of one setting together."""
        found = [point for point in self.points if point.traffic == traffic]
        return sorted(found, key=lambda p: (p.setting or 0.0, self.servers.index(p.server)))


@dataclass(frozen=True)
class Claim:
    """A wanted figure and the one that was found."""

    server: str
    of: str
    found: float
    wanted: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted

    def __str__(self) -> str:
        words = "at least" if self.at_least else "at most"
        state = "held" if self.holds else "MISSED"
        return f"{state}: {self.server}: {self.of}: {self.found:.2f} of dense, wanted {words} {self.wanted:g}"


def prefill_ratio(results: Results, server: str, tokens: int) -> tuple[float, float]:
    """Medians over those of dense: of the language model's prefill, and of the whole time to first token."""
    dense, own = (results.prefills[name][tokens] for name in (results.servers[0], server))
    return (
        statistics.median(t.language_model for t in own) / statistics.median(t.language_model for t in dense),
        statistics.median(t.ttft for t in own) / statistics.median(t.ttft for t in dense),
    )


def claims(results: Results) -> Iterator[Claim]:
    """What is wanted of every sparse server."""
    dense, *sparse = results.servers
    for server in sparse:
        for tokens in results.prefills.get(server, {}):
            if tokens in WANTED_PREFILL:
                ratio, _ = prefill_ratio(results, server, tokens)
                yield Claim(server, f"language model's prefill of {tokens} tokens, p50", ratio, WANTED_PREFILL[tokens])
        for traffic, kind, wanted in (
            ("text", "text", WANTED_ALIKE),
            ("image", "image", WANTED_ALIKE),
            ("follow-up", "follow-up", WANTED_FOLLOW_UP),
        ):
            own, base = results.point(traffic, server), results.point(traffic, dense)
            if own.runs and base.runs:
                yield Claim(server, f"TTFT of {kind}, p50", own.ttft(50, kind) / base.ttft(50, kind), wanted)
        base, own = (
            max((p.goodput for p in results.of("poisson") if p.server == name), default=0) for name in (dense, server)
        )
        if base:
            yield Claim(server, "highest goodput over the rates", own / base, WANTED_GOODPUT, at_least=True)


def prefill_table(results: Results) -> str:
    """One line per length and server."""
    rows = []
    dense = results.servers[0]
    for tokens in results.prefills.get(dense, {}):
        for server in results.servers:
            timings = results.prefills[server][tokens]
            lm, ttft = (sorted(values) for values in ([t.language_model for t in timings], [t.ttft for t in timings]))
            ratios = prefill_ratio(results, server, tokens)
            rows.append(
                [
                    str(tokens),
                    server,
                    f"{statistics.median(t.density for t in timings):.3f}",
                    f"{statistics.median(lm):.2f} s ({lm[0]:.2f} to {lm[-1]:.2f})",
                    *(["", f"{statistics.median(ttft):.2f} s", ""] if server == dense else []),
                    *(
                        []
                        if server == dense
                        else [f"{ratios[0]:.2f}", f"{statistics.median(ttft):.2f} s", f"{ratios[1]:.2f}"]
                    ),
                ]
            )
    return markdown(["video tokens", "server", "density", "language model, p50", "ratio", "TTFT, p50", "ratio"], rows)


def load_table(results: Results, traffic: str, setting: str = "") -> str:
    """One line per setting, server and kind of request."""
    rows = []
    for point in results.of(traffic):
        dense = results.point(traffic, results.servers[0], point.setting)
        for kind in dict.fromkeys(s.kind for s in dense.samples):
            samples = [s for s in point.samples if s.kind == kind]
            gaps = [gap for s in samples for gap in s.gaps]
            rows.append(
                [
                    *([f"{point.setting:.3g}"] if setting else []),
                    *(point.server, kind, str(len(samples)), f"{sum(s.right for s in samples)}"),
                    *(f"{1e3 * point.ttft(percent, kind):.0f}" for percent in PERCENTILES),
                    "" if point is dense else f"{point.ttft(50, kind) / dense.ttft(50, kind):.3f}",
                    f"{1e3 * statistics.median(gaps):.1f}" if gaps else "",
                    f"{point.goodput:.3f}",
                ]
            )
    head = ["server", "request", "count", "right", *(f"TTFT p{p}, ms" for p in PERCENTILES)]
    head += ["p50 to dense", "ITL p50, ms", "goodput, 1/s"]
    return markdown([setting, *head] if setting else head, rows)


def record(results: Results) -> dict[str, Any]:
    """For JSON."""
    return {
        "servers": results.servers,
        "prefills": {
            server: {str(tokens): [asdict(t) for t in timings] for tokens, timings in lengths.items()}
            for server, lengths in results.prefills.items()
        },
        "traffic": [
            {
                "traffic": point.traffic,
                "server": point.server,
                "setting": point.setting,
                "goodput": point.goodput,
                "target": point.runs[0].target,
                "ttft": {str(p): point.ttft(p) for p in PERCENTILES},
                "rounds": [asdict(run) for run in point.runs],
            }
            for point in results.points
        ],
        "claims": [str(claim) for claim in claims(results)],
        "fallbacks": results.fallbacks,
    }
