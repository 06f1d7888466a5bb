"""Sparse prefill of one layer: probe, select, attend, guard over a :class:`~mminference_sgl.method.plan.ForwardPlan`.

Knows neither SGLang nor models, so it is what tests and benchmarks drive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch

from mminference_sgl.kernels import choice as choices
from mminference_sgl.kernels import ops, probe
from mminference_sgl.kernels.choice import Budget, Choice, Proposal
from mminference_sgl.kernels.operands import COPIED_BYTES, Operands
from mminference_sgl.kernels.select import Far, Form, FormsOffer, Near, Selection, Slash, Task
from mminference_sgl.kernels.sketch import HELD
from mminference_sgl.kernels.stages import Stages, ease_on, stages_of
from mminference_sgl.kernels.tiles import UNBOUNDED, TileLists, TilePass, dense_lists, lists_from_map
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import CARRYING_LAYERS, ForwardPlan, RowGroup, Tiling
from mminference_sgl.method.stage_clock import StageClock

PROBE_BYTES = 128 << 20
"""Bound on the probe's weights, or on what its key tiles hold, held at a time; there are three of the latter."""
PROBE_BYTES_CPU = 16 << 20
"""The same on a CPU, where temporaries beyond 32 MiB are mapped anew each time, at more than the arithmetic's cost."""
AIM = 0.8
"""Share of the error's bound that selection allows; what it estimates and what is measured differ by less than that."""
MAP_TILES = 1 << 26
"""Bound on the tiles of a pass's map, beyond which heads run in blocks; docs/kernels.md says what memory that means."""


@dataclass(frozen=True)
class LayerReport:
    """What one layer of one forward did for one request; 0-d tensors, so that nothing waits for the device.

    ``tiles`` / ``causal``: tiles computed and those dense attention computes, over all heads.
    ``coverage``: mean over heads of the probe rows' kept mass (1 where nothing was left out);
    ``error``: relative output error of the probe rows over all heads together, behind the guard's repairs;
    ``guarded``: heads that the guard sent to dense; ``dense``: these and others that computed every tile, as they save
    nothing at the error that is allowed; of media and of text rows each.
    """

    request: int
    tiles: torch.Tensor
    causal: torch.Tensor
    coverage: torch.Tensor
    error: torch.Tensor
    guarded: torch.Tensor
    dense: torch.Tensor


Passes = list[tuple[TilePass, TileLists]]
"""Passes of a layer with the tile lists of some heads, the sequence pass of single heads first."""


@dataclass(frozen=True)
class DenseRows:
    """Dense attention of the probe rows: each head's batch rows, int64 [H, P], and their output, fp32 [H, P, Dv]."""

    rows: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[DenseRows]) -> DenseRows:
        """Those of blocks of heads, as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.rows for part in parts]), torch.cat([part.output for part in parts]))

    def lost(self, out: torch.Tensor) -> torch.Tensor:
        """Squared length of what the rows of an output differ by, the sum over each head's: fp32 [H]."""
        head = torch.arange(self.rows.shape[0], device=out.device)[:, None]
        return (out[self.rows, head].float() - self.output).square().sum((1, 2))


@dataclass(frozen=True)
class Selected:
    """What was selected for the rows of a group, for a block of ``heads``.

    ``group``: index among the plan's groups. ``picked`` int64 [H]: index of a head's proposal among those of all
    ``offers``, -1 for dense attention.
    ``energy`` fp32 [H]: of the probe rows' dense output, mean over the rows. ``dense``: that output.
    """

    group: int
    heads: slice
    choice: Choice
    offers: Sequence[choices.Offer]
    picked: torch.Tensor
    energy: torch.Tensor
    dense: DenseRows


@dataclass
class Trace:
    """Notes of one layer for those who look inside: what was selected, for the groups that had a choice.

    ``guarded``: by group of the plan, the heads that went dense behind it, bool [H].
    """

    selected: list[Selected] = field(default_factory=list)
    guarded: list[torch.Tensor] = field(default_factory=list)


