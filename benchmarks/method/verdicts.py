"""What is wanted of the cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.method.cases import CASES, PATTERNS, Case, K
from benchmarks.method.measure import Result


def judge(results: Sequence[Result], target: float) -> list[tuple[str, bool]]:
    """What is wanted, with the figures: (text, held)."""
    by_case: dict[str, dict[str, Result]] = {}
    for result in results:
        by_case.setdefault(result.case, {})[result.pattern] = result
    floor = target - 0.02
    verdicts: list[tuple[str, bool]] = []

    def want(text: str, value: float, limit: float, *, least: bool) -> None:
        held = value >= limit if least else value <= limit
        verdicts.append((f"{text} {value:.3f}, wanted {'>=' if least else '<='} {limit:.3f}", held))

    for case in CASES:
        found = by_case.get(case.name)
        if found is None or case.plant == "diffuse":
            continue
        auto = found["auto"]
        want(f"{case.name}: mass of auto", auto.mass, floor, least=True)
        reaching = {name: found[name] for name in PATTERNS if name != "auto" and found[name].mass >= floor}
        if reaching:
            best = min(reaching.values(), key=lambda result: result.density)
            text = f"{case.name}: density of auto over {best.pattern}'s"
            want(text, auto.density / best.density, 1.25, least=False)
        if case.tokens >= 64 * K and not case.chunk:
            limit = max(0.06, 1.5 * auto.needed)
            want(f"{case.name}: density of grid, needed {auto.needed:.3f},", found["grid"].density, limit, least=False)
        if case.boundary and case.plant != "no-boundary":
            reaching_all = [result for result in found.values() if result.mass >= floor]
            off = min((r for r in reaching_all if r.pattern.startswith("off:")), key=_density, default=None)
            on = min((r for r in reaching_all if not r.pattern.startswith("off:")), key=_density, default=None)
            # One pattern for all pairs that keeps the mass is at worst dense attention.
            ratio = (off.density if off else 1.0) / on.density if on else 0.0
            names = f"{off.pattern if off else 'dense'} over {on.pattern if on else 'none'}"
            want(f"{case.name}: tiles without a boundary, {names},", ratio, 1.5, least=True)
        whole = by_case.get(_without_chunks(case).name)
        if case.chunk and whole is not None:
            for name in ("auto", "grid"):
                below = min(target, whole[name].mass_as_chunked[case.chunk]) - found[name].mass
                want(f"{case.name}: {name}'s mass below that in one chunk by", below, 0.01, least=False)
        plain = by_case.get(case.name.replace("qwen3 ", "qwen3-plain "))
        if case.geometry == "qwen3" and plain is not None:
            for name in ("auto", "grid"):
                text = f"{case.name}: {name} with timestamps against without,"
                want(f"{text} mass below by", min(target, plain[name].mass) - found[name].mass, 0.01, least=False)
                if plain[name].mass >= found[name].mass - 0.005:
                    # Otherwise fewer tiles are less mass.
                    want(f"{text} density over", found[name].density / plain[name].density, 1.1, least=False)
    return verdicts


def _density(result: Result) -> float:
    return result.density


def _without_chunks(case: Case) -> Case:
    return replace(case, chunk=0)
