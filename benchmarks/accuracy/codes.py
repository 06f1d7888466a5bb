"""Needles for video models that read English: cards with codes in videos of moving shapes, on pictures and in texts.

A *card* says "The code of the red door is 4821." and is shown for two seconds; the rest of the video is a haystack of
drifting shapes. Mixed prompts have two videos, a picture and a note, each with codes of other doors. A question asks
for one door's code; the others are what it could be confused with.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mminference_sgl.testing import png_url, write_mp4

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from mminference_sgl.testing import Answer, Client

DOORS = ("red", "blue", "green", "yellow", "black", "white", "golden", "silver")
SIDE, TOKENS = 448, 256
"""Edge of a frame in pixels, and its tokens where two frames and 28 x 28 pixels are one token."""
FPS, CARD_FRAMES = 2, 4
SHAPES = 12
MAX_TOKENS = 12
CLIP_CARDS = 6
"""Cards of the only video of a prompt."""


@dataclass(frozen=True)
class Code:
    """The code of one door; ``depth``: where in its video the card is, 0 to 1, None on pictures and in notes."""

    door: str
    digits: str
    depth: float | None = None
    task: str = "code"

    @property
    def sentence(self) -> str:
        """What a card says."""
        return f"The code of the {self.door} door is {self.digits}."

    @property
    def text(self) -> str:
        """The question."""
        return f"What is the code of the {self.door} door? Answer with the four digits only."

    def is_right(self, reply: str) -> bool:
        """Whether a reply holds the code, and no other number."""
        return re.findall(r"\d+", reply) == [self.digits]


@dataclass(frozen=True)
class Prompt:
    """Chat content before the question, and what can be asked."""

    content: Sequence[dict[str, Any]]
    questions: Sequence[Code]


def draw(kind: str, length: int, rng: np.random.Generator, folder: Path, name: str) -> Prompt:
    """A prompt of about ``length`` visual tokens; its videos are files in ``folder``."""
    doors = rng.permutation(DOORS).tolist()
    digits = [f"{number:04d}" for number in rng.choice(9000, len(doors), replace=False) + 1000]
    codes = [Code(*pair) for pair in zip(doors, digits, strict=True)]
    patches = length // TOKENS
    if kind == "clip":
        part, shown = _video(patches, codes[:CLIP_CARDS], rng, folder / f"{name}.mp4")
        return Prompt([part], shown)
    content, questions = [], []
    for number, own in enumerate((codes[:3], codes[3:6])):
        part, shown = _video((patches - 1) // 2, own, rng, folder / f"{name}-{number}.mp4")
        content.append(part)
        questions += shown
        if not number:
            picture = {"type": "image_url", "image_url": {"url": png_url(_card(codes[6].sentence))}}
            content += [picture, {"type": "text", "text": f"Note: {codes[7].sentence}"}]
    return Prompt(content, [*questions, *codes[6:]])


def ask(client: Client, prompt: Prompt) -> list[Answer]:
    """Asks all questions; the first answer is streamed, for its time to first token."""
    return [
        client.chat(
            [{"role": "user", "content": [*prompt.content, {"type": "text", "text": code.text}]}],
            MAX_TOKENS,
            stream=True,
        )
        for code in prompt.questions
    ]


def _video(
    patches: int, codes: Sequence[Code], rng: np.random.Generator, path: Path
) -> tuple[dict[str, Any], list[Code]]:
    """A video with a card in each of as many equal parts: what it is in a chat message, and what it shows.

    Raises:
        ValueError: too short for its cards.
    """
    frames = 2 * patches
    if frames < len(codes) * CARD_FRAMES:
        raise ValueError(
            f"{patches * TOKENS} tokens are too few for {len(codes)} cards; {len(codes) * 2 * TOKENS} are not"
        )
    film, shown = _haystack(frames, rng), []
    bounds = np.linspace(0, frames, len(codes) + 1).astype(int)
    for code, first, end in zip(codes, bounds, bounds[1:], strict=False):
        at = int(rng.integers(first, end - CARD_FRAMES + 1))
        film[at : at + CARD_FRAMES] = _card(code.sentence)
        shown.append(Code(code.door, code.digits, at / frames))
    encoded = base64.b64encode(write_mp4(path, film, FPS).read_bytes()).decode()
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{encoded}"}}, shown


def _card(sentence: str) -> NDArray[np.uint8]:
    """A white card with a sentence: uint8 [SIDE, SIDE, 3]."""
    words = sentence.split()
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    text = "\n".join(" ".join(words[first : first + 3]) for first in range(0, len(words), 3))
    ImageDraw.Draw(picture).multiline_text(
        (SIDE // 2, SIDE // 2), text, "black", ImageFont.load_default(44), anchor="mm", align="center"
    )
    return np.asarray(picture)


def _haystack(frames: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Discs that drift over a slowly changing ground: uint8 [frames, SIDE, SIDE, 3]."""
    film = np.empty((frames, SIDE, SIDE, 3), np.uint8)
    colours = rng.integers(0, 256, (SHAPES, 3))
    start, speed = rng.uniform(0, SIDE, (SHAPES, 2)), rng.normal(0, SIDE / 40, (SHAPES, 2))
    radius = rng.uniform(SIDE / 16, SIDE / 5, SHAPES)
    for frame in range(frames):
        ground = tuple(int(128 + 100 * np.sin(frame / 50 + phase)) for phase in range(3))
        picture = Image.new("RGB", (SIDE, SIDE), ground)
        pen = ImageDraw.Draw(picture)
        for colour, centre, r in zip(colours.tolist(), (start + frame * speed) % SIDE, radius, strict=True):
            pen.ellipse((*(centre - r), *(centre + r)), fill=tuple(colour))
        film[frame] = np.asarray(picture)
    return film
