"""Prompts of several clips: what their questions ask, how they are trained on, and how answers are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy import prompts
from benchmarks.accuracy.__main__ import DEPTHS, Result, depths, judge, main, run
from benchmarks.accuracy.codes import CARD_FRAMES, SIDE, Code
from benchmarks.accuracy.paired import difference
from benchmarks.accuracy.prompts import KINDS, form, of_clips, of_codes
from benchmarks.accuracy.settings import ALL_ROWS, SINK, TILE_KEYS, TILE_ROWS, rivals
from benchmarks.clips import model as shape
from benchmarks.clips.prompts import OFFSETS, SIGNS, TASKS, Form, Prompt
from benchmarks.clips.train import IGNORED, STAGES, Forward, Lessons
from benchmarks.million.__main__ import CHUNK, SLACK, Line, layer_bytes
from benchmarks.million.__main__ import judge as judge_million
from benchmarks.real.model import Shape
from benchmarks.toy.scenes import COLOURS, KEYS
from mminference_sgl.testing import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIXED = Form(((6, 3, 4), (1, 2, 5), (5, 4, 2)), (3, 1, 2), (1, 0, 2))


@pytest.fixture(scope="module")
def tokens() -> Any:
    return shape.tokenizer()


def _prompt(seed: int = 0) -> Prompt:
    return MIXED.draw(np.random.default_rng(seed), 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_answers_are_what_is_there(seed: int) -> None:
    prompt = _prompt(seed)
    needles = {needle.key: (part, needle) for part in prompt.parts for needle in part.scene.needles}
    memos = {memo.key: memo.colour for part in prompt.parts for memo in part.memos}
    assert (len(needles), len(memos)) == (6, 3)
    asked = {(question.task, question.key): question for question in prompt.questions()}
    assert len(asked) == len(prompt.questions())
    for (task, key), question in asked.items():
        answer = question.answer.strip().lower()
        if task == "memo":
            assert answer == memos[key]
        elif task == "count":
            assert answer == "three"
        elif task == "sign":
            assert answer == needles[key][0].sign
        else:
            part, needle = needles[key]
            t, y, x = (a - b for a, b in zip((needle.patch, needle.row, needle.column), OFFSETS[task], strict=True))
            assert min(t, y, x) >= 0
            assert answer == COLOURS[part.scene.colours[t, y, x]]
    for key, (_, needle) in needles.items():
        assert ("prev", key) not in asked or needle.patch >= 1
        assert (("left", key) in asked) == (needle.column > 0)


def test_answers_are_one_token_each_and_tasks_write_their_own(tokens: Any) -> None:
    assert all(len(tokens.encode(word)) == 1 for word in shape.words())
    assert len(set(shape.words())) == len(shape.words())
    assert len(tokens) <= shape.VOCABULARY
    for question in _prompt().questions():
        assert len(tokens.encode(question.text)) == 2
        assert len(tokens.encode(question.answer)) == 1
        assert question.is_right(tokens.decode(tokens.encode(question.answer)) + " ")


def test_one_key_for_too_many_needles_is_refused() -> None:
    with pytest.raises(ValueError, match="needles"):
        Form(((6, 3, 4),), (len(KEYS) + 1,), (0,)).draw(np.random.default_rng(0), 0.5)


def test_positions_are_those_of_the_server(tokens: Any) -> None:
    from sglang.srt.layers.rotary_embedding.mrope_rope_index import get_rope_index

    prompt = _prompt()
    batch = Lessons(tokens, 0).batch([prompt], None)
    image, video = (tokens.convert_tokens_to_ids(pad) for pad in shape.PADS)
    ids, part, previous = batch.tokens[0].clone(), -1, False
    for place, visual in enumerate((ids == -1).tolist()):
        part += visual and not previous
        previous = visual
        if visual:
            ids[place] = image if len(prompt.parts[part].scene.colours) == 1 else video
    grids = [torch.tensor([[t, 2 * h, 2 * w]]) for t, h, w in MIXED.shapes]
    found, _ = get_rope_index(
        2, image, video, tokens.convert_tokens_to_ids("<|vision_start|>"), "qwen2_5_vl", shape.TOKENS_PER_SECOND,
        ids[None], grids[1], torch.cat([grids[0], grids[2]]), torch.full((2,), 2 / 24),
    )  # fmt: skip
    assert torch.equal(found[:, 0], batch.positions[:, : len(ids)])
    assert int(batch.positions[0, len(ids)]) == int(found.max()) + 1


def test_visual_tokens_are_told_their_neighbours(tokens: Any) -> None:
    prompt = _prompt(3)
    batch = Lessons(tokens, 0).batch([prompt], None)
    first = int((batch.tokens[0] == -1).nonzero()[0])
    colours = prompt.parts[0].scene.colours
    labels = batch.neighbours[0, :, first : first + colours.size].reshape(-1, *colours.shape)
    assert labels[0, 2, 1, 3] == colours[1, 1, 3]
    assert labels[2, 2, 1, 3] == colours[2, 1, 2]
    signs = (SIGNS.index(part.sign) for part in prompt.parts)
    assert (labels[3] == next(signs)).all()
    assert (labels[1, :4] == IGNORED).all()
    assert (batch.neighbours[0][:, batch.tokens[0] != -1] == IGNORED).all()


@torch.no_grad()
def test_the_forward_is_the_model(tokens: Any) -> None:
    model = shape.build(tokens, 1).eval()
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(len(KEYS) + 1, len(COLOURS), 1, shape.HIDDEN, generator=generator)
    batch = Lessons(tokens, 2).batch([_prompt()], 24, questions=1)
    forward = Forward(model, bank, np.random.default_rng(0))
    ids = torch.cat([batch.tokens, batch.suffixes.flatten(1)], 1)
    embedded = model.model.language_model.embed_tokens(ids.clamp(min=0))
    seen = ids[0] == -1
    where = batch.visual[0][seen[: batch.tokens.shape[1]]]
    embedded[0, seen] = bank[where[:, 0], where[:, 1], 0]
    wanted = model.model.language_model(
        inputs_embeds=embedded, position_ids=batch.positions[:, None], use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(forward(batch), wanted, atol=2e-3, rtol=2e-3)


def test_stages_fit_their_bounds() -> None:
    assert sum(stage.share for stage in STAGES) == pytest.approx(1)
    lessons = Lessons(shape.tokenizer(), 5)
    for stage in STAGES:
        for _ in range(5):
            batch = lessons.draw(stage)
            assert int((batch.tokens[0] == -1).sum()) <= stage.tokens
            assert batch.tasks.max() < len(TASKS)


# --- comparing answers


def test_paired_interval() -> None:
    reference = [True] * 90 + [False] * 10
    same = difference(reference, reference)
    assert (same.share, same.lost, same.won, same.mean) == (0.9, 0, 0, 0)
    # sqrt(1) / 102 on either side
    assert (same.low, same.high) == pytest.approx((-0.019215, 0.019215), abs=1e-5)
    worse = difference([False] * 8 + [True] * 82 + [True] * 2 + [False] * 8, reference)
    assert (worse.lost, worse.won, worse.mean) == (8, 2, -0.06)
    half = 1.959964 * np.sqrt(11 - 36 / 102) / 102
    assert (worse.low, worse.high) == pytest.approx((-6 / 102 - half, -6 / 102 + half))
    with pytest.raises(ValueError, match="paired"):
        difference([True], reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2048, 32768])
def test_prompts_have_the_length_asked_for(kind: str, length: int) -> None:
    frame = prompts.ROWS * prompts.COLUMNS
    visual = sum(t * y * x for t, y, x in form(kind, length).shapes)
    assert length - 2 * frame < visual <= length


@pytest.mark.parametrize("length", [4096, 8300])
def test_the_control_is_as_dense_as_it_is_asked_to_be(length: int) -> None:
    rows, keys = TILE_ROWS, TILE_KEYS
    for density in (0.1, 0.2, 0.6):
        settings = dict(rivals(density, length))
        assert settings["grid"]["max_density"] == density
        control = settings["a_shape"]["patterns"]["a_shape"]
        assert control["sink"] == SINK

        def tiles(window: int) -> float:
            row, key = torch.arange(length)[:, None], torch.arange(length)
            wanted = (key <= row) & ((key < SINK) | (row - key < window))
            padding = (0, -length % keys, 0, -length % rows)
            padded = (torch.nn.functional.pad(each, padding) for each in (wanted, key <= row))
            wanted, causal = (each.unfold(0, rows, rows).unfold(1, keys, keys).any(-1).any(-1) for each in padded)
            return float(wanted.sum() / causal.sum())

        assert tiles(control["window"]) <= density < tiles(control["window"] + 1)


def _result(name: str, clip: list[bool], mixed: list[bool], density: float = 0.2) -> Result:
    return Result(name, 4096, {"clip": clip, "mixed": mixed}, [density], [0.9], [1.0])


def test_verdicts() -> None:
    right, wrong = [True] * 200, [True] * 100 + [False] * 100
    good = [
        _result("dense", right, right, 1.0),
        _result("auto", right, right),
        _result("vertical_slash", right, right),
        _result(ALL_ROWS, right, wrong),
        _result("a_shape", wrong, wrong),
    ]
    assert judge(good) == []
    assert ["auto" in failure for failure in judge([good[0], _result("auto", right, wrong)])] == [True]
    assert judge([good[0], _result("auto", right, right, 1.0)]) == ["auto at 4096 tokens: nothing ran sparse"]
    assert len(judge([good[0], _result("a_shape", right, right)])) == 1
    assert len(judge([good[0], _result("vertical_slash", right, wrong), _result(ALL_ROWS, right, right)])) == 1


def test_depths_follow_the_needles(tmp_path: Path) -> None:
    clip, mixed = of_clips(2048, 1, tmp_path)
    assert (clip.kind, mixed.kind) == KINDS
    assert mixed.depths == [None] * len(mixed.questions)
    # Right where the needle lies in the first half.
    right = [depth is not None and depth < 0.5 for depth in clip.depths]
    found = depths([clip, mixed], Result("auto", 2048, {"clip": right}))
    assert len(found) == sum(question.task in OFFSETS for question in clip.questions)
    assert all(is_right == (depth < 0.5) for depth, is_right in found)
    assert all(0 <= int(depth * DEPTHS) < DEPTHS for depth, _ in found)


# --- prompts in English


class _Reader:
    """Answers as a model would that reads the cards by what the prompt was made of; notes what it was sent."""

    def __init__(self, codes: Sequence[Code]) -> None:
        self.codes, self.messages = {code.text: code for code in codes}, []

    def log(self, since: int = 0) -> str:
        return ""[since:]

    def chat(self, messages: Sequence[Any], max_tokens: int, *, stream: bool) -> Answer:
        assert stream
        self.messages.append(messages[0]["content"])
        code = self.codes[messages[0]["content"][-1]["text"]]
        assert max_tokens > len(code.digits)
        text = f"It is {code.digits}." if code.depth is None or code.depth < 0.5 else "1"
        return Answer(text, 1.0, 0.5, prompt_tokens=9000)


def test_codes_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    from torchcodec.decoders import VideoDecoder

    clip, mixed = of_codes(8192, 1, tmp_path)
    assert len({code.digits for code in mixed.questions}) == len(mixed.questions) == 8
    for asked in (clip, mixed):
        reader = _Reader(asked.questions)
        result = run("any", reader, [asked])[0]
        assert result.right[asked.kind] == [c.depth is None or c.depth < 0.5 for c in asked.questions]
        assert result.ttft == [0.5]
        assert result.density == []
    assert {part["type"] for part in reader.messages[0]} == {"video_url", "image_url", "text"}
    assert sum(asked is not None for asked in mixed.depths) == 0
    frames = VideoDecoder(str(tmp_path / "clip-8192-0.mp4"))[:]
    assert frames.shape == (64, 3, SIDE, SIDE)
    cards = frames.float().mean((1, 2, 3)) > 225
    assert int(cards.sum()) == CARD_FRAMES * len(clip.questions)
    for depth in clip.depths:
        at = round(depth * len(frames))
        assert cards[at : at + CARD_FRAMES].all()


def test_a_reply_has_to_be_the_code() -> None:
    code = Code("red", "4821")
    assert code.is_right(" 4821")
    assert code.is_right("The code is 4821.")
    assert not any(code.is_right(reply) for reply in ("", "482", "48211", "4821 or 1234"))


def test_a_video_too_short_for_its_cards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too few"):
        list(of_codes(2048, 1, tmp_path))


@pytest.mark.parametrize("arguments", [["--english"], ["--url", "somewhere"]])
def test_servers_have_to_be_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--model" in capsys.readouterr().err


def test_verdicts_of_a_very_long_video() -> None:
    model, tokens = Shape(4, 8, 4, 32), 4 * CHUNK
    grown = (model.layers + 1) * layer_bytes(model, tokens)

    def lines(last: int, growth: int) -> list[Line]:
        return [Line(prefix, 1.0, 1.0, 0.1, 0.0, 2**30 + growth * bool(prefix)) for prefix in (0, last)]

    assert judge_million(lines(3 * CHUNK, grown), tokens, model) == []
    assert len(judge_million(lines(2 * CHUNK, grown), tokens, model)) == 1
    assert len(judge_million(lines(3 * CHUNK, grown + SLACK + 1), tokens, model)) == 1
