"""Selection in Triton: in a few launches from the probe to the tile lists of all row groups, heads and forms.

What :mod:`.select` and :mod:`.choice` do with tile maps is done here by tile, from the levels of candidates:

- :func:`rows_kernel` tells what each probe row would lose in all, :func:`candidates_kernel` what of it each candidate
  holds, and so the levels of a list's candidates;
- :func:`curves_kernel` sums what each row loses below every threshold, and counts tiles by level;
- :func:`decide_kernel` picks a tiling, a form and a threshold for every list, within the budget of a row group;
- :func:`lists_kernel` writes the lists of all passes, and the order in which they start.

A tile's level is computed where it is needed, so no map is in memory. What is asked of which memory stands in tables,
made once per forward and set of patterns (:mod:`.prepared`): a row of 64-bit numbers and addresses for each search,
form, row group and pass. So launches have few arguments, and none that changes between layers but what a layer is:
its operands, its id, and the heads that are probed at a time.

Floor for H heads, P probe rows of each, n key tiles and t query tiles, per form: what tiles hold, ``4 * HELD * H * P *
n`` bytes, read three times by each search and once for its curve; ``H * (P + 3 * t) * n`` levels of tiles. Sums are
made in a fixed order, counts and levels by atomics on integers: results do not depend on the order of programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import choice
from . import levels as scale
from .copy_triton import CHANNELS_ALL, CHANNELS_HELD
from .levels import TINY
from .tables import Fields, address, number, real
from .tiles import UNBOUNDED
from .work_triton import PASS, put_in_order

ALWAYS = tl.constexpr(scale.ALWAYS)
PER_OCTAVE = tl.constexpr(scale.PER_OCTAVE)
FAIR = tl.constexpr(scale.FAIR)
THRESHOLDS = tl.constexpr(scale.LEVELS + 1)
LEAST = tl.constexpr(scale.LEAST)
TINIEST = tl.constexpr(TINY)
FAVOUR = tl.constexpr(1 - choice.LOYALTY)
PRICES = tl.constexpr(choice.PRICES)
UNBOUNDED_REACH = tl.constexpr(UNBOUNDED)
BLOCK = 256
"""Key tiles at a time."""
BLOCK_BANDS = 512
"""Bands and the neighbours, at most one more than probe rows, whose default is 256."""
BLOCK_HELD = 64
"""Key tiles at a time whose losses are summed by level."""
ROWS = 4
"""Probe rows of a head that a program sums over."""
ROW_BLOCK = tl.constexpr(ROWS)
SEARCH = Fields(
    "held size row_of low high row_tile row_own band band_of_row cost causal levels share loose beside"
    " bound rows turns tiles candidates bands always margin sharing"
)
"""Columns and diagonals of a row group, or the lines of a far region (``bands`` is -1 for the former).

By head and probe row: what tiles have ``held``, the ``size`` of the row's output, which row it is (``row_of``) and
what it would lose without all loose tiles, as ``share`` of what each costs, in all (``loose``) and ``beside`` its own.
By probe row: query tile, its own key tile, band. By query tile: the key tiles it reads anyhow (``low`` to ``high``,
with ``margin`` before and ``always`` at the start), band. By candidate: ``cost``, and its level for each list.
"""
FORM = Fields(
    "text_slash text_source text_reach media_slash media_source media_reach far_kind far_search far_on_text sink reach"
    " near_query_min near_query_max near_min near_max near_text near_media near_query_tiles near_tiles"
    " far_query_min far_query_max far_min far_max far_text far_media far_query_tiles far_tiles"
    " held tiles kept size row_of row_tile rows error mass counts others sharing is_union"
)
"""A form, see :class:`.select.Form`: ``*_source`` is a search if it is a slash, and a sink otherwise; ``far_kind`` is 0
for none, 1 for the lines of ``far_search``, 2 for everything.

Of both passes: position bounds of query tiles and key tiles, and which modalities these hold. Of its curve: what its
``tiles`` have ``held``, and whether tiles that are listed are ``kept``; the ``error`` and the ``mass`` that is kept at
each threshold, and by list how many tiles have each level (``counts``), beside ``others`` of the other pass.
"""
GROUP = Fields(
    "heads rows per_kv offers first_offer size fixed bound_to bound max_density ease ceiling causal picks pick_stride"
    " coverage error tiles picked probed out_rows output guarded repair_count repair_full dense_count dense_full"
    " query_tiles all_query_tiles slots num_slots"
)
"""A row group: its :class:`.choice.Budget`, with the square of the bound, and :class:`.prepared.GroupResult`.

By head: squared ``size`` of each probe row's output, whether it has nothing to search (``fixed``) and may not be dense
(``bound_to``). Lists of the repair and dense ones, those of its ``query_tiles`` of all in the pass; its rows' slots.
"""
OFFER = Fields("sharing lists forms first wanted pick threshold")
"""Forms from the ``first`` on for lists that ``sharing`` heads share; which may have which, and which has what."""
SEGMENT = Fields(
    "pick threshold is_far first forms tile_first query_tiles widest query_min query_max key_min key_max tiles"
    " unsearched lists work"
)
"""A row group's lists in one pass, whose :data:`.work_triton.PASS` is ``work``: its query tiles, from ``tile_first``
on, and key tiles, and the pick and threshold of each list, ``unsearched`` where there are no forms."""
REQUEST = Fields("groups first")
"""How many row groups a request has, and its first one."""
ON_TEXT = {"a_shape": 1, "dense": 2}
"""What becomes of text keys in the cell pass, 0 for others."""


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
def level_of(b_energy, b_cost, causal, allowed):
    """Level of a candidate's energy per tile, -1 for none."""
    b_gain = tl.maximum(b_energy * (causal / b_cost.to(tl.float32)) / allowed, TINIEST)
    b_level = tl.floor(tl.log2(b_gain) * PER_OCTAVE) + FAIR
    b_level = tl.minimum(tl.maximum(b_level, 0.0), ALWAYS - 1.0)
    return tl.where(b_energy > TINIEST, b_level, -1.0).to(tl.int32)


