"""The search of :mod:`.search` in Triton: a few launches for all heads, and nothing waits for the device.

:func:`rows_kernel` tells what each probe row would lose in all, :func:`candidates_kernel` what of it each candidate
holds, which gives its level, and :func:`tiles_kernel` the level of every tile. For the curves :func:`lost_kernel` sums
what each row loses at every threshold and :func:`counts_kernel` counts tiles.

Sums over thresholds compare each tile with all 64 of them: ``64 * H * (P * HELD + t) * n`` operations, which
arithmetic units do in less time than sorting would take. Memory traffic: what tiles hold, fp32 [HELD, H, P, n], three
times; levels, one byte per tile, written once and read twice; ``256 * H * (P * HELD + t)`` bytes of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import levels as scale
from . import search
from .choice import CellTiles, CellView, SlashTiles
from .launch_table import OPTIONS
from .levels import TINY, Curves
from .probe_triton import CHANNELS_ALL, CHANNELS_HELD

ALWAYS = tl.constexpr(scale.ALWAYS)
PER_OCTAVE = tl.constexpr(scale.PER_OCTAVE)
FAIR = tl.constexpr(scale.FAIR)
THRESHOLDS = tl.constexpr(scale.LEVELS + 1)
LEAST = tl.constexpr(scale.LEAST)
TINIEST = tl.constexpr(TINY)
NUMBERS = ["rows", "turns", "query_tiles", "tiles", "candidates", "bands", "always", "margin"]
"""Arguments that change from chunk to chunk; specialised on, they would have kernels compiled while serving."""
PARTS_OF_A_BATCH = ["p_low", "p_high"]
"""Arguments that begin anywhere in memory, as a request's query tiles do in a batch's; the same holds for alignment."""
BLOCK = 256
"""Key tiles at a time."""
BLOCK_BANDS = 512
"""Bands and the neighbours, at most one more than probe rows, whose default is 256."""
BLOCK_COUNTED = 64
"""Key tiles at a time where each is compared with every threshold."""


@triton.jit
def lost_energy(b_energy, b_mass, size):
    """Energy that a row loses without keys of this mass and energy of deviations; ``_loss`` in :mod:`.search`."""
    b_square, b_rest = b_mass * b_mass, 1.0 - b_mass
    return (b_energy + b_square * b_square * size * (LEAST * LEAST)) / (b_rest * b_rest + LEAST * LEAST)


@triton.jit
def loose_energy(p_held, size, channel, o_tile, tiles, always, low, high):
    """Energy that a row loses with each key tile alone, see ``_loss`` in :mod:`.search`.

    None where it is read anyhow: before ``always`` and ``[low, high)``. ``size``: squared length of the row's output.

    ``p_held``: the row's masses; its projections lie ``channel`` entries apart behind them.
    """
    m_loose = (o_tile >= always) & (o_tile < tiles) & ((o_tile < low) | (o_tile >= high)) & (o_tile >= 0)
    b_energy = tl.zeros(o_tile.shape, tl.float32)
    for i_channel in tl.static_range(1, CHANNELS_HELD):
        b_held = tl.load(p_held + i_channel * channel + o_tile, mask=m_loose, other=0.0)
        b_energy += b_held * b_held
    b_mass = tl.load(p_held + o_tile, mask=m_loose, other=0.0)
    return lost_energy(b_energy, b_mass, size)


@triton.jit
def query_tile(p_low, p_high, i_tile, margin):
    """Key tiles ``[low - margin, high)`` that a query tile reads anyhow, and ``high - low``."""
    low = tl.load(p_low + i_tile).to(tl.int32)
    high = tl.load(p_high + i_tile).to(tl.int32)
    return low - margin, high, high - low


@triton.jit
def level_of(b_energy, b_cost, causal, allowed):
    """Level of a candidate's energy per tile, -1 for none."""
    b_gain = tl.maximum(b_energy * (causal / b_cost.to(tl.float32)) / allowed, TINIEST)
    b_level = tl.floor(tl.log2(b_gain) * PER_OCTAVE) + FAIR
    b_level = tl.minimum(tl.maximum(b_level, 0.0), ALWAYS - 1.0)
    return tl.where(b_energy > 0, b_level, -1.0).to(tl.int8)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS_OF_A_BATCH)
