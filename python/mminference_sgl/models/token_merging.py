"""Token merging: the most alike of neighbouring tokens become one, round after round.

Bolya et al., "Token Merging: Your ViT But Faster" (2023), as VideoChat-Flash reduces a clip's patches with it. Facts:
OpenGVLab/VideoChat-Flash ``llava/model/multimodal_projector/tome16_mlp_hd64.py``.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def rounds(tokens: int, target: int) -> list[int]:
    """How many tokens each round takes away: half of them, rounded down, until the target is within reach.

    Raises:
        ValueError: there is nothing to take away, or nothing would be left.
    """
    if not 0 < target < tokens:
        raise ValueError(f"cannot merge {tokens} tokens to {target}")
    taken = []
    while tokens > target:
        taken.append(min(tokens - target, tokens // 2))
        tokens -= taken[-1]
    return taken


def merge(states: torch.Tensor, target: int, heads: int) -> torch.Tensor:
    """States [n, tokens, C] -> [n, target, C]: each is the mean of those that were merged into it.

    In each round tokens at even places are looked at: each points to the token at an odd place that it is most like, by
    the cosine of the means over ``heads`` equal parts of the channels. The pairs most alike are merged, several into
    one if they point to it. What comes out is in the order of the paper's reference: tokens at even places that stay,
    the most alike first, then those at odd places in their order. Equal likeness goes by place.

    Computed in fp32 or better, as sums of a matrix product, so that the same states give the same tokens.
    """
    given = states.dtype
    states = states.to(torch.promote_types(given, torch.float32))
    sizes = states.new_ones(*states.shape[:2], 1)
    for taken in rounds(states.shape[1], target):
        parts = _parts(states, taken, heads)
        merged = parts @ sizes
        states, sizes = parts @ (states * sizes) / merged, merged
    return states.to(given)


def _parts(states: torch.Tensor, taken: int, heads: int) -> torch.Tensor:
    """Which tokens become which: 1 or 0 [n, tokens - taken, tokens]."""
    count, tokens, _ = states.shape
    metric = functional.normalize(states.unflatten(2, (heads, -1)).mean(2), dim=-1)
    likeness, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    even = likeness.argsort(dim=-1, descending=True, stable=True)  # [n, tokens at even places]
    gone, stays = even[:, :taken], even[:, taken:]
    odd = torch.arange(tokens // 2, device=states.device).expand(count, -1)
    first = stays.shape[1]
    source = torch.cat([2 * stays, 2 * odd + 1, 2 * gone], 1)
    becomes = torch.cat(
        [torch.arange(first, device=states.device).expand(count, -1), first + odd, first + partner.gather(1, gone)], 1
    )
    parts = states.new_zeros(count, tokens - taken, tokens)
    batch = torch.arange(count, device=states.device)[:, None]
    parts[batch, becomes, source] = 1
    return parts
