"""Merging of tokens against loops that walk the pairs."""

from __future__ import annotations

import pytest
import torch

from mminference_sgl.models.token_merging import merge, rounds
from references.videochat_flash import merged


@pytest.mark.parametrize(
    ("tokens", "target", "taken"),
    [
        (3136, 64, [1568, 784, 392, 196, 98, 34]),
        (784, 64, [392, 196, 98, 34]),
        (196, 64, [98, 34]),
        (81, 64, [17]),
        (128, 64, [64]),
        (7, 1, [3, 2, 1]),
        (2, 1, [1]),
    ],
)
def test_rounds(tokens: int, target: int, taken: list[int]) -> None:
    assert rounds(tokens, target) == taken


@pytest.mark.parametrize(("tokens", "target"), [(64, 64), (63, 64), (5, 0)])
def test_nothing_to_merge(tokens: int, target: int) -> None:
    with pytest.raises(ValueError, match=f"cannot merge {tokens} tokens to {target}"):
        rounds(tokens, target)


@pytest.mark.parametrize(
    ("tokens", "target", "heads", "width"),
    [(324, 64, 4, 64), (81, 64, 4, 32), (33, 8, 1, 16), (50, 3, 2, 6), (7, 1, 3, 12), (196, 64, 16, 64)],
)
def test_merging_walks_the_pairs(tokens: int, target: int, heads: int, width: int) -> None:
    states = torch.randn(3, tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))
    found = merge(states, target, heads)
    wanted = torch.stack([merged(one, target, heads)[0] for one in states])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_batches_and_precision() -> None:
    """A clip is merged alone, whatever is beside it, and in no less than fp32."""
    states = torch.randn(4, 60, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = merge(states, 9, 2)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.cat([merge(one[None], 9, 2) for one in states]))
    assert torch.equal(found, merge(states.float(), 9, 2).bfloat16())


def test_equals_go_by_place() -> None:
    states = 2 * torch.eye(3).repeat_interleave(4, 0)[None]
    found, (pairs,) = merged(states[0], 8, 1)
    assert pairs == [(0, 1), (2, 1), (4, 5), (6, 5)]
    torch.testing.assert_close(merge(states, 8, 1)[0], found)


def test_sums_are_kept() -> None:
    """The tokens weigh as much as what they were made of: with all merged into one, it is the mean."""
    states = torch.randn(2, 37, 8, dtype=torch.float64)
    torch.testing.assert_close(merge(states, 1, 2)[:, 0], states.mean(1))
