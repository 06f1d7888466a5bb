"""SGLang's own attention kit, run against the backend on the CPU: its dense cases, and long ones that go sparse."""

from __future__ import annotations

import json
import logging
import unittest
from types import SimpleNamespace

import pytest
import torch

import problems


@pytest.fixture(scope="module")
def kit():
    """The kit's module, with this package's plugins loaded."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention

    return dense_attention


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch):
    """Backends that the kit makes, in their order."""
    from mminference_sgl.backend.backend import MMInferenceAttnBackend

    made = []
    original = MMInferenceAttnBackend.__init__

    def record(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(MMInferenceAttnBackend, "__init__", record)
    return made


def configure(monkeypatch: pytest.MonkeyPatch, **settings) -> None:
    monkeypatch.setenv("MMINFERENCE_CONFIG", json.dumps({"min_tokens": 256, "error": 0.0, **settings}))


def run_case(kit, case, max_context_len: int = 4096) -> None:
    with torch.no_grad():
        kit.run_dense_attention_case(
            unittest.TestCase(), case, device="cpu", dtype=torch.float32, max_context_len=max_context_len
        )


def long_case(kit, prefixes, extends, *, heads=8, kv_heads=2, page_size=1, **more):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return kit.DenseAttentionCase(
        name="long",
        backend="mminference",
        forward_mode=ForwardMode.EXTEND,
        num_heads=heads,
        num_kv_heads=kv_heads,
        page_size=page_size,
        prefix_lens=prefixes,
        extend_lens=extends,
        **more,
    )


def give_media(kit, monkeypatch: pytest.MonkeyPatch, mm_inputs: list) -> None:
    """Makes the kit's batches carry multimodal inputs, one entry per request."""
    original = kit._make_forward_batch

    def with_media(*args, **kwargs):
        batch = original(*args, **kwargs)
        batch.mm_inputs = mm_inputs
        return batch

    monkeypatch.setattr(kit, "_make_forward_batch", with_media)


def multimodal(*items):
    """What SGLang hands a backend, from (modality name, offsets, grid in patches or None)."""
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

    made = []
    for name, offsets, grid in items:
        item = MultimodalDataItem(modality=Modality[name], offsets=offsets)
        if grid is not None:
            item.model_specific_data = {f"{name.lower()}_grid_thw": torch.tensor([grid])}
        made.append(item)
    return MultimodalInputs(mm_items=made)


def test_dense_cases_of_the_kit(kit) -> None:
    cases = kit.make_dense_cases("mminference")
    assert len(cases) >= 12
    for case in cases:
        for context in (64, 256):
            run_case(kit, case, context)


def test_sliding_window_layers_are_dense(kit, monkeypatch: pytest.MonkeyPatch, backends) -> None:
    configure(monkeypatch, pattern="vertical_slash")
    for case in kit.make_swa_no_prefix_input_config_cases("mminference"):
        run_case(kit, case, 64)
    run_case(kit, long_case(kit, (0,), (300,), sliding_window_size=40))
    assert backends[-1].counters["dense_layers:sliding window"] == 1
    assert backends[-1].counters["sparse_layers"] == 0


