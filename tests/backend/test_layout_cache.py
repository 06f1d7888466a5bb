"""The cache of layouts under a scheduler's treatment: chunks, aborts, retractions, re-prefills and growing sessions."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from mminference_sgl.backend.geometry import ModelGeometry
from mminference_sgl.backend.layout import LayoutCache
from mminference_sgl.method.plan import DeviceLayout

CPU = torch.device("cpu")
REQUESTS = 200
AREA = 15
"""Tokens per frame: 3 x 5 after merging."""


class Inputs:
    """Stands for SGLang's ``MultimodalInputs``: media items and a position per prompt token."""

    def __init__(self, prompt: int) -> None:
        self.mm_items: list[SimpleNamespace] = []
        self.mrope_positions = torch.zeros(3, prompt, dtype=torch.long)

    def append_video(self, start: int, frames: int) -> None:
        """A span per frame with two tokens of text in front of each."""
        offsets = [(at + 2, at + 1 + AREA) for at in range(start, start + frames * (AREA + 2), AREA + 2)]
        data = {"video_grid_thw": torch.tensor([[frames, 6, 10]])}
        video = SimpleNamespace(modality=SimpleNamespace(name="VIDEO"), offsets=offsets, model_specific_data=data)
        self.mm_items.append(video)
        self.mrope_positions = torch.zeros(3, offsets[-1][1] + 20, dtype=torch.long)

    @property
    def prompt(self) -> int:
        return self.mrope_positions.shape[1]


class Request:
    """A request of the fake scheduler. Like the real ones it is part of a cycle: only the collector frees it."""

    def __init__(self, frames: int) -> None:
        self.inputs = Inputs(1)
        self.inputs.append_video(4, frames)
        self.seen = 0
        self.layout: weakref.ref[DeviceLayout] | None = None
        self.itself = self


class Scheduler:
    """Random decisions about requests; every prefill asks the cache as the backend does."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.cache = cache()
        self.live: list[Request] = []
        self.layouts: weakref.WeakSet[DeviceLayout] = weakref.WeakSet()
        self.hits = self.misses = self.arrived = 0

    def arrive(self) -> None:
        self.live.append(Request(self.random.randint(1, 12)))
        self.arrived += 1

    def prefill(self, request: Request, *, expect_hit: bool) -> None:
        """The next chunk. Requests hold no layout: the cache alone keeps it."""
        request.seen = min(request.inputs.prompt, request.seen + self.random.randint(1, 64))
        layout = self.cache.get(request.inputs, request.seen, CPU)
        known = request.layout() if request.layout is not None else None
        assert (layout is known) == expect_hit
        assert layout.layout.length == request.inputs.prompt
        self.hits, self.misses = self.hits + expect_hit, self.misses + (not expect_hit)
        request.layout = weakref.ref(layout)
        self.layouts.add(layout)

    def retract(self, request: Request) -> None:
        """Its KV is gone, its inputs stay: the next prefill starts over."""
        request.seen = 0

    def append(self, request: Request) -> None:
        """The session's next turn brings a video."""
        request.inputs.append_video(request.inputs.prompt, self.random.randint(1, 5))
        self.prefill(request, expect_hit=False)

    def leave(self, request: Request) -> None:
        """Finished or aborted, maybe between two chunks, maybe before the first one."""
        self.live.remove(request)

    def step(self) -> None:
        if self.arrived < REQUESTS and (not self.live or self.random.random() < 0.2):
            return self.arrive()
        request = self.random.choice(self.live)
        action = self.random.choices(["prefill", "retract", "append", "leave"], [10, 2, 1, 3])[0]
        if action == "prefill":
            return self.prefill(request, expect_hit=request.layout is not None)
        if action == "append" and request.layout is None:
            return None
        return getattr(self, action)(request)


def cache() -> LayoutCache:
    return LayoutCache(ModelGeometry(2), chunk_tokens=64, tile_queries=32, tile_keys=16, cell_size=0)


@pytest.fixture(autouse=True)
def _only_new_objects_are_collected() -> Iterator[None]:
    """Collecting all of PyTorch's objects each time would take most of the test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("seed", range(3))
def test_two_hundred_requests_leave_an_empty_cache(seed: int) -> None:
    scheduler = Scheduler(seed)
    steps = 0
    while scheduler.arrived < REQUESTS or scheduler.live:
        scheduler.step()
        steps += 1
        if steps % 20 == 0:
            gc.collect()
            started = sum(request.layout is not None for request in scheduler.live)
            assert len(scheduler.cache) == len(scheduler.layouts) == started
    assert min(scheduler.hits, scheduler.misses) > REQUESTS / 2
    gc.collect()
    assert len(scheduler.cache) == 0
    assert not scheduler.layouts


def test_a_prefill_after_a_retraction_finds_the_layout() -> None:
    layouts, request = cache(), Request(7)
    layout = layouts.get(request.inputs, 10, CPU)
    assert layouts.get(request.inputs, request.inputs.prompt, CPU) is layout
    assert layouts.get(request.inputs, 10, CPU) is layout
    assert len(layouts) == 1


def test_a_session_that_appends_an_item_is_laid_out_anew_and_counted_once() -> None:
    layouts, request = cache(), Request(3)
    first = layouts.get(request.inputs, 10, CPU)
    request.inputs.append_video(request.inputs.prompt, 2)
    second = layouts.get(request.inputs, request.inputs.prompt, CPU)
    assert (first.layout.num_items, second.layout.num_items) == (1, 2)
    assert layouts.get(request.inputs, request.inputs.prompt, CPU) is second
    assert len(layouts) == 1
    replaced = weakref.ref(first)
    del first
    gc.collect()
    assert replaced() is None
    del request
    gc.collect()
    assert len(layouts) == 0


def test_a_cache_that_goes_first_leaves_nothing_behind() -> None:
    layouts, request = cache(), Request(3)
    layout = weakref.ref(layouts.get(request.inputs, 10, CPU))
    del layouts
    del request
    gc.collect()
    assert layout() is None
