"""Stride search: what is planted is found exactly, chance finds nothing, and the next chunk has cells."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import problems
from mminference_sgl.backend.geometry import ModelGeometry
from mminference_sgl.backend.layout import LayoutCache
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import DeviceLayout, SparseRequest, build
from mminference_sgl.method.stride import MIN_RUN, StrideSearch, stride_evidence
from test_boundaries import kept_mass

START = 7
"""Tokens of text before the run."""
CONFIG = Config(error=0.3, text_error=0.3, error_ceiling=100.0)
TILES = {"tile_queries": 32, "tile_keys": 16}


class Inputs:
    """Stands for SGLang's ``MultimodalInputs``: items of (modality, offsets, data), a position per prompt token."""

    def __init__(self, prompt: int, *items: tuple[str, list[tuple[int, int]], dict]) -> None:
        self.mrope_positions = torch.zeros(3, prompt, dtype=torch.long)
        self.mm_items = [
            SimpleNamespace(modality=SimpleNamespace(name=name), offsets=offsets, model_specific_data=data)
            for name, offsets, data in items
        ]


def opaque(length: int, start: int = START, modality: str = "VIDEO") -> tuple[str, list[tuple[int, int]], dict]:
    return modality, [(start, start + length - 1)], {}


def cache(counters: Counter[str] | None = None) -> LayoutCache:
    return LayoutCache(ModelGeometry(2), chunk_tokens=1024, cell_size=0, counters=counters, **TILES)


def chunk_of(layout: DeviceLayout, prefix: int, chunk: int, *, strength: float = 3.0, seed: int = 0):
    """One chunk of random attention, the larger ``strength`` the sharper, under a layout."""
    request = problems.Request(layout.layout.length, [], prefix, chunk)
    problem = problems.make([request], head_dim=128, seed=seed, **TILES)
    problem.query.mul_(strength / 3)
    sparse = SparseRequest(layout, prefix, chunk, torch.tensor([0]), 0)
    return dataclasses.replace(problem, plan=build([sparse], problem.req_to_token, probe_rows=64, **TILES))


def plant(problem: problems.Problem, stride: int, *, start: int = START, reach: int = 1 << 30) -> None:
    """Heads 0 and 1 look at their own place every ``stride`` tokens from ``start`` on; the others stay as they are.

    ``reach``: periods behind which they see nothing of it.
    """
    request = problem.requests[0]
    end = request.prefix + request.chunk
    token = torch.arange(end)
    period = (token - start) // stride
    generator = torch.Generator().manual_seed(5)
    places = torch.nn.functional.normalize(torch.randn(stride, 96, generator=generator), dim=-1)
    # A slow phase tells near periods from far ones, if only those within reach are wanted.
    turn = torch.stack([torch.cos(period / reach), torch.sin(period / reach)], dim=-1) if reach < 1 << 20 else 0
    keys = torch.zeros(end, problem.query.shape[2])
    keys[:, :96] = places[(token - start) % stride]
    keys[:, 96:98] = turn
    problem.key_pool[problem.req_to_token[0, :end].long(), 0] = keys
    wanted = keys.clone() * 14
    wanted[:, 96:98] *= 3
    problem.query[:, :2] = (wanted[request.prefix :] / problem.scale)[:, None]


def run(problem: problems.Problem, layer: int = 0) -> prefill.LayerReport:
    out = torch.empty_like(problem.query)
    specs = [HeadSpec()] * problem.query.shape[1]
    (report,) = prefill.run_layer(problem.operands, problem.plan, specs, CONFIG, out, "torch", layer)
    return report


def item_grids(layout: DeviceLayout) -> list[tuple[int, int]]:
    """Frame stride and tokens of each item, by first token."""
    _, lengths, _, items = layout.layout.segments()
    numbers = [int(item) for item in dict.fromkeys(items.tolist()) if item >= 0]
    return [(layout.layout.frame_stride(n), int(lengths[items == n].sum())) for n in numbers]


