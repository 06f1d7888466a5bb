"""Kinds of requests and of media that users send: answered as the dense server does, or refused by both alike.

Two servers for all of it, with chunks that cut frames and a pool that few requests fill.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import media_kinds
import serving
from mminference_sgl.testing import (
    Answer,
    Message,
    Server,
    ServerError,
    fallbacks,
    prefills,
    user_message,
    write_mp4,
)
from serving import ModelPath, difference, rounding_band, squares, words

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not media_kinds.available(), reason="needs FFmpeg's program, not its libraries alone"),
]

POOL = 3072
"""Slots: one long video, or a few requests at once."""
CONFIG = {"error": 0.0, "min_tokens": 16}
LONG_ANSWER = 600
TOLERANCE = 5 * rounding_band()

Pair = tuple[Server, Server]
Files = dict[str, tuple[str, Path]]


@pytest.fixture(scope="module")
def pair(model_path: ModelPath) -> Iterator[Pair]:
    """Ours and the dense one."""
    # Decoding may run out of slots: requests are let in as if they would hardly answer.
    args = ["--max-total-tokens", str(POOL), "--schedule-conservativeness", "0.01"]
    ours, dense = (
        serving.start(model_path("qwen2_5_vl"), 509, backend, args, CONFIG) for backend in ("mminference", None)
    )
    with ours, dense:
        yield ours, dense
        assert fallbacks(ours.log()) == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Modality and file of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    videos = media_kinds.videos(folder)
    found = {name: ("video", path) for name, path in videos.items()}
    found |= {name: ("image", path) for name, path in media_kinds.images(folder).items()}
    return found | media_kinds.broken(folder, videos["h264"]) | media_kinds.damaged(folder, videos["h264"])


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Message:
    """About 2,300 tokens."""
    clip = write_mp4(tmp_path_factory.mktemp("clip") / "long.mp4", squares(5, 24, 12, 16))
    return user_message(words(6, 20), videos=[str(clip)])


def showing(kind: tuple[str, Path]) -> Message:
    modality, path = kind
    return user_message(words(1, 30), before=words(2, 20), **{f"{modality}s": [str(path)]})


def answer_of(server: Server, message: Message, **options: Any) -> Answer | None:
    """None if the server refused; it must not have failed."""
    try:
        return serving.ask(server, message, **options)
    except ServerError as error:
        refused = str(error).partition("\n")[0]
        assert " answered " in refused, refused
        return None


def assert_same(ours: Answer | None, dense: Answer | None) -> None:
    assert (ours is None) == (dense is None)
    if ours is None or dense is None:
        return
    assert ours.prompt_tokens == dense.prompt_tokens
    assert ours.token_ids == dense.token_ids
    assert difference(ours, dense) <= TOLERANCE


# -- media -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*media_kinds.VIDEOS, *media_kinds.IMAGES])
def test_formats_and_shapes(name: str, pair: Pair, files: Files):
    ours, dense = (answer_of(server, showing(files[name])) for server in pair)
    assert_same(ours, dense)
    assert ours is not None or name in media_kinds.REFUSED


@pytest.mark.parametrize("name", media_kinds.BROKEN)
def test_broken_files_are_refused_and_harm_nothing(name: str, pair: Pair, files: Files):
    asked = showing(files["png"])
    before = answer_of(pair[0], asked)
    assert [answer_of(server, showing(files[name])) for server in pair] == [None, None]
    after = answer_of(pair[0], asked)
    assert before is not None
    assert_same(after, before)


@pytest.mark.parametrize("name", media_kinds.DAMAGED)
def test_damaged_files_are_answered_or_refused_alike(name: str, pair: Pair, files: Files):
    assert_same(*(answer_of(server, showing(files[name])) for server in pair))


# -- requests ----------------------------------------------------------------------------------------------------------


def test_several_answers_to_one_prompt(pair: Pair, long_video: Message):
    body = {"model": "default", "messages": [long_video], "n": 3, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    texts = []
    for server in pair:
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
        texts.append([choice["message"]["content"] for choice in reply["choices"]])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 3
    assert len(set(texts[0])) == 1


def test_log_probabilities_of_a_prompt_with_a_video(pair: Pair, files: Files):
    prompt = said(words(3, 200), "<|video_pad|>", words(4, 300))
    rows = []
    for server in pair:
        server.flush_cache()
        mark = len(server.log())
        options = {"video_data": [str(files["h264"][1])], "logprob_start_len": 0, "max_tokens": 2}
        answer = server.generate(prompt, **options)
        rows.append(answer.meta["input_token_logprobs"])
        assert len(rows[-1]) == answer.prompt_tokens > 509
        if server is pair[0]:
            assert len(prefills(server.log(mark))) > 1
    for (here, token, _), (there, same, _) in zip(*rows, strict=True):
        assert token == same
        assert here is there is None or abs(here - there) <= TOLERANCE


def said(before: str, placeholder: str, after: str, *, turn: int = 0) -> str:
    ended = "<|im_end|>\n" if turn else ""
    media = f"<|vision_start|>{placeholder}<|vision_end|>"
    return f"{ended}<|im_start|>user\n{before}{media}{after}<|im_end|>\n<|im_start|>assistant\n"


def test_sessions_that_append_media(pair: Pair, files: Files):
    """An image, then a video, then an image again, each turn behind all that was said before."""
    clip, picture = (str(files[name][1]) for name in ("h264", "png"))
    turns = (("<|image_pad|>", {"image_data": [picture]}), ("<|video_pad|>", {"video_data": [clip]})) * 2
    conversations: list[list[Answer]] = []
    for server in pair:
        params: dict[str, Any] = {"id": server.open_session()}
        answers = []
        for turn, (placeholder, media) in enumerate(turns):
            text = said(words(turn, 50), placeholder, words(turn + 9, 40), turn=turn)
            answers.append(server.generate(text, session_params=params, max_tokens=6, **media))
            params["rid"] = answers[-1].meta["id"]
        conversations.append(answers)
    for ours, dense in zip(*conversations, strict=True):
        assert_same(ours, dense)
    lengths = [answer.prompt_tokens for answer in conversations[0]]
    assert lengths == sorted(set(lengths))


@pytest.mark.fault("client gone or all aborted mid-prefill", "slots come back, the next answers are right")
def test_aborts_inside_a_video(pair: Pair, long_video: Message):
    """By word after the first chunk, and by a client that goes; slots come back, and answers stay right."""
    ours, dense = pair
    expected = answer_of(dense, long_video)
    assert expected is not None
    # Each request would take most of the pool, so nothing of those before may be left there.
    stopped = [prefilled_until_abort(ours, long_video) for _ in range(3)]
    assert min(stopped) < expected.prompt_tokens
    for seconds in (0.1, 0.3):
        ours.flush_cache()
        mark = len(ours.log())
        leave_after(seconds, ours, long_video)
        ours.flush_cache()
        assert ours.log(mark).count("Decode batch") < LONG_ANSWER // 40, "it is logged every 40 steps"
    assert_same(answer_of(ours, long_video), expected)


def prefilled_until_abort(server: Server, message: Message) -> int:
    """Tokens that were prefilled of a request that is aborted as soon as the log tells of its first chunk."""
    server.flush_cache()
    mark = len(server.log())
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(answer_of, server, message, tokens=LONG_ANSWER)
        wait_for(lambda: prefills(server.log(mark)))
        httpx.post(f"{server.url}/abort_request", json={"abort_all": True}, trust_env=False).raise_for_status()
        answer = asked.result()
    assert answer is None or answer.meta["finish_reason"]["type"] == "abort"
    return sum(line.chunk for line in prefills(server.log(mark)))


def leave_after(seconds: float, server: Server, message: Message) -> None:
    """Asks for a stream and goes when nothing has come for so long, or with its first piece."""
    body = {"model": "default", "messages": [message], "max_tokens": LONG_ANSWER, "ignore_eos": True, "stream": True}
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.Client(timeout=seconds, trust_env=False) as client,
        client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as stream,
    ):
        next(stream.iter_raw())


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.fault("retraction under memory pressure", "prefilled again, answers as the dense server")
def test_requests_that_had_to_give_way(pair: Pair, files: Files):
    """Together they do not fit: the scheduler takes slots from some, which are prefilled again with what they said."""
    clip = str(files["h264"][1])
    asked = [user_message(words(seed, 9 + seed), before=words(seed + 9, 5), videos=[clip]) for seed in range(8)]
    answers = []
    for server in pair:
        server.flush_cache()
        mark = len(server.log())
        with ThreadPoolExecutor(len(asked)) as pool:
            # Slots are kept for requests that ignore ends; others are thought to find one soon, and these never do.
            answers.append(list(pool.map(lambda message, server=server: server.chat([message], 250), asked)))
        assert "Retract requests" in server.log(mark)
    for ours, dense in zip(*answers, strict=True):
        assert len(ours.token_ids) == 250
        assert_same(ours, dense)