LONG = {
    "no-prefix": ((0,), (3000,), {}),
    "prefix": ((2000,), (700,), {}),
    "short-chunk-long-prefix": ((3000,), (300,), {}),
    "batch-of-3": ((300, 1000, 0), (500, 333, 700), {}),
    "batch-of-3-page-16": ((300, 1000, 0), (500, 333, 700), {"page_size": 16}),
    "page-16": ((1024,), (1111,), {"page_size": 16}),
    "mha": ((511,), (513,), {"heads": 4, "kv_heads": 4}),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_long_text_goes_sparse(kit, monkeypatch: pytest.MonkeyPatch, backends, name: str, implementation: str) -> None:
    prefixes, extends, more = LONG[name]
    configure(monkeypatch, pattern="vertical_slash", implementation=implementation)
    run_case(kit, long_case(kit, prefixes, extends, **more))
    assert backends[-1].counters["sparse"] == len(extends)
    assert backends[-1].counters["sparse_layers"] == 1


@pytest.mark.parametrize("pattern", ["grid", "auto"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_media_goes_sparse_beside_text_and_single_rows(
    kit, monkeypatch: pytest.MonkeyPatch, backends, pattern: str, page_size: int
) -> None:
    """One batch: a video cut inside a frame, text, a row of one token as mixed chunks bring it, images and a video."""
    configure(monkeypatch, pattern=pattern)
    video = multimodal(("VIDEO", [(4, 4 + 16 * 60 - 1)], (16, 12, 20)))
    spans = problems.timestamped_video(100, 9, 6, 10)[1]
    several = multimodal(("IMAGE", [(700, 763)], (1, 16, 16)), ("VIDEO", spans, (9, 12, 20)))
    give_media(kit, monkeypatch, [video, None, video, several])
    run_case(kit, long_case(kit, (417, 100, 900, 0), (500, 400, 1, 800), page_size=page_size))
    counters = backends[-1].counters
    assert counters["sparse"] == 2
    assert counters["dense:text only"] == 1
    assert counters["dense:few rows"] == 1


@pytest.mark.parametrize(
    ("broken", "detail"),
    [
        (("VIDEO", [(4, 300), (300, 500)], None), "overlap"),
        (("VIDEO", [(4, 303)], (5, 12, 22)), "300"),
        (("VIDEO", None, (5, 12, 20)), "no token spans"),
    ],
    ids=["overlapping-spans", "wrong-grid", "no-spans"],
)
def test_unplannable_geometry_is_answered_densely(
    kit, monkeypatch: pytest.MonkeyPatch, backends, caplog: pytest.LogCaptureFixture, broken, detail: str
) -> None:
    configure(monkeypatch, pattern="grid")
    good = multimodal(("VIDEO", [(4, 303)], (5, 12, 20)))
    give_media(kit, monkeypatch, [multimodal(broken), good, multimodal(broken)])
    with caplog.at_level(logging.WARNING, "mminference_sgl"):
        run_case(kit, long_case(kit, (0, 0, 50), (600, 400, 500)))
    (backend,) = backends
    assert backend.counters["dense:geometry"] == 2
    assert backend.counters["sparse"] == 1
    lines = [record.message for record in caplog.records if "runs dense" in record.message]
    assert len(lines) == 1, "logged once"
    assert detail in lines[0]


def test_a_video_without_a_grid_is_searched_for_its_stride(kit, monkeypatch: pytest.MonkeyPatch, backends) -> None:
    """The kit's attention is random, so there is none; the next chunk's layout asks, and it is counted."""
    configure(monkeypatch, pattern="auto")
    media = multimodal(("VIDEO", [(4, 1403)], None))
    give_media(kit, monkeypatch, [media])
    run_case(kit, long_case(kit, (0,), (1404,)))
    (backend,) = backends
    layout = backend._layouts.get(media, 1404, torch.device("cpu"))
    assert layout.stride == 0
    assert (backend.counters["stride:none"], backend.counters["stride:found"]) == (1, 0)


@pytest.mark.parametrize("resting", [{0, 1}, {0}, {1}])
def test_a_layer_that_rests_is_dense_for_whom_it_rests(kit, monkeypatch: pytest.MonkeyPatch, backends, resting) -> None:
    """The kit compares the output; for all requests the dense backend computes it, for some the plan's rows do."""
    from mminference_sgl.backend.resting import Resting

    configure(monkeypatch, pattern="grid")
    monkeypatch.setattr(Resting, "requests", lambda *_: frozenset(resting))
    video = multimodal(("VIDEO", [(4, 303)], (5, 12, 20)))
    give_media(kit, monkeypatch, [video, None, video])
    run_case(kit, long_case(kit, (0, 10, 50), (600, 40, 500)))
    counters = backends[-1].counters
    assert counters["sparse"] == 2
    whole = len(resting) == 2
    assert (counters["dense_layers:nothing to save"], counters["sparse_layers"]) == (whole, not whole)


def test_layouts_are_freed_with_their_request(kit, monkeypatch: pytest.MonkeyPatch, backends) -> None:
    configure(monkeypatch, pattern="grid")
    media = [multimodal(("VIDEO", [(4, 303)], (5, 12, 20)))]
    give_media(kit, monkeypatch, media)
    run_case(kit, long_case(kit, (0,), (400,)))
    (backend,) = backends
    assert len(backend._layouts) == 1
    media.clear()
    assert len(backend._layouts) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"covrage": 0.9}, "MMINFERENCE_CONFIG: unknown key 'covrage'"),
        ({"error": -2}, "error must be a number of at least 0.0 and at most 1000.0, got -2"),
        ({"implementation": "fa4"}, "implementation 'fa4' is not available"),
        ({"pattern": "nope"}, "no pattern 'nope'"),
    ],
)
def test_bad_configuration_stops_the_server_with_one_line(
    kit, monkeypatch: pytest.MonkeyPatch, settings, message: str
) -> None:
    configure(monkeypatch, **{"error": 0.0, **settings})
    with pytest.raises(SystemExit, match=r"^mminference: ") as stopped:
        run_case(kit, long_case(kit, (0,), (300,)))
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("variable", [("MMINFERENCE_DISABLE", "1"), ("MMINFERENCE_PATTERN", "off")], ids=lambda v: v[0])
def test_switched_off_is_all_dense(kit, monkeypatch: pytest.MonkeyPatch, backends, variable) -> None:
    configure(monkeypatch)
    monkeypatch.setenv(*variable)
    give_media(kit, monkeypatch, [multimodal(("VIDEO", [(4, 303)], (5, 12, 20)))])
    run_case(kit, long_case(kit, (0,), (400,)))
    assert backends[-1].counters["sparse"] == 0


def test_the_dense_pattern_never_enters_the_sparse_path(kit, monkeypatch: pytest.MonkeyPatch, backends) -> None:
    configure(monkeypatch, pattern="dense")
    give_media(kit, monkeypatch, [multimodal(("VIDEO", [(4, 303)], (5, 12, 20))), None])
    run_case(kit, long_case(kit, (0, 0), (400, 400)))
    counters = backends[-1].counters
    assert (counters["sparse"], counters["dense:pattern"], counters["dense:text only"]) == (0, 1, 1)


def test_server_json_configures_the_backend(kit, monkeypatch: pytest.MonkeyPatch) -> None:
    from mminference_sgl.backend.start import load_config

    config, pattern = load_config(SimpleNamespace(mminference={"error": 0.3, "pattern": "grid"}))
    assert (config.error, pattern.id) == (0.3, "grid")
    monkeypatch.setenv("MMINFERENCE_PATTERN", "a_shape")
    config, pattern = load_config(SimpleNamespace(mminference={"error": 0.3, "pattern": "grid"}))
    assert (config.error, pattern.id) == (0.3, "a_shape"), "the environment is stronger"
