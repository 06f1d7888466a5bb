"""Real servers of the other families: where their tokens lie, and that mminference at error 0 answers as dense.

Each request is asked twice, of an empty radix cache and behind its first words in the cache, which moves every chunk's
bounds: chunks of 509 tokens cut frames in two ways. The tolerance for log-probabilities is twice what that changes on
the dense server, by rounding alone, and a band of eight roundings of a logit.

Models with layers that are never sparse are served on a dense backend that refuses what it was not prepared for, and
are also asked everything at once, so that batches of every mix come to it; so are those with experts or linear
attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

import serving
import strict_dense
from mminference_sgl.testing import (
    Answer,
    Message,
    Server,
    fallbacks,
    png_url,
    prefills,
    start_lines,
    user_message,
    write_mp4,
)
from serving import NEW_TOKENS, ModelPath, Run, difference, rounding_band, squares, words
from tiny_models import kimi
from tiny_models.parts import START, VOCABULARY

pytestmark = pytest.mark.server

CHUNK = 509
EMPTY, CACHED = ROUNDS = ("empty cache", "first words cached")
AT_ONCE, TEXT_ALONE = "at once", "text alone"
SIZES = ((13, 19), (9, 31))
"""Of the two images, in squares of 28 pixels; the video has 24 frames of 8 x 16."""


@dataclass(frozen=True)
class Family:
    """``layouts``: by scenario, the items as they must be laid out.

    ``mixed``: some layers are dense; ``dense``: what the log says where all are. ``in_transformers``: parts of its
    language model that the CPU platform, or SGLang on it, computes in another form are compared with transformers.
    """

    layouts: dict[str, tuple[str, ...]]
    args: tuple[str, ...] = ()
    dtype: str = "float32"
    new_tokens: int = NEW_TOKENS
    prepare: tuple[Callable[[], None], ...] = ()
    mixed: bool = False
    dense: str = ""
    in_transformers: bool = False
    sparse_layers: int = 2

    @property
    def scenarios(self) -> tuple[str, ...]:
        return tuple(self.layouts)

    @property
    def at_once(self) -> bool:
        """Whether what is computed here of a batch may depend on what else is in it."""
        return self.mixed or self.in_transformers


def with_grids(first: str, second: str, video: str, **more: Any) -> Family:
    one, two, clip = f"image:{first}", f"image:{second}", f"video:{video}"
    layouts = {"image": (one,), "two images": (one, two), "video": (clip,), "images and video": (one, two, clip)}
    return Family(layouts, **more)


THREE_BY_TWO, SIX_BY_TWO = (("image:1x8x8",) * (tiles + 1) for tiles in (3 * 2, 6 * 2))
"""InternVL's tiles of the two images, each with a thumbnail."""


def in_tiles() -> Family:
    """InternVL always takes 32 frames of a video."""
    video = "video:32x8x8"
    both = THREE_BY_TWO + SIX_BY_TWO
    return Family({"image": THREE_BY_TWO, "two images": both, "video": (video,), "images and video": (*both, video)})


FAMILIES = {
    "qwen2_vl": with_grids("1x13x19", "1x9x31", "12x8x16"),
    "qwen3_vl": with_grids("1x11x17", "1x8x27", "12x7x14"),
    "qwen3_vl_moe": with_grids("1x11x17", "1x8x27", "12x7x14", in_transformers=True),
    # Three of its four layers are linear attention.
    "qwen3_5": with_grids("1x11x17", "1x8x27", "12x7x14", in_transformers=True, sparse_layers=1),
    "qwen3_5_moe": Family({"video": ("video:12x7x14",)}, in_transformers=True, sparse_layers=1),
    "glm4v": with_grids("1x13x19", "1x9x31", "12x8x16"),
    "glm4v_moe": with_grids("1x13x19", "1x9x31", "12x8x16", in_transformers=True),
    "internvl": in_tiles(),
    "internvl_moe": in_tiles(),
    # Its images are cut into tiles when there is one, and are whole when there are several.
    "llava_onevision": Family(
        {"image": ("image:opaque",), "two images": ("image:1x13x13",) * 2, "video": ("video:24x7x7",)},
        new_tokens=2,
    ),
}
IMAGES = {"image": ("image:opaque",), "two images": ("image:opaque",) * 2, "five images": ("image:opaque",) * 5}
FAMILIES |= {
    "gemma3": Family(IMAGES, args=("--enable-multimodal",), prepare=(strict_dense.install,), mixed=True),
    "kimi_vl": Family(
        IMAGES,
        prepare=(strict_dense.install, kimi.register),
        mixed=True,
        dense="prefill is dense: MLA models have no layer with keys and values per head",
    ),
}
CASES = [(name, scenario) for name, family in FAMILIES.items() for scenario in family.scenarios]

