"""What goes wrong around a server, on real ones: it answers as the dense server does, says once what it could not do,
and counts it. `make test-faults` runs these, with those faults that other tests cover, and prints a table.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import faulty
import serving
from mminference_sgl.testing import (
    Answer,
    Message,
    Server,
    ServerError,
    fallbacks,
    layouts,
    png_url,
    prefills,
    user_message,
    write_mp4,
)
from serving import ModelPath, difference, rounding_band, squares, words

pytestmark = [pytest.mark.server, pytest.mark.long]
CHUNK = 509
CONTEXT = 8192
"""Of `serving.start`."""
TOLERANCE = 5 * rounding_band()
CONFIG = {"error": 0.0, "min_tokens": 16}
Pair = tuple[Server, Server]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def pattern(folder: Path) -> Path:
    file = folder / "pattern.json"
    file.write_text(json.dumps({"schema": 1, "id": "mine", "heads": [{"map": {"media": "grid"}}]}))
    return file


@pytest.fixture(scope="module")
def pair(model_path: ModelPath, folder: Path, pattern: Path) -> Iterator[Pair]:
    """Ours, which meets the faults that are called for, and the dense one."""
    path, config = model_path("qwen2_5_vl"), {**CONFIG, "pattern": str(pattern)}
    env = {faulty.ENV_FILE: str(folder / "fault")}
    args = ["--enable-metrics"]
    ours = serving.start(path, CHUNK, "mminference", args, config, prepare=(faulty.install,), **env)
    with ours, serving.start(path, CHUNK, None) as dense:
        yield ours, dense
        assert "Traceback" not in ours.log()


@pytest.fixture
def video(folder: Path) -> Message:
    """About 700 tokens: two chunks."""
    clip = folder / "clip.mp4"
    if not clip.exists():
        write_mp4(clip, squares(5, 12, 8, 16))
    return user_message(words(6, 20), videos=[str(clip)])


@pytest.fixture
def fault(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Calls for the fault that the test is parametrized with."""
    file = folder / "fault"
    file.write_text(request.param)
    yield request.param
    file.unlink()


def compare(pair: Pair, message: Message) -> tuple[Answer, str]:
    """Our answer, which is the dense server's, and what our log said meanwhile."""
    for server in pair:
        server.flush_cache()
    mark = len(pair[0].log())
    ours, dense = (serving.ask(server, message) for server in pair)
    assert ours.prompt_tokens == dense.prompt_tokens
    assert ours.token_ids == dense.token_ids
    assert difference(ours, dense) <= TOLERANCE
    return ours, pair[0].log(mark)


def dense_tokens(server: Server, reason: str) -> float:
    page = httpx.get(f"{server.url}/metrics", trust_env=False).text
    lines = [line for line in page.splitlines() if line.startswith("mminference:prefill_tokens_total")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'reason="{reason}"' in line)


@pytest.mark.fault("out of memory while lists are built", "dense for this batch, counted, logged once")
@pytest.mark.parametrize("fault", [faulty.NO_MEMORY], indirect=True)
def test_out_of_memory(fault: str, pair: Pair, video: Message):
    before, mark = dense_tokens(pair[0], "out of memory"), len(pair[0].log())
    answers = [compare(pair, video)[0] for _ in range(2)]
    fresh = sum(answer.prompt_tokens - answer.cached_tokens for answer in answers)
    counted = dense_tokens(pair[0], "out of memory") - before
    assert fresh - 2 * 32 < counted <= fresh, "all but a last chunk of few rows"
    (told,) = fallbacks(pair[0].log(mark))
    assert (told.reason, told.detail) == ("out of memory", "asked for 1 EiB")
    assert prefills(pair[0].log(mark)) == []


@pytest.mark.fault("geometry that lies", "dense for this request, counted, logged once")
@pytest.mark.parametrize("fault", [faulty.LYING_GEOMETRY], indirect=True)
def test_lying_geometry(fault: str, pair: Pair, video: Message):
    before, mark = dense_tokens(pair[0], "geometry"), len(pair[0].log())
    for _ in range(2):
        compare(pair, video)
    assert dense_tokens(pair[0], "geometry") > before
    (told,) = fallbacks(pair[0].log(mark))
    assert told.reason == "geometry"
    assert "overlap" in told.detail


def test_after_the_faults_it_runs_sparse(pair: Pair, video: Message):
    _, log = compare(pair, video)
    assert prefills(log)
    assert fallbacks(log) == []


@pytest.mark.fault("pattern file replaced while running", "ignored until the next start")
def test_replaced_pattern_file(pair: Pair, video: Message, pattern: Path):
    first, before = compare(pair, video)
    pattern.write_text('{"schema": 1, "id": "mine", "heads": [{"map": {"media": "dense"}}]}')
    replaced, log = compare(pair, video)
    pattern.unlink()
    gone, after = compare(pair, video)
    assert first.token_ids == replaced.token_ids == gone.token_ids
    lines = [[(p.prefix, p.chunk, p.density) for p in prefills(text)] for text in (before, log, after)]
    assert lines[0] == lines[1] == lines[2] != []


