"""Sparse prefill of one layer: probe, select, guard, attend over a :class:`~mminference_sgl.plan.ForwardPlan`.

Knows neither SGLang nor models, so it is what tests and benchmarks drive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mminference_sgl.catalog import HeadSpec
from mminference_sgl.config import Config
from mminference_sgl.kernels import ops, probe, select
from mminference_sgl.kernels.select import Choice, Limits, View
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
) -> list[LayerReport]:
    """Computes the plan's rows of one layer into ``out``.

    Args:
        query: [batch rows, H, D] as the model made it.
        key_pool, value_pool: [slots, KV heads, D]; the chunk's keys and values are already in them.
        specs: one head spec per query head of this rank.
        out: [batch rows, H, Dv].

    Returns:
        One report per sparse request.
    """
    passes, reports = select_layer(query, key_pool, value_pool, plan, specs, config, scale)
    ops.sparse_prefill(query, key_pool, value_pool, passes, scale, out, implementation)
    return reports


def select_layer(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: ForwardPlan,
    specs: Sequence[HeadSpec],
    config: Config,
    scale: float,
) -> tuple[Passes, list[LayerReport]]:
    """Probes the plan's requests and chooses the tiles of every head; arguments as in :func:`run_layer`."""
    near = _PassLists(plan.near, len(specs))
    far = _PassLists(plan.far, len(specs)) if plan.far is not None else None
    reports: dict[int, LayerReport] = {}
    for group in plan.groups:
        choice, report = _select_group(query, key_pool, value_pool, plan, group, specs, config, scale)
        near.put(group.near, choice.near, choice)
        if far is not None and choice.far is not None:
            far.put(group.far, choice.far, choice)
        reports[group.request] = _add(reports[group.request], report) if group.request in reports else report
    passes = [(plan.near, near.lists())]
    if plan.far is not None and far is not None:
        passes.append((plan.far, far.lists()))
    return passes, list(reports.values())


def _select_group(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    plan: ForwardPlan,
    group: RowGroup,
    specs: Sequence[HeadSpec],
    config: Config,
    scale: float,
) -> tuple[Choice, LayerReport]:
    view, heads = group.view, len(specs)
    causal = select.causal_tiles(view) * heads
    wanted = [spec.of(group.modality) for spec in specs]
    zero = torch.zeros((), device=query.device)
    if all(pair == ("dense", "dense") for pair in wanted):
        choice = select.dense(view, heads)
        return choice, LayerReport(group.request, choice.tiles().sum(), causal, zero + 1, zero, zero.long())
    slots = plan.near.keys.slots[plan.key_tiles[group.request]]
    blocks, coverages, errors, energy = [], [], [], zero
    for block in _head_blocks(heads, key_pool.shape[1], slots.numel() * group.probe_rows.rows.numel(), query.device):
        kv_block = slice(block.start * key_pool.shape[1] // heads, block.stop * key_pool.shape[1] // heads)
        probed = probe.run(
            query[:, block], key_pool[:, kv_block], value_pool[:, kv_block], slots, group.probe_rows, scale
        )
        blocks.append(_choose(view, probed, wanted[block], config))
        coverage, error = select.evaluate(view, probed, blocks[-1])
        coverages.append(coverage)
        errors.append(error)
        energy = energy + probed.output.square().sum()
    coverage, error = torch.cat(coverages), torch.cat(errors)
    choice, guarded = select.guard(view, select.concatenate(blocks), error, energy, config.error_ceiling)
    coverage, error = torch.where(guarded, 1.0, coverage), error.masked_fill(guarded, 0.0)
    relative = (error.sum() / energy.clamp_min(1e-30)).sqrt()
    return choice, LayerReport(group.request, choice.tiles().sum(), causal, coverage.mean(), relative, guarded.sum())


def _head_blocks(heads: int, kv_heads: int, weights_per_head: int, device: torch.device) -> list[slice]:
    """Blocks of whole GQA groups whose probe weights stay within the bound of the device."""
    group = heads // kv_heads
    bound = PROBE_BYTES_CPU if device.type == "cpu" else PROBE_BYTES
    step = max(1, bound // (4 * weights_per_head * group)) * group
    return [slice(first, min(first + step, heads)) for first in range(0, heads, step)]


def _choose(view: View, probed: probe.Probe, wanted: Sequence[tuple[str, str]], config: Config) -> Choice:
    """One choice for all heads out of each head's (pattern on text keys, pattern on media keys)."""
    limits = Limits(config.coverage, config.max_density)
    made: dict[str, Choice] = {}

    def propose(pattern: str) -> Choice:
        if pattern not in made:
            made[pattern] = _propose(pattern, view, probed, limits, config, propose)
        return made[pattern]

    result: Choice | None = None
    for on_text, on_media in dict.fromkeys(wanted):
        pair = propose(on_media)
        if on_text != on_media:
            # Text keys have no grid of their own: there it means "by mass", which is what columns are.
            text = propose("vertical_slash" if on_text == "grid" else on_text)
            pair = select.combine(view, text, pair, text_pattern=on_text, media_pattern=on_media)
        if result is None:
            result = pair
            continue
        heads = torch.tensor([item == (on_text, on_media) for item in wanted], device=pair.coverage.device)
        result = select.where(heads, pair, result)
    assert result is not None
    return result


def _propose(
    pattern: str,
    view: View,
    probed: probe.Probe,
    limits: Limits,
    config: Config,
    propose: Callable[[str], Choice],
) -> Choice:
    budgets = config.patterns
    if pattern == "dense":
        return select.dense(view, probed.weights.shape[0])
    if pattern == "a_shape":
        return select.a_shape(view, probed, limits, sink=budgets.a_shape.sink, window=budgets.a_shape.window)
    if pattern == "vertical_slash":
        budget = budgets.vertical_slash
        return select.vertical_slash(view, probed, limits, sink=budget.sink, window=budget.window)
    if pattern == "grid":
        grid = budgets.grid
        return select.grid(
            view, probed, limits, sink=grid.sink, window_frames=grid.window_frames, min_lines=grid.min_lines
        )
    candidates = ["grid", "vertical_slash"] if view.cell is not None else ["vertical_slash"]
    merged, _ = select.cheapest([propose(name) for name in candidates], limits.coverage)
    return select.never_beyond_dense(view, merged)


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


def _add(a: LayerReport, b: LayerReport) -> LayerReport:
    """Report over two row groups of a request; coverage and error are those of the group that left something out."""
    return LayerReport(
        a.request,
        a.tiles + b.tiles,
        a.causal + b.causal,
        torch.minimum(a.coverage, b.coverage),
        torch.maximum(a.error, b.error),
        a.guarded + b.guarded,
    )
