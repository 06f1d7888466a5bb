"""Block-sparse prefill attention with flash-attn-4, on Hopper and Blackwell.

flash-attn-4's forward takes lists of key blocks per (sequence, head, query block), full ones and ones whose elements a
mask decides, and returns the LSE. Here a query tile is a sequence of one block, a list a head, and a key tile a block
of keys and values that lie in the order of the pass (:meth:`.operands.Operands.in_order`), the same for all sequences:
their stride over the batch is 0, which leaves no trace in the descriptors that the kernel reads them by. Lists that
heads share are heads of as many KV heads, their lanes rows. The mask compares positions, as :class:`.tiles.Region` has
it. Queries are gathered into lanes, and the results written or merged, by :mod:`.lanes_triton`.

The entry point is the one that PyTorch's FlexAttention calls. It has no version of its own to go by, so what is called
is looked up (:func:`differences`), and the start-up check compiles and runs it in a process of its own first.

Nothing waits for the device. Memory beyond the operands and their keys and values in order: query and output once more,
padded to :data:`ROWS` lanes per tile, and what :func:`.lanes_triton.blocks` says.

Not timed on any device, so ``auto`` never chooses it. flash-attn-4 compiles its kernel with CuTe DSL, without nvcc, in
some seconds for each dtype, head size, region and number of lists per KV head; :func:`build` does it ahead.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import lanes_triton
from .lanes_triton import Blocks
from .operands import Operands
from .ops import ImplementationUnavailableError
from .tiles import Region, TileLists, TilePass

CAPABILITIES = ((9, 0), (10, 0), (10, 3))
"""Compute capabilities for which flash-attn-4 has block-sparse kernels and this was compiled."""
ROWS = 128
"""Lanes of a query block; flash-attn-4 takes two blocks at once on Blackwell where a query tile has more."""
TILE_KEYS = (64, 128)
"""Keys of a block that its kernels are made for."""

_INTERFACE, _LISTS, _UTILS = (f"flash_attn.cute.{name}" for name in ("interface", "block_sparsity", "utils"))
_CALLED: dict[tuple[str, str], tuple[str, ...]] = {
    (_INTERFACE, "_flash_attn_fwd"): (
        *("q", "k", "v", "softmax_scale", "tile_mn", "pack_gqa", "mask_mod"),
        *("block_sparse_tensors", "return_lse", "aux_tensors"),
    ),
    (_LISTS, "BlockSparseTensorsTorch"): (
        *("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx", "block_size"),
    ),
    (_UTILS, "scalar_to_ssa"): ("a", "dtype"),
}
"""What is called of flash-attn-4, and with which arguments."""
_DTYPES = (torch.float16, torch.bfloat16)


def unavailable(device: torch.device) -> str:
    """Why this implementation cannot run on a device, empty if it may; imports flash-attn-4 if the device suits it."""
    wanted = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
    if device.type != "cuda":
        return f"it needs a CUDA device of compute capability {wanted}, this is {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        return f"it needs compute capability {wanted}, this device has {capability[0]}.{capability[1]}"
    return differences()


@cache
def differences() -> str:
    """What the installed flash-attn-4 lacks of what is called here, empty if it is all there."""
    try:
        found = importlib.util.find_spec("flash_attn.cute")
    except ModuleNotFoundError:
        found = None
    if found is None:
        return "flash-attn-4 is not installed; pip install 'mminference-sgl[fa4]'"
    for (module, name), arguments in _CALLED.items():
        try:
            called = getattr(importlib.import_module(module), name)
        except Exception as problem:  # noqa: BLE001 - whatever it raises is why it cannot run
            return f"flash-attn-4 does not import: {type(problem).__name__}: {problem}"
        missing = [argument for argument in arguments if argument not in inspect.signature(called).parameters]
        if missing:
            return f"this flash-attn-4 has another interface: {module}.{name} takes no {', '.join(missing)}"
    return ""


def unsupported(dtype: torch.dtype, head_dim: int, head_dim_v: int, tile_keys: int, major: int) -> str:
    """Why flash-attn-4 does not compute layers of a kind on compute capability ``major``.x, empty if it does.

    ``dtype`` is the query's; pools may be in fp8, as their keys and values are converted when they are put in order.
    """
    if dtype not in _DTYPES:
        return f"it computes in fp16 and bf16, not in {dtype}"
    sizes = head_dim, head_dim_v
    largest = 256 if major == 9 or sizes == (256, 256) else 128
    if any(size % 8 or size > largest for size in sizes):
        return (
            f"it takes head sizes that are multiples of 8 up to {'256' if major == 9 else '128, and 256'}, "
            f"not {head_dim} (values: {head_dim_v})"
        )
    allowed = TILE_KEYS[:1] if major == 9 and max(sizes) > 128 else TILE_KEYS
    if tile_keys not in allowed:
        return f"it takes a tile_keys of {' or '.join(map(str, allowed))} for head size {max(sizes)}, not {tile_keys}"
    return ""


def attend(
    operands: Operands,
    tile_pass: TilePass,
    lists: TileLists,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Attention of one pass; see :class:`.ops.Attend`.

    Raises:
        ImplementationUnavailableError: the operands are of a kind that flash-attn-4 does not take.
    """
    query, order = operands.query, tile_pass.keys
    major = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else CAPABILITIES[0][0]
    reason = unsupported(query.dtype, query.shape[2], operands.value_pool.shape[2], order.tile_keys, major)
    if reason:
        raise ImplementationUnavailableError(f"implementation 'fa4': {reason}; use 'triton'")
    if not tile_pass.num_tiles:
        return
    lanes, positions = lanes_triton.gather(query, tile_pass, lists, padded(tile_pass.lanes))
    part, part_lse = forward(
        lanes,
        *operands.in_order(order, query.dtype)[:2],
        lanes_triton.blocks(tile_pass, lists),
        positions,
        order.positions,
        tile_pass.region,
        operands.scale * operands.key_scale,
        major,
    )
    lanes_triton.scatter(part, part_lse, tile_pass, lists, operands.value_scale, out, lse, merge=merge)


