"""What is wanted of the cases."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.method.cases import CASES, PATTERNS, K
from benchmarks.method.measure import APART, Result

SHARED, NEVER = 0.75, 1.02
"""What sharing lists computes of what lists of single heads do: where it pays, and in any case but h-lines."""
EXACT = 1e-5
"""Error of attention in fp32 that leaves nothing out."""


def judge(results: Sequence[Result], bound: float) -> list[tuple[str, bool]]:
    """What is wanted, with the figures: (text, held). ``bound``: error of media rows.

    Selection knows the probe rows' error only, so all rows may have that much more as rows differ.
    """
    by_case: dict[str, dict[str, Result]] = {}
    for result in results:
        by_case.setdefault(result.case, {})[result.pattern] = result
    verdicts: list[tuple[str, bool]] = []

    def limit(result: Result) -> float:
        return max(result.error_bound_slack * bound, EXACT)

    def want(text: str, value: float, limit: float, *, least: bool) -> None:
        held = value >= limit if least else value <= limit
        verdicts.append((f"{text} {value:.3f}, wanted {'>=' if least else '<='} {limit:.3f}", held))

    for case in CASES:
        found = by_case.get(case.name)
        if found is None:
            continue
        auto = found["auto"]
        if APART in found:
            # Heads that look at a grid alike share nearly all that they read.
            most = SHARED if case.group > 2 and case.tokens >= 64 * K else NEVER
            text = f"{case.name}: computed products of shared lists over those of single heads"
            # What rows of h-lines need is known too badly to compare.
            if case.plant != "hlines":
                want(text, auto.density / found[APART].density, most, least=False)
        for name in ("auto", "grid"):
            want(f"{case.name}: error of {name}", found[name].error, limit(found[name]), least=False)
        if case.plant == "diffuse":
            continue
        fixed = [found[name] for name in PATTERNS if name != "auto"]
        reaching = [result for result in fixed if result.error <= limit(result)]
        if reaching:
            best = min(reaching, key=_density)
            text = f"{case.name}: density of auto over {best.pattern}'s"
            want(text, auto.density / best.density, 1.25, least=False)
        if case.tokens >= 64 * K and not case.chunk:
            most = max(0.06, 1.5 * auto.needed)
            want(f"{case.name}: density of grid, needed {auto.needed:.3f},", found["grid"].density, most, least=False)
        if case.boundary and case.plant != "no-boundary":
            reaching_all = [result for result in found.values() if result.error <= limit(result)]
            off = min((r for r in reaching_all if r.pattern.startswith("off:")), key=_density, default=None)
            on = min((r for r in reaching_all if not r.pattern.startswith("off:")), key=_density, default=None)
            # One pattern for all pairs that keeps to the bound is at worst dense attention.
            ratio = (off.density if off else 1.0) / on.density if on else 0.0
            names = f"{off.pattern if off else 'dense'} over {on.pattern if on else 'none'}"
            want(f"{case.name}: tiles without a boundary, {names},", ratio, 1.5, least=True)
        plain = by_case.get(case.name.replace("qwen3 ", "qwen3-plain "))
        if case.geometry == "qwen3" and plain is not None:
            for name in ("auto", "grid"):
                text = f"{case.name}: {name} with timestamps against without, density over"
                want(text, found[name].density / plain[name].density, 1.25, least=False)
    return verdicts


def _density(result: Result) -> float:
    return result.density
