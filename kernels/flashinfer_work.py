"""Work items of FlashInfer's persistent FA3 paged prefill kernel, filled on the device from tile lists.

Pure functions from a pass and its lists to the arrays that the kernel reads; nothing here waits for the device or needs
FlashInfer. What the arrays mean was read in the sources of flashinfer-python 0.7.2, under ``flashinfer/data``
(:mod:`.flashinfer_sources` tells whether others are the same):

- ``include/flashinfer/attention/scheduler.cuh``, ``PrefillPlanSM90Info``: a plan is nine integers, the byte offsets of
  eight int32 arrays in the int workspace, in the order of :data:`FIELDS`, and whether all heads share one schedule.
- ``csrc/batch_prefill_sm90.cu``, ``BatchPrefillWithPagedKVCacheSM90Run``: takes these arrays from the int workspace at
  the plan's offsets, and ``kv_indices`` from its argument. It uses neither its ``qo_indptr``, ``paged_kv_indptr`` and
  ``paged_kv_last_page_len`` arguments nor the float workspace (but for the device it is on).
- ``include/flashinfer/attention/hopper/tile_scheduler.cuh``, ``BatchPrefillPersistentTileScheduler``: one block per
  multiprocessor; block ``b`` does the items ``work_indptr[b]`` to ``work_indptr[b + 1]``, in that order. An item's
  query head is ``head_indices``, its KV head that divided by the group size: heads of a group are not packed together.
- ``include/flashinfer/attention/hopper/prefill_sm90.cuh``, ``PrefillWithKVCacheKernel``: an item is rows
  ``qo_tile_indices * CTA_Q`` to ``+ CTA_Q`` of the ``qo_lens`` rows that begin at row ``qo_indptr`` of query, output
  and LSE. An item that begins behind its ``qo_lens`` is skipped, one with ``kv_lens`` 0 writes output 0 and LSE -inf.
  ``CTA_Q`` is 192 at head size 64 and 128 at 128 and 256 (``BatchPrefillWithPagedKVCacheDispatched``).
- ``include/flashinfer/attention/hopper/sparse_mainloop.cuh``: key ``i`` of an item is entry ``i % page_size`` of page
  ``kv_indices[kv_indptr + i // page_size]``, and lies at ``page * page_stride + entry * stride_n`` elements from the
  pool's begin, in 64 bits; keys and values have the same strides. Without a mask every row sees all ``kv_lens`` keys.
- ``include/flashinfer/attention/hopper/epilogue.cuh``: only an item's own rows are written. The LSE is [rows, heads]
  fp32, to the base 2 (``attention_updater.cuh``).

Every (head, query tile) list is a request of its own here, with its full tiles as keys. Lists go to blocks by length,
the longest first, in turns that change direction every time; FlashInfer's own plan gives each to the block that has the
least to do, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from .tiles import KeyOrder, TileLists, TilePass

FIELDS = (
    "qo_tile_indices",
    "qo_indptr",
    "kv_indptr",
    "qo_lens",
    "kv_lens",
    "head_indices",
    "work_indptr",
    "batch_indices",
)
"""Arrays of the int workspace, in the order of the plan's offsets."""

INDICES = 1 << 26
"""Page indices of one launch: 256 MiB."""
ENTRIES = 1 << 24
"""List entries of one launch."""


@dataclass(frozen=True)
class Work:
    """One launch: ``workspace`` int32 [8, n], a row per field; ``kv_indices`` int32 [m]: pages of :func:`pages`."""

    workspace: torch.Tensor
    kv_indices: torch.Tensor

    @property
    def plan_info(self) -> list[int]:
        """The plan that finds the rows of the workspace; every head has its own schedule."""
        row_bytes = self.workspace.shape[1] * self.workspace.element_size()
        return [*(index * row_bytes for index in range(len(FIELDS))), 0]


def page_size(keys: KeyOrder) -> int:
    """Keys of a page as the kernel sees them: a tile whose slots are consecutive is one, otherwise each key is."""
    return keys.tile_keys if keys.contiguous else 1


def pages(pool: torch.Tensor, size: int) -> torch.Tensor:
    """A view [n, size, KV heads, D] of a pool [slots, KV heads, D]; page ``s`` begins at slot ``s``.

    Pages overlap, so that a page's index is its first slot, wherever it begins.
    """
    slot, head, element = pool.stride()
    return pool.as_strided((max(0, pool.shape[0] - size + 1), size, *pool.shape[1:]), (slot, slot, head, element))


def masked_rest(lists: TileLists) -> TileLists:
    """The lists without their full tiles."""
    return replace(lists, begin=lists.begin + lists.full, count=lists.count - lists.full, full=lists.full * 0)