def test_a_stride_that_is_given_is_not_looked_for() -> None:
    length, counters = 3001, Counter()
    layouts = LayoutCache(
        ModelGeometry(2), chunk_tokens=1024, cell_size=0, frame_stride=196, counters=counters, **TILES
    )
    # The second run is shorter than two frames: nothing is known of it.
    inputs = Inputs(9000, opaque(length), opaque(MIN_RUN, 5000), opaque(MIN_RUN // 4, 7000, "IMAGE"))
    layout = layouts.get(inputs, 2000, torch.device("cpu"))
    frames, tail = divmod(length, 196)
    second = MIN_RUN // 196 * 196
    assert item_grids(layout) == [
        (196, frames * 196), (0, tail), (196, second), (0, MIN_RUN - second), (0, MIN_RUN // 4)
    ]  # fmt: skip
    assert layout.search is not None
    assert not layout.search.listens(0)
    assert layout.search.strides == [196, 196]
    problem = chunk_of(layout, 0, 2000)
    plant(problem, 122)
    run(problem)
    assert layouts.get(inputs, 3000, torch.device("cpu")) is layout
    assert not counters
    wide = LayoutCache(ModelGeometry(2), chunk_tokens=1024, cell_size=0, frame_stride=2000, **TILES)
    layout = wide.get(inputs, 2000, torch.device("cpu"))
    assert item_grids(layout)[0] == (0, length), "not two frames: looked for, as nothing fits"
    assert layout.search is not None
    assert layout.search.listens(0)


@pytest.mark.parametrize("stride", [16, 37, 122, 268])
@pytest.mark.parametrize("seed", range(2))
def test_a_planted_stride_is_found_exactly(stride: int, seed: int) -> None:
    length, counters = 3001, Counter()
    layouts, inputs = cache(counters), Inputs(START + length + 9, opaque(length))
    problem = chunk_of(layouts.get(inputs, 2000, torch.device("cpu")), 0, 2000, seed=seed)
    plant(problem, stride)
    run(problem)
    frames, tail = divmod(length, stride)
    layout = layouts.get(inputs, 3000, torch.device("cpu"))
    expected = [(stride, frames * stride), (0, tail)] if tail else [(stride, length)]
    assert item_grids(layout) == expected
    assert counters == {"stride:found": 1}
    assert layouts.get(inputs, length, torch.device("cpu")) is layout, "kept"


def test_a_stride_that_is_seen_a_few_periods_back_is_found() -> None:
    layouts, inputs = cache(), Inputs(6000, opaque(5900))
    problem = chunk_of(layouts.get(inputs, 4000, problems.CPU), 0, 4000)
    plant(problem, 122, reach=8)
    run(problem)
    assert layouts.get(inputs, 5000, problems.CPU).stride == 122


@pytest.mark.parametrize(("rows", "columns"), [(12, 14), (8, 8), (14, 14)])
@pytest.mark.parametrize("width", [1.0, 2.0])
@pytest.mark.parametrize("strength", [6, 14])
def test_heads_that_see_around_their_place_show_the_frame_and_not_its_rows(
    rows: int, columns: int, width: float, strength: int
) -> None:
    """Place by a smooth kernel ``width`` tokens wide, besides noise: rows of a frame have a period as well."""
    layouts, inputs = cache(), Inputs(6000, opaque(5900))
    problem = chunk_of(layouts.get(inputs, 4000, problems.CPU), 0, 4000, strength=1.0)
    generator = torch.Generator().manual_seed(0)
    place = (torch.arange(4000) - START) % (rows * columns)
    waves = torch.randn(2, 48, generator=generator) / width
    phase = torch.stack([place // columns, place % columns], dim=-1).float() @ waves
    position = torch.cat([phase.cos(), phase.sin()], dim=-1) / 48**0.5
    query, key = (torch.cat([position, torch.randn(4000, 32, generator=generator) / 50**0.5], dim=-1) for _ in "qk")
    problem.key_pool[problem.req_to_token[0, :4000].long(), 0] = key
    problem.query[:, :2] = (query * strength / problem.scale)[:, None]
    run(problem)
    assert layouts.get(inputs, 5000, problems.CPU).stride == rows * columns


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("seed", range(2))
def test_flat_and_random_attention_find_nothing(strength: float, seed: int) -> None:
    counters: Counter[str] = Counter()
    layouts, inputs = cache(counters), Inputs(3020, opaque(3000))
    layout = layouts.get(inputs, 3020, problems.CPU)
    run(chunk_of(layout, 0, 3020, strength=strength, seed=seed))
    assert layouts.get(inputs, 3020, problems.CPU) is layout
    assert counters == {"stride:none": 1}
    assert layouts.get(inputs, 3020, problems.CPU) is layout
    assert counters == {"stride:none": 1}, "not searched again"


@pytest.mark.parametrize("shape", ["columns", "window", "one diagonal"])
def test_attention_without_a_period_finds_nothing(shape: str) -> None:
    """Keys that all rows see, a window that fades, one distance: sharp, but no stride."""
    counters: Counter[str] = Counter()
    layouts, inputs = cache(counters), Inputs(3020, opaque(3000))
    problem = chunk_of(layouts.get(inputs, 3020, problems.CPU), 0, 3020, strength=1.0)
    token = torch.arange(3020)
    generator = torch.Generator().manual_seed(1)
    own = torch.nn.functional.normalize(torch.randn(3020, 128, generator=generator), dim=-1)
    query = own.clone()
    if shape == "columns":
        own[:], query[:] = own[:1] * (token[:, None] % 501 == 3), own[:1]
    elif shape == "window":
        angle = token[:, None] / 400 * torch.tensor([1.0, 3.0, 9.0, 27.0])
        own = torch.cat([angle.cos(), angle.sin(), own[:, :120] * 0], dim=-1) / 2
        query = own
    else:
        query = own.roll(300, 0)
    problem.key_pool[problem.req_to_token[0].long(), 0] = own
    problem.query[:, :2] = (query * 14 / problem.scale)[:, None]
    run(problem)
    layouts.get(inputs, 3020, problems.CPU)
    assert counters == {"stride:none": 1}


@pytest.mark.parametrize("distances", [1024, 4096, 20480])
def test_evidence_by_chance_stays_far_below_the_threshold(distances: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tries = 300 if distances < 10000 else 40
    chance = [stride_evidence(torch.rand(distances, generator=generator) + 1)[1].max() for _ in range(tries)]
    assert max(chance) < 14, "the threshold is 18: e^4 times rarer"


@pytest.mark.parametrize("stride", [16, 37, 250, 2003, 4096])
def test_a_stride_beats_its_multiples_divisors_and_neighbours(stride: int) -> None:
    """Peaks two wide in noise, some missing: the evidence is for the stride itself, up to the longest."""
    generator = torch.Generator().manual_seed(stride)
    spectrum = torch.rand(20480, generator=generator)
    spectrum[stride::stride] += 1.0
    spectrum[stride + 1 :: stride] += 0.6
    strides, evidence = stride_evidence(spectrum)
    assert int(strides[evidence.argmax()]) == stride
    assert evidence.max() > 18


def test_the_second_chunk_has_cells_and_needs_fewer_tiles_for_as_much_mass() -> None:
    stride, length, cut = 122, 6000, 3000
    layouts, inputs = cache(), Inputs(START + length, opaque(length))
    unaware = layouts.get(inputs, cut, problems.CPU)
    first = chunk_of(unaware, 0, cut)
    plant(first, stride)
    run(first)
    aware = layouts.get(inputs, START + length, problems.CPU)
    assert (unaware.stride, aware.stride) == (0, stride)
    density, mass = {}, {}
    for name, layout in (("without", unaware), ("with", aware)):
        second = chunk_of(layout, cut, START + length - cut)
        plant(second, stride)
        second.query[:, 2:], second.key_pool[:, 1:] = second.query[:, :2], second.key_pool[:, :1]
        (group,) = second.plan.groups
        assert group.view.cell.stride == layout.stride
        report = run(second)
        density[name] = float(report.tiles / report.causal)
        mass[name] = float(kept_mass(second, HeadSpec(), CONFIG).mean())
    assert density["with"] < 0.5 * density["without"]
    assert mass["with"] >= min(mass["without"], 0.9) - 0.01


def test_a_gridded_item_beside_an_opaque_one_stays_as_it_is() -> None:
    grid = ("VIDEO", [(10, 10 + 8 * 60 - 1)], {"video_grid_thw": torch.tensor([[8, 12, 20]])})
    start = 500
    layouts, inputs = cache(), Inputs(3600, grid, opaque(3000, start))
    problem = chunk_of(layouts.get(inputs, 2600, problems.CPU), 0, 2600)
    plant(problem, 37, start=start)
    run(problem)
    layout = layouts.get(inputs, 3600, problems.CPU)
    assert item_grids(layout) == [(60, 480), (37, 81 * 37), (0, 3)]


def test_a_session_keeps_its_strides_and_searches_what_is_new() -> None:
    counters: Counter[str] = Counter()
    layouts, inputs = cache(counters), Inputs(1600, opaque(1500))
    first = chunk_of(layouts.get(inputs, 1600, problems.CPU), 0, 1600)
    plant(first, 37)
    run(first)
    assert layouts.get(inputs, 1600, problems.CPU).stride == 37
    inputs.mm_items += Inputs(0, opaque(2000, 1700, "IMAGE")).mm_items
    inputs.mrope_positions = torch.zeros(3, 3800, dtype=torch.long)
    layout = layouts.get(inputs, 3800, problems.CPU)
    assert item_grids(layout) == [(37, 40 * 37), (0, 20), (0, 2000)]
    second = chunk_of(layout, 1600, 2200)
    plant(second, 53, start=1700)
    run(second)
    assert item_grids(layouts.get(inputs, 3800, problems.CPU)) == [(37, 40 * 37), (0, 20), (53, 37 * 53), (0, 39)]
    assert counters == {"stride:found": 2}


@pytest.mark.parametrize(
    "items",
    [
        [("VIDEO", [(10, 10 + 40 * 60 - 1)], {"video_grid_thw": torch.tensor([[40, 12, 20]])})],
        [opaque(MIN_RUN - 1)],
        [opaque(3000, modality="AUDIO")],
    ],
    ids=["grid", "short", "audio"],
)
def test_other_requests_are_not_searched(items: list) -> None:
    assert cache().get(Inputs(4000, *items), 100, problems.CPU).search is None


def test_a_long_run_is_searched_until_its_strides_have_been_seen() -> None:
    """No stride in the first chunk says nothing about longer ones; each doubling of what is seen is asked once."""
    counters: Counter[str] = Counter()
    layouts, inputs = cache(counters), Inputs(9000, opaque(8000))
    layout = layouts.get(inputs, 1500, problems.CPU)
    run(chunk_of(layout, 0, 1500))
    assert layouts.get(inputs, 3500, problems.CPU) is layout
    assert not counters
    problem = chunk_of(layout, 1500, 2500)
    plant(problem, 601)
    run(problem)
    assert layouts.get(inputs, 6000, problems.CPU).stride == 601


def test_few_layers_are_listened_to() -> None:
    layouts, inputs = cache(), Inputs(3020, opaque(3000))
    layout = layouts.get(inputs, 2000, problems.CPU)
    problem = chunk_of(layout, 0, 2000)
    plant(problem, 37)
    for layer in (1, 2, 3):
        run(problem, layer)
    assert layouts.get(inputs, 3000, problems.CPU) is layout
    run(problem, 4)
    assert layouts.get(inputs, 3000, problems.CPU).stride == 37


def test_the_found_layout_goes_with_its_request() -> None:
    layouts, inputs = cache(), Inputs(3020, opaque(3000))
    problem = chunk_of(layouts.get(inputs, 2000, problems.CPU), 0, 2000)
    plant(problem, 37)
    run(problem)
    assert layouts.get(inputs, 3000, problems.CPU).stride == 37
    del inputs
    gc.collect()
    assert len(layouts) == 0


def test_search_of_nothing_is_none() -> None:
    assert StrideSearch.of([], None) is None
    assert StrideSearch.of([(1, [(0, 5000)], None), (2, [(6000, 6099)], None)], None) is not None