def run_layer(
    operands: Operands,
    plan: ForwardPlan,
    specs: Sequence[HeadSpec],
    config: Config,
    out: torch.Tensor,
    implementation: str,
    layer: int | None = None,
    trace: Trace | None = None,
    clock: StageClock | None = None,
    dense: Collection[int] = (),
) -> list[LayerReport]:
    """Computes the plan's rows of one layer into ``out``.

    Args:
        operands: of all heads of this rank.
        specs: one head spec per query head of this rank.
        out: [batch rows, H, Dv].
        layer: id under which the heads' picks are carried over to the request's next chunk; None carries nothing.
        trace: where to note what was selected.
        clock: where to note what takes how long.
        dense: requests of the plan all of whose heads run dense in this layer.

    Returns:
        One report per sparse request.
    """
    stages = stages_of(implementation)
    whole = _Layer(operands, plan, specs, slice(0, len(specs)), config, layer, stages, trace, clock, frozenset(dense))
    reports = _run(whole, out, implementation)
    whole.enter("")
    return reports


def _run(whole: _Layer, out: torch.Tensor, implementation: str) -> list[LayerReport]:
    stages, trace, config = whole.stages, whole.trace, whole.config
    # Captures look at levels and maps, which there are in no other way.
    if stages.prepare is not None and trace is None:
        return _run_prepared(whole, out, implementation)
    merged, lse = _attend(whole, out, implementation)
    whole.enter("guard")
    for item in merged:
        item.measure(out, config.ceiling(item.group.modality))
    failing = [item for item in merged if item.dense is not None]
    if stages.waits:
        failing = [item for item in failing if bool(item.guarded.any())]
    if failing:
        _repair(whole, failing, torch.cat(lse, dim=1), out)
    if trace is not None:
        trace.guarded = [item.guarded for item in merged]
    return _reports(merged)


def _attend(layer: _Layer, out: torch.Tensor, implementation: str) -> tuple[list[_Watched], list[torch.Tensor]]:
    """Selects and attends in blocks of heads: what is known of the row groups, and the blocks' LSE."""
    watched, lse = [], []
    for part in layer.parts():
        part.enter("select")
        passes, seen = _select(part)
        watched.append(seen)
        part.enter("attend")
        lse.append(ops.sparse_prefill(part.operands, passes, out[:, part.heads], implementation))
    return [_Watched.of(parts) for parts in zip(*watched, strict=True)], lse


@dataclass(frozen=True)
class HeadReport:
    """What the heads of one layer read for one row group: ``tiles`` int64 and ``coverage`` fp32 [H], causal tiles."""

    group: RowGroup
    tiles: torch.Tensor
    causal: torch.Tensor
    coverage: torch.Tensor


def run_heads(
    operands: Operands,
    plan: ForwardPlan,
    specs: Sequence[HeadSpec],
    config: Config,
    out: torch.Tensor,
    implementation: str,
) -> list[HeadReport]:
    """As :func:`run_layer` without a guard, and with figures by head: one report per row group of the plan."""
    layer = _Layer(operands, plan, specs, slice(0, len(specs)), config, None, stages_of(implementation))
    return [
        HeadReport(item.group, item.tiles, item.causal, item.coverage)
        for item in _attend(layer, out, implementation)[0]
    ]


def selections(
    operands: Operands, plan: ForwardPlan, group: RowGroup, config: Config, implementation: str, layer: int | None
) -> Iterator[tuple[slice, Selection]]:
    """Probes a row group, a block of heads at a time: what patterns are proposed from, for those who compare them."""
    specs = [HeadSpec()] * operands.heads
    whole = _Layer(operands, plan, specs, slice(0, len(specs)), config, layer, stages_of(implementation))
    for part, probed in whole.probes(group):
        yield part.heads, whole.selection(group, probed)


def _repair(layer: _Layer, failing: Sequence[_Watched], lse: torch.Tensor, out: torch.Tensor) -> None:
    """Computes the guarded heads again, densely; where there are none, the lists of the pass are empty."""
    near = layer.plan.near
    wanted = torch.zeros(len(layer.specs), near.num_tiles, dtype=torch.bool, device=out.device)
    for item in failing:
        rows = near.rows[item.group.row_slots]
        lse[rows] = lse[rows].masked_fill(item.guarded, float("-inf"))
        wanted[:, item.group.near] = item.guarded[:, None]
    for part in layer.parts():
        own = part.heads
        lists = near, dense_lists(near, wanted[own])
        ops.merge_pass(part.operands, lists, out[:, own], lse[:, own], layer.stages.repair)


