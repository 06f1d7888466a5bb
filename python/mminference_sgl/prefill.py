"""Sparse prefill of one layer: probe, select, attend, guard over a :class:`~mminference_sgl.plan.ForwardPlan`.

Knows neither SGLang nor models, so it is what tests and benchmarks drive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mminference_sgl.catalog import HeadSpec
from mminference_sgl.config import Config
from mminference_sgl.kernels import choice as choices
from mminference_sgl.kernels import ops, probe, select
from mminference_sgl.kernels.choice import Choice, Limits, View
from mminference_sgl.kernels.tiles import UNBOUNDED, TileLists, TilePass, lists_from_map
from mminference_sgl.plan import ForwardPlan, RowGroup

PROBE_BYTES = 256 << 20
"""Bound on the probe weights held at a time."""
PROBE_BYTES_CPU = 16 << 20
"""The same on a CPU, where temporaries beyond 32 MiB are mapped anew each time, at more than the arithmetic's cost."""


@dataclass(frozen=True)
class LayerReport:
    """What one layer of one forward did for one request; 0-d tensors, so that nothing waits for the device.

    ``tiles`` / ``causal``: tiles computed and those dense attention computes, over all heads.
    ``coverage``: mean over heads of the probe rows' kept mass (1 where nothing was left out);
    ``error``: relative output error of the probe rows over all heads together;
    ``guarded``: heads that the guard sent to dense.
    """

    request: int
    tiles: torch.Tensor
    causal: torch.Tensor
    coverage: torch.Tensor
    error: torch.Tensor
    guarded: torch.Tensor


_ASKED = ("cpu",)
"""Devices that are asked whether a head must be repaired; on others the question would wait for the layer, and a pass
with empty lists does not."""

Passes = list[tuple[TilePass, TileLists]]
"""Passes of a layer with the tile lists of all heads, the sequence pass first."""


def run_layer(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: ForwardPlan,
    specs: Sequence[HeadSpec],
    config: Config,
    scale: float,
    out: torch.Tensor,
    implementation: str,
    layer: int | None = None,
) -> list[LayerReport]:
    """Computes the plan's rows of one layer into ``out``.

    Args:
        query: [batch rows, H, D] as the model made it.
        key_pool, value_pool: [slots, KV heads, D]; the chunk's keys and values are already in them.
        specs: one head spec per query head of this rank.
        out: [batch rows, H, Dv].
        layer: id under which the heads' picks are carried over to the request's next chunk; None carries nothing.

    Returns:
        One report per sparse request.
    """
    passes, watched = _select(_Layer(query, key_pool, value_pool, plan, specs, config, scale, layer))
    lse = ops.sparse_prefill(query, key_pool, value_pool, passes, scale, out, implementation)
    for item in watched:
        item.measure(out, config.error_ceiling)
    failing = [item for item in watched if item.dense_output is not None]
    if query.device.type in _ASKED:
        failing = [item for item in failing if bool(item.guarded.any())]
    if failing:
        lists = _PassLists(plan.near, len(specs))
        for item in failing:
            rows = plan.near.rows[item.group.row_slots]
            lse[rows] = lse[rows].masked_fill(item.guarded, float("-inf"))
            choice = choices.dense(item.group.view, len(specs))
            lists.put(item.group.near, choice.near & item.guarded[:, None, None], choice)
        ops.merge_pass(query, key_pool, value_pool, (plan.near, lists.lists()), scale, out, lse, implementation)
    return _reports(watched)


def select_layer(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: ForwardPlan,
    specs: Sequence[HeadSpec],
    config: Config,
    scale: float,
) -> tuple[Passes, list[LayerReport]]:
    """Probes the plan's requests and chooses the tiles of every head; arguments as in :func:`run_layer`.

    The reports' error is 0, as nothing has been computed, and no head has gone dense for it.
    """
    passes, watched = _select(_Layer(query, key_pool, value_pool, plan, specs, config, scale, None))
    return passes, _reports(watched)