@triton.jit(do_not_specialize=["heads", "head_first"])
def rows_kernel(p_searches, heads, head_first, BLOCK: tl.constexpr):
    """One (probe row, head, search): energy that it loses without all loose tiles, and its share in what each costs.

    Kept too is the part of it in tiles beside the own ones. See ``_shared_out`` in :mod:`.search`. The first row of a
    list's first head empties the list's levels.
    """
    i_row, i_local = tl.program_id(0), tl.program_id(1)
    p_search = p_searches + tl.program_id(2) * SEARCH.width
    rows, sharing, i_head = number(p_search, SEARCH.rows), number(p_search, SEARCH.sharing), head_first + i_local
    if i_row >= rows:
        return
    p_low, p_high = address(p_search, SEARCH.low, tl.int32), address(p_search, SEARCH.high, tl.int32)
    tiles, candidates = number(p_search, SEARCH.tiles), number(p_search, SEARCH.candidates)
    always, margin = number(p_search, SEARCH.always), number(p_search, SEARCH.margin)
    if (i_row == 0) & (i_head % sharing == 0):
        p_levels = address(p_search, SEARCH.levels, tl.int32) + i_head // sharing * candidates
        for first in tl.range(0, candidates, BLOCK):
            o_candidate = first + tl.arange(0, BLOCK)
            tl.store(p_levels + o_candidate, -1, mask=o_candidate < candidates)
    i_index = i_head * rows + i_row
    i_tile = tl.load(
        address(p_search, SEARCH.row_tile, tl.int32) + tl.load(address(p_search, SEARCH.row_of, tl.int32) + i_index)
    )
    own, high = tl.load(p_low + i_tile), tl.load(p_high + i_tile)
    low, width = own - margin, high - own
    channel, size = heads.to(tl.int64) * rows * tiles, tl.load(address(p_search, SEARCH.size, tl.float32) + i_index)
    p_held = address(p_search, SEARCH.held, tl.float32) + (i_local * rows + i_row).to(tl.int64) * tiles
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
        b_beside += tl.where((o_tile >= own - width) & (o_tile < high + width), b_energy, 0.0)
    b_mass = tl.sum(tl.where(o_c == 0, b_sums, 0.0), 0)
    together = lost_energy(tl.sum(tl.where(o_c == 0, 0.0, b_sums * b_sums), 0), b_mass, size)
    share = together / tl.maximum(tl.sum(b_alone, 0), TINIEST)
    tl.store(address(p_search, SEARCH.share, tl.float32) + i_index, share)
    tl.store(address(p_search, SEARCH.loose, tl.float32) + i_index, share * tl.sum(b_alone, 0))
    tl.store(address(p_search, SEARCH.beside, tl.float32) + i_index, share * tl.sum(b_beside, 0))


@triton.jit(do_not_specialize=["heads", "head_first"])
def candidates_kernel(p_searches, heads, head_first, BLOCK: tl.constexpr, BLOCK_BANDS: tl.constexpr):
    """Levels of one head's candidates in one search: its list has the highest of its heads'.

    Columns and diagonals, or v-lines and in the last block bands and neighbours.
    """
    i_block, i_local = tl.program_id(0), tl.program_id(1)
    p_search = p_searches + tl.program_id(2) * SEARCH.width
    tiles, bands = number(p_search, SEARCH.tiles), number(p_search, SEARCH.bands)
    rows, i_head, is_lines = number(p_search, SEARCH.rows), head_first + i_local, bands >= 0
    first = i_block * BLOCK
    if first >= tiles + BLOCK * is_lines:
        return
    i_list = i_head // number(p_search, SEARCH.sharing)
    p_levels = address(p_search, SEARCH.levels, tl.int32) + i_list * number(p_search, SEARCH.candidates)
    p_size = address(p_search, SEARCH.size, tl.float32) + i_head * rows
    p_row_of = address(p_search, SEARCH.row_of, tl.int32) + i_head * rows
    p_share = address(p_search, SEARCH.share, tl.float32) + i_head * rows
    p_cost = address(p_search, SEARCH.cost, tl.int32)
    causal = tl.load(address(p_search, SEARCH.causal, tl.int32)).to(tl.float32)
    energy = 0.0
    for i_row in tl.range(0, rows):
        energy += tl.load(p_size + i_row)
    allowed = tl.maximum(energy / rows * real(p_search, SEARCH.bound), TINIEST)
    if first < tiles:
        channel = heads.to(tl.int64) * rows * tiles
        p_held = address(p_search, SEARCH.held, tl.float32) + (i_local * rows).to(tl.int64) * tiles
        p_row_tile, p_row_own = (
            address(p_search, SEARCH.row_tile, tl.int32),
            address(p_search, SEARCH.row_own, tl.int32),
        )
        p_low, p_high = address(p_search, SEARCH.low, tl.int32), address(p_search, SEARCH.high, tl.int32)
        always, margin = number(p_search, SEARCH.always), number(p_search, SEARCH.margin)
        o_tile = first + tl.arange(0, BLOCK)
        b_column = tl.zeros([BLOCK], tl.float32)
        b_diagonal = tl.zeros([BLOCK], tl.float32)
        for i_row in tl.range(0, rows):
            row = tl.load(p_row_of + i_row)
            i_tile = tl.load(p_row_tile + row)
            low, high = tl.load(p_low + i_tile) - margin, tl.load(p_high + i_tile)
            size, share = tl.load(p_size + i_row), tl.load(p_share + i_row)
            b_column += share * loose_energy(p_held, size, channel, o_tile, tiles, always, low, high)
            if not is_lines:
                o_key = tl.load(p_row_own + row) - o_tile
                b_diagonal += share * loose_energy(p_held, size, channel, o_key, tiles, always, low, high)
            p_held += tiles
        m_tile = o_tile < tiles
        b_cost = tl.load(p_cost + o_tile, mask=m_tile, other=1)
        tl.atomic_max(p_levels + o_tile, level_of(b_column / rows, b_cost, causal, allowed), mask=m_tile)
        if not is_lines:
            b_cost = tl.load(p_cost + tiles + o_tile, mask=m_tile, other=1)
            tl.atomic_max(p_levels + tiles + o_tile, level_of(b_diagonal / rows, b_cost, causal, allowed), mask=m_tile)
    else:
        p_loose = address(p_search, SEARCH.loose, tl.float32) + i_head * rows
        p_beside = address(p_search, SEARCH.beside, tl.float32) + i_head * rows
        p_band_of_row, turns = address(p_search, SEARCH.band_of_row, tl.int32), number(p_search, SEARCH.turns)
        o_band = tl.arange(0, BLOCK_BANDS)
        b_band = tl.zeros([BLOCK_BANDS], tl.float32)
        for i_row in tl.range(0, rows):
            band = tl.load(p_band_of_row + tl.load(p_row_of + i_row))
            # Bands are those of all rows, of which the head has one in so many.
            b_band += tl.where(o_band == band, tl.load(p_loose + i_row) / turns, 0.0)
            b_band += tl.where(o_band == bands, tl.load(p_beside + i_row), 0.0)
        m_band = o_band <= bands
        b_band_cost = tl.load(p_cost + tiles + o_band, mask=m_band, other=1)
        tl.atomic_max(p_levels + tiles + o_band, level_of(b_band / rows, b_band_cost, causal, allowed), mask=m_band)


@triton.jit
def slash_of(p_searches, i_search, i_list, i_tile, m_slash):
    """What :func:`slash_levels` needs of a search for one list and query tile; of none where ``m_slash`` is not."""
    p_search = p_searches + tl.where(m_slash, i_search, 0) * SEARCH.width
    low = tl.load(address(p_search, SEARCH.low, tl.int32) + i_tile, mask=m_slash, other=0)
    high = tl.load(address(p_search, SEARCH.high, tl.int32) + i_tile, mask=m_slash, other=0)
    p_levels = address(p_search, SEARCH.levels, tl.int32) + i_list * number(p_search, SEARCH.candidates)
    always, margin = number(p_search, SEARCH.always), number(p_search, SEARCH.margin)
    return number(p_search, SEARCH.tiles), always, margin, low, high, p_levels


