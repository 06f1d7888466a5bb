"""Real server processes over HTTP: at error 0 mminference answers as the dense server does, and harms no other.

One family, Qwen2.5-VL, in every way of serving; test_families.py has the others.

The tolerance for log-probabilities comes from the dense server: its answers at one chunk size differ from those at
another by rounding alone. Ours may differ from it by twice that spread and a band of eight float32 roundings of a
logit.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

import serving
from mminference_sgl.testing import ServerError, fallbacks, start_lines
from serving import ALONE, SCENARIOS, Messages, ModelPath, RunOf, difference, rounding_band

pytestmark = pytest.mark.server

CUTS_FRAMES, ONE_CHUNK = 509, -1
MODEL = "qwen2_5_vl"
BACKENDS = ("mminference", None)
chunks = pytest.mark.parametrize("chunk", [CUTS_FRAMES, ONE_CHUNK], ids=["chunks of 509", "one chunk"])
scenarios = pytest.mark.parametrize("scenario", SCENARIOS)


def tolerance(run_of: RunOf) -> float:
    """Twice the dense server's own spread between chunk sizes, and a rounding band."""
    cut, whole = (run_of(MODEL, chunk, None).answers for chunk in (CUTS_FRAMES, ONE_CHUNK))
    return 2 * max(difference(cut[name], whole[name]) for name in SCENARIOS) + rounding_band()


def test_tiny_models_tell_tokens_apart(run_of: RunOf):
    """Otherwise equal tokens would be luck, and different ones no fault."""
    answers = run_of(MODEL, CUTS_FRAMES, None).answers.values()
    assert tolerance(run_of) < 1e-3
    assert min(serving.lead(answer) for answer in answers) > 20 * tolerance(run_of)


@chunks
@scenarios
def test_answers_equal_the_dense_servers(chunk: int, scenario: str, run_of: RunOf):
    ours, dense = (run_of(MODEL, chunk, backend).answers[scenario] for backend in BACKENDS)
    assert ours.prompt_tokens == dense.prompt_tokens
    assert ours.token_ids == dense.token_ids
    assert difference(ours, dense) <= tolerance(run_of)


def test_fp8_pools_run_sparse_and_answer_as_the_dense_server(run_of: RunOf):
    """Tokens only: a rounding may put a key on its neighbour in fp8, which is far beyond what rounding does else."""
    ours, dense = (run_of(MODEL, CUTS_FRAMES, backend, ("--kv-cache-dtype", "fp8_e4m3")) for backend in BACKENDS)
    for scenario in SCENARIOS:
        assert ours.answers[scenario].token_ids == dense.answers[scenario].token_ids
    assert all(line.layers == 2 for line in ours.prefills["video"])
    assert sum(line.chunk for line in ours.prefills["video"]) > 1000
    assert fallbacks(ours.log) == []


@chunks
def test_radix_cache_is_hit(chunk: int, run_of: RunOf):
    answers = run_of(MODEL, chunk, "mminference").answers
    assert answers["video"].cached_tokens < 16
    assert answers["video, radix hit"].cached_tokens > 1000


@chunks
def test_requests_with_video_went_sparse(chunk: int, run_of: RunOf):
    run = run_of(MODEL, chunk, "mminference")
    for scenario in ("video", "images and video", "mixed: video"):
        lines = run.prefills[scenario]
        assert sum(line.chunk for line in lines) > 0.9 * run.answers[scenario].prompt_tokens
        assert all(line.coverage >= 0.999 for line in lines)
        assert all(line.layers == 2 for line in lines)
    hit = run.prefills["video, radix hit"]
    assert hit
    assert all(line.prefix >= run.answers["video, radix hit"].cached_tokens for line in hit)
    assert not run.prefills["text"]


@chunks
def test_nothing_fell_back(chunk: int, run_of: RunOf):
    log = run_of(MODEL, chunk, "mminference").log
    assert fallbacks(log) == []
    assert "Traceback" not in log
    assert len(start_lines(log)) == 1


def test_dense_server_is_dense(run_of: RunOf):
    run = run_of(MODEL, CUTS_FRAMES, None)
    assert not any(run.prefills.values())
    assert start_lines(run.log) == []