def select_layer(
    operands: Operands, plan: ForwardPlan, specs: Sequence[HeadSpec], config: Config, implementation: str = "torch"
) -> tuple[Passes, list[LayerReport]]:
    """Probes the plan's requests and chooses the tiles of every head; arguments as in :func:`run_layer`.

    The reports' error is 0, as nothing has been computed, and no head has gone dense for it.
    """
    layer = _Layer(operands, plan, specs, slice(0, len(specs)), config, None, stages_of(implementation))
    if layer.stages.prepare is None:
        passes, watched = _select(layer)
        return passes, _reports(watched)
    prepared = layer.prepared()
    prepared.select(operands, -1)
    return prepared.passes, _reports(_watched_of(layer, prepared))


@dataclass
class _Watched:
    """A row group's choice and what is known of it, by head: [H] each.

    ``dense``: None where nothing was left out.
    """

    group: RowGroup
    tiles: torch.Tensor
    causal: torch.Tensor
    coverage: torch.Tensor
    dense: DenseRows | None
    error: torch.Tensor
    guarded: torch.Tensor

    @classmethod
    def of(cls, parts: Sequence[_Watched]) -> _Watched:
        """What is known of blocks of heads, as one."""
        if len(parts) == 1:
            return parts[0]
        tiles, coverage, guarded = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("tiles", "coverage", "guarded")
        )
        dense = [part.dense for part in parts if part.dense is not None]
        first = parts[0]
        return cls(
            first.group, tiles, first.causal, coverage, DenseRows.of(dense) if dense else None, first.error, guarded
        )

    def measure(self, out: torch.Tensor, ceiling: float) -> None:
        """Compares the probe rows' output with the dense one and marks the layer's worst heads, which must go dense.

        The error is that of all heads together, so a head counts with the weight it has in the layer's output.
        """
        if self.dense is None:
            return
        error = self.dense.lost(out)
        energy = self.dense.output.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        worst = error.argsort(descending=True)
        remaining = error[worst].flip(0).cumsum(0).flip(0)
        self.guarded = torch.zeros_like(self.guarded).scatter_(0, worst, remaining > ceiling * ceiling * energy)
        # Heads that go dense have none left.
        self.error = (error.masked_fill(self.guarded, 0.0).sum() / energy).sqrt()
        self.tiles = torch.where(self.guarded, self.causal, self.tiles)
        self.coverage = torch.where(self.guarded, 1.0, self.coverage)