SPARSE_CASES = [(name, scenario) for name, scenario in CASES if not FAMILIES[name].dense]

families = pytest.mark.parametrize("name", FAMILIES)
families_in_transformers, mixed_families, families_at_once = (
    pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if getattr(family, kind)])
    for kind in ("in_transformers", "mixed", "at_once")
)
cases, sparse_cases = (
    pytest.mark.parametrize(("name", "scenario"), some, ids=["-".join(case) for case in some])
    for some in (CASES, SPARSE_CASES)
)

FamilyRun = Callable[[str, str | None], dict[str, Run]]


def requests(name: str, folder: Path) -> dict[str, Message]:
    """By scenario; every request begins with other words."""
    images = [png_url(squares(seed, 1, *size)[0]) for seed, size in enumerate(SIZES, 1)]
    frames = squares(24, 24, 8, 16)
    if name == "llava_onevision":
        parts = {"image": ("image", images[:1]), "two images": ("multi-images", images)}
        parts["video"] = ("video", [png_url(frame) for frame in frames])
        return {scenario: in_parts(scenario, *part) for scenario, part in parts.items()}
    if name in {"gemma3", "kimi_vl"}:
        counts = dict(zip(IMAGES, (1, 2, 5), strict=True))
        several = (images * 3)[: max(counts.values())]
        return {
            scenario: user_message(words(9, 20), before=first_words(scenario), images=several[:count])
            for scenario, count in counts.items()
        }
    clip = [str(write_mp4(folder / "clip.mp4", frames))]
    media: dict[str, dict[str, list[str]]] = {"image": {"images": images[:1]}, "two images": {"images": images}}
    media |= {"video": {"videos": clip}, "images and video": {"images": images, "videos": clip}}
    return {
        scenario: user_message(words(9, 20), before=first_words(scenario), **media[scenario])
        for scenario in FAMILIES[name].scenarios
    }


def in_parts(scenario: str, kind: str, images: list[str]) -> Message:
    """LLaVA's videos are images that say they are frames."""
    parts = [{"type": "image_url", "image_url": {"url": url}, "modalities": kind} for url in images]
    before, after = ({"type": "text", "text": text} for text in (first_words(scenario), words(9, 20)))
    return {"role": "user", "content": [before, *parts, after]}


def random_ids() -> list[int]:
    """Of text, so many that they come in three chunks."""
    return np.random.default_rng(0).integers(100, VOCABULARY, 1200).tolist()


def first_words(scenario: str) -> str:
    return words(sum(map(ord, scenario)), 100)


def words_alone(scenario: str) -> str:
    """A prompt that ends where the request's media begin."""
    return f"{START}user\n{first_words(scenario)}"


