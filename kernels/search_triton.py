"""The search of :mod:`.search` in Triton: five launches for all heads, and nothing waits for the device.

:func:`rows_kernel` sums what each probe row lacks, :func:`candidates_kernel` the useful mass of each candidate, which
gives its level; :func:`reached_kernel` what each row has at every threshold, :func:`tiles_kernel` the level of every
tile and how many reach each threshold; :func:`decide_kernel` picks the threshold of each head.

Sums over thresholds compare each tile with all 64 of them: ``64 * H * (P + t) * n`` comparisons, which arithmetic units
do in less time than sorting would take. Memory traffic: the mass, fp32 [H, P, n], three times; levels, one byte per
tile, written once; ``256 * H * (P + t)`` bytes of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import search
from .choice import SLACK, CellTiles, CellView, Limits, SlashTiles
from .launch_table import OPTIONS
from .search import Found

ALWAYS = tl.constexpr(search.ALWAYS)
PER_OCTAVE = tl.constexpr(search.PER_OCTAVE)
WORTH = tl.constexpr(search.WORTH)
THRESHOLDS = tl.constexpr(search.LEVELS + 1)
NUMBERS = ["rows", "query_tiles", "tiles", "candidates", "bands", "always", "margin", "worth"]
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
def loose_mass(p_mass, o_tile, tiles, always, low, high):
    """Mass of a row by key tile; none where it is read anyhow: before ``always`` and from ``low`` to ``high``."""
    b_mass = tl.load(p_mass + o_tile, mask=(o_tile >= 0) & (o_tile < tiles), other=0.0)
    return tl.where((o_tile < always) | ((o_tile >= low) & (o_tile < high)), 0.0, b_mass)


@triton.jit
def query_tile(p_low, p_high, i_tile, margin):
    """Key tiles ``[low - margin, high)`` that a query tile reads anyhow, and ``high - low``."""
    low = tl.load(p_low + i_tile).to(tl.int32)
    high = tl.load(p_high + i_tile).to(tl.int32)
    return low - margin, high, high - low


@triton.jit
def level_of(b_mass, b_cost, causal, min_gain):
    """Level of a candidate's mass per tile, -1 for none."""
    b_gain = b_mass * (causal / b_cost.to(tl.float32) / min_gain)
    b_level = tl.floor(tl.log2(tl.where(b_gain > 0, b_gain, 1.0)) * PER_OCTAVE) + WORTH
    b_level = tl.minimum(tl.maximum(b_level, 0.0), ALWAYS - 1.0)
    return tl.where(b_mass > 0, b_level, -1.0).to(tl.int8)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS_OF_A_BATCH)
