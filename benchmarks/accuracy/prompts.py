"""What models are asked: clips of the small model's world, or codes shown in ordinary videos for any other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from benchmarks.accuracy import codes
from benchmarks.clips import serving as clips
from benchmarks.clips.prompts import MOST_NEEDLES, OFFSETS, Form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from benchmarks.clips.prompts import Prompt
    from mminference_sgl.testing import Answer, Client

SEED = 20260717
KINDS = ("clip", "mixed")
CHANGE = 0.5
ROWS, COLUMNS = 16, 16
"""Of a clip's frames: eight patches back are 2048 tokens, more than the window of an A-shape of little density."""


class Question(Protocol):
    """One question about a prompt."""

    @property
    def task(self) -> str:
        """What kind of question it is."""

    def is_right(self, reply: str) -> bool:
        """Whether a reply gives the answer."""


@dataclass(frozen=True)
class Asked:
    """One prompt of about ``length`` visual tokens, and its questions.

    ``depths``: where in a single clip that lies which a question is about, 0 to 1; None for other questions.
    ``ask``: puts all questions to a server, which prefills the media once.
    """

    kind: str
    length: int
    questions: Sequence[Question]
    depths: Sequence[float | None]
    ask: Callable[[Client], list[Answer]]


def form(kind: str, length: int) -> Form:
    """Of the small model's prompts of about so many visual tokens."""
    frame = ROWS * COLUMNS
    if kind == "clip":
        return Form(((length // frame, ROWS, COLUMNS),), (MOST_NEEDLES,), (1,))
    half = (length // frame - 1) // 2
    return Form(((half, ROWS, COLUMNS), (1, ROWS, COLUMNS), (half, ROWS, COLUMNS)), (4, 1, 3), (0, 1, 0))


def of_clips(length: int, count: int, folder: Path) -> Iterator[Asked]:
    """Prompts for the small model (:mod:`benchmarks.clips`); the same whenever they are drawn."""
    for kind, rng, number in _draws(length, count):
        prompt = form(kind, length).draw(rng, CHANGE)
        media, questions = clips.render(prompt, rng, folder, f"{kind}-{length}-{number}"), prompt.questions()
        ask = partial(clips.ask, media=media, questions=questions)
        yield Asked(kind, length, questions, _depths(prompt), ask)


def of_codes(length: int, count: int, folder: Path) -> Iterator[Asked]:
    """Prompts in English, for any video model (:mod:`.codes`); the same whenever they are drawn."""
    for kind, rng, number in _draws(length, count):
        prompt = codes.draw(kind, length, rng, folder, f"{kind}-{length}-{number}")
        depths = [code.depth if kind == "clip" else None for code in prompt.questions]
        yield Asked(kind, length, prompt.questions, depths, partial(codes.ask, prompt=prompt))


def _draws(length: int, count: int) -> Iterator[tuple[str, np.random.Generator, int]]:
    for kind in KINDS:
        rng = np.random.default_rng([SEED, length, KINDS.index(kind)])
        yield from ((kind, rng, number) for number in range(count))


def _depths(prompt: Prompt) -> list[float | None]:
    if len(prompt.parts) > 1:
        return [None for _ in prompt.questions()]
    scene = prompt.parts[0].scene
    where = {needle.key: needle.patch / len(scene.colours) for needle in scene.needles}
    return [where[question.key] if question.task in OFFSETS else None for question in prompt.questions()]