@pytest.fixture(scope="module")
def run_of(model_path: ModelPath, tmp_path_factory: pytest.TempPathFactory) -> FamilyRun:
    """Both rounds on a server of its own, once per family and backend."""

    @functools.cache
    def asked_of(name: str) -> dict[str, Message]:
        """The same files for both backends: encoding a clip anew does not always give the same bytes."""
        return requests(name, tmp_path_factory.mktemp("clip"))

    @functools.cache
    def run_of(name: str, backend: str | None) -> dict[str, Run]:
        asked = asked_of(name)
        family, rounds = FAMILIES[name], {EMPTY: Run(), CACHED: Run()}
        with serving.start(model_path(name), CHUNK, backend, family.args, prepare=family.prepare) as server:
            for scenario, message in asked.items():
                for when, run in rounds.items():
                    server.flush_cache()
                    if when == CACHED:
                        serving.ask(server, user_message(first_words(scenario)))
                        # States of linear attention are kept where a prompt ends, which must be behind the words.
                        server.generate(words_alone(scenario), max_tokens=1)
                    serving.ask_in_turn(server, {scenario: message}, run, family.new_tokens)
            if family.in_transformers:
                rounds[TEXT_ALONE] = Run(
                    {"text": server.generate(input_ids=random_ids(), max_tokens=family.new_tokens)}
                )
            if family.at_once:
                rounds[AT_ONCE] = at_once(server, {"text": user_message(words(7, 300)), **asked}, family.new_tokens)
        return rounds

    return run_of


def at_once(server: Server, asked: dict[str, Message], tokens: int) -> Run:
    """Asked again where they came so far apart that none was in a batch with another: that is up to the machine."""
    mark = len(server.log())
    for _ in range(4):
        server.flush_cache()
        answers = serving.ask_together(server, asked, tuple(asked), tokens=tokens)
        log = server.log()
        lines = prefills(log[mark:])
        if not lines or any(line.request != "0" for line in lines):
            break
    return Run(answers, dict.fromkeys(asked, lines), log=log)


def tolerance(run_of: FamilyRun, name: str) -> float:
    empty, cached = (run_of(name, None)[when].answers for when in ROUNDS)
    spread = max(difference(empty[scenario], cached[scenario]) for scenario in FAMILIES[name].scenarios)
    return 2 * spread + rounding_band(FAMILIES[name].dtype)


@families
def test_tiny_models_tell_tokens_apart(name: str, run_of: FamilyRun):
    """Otherwise equal tokens would be luck, and different ones no fault."""
    leads = [serving.lead(answer) for run in run_of(name, None).values() for answer in run.answers.values()]
    assert min(leads) > tolerance(run_of, name)


@pytest.mark.parametrize("when", ROUNDS)
@cases
def test_answers_equal_the_dense_servers(name: str, scenario: str, when: str, run_of: FamilyRun):
    ours, dense = (run_of(name, backend)[when].answers[scenario] for backend in ("mminference", None))
    assert ours.prompt_tokens == dense.prompt_tokens
    assert (ours.cached_tokens > 100) == (when == CACHED)
    assert ours.token_ids == dense.token_ids
    assert len(ours.token_ids) == FAMILIES[name].new_tokens
    assert difference(ours, dense) <= tolerance(run_of, name)


@families_in_transformers
def test_language_model_is_that_of_transformers(name: str, model_path: ModelPath, run_of: FamilyRun):
    """In float32 it may differ from float64 by as much as transformers' own does, with a factor for another order."""
    (answer,) = run_of(name, None)[TEXT_ALONE].answers.values()
    ids = torch.tensor([[*random_ids(), *answer.token_ids[:-1]]])
    with torch.inference_mode():
        single, double = (
            AutoModelForImageTextToText.from_pretrained(model_path(name), dtype=dtype, experts_implementation="eager")
            .eval()(input_ids=ids)
            .logits[0, -len(answer.token_ids) :]
            .log_softmax(-1)
            for dtype in (torch.float32, torch.float64)
        )
    rounding = float((single - double).abs().max())
    assert tuple(double.argmax(-1).tolist()) == answer.token_ids
    expected = double.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0].tolist()
    assert answer.logprobs == pytest.approx(expected, rel=0, abs=4 * rounding + rounding_band())
    assert serving.lead(answer) > 4 * rounding + rounding_band()


