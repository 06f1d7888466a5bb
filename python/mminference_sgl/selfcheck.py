"""A tiny problem for each attention implementation, to see on a machine whether it runs and computes."""

from __future__ import annotations

import torch

from mminference_sgl.kernels import ops
from mminference_sgl.kernels.tiles import ABSENT, KeyOrder, Region, TileLists, TilePass, lists_from_map

_TOKENS, _HEADS, _KV_HEADS, _HEAD_DIM, _TILE = 111, 4, 2, 64, 64


def check_implementations() -> dict[str, str]:
    """For each implementation `ok`, or why it does not work on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: check(name, device) if state == "ok" else state
        for name, state in ops.available_implementations(device).items()
    }


def check(implementation: str, device: torch.device) -> str:
    """`ok`, or what is wrong with an available implementation on a device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(_TOKENS + 1, heads, _HEAD_DIM, generator=generator).to(device, dtype)
        for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
    )
    query = query[:_TOKENS]
    out = torch.full_like(query, torch.nan)
    try:
        ops.sparse_prefill(query, key, value, [_every_causal_tile(device)], _HEAD_DIM**-0.5, out, implementation)
        error = (out.double() - _dense(query, key[1:], value[1:])).abs().max().item()
    except Exception as problem:  # noqa: BLE001 - the caller reports it
        return f"fails on {device}: {type(problem).__name__}: {problem}"
    # A wrong result is off by about 1; rounding by less than a hundredth of that.
    return "ok" if error < 0.05 else f"computes wrong on {device}: off by {error:.2g}"


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention in fp64: [tokens, heads, head_dim]."""
    group = _HEADS // _KV_HEADS
    q, k, v = (
        x.double().repeat_interleave(times, 1).transpose(0, 1)
        for x, times in ((query, 1), (key, group), (value, group))
    )
    future = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool, device=query.device).triu(1)
    weights = (q @ k.mT * _HEAD_DIM**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    out: torch.Tensor = (weights @ v).transpose(0, 1)
    return out


def _every_causal_tile(device: torch.device) -> tuple[TilePass, TileLists]:
    """One request in sequence order, token i in slot i + 1, nothing left out."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    tiles = -(-_TOKENS // _TILE)
    positions = torch.full((tiles * _TILE,), ABSENT, dtype=torch.int32, device=device)
    positions[:_TOKENS] = torch.arange(_TOKENS, device=device)
    slots = torch.zeros(tiles * _TILE, dtype=torch.long, device=device)
    slots[:_TOKENS] = torch.arange(1, _TOKENS + 1, device=device)
    positions, slots = positions.view(tiles, _TILE), slots.view(tiles, _TILE)
    keys = KeyOrder(slots, positions, positions.amin(1), positions.amax(1), ints(0, tiles), tiles)

    starts = ints(*range(0, _TOKENS, _TILE))
    ends = (starts + _TILE).clamp_max(_TOKENS)
    tile_pass = TilePass(
        region=Region.NEAR,
        keys=keys,
        rows=torch.arange(_TOKENS, device=device),
        positions=torch.arange(_TOKENS, dtype=torch.int32, device=device),
        indptr=torch.cat([starts, ints(_TOKENS)]),
        request=torch.zeros_like(starts),
        min_pos=starts,
        max_pos=ends - 1,
        tile_queries=_TILE,
    )
    shape = (_HEADS, tiles)
    causal = torch.ones(tiles, tiles, dtype=torch.bool, device=device).tril().expand(_HEADS, tiles, tiles)
    sink = torch.zeros(shape, dtype=torch.int32, device=device)
    reach = torch.full(shape, _TOKENS, dtype=torch.int32, device=device)
    return tile_pass, lists_from_map(tile_pass, causal, sink, reach)