@triton.jit
def slash_levels(slash, o_tile):
    """Levels by columns and diagonals of key tiles for a query tile, ALWAYS for what is read anyhow."""
    tiles, always, margin, low, high, p_levels = slash
    m_tile = o_tile < tiles
    b_level = tl.load(p_levels + o_tile, mask=m_tile, other=-1)
    for i_step in tl.range(0, high - low):
        o_diagonal = low - o_tile + i_step
        m_diagonal = (o_diagonal >= 0) & (o_diagonal < tiles) & m_tile
        b_level = tl.maximum(b_level, tl.load(p_levels + tiles + o_diagonal, mask=m_diagonal, other=-1))
    m_fixed = (o_tile < always) | ((o_tile >= low - margin) & (o_tile < high))
    return tl.where(m_fixed, ALWAYS, b_level)


@triton.jit
def near_of(p_form, p_searches, i_list, i_tile, m_form):
    """What :func:`near_levels` needs of a form for one list and query tile."""
    on_text, on_media = number(p_form, FORM.text_slash), number(p_form, FORM.media_slash)
    of_text, of_media = number(p_form, FORM.text_source), number(p_form, FORM.media_source)
    bounds = (
        number(p_form, FORM.near_tiles),
        tl.load(address(p_form, FORM.near_query_min, tl.int32) + i_tile, mask=m_form, other=0),
        tl.load(address(p_form, FORM.near_query_max, tl.int32) + i_tile, mask=m_form, other=0),
        address(p_form, FORM.near_min, tl.int32),
        address(p_form, FORM.near_max, tl.int32),
    )
    kinds = number(p_form, FORM.is_union) != 0, on_text == 1, on_media == 1
    text = (
        of_text,
        number(p_form, FORM.text_reach),
        slash_of(p_searches, of_text, i_list, i_tile, m_form & (on_text == 1)),
    )
    media = (
        of_media,
        number(p_form, FORM.media_reach),
        slash_of(p_searches, of_media, i_list, i_tile, m_form & (on_media == 1)),
    )
    return (
        bounds,
        kinds,
        text,
        media,
        (address(p_form, FORM.near_text, tl.int8), address(p_form, FORM.near_media, tl.int8)),
    )


@triton.jit
def source_levels(source, is_slash, o_tile, b_min, b_max, first):
    """Levels that a form's source in the sequence pass gives key tiles; rows stand from ``first`` on."""
    sink, reach, slash = source
    if is_slash:
        b_level = slash_levels(slash, o_tile)
    else:
        b_level = tl.where((b_min < sink) | (b_max > first - reach), ALWAYS, -1)
    return b_level


@triton.jit
def near_levels(near, o_tile):
    """Levels of key tiles of the sequence pass, -1 where they may not be read."""
    bounds, kinds, text, media, modalities = near
    tiles, first, last, p_min, p_max = bounds
    is_union, slash_on_text, slash_on_media = kinds
    m_tile = o_tile < tiles
    b_min = tl.load(p_min + o_tile, mask=m_tile, other=0)
    b_max = tl.load(p_max + o_tile, mask=m_tile, other=0)
    b_level = source_levels(media, slash_on_media, o_tile, b_min, b_max, first)
    if is_union:
        p_text, p_media = modalities
        b_text = source_levels(text, slash_on_text, o_tile, b_min, b_max, first)
        m_text = tl.load(p_text + o_tile, mask=m_tile, other=0) != 0
        m_media = tl.load(p_media + o_tile, mask=m_tile, other=0) != 0
        b_level = tl.maximum(tl.where(m_media, b_level, -1), tl.where(m_text, b_text, -1))
    return tl.where(m_tile & (b_min <= last), b_level, -1)


@triton.jit
def far_of(p_form, p_searches, i_list, i_tile, m_form):
    """What :func:`far_levels` needs of a form for one list and query tile; of none where it reads no cells."""
    kind, on_text = number(p_form, FORM.far_kind), number(p_form, FORM.far_on_text)
    m_lines = m_form & (kind == 1)
    p_search = p_searches + tl.where(m_lines, number(p_form, FORM.far_search), 0) * SEARCH.width
    lines, bands = number(p_search, SEARCH.tiles), number(p_search, SEARCH.bands)
    p_levels = address(p_search, SEARCH.levels, tl.int32) + i_list * number(p_search, SEARCH.candidates)
    low = tl.load(address(p_search, SEARCH.low, tl.int32) + i_tile, mask=m_lines, other=0)
    high = tl.load(address(p_search, SEARCH.high, tl.int32) + i_tile, mask=m_lines, other=0)
    # What every tile has: the highest of the query tile's band and those beside it.
    o_band = tl.load(address(p_search, SEARCH.band, tl.int32) + i_tile, mask=m_lines, other=0) - 1 + tl.arange(0, 4)
    m_band = (o_band >= 0) & (o_band < bands) & (tl.arange(0, 4) < 3) & m_lines
    band = tl.max(tl.load(p_levels + lines + o_band, mask=m_band, other=-1), 0)
    beside = tl.load(p_levels + lines + bands, mask=m_lines, other=-1)
    last = tl.load(address(p_form, FORM.far_query_max, tl.int32) + i_tile, mask=m_form & (kind != 0), other=0)
    bounds = number(p_form, FORM.far_tiles), number(p_form, FORM.sink), last - number(p_form, FORM.reach)
    addresses = address(p_form, FORM.far_min, tl.int32), address(p_form, FORM.far_max, tl.int32)
    modalities = address(p_form, FORM.far_text, tl.int8), address(p_form, FORM.far_media, tl.int8)
    return kind, on_text, bounds, (low, high, band, beside, p_levels), addresses, modalities


@triton.jit
def far_levels(far, o_tile):
    """Levels of key tiles of the cell pass, -1 where they hold nothing of the far region."""
    kind, on_text, bounds, lines, addresses, modalities = far
    tiles, sink, edge = bounds
    p_min, p_max = addresses
    m_tile = o_tile < tiles
    b_min = tl.load(p_min + o_tile, mask=m_tile, other=0)
    b_max = tl.load(p_max + o_tile, mask=m_tile, other=0)
    m_seen = m_tile & (b_max >= sink) & (b_min <= edge)
    if kind == 2:
        b_level = tl.full(o_tile.shape, ALWAYS, tl.int32)
    else:
        low, high, band, beside, p_levels = lines
        b_level = tl.maximum(tl.load(p_levels + o_tile, mask=m_tile, other=-1), band)
        m_beside = (o_tile >= 2 * low - high) & (o_tile < 2 * high - low)
        b_level = tl.where(m_beside, tl.maximum(b_level, beside), b_level)
        b_level = tl.where((o_tile >= low) & (o_tile < high), ALWAYS, b_level)
        if on_text != 0:
            p_text, p_media = modalities
            m_text = tl.load(p_text + o_tile, mask=m_tile, other=0) != 0
            m_media = tl.load(p_media + o_tile, mask=m_tile, other=0) != 0
            b_level = tl.where((on_text == 2) & m_text, ALWAYS, b_level)
            b_level = tl.where((on_text == 1) & m_text & (m_media == 0), -1, b_level)
    return tl.where(m_seen, b_level, -1)


