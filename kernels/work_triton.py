"""How the lists of a pass are started, in Triton: what kernels read of a pass, the lanes of its lists, their order.

Lists start in an order in which neighbours share what is in L2. The end of a list of more than :data:`SPLIT` tiles is
left to other programs: one list would keep one processor busy after all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl

from .launch_table import OPTIONS
from .tables import Fields, Table, address, number, upload
from .tiles import Region, Started, TileLists, TilePass, Work

SPLIT = 2048
"""Key tiles of a list that one program reads at most, where others can be had for the rest: 2 ms on a processor."""
SPLIT_PIECES = 512
"""Most programs for such rests; their output is held at a time."""
NEIGHBOURS = 16
"""Query tiles whose lists start together, before those of the next ones."""
BLOCK_ORDERED = 128
"""Lists at a time that are put in order."""
PASS = Fields(
    "rows positions indptr request order first until begin count full tiles sink reach given done"
    " query_tiles sharing lists pieces piece_first"
)
"""A pass, its lists and how they start: the tensors of :class:`.tiles.TilePass`, :class:`.tiles.TileLists` and
:class:`.tiles.Work`; ``piece_first``: where its pieces lie among those of a launch."""


@triton.jit
def lanes_of(p_pass, i_list, lane_first, BLOCK_M: tl.constexpr):
    """Some lanes of a list: their place among the pass's rows, batch row, head, and whether they have a row."""
    query_tiles, sharing = number(p_pass, PASS.query_tiles), number(p_pass, PASS.sharing)
    p_row_indptr = address(p_pass, PASS.indptr, tl.int32) + i_list % query_tiles
    o_lane = lane_first + tl.arange(0, BLOCK_M)
    o_row = tl.load(p_row_indptr) + o_lane // sharing
    m_row = o_row < tl.load(p_row_indptr + 1)
    b_row = tl.load(address(p_pass, PASS.rows, tl.int64) + o_row, mask=m_row, other=0)
    b_head = (i_list // query_tiles * sharing + o_lane % sharing).to(tl.int64)
    return o_row, b_row, b_head, m_row


@triton.jit
def load_rows(p_rows, m_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns ``FIRST`` to ``FIRST + WIDTH`` of the rows that begin at ``p_rows``, 0 where ``m_row`` is not."""
    o_d = FIRST + tl.arange(0, WIDTH)
    return tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(p_rows, b_block, m_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes columns ``FIRST`` to ``FIRST + WIDTH`` of the rows that begin at ``p_rows``."""
    o_d = FIRST + tl.arange(0, WIDTH)
    m_out = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    tl.store(p_rows[:, None] + o_d[None, :], b_block.to(p_rows.dtype.element_ty), mask=m_out)


@triton.jit
def merged(b_out, b_lse, b_part, b_part_lse):
    """Attention over the keys of both, fp32 [lanes, D] and LSE [lanes]; a lane may see none, and then has -inf."""
    b_top = tl.maximum(b_lse, b_part_lse)
    b_shift = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_old, b_new = tl.exp(b_lse - b_shift), tl.exp(b_part_lse - b_shift)
    b_sum = b_old + b_new
    b_share = b_new / tl.where(b_sum > 0, b_sum, 1.0)
    return b_out + (b_part - b_out) * b_share[:, None], b_shift + tl.log(b_sum)


@triton.jit
def put_in_order(p_pass, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """The order in which the lists of one pass start; see :class:`.tiles.Work`.

    First those of more than twice the mean length, so that none of them is what all others wait for, then the others:
    both as in the order of memory that is given. The rests of lists of more than ``SPLIT`` tiles come before all.
    """
    p_count, p_given = address(p_pass, PASS.count, tl.int32), address(p_pass, PASS.given, tl.int32)
    p_order = address(p_pass, PASS.order, tl.int32)
    p_first, p_until = address(p_pass, PASS.first, tl.int32), address(p_pass, PASS.until, tl.int32)
    lists, pieces = number(p_pass, PASS.lists), number(p_pass, PASS.pieces)
    total, longer = 0.0, 0
    for first in tl.range(0, lists, BLOCK):
        o_list = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(p_count + o_list, mask=o_list < lists, other=0).to(tl.float32), 0)
    limit = 2 * total / lists
    for first in tl.range(0, lists, BLOCK):
        o_list = first + tl.arange(0, BLOCK)
        b_count = tl.load(p_count + o_list, mask=o_list < lists, other=0)
        longer += tl.sum((b_count.to(tl.float32) > limit).to(tl.int32), 0)
    for first in tl.range(0, pieces, BLOCK):
        o_piece = first + tl.arange(0, BLOCK)
        tl.store(p_order + o_piece, 0, mask=o_piece < pieces)
        tl.store(p_first + o_piece, 0, mask=o_piece < pieces)
        tl.store(p_until + o_piece, 0, mask=o_piece < pieces)
    tl.debug_barrier()
    at_long, at_other, at_piece = pieces, pieces + longer, 0
    for first in tl.range(0, lists, BLOCK):
        o_at = first + tl.arange(0, BLOCK)
        m_list = o_at < lists
        b_list = tl.load(p_given + o_at, mask=m_list, other=0)
        b_count = tl.load(p_count + b_list, mask=m_list, other=0)
        b_long = (m_list & (b_count.to(tl.float32) > limit)).to(tl.int32)
        b_other = m_list.to(tl.int32) - b_long
        o_work = at_long + tl.cumsum(b_long, 0) - b_long
        o_work = tl.where(b_long == 1, o_work, at_other + tl.cumsum(b_other, 0) - b_other)
        b_rests = tl.where(b_count > SPLIT, (b_count - 1) // SPLIT, 0)
        o_piece = at_piece + tl.cumsum(b_rests, 0) - b_rests
        # Lists whose rests find no programs are read by one.
        b_rests = tl.where(o_piece + b_rests <= pieces, b_rests, 0)
        tl.store(p_order + o_work, b_list, mask=m_list)
        tl.store(p_first + o_work, 0, mask=m_list)
        tl.store(p_until + o_work, tl.where(b_rests > 0, SPLIT, b_count), mask=m_list)
        for i_rest in tl.range(0, tl.max(b_rests, 0)):
            m_rest, b_from = i_rest < b_rests, (i_rest + 1) * SPLIT
            tl.store(p_order + o_piece + i_rest, b_list, mask=m_rest)
            tl.store(p_first + o_piece + i_rest, b_from, mask=m_rest)
            tl.store(p_until + o_piece + i_rest, tl.minimum(b_from + SPLIT, b_count), mask=m_rest)
        at_long += tl.sum(b_long, 0)
        at_other += tl.sum(b_other, 0)
        at_piece = tl.max(tl.where(b_rests > 0, o_piece + b_rests, at_piece), 0)


@triton.jit
def order_kernel(p_pass, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Puts the lists of one pass in order that no selection has written."""
    put_in_order(p_pass, SPLIT, BLOCK)


def room_for_work(tile_pass: TilePass, group: int, new: Callable[..., torch.Tensor], lists: int) -> Work:
    """Memory for the order in which a pass's lists start, so many of each query tile; ``group``: heads of a KV head.

    ``new`` makes room for a shape and a dtype.
    """
    number, tile = (torch.arange(size, device=tile_pass.rows.device) for size in (lists, tile_pass.num_tiles))
    # What starts together reads the same keys: those of a KV head and, within it, of neighbouring query tiles.
    neighbours = -(-tile_pass.num_tiles // NEIGHBOURS)
    place = (number[:, None] * tile_pass.sharing // group * neighbours + tile // NEIGHBOURS).flatten()
    pieces = min(place.numel() * (-(-tile_pass.keys.widest // SPLIT) - 1), SPLIT_PIECES)
    order, first, until = (new(pieces + place.numel(), dtype=torch.int32) for _ in range(3))
    return Work(order, first, until, place.argsort(stable=True).int(), pieces)


def as_they_lie(lists: TileLists) -> Work:
    """Lists in the order of memory, none in pieces."""
    order = torch.arange(lists.count.numel(), dtype=torch.int32, device=lists.count.device)
    return Work(order, lists.count, lists.count, order)


def start(passes: Sequence[tuple[TilePass, TileLists]]) -> list[tuple[TilePass, TileLists]]:
    """Passes whose lists have work, with one launch for all over the same keys, which is that of the first."""
    result = list(passes)
    for region in Region:
        own = [(index, *one) for index, one in enumerate(passes) if one[0].region is region]
        table, programs, pieces, lanes = Table(PASS), 0, 0, 0
        for _, tile_pass, lists in own:
            work = lists.work
            assert work is not None
            table.add(
                **{name: getattr(tile_pass, name) for name in ("rows", "positions", "indptr", "request", "sharing")},
                **{name: getattr(lists, name) for name in ("begin", "count", "full", "tiles", "sink", "reach")},
                **{name: getattr(work, name) for name in ("order", "first", "until", "given", "pieces")},
                done=torch.zeros(1, dtype=torch.int32, device=lists.count.device),
                query_tiles=tile_pass.num_tiles,
                lists=lists.count.numel(),
                piece_first=pieces,
            )
            pieces += work.pieces
            programs, lanes = max(programs, work.order.numel()), max(lanes, tile_pass.lanes)
        if own:
            (rows,) = upload([table], own[0][1].rows.device)
            launches = [Started(rows, programs, pieces, lanes), *[Started(rows[:0], 0, 0, 0)] * (len(own) - 1)]
            for (index, tile_pass, lists), row, launch in zip(own, rows.view(len(own), -1), launches, strict=True):
                assert lists.work is not None
                work = replace(lists.work, row=row, started=launch, kept=table.kept)
                result[index] = tile_pass, replace(lists, work=work)
    return result


def row_of(tile_pass: TilePass, lists: TileLists) -> torch.Tensor:
    """What kernels read of a pass, int64 [PASS.width]; lists that no selection has put in order start as they lie."""
    if lists.work is None:
        ((_, lists),) = start([(tile_pass, replace(lists, work=as_they_lie(lists)))])
    assert lists.work is not None
    assert lists.work.row is not None
    return lists.work.row


def put(tile_pass: TilePass, lists: TileLists, group: int) -> TileLists:
    """Lists that no selection has put in order, in order; ``group``: query heads of a KV head."""
    new = partial(torch.empty, device=tile_pass.rows.device)
    work = room_for_work(tile_pass, group, new, lists.sink.shape[0])
    ((_, lists),) = start([(tile_pass, replace(lists, work=work))])
    assert lists.work is not None
    order_kernel[1,](lists.work.row, SPLIT=SPLIT, BLOCK=BLOCK_ORDERED, **OPTIONS)
    return lists