def padded(lanes: int) -> int:
    """Lanes of a tile in memory: a block of :data:`ROWS`, or pairs of them."""
    return ROWS if lanes <= ROWS else -(-lanes // (2 * ROWS)) * 2 * ROWS


def forward(
    lanes: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: Blocks,
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    region: Region,
    scale: float,
    major: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of lanes [T, lanes, G, D] to keys and values [KV heads, key tiles * tile_keys, D] by flash-attn-4.

    ``positions`` int32 [T, lanes] and ``key_positions`` int32 [key tiles, tile_keys] are token positions. Returns the
    output [T, lanes, G, Dv] and the LSE fp32 [T, G, lanes]; 0 and -inf for lanes that see no key.
    """
    interface, lists = importlib.import_module(_INTERFACE), importlib.import_module(_LISTS)
    tiles, rows = positions.shape
    tile_keys = key_positions.shape[1]
    keys, values = (operand.transpose(0, 1)[None].expand(tiles, -1, -1, -1) for operand in (keys, values))
    part, part_lse, *_ = interface._flash_attn_fwd(
        lanes,
        keys,
        values,
        softmax_scale=scale,
        # On Hopper it fits its blocks to those of the lists, on Blackwell it wants to be told.
        tile_mn=None if major == 9 else (ROWS, tile_keys),
        pack_gqa=False,
        mask_mod=masks()[region],
        block_sparse_tensors=lists.BlockSparseTensorsTorch(
            mask_block_cnt=blocks.masked_count,
            mask_block_idx=blocks.masked,
            full_block_cnt=blocks.full_count,
            full_block_idx=blocks.full,
            block_size=(rows, tile_keys),
        ),
        return_lse=True,
        aux_tensors=[positions, key_positions.flatten(), blocks.bounds],
    )
    return part, part_lse


@cache
def masks() -> dict[Region, Callable[..., Any]]:
    """For each region whether a lane sees a key, as flash-attn-4 compiles it into its kernel.

    Indices are vectors of one element; the tensors are those that :func:`forward` passes as ``aux_tensors``.
    """
    import cutlass
    from flash_attn.cute import utils

    def near(tile, head, lane, key, _lengths, tensors):  # type: ignore[no-untyped-def]
        query_pos, key_pos = tensors[0][tile[0], lane[0]], tensors[1][key[0]]
        sink, reach = tensors[2][head[0], tile[0], 0], tensors[2][head[0], tile[0], 1]
        seen = (key_pos <= query_pos) & ((key_pos < sink) | (key_pos > query_pos - reach))
        return utils.scalar_to_ssa(seen, cutlass.Boolean)

    def far(tile, head, lane, key, _lengths, tensors):  # type: ignore[no-untyped-def]
        query_pos, key_pos = tensors[0][tile[0], lane[0]], tensors[1][key[0]]
        sink, reach = tensors[2][head[0], tile[0], 0], tensors[2][head[0], tile[0], 1]
        return utils.scalar_to_ssa((key_pos >= sink) & (key_pos <= query_pos - reach), cutlass.Boolean)

    return {Region.NEAR: near, Region.FAR: far}


def build(
    dtype: torch.dtype,
    head_dim: int,
    tile_keys: int,
    lists_per_kv_head: int,
    major: int,
    numbers: tuple[int, ...] = (1, 2),
) -> None:
    """Compiles both regions' kernels, and keeps them for :func:`attend`.

    ``numbers`` of query tiles: the kernel for one is another than that for any number of several.

    Compiles for the device that is there; without one, for what the environment names (``FLASH_ATTENTION_ARCH`` and
    ``FLASH_ATTENTION_NUM_SMS`` for flash-attn-4, ``CUTE_DSL_ARCH`` for CuTe DSL).

    Raises:
        Exception: whatever flash-attn-4's compilation raises.
    """
    kv_heads, key_tiles = 2, 2
    groups = kv_heads * lists_per_kv_head
    with FakeTensorMode():
        keys = torch.empty(kv_heads, key_tiles * tile_keys, head_dim, dtype=dtype, device="cuda")
        for tiles in numbers:
            lanes = torch.empty(tiles, ROWS, groups, head_dim, dtype=dtype, device="cuda")
            index = torch.empty(groups, tiles, 1, key_tiles, dtype=torch.int32, device="cuda").transpose(0, 1)
            count = torch.empty(groups, tiles, dtype=torch.int32, device="cuda").transpose(0, 1)[..., None]
            bounds = torch.empty(groups, tiles, 2, dtype=torch.int32, device="cuda")
            positions = torch.empty(tiles, ROWS, dtype=torch.int32, device="cuda")
            key_positions = torch.empty(key_tiles, tile_keys, dtype=torch.int32, device="cuda")
            for region in Region:
                blocks = Blocks(count, index, count, index, bounds)
                forward(lanes, keys, keys, blocks, positions, key_positions, region, 1.0, major)
