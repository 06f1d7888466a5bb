"""Real servers of the models that this package adds, against references made of transformers' parts.

One server is stock but for the model, and prefills in one chunk; the other is sparse at error 0, in chunks of 509
tokens, and is asked once of an empty radix cache and once behind a cached prefix. What both say of every token of a
prompt must be what a reference in float64 says, within a few times what the same reference in float32 is off by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import serving
from mminference_sgl.testing import Answer, fallbacks, layouts, png_url, prefills, user_message, write_mp4
from references import llava_video, nvila, videochat_flash, vila
from references.prompt import MEDIUM, Prompt, Reference
from serving import ModelPath, of_frames, squares, words

pytestmark = pytest.mark.server

CHUNK = 509
WHOLE, CHUNKED, CACHED = WAYS = ("whole", "chunked", "behind a cached prefix")
BEHIND = 40
"""Tokens whose log-probabilities are not asked for behind a cached prefix: of those there can be none."""
SCENARIOS = ("video", "two videos", "image and video")


@dataclass(frozen=True)
class Model:
    """``layouts``: by scenario, as the log must tell it; ``rendered``: a question about a video as its authors ask."""

    reference: type[Reference]
    layouts: dict[str, tuple[str, ...]]
    rendered: str
    mutants: tuple[str, ...] = ()
    args: tuple[str, ...] = ()


QWEN = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user"
    " provides, and assist the user with a variety of tasks using natural language."
)


def frames(count: int, rows: int, columns: int, image: str = "") -> dict[str, tuple[str, ...]]:
    """Layouts where an image is one frame, unless another grid is named."""
    clip, still = f"video:{count}x{rows}x{columns}", f"image:1x{image or f'{rows}x{columns}'}"
    return {"video": (clip,), "two videos": (clip, clip), "image and video": (still, clip)}


QUESTION = "<vila/video>what is it?"
TINY = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""The template of tiny checkpoints that bring one."""
NVILA = ("--trust-remote-code", *of_frames(24))
LLAVA_VIDEO = QWEN.format("You are a helpful assistant.", "<video>what is it?")
MODELS = {
    "longvila": Model(
        vila.Vila, frames(24, 7, 7), QWEN.format("You are a helpful assistant", QUESTION), mutants=vila.MUTANTS
    ),
    "longvila_llama": Model(vila.Vila, frames(24, 7, 7), LLAMA.format(LLAVA_SYSTEM, QUESTION)),
    "longvila_pooled": Model(vila.Vila, frames(6, 7, 7), QWEN.format("You are a helpful assistant", QUESTION)),
    "nvila": Model(nvila.Nvila, frames(24, 4, 4), TINY.format(QUESTION), vila.MUTANTS, args=NVILA),
    "nvila_lite": Model(nvila.Nvila, frames(24, 3, 3), TINY.format(QUESTION), vila.MUTANTS[1:2], args=NVILA),
    "videochat_flash": Model(
        videochat_flash.VideoChatFlash,
        {
            "video": ("video:opaque",),
            "two videos": ("video:opaque", "video:opaque"),
            "image and video": ("image:opaque", "video:opaque"),
        },
        QWEN.format("You are a helpful assistant.", "<video>what is it?"),
        mutants=videochat_flash.MUTANTS,
    ),
    "llava_video": Model(
        llava_video.LlavaVideo,
        frames(15, 6, 7, image="13x13"),
        LLAVA_VIDEO,
        mutants=llava_video.MUTANTS,
        args=of_frames(15),
    ),
    "llava_video_frame": Model(
        llava_video.LlavaVideoMoreFrames, frames(27, 7, 7, image="13x13"), LLAVA_VIDEO, args=of_frames(27)
    ),
}
models = pytest.mark.parametrize("name", MODELS)
cases = pytest.mark.parametrize(
    ("name", "scenario"), [pytest.param(n, s, id=f"{n}-{s}") for n in MODELS for s in SCENARIOS]
)
ways = pytest.mark.parametrize("way", WAYS)


@dataclass
class Asked:
    """A prompt with its media, for servers and references alike."""

    text: str
    images: list[np.ndarray] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)


