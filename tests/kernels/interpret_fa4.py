"""Runs ``fa4`` in the interpreter with an emulation in place of flash-attn-4's kernel; prints its errors as JSON lines.

``TRITON_INTERPRET=1 python tests/kernels/interpret_fa4.py sm_90|sm_100 [CASE ...]``

flash-attn-4's own entry point sees every call first, with fake tensors of the same kind, so that what it refuses fails
here too; only the compiler behind it is left out. The emulation reads what the kernel would read, and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import problems
from mminference_sgl.kernels import fa4, lanes_triton, reference
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import TileLists, TilePass, dense_lists
from test_attention import random_lists

BATCH = (
    problems.Request(150, [problems.one_span_video(10, 6, 4, 5)], 0, 150),
    problems.Request(1, [], 0, 1),
    problems.Request(200, [problems.timestamped_video(9, 6, 3, 5)], 60, 100),
    problems.Request(63, [], 40, 23),
)
"""A whole video; a request of one key; a chunk cut inside a timestamped frame; a short text tail."""
TEXT = (problems.Request(100, [], 20, 80),)
"""One query tile, and no far pass."""
KEY_SCALE, VALUE_SCALE = 0.75, 1.5


@dataclass(frozen=True)
class Case:
    """Shapes of one problem; heads of a KV group share the lists of the last two passes if they are ``shared``.

    ``more_lists``: lists of all causal tiles, and none that have any, beside random ones.
    """

    name: str
    heads: int
    kv_heads: int
    shared: bool = False
    tile_queries: int = 128
    more_lists: bool = False
    tile_keys: int = 64
    head_dim: int = 16
    value_dim: int = 16
    fp8: bool = False
    requests: tuple[problems.Request, ...] = BATCH
    arch: str = "sm_90"


CASES = tuple(
    Case(f"group-of-{group}{'-shared' * shared}", group, 1, shared)
    for group in (1, 2, 3, 4, 7, 16)
    for shared in (False, True)
    if group > 1 or not shared
)
CASES += (
    Case("kv-heads", 6, 3, shared=True),
    Case("small-tiles", 4, 2, shared=True, tile_queries=32, more_lists=True),
    Case("keys-of-128", 4, 2, tile_keys=128),
    Case("one-tile", 2, 2, requests=TEXT, more_lists=True),
    Case("head-80", 4, 2, shared=True, head_dim=80, value_dim=40),
    Case("fp8", 4, 2, shared=True, head_dim=24, value_dim=24, fp8=True),
    Case("two-blocks", 2, 1, tile_queries=256, requests=BATCH[:1]),
    Case("two-blocks-blackwell", 2, 1, tile_queries=256, requests=BATCH[:1], arch="sm_100"),
    Case("blackwell", 4, 2, shared=True, arch="sm_100"),
)


def main(arch: str, names: list[str]) -> None:
    """Near pass into NaN memory, the far pass merged into it, other lists of the near pass into that; both of no tiles.

    Each against the reference in fp64.
    """
    os.environ |= {"FLASH_ATTENTION_ARCH": arch, "CUTE_DSL_ARCH": f"{arch}a", "FLASH_ATTENTION_NUM_SMS": "132"}
    for case in CASES:
        if case.arch == arch and (not names or case.name in names):
            run(case)


def run(case: Case) -> None:
    problem = problems.make(
        case.requests,
        tile_queries=case.tile_queries,
        tile_keys=case.tile_keys,
        head_dim=case.head_dim,
        heads=case.heads,
        kv_heads=case.kv_heads,
        dtype=torch.float16,
        sharing=(case.heads // case.kv_heads,) if case.shared else (),
    )
    meant = replace(problem.operands, value_pool=problem.value_pool[..., : case.value_dim])
    # Rows of a larger matrix, as a projection of query, keys and values leaves them.
    query = torch.cat([meant.query, torch.full_like(meant.query, torch.nan)], 1)[:, : case.heads]
    stored = meant = replace(meant, query=query)
    if case.fp8:
        stored, meant = problems.in_fp8(meant, KEY_SCALE, VALUE_SCALE)
    near, far = problem.plan.near, problem.plan.far
    passes = [near, *(problem.plan.shared[0].passes[::-1] if case.shared else (far or near, near))]
    steps = [(tile_pass, random_lists(problem, tile_pass, step)) for step, tile_pass in enumerate(passes)]
    wanted = torch.rand(steps[0][1].sink.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    runs = {"random": steps}
    if case.more_lists:
        runs |= {
            "dense": [(near, dense_lists(near, wanted)), (near, dense_lists(near, ~wanted))],
            "empty": [(one, without_tiles(lists)) for one, lists in steps[:2]],
        }
    for kind, steps in runs.items():
        exact, plain = (result(reference, problems.cast(meant, dtype), steps) for dtype in (torch.double, torch.half))
        ahead = built(case)
        with emulated(case.arch) as shapes:
            ours = result(fa4, stored, steps)
        tiles = {
            "full": sum(int(one.full.sum()) for _, one in steps),
            "all": sum(int(one.count.sum()) for _, one in steps),
        }
        assert all(same_lists(lanes_triton.blocks(*step), *step) for step in steps)
        found = compared(exact, plain, ours) | {"tiles": tiles, "queries": shapes, "late": len(kernels() - ahead)}
        print(json.dumps({"case": case.name, "lists": kind, **found}), flush=True)


def kernels() -> set[tuple[Any, ...]]:
    """What tells the kernels apart that flash-attn-4 has compiled, or would have."""
    from flash_attn.cute import interface

    return set(interface._flash_attn_fwd.compile_cache.cache)


def built(case: Case) -> set[tuple[Any, ...]]:
    """The kernels that are compiled ahead for a layer, and no others."""
    from flash_attn.cute import interface

    interface._flash_attn_fwd.compile_cache.clear()
    group = case.heads // case.kv_heads
    with mock.patch.object(interface.cute, "compile"):
        for lists in {group, 1 if case.shared else group}:
            fa4.build(torch.float16, case.head_dim, case.tile_keys, lists, int(case.arch[3:]) // 10)
    return kernels()


def same_lists(blocks: lanes_triton.Blocks, tile_pass: TilePass, lists: TileLists) -> bool:
    """Whether flash-attn-4 gets the lists, one by one."""
    groups, tiles = lists.sink.shape
    for g, t in itertools.product(range(groups), range(tiles)):
        listed = lists.tiles_of(g * tiles + t) + tile_pass.keys.tile_indptr[tile_pass.request[t].long()]
        full, masked = listed.tensor_split([int(lists.full[g * tiles + t])])
        for wanted, count, index in (
            (full, blocks.full_count, blocks.full),
            (masked, blocks.masked_count, blocks.masked),
        ):
            if not torch.equal(index[t, g, 0, : int(count[t, g, 0])], wanted):
                return False
    return torch.equal(blocks.bounds, torch.stack([lists.sink, lists.reach], 2))


def without_tiles(lists: TileLists) -> TileLists:
    """Lists without entries, not even memory for them."""
    none = torch.zeros_like(lists.count)
    return replace(lists, begin=none, count=none, full=none, tiles=lists.tiles[:0])


def result(
    implementation: Any, operands: Operands, steps: list[tuple[TilePass, TileLists]]
) -> tuple[torch.Tensor, ...]:
    """Output and LSE in memory that starts as NaN, that of other rows of the batch included."""
    out = operands.query.new_full((*operands.query.shape[:2], operands.value_pool.shape[2]), torch.nan)
    lse = torch.full(out.shape[:2], torch.nan, dtype=torch.promote_types(out.dtype, torch.float32))
    for step, (tile_pass, lists) in enumerate(steps):
        implementation.attend(operands, tile_pass, lists, out, lse, merge=step > 0)
    return out, lse


def compared(exact: tuple[torch.Tensor, ...], plain: tuple[torch.Tensor, ...], ours: tuple[torch.Tensor, ...]) -> dict:
    """Errors against fp64 as shares of what is allowed: twice that of plain PyTorch and a band of rounding."""
    blind = torch.isneginf(exact[1])
    shares = []
    for index, band in ((0, torch.finfo(torch.float16).eps), (1, 4e-6)):
        want, have, got = (each[index][~blind].double() for each in (exact, plain, ours))
        if want.numel():
            allowed = 2 * float((have - want).abs().max()) + 2 * band * float(want.abs().max())
            shares.append(float((got - want).abs().max()) / allowed)
    return {
        "blind": int(blind.sum()),
        "same_blind": torch.equal(blind, torch.isneginf(ours[1])) and bool((ours[0][blind] == 0).all()),
        "shares": shares,
        "nan": any(bool(each.isnan().any()) for each in ours),
    }


@contextlib.contextmanager
def emulated(arch: str) -> Iterator[list[list[int]]]:
    """flash-attn-4 for an architecture without its compiler and its kernel; yields the shapes of queries it gets."""
    from flash_attn.cute import interface, utils

    entry_point, shapes = interface._flash_attn_fwd, []

    def called(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        with FakeTensorMode() as mode, mock.patch.object(interface.cute, "compile"):
            entry_point(*twins((q, k, v), mode), **twins(options, mode))
        shapes.append(list(q.shape))
        return emulate(q, k, v, **options)

    with (
        mock.patch.object(interface, "_flash_attn_fwd", called),
        mock.patch.object(utils, "scalar_to_ssa", lambda value, _dtype: value),
        mock.patch.object(fa4, "CAPABILITIES", ((int(arch[3:]) // 10, 0),)),
        # The interpreter takes as long for a program of few lanes as for one of many.
        mock.patch.object(lanes_triton, "LANES_AT_ONCE", 128),
    ):
        called.compile_cache = entry_point.compile_cache
        yield shapes


def twins(value: Any, mode: FakeTensorMode) -> Any:
    """The same with fake tensors of a GPU for the tensors: of their sizes, strides and dtypes."""
    if isinstance(value, torch.Tensor):
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    if isinstance(value, dict):
        return {name: twins(item, mode) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(twins(item, mode) for item in value))
    return type(value)(twins(item, mode) for item in value) if isinstance(value, list | tuple) else value


def emulate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    mask_mod: Callable[..., torch.Tensor],
    block_sparse_tensors: Any,
    aux_tensors: list[torch.Tensor],
    **_options: Any,
) -> tuple[torch.Tensor, ...]:
    """Attention of a sequence and head to its full blocks, and to the elements of masked ones that the mask lets by."""
    lists = block_sparse_tensors
    width = lists.block_size[1]
    batch, rows, heads, _ = q.shape
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), torch.full((batch, heads, rows), -torch.inf)
    for i in range(batch):
        for h in range(heads):
            own = h * k.shape[2] // heads
            masked = lists.mask_block_idx[i, h, 0, : lists.mask_block_cnt[i, h, 0]]
            full = lists.full_block_idx[i, h, 0, : lists.full_block_cnt[i, h, 0]]
            if not masked.numel() + full.numel():
                continue
            columns = (torch.cat([masked, full])[:, None] * width + torch.arange(width)).flatten()
            index = torch.tensor(i), torch.tensor(h), torch.arange(rows)[:, None], columns[None]
            seen = mask_mod(*((each,) for each in index), None, aux_tensors)
            seen[:, masked.numel() * width :] = True
            scores = q[i, :, h].float() @ k[i, columns, own].float().mT * softmax_scale
            scores = scores.masked_fill(~seen, -torch.inf)
            lse[i, h] = scores.logsumexp(1)
            weights = scores.softmax(1).nan_to_num(0.0).to(q.dtype).float()
            out[i, :, h] = (weights @ v[i, columns, own].float()).to(q.dtype)
    return out, lse


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
