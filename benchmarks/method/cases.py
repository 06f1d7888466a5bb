"""Cases of ``make bench-method``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.method.planted import GEOMETRIES, Mix, Plant, Scene, interleaved, one_video
from mminference_sgl.method.catalog import HeadSpec

PATTERNS = ("grid", "vertical_slash", "a_shape", "auto")
K = 1024

MAPS = {
    "map:k": HeadSpec("dense", "dense", "dense", "grid"),
    "map:2d": HeadSpec("vertical_slash", "vertical_slash", "dense", "grid"),
    "off:vertical_slash": HeadSpec(*["vertical_slash"] * 4),
    "off:a_shape": HeadSpec(*["a_shape"] * 4),
}
"""Maps of heads: with a boundary between the modalities of keys or of both, and with one pattern for all pairs."""

PLANTS = {
    "slash": Plant(Mix(slash=1)),
    "patch": Plant(Mix(slash=1), patch=2),
    "vlines": Plant(Mix(vlines=1)),
    "hlines": Plant(Mix(slash=1), hline_places=0.06),
    "lines": Plant(Mix(slash=0.6, vlines=0.25, window=0.15)),
    "few-lines": Plant(Mix(slash=0.6, vlines=0.25, window=0.15), vline_places=0.01),
    "all": Plant(Mix(slash=0.6, vlines=0.25, window=0.15), hline_places=0.06),
    "no-window": Plant(Mix(slash=0.7, vlines=0.3)),
    "no-window-h": Plant(Mix(slash=0.7, vlines=0.3), hline_places=0.06),
    "a-shape": Plant(Mix(sink=0.4, window=0.6)),
    "vertical-slash": Plant(Mix(window=0.3, diagonal=0.4, columns=0.3)),
    "diffuse": Plant(Mix(flat=True)),
    "no-boundary": Plant(Mix(window=0.4, columns=0.5)),
    "k-boundary": Plant(Mix(slash=0.5, text=0.4)),
    "q-boundary": Plant(Mix(slash=0.7, window=0.2), Mix(window=0.3, columns=0.6)),
    "2d-boundary": Plant(Mix(slash=0.6, text=0.3), Mix(window=0.2, text=0.3, columns=0.4)),
}
MIXED = ("lines", "slash", "a-shape", "vertical-slash")
DIFFERENT = ("lines", "vertical-slash", "a-shape", "diffuse")
"""Heads on one KV head that have nothing in common."""
BOUNDARIES = ("no-boundary", "k-boundary", "q-boundary", "2d-boundary")


@dataclass(frozen=True)
class Case:
    """A planted layer at a length; ``chunk`` 0 is one chunk.

    ``plant`` names :data:`PLANTS` or is "mixed" or "different", for heads of several.
    """

    plant: str
    geometry: str
    tokens: int
    chunk: int = 0
    quick: bool = False
    heads: int = 2
    kv_heads: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique among the cases."""
        chunk = f" in {self.chunk // K}K" if self.chunk else ""
        group = f" group of {self.group}" if self.group > 2 else ""
        return f"{self.geometry} {self.plant} {self.tokens // K}K{chunk}{group}"

    @property
    def group(self) -> int:
        """Query heads on a KV head."""
        return self.heads // self.kv_heads

    @property
    def data(self) -> Any:
        """What the operands depend on."""
        return self.plant, self.geometry, self.tokens, self.heads, self.kv_heads, self.seed

    @property
    def plants(self) -> list[Plant]:
        """One per query head, cycled."""
        several = {"mixed": MIXED, "different": DIFFERENT}
        return [PLANTS[name] for name in several.get(self.plant, (self.plant,))]

    @property
    def boundary(self) -> bool:
        """Whether the map depends on modalities, and text stands between several items."""
        return self.plant in BOUNDARIES

    def scene(self) -> Scene:
        """The request."""
        make = interleaved if self.boundary else one_video
        return make(GEOMETRIES[self.geometry], self.tokens)

    def specs(self) -> dict[str, list[HeadSpec]]:
        """Head specs by name of the pattern; rows of text run dense, but for maps that say otherwise."""
        specs = {name: HeadSpec("dense", "dense", name, name) for name in PATTERNS} | (MAPS if self.boundary else {})
        return {name: [spec] * self.heads for name, spec in specs.items()}


GRIDS = ("longvila", "llava-video", "videochat", "qwen2.5", "qwen3", "qwen3-plain")
SMALL_FRAMES = ("videochat",)
"""Frames too small for a window of a part of a frame: their heads have lines of one kind, or none."""


def _all_cases() -> Iterator[Case]:
    for geometry in GRIDS:
        lines = "no-window" if geometry in SMALL_FRAMES else "lines"
        everything = f"{lines}-h" if geometry in SMALL_FRAMES else "all"
        for plant in ("slash", "vlines", "hlines", lines, everything):
            yield Case(plant, geometry, 16 * K, quick=plant == lines and geometry != "llava-video")
        yield Case(lines, geometry, 16 * K, chunk=2 * K, quick=geometry == "longvila")
    yield Case("patch", "longvila", 16 * K)
    yield Case("patch", "llava-video", 16 * K, chunk=2 * K)
    for plant in ("slash", "lines", "all"):
        yield Case(plant, "qwen2.5", 8 * K, quick=plant != "slash")
    yield Case("a-shape", "qwen2.5", 16 * K)
    yield Case("vertical-slash", "qwen2.5", 16 * K, quick=True)
    # Heads of one layer that differ, two to a KV head.
    yield Case("mixed", "qwen2.5", 16 * K, heads=4, kv_heads=2)
    yield Case("diffuse", "qwen2.5", 8 * K)
    for plant in BOUNDARIES:
        yield Case(plant, "qwen2.5", 16 * K, quick=plant == "2d-boundary")
    yield Case("2d-boundary", "qwen2.5", 16 * K, chunk=2 * K)
    yield Case("2d-boundary", "qwen3", 16 * K)
    for plant, geometry in (("lines", "longvila"), ("all", "longvila"), ("lines", "qwen3"), ("2d-boundary", "qwen2.5")):
        yield Case(plant, geometry, 32 * K)
    yield Case("few-lines", "longvila", 64 * K)
    yield Case("lines", "longvila", 64 * K)
    yield Case("lines", "longvila", 64 * K, chunk=8 * K)
    yield Case("lines", "longvila", 64 * K, chunk=2 * K)
    yield Case("all", "longvila", 64 * K)
    yield Case("lines", "qwen3", 64 * K)
    for heads in (4, 7):
        yield Case("lines", "longvila", 64 * K, chunk=8 * K, heads=heads)
        yield Case("slash", "qwen2.5", 64 * K, chunk=8 * K, heads=heads)
    yield Case("different", "qwen2.5", 16 * K, chunk=4 * K, heads=4)


CASES = list(_all_cases())
