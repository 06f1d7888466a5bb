"""Prompts of several clips for a server: their media as files, their text in the model's own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.toy.serving import END, FPS, MAX_TOKENS, USER, VIDEO, follow_up
from mminference_sgl.testing import png_url, write_mp4

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.clips.prompts import Part, Prompt
    from benchmarks.toy.scenes import Question
    from mminference_sgl.testing import Answer, Client

IMAGE = VIDEO.replace("video", "image")


@dataclass(frozen=True)
class Media:
    """A prompt with its media: a video's path or a picture's data URL for each part."""

    prompt: Prompt
    sources: tuple[str, ...]


def render(prompt: Prompt, rng: np.random.Generator, folder: Path, name: str) -> Media:
    """Draws the media of a prompt; files are called ``name`` and the number of their part."""
    sources = []
    for number, part in enumerate(prompt.parts):
        frames = part.scene.frames(rng)
        sources.append(
            png_url(frames[0]) if _is_picture(part) else str(write_mp4(folder / f"{name}-{number}.mp4", frames, FPS))
        )
    return Media(prompt, tuple(sources))


def ask(server: Client, media: Media, questions: list[Question]) -> list[Answer]:
    """Asks all questions about one prompt in one session: its media are prefilled once."""
    parts = media.prompt.parts
    text = USER + "".join(part.sign + (IMAGE if _is_picture(part) else VIDEO) + part.after for part in parts)
    sources = list(zip(parts, media.sources, strict=True))
    session = server.open_session()
    first = server.generate(
        text + questions[0].text + END,
        image_data=[source for part, source in sources if _is_picture(part)] or None,
        video_data=[source for part, source in sources if not _is_picture(part)] or None,
        max_tokens=MAX_TOKENS,
        stream=True,
        session_params={"id": session},
    )
    return [first, *follow_up(server, session, first, questions)]


def _is_picture(part: Part) -> bool:
    return len(part.scene.colours) == 1
