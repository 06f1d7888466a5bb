"""``make figures``: tables and plots of the README and of docs/, from the result files and from nothing else.

A table stands between two comments, ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; what is between is
replaced. Plots are written to ``docs/pictures``. ``--check`` changes nothing and exits 1 where a table is another one.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.inputs import count
from benchmarks.gpu.report import markdown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PICTURES = ROOT / "docs/pictures"
PAGES = ("README.md", "docs/benchmarks.md")
_BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n\n).*?(\n<!-- end of figures -->)", re.DOTALL)


def read(name: str) -> Any:
    """A committed result file."""
    return json.loads((RESULTS / name).read_text())


def demo() -> str:
    """The demonstration: answers, density, time to first token."""
    runs = read("demo-cpu.json")["runs"]
    dense = runs[0]["toy"]
    rows = []
    for run in runs:
        toy = run["toy"]
        right = ", ".join(f"{run['right'][task]}/{run['asked'][task]}" for task in ("find", "prev", "past"))
        ttft = prefill = ""
        if toy["prefill"]:
            ttft, median = f"{toy['ttft']:.2f} s", statistics.median(toy["prefill"])
            prefill = f"{median:.2f} s ({min(toy['prefill']):.2f} to {max(toy['prefill']):.2f})"
            if run is not runs[0]:
                ttft += f" ({toy['ttft'] / dense['ttft']:.2f}x)"
                prefill += f", **{median / statistics.median(dense['prefill']):.2f}x**"
        name = run["name"].replace("error", "mminference, `error`")
        rows.append((name, right, f"{toy['density']:.3f}", ttft, prefill))
    head = f"{dense['tokens'] - dense['tokens'] % 1024:,} video tokens, chunks of {read('demo-cpu.json')['chunk']}"
    return markdown((head, "right: find / prev / past", "density", "TTFT", "language model's prefill"), rows)


def long() -> str:
    """One layer's chunk behind long prefixes."""
    rows = [
        (
            count(line["prefix"]),
            str(line["group"]),
            f"{line['sparse']:.2f} s",
            f"{line['dense']:.1f} s",
            f"{line['ratio']:.1f}x ({line['spread'][0]:.1f} to {line['spread'][1]:.1f})",
            f"{line['density']:.4f}",
            f"{line['error']:.4f}",
            f"{line['peak_bytes'] / 2**30:.1f} GiB",
        )
        for line in read("long-cpu.json")["lines"]
    ]
    return markdown(("prefix", "group", "sparse", "dense", "ratio (spread)", "density", "error", "memory"), rows)


def words() -> str:
    """A real language model on a video of words."""
    found = read("words-cpu.json")
    rows = [
        (
            row["name"],
            f"{row['density']:.3f}",
            f"{100 * row['loss']:+.2f} ± {100 * row['interval']:.2f}",
            f"{100 * row['agreement']:.1f}",
            f"{row['divergence']:.4f}",
            f"{row['right']:.3f}",
        )
        for row in found["rows"]
    ]
    rows.insert(0, ("dense", "1", "", "100", "0", f"{found['dense_right']:.3f}"))
    return markdown(("setting", "density", "likelihood lost, %", "same word, %", "divergence, nats", "right"), rows)


TABLES: dict[str, Callable[[], str]] = {"demo": demo, "long": long, "words": words}


def rendered(page: str) -> str:
    """A page's text with its tables as the result files have them.

    Raises:
        KeyError: a table that nobody renders.
    """
    return _BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], (ROOT / page).read_text())


def draw() -> None:
    """Writes the plots."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "figures", "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    lines = read("long-cpu.json")["lines"]
    for group in sorted({line["group"] for line in lines}):
        own = [line for line in lines if line["group"] == group]
        middle = [line["ratio"] for line in own]
        spread = [[abs(line["ratio"] - line["spread"][side]) for line in own] for side in range(2)]
        axes.errorbar([line["prefix"] for line in own], middle, spread, marker="o", label=f"{group} heads on a KV head")
    axes.set(xscale="log", xlabel="tokens before the chunk", ylabel="dense time / sparse time", ylim=(0, None))
    axes.set_xticks(ticks := sorted({line["prefix"] for line in lines}), [count(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_title("Attention of one layer, 8K chunk, two CPU cores", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(PICTURES / "speed.svg", metadata={"Date": None})

    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    tasks = ("prev", "past")
    rows = [row for row in read("toy-cpu.json")["rows"] if row["chunk"] == -1]
    for name, label in (
        ("dense", "dense"),
        ("mminference", "mminference"),
        ("error 0.8", "mminference, error 0.8"),
        ("control", "control: sink and window"),
    ):
        own = [row for row in rows if row["name"] == name]
        right, asked = ([sum(row[kind][task] for task in tasks) for row in own] for kind in ("right", "asked"))
        share = [r / n for r, n in zip(right, asked, strict=True)]
        style = {"linestyle": "--"} if name == "dense" else {}
        axes.plot([row["tokens"] for row in own], share, marker="o", label=label, **style)
        above = 6 if name == "mminference" else -11
        for row, value in zip(own, share, strict=True):
            if name != "dense":
                place = row["tokens"], value
                axes.annotate(
                    f"{row['density']:.2f}", place, (0, above), textcoords="offset points", ha="center", fontsize=7
                )
    axes.set(xscale="log", xlabel="video tokens", ylabel="right: same place, earlier frames", ylim=(-0.1, 1.12))
    axes.set_xticks(ticks := sorted({row["tokens"] for row in rows}), [count(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_title("Answers of the toy model, and densities", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center right")
    figure.savefig(PICTURES / "answers.svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where tables differ")
    options = parser.parse_args(argv)
    stale = [page for page in PAGES if rendered(page) != (ROOT / page).read_text()]
    if options.check:
        for page in stale:
            print(f"{page}: a table is not that of the result files; make figures")
        return 1 if stale else 0
    for page in stale:
        (ROOT / page).write_text(rendered(page))
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