@dataclass
class _Watched:
    """A row group's choice and what is known of it, by head: [H] each.

    ``dense_output`` fp32 [H, P, Dv]: that of the probe rows, None where nothing was left out.
    """

    group: RowGroup
    tiles: torch.Tensor
    causal: torch.Tensor
    coverage: torch.Tensor
    dense_output: torch.Tensor | None
    error: torch.Tensor
    guarded: torch.Tensor

    def measure(self, out: torch.Tensor, ceiling: float) -> None:
        """Compares the probe rows' output with the dense one and marks the layer's worst heads, which must go dense.

        The error is that of all heads together, so a head counts with the weight it has in the layer's output.
        """
        if self.dense_output is None:
            return
        rows = self.group.probe_rows.rows
        error = (out[rows].transpose(0, 1).float() - self.dense_output).square().sum((1, 2))
        energy = self.dense_output.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        self.error = (error.sum() / energy).sqrt()
        worst = error.argsort(descending=True)
        remaining = error[worst].flip(0).cumsum(0).flip(0)
        self.guarded = torch.zeros_like(self.guarded).scatter_(0, worst, remaining > ceiling * ceiling * energy)
        self.tiles = torch.where(self.guarded, self.causal, self.tiles)
        self.coverage = torch.where(self.guarded, 1.0, self.coverage)