@triton.jit
def lost_below(
    p_held,
    p_scratch,
    channel,
    tiles,
    p_form,
    p_searches,
    i_list,
    i_tile,
    FAR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HELD: tl.constexpr,
):
    """What a probe row loses below every threshold: [THRESHOLDS, 2 * CHANNELS_HELD], in two parts to be added.

    Levels go through memory of the program's own: the matrix unit wants them in all threads, and there they would be
    computed as often.
    """
    o_c, o_threshold = tl.arange(0, 2 * CHANNELS_HELD)[None, :], tl.arange(0, THRESHOLDS)
    if FAR:
        found = far_of(p_form, p_searches, i_list, i_tile, True)
    else:
        found = near_of(p_form, p_searches, i_list, i_tile, True)
    kept = number(p_form, FORM.kept) != 0
    p_held += o_c % CHANNELS_HELD * channel
    b_lost = tl.zeros([THRESHOLDS, 2 * CHANNELS_HELD], tl.float32)
    for block in tl.range(0, tiles, BLOCK, num_stages=1):
        o_tile = block + tl.arange(0, BLOCK)
        b_level = far_levels(found, o_tile) if FAR else tl.where(kept, near_levels(found, o_tile), -1)
        tl.debug_barrier()
        tl.store(p_scratch + tl.arange(0, BLOCK), b_level.to(tl.int8))
        tl.debug_barrier()
        for first in tl.range(0, tl.minimum(tiles - block, BLOCK), BLOCK_HELD, num_stages=1):
            o_own = first + tl.arange(0, BLOCK_HELD)
            b_below = (tl.load(p_scratch + o_own)[None, :] < o_threshold[:, None]).to(tl.float32)
            o_held = (block + o_own)[:, None]
            b_held = tl.load(p_held + o_held, mask=o_held < tiles, other=0.0)
            # In two parts that the matrix unit takes as they are, as it does zeros and ones: nothing is rounded.
            b_high = (b_held.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            b_held = tl.where(o_c < CHANNELS_HELD, b_high, b_held - b_high)
            b_lost = tl.dot(b_below, b_held, b_lost, input_precision="tf32")
    return b_lost


@triton.jit
def count_levels(p_form, p_searches, i_list, i_tile, FAR: tl.constexpr, BLOCK: tl.constexpr):
    """How many key tiles of a list have each level; behind the levels those that have none."""
    if FAR:
        found, tiles = far_of(p_form, p_searches, i_list, i_tile, True), number(p_form, FORM.far_tiles)
    else:
        found, tiles = near_of(p_form, p_searches, i_list, i_tile, True), number(p_form, FORM.near_tiles)
    b_counts = tl.zeros([2 * THRESHOLDS], tl.int32)
    for first in tl.range(0, tiles, BLOCK):
        o_tile = first + tl.arange(0, BLOCK)
        b_level = far_levels(found, o_tile) if FAR else near_levels(found, o_tile)
        b_counts += tl.histogram(tl.where(b_level < 0, THRESHOLDS, b_level), 2 * THRESHOLDS)
    return b_counts


@triton.jit(do_not_specialize=["heads", "head_first"])
def curves_kernel(p_forms, p_searches, p_levels, heads, head_first, BLOCK: tl.constexpr, BLOCK_HELD: tl.constexpr):
    """One form, and one head's error energy and kept mass at every threshold, summed over some probe rows; or tiles.

    Behind the heads come programs of one (list, query tile) each, which count tiles by level.
    """
    i_program, p_form = tl.program_id(0), p_forms + tl.program_id(1) * FORM.width
    rows, sharing, is_far = number(p_form, FORM.rows), number(p_form, FORM.sharing), number(p_form, FORM.far_kind) != 0
    blocks = tl.cdiv(rows, ROW_BLOCK)
    if i_program < heads * blocks:
        i_local, i_block = i_program // blocks, i_program % blocks
        i_head, tiles = head_first + i_local, number(p_form, FORM.tiles)
        channel = heads.to(tl.int64) * rows * tiles
        o_c, o_threshold = tl.arange(0, 2 * CHANNELS_HELD)[None, :], tl.arange(0, THRESHOLDS)
        p_scratch = p_levels + (tl.program_id(1) * tl.num_programs(0) + i_program).to(tl.int64) * BLOCK
        b_error = tl.zeros([THRESHOLDS], tl.float32)
        b_kept = tl.zeros([THRESHOLDS], tl.float32)
        for i_step in tl.range(0, ROW_BLOCK):
            i_row = i_block * ROW_BLOCK + i_step
            if i_row < rows:
                i_index, i_list = i_head * rows + i_row, i_head // sharing
                i_tile = tl.load(
                    address(p_form, FORM.row_tile, tl.int32) + tl.load(address(p_form, FORM.row_of, tl.int32) + i_index)
                )
                p_held = address(p_form, FORM.held, tl.float32) + (i_local * rows + i_row).to(tl.int64) * tiles
                if is_far:
                    b_lost = lost_below(
                        p_held, p_scratch, channel, tiles, p_form, p_searches, i_list, i_tile, True, BLOCK, BLOCK_HELD
                    )
                else:
                    b_lost = lost_below(
                        p_held, p_scratch, channel, tiles, p_form, p_searches, i_list, i_tile, False, BLOCK, BLOCK_HELD
                    )
                b_mass = tl.sum(tl.where(o_c % CHANNELS_HELD == 0, b_lost, 0.0), 1)
                b_energy = tl.zeros([THRESHOLDS], tl.float32)
                for i_channel in tl.static_range(1, CHANNELS_HELD):
                    b_moved = tl.sum(tl.where(o_c % CHANNELS_HELD == i_channel, b_lost, 0.0), 1)
                    b_energy += b_moved * b_moved
                b_error += lost_energy(b_energy, b_mass, tl.load(address(p_form, FORM.size, tl.float32) + i_index))
                b_kept += 1.0 - b_mass
        o_at = (i_head * blocks + i_block) * THRESHOLDS + o_threshold
        tl.store(address(p_form, FORM.error, tl.float32) + o_at, b_error)
        tl.store(address(p_form, FORM.mass, tl.float32) + o_at, b_kept)
    else:
        i_program -= heads * blocks
        query_tiles = number(p_form, FORM.near_query_tiles)
        if is_far:
            query_tiles = number(p_form, FORM.far_query_tiles)
        if i_program < heads // sharing * query_tiles:
            i_list, i_tile = head_first // sharing + i_program // query_tiles, i_program % query_tiles
            if is_far:
                b_counts = count_levels(p_form, p_searches, i_list, i_tile, True, BLOCK)
            else:
                b_counts = count_levels(p_form, p_searches, i_list, i_tile, False, BLOCK)
            o_level = tl.arange(0, 2 * THRESHOLDS)
            p_counts = address(p_form, FORM.counts, tl.int32) + i_list * THRESHOLDS
            tl.atomic_add(p_counts + o_level, b_counts, mask=(o_level < THRESHOLDS) & (b_counts > 0))


@triton.jit
def bill(p_offer, p_forms, p_group, p_previous, i_list, first_form, b_price, m_least, causal, ease, has_previous):
    """What one list chooses at some prices and what it costs: error and price, option, error lost and tiles read.

    Options are the offer's forms by threshold, and dense attention behind them where the list is one head's. At prices
    of ``m_least`` nothing but tiles counts.
    """
    sharing, forms, table_first = (
        number(p_offer, OFFER.sharing),
        number(p_offer, OFFER.forms),
        number(p_offer, OFFER.first),
    )
    lists, rows = number(p_offer, OFFER.lists), number(p_group, GROUP.rows)
    blocks = tl.cdiv(rows, ROW_BLOCK)
    i_head = i_list * sharing
    previous = -1
    if has_previous:
        previous = tl.load(p_previous + i_head).to(tl.int32)
    o_threshold = tl.arange(0, THRESHOLDS)
    b_paid = tl.full(b_price.shape, float("inf"), tl.float32)
    b_option = tl.zeros(b_price.shape, tl.int32)
    b_lost = tl.zeros(b_price.shape, tl.float32)
    b_read = tl.zeros(b_price.shape, tl.float32)
    for i_form in tl.range(0, forms):
        p_form = p_forms + (table_first + i_form) * FORM.width
        b_error = tl.zeros([THRESHOLDS], tl.float32)
        p_error = address(p_form, FORM.error, tl.float32) + i_head * blocks * THRESHOLDS + o_threshold
        for _ in tl.range(0, sharing * blocks):
            b_error += tl.load(p_error)
            p_error += THRESHOLDS
        b_error /= rows
        b_tiles = tiles_of(p_form, i_list, o_threshold)
        favour = tl.where(previous == first_form + i_form, FAVOUR, 1.0)
        b_cost = (b_error * favour)[:, None] + (b_tiles * favour)[:, None] * b_price[None, :]
        b_cost = tl.where(m_least[None, :], b_tiles[:, None], b_cost)
        barred = tl.load(address(p_offer, OFFER.wanted, tl.int32) + i_form * lists + i_list) == 0
        b_cost = tl.where(barred, float("inf"), b_cost)
        b_least, b_at = tl.min(b_cost, 0), tl.argmin(b_cost, 0)
        m_at = o_threshold[:, None] == b_at[None, :]
        m_better = b_least < b_paid
        b_paid = tl.where(m_better, b_least, b_paid)
        b_option = tl.where(m_better, i_form * THRESHOLDS + b_at, b_option)
        b_lost = tl.where(m_better, tl.sum(tl.where(m_at, b_error[:, None], 0.0), 0), b_lost)
        b_read = tl.where(m_better, tl.sum(tl.where(m_at, b_tiles[:, None], 0.0), 0), b_read)
    if sharing == 1:
        b_cost = tl.where(m_least, causal, causal * (1 - ease) * b_price)
        m_better = (b_cost < b_paid) & (tl.load(address(p_group, GROUP.bound_to, tl.int32) + i_head) == 0)
        b_paid = tl.where(m_better, b_cost, b_paid)
        b_option = tl.where(m_better, forms * THRESHOLDS, b_option)
        b_lost = tl.where(m_better, 0.0, b_lost)
        b_read = tl.where(m_better, causal, b_read)
    if tl.load(address(p_group, GROUP.fixed, tl.int32) + i_head) != 0:
        b_lost *= 0.0
    return b_paid, b_option, b_lost, b_read


@triton.jit
def tiles_of(p_form, i_list, o_threshold):
    """Tiles that a list reads at each threshold, those of the other pass among them: fp32."""
    b_counts = tl.load(address(p_form, FORM.counts, tl.int32) + i_list * THRESHOLDS + o_threshold)
    b_tiles = tl.cumsum(b_counts, 0, reverse=True).to(tl.float32)
    if number(p_form, FORM.far_kind) != 0:
        b_tiles += tl.load(address(p_form, FORM.others, tl.int32)).to(tl.float32)
    return b_tiles


@triton.jit
def prices(o_price, base):
    """Prices per tile, a third of an octave apart."""
    return tl.exp2((o_price - FAIR).to(tl.float32) / PER_OCTAVE) * base


@triton.jit
def put(b_values, o_list, i_list, value):
    """A vector with another value for one list."""
    return tl.where(o_list == i_list, value, b_values)


@triton.jit(do_not_specialize=["layer"])
def decide_kernel(p_groups, p_offers, p_forms, layer, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr):
    """One row group: a tiling, a form and a threshold for all its lists; see :func:`.choice.decide`."""
    p_group = p_groups + tl.program_id(0) * GROUP.width
    heads, rows, per_kv, offers = (
        number(p_group, GROUP.heads),
        number(p_group, GROUP.rows),
        number(p_group, GROUP.per_kv),
        number(p_group, GROUP.offers),
    )
    if number(p_group, GROUP.probed) == 0 or offers == 0:
        return
    p_offers += number(p_group, GROUP.first_offer) * OFFER.width
    o_head, o_list = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_L)
    m_head = o_head < heads
    b_energy = tl.zeros([BLOCK_H], tl.float32)
    p_size = address(p_group, GROUP.size, tl.float32)
    for i_row in tl.range(0, rows):
        b_energy += tl.load(p_size + o_head * rows + i_row, mask=m_head, other=0.0)
    b_fixed = tl.load(address(p_group, GROUP.fixed, tl.int32) + o_head, mask=m_head, other=1)
    total = tl.sum(tl.where(b_fixed == 0, b_energy / rows, 0.0), 0)
    bound, ease = real(p_group, GROUP.bound), real(p_group, GROUP.ease)
    density = real(p_group, GROUP.max_density)
    causal = tl.load(address(p_group, GROUP.causal, tl.int32)).to(tl.float32)
    p_previous = address(p_group, GROUP.picks, tl.int64) + layer * number(p_group, GROUP.pick_stride)
    base = tl.maximum(total / heads, TINIEST) * bound / causal
    exact = bound == 0
    allowed = bound * total

    o_price = tl.arange(0, PRICES)
    # Where tiles are limited, nothing else counts at the last price.
    least = tl.where(density < 1.0, PRICES - 1, PRICES)
    m_least = o_price == least
    b_price = tl.where(exact, 1.0, prices(o_price, base))
    b_lost = tl.zeros([PRICES], tl.float32)
    b_read = tl.zeros([PRICES], tl.float32)
    for i_kv in tl.range(0, heads // per_kv):
        b_best = tl.full([PRICES], float("inf"), tl.float32)
        b_best_lost = tl.zeros([PRICES], tl.float32)
        b_best_read = tl.zeros([PRICES], tl.float32)
        first_form = 0
        for i_offer in tl.range(0, offers):
            p_offer = p_offers + i_offer * OFFER.width
            lists = per_kv // number(p_offer, OFFER.sharing)
            b_own_paid = tl.zeros([PRICES], tl.float32)
            b_own_lost = tl.zeros([PRICES], tl.float32)
            b_own_read = tl.zeros([PRICES], tl.float32)
            for i_own in tl.range(0, lists):
                given = i_kv * lists + i_own
                b_paid, _, b_one_lost, b_one_read = bill(
                    p_offer, p_forms, p_group, p_previous, given, first_form, b_price, m_least, causal, ease, layer >= 0
                )
                b_own_paid += b_paid
                b_own_lost += b_one_lost
                b_own_read += b_one_read
            m_better = b_own_paid < b_best
            b_best = tl.where(m_better, b_own_paid, b_best)
            b_best_lost = tl.where(m_better, b_own_lost, b_best_lost)
            b_best_read = tl.where(m_better, b_own_read, b_best_read)
            first_form += number(p_offer, OFFER.forms)
        b_lost += b_best_lost
        b_read += b_best_read
    best = tl.max(tl.where(b_lost <= allowed, o_price, 0), 0)
    if density < 1.0:
        too_many = tl.sum((b_read > density * heads * causal).to(tl.int32), 0)
        best = tl.maximum(best, tl.minimum(too_many, PRICES - 1))

    # Once more at the price that it is, and at the next one.
    o_two = tl.arange(0, 2)
    o_price = tl.minimum(best + o_two, PRICES - 1)
    b_price, m_least = tl.where(exact, 1.0, prices(o_price, base)), o_price == least
    b_used = tl.zeros([BLOCK_L], tl.int32)
    b_option = tl.zeros([BLOCK_L], tl.int32)
    b_next = tl.zeros([BLOCK_L], tl.int32)
    b_lost = tl.zeros([BLOCK_L], tl.float32)
    b_more = tl.zeros([BLOCK_L], tl.float32)
    b_fewer = tl.zeros([BLOCK_L], tl.float32)
    for i_kv in tl.range(0, heads // per_kv):
        cheapest, chosen = float("inf"), 0
        first_form, first_list = 0, 0
        for i_offer in tl.range(0, offers):
            p_offer = p_offers + i_offer * OFFER.width
            lists = per_kv // number(p_offer, OFFER.sharing)
            paid = 0.0
            for i_own in tl.range(0, lists):
                given = i_kv * lists + i_own
                b_paid, b_both, b_two_lost, b_two_read = bill(
                    p_offer, p_forms, p_group, p_previous, given, first_form, b_price, m_least, causal, ease, layer >= 0
                )
                paid += tl.sum(tl.where(o_two == 0, b_paid, 0.0), 0)
                i_at = first_list + given
                b_option = put(b_option, o_list, i_at, tl.sum(tl.where(o_two == 0, b_both, 0), 0))
                b_next = put(b_next, o_list, i_at, tl.sum(tl.where(o_two == 1, b_both, 0), 0))
                b_lost = put(b_lost, o_list, i_at, tl.sum(tl.where(o_two == 0, b_two_lost, 0.0), 0))
                b_more = put(b_more, o_list, i_at, tl.sum(tl.where(o_two == 0, -b_two_lost, b_two_lost), 0))
                b_fewer = put(b_fewer, o_list, i_at, tl.sum(tl.where(o_two == 0, b_two_read, -b_two_read), 0))
            if paid < cheapest:
                cheapest, chosen = paid, i_offer
            first_form += number(p_offer, OFFER.forms)
            first_list += number(p_offer, OFFER.lists)
        first_list = 0
        for i_offer in tl.range(0, offers):
            p_offer = p_offers + i_offer * OFFER.width
            lists = per_kv // number(p_offer, OFFER.sharing)
            o_own = o_list - first_list - i_kv * lists
            b_used = tl.where((o_own >= 0) & (o_own < lists) & (i_offer == chosen), 1, b_used)
            first_list += number(p_offer, OFFER.lists)
    # What is left goes to lists that the next higher price would have sooner, those first that gain most by it.
    b_more *= b_used.to(tl.float32)
    b_gain = b_more / tl.maximum(b_fewer, 1.0)
    b_rank = tl.where(b_used == 1, b_gain, float("inf"))
    m_before = (b_rank[None, :] < b_rank[:, None]) | (
        (b_rank[None, :] == b_rank[:, None]) & (o_list[None, :] <= o_list[:, None])
    )
    b_spent = tl.sum(tl.where(m_before, b_more[None, :], 0.0), 1)
    left = allowed - tl.sum(b_lost * b_used.to(tl.float32), 0)
    b_option = tl.where(b_spent <= left, b_next, b_option)
    write_decisions(p_group, p_offers, p_forms, p_previous, b_used, b_option, o_head, o_list, causal, layer)


@triton.jit
def write_decisions(p_group, p_offers, p_forms, p_previous, b_used, b_option, o_head, o_list, causal, layer):
    """Forms and thresholds by list, what is kept, lost and read by head, and the picks that are carried over."""
    heads, rows, offers = number(p_group, GROUP.heads), number(p_group, GROUP.rows), number(p_group, GROUP.offers)
    b_pick, b_threshold = b_option // THRESHOLDS, b_option % THRESHOLDS
    first_list = 0
    for i_offer in tl.range(0, offers):
        p_offer = p_offers + i_offer * OFFER.width
        o_own = o_list - first_list
        m_own = (o_own >= 0) & (o_own < number(p_offer, OFFER.lists))
        tl.store(address(p_offer, OFFER.pick, tl.int32) + o_own, tl.where(b_used == 1, b_pick, -1), mask=m_own)
        tl.store(address(p_offer, OFFER.threshold, tl.int32) + o_own, b_threshold, mask=m_own)
        first_list += number(p_offer, OFFER.lists)
    tl.debug_barrier()
    m_head, blocks = o_head < heads, tl.cdiv(rows, ROW_BLOCK)
    b_picked = tl.full(o_head.shape, -1, tl.int32)
    b_kept = tl.zeros(o_head.shape, tl.float32)
    b_error = tl.zeros(o_head.shape, tl.float32)
    b_tiles = tl.zeros(o_head.shape, tl.float32)
    o_level, first_form = tl.arange(0, THRESHOLDS), 0
    for i_offer in tl.range(0, offers):
        p_offer = p_offers + i_offer * OFFER.width
        sharing, forms, table_first = (
            number(p_offer, OFFER.sharing),
            number(p_offer, OFFER.forms),
            number(p_offer, OFFER.first),
        )
        o_own = o_head // sharing
        b_pick = tl.load(address(p_offer, OFFER.pick, tl.int32) + o_own, mask=m_head, other=-1)
        b_threshold = tl.load(address(p_offer, OFFER.threshold, tl.int32) + o_own, mask=m_head, other=0)
        m_dense = b_pick == forms
        b_kept = tl.where(m_dense, 1.0, b_kept)
        b_tiles = tl.where(m_dense, causal, b_tiles)
        for i_form in tl.range(0, forms):
            p_form, m_form = p_forms + (table_first + i_form) * FORM.width, m_head & (b_pick == i_form)
            o_at = o_head * blocks * THRESHOLDS + b_threshold
            for _ in tl.range(0, blocks):
                b_error += tl.load(address(p_form, FORM.error, tl.float32) + o_at, mask=m_form, other=0.0) / rows
                b_kept += tl.load(address(p_form, FORM.mass, tl.float32) + o_at, mask=m_form, other=0.0) / rows
                o_at += THRESHOLDS
            m_level = m_form[:, None] & (o_level[None, :] >= b_threshold[:, None])
            p_counts = address(p_form, FORM.counts, tl.int32) + o_own[:, None] * THRESHOLDS + o_level[None, :]
            b_read = tl.sum(tl.load(p_counts, mask=m_level, other=0), 1)
            if number(p_form, FORM.far_kind) != 0:
                b_read += tl.load(address(p_form, FORM.others, tl.int32))
            b_tiles = tl.where(m_form, b_read.to(tl.float32) / sharing, b_tiles)
            b_picked = tl.where(m_form, first_form + i_form, b_picked)
        first_form += forms
    tl.store(address(p_group, GROUP.coverage, tl.float32) + o_head, b_kept, mask=m_head)
    tl.store(address(p_group, GROUP.error, tl.float32) + o_head, b_error, mask=m_head)
    tl.store(address(p_group, GROUP.tiles, tl.float32) + o_head, b_tiles, mask=m_head)
    tl.store(address(p_group, GROUP.picked, tl.int64) + o_head, b_picked.to(tl.int64), mask=m_head)
    if layer >= 0:
        tl.store(p_previous + o_head, b_picked.to(tl.int64), mask=m_head)
    # The next layer counts from nothing.
    tl.debug_barrier()
    for i_offer in tl.range(0, offers):
        p_offer = p_offers + i_offer * OFFER.width
        for i_form in tl.range(0, number(p_offer, OFFER.forms)):
            p_form = p_forms + (number(p_offer, OFFER.first) + i_form) * FORM.width
            p_counts = address(p_form, FORM.counts, tl.int32)
            for first in tl.range(0, number(p_offer, OFFER.lists) * THRESHOLDS, THRESHOLDS):
                tl.store(p_counts + first + o_level, 0)


@triton.jit
def write_list(p_tiles, given, query, keys, threshold, is_dense, FAR: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the tiles of a list of at least a threshold; returns how many are full, and how many there are."""
    p_form, p_searches, i_list, i_tile = given
    query_min, query_max, sink, reach = query
    tiles, p_min, p_max = keys
    if FAR:
        found = far_of(p_form, p_searches, i_list, i_tile, True)
    else:
        found = near_of(p_form, p_searches, i_list, i_tile, is_dense == 0)
    full, count = 0, 0
    for WRITE in tl.static_range(2):
        at_full, at_other = 0, full
        for first in tl.range(0, tiles, BLOCK):
            o_tile = first + tl.arange(0, BLOCK)
            m_tile = o_tile < tiles
            b_min = tl.load(p_min + o_tile, mask=m_tile, other=0)
            b_max = tl.load(p_max + o_tile, mask=m_tile, other=0)
            if FAR:
                b_level = far_levels(found, o_tile)
                m_full = (b_min >= sink) & (b_max <= query_min - reach)
            else:
                if is_dense:
                    b_level = tl.where(m_tile & (b_min <= query_max), ALWAYS, -1)
                else:
                    b_level = near_levels(found, o_tile)
                m_full = (b_max <= query_min) & ((b_max < sink) | (b_min > query_max - reach))
            m_listed = b_level >= threshold
            b_full, b_other = (m_listed & m_full).to(tl.int32), (m_listed & (m_full == 0)).to(tl.int32)
            if WRITE:
                tl.store(p_tiles + at_full + tl.cumsum(b_full, 0) - b_full, o_tile, mask=b_full != 0)
                tl.store(p_tiles + at_other + tl.cumsum(b_other, 0) - b_other, o_tile, mask=b_other != 0)
            at_full += tl.sum(b_full, 0)
            at_other += tl.sum(b_other, 0)
        full, count = at_full, at_other
    return full, count


@triton.jit
def lists_kernel(
    p_segments, p_forms, p_searches, SPLIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ORDERED: tl.constexpr
):
    """One list of a row group in one pass of a tiling: its full tiles, then the others, both ascending.

    The program that is the last one done of a pass puts its lists in order.
    """
    p_segment, i_program = p_segments + tl.program_id(1) * SEGMENT.width, tl.program_id(0)
    query_tiles, is_far = number(p_segment, SEGMENT.query_tiles), number(p_segment, SEGMENT.is_far) != 0
    if i_program >= query_tiles * number(p_segment, SEGMENT.lists):
        return
    p_pass = address(p_segment, SEGMENT.work, tl.int64)
    i_list, i_tile = i_program // query_tiles, i_program % query_tiles
    i_out = i_list * number(p_pass, PASS.query_tiles) + number(p_segment, SEGMENT.tile_first) + i_tile
    forms, pick, threshold = number(p_segment, SEGMENT.forms), number(p_segment, SEGMENT.unsearched), 0
    if forms > 0:
        pick = tl.load(address(p_segment, SEGMENT.pick, tl.int32) + i_list)
        threshold = tl.load(address(p_segment, SEGMENT.threshold, tl.int32) + i_list)
    p_form = p_forms + (number(p_segment, SEGMENT.first) + tl.where((pick >= 0) & (pick < forms), pick, 0)) * FORM.width
    query_min = tl.load(address(p_segment, SEGMENT.query_min, tl.int32) + i_tile)
    query_max = tl.load(address(p_segment, SEGMENT.query_max, tl.int32) + i_tile)
    tiles, sink, reach = number(p_segment, SEGMENT.tiles), 0, UNBOUNDED_REACH
    is_dense, reads = pick == forms, pick >= 0
    if reads & (is_dense == 0):
        sink, reach = number(p_form, FORM.sink), number(p_form, FORM.reach)
        if is_far:
            reads = number(p_form, FORM.far_kind) != 0
    elif is_far:
        reads = pick < -1
    begin = i_out.to(tl.int64) * number(p_segment, SEGMENT.widest)
    p_tiles = address(p_pass, PASS.tiles, tl.int32) + begin
    full, count = 0, 0
    if reads:
        given = p_form, p_searches, i_list, i_tile
        query = query_min, query_max, sink, reach
        keys = tiles, address(p_segment, SEGMENT.key_min, tl.int32), address(p_segment, SEGMENT.key_max, tl.int32)
        if is_far:
            full, count = write_list(p_tiles, given, query, keys, threshold, False, True, BLOCK)
        else:
            full, count = write_list(p_tiles, given, query, keys, threshold, is_dense, False, BLOCK)
    tl.store(address(p_pass, PASS.begin, tl.int32) + i_out, begin.to(tl.int32))
    tl.store(address(p_pass, PASS.count, tl.int32) + i_out, count)
    tl.store(address(p_pass, PASS.full, tl.int32) + i_out, full)
    tl.store(address(p_pass, PASS.sink, tl.int32) + i_out, sink)
    tl.store(address(p_pass, PASS.reach, tl.int32) + i_out, reach)
    # What all threads stored is there before the list counts as done.
    tl.debug_barrier()
    p_done = address(p_pass, PASS.done, tl.int32)
    if tl.atomic_add(p_done, 1, sem="acq_rel") == number(p_pass, PASS.lists) - 1:
        tl.store(p_done, 0)
        put_in_order(p_pass, SPLIT, BLOCK_ORDERED)


@triton.jit(do_not_specialize=["stride_out_row", "stride_out_head", "stride_lse_row"])
def guard_kernel(
    p_groups,
    p_requests,
    p_out,
    p_lse,
    p_report,
    stride_out_row,
    stride_out_head,
    stride_lse_row,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One request: compares its probe rows' output with the dense one and marks the worst heads, which must go dense.

    Their rows hold nothing from now on, and the lists of the repair have all of their tiles. ``p_report``
    [requests, 6]: tiles, causal tiles, coverage, error, heads that were marked, heads that run dense.
    """
    p_request = p_requests + tl.program_id(0) * REQUEST.width
    o_head, o_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_DV)
    tiles, causal_tiles, guarded, dense = 0.0, 0.0, 0.0, 0.0
    coverage, error = 1.0, 0.0
    for i_group in tl.range(0, number(p_request, REQUEST.groups)):
        p_group = p_groups + (number(p_request, REQUEST.first) + i_group) * GROUP.width
        heads, rows = number(p_group, GROUP.heads), number(p_group, GROUP.rows)
        m_head = o_head < heads
        causal = tl.load(address(p_group, GROUP.causal, tl.int32)).to(tl.float32)
        b_tiles = tl.load(address(p_group, GROUP.tiles, tl.float32) + o_head, mask=m_head, other=0.0)
        b_kept = tl.load(address(p_group, GROUP.coverage, tl.float32) + o_head, mask=m_head, other=0.0)
        b_guarded = tl.zeros([BLOCK_H], tl.int32)
        group_error = 0.0
        if number(p_group, GROUP.probed) != 0:
            b_error = tl.zeros([BLOCK_H], tl.float32)
            b_energy = tl.zeros([BLOCK_H], tl.float32)
            m_out = m_head[:, None] & (o_d < HEAD_DIM_V)[None, :]
            for i_row in tl.range(0, rows):
                o_row = o_head * rows + i_row
                b_row = tl.load(address(p_group, GROUP.out_rows, tl.int64) + o_row, mask=m_head, other=0)
                p_at = p_out + (b_row * stride_out_row + o_head * stride_out_head)[:, None] + o_d[None, :]
                p_dense = address(p_group, GROUP.output, tl.float32) + o_row[:, None] * HEAD_DIM_V + o_d[None, :]
                b_dense = tl.load(p_dense, mask=m_out, other=0.0)
                b_off = tl.load(p_at, mask=m_out, other=0.0).to(tl.float32) - b_dense
                b_error += tl.sum(b_off * b_off, 1)
                b_energy += tl.sum(b_dense * b_dense, 1)
            energy = tl.maximum(tl.sum(b_energy, 0), TINIEST)
            ceiling = real(p_group, GROUP.ceiling)
            # What the heads lose that lose no more than one: it is marked where that is too much.
            m_less = (b_error[None, :] < b_error[:, None]) | (
                (b_error[None, :] == b_error[:, None]) & (o_head[None, :] <= o_head[:, None])
            )
            b_remaining = tl.sum(tl.where(m_less, b_error[None, :], 0.0), 1)
            b_guarded = (m_head & (b_remaining > ceiling * ceiling * energy)).to(tl.int32)
            group_error = tl.sqrt(tl.sum(tl.where(b_guarded == 1, 0.0, b_error), 0) / energy)
            b_tiles = tl.where(b_guarded == 1, causal, b_tiles)
            b_kept = tl.where(b_guarded == 1, 1.0, b_kept)
            tl.store(address(p_group, GROUP.tiles, tl.float32) + o_head, b_tiles, mask=m_head)
            tl.store(address(p_group, GROUP.coverage, tl.float32) + o_head, b_kept, mask=m_head)
            tl.store(address(p_group, GROUP.guarded, tl.int32) + o_head, b_guarded, mask=m_head)
            p_count, p_full = (
                address(p_group, GROUP.repair_count, tl.int32),
                address(p_group, GROUP.repair_full, tl.int32),
            )
            p_dense_count, p_dense_full = (
                address(p_group, GROUP.dense_count, tl.int32),
                address(p_group, GROUP.dense_full, tl.int32),
            )
            for i_tile in tl.range(0, number(p_group, GROUP.query_tiles)):
                o_list = o_head * number(p_group, GROUP.all_query_tiles) + i_tile
                tl.store(p_count + o_list, tl.load(p_dense_count + i_tile) * b_guarded, mask=m_head)
                tl.store(p_full + o_list, tl.load(p_dense_full + i_tile) * b_guarded, mask=m_head)
            if tl.sum(b_guarded, 0) > 0:
                for first in tl.range(0, number(p_group, GROUP.num_slots), BLOCK):
                    o_slot = first + tl.arange(0, BLOCK)
                    m_slot = o_slot < number(p_group, GROUP.num_slots)
                    b_row = tl.load(address(p_group, GROUP.slots, tl.int64) + o_slot, mask=m_slot, other=0)
                    p_at = p_lse + b_row[:, None] * stride_lse_row + o_head[None, :]
                    tl.store(p_at, -float("inf"), mask=m_slot[:, None] & (b_guarded == 1)[None, :])
        tiles += tl.sum(b_tiles, 0)
        causal_tiles += causal * heads
        coverage = tl.minimum(coverage, tl.sum(b_kept, 0) / heads)
        error = tl.maximum(error, group_error)
        guarded += tl.sum(b_guarded, 0).to(tl.float32)
        dense += tl.sum((m_head & (b_tiles >= causal)).to(tl.int32), 0).to(tl.float32)
    p_report += tl.program_id(0) * 6
    tl.store(p_report, tiles)
    tl.store(p_report + 1, causal_tiles)
    tl.store(p_report + 2, coverage)
    tl.store(p_report + 3, error)
    tl.store(p_report + 4, guarded)
    tl.store(p_report + 5, dense)