def test_plugin_changes_nothing_for_another_backend(run_of: RunOf):
    """`SGLANG_PLUGINS` keeps the plugins of this package out; the CPU platform is no plugin and stays."""
    with_plugin = run_of(MODEL, CUTS_FRAMES, None)
    without = run_of(MODEL, CUTS_FRAMES, None, plugins="none-of-these")
    for scenario in ALONE:  # concurrent requests are batched as they arrive, which changes the rounding
        here, there = with_plugin.answers[scenario], without.answers[scenario]
        assert (here.text, here.token_ids, here.logprobs, here.top) == (
            there.text,
            there.token_ids,
            there.logprobs,
            there.top,
        )


def test_prefill_and_decode_backends_named_apart(run_of: RunOf):
    flags = ("--prefill-attention-backend", "mminference", "--decode-attention-backend", "torch_native")
    run, dense = run_of(MODEL, CUTS_FRAMES, None, flags), run_of(MODEL, CUTS_FRAMES, None)
    assert sum(line.chunk for line in run.prefills["video"]) > 0.9 * run.answers["video"].prompt_tokens
    for scenario in SCENARIOS:
        assert run.answers[scenario].token_ids == dense.answers[scenario].token_ids
        assert difference(run.answers[scenario], dense.answers[scenario]) <= tolerance(run_of)


def test_mixed_chunks_and_overlapping_schedule(run_of: RunOf, model_path: ModelPath, messages: Messages):
    """Prefill chunks that carry decode rows. SGLang mixes only requests without log-probabilities."""
    dense = run_of(MODEL, CUTS_FRAMES, None).answers
    args = model_path(MODEL), CUTS_FRAMES, "mminference", ["--enable-mixed-chunk"]
    with serving.start(*args, overlap_schedule=True) as server:
        rounds = []
        for _ in range(3):
            rounds.append(serving.ask_together(server, messages, logprobs=False))
            server.flush_cache()
        log = server.log()
    for answers in rounds:
        assert {name: answer.text for name, answer in answers.items()} == {name: dense[name].text for name in answers}
    assert "'disable_overlap_schedule': False" in log
    assert "'enable_mixed_chunk': True" in log
    assert fallbacks(log) == []
    assert "Traceback" not in log


def test_sizes_that_nobody_gave_are_the_resolved_ones(model_path: ModelPath, messages: Messages, run_of: RunOf):
    """The record of the command line has neither; SGLang decides on both later."""
    with serving.start(model_path(MODEL), None, "mminference") as server:
        answer = serving.ask(server, messages["video"])
        log = server.log()
    (line,) = start_lines(log)
    resolved = re.search(r"chunked_prefill_size=(\d+)", log.partition("max_total_num_tokens=")[2])
    assert resolved is not None
    assert int(resolved[1]) > 0
    assert f"chunk_tokens={resolved[1]} sparse_layers=" in line
    assert answer.token_ids == run_of(MODEL, ONE_CHUNK, None).answers["video"].token_ids


@pytest.mark.parametrize(
    ("config", "complaint", "warm"),
    [
        ({"coverige": 0.9}, "unknown key 'coverige'", False),
        ({"error": -1}, "error must be", True),
        ({"implementation": "fa4"}, "implementation 'fa4' is not available", True),
    ],
    ids=["unknown key", "bad value", "implementation that cannot run here"],
)
def test_bad_configuration_stops_the_server(config: dict[str, Any], complaint: str, warm: bool, model_path: ModelPath):
    """The first one on the command line, as users start it."""
    server = serving.start(model_path(MODEL), ONE_CHUNK, "mminference", config=config, warm=warm)
    with pytest.raises(ServerError, match="stopped with exit code") as caught, server:
        pytest.fail("the server started")
    assert caught.value.returncode != 0
    ours = [line for line in caught.value.log.splitlines() if "mminference: " in line]
    assert len(ours) == 1
    assert complaint in ours[0]
    # What SGLang's launcher says when a scheduler has gone comes after it.
    assert "Traceback" not in caught.value.log.partition(ours[0])[0]