def rows_kernel(
    p_held,
    p_size,
    p_row_of,
    p_low,
    p_high,
    p_row_tile,
    p_share,
    p_loose,
    p_beside,
    tiles,
    always,
    margin,
    BLOCK: tl.constexpr,
):
    """One (probe row, head): energy that it loses without all loose tiles, and its share in what each alone costs.

    ``p_beside``: the part of it in tiles beside the own ones. See ``_shared_out`` in :mod:`.search`.
    """
    i_row, i_head, rows = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    i_index = i_head * rows + i_row
    low, high, width = query_tile(p_low, p_high, tl.load(p_row_tile + tl.load(p_row_of + i_index)), margin)
    channel, size = tl.num_programs(1).to(tl.int64) * rows * tiles, tl.load(p_size + i_index)
    p_held += i_index * tiles
    o_c = tl.arange(0, CHANNELS_ALL)
    b_sums = tl.zeros([CHANNELS_ALL], tl.float32)
    b_alone = tl.zeros([BLOCK], tl.float32)
    b_beside = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        m_loose = (o_tile >= always) & (o_tile < tiles) & ((o_tile < low) | (o_tile >= high))
        m_held = m_loose[:, None] & (o_c < CHANNELS_HELD)[None, :]
        b_sums += tl.sum(tl.load(p_held + o_c[None, :] * channel + o_tile[:, None], mask=m_held, other=0.0), 0)
        b_energy = loose_energy(p_held, size, channel, o_tile, tiles, always, low, high)
        b_alone += b_energy
        b_beside += tl.where((o_tile >= low - width) & (o_tile < high + width), b_energy, 0.0)
    b_mass = tl.sum(tl.where(o_c == 0, b_sums, 0.0), 0)
    together = lost_energy(tl.sum(tl.where(o_c == 0, 0.0, b_sums * b_sums), 0), b_mass, size)
    share = together / tl.maximum(tl.sum(b_alone, 0), TINIEST)
    tl.store(p_share + i_index, share)
    tl.store(p_loose + i_index, share * tl.sum(b_alone, 0))
    tl.store(p_beside + i_index, share * tl.sum(b_beside, 0))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS_OF_A_BATCH)
