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

from . import choice, probe_triton, work_triton
from . import levels as scale
from .launch_table import OPTIONS
from .operands import Operands
from .probe_triton import Probed, Probes, Source
from .select import Form, FormsOffer, Near, Slash, Task
from .select_triton import (
    BLOCK,
    BLOCK_BANDS,
    BLOCK_HELD,
    FORM,
    GROUP,
    OFFER,
    ON_TEXT,
    REQUEST,
    ROWS,
    SEARCH,
    SEGMENT,
    candidates_kernel,
    curves_kernel,
    decide_kernel,
    guard_kernel,
    lists_kernel,
    rows_kernel,
)
from .sketch import HELD
from .tables import Table, bits, on_device, upload
from .tiles import Region, TileLists, TilePass, dense_lists
from .work_triton import as_they_lie, room_for_work, start


@dataclass(frozen=True)
class GroupResult:
    """What was selected for a row group; by head, fp32 [H] each: mass that is kept, error and tiles.

    ``picked`` int64 [H]: index of the form over all offers, -1 for dense attention. ``out_rows`` int64 [H, P]: each
    head's probe rows in the batch, and ``output`` fp32 [H, P, Dv]: their dense output, if they were probed. ``guarded``
    int32 [H]: whether the guard has marked the head.
    """

    coverage: torch.Tensor
    error: torch.Tensor
    tiles: torch.Tensor
    picked: torch.Tensor
    out_rows: torch.Tensor | None
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
        self._searches, self._forms, self._offers = Table(SEARCH), Table(FORM), Table(OFFER)
        self._least_lines: list[tuple[torch.Tensor, int, int]] = []
        self._most = {"rows": 0, "tiles": 0, "programs": 0, "lists": 0, "decided": 1, "bands": 0}
        near = passes[0][0]
        none = dense_lists(near, torch.zeros(self._heads, near.num_tiles, dtype=torch.bool, device=self._device))
        self.repair = start([(near, replace(none, work=as_they_lie(none)))])[0]
        self.passes = start([(one, self._lists(one)) for own in passes for one in own])
        self._everything = dense_lists(near, torch.ones(1, near.num_tiles, dtype=torch.bool, device=self._device))
        self._made = [self._group_of(task) for task in tasks]
        groups, segments, requests = Table(GROUP), Table(SEGMENT), Table(REQUEST)
        for task, made in zip(tasks, self._made, strict=True):
            self._add_group(groups, task, made)
            self._add_segments(segments, task, made)
        probed_groups = [
            Probed(task.keys, task.rows, made.selected.output, made.size, made.held)
            for task, made in zip(tasks, self._made, strict=True)
            if made.offers and made.selected.output is not None
        ]
        self._probes = Probes(probed_groups, operands, probed, self._new) if probed_groups else None
        numbers = [task.request for task in tasks]
        self.requests = list(dict.fromkeys(numbers))
        """The requests that reports are of."""
        for request in self.requests:
            requests.add(groups=numbers.count(request), first=numbers.index(request))
        tables = self._searches, self._forms, self._offers, groups, segments, requests
        self._counts = len(groups), len(segments)
        self._kept = [table.kept for table in tables]
        (
            self._search_table,
            self._form_table,
            self._offer_table,
            self._group_table,
            self._segment_table,
            self._request_table,
        ) = upload(tables, self._device)
        self._levels = self._new(self._most["programs"] * max(1, len(self._forms)) * BLOCK, dtype=torch.int8)

    def select(self, operands: Operands, layer: int) -> None:
        """Selects for one layer: fills the lists of :attr:`passes`.

        ``layer``: its id for what is carried over, -1 to carry nothing.
        """
        groups, segments = self._counts
        if self._forms:
            for first in range(0, self._heads, self._probed):
                block = slice(first, min(first + self._probed, self._heads))
                self._probe(operands.block(block), block)
            decide_kernel[groups,](
                self._group_table,
                self._offer_table,
                self._form_table,
                layer,
                BLOCK_H=triton.next_power_of_2(self._heads),
                BLOCK_L=triton.next_power_of_2(self._most["decided"]),
                num_warps=8,
                **OPTIONS,
            )
        lists_kernel[self._most["lists"], segments](
            self._segment_table,
            self._form_table,
            self._search_table,
            SPLIT=work_triton.SPLIT,
            BLOCK=BLOCK,
            BLOCK_ORDERED=work_triton.BLOCK_ORDERED,
            **OPTIONS,
        )

    def guard(self, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """Compares ``out`` with dense attention, empties heads in ``lse`` that must go dense, fills :attr:`repair`.

        Returns fp32 [requests, 6]: tiles, causal tiles, coverage, error, heads that are repaired and dense ones.
        """
        report = torch.empty(len(self.requests), 6, device=self._device)
        guard_kernel[len(self.requests),](
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

    def _probe(self, operands: Operands, block: slice) -> None:
        """Probes a block of heads and adds what it shows to the curves."""
        heads, searches = operands.heads, len(self._searches)
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
        curves_kernel[self._most["programs"], len(self._forms)](
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
        for levels, sharing, count in self._least_lines:
            own = levels[block.start // sharing : block.stop // sharing]
            best = own.topk(count, dim=1).indices
            own.scatter_(1, best, scale.ALWAYS)

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory that no other layer needs at the same time: those of other patterns have the same."""
        size = dtype, math.prod(shape)
        self._made_of[size] += 1
        key = *size, self._made_of[size]
        if key not in self._memory:
            self._memory[key] = torch.empty(size[1], dtype=dtype, device=self._device)
        return self._memory[key].view(shape)

    def _lists(self, tile_pass: TilePass) -> TileLists:
        """Room for the lists of a pass and the order that they start in."""
        lists = self._heads // tile_pass.sharing
        shape, widest = (lists, tile_pass.num_tiles), tile_pass.keys.widest
        begin, count, full = (self._new(math.prod(shape), dtype=torch.int32) for _ in range(3))
        listed = self._new(math.prod(shape) * widest, dtype=torch.int32)
        sink, reach = (self._new(*shape, dtype=torch.int32) for _ in range(2))
        work = room_for_work(tile_pass, self._group, self._new, lists)
        return TileLists(begin, count, full, listed, sink, reach, work)

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
        made = _Made(
            rows, tiles, self._new(heads, rows), selected, row_of.int(), view.causal_tiles.int(), len(self._offers)
        )
        for offer in task.offers if wants else ():
            if offer.forms:
                self._add_offer(task, made, offer)
        return made

    def _add_offer(self, task: Task, made: _Made, offer: FormsOffer) -> None:
        """Adds an offer and its forms."""
        sharing, first = offer.view.sharing, len(self._forms)
        lists = self._heads // sharing
        for form in offer.forms:
            self._add_form(task, made, offer.view, form)
        pick, threshold = (self._new(lists, dtype=torch.int32) for _ in range(2))
        made.offers[sharing] = {"pick": pick, "threshold": threshold, "first": first, "forms": len(offer.forms)}
        wanted = self._host(flag for flags in offer.wanted for flag in flags)
        self._offers.add(sharing=sharing, lists=lists, wanted=wanted, **made.offers[sharing])

    def _add_group(self, groups: Table, task: Task, made: _Made) -> None:
        heads, near = self._heads, self.repair[0]
        fixed = [task.fixed(head) for head in range(heads)]
        own, slots = task.tiles[1].near, near.rows[task.row_slots]
        repair, everything = self.repair[1], self._everything
        groups.add(
            **vars(made.selected),
            heads=heads,
            rows=made.rows,
            per_kv=max(made.offers, default=1),
            offers=len(made.offers),
            first_offer=made.first_offer,
            size=made.size,
            fixed=self._host(fixed),
            bound_to=self._host([task.wants(head) for head in range(heads)] if task.bound == 0 else fixed),
            bound=bits(task.bound**2),
            max_density=bits(task.max_density),
            ease=bits(task.ease),
            ceiling=bits(task.ceiling),
            causal=made.causal,
            picks=task.picks,
            pick_stride=task.picks.stride(0),
            probed=int(task.searched),
            repair_count=repair.count[own.start :],
            repair_full=repair.full[own.start :],
            dense_count=everything.count[own.start :],
            dense_full=everything.full[own.start :],
            query_tiles=own.stop - own.start,
            all_query_tiles=near.num_tiles,
            slots=slots,
            num_slots=slots.numel(),
        )
        self._need(decided=sum(heads // sharing for sharing in made.offers), rows=made.rows)

    def _need(self, **sizes: int) -> None:
        """Launches must be of these sizes at least."""
        for name, size in sizes.items():
            self._most[name] = max(self._most[name], size)

    def _host(self, values: Iterable[int]) -> torch.Tensor:
        """Integers of the host on the device."""
        return on_device([*values], torch.int32, self._device)

    def _held(self, made: _Made, source: Source) -> torch.Tensor:
        """Where what tiles hold of the keys of a source goes."""
        if source not in made.held:
            made.held[source] = self._new(HELD * self._probed * made.rows * made.tiles[source.cell])
        return made.held[source]

    def _search(self, task: Task, made: _Made, view: choice.View, region: Slash | Near, least_lines: int = 0) -> int:
        """The row of columns and diagonals, or of the lines of a far region, in the table."""
        key = view.sharing, region
        if key in made.searches:
            return made.searches[key]
        own: dict[str, int | torch.Tensor]
        if isinstance(region, Slash):
            slash, source = view.slash_tiles(*region), Source(False, 0, 0)
            cost, bands = slash.cost, -1
            own = {"low": slash.first.int(), "high": (slash.last + 1).int(), "row_own": slash.row_own.int()}
            own |= {"row_tile": view.row_tiles.int(), "always": slash.sink_tiles, "margin": slash.window_tiles}
        else:
            cell, source = view.cell, Source(True, *region)
            assert cell is not None
            cost, bands = cell.tiles(*region).cost, cell.num_bands
            own = {"low": cell.own_lo, "high": cell.own_hi, "row_tile": cell.row_tiles.int()}
            own |= {"band": cell.bands.int(), "band_of_row": cell.band_of_row.int()}
        tiles = made.tiles[source.cell]
        levels = self._new(self._heads // view.sharing, cost.numel(), dtype=torch.int32)
        if least_lines:
            self._least_lines.append((levels[:, :tiles], view.sharing, min(least_lines, tiles)))
        made.searches[key] = self._searches.add(
            **own,
            **{name: self._new(self._heads, made.rows) for name in ("share", "loose", "beside")},
            held=self._held(made, source),
            size=made.size,
            row_of=made.row_of,
            cost=cost.int(),
            causal=view.causal_tiles.int(),
            levels=levels,
            bound=bits(task.bound**2),
            rows=made.rows,
            turns=task.rows.turns,
            tiles=tiles,
            candidates=cost.numel(),
            bands=bands,
            sharing=view.sharing,
        )
        self._need(tiles=tiles, bands=bands)
        return made.searches[key]

    def _add_form(self, task: Task, made: _Made, view: choice.View, form: Form) -> None:
        heads, sharing, cell = self._heads, view.sharing, view.cell
        region = Near(form.sink, form.reach)
        row: dict[str, Any] = {}
        for name, keys in (("text", form.on_text), ("media", form.on_media)):
            if isinstance(keys, Slash):
                row |= {f"{name}_slash": 1, f"{name}_source": self._search(task, made, view, keys)}
            else:
                row |= {f"{name}_source": keys.sink, f"{name}_reach": keys.reach}
        sides: tuple[tuple[str, choice.View | choice.CellView | None], ...] = ("near", view), ("far", cell)
        for name, side in sides:
            if side is not None:
                for kind, tiles in (("query_", side.queries), ("", side.keys)):
                    row |= {f"{name}_{kind}min": tiles.min_pos, f"{name}_{kind}max": tiles.max_pos}
                    row[f"{name}_{kind}tiles"] = tiles.min_pos.numel()
                row |= {
                    f"{name}_text": side.keys.has_text.contiguous(),
                    f"{name}_media": side.keys.has_media.contiguous(),
                }
        curve = Source(form.far is not None, 0, 0)
        over: choice.View | choice.CellView = view
        if form.far is not None:
            assert cell is not None
            curve, over = Source(True, *region), cell
            row["far_kind"] = 2 if form.far.exact else 1
            if not form.far.exact:
                row["far_search"] = self._search(task, made, view, region, form.far.min_lines)
                row["far_on_text"] = ON_TEXT.get(form.far.on_text, 0)
        elif not form.searched:
            # Nothing of what lies beyond the window is kept.
            curve = Source(False, *region)
        blocks = triton.cdiv(made.rows, ROWS)
        self._forms.add(
            **row,
            sink=form.sink,
            reach=form.reach,
            held=self._held(made, curve),
            tiles=made.tiles[curve.cell],
            kept=int(form.far is not None or form.searched),
            size=made.size,
            row_of=made.row_of,
            row_tile=over.row_tiles.int(),
            rows=made.rows,
            error=self._new(heads, blocks, scale.LEVELS + 1),
            mass=self._new(heads, blocks, scale.LEVELS + 1),
            counts=self._new(heads // sharing, scale.LEVELS + 1, dtype=torch.int32).zero_(),
            others=view.count_near(*region).int(),
            sharing=sharing,
            is_union=int(form.on_text != form.on_media),
        )
        self._need(programs=self._probed * blocks + self._probed // sharing * over.queries.min_pos.numel())

    def _add_segments(self, segments: Table, task: Task, made: _Made) -> None:
        """Adds a row group's lists in all passes."""
        for tile_pass, lists in self.passes:
            tiles = task.tiles[tile_pass.sharing]
            is_far = tile_pass.region is Region.FAR
            own, keys = (tiles.far, task.keys.cell) if is_far else (tiles.near, task.keys.sequence)
            count, of_tile = own.stop - own.start, self._heads // tile_pass.sharing
            if not count:
                continue
            assert keys is not None
            assert lists.work is not None
            segments.add(
                **made.offers.get(tile_pass.sharing, {}),
                is_far=int(is_far),
                tile_first=own.start,
                query_tiles=count,
                widest=tile_pass.keys.widest,
                query_min=tile_pass.min_pos[own],
                query_max=tile_pass.max_pos[own],
                key_min=keys.tile_min,
                key_max=keys.tile_max,
                tiles=keys.tile_min.numel(),
                # Without forms, lists of single heads are dense, others empty.
                unsearched=0 if tile_pass.sharing == 1 and not made.offers else -1,
                lists=of_tile,
                work=lists.work.row,
            )
            self._need(lists=count * of_tile)


@dataclass(frozen=True)
class _Made:
    """What there is of a row group: memory, and where in the tables it is.

    ``tiles``: key tiles by whether of the cell order. ``offers``: by how many heads share, what the rows of their lists
    have of an offer: its forms, and what is decided.
    """

    rows: int
    tiles: dict[bool, int]
    size: torch.Tensor
    selected: GroupResult
    row_of: torch.Tensor
    causal: torch.Tensor
    first_offer: int
    held: dict[Source, torch.Tensor] = field(default_factory=dict)
    searches: dict[tuple[int, Slash | Near], int] = field(default_factory=dict)
    offers: dict[int, dict[str, Any]] = field(default_factory=dict)