@dataclass(frozen=True)
class _Layer:
    """What selection works on; the arguments of :func:`run_layer`."""

    query: torch.Tensor
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    plan: ForwardPlan
    specs: Sequence[HeadSpec]
    config: Config
    scale: float
    id: int | None

    def probe(self, group: RowGroup, heads: slice) -> probe.WeightProbe:
        """Probes the group's rows for a block of whole GQA groups."""
        kv_heads = slice(*(bound * self.key_pool.shape[1] // len(self.specs) for bound in (heads.start, heads.stop)))
        slots = self.plan.near.keys.slots[self.plan.key_tiles[group.request]]
        pools = self.key_pool[:, kv_heads], self.value_pool[:, kv_heads]
        return probe.run(self.query[:, heads], *pools, slots, group.probe_rows, self.scale)

    def head_blocks(self, group: RowGroup) -> list[slice]:
        """Blocks of whole GQA groups whose probe weights stay within the bound of the device."""
        heads, per_group = len(self.specs), len(self.specs) // self.key_pool.shape[1]
        tiles = self.plan.key_tiles[group.request]
        weights = (tiles.stop - tiles.start) * self.plan.near.keys.tile_keys * group.probe_rows.rows.numel()
        bound = PROBE_BYTES_CPU if self.query.device.type == "cpu" else PROBE_BYTES
        step = max(1, bound // (4 * weights * per_group)) * per_group
        return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def _select(layer: _Layer) -> tuple[Passes, list[_Watched]]:
    plan, heads, device = layer.plan, len(layer.specs), layer.query.device
    near = _PassLists(plan.near, heads)
    far = _PassLists(plan.far, heads) if plan.far is not None else None
    watched: list[_Watched] = []
    for group in plan.groups:
        choice, dense_output = _select_group(layer, group)
        near.put(group.near, choice.near, choice)
        if far is not None and choice.far is not None:
            far.put(group.far, choice.far, choice)
        none = torch.zeros(heads, dtype=torch.bool, device=device)
        zero = torch.zeros((), device=device)
        causal = group.view.causal_tiles
        watched.append(_Watched(group, choice.tiles(), causal, choice.coverage, dense_output, zero, none))
    passes = [(plan.near, near.lists())]
    if plan.far is not None and far is not None:
        passes.append((plan.far, far.lists()))
    return passes, watched


def _select_group(layer: _Layer, group: RowGroup) -> tuple[Choice, torch.Tensor | None]:
    """The choice for all heads, and the probe rows' dense output where they were probed."""
    wanted = [spec.of(group.modality) for spec in layer.specs]
    if all(pair == ("dense", "dense") for pair in wanted):
        return choices.dense(group.view, len(wanted)), None
    layout = layer.plan.requests[group.request].layout
    previous = None if layer.id is None else layout.picks.get((layer.id, group.modality))
    blocks, outputs, picks = [], [], []
    for block in layer.head_blocks(group):
        probed = layer.probe(group, block)
        if layout.search is not None and group.modality == "media":
            layout.search.listen(probed, layer.id)
        proposals = Proposals(group.view, probed, layer.config, None if previous is None else previous[block])
        blocks.append(proposals.choose(wanted[block]))
        outputs.append(probed.output)
        picks.append(proposals.picked)
    if layer.id is not None:
        layout.picks[layer.id, group.modality] = torch.cat(picks)
    return choices.concatenate(blocks), torch.cat(outputs)


class Proposals:
    """What each pattern proposes for a block of heads, each made once.

    ``previous`` int64 [H]: what ``auto`` picked in the chunk before; ``picked``: what it picks now, 0 if not asked.
    """

    def __init__(self, view: View, probed: probe.Probe, config: Config, previous: torch.Tensor | None) -> None:
        self._view = view
        self._probed = probed
        self._budgets = config.patterns
        self._limits = Limits(config.coverage, config.max_density, config.min_gain)
        self._previous = previous
        self._made: dict[str, Choice] = {}
        self.picked = torch.zeros(probed.output.shape[0], dtype=torch.int64, device=probed.output.device)

    def choose(self, wanted: Sequence[tuple[str, str]]) -> Choice:
        """One choice for all heads out of each head's (pattern on text keys, pattern on media keys)."""
        result: Choice | None = None
        for on_text, on_media in dict.fromkeys(wanted):
            pair = self._get(on_media)
            if on_text != on_media and self._limits.coverage < choices.EXACT:
                # Text keys have no grid of their own: there it means "by mass", which is what columns are.
                text = self._get("vertical_slash" if on_text == "grid" else on_text)
                pair = choices.combine(self._view, text, pair, text_pattern=on_text, media_pattern=on_media)
                pair = select.measured(self._view, self._probed, pair, self._limits)
            if result is None:
                result = pair
                continue
            heads = torch.tensor([item == (on_text, on_media) for item in wanted], device=pair.coverage.device)
            result = choices.where(heads, pair, result)
        assert result is not None
        return result

    def _get(self, pattern: str) -> Choice:
        if pattern not in self._made:
            self._made[pattern] = self._propose(pattern)
        return self._made[pattern]

    def _propose(self, pattern: str) -> Choice:
        view, probed, limits, budgets = self._view, self._probed, self._limits, self._budgets
        if pattern == "dense":
            return choices.dense(view, probed.output.shape[0])
        if pattern == "a_shape":
            return select.a_shape(view, probed, limits, sink=budgets.a_shape.sink, window=budgets.a_shape.window)
        if pattern == "vertical_slash":
            budget = budgets.vertical_slash
            return select.vertical_slash(view, probed, limits, sink=budget.sink, window=budget.window)
        if pattern == "grid":
            assert view.cell is not None
            grid = budgets.grid
            # One frame back and one key more, so that the same place in the frame before is inside.
            stride = view.cell.stride
            reaches = {min(max(grid.window, n * stride + 1), UNBOUNDED) for n in (0, grid.window_frames)}
            windows = [
                select.grid(view, probed, limits, sink=grid.sink, reach=reach, min_lines=grid.min_lines)
                for reach in sorted(reaches)
            ]
            return choices.cheapest(view, windows, limits)[0]
        candidates = ["grid", "vertical_slash"] if view.cell is not None else ["vertical_slash"]
        proposed = [self._get(name) for name in candidates]
        merged, self.picked = choices.cheapest(view, proposed, limits, self._previous)
        return choices.never_beyond_dense(view, merged)


class _PassLists:
    """Collects the groups' choices of one pass and turns them into tile lists."""

    def __init__(self, tile_pass: TilePass, heads: int) -> None:
        self._pass = tile_pass
        device = tile_pass.request.device
        shape = (heads, tile_pass.num_tiles, tile_pass.keys.widest)
        self._selected = torch.zeros(shape, dtype=torch.bool, device=device)
        self._sink = torch.zeros(heads, tile_pass.num_tiles, dtype=torch.int32, device=device)
        self._reach = torch.full_like(self._sink, UNBOUNDED)

    def put(self, tiles: slice, selected: torch.Tensor, choice: Choice) -> None:
        self._selected[:, tiles, : selected.shape[-1]] = selected
        self._sink[:, tiles] = choice.sink[:, None]
        self._reach[:, tiles] = choice.reach[:, None]

    def lists(self) -> TileLists:
        return lists_from_map(self._pass, self._selected, self._sink, self._reach)


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
            )
        reports[report.request] = report
    return list(reports.values())
