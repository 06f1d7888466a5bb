"""The load test: its figures, and all of it on real servers with short videos."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

import pytest

import benchmarks.toy.serving
from benchmarks.gpu.serving import Timing
from benchmarks.serving import __main__ as bench
from benchmarks.serving import soak
from benchmarks.serving.figures import Results, claims
from benchmarks.serving.load import Load, Sample
from benchmarks.serving.traffic import Traffic
from mminference_sgl.testing import Server

TRAFFIC = ("follow-up", "poisson")


def loads(*ttfts: float, kind: str = "text", duration: float = 1.0, target: float = 1.0) -> Load:
    return Load([Sample(kind, ttft, [0.01], 10, True) for ttft in ttfts], duration, target)


def results(**sparse: float) -> Results:
    """Dense takes a second for everything."""
    found = Results(["dense", "sparse"])
    for server, seconds in (("dense", {}), ("sparse", sparse)):
        prefill = seconds.get("prefill", 1.0)
        found.prefills[server] = {16384: [Timing(16384, 0.1, 1.0, 2.0, [prefill], 0.1)]}
        for traffic in ("text", "image", "follow-up"):
            found.add(traffic, server, None, loads(seconds.get(traffic, 1.0), kind=traffic))
        for rate in (1.0, 2.0):
            late = 3 if rate == 2.0 else 0
            times = [0.5] * int(4 * seconds.get("goodput", 1.0)) + [2.0] * late
            found.add("poisson", server, rate, loads(*times, kind="video"))
    return found


def test_claims_hold_at_what_is_wanted_and_not_beyond():
    good = list(claims(results(prefill=0.4, text=1.03, image=1.02, goodput=1.5, **{"follow-up": 1.0})))
    assert len(good) == 5
    assert all(claim.holds for claim in good)
    bad = list(claims(results(prefill=0.41, text=1.04, image=1.04, goodput=1.25, **{"follow-up": 1.01})))
    assert not any(claim.holds for claim in bad)
    assert (
        str(bad[0])
        == "MISSED: sparse: language model's prefill of 16384 tokens, p50: 0.41 of dense, wanted at most 0.4"
    )


def test_wrong_answers_and_unplanned_requests_fail():
    found = results()
    assert list(bench.failures(found)) == []
    found.point("text", "sparse").runs[0].samples[0] = Sample("text", 1.0, [], 10, right=False)
    found.fallbacks = {"sparse": ["geometry: odd"]}
    assert list(bench.failures(found)) == [
        "sparse: a request ran dense: geometry: odd",
        "sparse, text: 0 right answers, dense 1",
    ]


def test_only_follow_ups_share_a_video(tmp_path):
    traffic = Traffic(tmp_path, 0)
    first, *others = traffic.follow_ups(3, 1024)
    assert (first.kind, {r.kind for r in others}) == ("video", {"follow-up"})
    urls = [r.message["content"][0]["video_url"]["url"] for r in (first, *others, *traffic.videos(2, 1024))]
    assert len(set(urls[:4])) == 1
    assert len(set(urls)) == 3
    assert {r.kind for r in traffic.mixed(8, 1024)} == {"text", "image", "video"}


def test_growth_is_told_from_noise():
    def series(values: list[float]) -> soak.Series:
        return soak.Series("python 1", "memory, MiB", [float(i) for i in range(len(values))], values)

    noise = [1000.0 + 8 * ((i * 7919) % 13 - 6) for i in range(160)]
    assert not series(noise).grows(0)
    assert series([v + i for i, v in enumerate(noise)]).grows(0)
    assert not series([v + 0.01 * i for i, v in enumerate(noise)]).grows(0), "within the tolerance"
    start = [v + 20 * min(i, 80) for i, v in enumerate(noise)]
    assert series(start).grows(0)
    assert not series(start).grows(80), "a warm-up"


def test_errors_in_a_log_are_found():
    log = (
        "INFO: fine\nmminference: request runs dense\nTraceback (most recent call last):\nValueError: bad\n[x] ERROR y"
    )
    assert soak.unexpected(log) == log.splitlines()[2:]


@pytest.mark.server
def test_load_on_real_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(benchmarks.toy.serving, "Server", functools.partial(Server, warm=True))
    setups = {"dense": (None, {}), "sparse": ("mminference", {"min_tokens": 0})}
    monkeypatch.setattr(bench, "SETUPS", setups)
    assert bench.main(["--quick", "--traffic", *TRAFFIC, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["prefills"]["dense"]["2048"][0]["density"] == 1
    assert record["prefills"]["sparse"]["2048"][0]["density"] < 1
    assert {(point["traffic"], point["server"]) for point in record["traffic"]} == {
        (traffic, server) for traffic in TRAFFIC for server in setups
    }
    rows = list(csv.DictReader((tmp_path / "requests.csv").read_text().splitlines()))
    assert len(rows) == sum(len(r["samples"]) for p in record["traffic"] for r in p["rounds"])
    assert all(float(row["ttft_s"]) > 0 for row in rows)
    assert [row["right"] for row in rows if row["kind"] == "video"].count("False") == 0
    assert (tmp_path / "results.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "sparse: highest goodput over the rates" in out


@pytest.mark.server
def test_soak_on_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmarks.toy.serving, "Server", functools.partial(Server, warm=True))
    soak.main(["--minutes", "0.2", "--every", "0.3", "--tokens", "1K", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "soak.json").read_text())
    # So soon after the start memory still grows; all else has to be as in a long run.
    assert [line for line in record["wrong"] if " grow by " not in line] == []
    assert record["emptied"]["sglang:num_used_tokens"] == 0
    assert {kind.partition(",")[0] for kind in record["counts"]} == set(soak.KINDS)
    assert any(kind.endswith("aborted") for kind in record["counts"])
    assert len({series["process"] for series in record["series"]}) >= 3
