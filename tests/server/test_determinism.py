"""The same question on real servers, alone and beside others, cached or not; docs/serving.md says what is promised.

Three servers, one after the other: the dense one, whose own differences are the measure; ours sparse, with one chunk,
so that company changes batches and no chunk bounds; and ours at error 0 with chunks, whose bounds company does change.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

import company
import serving
from mminference_sgl.testing import Answer, Prefill, Server, prefills
from serving import Messages, ModelPath, difference, rounding_band

pytestmark = pytest.mark.server

QUESTION, FOLLOW_UP = "video", "video, radix hit"
COMPANY = {
    "behind text": ("mixed: text", QUESTION),
    "before text": (QUESTION, "mixed: text"),
    "between videos": ("mixed: video", QUESTION, "images and video"),
    "last of four": ("images and video", "mixed: text", "mixed: two images", QUESTION),
}
"""What is asked at once, with nothing cached."""
TWICE = "twice at once"
AGAIN, CACHED = "again", "cached"
ROUNDS = (AGAIN, CACHED, TWICE, *COMPANY)
SPARSE = {"error": 0.3, "min_tokens": 256}


@dataclass
class Asked:
    """By round, the answer to the question and the prefills that were its own; and those to the follow-up."""

    answers: dict[str, Answer] = field(default_factory=dict)
    prefills: dict[str, list[Prefill]] = field(default_factory=dict)
    follow_ups: dict[str, list[Answer]] = field(default_factory=dict)
    kit: list[int] = field(default_factory=list)
    """Of our sparse server; a text prompt is dense, so the others would say the same."""


AskedOf = Callable[[str], Asked]
ALONE = "alone"


@pytest.fixture(scope="module")
def asked_of(model_path: ModelPath, messages: Messages) -> AskedOf:
    """What a server said: `dense`, `sparse` or `exact`; each is started once."""
    servers = {"dense": (-1, None, None), "sparse": (-1, "mminference", SPARSE), "exact": (509, "mminference", None)}

    @functools.cache
    def asked_of(name: str) -> Asked:
        chunk, backend, config = servers[name]
        args = model_path("qwen2_5_vl"), chunk, backend
        with serving.start(*args, config=config, prepare=(company.install,)) as server:
            asked = ask_in_rounds(server, messages)
            asked.kit = kit(server) if name == "sparse" else []
            return asked

    return asked_of


def ask_in_rounds(server: Server, messages: Messages) -> Asked:
    asked = Asked()

    def note(name: str, names: tuple[str, ...], *, flush: bool = True) -> None:
        if flush:
            server.flush_cache()
        mark = len(server.log())
        at_once = company.ask_at_once(server, [messages[one] for one in names])
        asked.answers[name] = answer = at_once[names.index(QUESTION)]
        # No other request that is asked beside it has as many tokens.
        lines = prefills(server.log(mark))
        asked.prefills[name] = [line for line in lines if line.prefix + line.chunk == answer.prompt_tokens]

    note(ALONE, (QUESTION,))
    note(AGAIN, (QUESTION,))
    note(CACHED, (QUESTION,), flush=False)
    asked.follow_ups[CACHED] = [serving.ask(server, messages[FOLLOW_UP])]
    for name, names in COMPANY.items():
        note(name, names)
    note(TWICE, (QUESTION, QUESTION))
    for _ in range(2):
        server.flush_cache()
        serving.ask(server, messages[QUESTION])
        asked.follow_ups.setdefault(AGAIN, []).append(serving.ask(server, messages[FOLLOW_UP]))
    return asked


def kit(server: Server) -> list[int]:
    """Different texts that SGLang's own test gets for each of its prompts, in batches of one, two and three.

    Of its other modes `radix_cache` compares bits of prefills of 2 and of 102 rows, and `p_vs_d` those of prefill and
    decode: the dense backend itself has others.
    """
    from sglang.test import test_deterministic

    # It draws the prompts of a batch.
    random.seed(0)
    found: list[int] = []
    for mode in ("single", "prefix"):
        args = test_deterministic.BenchArgs(
            host="127.0.0.1", port=server.port, test_mode=mode, n_trials=3, max_new_tokens=serving.NEW_TOKENS
        )
        with contextlib.redirect_stdout(io.StringIO()):
            found += test_deterministic.test_deterministic(args)
    return found


def tolerance(asked_of: AskedOf) -> float:
    """Twice what the dense server's own answers differ by under the same changes, and a rounding band."""
    dense = asked_of("dense").answers
    return 2 * max(difference(dense[name], dense[ALONE]) for name in ROUNDS) + rounding_band()


def test_the_tolerance_is_rounding(asked_of: AskedOf):
    """Otherwise equal tokens would be luck, and the tolerance would hide a tile."""
    assert tolerance(asked_of) < 1e-3
    assert serving.lead(asked_of("dense").answers[ALONE]) > 20 * tolerance(asked_of)


@pytest.mark.parametrize("server", ["dense", "sparse", "exact"])
@pytest.mark.parametrize("name", ROUNDS)
def test_same_tokens_in_every_round(name: str, server: str, asked_of: AskedOf):
    asked = asked_of(server)
    assert asked.answers[name].token_ids == asked.answers[ALONE].token_ids
    assert difference(asked.answers[name], asked.answers[ALONE]) <= tolerance(asked_of)


@pytest.mark.parametrize("server", ["dense", "sparse", "exact"])
def test_same_bits_where_nothing_differs(server: str, asked_of: AskedOf):
    asked = asked_of(server)
    for one, other in (asked.answers[ALONE], asked.answers[AGAIN]), asked.follow_ups[AGAIN]:
        assert (one.token_ids, one.logprobs, one.top) == (other.token_ids, other.logprobs, other.top)
    assert asked.prefills[ALONE] == asked.prefills[AGAIN]


@pytest.mark.parametrize("name", COMPANY)
def test_company_changes_no_selection(name: str, asked_of: AskedOf):
    """Density and coverage to four digits; a prompt's first tokens may be in the cache by others of the batch."""
    asked = asked_of("sparse")
    (alone,), (line,) = asked.prefills[ALONE], asked.prefills[name]
    assert alone.density < 0.7
    assert line.chunk >= alone.chunk - 8
    assert (line.density, line.coverage, line.layers) == (alone.density, alone.coverage, alone.layers)


def test_chunk_bounds_changed(asked_of: AskedOf):
    """Company moves the bounds of chunks, or the test of error 0 in chunks would say nothing."""
    asked = asked_of("exact")
    bounds = {name: [line.prefix for line in asked.prefills[name]] for name in COMPANY}
    assert any(starts != [line.prefix for line in asked.prefills[ALONE]] for starts in bounds.values())


@pytest.mark.parametrize("server", ["dense", "sparse", "exact"])
def test_cached_keys_are_those_of_the_first_prefill(server: str, asked_of: AskedOf):
    """So a follow-up goes on from them, whenever it is asked."""
    follow_ups = asked_of(server).follow_ups
    assert all(answer.cached_tokens > 1000 for answers in follow_ups.values() for answer in answers)
    for answer in follow_ups[AGAIN]:
        assert answer.token_ids == follow_ups[CACHED][0].token_ids
        assert difference(answer, follow_ups[CACHED][0]) <= tolerance(asked_of)


def test_sglangs_kit(asked_of: AskedOf):
    """No text of any prompt but one, and most of the prompts drawn."""
    kit = asked_of("sparse").kit
    assert max(kit) == 1
    assert kit.count(1) >= 4