@dataclass(frozen=True)
class _Layer:
    """What selection works on: the arguments of :func:`run_layer`, for all heads or for a block of them.

    ``all_specs``: of the whole layer; ``heads``: the block, whose ``operands`` these are. ``dense``: see
    :func:`run_layer`.
    """

    operands: Operands
    plan: ForwardPlan
    all_specs: Sequence[HeadSpec]
    heads: slice
    config: Config
    id: int | None
    stages: Stages
    trace: Trace | None = None
    clock: StageClock | None = None
    dense: frozenset[int] = frozenset()

    def enter(self, stage: str) -> None:
        """Notes that a stage begins."""
        if self.clock is not None:
            self.clock.enter(stage)

    @property
    def specs(self) -> Sequence[HeadSpec]:
        return self.all_specs[self.heads]

    def pairs(self, group: RowGroup) -> list[Pair]:
        """Patterns of the block's heads for a row group."""
        return [_DENSE if group.request in self.dense else spec.of(group.modality) for spec in self.specs]

    def searches(self, group: RowGroup) -> bool:
        """Whether some head of the layer has a choice; blocks of heads are watched together, all of them or none."""
        return group.request not in self.dense and any(spec.of(group.modality) != _DENSE for spec in self.all_specs)

    @property
    def tilings(self) -> list[Tiling]:
        """Those whose lists go with the layer's KV groups, or with the part of one that this is."""
        return [tiling for tiling in self.plan.tilings if self.operands.group % tiling.sharing == 0]

    def parts(self) -> list[_Layer]:
        """Blocks of heads that :func:`head_blocks` makes."""
        blocks = head_blocks(self.plan, self.operands)
        return [self] if len(blocks) == 1 else [self.of(heads) for heads in blocks]

    def of(self, heads: slice) -> _Layer:
        """A block of heads, of one GQA group or of several whole ones."""
        own = slice(self.heads.start + heads.start, self.heads.start + heads.stop)
        return replace(self, operands=self.operands.block(heads), heads=own)

    def selection(self, group: RowGroup, probed: probe.WeightProbe) -> Selection:
        """What patterns are proposed from, within the budget of the group's modality."""
        budget = budget_of(probed.output, self.config.bound(group.modality), self.config)
        return Selection(group.view, probed, budget)

    def probes(self, group: RowGroup) -> Iterator[tuple[_Layer, probe.WeightProbe]]:
        """Probes the group's rows, a block of heads at a time; a search for strides listens where it wants to."""
        search = self.plan.requests[group.request].layout.search
        step = self._probed_at_a_time(group, group.keys.sequence.tile_keys)
        for first in range(0, self.operands.heads, step):
            part = self.of(slice(first, min(first + step, self.operands.heads)))
            self.enter("probe")
            probed = probe.run(part.operands, group.keys, group.probe_rows)
            if self.listens(group) and search is not None:
                search.listen(probed)
            self.enter("select")
            yield part, probed

    def listens(self, group: RowGroup) -> bool:
        """Whether a search for strides wants the group's probe."""
        search = self.plan.requests[group.request].layout.search
        return search is not None and group.modality == "media" and search.listens(self.id)

    def _probed_at_a_time(self, group: RowGroup, per_tile: int) -> int:
        """Heads of whole GQA groups whose probe stays within the bound of the device, with so much by key tile."""
        heads, per_group = self.operands.heads, self.operands.group
        bound = PROBE_BYTES_CPU if self.operands.query.device.type == "cpu" else PROBE_BYTES
        held = group.keys.sequence.slots.shape[0] * per_tile * group.probe_rows.per_head
        return min(heads, max(1, bound // (4 * held * per_group)) * per_group)

    def carried(self, group: RowGroup) -> torch.Tensor:
        """What the layer's heads picked in the chunk before, int64 [H], -1 for nothing; to be written in place."""
        heads = len(self.all_specs)
        if self.carrying < 0:
            return torch.full((heads,), -1, device=self.operands.query.device)
        return self.plan.requests[group.request].layout.carried_picks(group.modality, heads)[self.carrying]

    @property
    def carrying(self) -> int:
        """The layer's id under which picks are carried over, -1 where none are."""
        return -1 if self.id is None or self.id >= CARRYING_LAYERS else self.id

    def prepared(self) -> Any:
        """Tables of the selection, made once for all layers whose heads run the same."""
        key = (
            tuple(self.all_specs),
            self.heads.start,
            self.heads.stop,
            self.operands.group,
            self.operands.first,
            self.config,
            self.dense,
        )
        found = self.plan.prepared.get(key)
        if found is None:
            assert self.stages.prepare is not None
            tasks = [self._task(group, index) for index, group in enumerate(self.plan.groups)]
            probed = min(self._probed_at_a_time(group, HELD) for group in self.plan.groups)
            passes = [tiling.passes for tiling in self.tilings]
            found = self.stages.prepare(tasks, passes, self.operands, probed, self.plan.memory)
            self.plan.prepared[key] = found
        return found

    def _task(self, group: RowGroup, index: int) -> Task:
        """What is to be selected for a row group."""
        pairs, config = self.pairs(group), self.config
        bound = AIM * config.bound(group.modality)
        offers = []
        for tiling in self.tilings:
            want = Want.of(tiling.groups[index].view, pairs)
            forms = [
                (pair, form) for pair in want.pairs for form in forms_of(pair, want.view, config, exact=bound == 0)
            ]
            wanted = [[own == pair for own in want.by_list] for pair, _ in forms]
            offers.append(FormsOffer(want.view, [form for _, form in forms], wanted))
        carried = self.plan.requests[group.request].layout.carried_picks(group.modality, len(self.all_specs))
        return Task(
            request=group.request,
            rows=group.probe_rows,
            row_slots=group.row_slots,
            keys=group.keys,
            offers=offers,
            tiles={tiling.sharing: tiling.groups[index] for tiling in self.tilings},
            bound=bound,
            max_density=config.max_density,
            ease=ease_on(self.operands.query.device),
            ceiling=config.ceiling(group.modality),
            picks=carried[:, self.heads],
            searched=self.searches(group),
        )


def sharing(config: Config, group: int) -> tuple[int, ...]:
    """Numbers of heads that may share lists, where so many are on a KV head: what a forward is planned for.

    All of a group or none: what halves of one have in common is no more than what single heads have.
    """
    shares = config.sharing and 1 < group <= config.tile_queries
    return (group,) if shares else ()


def head_blocks(plan: ForwardPlan, operands: Operands) -> list[slice]:
    """Blocks of query heads whose tile maps stay within :data:`MAP_TILES`, and their keys within :data:`COPIED_BYTES`.

    A block is one GQA group, several whole ones, or an equal part of one.
    """
    passes = [one for tiling in plan.tilings for one in tiling.passes]
    tiles = max(-(-tile_pass.num_tiles * tile_pass.keys.widest // tile_pass.sharing) for tile_pass in passes)
    heads, group = operands.heads, operands.group
    copied = operands.copy_bytes(plan.near.keys.all_keys) // operands.kv_heads
    step = min(heads, max(1, MAP_TILES // tiles), max(1, COPIED_BYTES // copied) * group)
    step = step // group * group or max(size for size in range(1, step + 1) if group % size == 0)
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def _select(layer: _Layer) -> tuple[Passes, list[_Watched]]:
    plan, heads, device = layer.plan, len(layer.specs), layer.operands.query.device
    tilings = {tiling.sharing: tiling for tiling in layer.tilings}
    lists = {
        sharing: [_PassLists(one, heads // sharing) for one in tiling.passes] for sharing, tiling in tilings.items()
    }
    watched: list[_Watched] = []
    for index, group in enumerate(plan.groups):
        choice, dense = _select_group(layer, group, index)
        for chosen in (choice, *choice.shared):
            tiles = tilings[chosen.sharing].groups[index]
            lists[chosen.sharing][0].put(tiles.near, chosen.near, chosen)
            if chosen.far is not None:
                lists[chosen.sharing][1].put(tiles.far, chosen.far, chosen)
        none = torch.zeros(heads, dtype=torch.bool, device=device)
        zero = torch.zeros((), device=device)
        causal = group.view.causal_tiles
        watched.append(_Watched(group, choice.tiles, causal, choice.coverage, dense, zero, none))
    return [made.lists() for both in lists.values() for made in both], watched


def _run_prepared(layer: _Layer, out: torch.Tensor, implementation: str) -> list[LayerReport]:
    """A layer whose selection and guard are launches of kernels that know their memory."""
    made = []
    for part in layer.parts():
        prepared, own = part.prepared(), out[:, part.heads]
        for group in part.plan.groups:
            if part.listens(group):
                for _ in part.probes(group):
                    pass
        part.enter("select")
        prepared.select(part.operands, part.carrying)
        part.enter("attend")
        lse = ops.sparse_prefill(part.operands, prepared.passes, own, implementation)
        part.enter("guard")
        report = prepared.guard(own, lse)
        ops.merge_pass(part.operands, prepared.repair, own, lse, layer.stages.repair)
        made.append((len(part.specs), report))
    report = made[0][1]
    if len(made) > 1:
        # Each block keeps within the ceiling, so that all do; their largest error is no less than that of all together.
        counts, weights = torch.stack([one for _, one in made]), [heads / len(layer.specs) for heads, _ in made]
        coverage = sum(weight * one[:, 2] for weight, (_, one) in zip(weights, made, strict=True))
        report = counts.sum(0)
        report[:, 2], report[:, 3] = coverage, counts[..., 3].amax(0)
    return [LayerReport(request, *row.unbind()) for request, row in zip(prepared.requests, report, strict=True)]


def _watched_of(layer: _Layer, prepared: Any) -> list[_Watched]:
    """What is known of the row groups of a layer that was not attended to."""
    zero, watched = torch.zeros((), device=layer.operands.query.device), []
    for group, selected in zip(layer.plan.groups, prepared.selected, strict=True):
        none = torch.zeros_like(selected.guarded, dtype=torch.bool)
        watched.append(_Watched(group, selected.tiles, group.view.causal_tiles, selected.coverage, None, zero, none))
    return watched


def _select_group(layer: _Layer, group: RowGroup, index: int) -> tuple[Choice, DenseRows | None]:
    """The choice for all heads, and the probe rows' dense attention where there are any."""
    if not layer.searches(group):
        return choices.dense(group.view, len(layer.specs)), None
    carried = layer.carried(group)
    pairs = layer.pairs(group)
    wants = [Want.of(tiling.groups[index].view, pairs) for tiling in layer.tilings]
    wants = [want for want in wants if want.pairs]
    blocks: list[list[Proposed]] = [[] for _ in wants]
    parts, energies = [], []
    for _, probed in layer.probes(group):
        selection = layer.selection(group, probed)
        for found, want in zip(blocks, wants, strict=True):
            found.append(propose(selection.of(want.view), layer.config, want.pairs))
        parts.append(DenseRows(group.probe_rows.rows[probed.row_of], probed.output))
        energies.append(selection.budget.energy)
    budget, dense = replace(selection.budget, energy=torch.cat(energies)), DenseRows.of(parts)
    offers = [want.offer(found) for found, want in zip(blocks, wants, strict=True)]
    previous = carried[layer.heads]
    choice, picked = choices.dense(group.view, len(pairs)), torch.full_like(previous, -1)
    if offers:
        choice, picked = choices.decide(offers, budget, previous)
    carried[layer.heads] = picked
    if layer.trace is not None:
        note = Selected(index, layer.heads, choice, offers, picked, budget.energy, dense)
        layer.trace.selected.append(note)
    return choice, dense


def budget_of(output: torch.Tensor, bound: float, config: Config) -> Budget:
    """What heads may lose whose probe rows have this dense output, fp32 [H, P, Dv]."""
    return Budget(output.square().sum(2).mean(1), AIM * bound, config.max_density, ease_on(output.device))


Pair = tuple[str, str]
"""A head's pattern on text keys and on media keys."""

_DENSE = "dense", "dense"

Proposed = list[tuple[Pair, Proposal]]
"""Proposals for a block of heads, each with the pair that it is one of."""


def propose(selection: Selection, config: Config, pairs: Sequence[Pair]) -> Proposed:
    """What each pair of patterns that some head has proposes; nothing for dense heads."""
    exact = selection.budget.exact
    return [
        (pair, selection.proposal(form))
        for pair in dict.fromkeys(pairs)
        if pair != _DENSE
        for form in forms_of(pair, selection.view, config, exact=exact)
    ]


def forms_of(pair: Pair, view: choices.View, config: Config, *, exact: bool) -> list[Form]:
    """Among which heads with a pair of patterns choose; ``exact``: where nothing may be left out."""
    on_text, on_media = pair
    if on_media == "auto":
        grids = _grids("auto", view, config, exact=exact) if view.cell is not None else []
        return [*grids, _in_sequence("vertical_slash", "vertical_slash", config, exact=exact)]
    if on_media == "grid":
        return _grids(on_text, view, config, exact=exact)
    return [_in_sequence(on_text, on_media, config, exact=exact)]


def _grids(on_text: str, view: choices.View, config: Config, *, exact: bool) -> list[Form]:
    """A grid with a window in keys and one in frames; ``on_text``: the pattern on text keys."""
    assert view.cell is not None
    grid = config.patterns.grid
    # One frame back and one key more, so that the same place in the frame before is inside.
    windows = (max(grid.window, frames * view.cell.stride + 1) for frames in (0, grid.window_frames))
    regions = [Near(grid.sink, reach) for reach in sorted({min(window, UNBOUNDED) for window in windows})]
    far = Far(on_text, grid.min_lines, exact)
    return [Form("grid", region, region, *region, far) for region in regions]


def _in_sequence(on_text: str, on_media: str, config: Config, *, exact: bool) -> Form:
    """Patterns of the sequence pass: each key tile is read if that of a modality it holds asks for it, and a row sees
    what either one's region admits.
    """
    a_shape, slash = config.patterns.a_shape, config.patterns.vertical_slash
    everything = Near(0, UNBOUNDED)
    window = Near(a_shape.sink, max(a_shape.window, 1))
    sources: dict[str, tuple[Near | Slash, Near]] = {
        "dense": (everything, everything),
        "a_shape": (window, window),
        "vertical_slash": (Slash(*astuple(slash)), everything),
    }
    if exact:
        return Form("dense", everything, everything, *everything)
    (text, on_text_region), (media, on_media_region) = sources[on_text], sources[on_media]
    sink, reach = (max(both) for both in zip(on_text_region, on_media_region, strict=True))
    name = on_media if on_text == on_media else f"{on_text}+{on_media}"
    return Form(name, text, media, sink, reach, searched=not on_text == on_media == "a_shape")


@dataclass(frozen=True)
class Want:
    """What the lists of a tiling may be proposed: ``by_list`` the pair that all heads of each have, None for others."""

    view: choices.View
    by_list: Sequence[Pair | None]

    @classmethod
    def of(cls, view: choices.View, pairs: Sequence[Pair]) -> Want:
        """``pairs``: by head."""
        lists = (pairs[first : first + view.sharing] for first in range(0, len(pairs), view.sharing))
        return cls(view, [own[0] if len(set(own)) == 1 else None for own in lists])

    @property
    def pairs(self) -> list[Pair]:
        """Those of some list, dense attention aside."""
        return [pair for pair in dict.fromkeys(self.by_list) if pair is not None and pair != _DENSE]

    def offer(self, blocks: Sequence[Proposed]) -> choices.Offer:
        """One offer for all heads from what :func:`propose` says for consecutive blocks of them."""
        proposals = [choices.concatenate([proposal for _, proposal in each]) for each in zip(*blocks, strict=True)]
        flags = tuple(own == pair for own, _ in blocks[0] for pair in self.by_list)
        wanted = choices.mask_of(flags, self.view.row_tiles.device).view(len(proposals), len(self.by_list))
        return choices.Offer(self.view, proposals, wanted)


class _PassLists:
    """Collects the groups' choices of one pass and turns them into tile lists."""

    def __init__(self, tile_pass: TilePass, lists: int) -> None:
        self._pass = tile_pass
        device = tile_pass.request.device
        shape = (lists, tile_pass.num_tiles, tile_pass.keys.widest)
        self._selected = torch.zeros(shape, dtype=torch.bool, device=device)
        self._sink = torch.zeros(lists, tile_pass.num_tiles, dtype=torch.int32, device=device)
        self._reach = torch.full_like(self._sink, UNBOUNDED)

    def put(self, tiles: slice, selected: torch.Tensor, chosen: choices.Map) -> None:
        self._selected[:, tiles, : selected.shape[-1]] = selected
        self._sink[:, tiles] = chosen.sink[:, None]
        self._reach[:, tiles] = chosen.reach[:, None]

    def lists(self) -> tuple[TilePass, TileLists]:
        return self._pass, lists_from_map(self._pass, self._selected, self._sink, self._reach)


def dense_reports(plan: ForwardPlan, heads: int) -> list[LayerReport]:
    """Of a layer that ran dense for all of the plan's rows: one report per sparse request."""
    device = plan.near.rows.device
    zero = torch.zeros((), device=device)
    none, choice = torch.zeros(heads, dtype=torch.bool, device=device), torch.ones(heads, device=device)
    return _reports(
        [
            _Watched(g, g.view.causal_tiles.expand(heads), g.view.causal_tiles, choice, None, zero, none)
            for g in plan.groups
        ]
    )


def _reports(watched: Sequence[_Watched]) -> list[LayerReport]:
    """One report per request; of its row groups' coverage and error the worse one counts."""
    reports: dict[int, LayerReport] = {}
    for item in watched:
        heads = item.tiles.numel()
        report = LayerReport(
            item.group.request,
            item.tiles.sum(),
            item.causal * heads,
            item.coverage.mean(),
            item.error,
            item.guarded.sum(),
            (item.tiles >= item.causal).sum(),
        )
        before = reports.get(report.request)
        if before is not None:
            report = LayerReport(
                report.request,
                before.tiles + report.tiles,
                before.causal + report.causal,
                torch.minimum(before.coverage, report.coverage),
                torch.maximum(before.error, report.error),
                before.guarded + report.guarded,
                before.dense + report.dense,
            )
        reports[report.request] = report
    return list(reports.values())
