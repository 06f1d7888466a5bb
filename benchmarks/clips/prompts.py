"""Prompts of several clips, pictures and texts, and questions about them that tell attention patterns apart.

Clips are the toy's grids of changing colours with needles in them (:mod:`benchmarks.toy.scenes`). Before each stands a
*sign*, one of eight words, and behind it *memos*, texts that give a colour to a key. A question names a key:

- ``find`` asks for the needle's colour, ``left`` for the one beside it in the same frame, ``prev`` and ``past`` for
  those at its place one and eight temporal patches before: visual tokens have to look at their neighbours first, and
  where frames are large, farther back than a local window goes.
- ``sign`` asks for the sign before the needle's clip: visual tokens have to read the text before their own clip, the
  first tokens of the prompt among it, which is what a sink is.
- ``memo`` asks for the colour in the memo of that key: text finds text, behind any number of visual tokens.
- ``count`` asks how many clips and pictures there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.toy.scenes import COLOURS, KEYS, Needle, Question, Scene, changing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OFFSETS = {"find": (0, 0, 0), "prev": (1, 0, 0), "past": (8, 0, 0), "left": (0, 0, 1)}
"""Task -> how far before the needle the asked tile is: temporal patches, rows, columns.

Four colours are what the values of one group of heads, 64 numbers, can carry to the question side by side.
"""
TASKS = (*OFFSETS, "sign", "memo", "count")
SIGNS = ("alpha", "beta", "gamma", "delta", "kappa", "sigma", "theta", "omega")
NUMBERS = ("one", "two", "three", "four")
ANY = "all"
"""What stands in a question for the key where none is asked for."""
MOST_NEEDLES = len(KEYS)

_FORMS = {
    "find": "{}".format,
    "prev": " {}".format,
    "past": str.upper,
    "left": lambda colour: " " + colour.upper(),
    "memo": lambda colour: " " + colour.capitalize(),
}
"""Task -> how its colours are written: each has its own, which leaves the read-out linear."""


def written(task: str, word: str) -> str:
    """The token that answers a task with a word: a colour, a sign or a number."""
    return _FORMS[task](word) if task in _FORMS else word


@dataclass(frozen=True)
class Memo:
    """A text that gives a colour to a key."""

    key: str
    colour: str

    @property
    def text(self) -> str:
        """As it stands in the prompt."""
        return f"memo {self.key}" + written("memo", self.colour)


@dataclass(frozen=True)
class Part:
    """A sign, a clip and the memos behind it. A scene of one temporal patch is a picture."""

    sign: str
    scene: Scene
    memos: tuple[Memo, ...] = ()

    @property
    def after(self) -> str:
        """The text behind the clip."""
        return "".join(memo.text for memo in self.memos)


@dataclass(frozen=True)
class Prompt:
    """Parts, in their order."""

    parts: tuple[Part, ...]

    @property
    def visual_tokens(self) -> int:
        """Of all clips and pictures."""
        return sum(part.scene.tokens for part in self.parts)

    def questions(self) -> list[Question]:
        """All that have an answer, needle by needle."""
        found = [question for part in self.parts for needle in part.scene.needles for question in _about(part, needle)]
        found += [Question("memo", m.key, written("memo", m.colour)) for part in self.parts for m in part.memos]
        return [*found, Question("count", ANY, NUMBERS[len(self.parts) - 1])]


def _about(part: Part, needle: Needle) -> Iterator[Question]:
    for task, (patches, rows, columns) in OFFSETS.items():
        place = needle.patch - patches, needle.row - rows, needle.column - columns
        if min(place) >= 0:
            yield Question(task, needle.key, written(task, COLOURS[part.scene.colours[place]]))
    yield Question("sign", needle.key, part.sign)


@dataclass(frozen=True)
class Form:
    """What prompts drawn alike have in common: shape, needles and memos of each part.

    ``shapes``: temporal patches, rows and columns.
    """

    shapes: tuple[tuple[int, int, int], ...]
    needles: tuple[int, ...]
    memos: tuple[int, ...]

    def draw(self, rng: np.random.Generator, change: float) -> Prompt:
        """A prompt of this form; a tile changes colour with probability ``change`` per temporal patch."""
        if not 0 < sum(self.needles) <= MOST_NEEDLES or sum(self.memos) > len(KEYS):
            raise ValueError(f"needles {self.needles} and memos {self.memos}, with one key each of {len(KEYS)}")
        keys, noted = (iter(rng.permutation(KEYS).tolist()) for _ in range(2))
        signs = rng.choice(SIGNS, len(self.shapes), replace=False).tolist()
        return Prompt(
            tuple(
                Part(
                    sign,
                    _scene(rng, shape, [next(keys) for _ in range(needles)], change),
                    tuple(Memo(next(noted), str(rng.choice(COLOURS))) for _ in range(memos)),
                )
                for sign, shape, needles, memos in zip(signs, self.shapes, self.needles, self.memos, strict=True)
            )
        )


def _scene(rng: np.random.Generator, shape: tuple[int, int, int], keys: Sequence[str], change: float) -> Scene:
    colours = changing(rng, shape, change)
    places = rng.permutation(colours.size)[: len(keys)]
    colours.reshape(-1)[places] = rng.integers(len(COLOURS), size=len(keys))
    where = np.stack(np.unravel_index(places, shape), axis=1).tolist()
    return Scene(colours, tuple(Needle(t, y, x, key) for (t, y, x), key in zip(where, keys, strict=True)))