def candidates_kernel(
    p_held,
    p_size,
    p_row_of,
    p_low,
    p_high,
    p_row_tile,
    p_row_own,
    p_band_of_row,
    p_share,
    p_loose,
    p_beside,
    p_cost,
    p_causal,
    p_allowed,
    p_levels,
    rows,
    turns,
    tiles,
    candidates,
    bands,
    always,
    margin,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BANDS: tl.constexpr,
):
    """Levels of one head's candidates: columns and diagonals, or v-lines and in the last block bands and neighbours."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    causal, allowed = tl.load(p_causal).to(tl.float32), tl.load(p_allowed + i_head)
    channel = tl.num_programs(1).to(tl.int64) * rows * tiles
    p_levels += i_head * candidates
    o_tile = i_block * BLOCK + tl.arange(0, BLOCK)
    if i_block * BLOCK < tiles:
        b_column = tl.zeros([BLOCK], tl.float32)
        b_diagonal = tl.zeros([BLOCK], tl.float32)
        for i_row in tl.range(0, rows):
            i_index = i_head * rows + i_row
            row = tl.load(p_row_of + i_index)
            low, high, _ = query_tile(p_low, p_high, tl.load(p_row_tile + row), margin)
            p_row, size, share = p_held + i_index * tiles, tl.load(p_size + i_index), tl.load(p_share + i_index)
            b_column += share * loose_energy(p_row, size, channel, o_tile, tiles, always, low, high)
            if not LINES:
                o_key = tl.load(p_row_own + row).to(tl.int32) - o_tile
                b_diagonal += share * loose_energy(p_row, size, channel, o_key, tiles, always, low, high)
        m_tile = o_tile < tiles
        b_cost = tl.load(p_cost + o_tile, mask=m_tile, other=1)
        tl.store(p_levels + o_tile, level_of(b_column / rows, b_cost, causal, allowed), mask=m_tile)
        if not LINES:
            b_cost = tl.load(p_cost + tiles + o_tile, mask=m_tile, other=1)
            tl.store(p_levels + tiles + o_tile, level_of(b_diagonal / rows, b_cost, causal, allowed), mask=m_tile)
    elif LINES:
        p_row_of += i_head * rows
        p_loose += i_head * rows
        p_beside += i_head * rows
        o_band = tl.arange(0, BLOCK_BANDS)
        b_band = tl.zeros([BLOCK_BANDS], tl.float32)
        for i_row in tl.range(0, rows):
            band = tl.load(p_band_of_row + tl.load(p_row_of + i_row))
            # Bands are those of all rows, of which the head has one in so many.
            b_band += tl.where(o_band == band, tl.load(p_loose + i_row) / turns, 0.0)
            b_band += tl.where(o_band == bands, tl.load(p_beside + i_row), 0.0)
        m_band = o_band <= bands
        b_band_cost = tl.load(p_cost + tiles + o_band, mask=m_band, other=1)
        tl.store(p_levels + tiles + o_band, level_of(b_band / rows, b_band_cost, causal, allowed), mask=m_band)


@triton.jit
def level_of_tiles(p_levels, o_tile, tiles, low, high, width, margin, band, bands, always, LINES: tl.constexpr):
    """Levels of key tiles for a query tile: the highest of the candidates each is in, or ALWAYS."""
    m_tile = o_tile < tiles
    b_level = tl.load(p_levels + o_tile, mask=m_tile, other=-1).to(tl.int32)
    if LINES:
        o_band = band - 1 + tl.arange(0, 4)
        m_band = (o_band >= 0) & (o_band < bands) & (o_band <= band + 1)
        b_band = tl.load(p_levels + tiles + o_band, mask=m_band, other=-1).to(tl.int32)
        b_level = tl.maximum(b_level, tl.max(b_band, 0))
        m_beside = (o_tile >= low - width) & (o_tile < high + width)
        beside = tl.load(p_levels + tiles + bands).to(tl.int32)
        b_level = tl.where(m_beside, tl.maximum(b_level, beside), b_level)
    else:
        for i_step in tl.range(0, width):
            o_diagonal = low + margin - o_tile + i_step
            m_diagonal = (o_diagonal >= 0) & (o_diagonal < tiles) & m_tile
            b_level = tl.maximum(
                b_level, tl.load(p_levels + tiles + o_diagonal, mask=m_diagonal, other=-1).to(tl.int32)
            )
    return tl.where((o_tile < always) | ((o_tile >= low) & (o_tile < high)), ALWAYS, b_level)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS_OF_A_BATCH)
def tiles_kernel(
    p_low,
    p_high,
    p_bands,
    p_visible,
    p_levels,
    p_tile_levels,
    tiles,
    candidates,
    bands,
    always,
    margin,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One (query tile, list): level of each key tile, ``p_tile_levels`` [G, t, n], -1 where it may not be read."""
    i_tile, i_head, query_tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    low, high, width = query_tile(p_low, p_high, i_tile, margin)
    band = 0
    if LINES:
        band = tl.load(p_bands + i_tile).to(tl.int32)
    p_levels += i_head * candidates
    p_visible += i_tile.to(tl.int64) * tiles
    p_tile_levels += (i_head * query_tiles + i_tile) * tiles
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        m_tile = o_tile < tiles
        b_level = level_of_tiles(p_levels, o_tile, tiles, low, high, width, margin, band, bands, always, LINES)
        m_visible = tl.load(p_visible + o_tile, mask=m_tile, other=0) != 0
        tl.store(p_tile_levels + o_tile, tl.where(m_visible, b_level, -1).to(tl.int8), mask=m_tile)


