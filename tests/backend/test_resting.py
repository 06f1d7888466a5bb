"""Layers that save nothing rest until their request has grown, by nothing but what its chunks have computed."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mminference_sgl.backend.resting import GROWTH, Resting

CHUNK = 1000
LAYER = 3


class Request:
    """One that is prefilled in chunks; layer 3 needs what it is told, by chunk."""

    def __init__(self) -> None:
        self.layout = SimpleNamespace(resting={})
        self.prefix = 0

    def chunk(self, density: float) -> Any:
        keys = self.prefix + CHUNK
        return SimpleNamespace(
            layout=self.layout, prefix=self.prefix, num_keys=keys, densities={LAYER: density, 4: 0.1}
        )


def serve(resting: Resting, densities: list[float], *, late: int = 0) -> list[bool]:
    """In which chunks the layer rests; figures arrive ``late`` forwards after they have to."""
    request, rested, in_flight = Request(), [], []
    for forward, density in enumerate(densities):
        request.prefix = forward * CHUNK
        while in_flight and (late == 0 or resting.is_due(in_flight[0][0], forward)):
            number, chunk = in_flight.pop(0)
            resting.note([chunk], number)
        rested.append(bool(resting.requests(LAYER, [request], forward)))
        assert not resting.requests(4, [request], forward)
        in_flight.append((forward, request.chunk(1.0 if rested[-1] else density)))
    return rested


def test_a_layer_rests_until_its_request_has_grown() -> None:
    rested = serve(Resting(0.6, torch.device("cpu")), [0.7] * 12)
    looked = [chunk for chunk, rests in enumerate(rested) if not rests]
    assert looked == [0, 2, 5, 9]
    for before, after in itertools.pairwise(looked):
        assert after - 1 < GROWTH * (before + 1) <= after


def test_a_layer_that_saves_something_never_rests() -> None:
    assert not any(serve(Resting(0.6, torch.device("cpu")), [0.6] * 8))
    assert not any(serve(Resting(1.0, torch.device("cpu")), [1.0] * 8))


def test_a_layer_that_saves_something_again_goes_on() -> None:
    rested = serve(Resting(0.6, torch.device("cpu")), [0.7, 0.7, 0.7, 0.3, 0.3, 0.3, 0.3, 0.3])
    assert rested == [False, True, False, True, True, False, False, False]


@pytest.mark.parametrize("densities", [[0.7] * 14, [0.7] * 4 + [0.2] * 4 + [0.9] * 8])
def test_on_a_device_it_does_not_matter_when_figures_arrive(densities: list[float]) -> None:
    soon, late = (serve(Resting(0.6, torch.device("cuda")), densities, late=late) for late in (0, 1))
    assert soon == late
    assert not soon[1]
    assert any(soon)


def test_requests_rest_by_themselves() -> None:
    resting, spread, sharp = Resting(0.6, torch.device("cpu")), Request(), Request()
    spread.prefix = sharp.prefix = 8 * CHUNK
    resting.note([spread.chunk(0.8), sharp.chunk(0.1)], 5)
    spread.prefix = sharp.prefix = 9 * CHUNK
    assert resting.requests(LAYER, [sharp, spread], 6) == {1}
    assert resting.requests(LAYER, [sharp], 6) == frozenset()