@dataclass
class Told:
    """What a server said to each prompt, and its log."""

    answers: dict[str, Answer] = field(default_factory=dict)
    layouts: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    sparse_tokens: dict[str, int] = field(default_factory=dict)
    log: str = ""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two videos, of 24 frames and of 30."""
    folder = tmp_path_factory.mktemp("clips")
    return [str(write_mp4(folder / f"{count}.mp4", squares(count, count, 6, 8))) for count in (24, 30)]


@pytest.fixture(scope="module")
def asked(clips: list[str]) -> Callable[[str], dict[str, Asked]]:
    def of(name: str) -> dict[str, Asked]:
        kind = MODELS[name].reference
        image, video = kind.image_token, kind.video_token
        before, between, after = words(1, 60), words(2, 7), words(3, 20)
        picture = squares(5, 1, 5, 9)[0]
        return {
            "video": Asked(f"{before}{video}{after}", videos=clips[:1]),
            "two videos": Asked(f"{before}{video}{between}{video}{after}", videos=clips),
            "image and video": Asked(f"{before}{image}{between}{video}{after}", [picture], clips[:1]),
        }

    return of


@pytest.fixture(scope="module")
def told(model_path: ModelPath, asked: Callable[[str], dict[str, Asked]], clips: list[str]) -> Callable[..., Told]:
    @functools.cache
    def servers(name: str) -> dict[str, Told]:
        found = {way: Told() for way in WAYS}
        for ways, chunk, backend in (((WHOLE,), -1, None), ((CHUNKED, CACHED), CHUNK, "mminference")):
            with serving.start(model_path(name), chunk, backend, MODELS[name].args) as server:
                for way in ways:
                    for scenario, prompt in asked(name).items():
                        server.flush_cache()
                        if way == CACHED:
                            server.generate(words(1, 60), max_tokens=1)
                        mark = len(server.log())
                        found[way].answers[scenario] = server.generate(
                            prompt.text,
                            image_data=[png_url(picture) for picture in prompt.images] or None,
                            video_data=prompt.videos,
                            logprob_start_len=BEHIND if way == CACHED else 0,
                            max_tokens=4,
                        )
                        log = server.log(mark)
                        found[way].layouts[scenario] = layouts(log)
                        found[way].sparse_tokens[scenario] = sum(line.chunk for line in prefills(log))
                chat = server.chat([user_message("what is it?", videos=clips[:1])], 4)
                rendered = server.generate(MODELS[name].rendered, video_data=clips[:1], max_tokens=4)
                assert (chat.prompt_tokens, chat.text) == (rendered.prompt_tokens, rendered.text)
                for way in ways:
                    found[way].log = server.log()
        return found

    return lambda name, way: servers(name)[way]


@pytest.fixture(scope="module")
def expected(model_path: ModelPath, asked: Callable[[str], dict[str, Asked]]) -> Callable[..., Any]:
    """Prompt and log-probabilities by reference."""

    @functools.cache
    def reference(name: str, mutant: str, dtype: torch.dtype) -> Reference:
        return MODELS[name].reference(model_path(name), mutant, dtype)

    @functools.cache
    def of(name: str, scenario: str, mutant: str = "", dtype: torch.dtype = torch.float64) -> Any:
        one = asked(name)[scenario]
        found = reference(name, mutant, dtype)
        prompt = found.prompt(one.text, one.images, one.videos)
        return prompt, found.logprobs(prompt)

    return of


def distance(answer: Answer, prompt: Prompt, wanted: list[float | None], skipped: int) -> float:
    """Largest difference of log-probabilities; infinite where the tokens differ."""
    rows = answer.meta["input_token_logprobs"]
    assert len(rows) == answer.prompt_tokens - skipped
    if answer.prompt_tokens != len(prompt.ids):
        return float("inf")
    pairs: Iterator[Any] = zip(rows, prompt.ids[skipped:], wanted[skipped:], strict=True)
    worst = 0.0
    for (logprob, token, _), one, want in pairs:
        if one not in {MEDIUM, token}:
            return float("inf")
        if want is not None and logprob is not None:
            worst = max(worst, abs(logprob - want))
    return worst


def tolerance(expected: Callable[..., Any], name: str, scenario: str) -> float:
    """Four times what the reference in float32 is off by."""
    exact, rounded = (expected(name, scenario, dtype=dtype)[1] for dtype in (torch.float64, torch.float32))
    return 4 * max(abs(a - b) for a, b in zip(exact, rounded, strict=True) if a is not None)


@ways
@cases
def test_prompts_are_what_the_reference_reads(name, scenario, way, told, expected):
    answer = told(name, way).answers[scenario]
    assert (answer.cached_tokens > BEHIND // 2) == (way == CACHED)
    far = distance(answer, *expected(name, scenario), BEHIND if way == CACHED else 0)
    assert far <= tolerance(expected, name, scenario)


@ways
@cases
def test_all_ways_answer_alike(name, scenario, way, told):
    assert told(name, way).answers[scenario].token_ids == told(name, WHOLE).answers[scenario].token_ids


@pytest.mark.parametrize(
    ("name", "mutant"), [pytest.param(n, m, id=f"{n}-{m}") for n, model in MODELS.items() for m in model.mutants]
)
def test_a_wrong_reference_disagrees(name, mutant, told, expected):
    answer = told(name, WHOLE).answers["video"]
    assert distance(answer, *expected(name, "video", mutant), 0) > 100 * tolerance(expected, name, "video")


@pytest.mark.parametrize("way", [CHUNKED, CACHED])
@cases
def test_tokens_lie_as_the_processor_says(name, scenario, way, told):
    run = told(name, way)
    assert set(run.layouts[scenario]) == {MODELS[name].layouts[scenario]}
    answer = run.answers[scenario]
    assert run.sparse_tokens[scenario] > 0.9 * (answer.prompt_tokens - answer.cached_tokens)


@models
def test_nothing_went_wrong(name, told):
    for way in WAYS:
        log = told(name, way).log
        assert "Traceback" not in log
        assert fallbacks(log) == []