def rows_kernel(
    p_mass,
    p_low,
    p_high,
    p_row_tile,
    p_loose,
    p_beside,
    tiles,
    always,
    margin,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One (probe row, head): mass in tiles that are not read anyhow, and that beside the own ones."""
    i_row, i_head, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    low, high, width = query_tile(p_low, p_high, tl.load(p_row_tile + i_row), margin)
    i_index = i_head.to(tl.int64) * rows + i_row
    b_loose = tl.zeros([BLOCK], tl.float32)
    b_beside = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        b_mass = loose_mass(p_mass + i_index * tiles, o_tile, tiles, always, low, high)
        b_loose += b_mass
        if LINES:
            b_beside += tl.where((o_tile >= low - width) & (o_tile < high + width), b_mass, 0.0)
    tl.store(p_loose + i_index, tl.sum(b_loose, 0))
    if LINES:
        tl.store(p_beside + i_index, tl.sum(b_beside, 0))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS_OF_A_BATCH)
def candidates_kernel(
    p_mass,
    p_low,
    p_high,
    p_row_tile,
    p_row_own,
    p_band_of_row,
    p_loose,
    p_beside,
    p_cost,
    p_causal,
    p_levels,
    rows,
    tiles,
    candidates,
    bands,
    always,
    margin,
    target,
    min_gain,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BANDS: tl.constexpr,
):
    """Levels of one head's candidates: columns and diagonals, or v-lines and in the last block bands and neighbours."""
    i_block, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    causal = tl.load(p_causal).to(tl.float32)
    p_levels += i_head * candidates
    p_loose += i_head * rows
    p_beside += i_head * rows
    o_tile = i_block * BLOCK + tl.arange(0, BLOCK)
    if i_block * BLOCK < tiles:
        b_column = tl.zeros([BLOCK], tl.float32)
        b_diagonal = tl.zeros([BLOCK], tl.float32)
        for i_row in tl.range(0, rows):
            low, high, _ = query_tile(p_low, p_high, tl.load(p_row_tile + i_row), margin)
            need = tl.maximum(target - 1.0 + tl.load(p_loose + i_row), 0.0)
            p_row = p_mass + (i_head * rows + i_row) * tiles
            b_column += tl.minimum(loose_mass(p_row, o_tile, tiles, always, low, high), need)
            if not LINES:
                o_key = tl.load(p_row_own + i_row).to(tl.int32) - o_tile
                b_diagonal += tl.minimum(loose_mass(p_row, o_key, tiles, always, low, high), need)
        m_tile = o_tile < tiles
        b_cost = tl.load(p_cost + o_tile, mask=m_tile, other=1)
        tl.store(p_levels + o_tile, level_of(b_column / rows, b_cost, causal, min_gain), mask=m_tile)
        if not LINES:
            b_cost = tl.load(p_cost + tiles + o_tile, mask=m_tile, other=1)
            tl.store(p_levels + tiles + o_tile, level_of(b_diagonal / rows, b_cost, causal, min_gain), mask=m_tile)
    elif LINES:
        o_band = tl.arange(0, BLOCK_BANDS)
        b_band = tl.zeros([BLOCK_BANDS], tl.float32)
        for i_row in tl.range(0, rows):
            loose = tl.load(p_loose + i_row)
            need = tl.maximum(target - 1.0 + loose, 0.0)
            b_band += tl.where(o_band == tl.load(p_band_of_row + i_row), tl.minimum(loose, need), 0.0)
            b_band += tl.where(o_band == bands, tl.minimum(tl.load(p_beside + i_row), need), 0.0)
        m_band = o_band <= bands
        b_band_cost = tl.load(p_cost + tiles + o_band, mask=m_band, other=1)
        tl.store(p_levels + tiles + o_band, level_of(b_band / rows, b_band_cost, causal, min_gain), mask=m_band)


@triton.jit
def tile_levels(p_levels, o_tile, tiles, low, high, width, margin, band, bands, always, LINES: tl.constexpr):
    """Levels of key tiles for a query tile: the highest of the candidates each is in, or ALWAYS."""
    m_tile = o_tile < tiles
    b_level = tl.load(p_levels + o_tile, mask=m_tile, other=-1).to(tl.int32)
    if LINES:
        b_level = tl.maximum(b_level, tl.load(p_levels + tiles + band).to(tl.int32))
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
def reached_kernel(
    p_mass,
    p_low,
    p_high,
    p_row_tile,
    p_band_of_row,
    p_loose,
    p_levels,
    p_reached,
    tiles,
    candidates,
    bands,
    always,
    margin,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One (probe row, head): its mass at every threshold, ``p_reached`` [H, P, THRESHOLDS]."""
    i_row, i_head, rows = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    low, high, width = query_tile(p_low, p_high, tl.load(p_row_tile + i_row), margin)
    band = 0
    if LINES:
        band = tl.load(p_band_of_row + i_row).to(tl.int32)
    i_index = i_head * rows + i_row
    p_levels += i_head * candidates
    o_threshold = tl.arange(0, THRESHOLDS)
    b_reached = tl.zeros([BLOCK, THRESHOLDS], tl.float32)
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        b_mass = loose_mass(p_mass + i_index * tiles, o_tile, tiles, always, low, high)
        b_level = tile_levels(p_levels, o_tile, tiles, low, high, width, margin, band, bands, always, LINES)
        b_reached += tl.where(b_level[:, None] >= o_threshold[None, :], b_mass[:, None], 0.0)
    start = 1.0 - tl.load(p_loose + i_index)
    tl.store(p_reached + i_index * THRESHOLDS + o_threshold, start + tl.sum(b_reached, 0))


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=PARTS_OF_A_BATCH)
def tiles_kernel(
    p_low,
    p_high,
    p_bands,
    p_visible,
    p_levels,
    p_tile_levels,
    p_counts,
    tiles,
    candidates,
    bands,
    always,
    margin,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One (query tile, head): level of each key tile, ``p_tile_levels`` [H, t, n], and how many reach each threshold.

    ``p_counts`` int32 [H, t, THRESHOLDS].
    """
    i_tile, i_head, query_tiles = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    low, high, width = query_tile(p_low, p_high, i_tile, margin)
    band = 0
    if LINES:
        band = tl.load(p_bands + i_tile).to(tl.int32)
    i_index = i_head * query_tiles + i_tile
    p_levels += i_head * candidates
    p_visible += i_tile.to(tl.int64) * tiles
    o_threshold = tl.arange(0, THRESHOLDS)
    b_count = tl.zeros([BLOCK, THRESHOLDS], tl.int32)
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        m_tile = o_tile < tiles
        b_level = tile_levels(p_levels, o_tile, tiles, low, high, width, margin, band, bands, always, LINES)
        m_visible = tl.load(p_visible + o_tile, mask=m_tile, other=0) != 0
        b_level = tl.where(m_visible, b_level, -1)
        tl.store(p_tile_levels + i_index * tiles + o_tile, b_level.to(tl.int8), mask=m_tile)
        b_count += tl.where(b_level[:, None] >= o_threshold[None, :], 1, 0)
    tl.store(p_counts + i_index * THRESHOLDS + o_threshold, tl.sum(b_count, 0))


@triton.jit(do_not_specialize=NUMBERS)
def decide_kernel(
    p_reached,
    p_counts,
    p_near_count,
    p_causal,
    p_threshold,
    p_coverage,
    p_missing,
    p_count,
    rows,
    query_tiles,
    target,
    slack,
    max_density,
    worth,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold of one head, and what it keeps; see ``_threshold`` in :mod:`.search`."""
    i_head = tl.program_id(0).to(tl.int64)
    o_threshold = tl.arange(0, THRESHOLDS)[None, :]
    b_reached = tl.zeros([BLOCK, THRESHOLDS], tl.float32)
    b_missing = tl.zeros([BLOCK, THRESHOLDS], tl.float32)
    for first in tl.range(0, rows, BLOCK):
        o_row = first + tl.arange(0, BLOCK)[:, None]
        m_row = o_row < rows
        b_row = tl.load(p_reached + (i_head * rows + o_row) * THRESHOLDS + o_threshold, mask=m_row, other=0.0)
        b_reached += b_row
        b_missing += tl.where(m_row, tl.maximum(target - b_row, 0.0), 0.0)
    b_count = tl.zeros([BLOCK, THRESHOLDS], tl.int32)
    for first in tl.range(0, query_tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)[:, None]
        p_block = p_counts + (i_head * query_tiles + o_tile) * THRESHOLDS + o_threshold
        b_count += tl.load(p_block, mask=o_tile < query_tiles, other=0)
    b_coverage = tl.sum(b_reached, 0) / rows
    b_lack = tl.sum(b_missing, 0) / rows
    b_tiles = tl.sum(b_count, 0)
    if LINES:
        b_tiles += tl.load(p_near_count).to(tl.int32)
    o_threshold = tl.arange(0, THRESHOLDS)
    fixed = tl.sum(tl.where(o_threshold == ALWAYS, b_tiles, 0), 0)
    budget = tl.maximum(max_density * tl.load(p_causal).to(tl.float32), fixed.to(tl.float32))
    best = tl.sum((b_lack <= slack).to(tl.int32), 0) - 1
    lowest = THRESHOLDS - tl.sum((b_tiles.to(tl.float32) <= budget).to(tl.int32), 0)
    threshold = tl.where(best >= lowest, best, tl.maximum(lowest, worth))
    tl.store(p_threshold + i_head, threshold)
    tl.store(p_coverage + i_head, tl.sum(tl.where(o_threshold == threshold, b_coverage, 0.0), 0))
    tl.store(p_missing + i_head, tl.sum(tl.where(o_threshold == threshold, b_lack, 0.0), 0))
    tl.store(p_count + i_head, tl.sum(tl.where(o_threshold == threshold, b_tiles, 0), 0))


def columns_and_diagonals(mass: torch.Tensor, slash: SlashTiles, causal: torch.Tensor, limits: Limits) -> Found:
    """See :func:`.search.columns_and_diagonals`."""
    return _search(
        mass,
        low=slash.first,
        high=slash.last + 1,
        row_tiles=slash.row_tiles,
        row_own=slash.row_own,
        bands=None,
        band_of_row=None,
        visible=slash.causal,
        cost=slash.cost,
        near_count=causal,
        causal=causal,
        limits=limits,
        always=slash.sink_tiles,
        margin=slash.window_tiles,
        min_lines=0,
    )


def lines(
    mass: torch.Tensor,
    cell: CellView,
    tiles: CellTiles,
    near_count: torch.Tensor,
    causal: torch.Tensor,
    limits: Limits,
    *,
    min_lines: int,
) -> Found:
    """See :func:`.search.lines`."""
    return _search(
        mass,
        low=cell.own_lo,
        high=cell.own_hi,
        row_tiles=cell.row_tiles,
        row_own=None,
        bands=cell.bands,
        band_of_row=cell.band_of_row,
        visible=tiles.visible,
        cost=tiles.cost,
        near_count=near_count,
        causal=causal,
        limits=limits,
        always=0,
        margin=0,
        min_lines=min_lines,
    )


def _search(
    mass: torch.Tensor,
    *,
    low: torch.Tensor,
    high: torch.Tensor,
    row_tiles: torch.Tensor,
    row_own: torch.Tensor | None,
    bands: torch.Tensor | None,
    band_of_row: torch.Tensor | None,
    visible: torch.Tensor,
    cost: torch.Tensor,
    near_count: torch.Tensor,
    causal: torch.Tensor,
    limits: Limits,
    always: int,
    margin: int,
    min_lines: int,
) -> Found:
    """The five launches; ``row_own`` is there for columns and diagonals, ``bands`` and ``band_of_row`` for lines.

    A query tile reads key tiles ``[low - margin, high)`` and those before ``always`` anyhow.
    """
    is_lines = row_own is None
    mass = mass.contiguous()
    heads, rows, tiles = mass.shape
    query_tiles, candidates = visible.shape[0], cost.numel()
    num_bands = candidates - tiles - 1
    thresholds = search.LEVELS + 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(heads, *shape, dtype=dtype, device=mass.device)

    loose = empty(rows)
    beside = empty(rows) if is_lines else loose
    tables = mass, low, high, row_tiles
    rows_kernel[rows, heads](*tables, loose, beside, tiles, always, margin, LINES=is_lines, BLOCK=BLOCK, **OPTIONS)
    levels = empty(candidates, dtype=torch.int8)
    candidates_kernel[triton.cdiv(tiles, BLOCK) + is_lines, heads](
        *tables,
        row_own,
        band_of_row,
        loose,
        beside,
        cost,
        causal,
        levels,
        rows,
        tiles,
        candidates,
        num_bands,
        always,
        margin,
        float(limits.coverage),
        float(limits.min_gain or 1),
        LINES=is_lines,
        BLOCK=BLOCK,
        BLOCK_BANDS=max(BLOCK_BANDS, triton.next_power_of_2(num_bands + 1)) if is_lines else 1,
        **OPTIONS,
    )
    if min_lines:
        search.take_lines(levels[:, :tiles], min_lines)
    reached = empty(rows, thresholds)
    numbers = tiles, candidates, num_bands, always, margin
    reached_kernel[rows, heads](
        *tables, band_of_row, loose, levels, reached, *numbers, LINES=is_lines, BLOCK=BLOCK_COUNTED, **OPTIONS
    )
    tile_level = empty(query_tiles, tiles, dtype=torch.int8)
    counts = empty(query_tiles, thresholds, dtype=torch.int32)
    tiles_kernel[query_tiles, heads](
        low, high, bands, visible, levels, tile_level, counts, *numbers, LINES=is_lines, BLOCK=BLOCK_COUNTED, **OPTIONS
    )
    threshold, coverage, missing = empty(dtype=torch.int32), empty(), empty()
    count = empty(dtype=torch.int64)
    decide_kernel[heads,](
        reached,
        counts,
        near_count,
        causal,
        threshold,
        coverage,
        missing,
        count,
        rows,
        query_tiles,
        float(limits.coverage),
        SLACK,
        float(limits.max_density),
        search.WORTH if limits.min_gain else 0,
        LINES=is_lines,
        BLOCK=BLOCK_COUNTED,
        **OPTIONS,
    )
    return Found(tile_level, threshold, coverage, missing, count)
