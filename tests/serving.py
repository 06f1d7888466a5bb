"""What the servers of tests/server are asked, and how they are started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mminference_sgl.testing import (
    Answer,
    Message,
    Prefill,
    Server,
    layouts,
    png_url,
    prefills,
    user_message,
    write_mp4,
)

NEW_TOKENS = 8
LARGEST_LOGIT = 16.0
EXACT = {"error": 0.0, "min_tokens": 256}
"""Every tile is selected, and all but the shortest requests take the sparse path."""

ALONE = ("text", "image", "two images", "video", "video, radix hit", "images and video")
TOGETHER = ("mixed: text", "mixed: image", "mixed: two images", "mixed: video")
SCENARIOS = (*ALONE, *TOGETHER)


@dataclass
class Run:
    """What one server answered to every scenario, and what its log said meanwhile."""

    answers: dict[str, Answer] = field(default_factory=dict)
    prefills: dict[str, list[Prefill]] = field(default_factory=dict)
    """By scenario; the concurrent requests share one list."""
    layouts: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    log: str = ""


class RunOf(Protocol):
    """All scenarios on a server of its own, once per set of arguments; `backend` None is the platform's dense one."""

    def __call__(
        self, model: str, chunk: int, backend: str | None, args: tuple[str, ...] = (), plugins: str | None = None
    ) -> Run: ...


ModelPath = Callable[[str], Path]
Messages = dict[str, Message]


def messages(folder: Path) -> Messages:
    """The request of each scenario; its videos are written to `folder`."""
    first, second, third = (png_url(squares(*size)[0]) for size in ((1, 1, 13, 19), (2, 1, 9, 31), (3, 1, 17, 11)))
    long, short = (str(write_mp4(folder / f"{n}.mp4", squares(n, n, 8, 16))) for n in (24, 18))
    return {
        "text": user_message(words(1, 400)),
        "image": user_message(words(2, 9), images=[first], before=words(3, 5)),
        "two images": user_message(words(4, 30), images=[second, third]),
        "video": user_message(words(5, 20), videos=[long]),
        "video, radix hit": user_message(words(6, 200), videos=[long]),
        "images and video": user_message(words(13, 20), images=[first, third], videos=[short], before=words(14, 10)),
        "mixed: text": user_message(words(7, 300)),
        "mixed: image": user_message(words(8, 40), images=[second], before=words(9, 60)),
        "mixed: two images": user_message(words(10, 3), images=[third, first]),
        "mixed: video": user_message(words(11, 25), videos=[short], before=words(12, 33)),
    }


def words(seed: int, count: int) -> str:
    """Text of about two tokens a word."""
    rng = np.random.default_rng(seed)
    return " ".join("".join(pair) for pair in rng.choice(list("abdeikmnorstu"), (count, 2)))


def squares(seed: int, count: int, rows: int, columns: int) -> np.ndarray:
    """Pictures of random coloured squares, uint8 ``[count, 28 * rows, 28 * columns, 3]``."""
    colours = np.random.default_rng(seed).integers(256, size=(count, rows, columns, 3), dtype=np.uint8)
    return colours.repeat(28, 1).repeat(28, 2)


def start(
    model: Path,
    chunk: int | None,
    backend: str | None,
    args: Sequence[str] = (),
    config: Any = None,
    *,
    overlap_schedule: bool = False,
    warm: bool = True,
    prepare: Sequence[Callable[[], None]] = (),
    **env: str | None,
) -> Server:
    """A server in float32 with a small pool and the backend's log at its most talkative."""
    environment = {"MMINFERENCE_CONFIG": json.dumps(config or EXACT), "MMINFERENCE_LOG": "debug", **env}
    return Server(
        model,
        attention_backend=backend,
        chunked_prefill_size=chunk,
        max_total_tokens=16384,
        overlap_schedule=overlap_schedule,
        warm=warm,
        prepare=prepare,
        quick=True,
        args=["--dtype", "float32", "--context-length", "8192", *args],
        env=environment,
    )


def of_frames(count: int) -> tuple[str, ...]:
    """Arguments of a server that takes so many frames of a video."""
    return ("--mm-process-config", json.dumps({"video": {"num_frames": count}}))


def in_ranks(count: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and environment of a server of so many ranks.

    SGLang wants a core for each on a CPU; they share where there are not as many.
    """
    if count == 1:
        return (), {}
    mine = sorted(os.sched_getaffinity(0))
    cores = "|".join(str(mine[rank % len(mine)]) for rank in range(count))
    return ("--tp", str(count)), {"SGLANG_CPU_OMP_THREADS_BIND": cores}


def ask(server: Server, message: Message, tokens: int = NEW_TOKENS, **options: Any) -> Answer:
    return server.chat([message], tokens, ignore_eos=True, **options)


def ask_together(server: Server, asked: Messages, names: Sequence[str] = TOGETHER, **options: Any) -> dict[str, Answer]:
    """Different requests at the same time."""
    with ThreadPoolExecutor(len(names)) as pool:
        answers = pool.map(lambda name: ask(server, asked[name], **options), names)
        return dict(zip(names, answers, strict=True))


def ask_in_turn(server: Server, asked: Messages, run: Run, tokens: int = NEW_TOKENS) -> None:
    """One request after the other; answers and log go to `run`."""
    for name, message in asked.items():
        mark = len(server.log())
        run.answers[name] = ask(server, message, tokens)
        log = server.log(mark)
        run.prefills[name], run.layouts[name] = prefills(log), layouts(log)
    run.log = server.log()


def ask_everything(server: Server, asked: Messages) -> Run:
    """One scenario after the other, the concurrent ones last."""
    run = Run()
    ask_in_turn(server, {name: asked[name] for name in ALONE}, run)
    mark = len(server.log())
    run.answers |= ask_together(server, asked)
    run.prefills |= dict.fromkeys(TOGETHER, prefills(server.log(mark)))
    run.log = server.log()
    return run


def rounding_band(dtype: str = "float32") -> float:
    """Eight roundings of a logit."""
    return 8 * float(np.finfo(dtype).eps) * LARGEST_LOGIT


def difference(one: Answer, other: Answer) -> float:
    """Largest difference of log-probabilities, over the generated tokens and their likeliest alternatives."""
    pairs = list(zip(one.logprobs, other.logprobs, strict=True))
    for here, there in zip(one.top, other.top, strict=True):
        shared = here.keys() & there.keys()
        # Where rounding swaps two tokens at the end of the list, one of them is missing in the other list.
        assert len(shared) >= len(here) - 1
        pairs += [(here[token], there[token]) for token in shared]
    return max(abs(a - b) for a, b in pairs)


def lead(answer: Answer) -> float:
    """Smallest lead of a generated token over the next likely one."""
    ordered = [sorted(row.values(), reverse=True) for row in answer.top]
    return min(row[0] - row[1] for row in ordered)
