"""What a forward's selections on a GPU need beside a layer's operands: tables, and memory for all stages.

Made once per forward for all layers whose heads run the same patterns, so that a layer launches kernels and does
nothing else: none of their arguments changes between layers but the layer's own operands and its id. A row of a table
is what :mod:`.select_triton` reads of one search, form, row group, pass or request, in 64-bit numbers and addresses.

Memory for H heads that are probed at a time, P probe rows of each, n key tiles: ``4 * HELD * H * P * n`` bytes for each
region that is asked for; ``4 * G * T * n`` for the lists of a pass. Maps of tiles there are none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton

from . import choice, probe_triton
from . import levels as scale
from .attend import SPLIT, WORK_FIELDS, pieces_of, places, work_row
from .launch_table import OPTIONS
from .operands import Operands
from .probe_triton import Probed, Probes, Source
from .select import Form, Near, Slash, Task
from .select_triton import (
    BLOCK,
    BLOCK_BANDS,
    BLOCK_HELD,
    BLOCK_ORDERED,
    FORM_FIELDS,
    GROUP_FIELDS,
    OFFER_FIELDS,
    ON_TEXT,
    ROWS,
    SEARCH_FIELDS,
    candidates_kernel,
    curves_kernel,
    decide_kernel,
    guard_kernel,
    lists_kernel,
    rows_kernel,
)
from .sketch import HELD
from .tables import on_device
from .tiles import Region, Started, TileLists, TilePass, Work, dense_lists


@dataclass(frozen=True)
class GroupResult:
    """What was selected for a row group; by head, fp32 [H] each: mass that is kept, error and tiles.

    ``picked`` int64 [H]: index of the form over all offers, -1 for dense attention. ``rows`` int64 [H, P]: each head's
    probe rows in the batch, and ``output`` fp32 [H, P, Dv]: their dense output, if they were probed. ``guarded`` int32
    [H]: whether the guard has marked the head.
    """

    coverage: torch.Tensor
    error: torch.Tensor
    tiles: torch.Tensor
    picked: torch.Tensor
    rows: torch.Tensor | None
    output: torch.Tensor | None
    guarded: torch.Tensor


class Prepared:
    """Tables and memory of the selections of a forward, for layers that have the same patterns.

    ``passes``: the passes of all tilings in their order, with the lists that a selection writes. ``repair``: the pass
    for heads that the guard sends to dense.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        passes: Sequence[Sequence[TilePass]],
        operands: Operands,
        probed: int,
        memory: dict[Any, torch.Tensor],
    ) -> None:
        """``passes``: by tiling. ``operands``: of a layer like those that will come. ``probed``: heads at a time.

        ``memory``: what has been allocated for other layers' patterns, and is written to in turn.
        """
        self._memory, self._made_of = memory, Counter[tuple[torch.dtype, int]]()
        self._probed = probed
        self._heads, self._group, self._first = operands.heads, operands.group, operands.first
        self._head_dim_v, self._device = operands.value_pool.shape[2], operands.query.device
        self._kept: list[torch.Tensor] = []
        self._pass_rows: dict[int, int] = {}
        self._searches: list[list[int]] = []
        self._forms: list[list[int]] = []
        self._most = {"rows": 0, "tiles": 0, "programs": 0, "lists": 0, "decided": 1, "bands": 0}
        near = passes[0][0]
        self.repair = self._started([(near, self._repair(near))])[0]
        self.passes = self._started([(one, self._lists(one)) for own in passes for one in own])
        self._everything = dense_lists(near, torch.ones(1, near.num_tiles, dtype=torch.bool, device=self._device))
        self._made = [self._group_of(task) for task in tasks]
        groups = [self._group_row(task, made) for task, made in zip(tasks, self._made, strict=True)]
        segments = [row for task, made in zip(tasks, self._made, strict=True) for row in self._segments(task, made)]
        probed_groups = [
            Probed(task.keys, task.rows, made.selected.output, made.size, made.held)
            for task, made in zip(tasks, self._made, strict=True)
            if made.forms and made.selected.output is not None
        ]
        self._probes = Probes(probed_groups, operands, probed, self._new) if probed_groups else None
        numbers = [task.request for task in tasks]
        self._requests = list(dict.fromkeys(numbers))
        requests = [[numbers.count(request), numbers.index(request)] for request in self._requests]
        # Kernels read numbers of the first row where they need none.
        every = (
            self._searches or [[0] * SEARCH_FIELDS],
            self._forms or [[0] * FORM_FIELDS],
            groups,
            segments,
            requests,
        )
        tables = torch.split(
            on_device([x for rows in every for row in rows for x in row], torch.int64, self._device),
            [sum(map(len, rows)) for rows in every],
        )
        self._search_table, self._form_table, self._group_table, self._pass_table, self._request_table = tables
        self._levels = self._new(self._most["programs"] * max(1, len(self._forms)) * BLOCK, dtype=torch.int8)
        self._programs = len(self._searches), len(self._forms), len(groups), len(segments)

    def select(self, operands: Operands, layer: int) -> None:
        """Selects for one layer: fills the lists of :attr:`passes`.

        ``layer``: its id for what is carried over, -1 to carry nothing.
        """
        _, forms, groups, segments = self._programs
        if forms:
            for first in range(0, self._heads, self._probed):
                block = slice(first, min(first + self._probed, self._heads))
                self._probe(operands.block(block), block)
            decide_kernel[groups,](
                self._group_table,
                self._form_table,
                layer,
                BLOCK_H=triton.next_power_of_2(self._heads),
                BLOCK_L=triton.next_power_of_2(self._most["decided"]),
                num_warps=8,
                **OPTIONS,
            )
        lists_kernel[self._most["lists"], segments](
            self._pass_table,
            self._form_table,
            self._search_table,
            SPLIT=SPLIT,
            BLOCK=BLOCK,
            BLOCK_ORDERED=BLOCK_ORDERED,
            **OPTIONS,
        )

    def guard(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Compares ``out`` with dense attention, empties heads in ``lse`` that must go dense, fills :attr:`repair`.

        Returns fp32 [requests, 6]: tiles, causal tiles, coverage, error, heads that are repaired and dense ones.
        """
        report = torch.empty(len(self._requests), 6, device=self._device)
        guard_kernel[len(self._requests),](
            self._group_table,
            self._request_table,
            out,
            lse,
            report,
            out.stride(0),
            out.stride(1),
            lse.stride(0),
            HEAD_DIM_V=self._head_dim_v,
            BLOCK_DV=max(128, triton.next_power_of_2(self._head_dim_v)),
            BLOCK_H=triton.next_power_of_2(self._heads),
            BLOCK=BLOCK,
            num_warps=8,
            **OPTIONS,
        )
        return report

    @property
    def selected(self) -> list[GroupResult]:
        """What the last selection came to, by row group."""
        return [made.selected for made in self._made]

    @property
    def requests(self) -> list[int]:
        """The requests that reports are of."""
        return self._requests

    def _probe(self, operands: Operands, block: slice) -> None:
        """Probes a block of heads and adds what it shows to the curves."""
        heads, (searches, forms, _, _) = operands.heads, self._programs
        assert self._probes is not None
        probe_triton.run(operands, self._probes, block.start)
        if searches:
            given = self._search_table, heads, block.start
            rows_kernel[self._most["rows"], heads, searches](*given, BLOCK=BLOCK, **OPTIONS)
            candidates_kernel[triton.cdiv(self._most["tiles"], BLOCK) + 1, heads, searches](
                *given,
                BLOCK=BLOCK,
                BLOCK_BANDS=max(BLOCK_BANDS, triton.next_power_of_2(self._most["bands"] + 1)),
                **OPTIONS,
            )
            self._take_lines(block)
        curves_kernel[self._most["programs"], forms](
            self._form_table,
            self._search_table,
            self._levels,
            heads,
            block.start,
            BLOCK=BLOCK,
            BLOCK_HELD=BLOCK_HELD,
            **OPTIONS,
        )

    def _take_lines(self, block: slice) -> None:
        """Takes the fewest v-lines that each list must have, where it must have some."""
        for made in self._made:
            for levels, tiles, sharing, count in made.least_lines:
                own = levels[block.start // sharing : block.stop // sharing, :tiles]
                best = own.topk(min(count, tiles), dim=1).indices
                own.scatter_(1, best, scale.ALWAYS)

    def _at(self, tensor: torch.Tensor) -> int:
        """The address of a tensor that is kept."""
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _ints(self, tensor: torch.Tensor) -> int:
        return self._at(tensor.to(torch.int32).contiguous())

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory that no other layer needs at the same time: those of other patterns have the same."""
        size = dtype, math.prod(shape)
        self._made_of[size] += 1
        key = *size, self._made_of[size]
        if key not in self._memory:
            self._memory[key] = torch.empty(size[1], dtype=dtype, device=self._device)
        return self._memory[key].view(shape)

    def _started(self, passes: Sequence[tuple[TilePass, TileLists]]) -> list[tuple[TilePass, TileLists]]:
        """The same with one launch for all passes over the same keys, which is that of the first."""
        started: dict[int, Started] = {}
        for region in Region:
            own = [index for index, (one, _) in enumerate(passes) if one.region is region]
            rows, pieces, programs, lanes = [], 0, 0, 0
            for index in own:
                tile_pass, lists = passes[index]
                assert lists.work is not None
                done = self._at(torch.zeros(1, dtype=torch.int32, device=self._device))
                rows += work_row(tile_pass, lists, lists.work, pieces, done)
                pieces += lists.work.pieces
                programs, lanes = max(programs, lists.work.order.numel()), max(lanes, tile_pass.lanes)
            table = on_device(rows, torch.int64, self._device)
            for number, index in enumerate(own):
                self._pass_rows[id(passes[index][0])] = self._at(table[number * WORK_FIELDS :])
                started[index] = Started(table[:0], 0, 0, 0) if number else Started(table, programs, pieces, lanes)
        works = [replace(lists.work, started=started[index]) for index, (_, lists) in enumerate(passes) if lists.work]
        return [(one, replace(lists, work=work)) for (one, lists), work in zip(passes, works, strict=True)]

    def _lists(self, tile_pass: TilePass) -> TileLists:
        """Room for the lists of a pass and the order that they start in."""
        lists = self._heads // tile_pass.sharing
        shape, widest = (lists, tile_pass.num_tiles), tile_pass.keys.widest
        begin, count, full = (self._new(math.prod(shape), dtype=torch.int32) for _ in range(3))
        listed = self._new(math.prod(shape) * widest, dtype=torch.int32)
        sink, reach = (self._new(*shape, dtype=torch.int32) for _ in range(2))
        pieces = pieces_of(count.numel(), widest)
        order, first, until = (self._new(pieces + count.numel(), dtype=torch.int32) for _ in range(3))
        given = places(shape, self._group // tile_pass.sharing, self._device).flatten().argsort(stable=True)
        return TileLists(begin, count, full, listed, sink, reach, Work(order, first, until, pieces, given.int()))

    def _repair(self, near: TilePass) -> TileLists:
        """Lists of all tiles for heads that the guard marks, in the order of memory; none so far."""
        shape = self._heads, near.num_tiles
        lists = dense_lists(near, torch.zeros(shape, dtype=torch.bool, device=self._device))
        order = torch.arange(math.prod(shape), dtype=torch.int32, device=self._device)
        return replace(lists, work=Work(order, lists.count, lists.count))

    def _group_of(self, task: Task) -> _Made:
        """Memory of a row group, and what its forms have in the tables."""
        heads, rows, view = self._heads, task.rows.per_head, task.offers[0].view
        row_of = task.rows.of(heads, self._group, self._first)
        tiles = {
            cell: side.keys.min_pos.numel() for cell, side in ((False, view), (True, view.cell)) if side is not None
        }
        wants = task.searched
        selected = GroupResult(
            torch.ones(heads, device=self._device),
            torch.zeros(heads, device=self._device),
            view.causal_tiles.float().repeat(heads),
            torch.full((heads,), -1, device=self._device),
            task.rows.rows[row_of] if wants else None,
            self._new(heads, rows, self._head_dim_v) if wants else None,
            self._new(heads, dtype=torch.int32).zero_(),
        )
        given = task.bound**2, task.max_density, task.ease, task.ceiling
        numbers = on_device(given, torch.float32, self._device)
        addresses = self._ints(row_of), self._at(numbers), self._ints(view.causal_tiles)
        made = _Made(wants, rows, tiles, self._new(heads, rows), selected, *addresses)
        for offer in task.offers if wants else ():
            if offer.forms:
                forms = [self._form(task, made, offer.view, form) for form in offer.forms]
                lists = heads // offer.view.sharing
                pick, threshold = (self._new(lists, dtype=torch.int32) for _ in range(2))
                made.offers[offer.view.sharing] = _Offered(len(self._forms), len(forms), pick, threshold)
                self._forms += forms
        return made

    def _group_row(self, task: Task, made: _Made) -> list[int]:
        """A row group's row in the table."""
        heads, found, near = self._heads, made.selected, self.repair[0]
        fixed = [task.fixed(head) for head in range(heads)]
        bound_to = [task.wants(head) for head in range(heads)] if task.bound == 0 else fixed
        per_kv = max(made.offers, default=1)
        row = [heads, made.rows, per_kv, len(made.offers), self._at(made.size), self._host(fixed), self._host(bound_to)]
        row += [made.numbers, made.causal, self._at(task.picks)]
        row += [self._at(x) for x in (found.coverage, found.error, found.tiles, found.picked)]
        row += [task.picks.stride(0), int(made.probed)]
        row += [0 if x is None else self._at(x) for x in (found.rows, found.output, found.guarded)]
        own, slots = task.tiles[1].near, near.rows[task.row_slots]
        row += [
            self._at(x[own.start :]) for each in (self.repair[1], self._everything) for x in (each.count, each.full)
        ]
        row += [own.stop - own.start, near.num_tiles, self._at(slots), slots.numel()]
        row += [0] * (GROUP_FIELDS - 2 * OFFER_FIELDS - len(row))
        decided = 0
        for offer in task.offers:
            offered = made.offers.get(offer.view.sharing)
            if offered is not None:
                lists_of = heads // offer.view.sharing
                row += [offer.view.sharing, lists_of, offered.forms, offered.first]
                row += [self._host([flag for flags in offer.wanted for flag in flags])]
                row += [self._at(offered.pick), self._at(offered.threshold), 0]
                decided += lists_of
        self._most["decided"] = max(self._most["decided"], decided)
        self._most["rows"] = max(self._most["rows"], made.rows)
        return row + [0] * (GROUP_FIELDS - len(row))

    def _host(self, values: Iterable[int]) -> int:
        """Integers of the host on the device."""
        return self._at(on_device([*values], torch.int32, self._device))

    def _held(self, made: _Made, source: Source) -> int:
        """Where what tiles hold of the keys of a source goes."""
        if source not in made.held:
            made.held[source] = self._new(HELD * self._probed * made.rows * made.tiles[source.cell])
        return made.held[source].data_ptr()

    def _search(self, task: Task, made: _Made, view: choice.View, region: Slash | Near, least_lines: int = 0) -> int:
        """The row of columns and diagonals, or of the lines of a far region, in the table."""
        key = view.sharing, region
        if key in made.searches:
            return made.searches[key]
        if isinstance(region, Slash):
            slash = view.slash_tiles(*region)
            tiles, cost, bands = made.tiles[False], slash.cost, -1
            held = self._held(made, Source(False, 0, 0))
            bounds = slash.first, slash.last + 1
            by_row = [self._ints(view.row_tiles), self._ints(slash.row_own), 0, 0]
            always, margin = slash.sink_tiles, slash.window_tiles
        else:
            cell = view.cell
            assert cell is not None
            tiles, cost, bands = made.tiles[True], cell.tiles(*region).cost, cell.num_bands
            held = self._held(made, Source(True, *region))
            bounds = cell.own_lo, cell.own_hi
            by_row = [self._ints(cell.row_tiles), 0, self._ints(cell.bands), self._ints(cell.band_of_row)]
            always = margin = 0
            self._most["bands"] = max(self._most["bands"], bands)
        levels = self._new(self._heads // view.sharing, cost.numel(), dtype=torch.int32)
        if least_lines:
            made.least_lines.append((levels, tiles, view.sharing, least_lines))
        row = [held, self._at(made.size), made.row_of, *map(self._ints, bounds), *by_row, self._ints(cost)]
        row.append(self._ints(view.causal_tiles))
        row += [made.numbers, self._at(levels)]
        row += [self._at(self._new(self._heads, made.rows)) for _ in range(3)]
        row += [made.rows, task.rows.turns, tiles, cost.numel(), bands, always, margin, view.sharing]
        made.searches[key] = len(self._searches)
        self._searches.append(row)
        self._most["tiles"] = max(self._most["tiles"], tiles)
        return made.searches[key]

    def _form(self, task: Task, made: _Made, view: choice.View, form: Form) -> list[int]:
        """A form's row in the table."""
        heads, sharing = self._heads, view.sharing

        def source(keys: Near | Slash) -> list[int]:
            if isinstance(keys, Near):
                return [0, *keys]
            return [1, self._search(task, made, view, keys), 0]

        row = [*source(form.on_text), *source(form.on_media)]
        region, cell = Near(form.sink, form.reach), view.cell
        if form.far is None:
            row += [0, 0, 0]
        elif form.far.exact:
            row += [2, 0, 0]
        else:
            lines = self._search(task, made, view, region, form.far.min_lines)
            row += [1, lines, ON_TEXT.get(form.far.on_text, 0)]
        row += region
        query_tiles, curve = view.queries.min_pos.numel(), Source(form.far is not None, 0, 0)
        for side in (view, cell):
            if side is None:
                row += [0] * 8
                continue
            queries, keys = side.queries, side.keys
            row += [self._ints(x) for x in (queries.min_pos, queries.max_pos, keys.min_pos, keys.max_pos)]
            row += [self._at(x.contiguous()) for x in (keys.has_text, keys.has_media)]
            row += [queries.min_pos.numel(), keys.min_pos.numel()]
        row_tiles, kept = view.row_tiles, 1
        if form.far is not None:
            assert cell is not None
            curve, row_tiles, query_tiles = Source(True, *region), cell.row_tiles, cell.queries.min_pos.numel()
        elif not form.searched:
            # Nothing of what lies beyond the window is kept.
            curve, kept = Source(False, *region), 0
        row += [self._held(made, curve), made.tiles[curve.cell], kept, self._at(made.size), made.row_of]
        row += [self._ints(row_tiles), made.rows]
        blocks = triton.cdiv(made.rows, ROWS)
        row += [self._at(self._new(heads, blocks, scale.LEVELS + 1)) for _ in range(2)]
        row += [self._at(self._new(heads // sharing, scale.LEVELS + 1, dtype=torch.int32).zero_())]
        row += [self._ints(view.count_near(*region)), sharing, int(form.on_text != form.on_media)]
        programs = self._probed * blocks + self._probed // sharing * query_tiles
        self._most["programs"] = max(self._most["programs"], programs)
        return row

    def _segments(self, task: Task, made: _Made) -> list[list[int]]:
        """The rows of a row group's lists in all passes."""
        rows = []
        for tile_pass, _ in self.passes:
            tiles = task.tiles[tile_pass.sharing]
            is_far = tile_pass.region is Region.FAR
            own, keys = (tiles.far, task.keys.cell) if is_far else (tiles.near, task.keys.sequence)
            count = own.stop - own.start
            if not count:
                continue
            assert keys is not None
            offered = made.offers.get(tile_pass.sharing)
            row = [0, 0] if offered is None else [self._at(offered.pick), self._at(offered.threshold)]
            row += [int(is_far), *((0, 0) if offered is None else (offered.first, offered.forms))]
            row += [own.start, count, tile_pass.keys.widest]
            row += [self._ints(x[own]) for x in (tile_pass.min_pos, tile_pass.max_pos)]
            row += [self._at(keys.tile_min), self._at(keys.tile_max), keys.tile_min.numel()]
            # Without forms, lists of single heads are dense, others empty.
            row += [0 if tile_pass.sharing == 1 and not made.offers else -1]
            row += [self._heads // tile_pass.sharing, self._pass_rows[id(tile_pass)]]
            self._most["lists"] = max(self._most["lists"], count * (self._heads // tile_pass.sharing))
            rows.append(row)
        return rows


@dataclass(frozen=True)
class _Offered:
    """An offer's forms in the table, and what is decided by list."""

    first: int
    forms: int
    pick: torch.Tensor
    threshold: torch.Tensor


@dataclass(frozen=True)
class _Made:
    """What there is of a row group: memory, and addresses of it.

    ``probed``: whether some head of the layer does not run dense. ``tiles``: key tiles by whether of the cell order.
    """

    probed: bool
    rows: int
    tiles: dict[bool, int]
    size: torch.Tensor
    selected: GroupResult
    row_of: int
    numbers: int
    causal: int
    held: dict[Source, torch.Tensor] = field(default_factory=dict)
    searches: dict[tuple[int, Slash | Near], int] = field(default_factory=dict)
    offers: dict[int, _Offered] = field(default_factory=dict)
    least_lines: list[tuple[torch.Tensor, int, int, int]] = field(default_factory=list)

    @property
    def forms(self) -> int:
        """Forms that were proposed."""
        return sum(offered.forms for offered in self.offers.values())
