"""``make bench-method``: what selection keeps of planted attention, and how many tiles it computes for it.

Queries and keys are built so that the true attention map is known (:mod:`.planted`). For each case and pattern:

- *needed*: tiles of the planted map, under the better split over the two passes, over causal tiles;
- *density*: tiles that the pattern computes, over causal tiles; those of shared lists are as many (lane, key) products;
- *coverage*: the mass kept as selection itself reports it, from its probe rows;
- *mass*: the mass kept in truth, mean over all rows, and *weakest*: the kind of rows that keeps least;
- *error*: relative error of the output against dense attention.

The last three are exact for a sample of rows: only they are attended to, with the tiles that selection chose for all
rows, and their dense attention is computed in full. Cases in chunks measure the first, a middle and the last one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.method.cases import CASES
from benchmarks.method.measure import Result, run
from benchmarks.method.verdicts import judge
from benchmarks.toy.serving import GUARD_OFF
from mminference_sgl.method.config import from_sources


def describe(result: Result) -> str:
    """A row of the table."""
    kind, mass = min(result.mass_by_kind.items(), key=lambda entry: entry[1])
    head = min(range(len(result.mass_by_head)), key=result.mass_by_head.__getitem__)
    figures = (result.needed, result.planted, result.density, result.coverage, result.mass)
    return (
        f"{result.case:34} {result.pattern:16}"
        + "".join(f"{figure:9.3f}" for figure in figures)
        + f"{result.error:9.3f}  {kind} {mass:.3f}, head {head} {result.mass_by_head[head]:.3f}"
        + (f", {result.guarded} guarded" if result.guarded else "")
        + "".join(f"\n    sequence pass {result.density_near:.3f}, {line}" for line in result.why)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="8K and 16K tokens only, few cases")
    parser.add_argument("--case", action="append", default=[], metavar="PART", help="only cases whose name contains it")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a setting, e.g. error=0.05")
    parser.add_argument("--why", action="store_true", help="also tell what the lost mass was planted as; slow")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures here")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a verdict is missed")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.quick or not arguments.quick]
    if arguments.case:
        cases = [case for case in cases if any(part in case.name for part in arguments.case)]
    if arguments.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    keep_freed_memory()
    # What is measured is selection alone.
    config = from_sources(("defaults", {"error_ceiling": GUARD_OFF}), ("--set", settings(arguments.set)))
    start, results = time.perf_counter(), []
    titles = "".join(f"{title:>9}" for title in ("needed", "planted", "density", "coverage", "mass", "error"))
    print(f"{'case':34} {'pattern':16}{titles}  weakest rows and head")
    for result in run(cases, config, why=arguments.why):
        results.append(result)
        print(describe(result), flush=True)
    print(f"{time.perf_counter() - start:.0f} s, error {config.error}")
    verdicts = judge(results, config.error)
    for text, held in verdicts:
        print(f"{'held  ' if held else 'MISSED'} {text}")
    if arguments.json is not None:
        document = {
            "config": asdict(config),
            "results": [asdict(result) for result in results],
            "verdicts": [{"wanted": text, "held": held} for text, held in verdicts],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if arguments.check and not all(held for _, held in verdicts) else 0


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks instead of mapping each anew, which takes longer than the arithmetic on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_mmap_max, 0)


def settings(pairs: Sequence[str]) -> Mapping[str, Any]:
    """``a.b=1`` as ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for pair in pairs:
        path, _, value = pair.partition("=")
        *folders, name = path.split(".")
        target = result
        for folder in folders:
            target = target.setdefault(folder, {})
        target[name] = json.loads(value)
    return result


if __name__ == "__main__":
    sys.exit(main())