@pytest.mark.fault("40 images of few tokens", "answered as by the dense server, sparse")
def test_forty_small_images(pair: Pair):
    pictures = [png_url(np.full((28, 28, 3), 6 * n, np.uint8)) for n in range(40)]
    _, log = compare(pair, user_message(words(3, 40), images=pictures))
    assert prefills(log)
    (items,) = layouts(log)
    assert len(items) == 40
    assert len(set(items)) == 1
    assert fallbacks(log) == []


@pytest.mark.fault("video of one frame", "as the dense server: refused by SGLang, or answered")
def test_one_frame(pair: Pair, folder: Path):
    clip = write_mp4(folder / "one.mp4", squares(7, 1, 8, 16))
    said: list[object] = []
    for server in pair:
        try:
            said.append(serving.ask(server, user_message(words(9, 30), videos=[str(clip)])).token_ids)
        except ServerError as error:
            # The server's own words, which name no port.
            said.append(str(error).partition("\n")[0])
    assert said[0] == said[1]
    assert isinstance(said[0], tuple) or " answered 4" in str(said[0])


@pytest.mark.fault("no text", "answered as by the dense server")
def test_no_text(pair: Pair, folder: Path, video: Message):
    picture = png_url(squares(2, 1, 9, 31)[0])
    for message in (user_message("", images=[picture]), {**video, "content": video["content"][:1]}):
        _, log = compare(pair, message)
        assert prefills(log)
        assert fallbacks(log) == []


@pytest.mark.fault("longest admissible prompt", "answered; one token more is refused by both")
def test_longest_prompt(pair: Pair, video: Message):
    prompt = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    clip = [part["video_url"]["url"] for part in video["content"] if part["type"] == "video_url"]
    short = pair[1].generate(prompt.format(""), video_data=clip, max_tokens=1).prompt_tokens
    for server in pair:
        server.flush_cache()
    with pytest.raises(ServerError, match=r">= \d+") as refused:
        pair[1].generate(prompt.format(" a" * (CONTEXT - 1 - short)), video_data=clip, max_tokens=1)
    (limit,) = re.findall(r">= (\d+)", str(refused.value).partition("\n")[0])
    longest = int(limit) - 1
    filler = longest - short
    mark = len(pair[0].log())
    said = [server.generate(prompt.format(" a" * filler), video_data=clip, max_tokens=1) for server in pair]
    assert said[0].prompt_tokens == said[1].prompt_tokens == longest > CONTEXT - CHUNK
    assert said[0].token_ids == said[1].token_ids
    lines = prefills(pair[0].log(mark))
    assert max(line.prefix + line.chunk for line in lines) > longest - CHUNK
    assert fallbacks(pair[0].log(mark)) == []
    for server in pair:
        with pytest.raises(ServerError, match=r" answered 400"):
            server.generate(prompt.format(" a" * (filler + 1)), video_data=clip, max_tokens=1)


@pytest.mark.fault("kill -9 of the scheduler", "SGLang's own behaviour: the server ends, with the same exit code")
def test_killed_scheduler(model_path: ModelPath):
    codes = []
    for backend in ("mminference", None):
        with serving.start(model_path("qwen2_5_vl"), CHUNK, backend) as server:
            process = server._process
            assert process is not None
            os.kill(server.scheduler().pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            codes.append(process.poll())
    assert codes[0] == codes[1] is not None


def oversized(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


BAD_FILES = {
    "corrupt": (lambda path: path.write_bytes(b'\x00\xff{"id":'), "can't decode"),
    "truncated": (lambda path: path.write_text('{"schema": 1, "id": "mine", "map": {"media"'), "Expecting ':'"),
    "foreign": (
        lambda path: path.write_text(
            json.dumps({"schema": 1, "id": "mine", "heads": [{"map": {"media": "grid"}}], "model": {"layers": 977}})
        ),
        "is for another model: layers is 977 in the file and 2 in the model",
    ),
    "oversized": (oversized, "is larger than 16 MiB"),
}


@pytest.mark.fault("pattern file that cannot be used", "refused at start, one line")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_pattern_file(name: str, model_path: ModelPath, tmp_path: Path):
    make, complaint = BAD_FILES[name]
    make(tmp_path / "bad.json")
    config = {**CONFIG, "pattern": str(tmp_path / "bad.json")}
    server = serving.start(model_path("qwen2_5_vl"), CHUNK, "mminference", config=config)
    with pytest.raises(ServerError, match="stopped with exit code") as caught, server:
        pytest.fail("the server started")
    (line,) = [line for line in caught.value.log.splitlines() if "mminference: " in line]
    assert complaint in line
