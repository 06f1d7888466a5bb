"""Requests of a load test, as SGLang's client reads them: questions about generated videos and images, and text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.toy.scenes import COLOURS, KEYS, Question, make_scene
from benchmarks.toy.serving import CHANGE, COLUMNS, FPS, ROWS
from mminference_sgl.testing import Message, png_url, user_message, write_mp4

if TYPE_CHECKING:
    from collections.abc import Iterable

OUTPUT_TOKENS = 8
"""Of every answer, so that there is an inter-token latency; the colour that was asked for comes first."""
TEXT_WORDS = 192
WORDS = (*KEYS, *COLOURS)


@dataclass(frozen=True)
class Request:
    """One chat request: what it is of, its message, and the answer that is right, where there is one."""

    kind: str
    message: Message
    question: Question | None = None

    @property
    def row(self) -> dict[str, Any]:
        """A line of SGLang's ``openai`` data set. Special tokens count as text, or the client would not see them."""
        return {"messages": [self.message], "max_tokens": OUTPUT_TOKENS, "skip_special_tokens": False}

    def is_right(self, reply: str) -> bool:
        """Whether a reply begins with the answer; what follows it was only asked for to be timed."""
        return self.question is None or reply.strip().lower().startswith(self.question.answer)


class Traffic:
    """Makes requests; no two of them share media, a text or a prefix unless they are follow-ups."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._rng = np.random.default_rng(seed)
        self._videos = 0

    def video(self, tokens: int) -> tuple[Path, list[Question]]:
        """A video of about as many tokens, and what can be asked about it."""
        self._videos += 1
        scene = make_scene(self._rng, max(8, tokens // (ROWS * COLUMNS)), ROWS, COLUMNS, change=CHANGE)
        # Noise takes longer to encode than the video takes to be prefilled.
        return write_mp4(self._folder / f"{self._videos}.mp4", scene.frames(self._rng, noise=0), FPS), scene.questions()

    def videos(self, count: int, tokens: int) -> list[Request]:
        """Questions about a video each."""
        return [self._about(*self.video(tokens)) for _ in range(count)]

    def follow_ups(self, count: int, tokens: int) -> list[Request]:
        """Questions about one video: the first brings it, the others find it in the radix cache."""
        path, questions = self.video(tokens)
        some = [questions[i % len(questions)] for i in range(count + 1)]
        first, *others = (Request("follow-up", user_message(q.text, videos=[str(path)]), q) for q in some)
        return [Request("video", first.message, first.question), *others]

    def texts(self, count: int) -> list[Request]:
        """Text alone."""
        words = self._rng.choice(WORDS, (count, TEXT_WORDS))
        return [Request("text", user_message(" ".join(some))) for some in words]

    def images(self, count: int) -> list[Request]:
        """A question about an image of as many tokens as a frame of the videos."""
        requests = []
        for _ in range(count):
            scene = make_scene(self._rng, 8, ROWS, COLUMNS, change=CHANGE)
            picture = scene.frames(self._rng, noise=0)[0]
            requests.append(Request("image", user_message("find dot", images=[png_url(picture)])))
        return requests

    def mixed(self, count: int, tokens: int) -> list[Request]:
        """Of four requests one about a video, one about an image and two of text, in an order of chance."""
        videos, images = max(1, count // 4), max(1, count // 4)
        requests = [*self.videos(videos, tokens), *self.images(images), *self.texts(max(1, count - videos - images))]
        return [requests[i] for i in self._rng.permutation(len(requests))]

    @staticmethod
    def _about(path: Path, questions: list[Question]) -> Request:
        return Request("video", user_message(questions[0].text, videos=[str(path)]), questions[0])


def write(path: Path, requests: Iterable[Request]) -> Path:
    """A data set of SGLang's client."""
    path.write_text("".join(json.dumps(request.row) + "\n" for request in requests))
    return path
