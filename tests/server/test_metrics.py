"""`/metrics` of a real server: after a mixed run it shows every metric, with the values that the requests imply."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

import serving
from mminference_sgl.backend.metrics import PREFIX, exported_names
from mminference_sgl.testing import Server, prefills, user_message
from serving import Messages, ModelPath, words

pytestmark = pytest.mark.server

CHUNK = 509
CONFIG = {"error": 0.3, "error_ceiling": 0.01, "min_tokens": 256}
"""Selection allows far more than the guard does, which therefore has to repair."""
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]
_SAMPLE = re.compile(r"^(\S+?)\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
OWN = {"form", "reason", "layer", "stage", "result", "le", "pattern", "implementation", "active", "error"}


def scrape(server: Server) -> Samples:
    """Samples by name and labels, the process's own aside."""
    found: Samples = {}
    reply = httpx.get(f"{server.url}/metrics", trust_env=False).raise_for_status()
    for name, labels, value in _SAMPLE.findall(reply.text):
        own = tuple(sorted((key, text) for key, text in _LABEL.findall(labels) if key in OWN))
        found.setdefault(name, {})[own] = float(value)
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get(PREFIX + name, {}).get(tuple(sorted(labels.items())), 0.0)


@pytest.fixture(scope="module")
def server(model_path: ModelPath) -> Iterator[Server]:
    with serving.start(model_path("qwen2_5_vl"), CHUNK, "mminference", ["--enable-metrics"], CONFIG) as started:
        yield started


def test_one_request_is_counted_as_its_log_lines_tell(server: Server, messages: Messages):
    """Everything is computed from the answer and the lines of the debug log, which know nothing of metrics."""
    before, mark = scrape(server), len(server.log())
    answer = serving.ask(server, messages["video"])
    after, log = scrape(server), server.log(mark)
    lines = prefills(log)
    assert lines

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    fresh = answer.prompt_tokens - answer.cached_tokens
    sparse = sum(line.chunk for line in lines)
    tokens = {
        (form, reason): grown("prefill_tokens_total", form=form, reason=reason)
        for form, reason in (("sparse", ""), ("dense", "short"), ("dense", "few rows"), ("dense", "text only"))
    }
    assert tokens["sparse", ""] == sparse
    assert sum(tokens.values()) == fresh
    assert grown("prefill_chunks_total", form="sparse", reason="") == len(lines)
    assert grown("layer_forwards_total", form="sparse", reason="") == sum(line.layers for line in lines)
    for name, read in (("density", "density"), ("coverage", "coverage"), ("error", "error")):
        expected = [float(getattr(line, read)) for line in lines]
        assert grown(f"{name}_count") == len(lines)
        assert grown(f"{name}_sum") == pytest.approx(sum(expected), abs=1e-4 * len(lines))
    at_most_half = sum(line.density <= 0.5 for line in lines)
    assert grown("density_bucket", le="0.5") == at_most_half
    guarded = sum(grown("guarded_heads_total", layer=layer) for layer in ("0", "1"))
    assert guarded == sum(map(int, re.findall(r"mminference prefill .*guarded_heads=(\d+)", log))) > 0
    assert value(after, "layouts") >= 1
    stages = {
        stage: grown("stage_seconds_total", stage=stage) for stage in ("plan", "probe", "select", "attend", "guard")
    }
    assert min(stages.values()) > 0
    assert sum(stages.values()) < answer.seconds


def test_after_a_mixed_run_every_metric_is_there(server: Server, messages: Messages):
    serving.ask(server, user_message(words(40, 9)))
    for name in ("text", "image", "images and video"):
        serving.ask(server, messages[name])
    serving.ask_together(server, messages)
    samples = scrape(server)
    assert {name for name in exported_names() if name not in samples} == set()
    (info,) = samples[f"{PREFIX}info"]
    assert dict(info) == {
        "pattern": "auto",
        "implementation": "torch",
        "active": "True",
        "error": "0.3",
    }
    assert value(samples, "prefill_tokens_total", form="dense", reason="text only") > 0
    assert value(samples, "prefill_tokens_total", form="dense", reason="short") > 0
    for name in ("density", "coverage"):
        count = value(samples, f"{name}_count")
        assert 0 < value(samples, f"{name}_sum") <= count
        assert value(samples, f"{name}_bucket", le="+Inf") == count
