"""Videos with needles, and the questions that the toy model has learned to answer about them.

A video is a grid of tiles, each as large as one token of the model (28 x 28 pixels, two frames).
Every tile shows one of 16 colours; at each *temporal patch* (two frames) it changes to a random
colour with a given probability. A few *needles* are hidden: one tile, for one temporal patch,
carries a black texture (its key) over its colour. Keys differ within a video.

- ``find KEY`` asks for the needle's colour: text has to find a token.
- ``prev KEY`` asks for the colour at the same place one temporal patch before, ``past KEY`` for the
  one four patches before: visual tokens have to look at their own place in earlier frames first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILE = 28
"""Edge of a tile in pixels: one token after spatial merging."""
FRAMES_PER_PATCH = 2
"""Frames that the model merges into one temporal patch."""
NOISE = 12.0
"""Standard deviation of the pixel noise the model was trained with, out of 255."""
INK = 8
"""Grey level of a texture."""

PALETTE = {
    "red": (220, 30, 30),
    "green": (20, 140, 40),
    "blue": (30, 50, 220),
    "yellow": (240, 225, 40),
    "cyan": (40, 215, 230),
    "magenta": (225, 40, 215),
    "orange": (245, 140, 20),
    "purple": (110, 30, 150),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "brown": (120, 70, 25),
    "pink": (250, 170, 190),
    "lime": (150, 240, 50),
    "navy": (15, 20, 95),
    "teal": (15, 125, 125),
    "olive": (125, 125, 20),
}
COLOURS = tuple(PALETTE)
KEYS = ("rows", "cols", "slash", "back", "check", "dot", "frame", "cross")
LOOKBACK = {"find": 0, "prev": 1, "past": 4}
"""Task -> how many temporal patches before the needle the asked colour is."""
TASKS = tuple(LOOKBACK)


@dataclass(frozen=True)
class Needle:
    """A marked tile: its temporal patch, its place, and its key (a word of `KEYS`)."""

    patch: int
    row: int
    column: int
    key: str


@dataclass(frozen=True)
class Question:
    """A question about one needle and the one right answer."""

    task: str
    key: str
    answer: str

    @property
    def text(self) -> str:
        """The prompt's text, which follows the media."""
        return f"{self.task} {self.key}"

    def is_right(self, reply: str) -> bool:
        """Whether a reply gives the answer; each task has its own letter case and spacing."""
        return reply.strip().lower() == self.answer.strip().lower()


@dataclass(frozen=True)
class Scene:
    """A video's content: palette indices, int64 ``[patches, rows, columns]``, and its needles."""

    colours: NDArray[np.int64]
    needles: tuple[Needle, ...]

    @property
    def tokens(self) -> int:
        """Visual tokens of the video in the model."""
        return self.colours.size

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of one temporal patch."""
        return self.colours[0].size

    def frames(self, rng: np.random.Generator, noise: float = NOISE) -> NDArray[np.uint8]:
        """Draw the video: uint8 ``[2 * patches, 28 * rows, 28 * columns, 3]``.

        Noise of standard deviation `noise` is drawn afresh for every frame.
        """
        patches, rows, columns = self.colours.shape
        pixels = np.empty((patches, FRAMES_PER_PATCH, rows * TILE, columns * TILE, 3), np.uint8)
        for patch, picture in enumerate(self._pictures()):
            noisy = picture + noise * rng.standard_normal((FRAMES_PER_PATCH, *picture.shape), np.float32)
            pixels[patch] = noisy.clip(0, 255).round()
        return pixels.reshape(-1, rows * TILE, columns * TILE, 3)

    def questions(self) -> list[Question]:
        """Every task about every needle, the tasks in turn."""
        return [Question(task, needle.key, self._answer(task, needle)) for needle in self.needles for task in TASKS]

    def _answer(self, task: str, needle: Needle) -> str:
        return COLOURS[self.colours[needle.patch - LOOKBACK[task], needle.row, needle.column]]

    def _pictures(self) -> list[NDArray[np.float32]]:
        """Per temporal patch, without noise: float32 ``[28 * rows, 28 * columns, 3]``."""
        rgb = np.array([PALETTE[name] for name in COLOURS], np.float32)
        pictures = [rgb[colours].repeat(TILE, 0).repeat(TILE, 1) for colours in self.colours]
        for needle in self.needles:
            y, x = needle.row * TILE, needle.column * TILE
            pictures[needle.patch][y : y + TILE, x : x + TILE][TEXTURES[needle.key]] = INK
        return pictures


def make_scene(
    rng: np.random.Generator,
    patches: int,
    rows: int,
    columns: int,
    needles: int = len(KEYS),
    change: float = 0.5,
) -> Scene:
    """A random scene of `patches` temporal patches, with as many needles as asked for.

    A tile changes colour with probability `change` per patch. No needle lies before patch 4, so that
    every task has an answer.
    """
    earliest = max(LOOKBACK.values())
    if not 0 < needles <= len(KEYS):
        raise ValueError(f"needles must be 1 to {len(KEYS)}, one per key, not {needles}")
    if patches <= earliest or (patches - earliest) * rows * columns < needles:
        raise ValueError(f"{patches} patches of {rows} x {columns} tiles have no room for {needles} needles")
    colours = changing(rng, (patches, rows, columns), change)

    places = earliest * rows * columns + rng.permutation((patches - earliest) * rows * columns)[:needles]
    colours.reshape(-1)[places] = rng.integers(len(COLOURS), size=needles)
    keys = rng.permutation(len(KEYS))[:needles]
    where = np.stack(np.unravel_index(places, colours.shape), axis=1).tolist()
    return Scene(
        colours,
        tuple(Needle(t, y, x, KEYS[key]) for (t, y, x), key in zip(where, keys, strict=True)),
    )


def changing(rng: np.random.Generator, shape: tuple[int, int, int], change: float) -> NDArray[np.int64]:
    """Palette indices, int64 ``shape``: a tile changes colour with probability `change` per temporal patch."""
    changes = rng.random(shape) < change
    changes[0] = True
    drawn = rng.integers(len(COLOURS), size=shape)
    last_change = np.maximum.accumulate(np.where(changes, np.arange(shape[0])[:, None, None], 0), axis=0)
    return np.take_along_axis(drawn, last_change, axis=0)


def _textures() -> dict[str, NDArray[np.bool_]]:
    """Key -> which pixels of a tile are inked, bool ``[28, 28]``."""
    y, x = np.mgrid[:TILE, :TILE]
    centre = (TILE - 1) / 2
    return {
        "rows": (y // 4) % 2 == 1,
        "cols": (x // 4) % 2 == 1,
        "slash": ((x + y) // 5) % 2 == 1,
        "back": ((x - y + TILE) // 5) % 2 == 1,
        "check": (x // 7 + y // 7) % 2 == 1,
        "dot": (x - centre) ** 2 + (y - centre) ** 2 < 64,
        "frame": (x < 5) | (x > 22) | (y < 5) | (y > 22),
        "cross": (abs(x - centre) < 3.5) | (abs(y - centre) < 3.5),
    }


TEXTURES = _textures()
"""Key -> which pixels of a tile are inked, bool ``[28, 28]``."""