@triton.jit(do_not_specialize=NUMBERS)
def lost_kernel(
    p_held,
    p_size,
    p_levels,
    p_row_tile,
    p_error,
    p_kept,
    tiles,
    stride_list,
    SHARING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One (probe row, head): error energy and kept mass at every threshold, ``p_error``, ``p_kept`` [H, P, THRESHOLDS].

    ``p_levels`` [G, t, n], ``stride_list`` apart by list.
    """
    i_row, i_head, rows = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    i_index = i_head * rows + i_row
    channel = tl.num_programs(1).to(tl.int64) * rows * tiles
    p_levels += i_head // SHARING * stride_list + tl.load(p_row_tile + i_index) * tiles
    o_threshold, o_c = tl.arange(0, THRESHOLDS), tl.arange(0, CHANNELS_ALL)
    b_lost = tl.zeros([THRESHOLDS, CHANNELS_ALL], tl.float32)
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        m_tile = o_tile < tiles
        b_level = tl.load(p_levels + o_tile, mask=m_tile, other=ALWAYS).to(tl.int32)
        m_held = m_tile[:, None] & (o_c < CHANNELS_HELD)[None, :]
        p_held_at = p_held + o_c[None, :] * channel + i_index * tiles + o_tile[:, None]
        b_held = tl.load(p_held_at, mask=m_held, other=0.0)
        b_below = (b_level[None, :] < o_threshold[:, None]).to(tl.float32)
        b_lost = tl.dot(b_below, b_held, b_lost, input_precision="ieee")
    b_kept = 1.0 - tl.sum(tl.where(o_c[None, :] == 0, b_lost, 0.0), 1)
    b_energy = tl.sum(tl.where(o_c[None, :] == 0, 0.0, b_lost * b_lost), 1)
    b_error = lost_energy(b_energy, 1.0 - b_kept, tl.load(p_size + i_index))
    tl.store(p_error + i_index * THRESHOLDS + o_threshold, b_error)
    tl.store(p_kept + i_index * THRESHOLDS + o_threshold, b_kept)


@triton.jit(do_not_specialize=NUMBERS)
def counts_kernel(p_levels, p_counts, tiles, stride_list, BLOCK: tl.constexpr):
    """One (query tile, list): tiles that reach each threshold, ``p_counts`` int32 [G, t, THRESHOLDS]."""
    i_tile, i_list, query_tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    p_levels += i_list * stride_list + i_tile.to(tl.int64) * tiles
    o_threshold = tl.arange(0, THRESHOLDS)
    b_count = tl.zeros([BLOCK, THRESHOLDS], tl.int32)
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        b_level = tl.load(p_levels + o_tile, mask=o_tile < tiles, other=-1).to(tl.int32)
        b_count += tl.where(b_level[:, None] >= o_threshold[None, :], 1, 0)
    tl.store(p_counts + (i_list * query_tiles + i_tile) * THRESHOLDS + o_threshold, tl.sum(b_count, 0))


def columns_and_diagonals(
    held: torch.Tensor,
    size: torch.Tensor,
    row_of: torch.Tensor,
    slash: SlashTiles,
    causal: torch.Tensor,
    allowed: torch.Tensor,
    *,
    sharing: int = 1,
) -> torch.Tensor:
    """See :func:`.search.columns_and_diagonals`."""
    return _levels(
        held,
        size,
        row_of,
        low=slash.first,
        high=slash.last + 1,
        row_tiles=slash.row_tiles,
        row_own=slash.row_own,
        bands=None,
        band_of_row=None,
        visible=slash.causal,
        cost=slash.cost,
        causal=causal,
        allowed=allowed,
        always=slash.sink_tiles,
        margin=slash.window_tiles,
        min_lines=0,
        sharing=sharing,
    )


def lines(
    held: torch.Tensor,
    size: torch.Tensor,
    row_of: torch.Tensor,
    cell: CellView,
    tiles: CellTiles,
    causal: torch.Tensor,
    allowed: torch.Tensor,
    *,
    min_lines: int,
    sharing: int = 1,
) -> torch.Tensor:
    """See :func:`.search.lines`."""
    return _levels(
        held,
        size,
        row_of,
        low=cell.own_lo,
        high=cell.own_hi,
        row_tiles=cell.row_tiles,
        row_own=None,
        bands=cell.bands,
        band_of_row=cell.band_of_row,
        visible=tiles.visible,
        cost=tiles.cost,
        causal=causal,
        allowed=allowed,
        always=0,
        margin=0,
        min_lines=min_lines,
        sharing=sharing,
    )


def curves(held: torch.Tensor, size: torch.Tensor, levels: torch.Tensor, row_tiles: torch.Tensor) -> Curves:
    """See :func:`.search.curves`."""
    held, size = held.contiguous(), size.contiguous()
    heads, rows, tiles = held.shape[1:]
    lists, query_tiles = levels.shape[:2]
    if levels.stride()[1:] != (tiles, 1):
        levels = levels.contiguous()
    error, kept = (held.new_empty(heads, rows, scale.LEVELS + 1) for _ in range(2))
    counts = torch.empty(lists, query_tiles, scale.LEVELS + 1, dtype=torch.int32, device=held.device)
    lost_kernel[rows, heads](
        held,
        size,
        levels,
        row_tiles,
        error,
        kept,
        tiles,
        levels.stride(0),
        SHARING=heads // lists,
        BLOCK=BLOCK_COUNTED,
        **OPTIONS,
    )
    counts_kernel[query_tiles, lists](levels, counts, tiles, levels.stride(0), BLOCK=BLOCK_COUNTED, **OPTIONS)
    return Curves(error.mean(1), kept.mean(1), counts.sum(1))


def _levels(
    held: torch.Tensor,
    size: torch.Tensor,
    row_of: torch.Tensor,
    *,
    low: torch.Tensor,
    high: torch.Tensor,
    row_tiles: torch.Tensor,
    row_own: torch.Tensor | None,
    bands: torch.Tensor | None,
    band_of_row: torch.Tensor | None,
    visible: torch.Tensor,
    cost: torch.Tensor,
    causal: torch.Tensor,
    allowed: torch.Tensor,
    always: int,
    margin: int,
    min_lines: int,
    sharing: int,
) -> torch.Tensor:
    """The launches; ``row_own`` is there for columns and diagonals, ``bands`` and ``band_of_row`` for lines.

    A query tile reads key tiles ``[low - margin, high)`` and those before ``always`` anyhow.
    """
    is_lines, held, size = row_own is None, held.contiguous(), size.contiguous()
    heads, rows, tiles = held.shape[1:]
    query_tiles, candidates = visible.shape[0], cost.numel()
    num_bands = candidates - tiles - 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(heads, *shape, dtype=dtype, device=held.device)

    tables = held, size, row_of, low, high, row_tiles
    by_row = empty(rows), empty(rows), empty(rows)
    rows_kernel[rows, heads](*tables, *by_row, tiles, always, margin, BLOCK=BLOCK, **OPTIONS)
    levels = empty(candidates, dtype=torch.int8)
    numbers = tiles, candidates, num_bands, always, margin
    candidates_kernel[triton.cdiv(tiles, BLOCK) + is_lines, heads](
        *tables,
        row_own,
        band_of_row,
        *by_row,
        cost,
        causal,
        allowed,
        levels,
        rows,
        row_tiles.numel() // rows,
        *numbers,
        LINES=is_lines,
        BLOCK=BLOCK,
        BLOCK_BANDS=max(BLOCK_BANDS, triton.next_power_of_2(num_bands + 1)) if is_lines else 1,
        **OPTIONS,
    )
    if min_lines:
        search.take_lines(levels[:, :tiles], min_lines)
    levels = search.shared(levels, sharing)
    tile_levels = torch.empty(levels.shape[0], query_tiles, tiles, dtype=torch.int8, device=held.device)
    tiles_kernel[query_tiles, levels.shape[0]](
        low, high, bands, visible, levels, tile_levels, *numbers, LINES=is_lines, BLOCK=BLOCK, **OPTIONS
    )
    return tile_levels
