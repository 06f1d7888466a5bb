"""The picture of a load test."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.serving.figures import Results

SIZE = 13, 3.8


def draw(results: Results, path: Path) -> None:
    """Prefill by length, time to first token by concurrency, goodput by arrivals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (prefill, sweep, goodput) = plt.subplots(1, 3, figsize=SIZE, layout="constrained")
    width = 0.8 / len(results.servers)
    for number, server in enumerate(results.servers):
        lengths = results.prefills.get(server, {})
        places = [place + number * width for place in range(len(lengths))]
        seconds = [statistics.median(t.language_model for t in timings) for timings in lengths.values()]
        ttft = [statistics.median(t.ttft for t in timings) for timings in lengths.values()]
        colour = f"C{number}"
        prefill.bar(places, ttft, width, color=colour, alpha=0.35)
        prefill.bar(places, seconds, width, color=colour, label=server)
        prefill.set_xticks(range(len(lengths)), [f"{tokens // 1024}K" for tokens in lengths])
        points = [point for point in results.of("concurrency") if point.server == server]
        x = [point.setting for point in points]
        sweep.plot(x, [point.ttft(50) for point in points], "o-", color=colour, label=server)
        sweep.plot(x, [point.ttft(90) for point in points], "o:", color=colour)
        points = [point for point in results.of("poisson") if point.server == server]
        x = [point.setting for point in points]
        goodput.plot(x, [point.goodput for point in points], "o-", color=colour, label=server)
    prefill.set(title="one video: language model, TTFT (light)", xlabel="video tokens", ylabel="seconds, p50")
    sweep.set(title="time to first token: p50, p90 (dotted)", xlabel="videos at a time", ylabel="seconds")
    goodput.set(title="within the TTFT target", xlabel="arrivals, 1/s", ylabel="requests/s")
    for axes in (prefill, sweep, goodput):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
