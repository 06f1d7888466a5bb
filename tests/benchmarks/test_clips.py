"""Prompts of several clips: what their questions ask, how they are trained on, and how answers are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy.__main__ import DEPTHS, KINDS, Asked, Result, depths, form, judge
from benchmarks.accuracy.paired import difference
from benchmarks.accuracy.settings import ALL_ROWS, rivals
from benchmarks.clips import model as shape
from benchmarks.clips.prompts import OFFSETS, TASKS, Form, Prompt
from benchmarks.clips.serving import Media
from benchmarks.clips.train import IGNORED, STAGES, Forward, Lessons
from benchmarks.million.__main__ import CHUNK, SLACK, Line, layer_bytes
from benchmarks.million.__main__ import judge as judge_million
from benchmarks.real.model import Shape
from benchmarks.toy.scenes import COLOURS, KEYS
from benchmarks.toy.serving import COLUMNS, ROWS

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
    assert labels[3, 2, 1, 3] == colours[2, 0, 3]
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
    frame = ROWS * COLUMNS
    visual = sum(t * y * x for t, y, x in form(kind, length).shapes)
    assert length - 2 * frame < visual <= length


def test_the_control_is_as_dense_as_it_is_asked_to_be() -> None:
    length = 4096
    for density in (0.05, 0.2, 0.6):
        config = dict(rivals(density, length))["a_shape"]["patterns"]["a_shape"]
        row, key = torch.arange(length)[:, None], torch.arange(length)
        seen = (key <= row) & ((key < config["sink"]) | (row - key < config["window"]))
        assert float(seen.sum() / (key <= row).sum()) == pytest.approx(density, abs=0.02)
        assert dict(rivals(density, length))["grid"]["max_density"] == density


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


def test_depths_follow_the_needles() -> None:
    prompt = form("clip", 2048).draw(np.random.default_rng(0), 0.5)
    asked = Asked("clip", 2048, Media(prompt, ("video.mp4",)), prompt.questions())
    patches = {needle.key: needle.patch for needle in prompt.parts[0].scene.needles}
    # Right where the needle lies in the first half.
    right = [q.task in OFFSETS and patches[q.key] < 8 for q in asked.questions]
    found = depths([asked], Result("auto", 2048, {"clip": right}))
    assert len(found) == sum(question.task in OFFSETS for question in asked.questions)
    assert all(is_right == (depth < 0.5) for depth, is_right in found)
    assert all(0 <= int(depth * DEPTHS) < DEPTHS for depth, _ in found)


def test_verdicts_of_a_very_long_video() -> None:
    model, tokens = Shape(4, 8, 4, 32), 4 * CHUNK
    grown = (model.layers + 1) * layer_bytes(model, tokens)

    def lines(last: int, growth: int) -> list[Line]:
        return [Line(prefix, 1.0, 1.0, 0.1, 0.0, 2**30 + growth * bool(prefix)) for prefix in (0, last)]

    assert judge_million(lines(3 * CHUNK, grown), tokens, model) == []
    assert len(judge_million(lines(2 * CHUNK, grown), tokens, model)) == 1
    assert len(judge_million(lines(3 * CHUNK, grown + SLACK + 1), tokens, model)) == 1
