"""The toy model behind a real SGLang server: how it is started, and how a video's questions are asked."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mminference_sgl.testing import Answer, Client, Server, ServerError, mean_density, prefills

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.toy.scenes import Question, Scene

CHECKPOINT = Path(__file__).parent / "checkpoint"
ROWS, COLUMNS = 8, 16
CHANGE = 0.5
"""Probability that a tile changes colour; so high that an older colour cannot be guessed."""
FPS = 2
CLIP_FPS = 8
"""Sampling rate; the toy video has fewer frames per second, so all of them are taken."""
GUARD_OFF = 1e9
"""Error ceiling that no head reaches: the guard would send the heads that fail to dense."""
CONTROL: dict[str, Any] = {
    "pattern": "a_shape",
    "error_ceiling": GUARD_OFF,
    "patterns": {"a_shape": {"sink": 64, "window": ROWS * COLUMNS}},
}
"""A pattern that must fail: its window ends one key short of the same place one frame back."""

MAX_TOKENS = 3
"""Of an answer."""
USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@dataclass
class Score:
    """Right answers and questions by task; density of each video's prefill, and the first video's first answer."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    densities: list[float] = field(default_factory=list)
    first: Answer | None = None

    @property
    def all_right(self) -> bool:
        """Whether every question was answered correctly."""
        return self.right == self.asked

    def share(self, task: str) -> float:
        """Share of right answers to one task."""
        return self.right[task] / self.asked[task]


def server(
    backend: str | None,
    config: dict[str, Any],
    chunk: int | None,
    args: Sequence[str] = (),
    *,
    quick: bool = False,
    model: Path = CHECKPOINT,
    **env: str,
) -> Server:
    """A server of the toy, or of another model that samples videos like it.

    `backend` None is dense, `chunk` -1 one chunk and None SGLang's default.
    """
    return Server(
        model,
        attention_backend=backend,
        chunked_prefill_size=chunk,
        metrics=True,
        quick=quick,
        args=["--mm-process-config", json.dumps({"video": {"fps": CLIP_FPS}}), *args],
        env={"MMINFERENCE_CONFIG": json.dumps(config), "MMINFERENCE_LOG": "debug", **env},
    )


def ask(server: Server, score: Score, scene: Scene, video: Path) -> None:
    """Ask every question about one video and add to the score.

    The first question brings the video; the others continue its session from the end of the video, so their prefix is
    what the first one's prefill left in the KV cache.
    """
    questions = scene.questions()
    session = server.open_session()
    mark = len(server.log())
    first = server.generate(
        USER + VIDEO + questions[0].text + END,
        video_data=[str(video)],
        max_tokens=MAX_TOKENS,
        stream=True,
        session_params={"id": session},
    )
    if first.meta["video_tokens"] != scene.tokens:
        raise ServerError(f"{first.meta['video_tokens']} video tokens, not {scene.tokens}")
    # The chunks that the log does not name ran dense.
    score.densities.append(mean_density(prefills(server.log(mark)), first.prompt_tokens))
    score.first = score.first or first
    for question, answer in zip(questions, [first, *follow_up(server, session, first, questions)], strict=True):
        score.asked[question.task] += 1
        score.right[question.task] += question.is_right(answer.text)


def follow_up(server: Client, session: str, first: Answer, questions: Sequence[Question]) -> list[Answer]:
    """Asks all but the first of the questions, each in the first one's place: what is before it is in the KV cache."""
    kept = first.prompt_tokens - server.count_tokens(questions[0].text + END)
    turn = {"id": session, "rid": first.meta["id"], "offset": kept, "drop_previous_output": True}
    return [
        server.generate(question.text + END, max_tokens=MAX_TOKENS, session_params=turn) for question in questions[1:]
    ]