def test_states_of_linear_attention_are_found_where_a_prompt_ended(model_path: ModelPath, run_of: FamilyRun):
    """Not in between: what else two prompts share is computed again."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path("qwen3_5"))
    for scenario, answer in run_of("qwen3_5", "mminference")[CACHED].answers.items():
        assert answer.cached_tokens == len(tokenizer.encode(words_alone(scenario)))


def test_states_of_linear_attention_are_found_within_prompts(model_path: ModelPath, run_of: FamilyRun):
    """With overlap scheduling, SGLang's default: prefill keeps one in each chunk, decode one for each 256 tokens."""
    *ids, _ = random_ids()
    asked, cached = {}, {}
    with serving.start(model_path("qwen3_5"), CHUNK, "mminference", overlap_schedule=True) as server:

        def ask(name: str, prompt: list[int], tokens: int = NEW_TOKENS) -> Answer:
            asked[name] = prompt
            cached[name] = server.generate(input_ids=prompt, max_tokens=tokens)
            return cached[name]

        ask("first", ids)
        ask("other end", [*ids[:1100], *ids[:100]])
        told = ask("told at length", ids[200:300], 300)
        ask("told on", [*ids[200:300], *told.token_ids, *ids[:50]])
        anew = {}
        for name in ("other end", "told on"):
            server.flush_cache()
            anew[name] = server.generate(input_ids=asked[name], max_tokens=NEW_TOKENS)
    # Behind the multiple of 64 tokens in the second chunk; at a length that is a multiple of 256.
    assert cached["other end"].cached_tokens == CHUNK + CHUNK // 64 * 64
    assert cached["told on"].cached_tokens == 256
    for name, answer in anew.items():
        assert answer.cached_tokens == 0
        assert answer.token_ids == cached[name].token_ids
        assert difference(answer, cached[name]) <= tolerance(run_of, "qwen3_5")


@families_at_once
def test_answers_given_at_once_equal_the_dense_servers(name: str, run_of: FamilyRun):
    ours, dense = (run_of(name, backend)[AT_ONCE].answers for backend in ("mminference", None))
    for scenario, answer in ours.items():
        assert answer.token_ids == dense[scenario].token_ids
        assert difference(answer, dense[scenario]) <= tolerance(run_of, name)


@sparse_cases
def test_tokens_lie_as_the_media_say(name: str, scenario: str, run_of: FamilyRun):
    """Without M-RoPE a prompt's length shows chunk by chunk, so there may be several layouts, all with these items."""
    for when in ROUNDS:
        run = run_of(name, "mminference")[when]
        assert set(run.layouts[scenario]) == {FAMILIES[name].layouts[scenario]}


def test_glm_4_6v_writes_seconds_behind_frames(model_path: ModelPath, run_of: FamilyRun):
    """4.1V writes whole numbers there."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path("glm4v_moe"))
    lengths = [run_of(name, None)[EMPTY].answers["video"].prompt_tokens for name in ("glm4v_moe", "glm4v")]
    assert lengths[0] - lengths[1] == 12 * len(tokenizer.encode(".5 seconds"))


@sparse_cases
def test_requests_went_sparse(name: str, scenario: str, run_of: FamilyRun):
    for when in ROUNDS:
        run = run_of(name, "mminference")[when]
        answer, lines = run.answers[scenario], run.prefills[scenario]
        assert sum(line.chunk for line in lines) > 0.9 * (answer.prompt_tokens - answer.cached_tokens)
        assert all(line.coverage >= 0.999 and line.layers == FAMILIES[name].sparse_layers for line in lines)


@mixed_families
def test_layers_stay_dense(name: str, run_of: FamilyRun):
    run = run_of(name, "mminference")[AT_ONCE]
    lines = run.prefills["text"]
    if FAMILIES[name].dense:
        assert start_lines(run.log) == [FAMILIES[name].dense]
        assert not lines
    else:
        assert "dense_layers={'sliding window': 2}" in start_lines(run.log)[0]
        assert "dense=StrictDenseAttnBackend" in start_lines(run.log)[0]
        assert any(line.request != "0" for line in lines), "several sparse requests in a batch"
        assert len({line.prefix for line in lines}) > 3


@families
def test_nothing_fell_back(name: str, run_of: FamilyRun):
    for run in run_of(name, "mminference").values():
        assert fallbacks(run.log) == []
        assert "Traceback" not in run.log
    assert not any(lines for run in run_of(name, None).values() for lines in run.prefills.values())