def launches(
    tile_pass: TilePass,
    lists: TileLists,
    *,
    cta_rows: int,
    processors: int,
    indices: int = INDICES,
    entries: int = ENTRIES,
) -> Iterator[Work]:
    """The work of a pass's full tiles; each row of the pass and each head is written by exactly one item of one launch.

    Lists are packed one after another, the longest first. One launch takes those that begin in its window, so that what
    it holds is bounded. How many windows there are follows from how much lists can hold and not from what they do, as
    that is known on the device alone; launches behind the last list do nothing.

    Args:
        tile_pass: at least one query tile.
        lists: of at least one head; they may share entries and leave gaps.
        cta_rows: query rows of an item, the kernel's ``CTA_Q``.
        processors: multiprocessors of the device.
        indices: page indices of a launch, not counting those by which its last list reaches beyond its window.
        entries: list entries of a launch, counted likewise.

    Yields:
        Work whose ``kv_indices`` the next one overwrites.

    Raises:
        ValueError: a single list can have more keys than 32-bit indices count.
    """
    keys = tile_pass.keys
    per_tile = 1 if keys.contiguous else keys.tile_keys
    window = max(1, min(indices // per_tile, entries))
    if max(keys.widest * keys.tile_keys, (window + keys.widest) * per_tile) >= 1 << 31:
        raise ValueError(f"a list of {keys.widest} key tiles of {keys.tile_keys} keys is too long for 32-bit indices")
    most = lists.full.numel() * keys.widest
    packed = Packed.of(lists)
    count = most // window + 1
    workspaces = _workspaces(tile_pass, lists, packed, window, count, per_tile, cta_rows, processors)
    held = torch.empty(min(window + keys.widest, max(1, most)) * per_tile, dtype=torch.int32, device=workspaces.device)
    for index in range(count):
        fill(tile_pass, lists, packed, index * window, window, held)
        yield Work(workspaces[index], held)


@dataclass(frozen=True)
class Packed:
    """Lists one after another: ``order`` int64 [L], the longest first, and ``start`` int64 [L], entries before each."""

    order: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(cls, lists: TileLists) -> Packed:
        """By their full tiles."""
        full, order = lists.full.sort(descending=True)
        return cls(order, full.cumsum(0) - full)


def fill(tile_pass: TilePass, lists: TileLists, packed: Packed, first: int, window: int, held: torch.Tensor) -> None:
    """Writes the page indices of the full tiles of the lists that begin at entries ``first`` to ``first + window``.

    ``held`` int32 [m]: entry ``first`` is at its begin; what no list holds is left alone or written with anything.
    """
    if held.device.type == "cuda":
        from . import flashinfer_fill

        flashinfer_fill.fill(tile_pass, lists, packed.order, packed.start, first, window, held)
        return
    if not lists.tiles.numel():
        return
    keys = tile_pass.keys
    slots = (keys.slots[:, :1] if keys.contiguous else keys.slots).int()
    entry = torch.arange(first, first + held.numel() // slots.shape[1], device=held.device)
    which = torch.searchsorted(packed.start, entry, right=True) - 1
    listed = packed.order[which]
    offset = entry - packed.start[which]
    within = offset < lists.full[listed]
    tile = lists.tiles[torch.where(within, lists.begin[listed] + offset, 0)]
    key_tile = keys.tile_indptr[tile_pass.request[listed % tile_pass.num_tiles].long()] + tile
    held.copy_(slots[torch.where(within, key_tile, 0)].flatten())


def _workspaces(
    tile_pass: TilePass,
    lists: TileLists,
    packed: Packed,
    window: int,
    count: int,
    per_tile: int,
    cta_rows: int,
    processors: int,
) -> torch.Tensor:
    """The int workspaces int32 [count, 8, n] of all launches.

    A launch has as many items as all lists together, of which those behind its last list have no rows and are skipped.
    """
    device = packed.start.device
    sub_tiles = -(-tile_pass.tile_queries // cta_rows)
    rounds = -(-packed.order.numel() * sub_tiles // processors)
    firsts = torch.arange(count + 1, device=device) * window
    # The first list of each launch and of the next one: [count, 1].
    bounds = torch.searchsorted(packed.start, firsts)[:, None]
    item = dealt(processors, rounds, device)
    position = bounds[:-1] + item // sub_tiles
    works = position < bounds[1:]
    position = position.clamp_max(packed.order.numel() - 1)
    listed = packed.order[position]
    tile = listed % tile_pass.num_tiles
    row = tile_pass.indptr[tile]
    # In the order of FIELDS.
    fields = (
        (item % sub_tiles).expand_as(listed),
        row,
        torch.where(works, (packed.start[position] - firsts[:-1, None]) * per_tile, 0),
        torch.where(works, tile_pass.indptr[tile + 1] - row, 0),
        lists.full[listed] * tile_pass.keys.tile_keys,
        listed // tile_pass.num_tiles,
        (torch.arange(processors + 1, device=device) * rounds).expand(count, -1),
    )
    width = max(rounds * processors, processors + 1)
    # Rows begin at multiples of 16 bytes, as FlashInfer's own do.
    workspaces = torch.zeros(count, len(FIELDS), -(-width // 4) * 4, dtype=torch.int32, device=device)
    for index, values in enumerate(fields):
        workspaces[:, index, : values.shape[1]] = values
    return workspaces


def dealt(processors: int, rounds: int, device: torch.device) -> torch.Tensor:
    """Items int64 [processors * rounds] of block after block, dealt in rounds that change direction every time."""
    turn = torch.arange(rounds, device=device)
    block = torch.arange(processors, device=device)[:, None]
    return (turn * processors + torch.where(turn % 2 == 0, block, processors - 1 - block)).flatten()
