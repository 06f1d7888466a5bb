"""What a prefill did inside, written to files: queries and keys of a layer, and what selection chose for every head.

Off unless ``MMINFERENCE_CAPTURE`` names a folder; ``MMINFERENCE_CAPTURE_LAYERS`` (``0,3,7``) limits it to some layers.
One file per forward, request, layer and modality of rows, read back as a :class:`Capture`; ``mminference plot`` draws
it. Writing waits for the device and copies: a server that captures is slow, and no time measured in it means anything.
"""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mminference_sgl.kernels.choice import Choice
from mminference_sgl.kernels.levels import LEVELS
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.tiles import Region, TilePass, element_mask
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config, ConfigError
from mminference_sgl.method.plan import ForwardPlan, RowGroup
from mminference_sgl.method.prefill import DenseRows, LayerReport, Selected, Trace
from mminference_sgl.method.stage_clock import StageClock

ENV_FOLDER = "MMINFERENCE_CAPTURE"
ENV_LAYERS = "MMINFERENCE_CAPTURE_LAYERS"
FILE_BYTES = 64 << 20
"""Size that a file may have: where a chunk's queries need more, every k-th row is left, and the probe rows."""
FOLDER_BYTES = 2 << 30
"""Bytes after which a process writes no more files."""
SUFFIX = ".safetensors"

Rows = slice | torch.Tensor
"""Some rows of a capture, as an index."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """Which rows a capture is of.

    ``prefix``, ``chunk``: tokens before the rows' chunk, and of it. ``first_head``: id of head 0 over all ranks.
    ``scale``: what the products of queries and keys as they are stored are multiplied by before the softmax.
    ``causal_tiles``: tiles that dense attention of the rows computes for a head. ``patterns``: name and reach (see
    :class:`~mminference_sgl.kernels.tiles.Region`) of what was proposed to some head, and how many share a list then.
    """

    layer: int
    request: int
    modality: str
    prefix: int
    chunk: int
    first_head: int
    scale: float
    tile_keys: int
    causal_tiles: int
    patterns: list[tuple[str, int, int]]


@dataclass(frozen=True)
class Capture:
    """Rows of one modality in one layer of one forward, and what was selected for them.

    Shapes: ``H`` query heads, ``R`` rows, ``N`` keys, ``t`` query tiles and ``n`` key tiles of the sequence pass,
    ``t'`` and ``n'`` of the cell pass (0 where these rows have none), ``C`` proposed patterns, ``L`` thresholds. Heads
    that share a list have other query tiles than those that do not; ``t`` and ``t'`` are the larger numbers of them.

    ``query`` [R, H, D], ``key`` [N, KV heads, D]: as they are in the pool, keys by token position.
    ``positions`` int32 [R]: the rows' token positions, ascending; ``probed`` bool [R]: whether selection saw the row.
    ``near`` bool [H, t, n], ``far`` bool [H, t', n']: tiles that are read; ``near_tile``, ``far_tile`` int64 [H, R]:
    the rows' query tiles. ``cell_keys`` int32 [n', tile_keys]: token positions in cell order, ABSENT behind a run's
    end. ``sink``, ``reach`` int32 [H]: the near region. ``picked`` int64 [H]: index of the pattern, -1 for dense
    attention. ``guarded`` bool [H]: heads that went dense behind that; for these ``near`` and ``far`` are what failed.
    ``tiles`` fp32 [H]: tiles computed, its part of them for a head that shares; ``coverage`` fp32 [H]: share of the
    probe rows' mass that is kept, the mean over the rows; ``error`` fp32 [H]: relative error of the probe rows' output,
    measured; all three behind the guard.
    ``estimate`` fp32 [H]: the error that selection reckoned with. ``energy`` fp32 [H]: squared length of the dense
    output of a probe row, the mean over the rows.
    ``curve_error``, ``curve_coverage``, ``curve_tiles`` fp32 [C, H, L]: relative error, kept mass and tiles at each
    threshold; NaN where a head was not proposed the pattern.
    """

    about: About
    query: torch.Tensor
    key: torch.Tensor
    positions: torch.Tensor
    probed: torch.Tensor
    near: torch.Tensor
    near_tile: torch.Tensor
    far: torch.Tensor
    far_tile: torch.Tensor
    cell_keys: torch.Tensor
    sink: torch.Tensor
    reach: torch.Tensor
    picked: torch.Tensor
    guarded: torch.Tensor
    tiles: torch.Tensor
    coverage: torch.Tensor
    error: torch.Tensor
    estimate: torch.Tensor
    energy: torch.Tensor
    curve_error: torch.Tensor
    curve_coverage: torch.Tensor
    curve_tiles: torch.Tensor

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.query.shape[1]

    @property
    def density(self) -> torch.Tensor:
        """Computed tiles over those of dense attention, fp32 [H]."""
        return self.tiles / self.about.causal_tiles

    @property
    def layer_error(self) -> float:
        """Relative error of all heads together, which is what the bound is on."""
        return math.sqrt(float((self.error.square() * self.energy).sum() / self.energy.sum()))

    def pattern(self, head: int) -> str:
        """Name of what a head runs."""
        pick = int(self.picked[head])
        return "dense" if self.guarded[head] or pick < 0 else self.about.patterns[pick][0]

    @cached_property
    def cell_order(self) -> torch.Tensor:
        """Token positions of the keys that are there, in cell order: int64 [N]; by position without a cell pass."""
        order = self.cell_keys.flatten().long()
        order = order[order < self.key.shape[0]]
        return order if order.numel() else torch.arange(self.key.shape[0])

    @cached_property
    def _cell_tile(self) -> torch.Tensor:
        """Cell-order key tile of each key: int64 [N]."""
        positions = self.cell_keys.flatten().long()
        tile = torch.arange(self.cell_keys.shape[0]).repeat_interleave(self.about.tile_keys)
        present = positions < self.key.shape[0]
        return torch.empty(self.key.shape[0], dtype=torch.int64).scatter_(0, positions[present], tile[present])

    def weights(self, head: int, rows: Rows = slice(None)) -> torch.Tensor:
        """Softmax weights of some rows over the keys by token position: fp32 [rows, N]."""
        key = self.key[:, head * self.key.shape[1] // self.heads].float()
        scores = self.query[rows, head].float() @ key.T * self.about.scale
        future = torch.arange(key.shape[0]) > self.positions[rows, None]
        return scores.masked_fill_(future, -torch.inf).softmax(1)

    def kept(self, head: int, rows: Rows = slice(None)) -> torch.Tensor:
        """By which pass some rows read the keys by token position: int8 [rows, N], 0 none, 1 sequence, 2 cell."""
        keys = torch.arange(self.key.shape[0])
        sink, reach = int(self.sink[head]), int(self.reach[head])
        near = element_mask(Region.NEAR, self.positions[rows, None], keys, sink, reach)
        seen = self.near[head, self.near_tile[head, rows]].repeat_interleave(self.about.tile_keys, 1)[:, : keys.numel()]
        found = (near & seen).to(torch.int8)
        if self.far.numel():
            far = (keys <= self.positions[rows, None]) & ~near
            found += 2 * (self.far[head, self.far_tile[head, rows]][:, self._cell_tile] & far).to(torch.int8)
        return found

    def save(self, path: Path) -> int:
        """Writes a file; returns its size in bytes."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, path, {"about": json.dumps(asdict(self.about))})
        return path.stat().st_size


_TENSORS = [field.name for field in fields(Capture) if field.name != "about"]


def load(path: Path) -> Capture:
    """Reads a file back."""
    with safe_open(path, "pt") as file:
        about = About(**json.loads(file.metadata()["about"]))
        about = replace(about, patterns=[(name, reach, shared) for name, reach, shared in about.patterns])
        return Capture(about, **{name: file.get_tensor(name) for name in _TENSORS})


def files(folder: Path) -> list[Path]:
    """The captures in a folder, in the order of forwards and layers; a file is a folder of its own."""
    return sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else [folder]


RunLayer = Callable[..., list[LayerReport]]


def recording(run_layer: RunLayer, environ: Mapping[str, str], rank: int = 0) -> RunLayer:
    """``prefill.run_layer`` as it is, or, where the environment asks for captures, with one written behind it.

    ``rank``: of this process among those that share the heads.

    Raises:
        ConfigError: the folder cannot be made, or the layers are not numbers.
    """
    folder = environ.get(ENV_FOLDER, "").strip()
    if not folder:
        return run_layer
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{ENV_FOLDER}: {error}") from None
    layers = environ.get(ENV_LAYERS, "").strip()
    try:
        recorder = _Recorder(Path(folder), frozenset(int(one) for one in layers.split(",")) if layers else None, rank)
    except ValueError:
        raise ConfigError(f"{ENV_LAYERS} must be numbers with commas between them, got {layers!r}") from None
    logger.warning("mminference: captures go to %s; prefill waits for each of them", folder)

    def recorded(
        operands: Operands,
        plan: ForwardPlan,
        specs: Sequence[HeadSpec],
        config: Config,
        out: torch.Tensor,
        implementation: str,
        layer: int,
        clock: StageClock | None = None,
        dense: Collection[int] = (),
    ) -> list[LayerReport]:
        trace = Trace() if recorder.wants(layer) else None
        reports = run_layer(operands, plan, specs, config, out, implementation, layer, trace, clock, dense)
        if trace is not None:
            recorder.write(operands, plan, out, layer, trace)
        return reports

    return recorded


def captures(
    operands: Operands, plan: ForwardPlan, out: torch.Tensor, layer: int, trace: Trace, rank: int = 0
) -> list[Capture]:
    """What there is to keep of a layer that has just been computed into ``out``: one per group that had a choice."""
    found = []
    for index in sorted({selected.group for selected in trace.selected}):
        selected = [one for one in trace.selected if one.group == index]
        found.append(_capture(operands, plan, out, (layer, rank), selected, trace.guarded[index]))
    return found


class _Recorder:
    """Numbers forwards, names files and keeps the folder's bound."""

    def __init__(self, folder: Path, layers: frozenset[int] | None, rank: int) -> None:
        self._folder, self._layers, self._rank = folder, layers, rank
        self._forwards, self._bytes = 0, 0
        self._plan: Callable[[], ForwardPlan | None] = lambda: None

    def wants(self, layer: int) -> bool:
        return self._bytes < FOLDER_BYTES and (self._layers is None or layer in self._layers)

    def write(self, operands: Operands, plan: ForwardPlan, out: torch.Tensor, layer: int, trace: Trace) -> None:
        if self._plan() is not plan:
            self._plan, self._forwards = weakref.ref(plan), self._forwards + 1
        for one in captures(operands, plan, out, layer, trace, self._rank):
            about = one.about
            name = f"{self._forwards:05d}-r{about.request}-l{layer:03d}-h{about.first_head:03d}-{about.modality}"
            self._bytes += one.save(self._folder / f"{name}{SUFFIX}")
        if self._bytes >= FOLDER_BYTES:
            logger.warning("mminference: %s holds %d bytes of captures: that was the last", self._folder, self._bytes)


def _capture(
    operands: Operands,
    plan: ForwardPlan,
    out: torch.Tensor,
    place: tuple[int, int],
    selected: Sequence[Selected],
    guarded: torch.Tensor,
) -> Capture:
    """One group's, from what was selected for consecutive blocks of heads; ``place``: layer and rank."""
    group, choice = plan.groups[selected[0].group], [one.choice for one in selected]
    request = plan.requests[group.request]
    causal = int(group.view.causal_tiles)

    def joined(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
        return torch.cat(list(parts), dim).cpu()

    slots = group.keys.sequence.slots.flatten()[: request.num_keys]
    key = operands.key_pool.index_select(0, slots).cpu()
    rows, positions, probed = _rows(plan, group, operands.query, FILE_BYTES - key.nbytes)
    dense = DenseRows.of([one.dense for one in selected])
    energy = joined([one.energy for one in selected])
    lost = (dense.lost(out) / dense.rows.shape[1]).cpu()
    guarded = guarded.cpu()
    error = (lost / energy.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    # Blocks of heads with other patterns are proposed others.
    patterns = list(dict.fromkeys(pattern for one in selected for pattern in _patterns(one)))
    curves = {
        name: joined([_curves(one, patterns, name) for one in selected], 1) for name in ("error", "coverage", "tiles")
    }
    picks = [torch.tensor([*map(patterns.index, _patterns(one)), -1])[one.picked.cpu()] for one in selected]
    picked = torch.cat(picks)
    sharing = torch.tensor([*(shared for *_, shared in patterns), 1])[picked]
    has_cells = choice[0].far is not None and group.keys.cell is not None
    heads = operands.heads
    nothing = torch.zeros(heads, 0, 0, dtype=torch.bool)
    near_tiles, far_tiles = torch.zeros(heads, len(rows)).long(), torch.zeros(heads, len(rows)).long()
    for tiling in plan.tilings:
        tiles, own = tiling.groups[selected[0].group], sharing == tiling.sharing
        near_tiles[own] = _tiles_of(tiling.near, tiles.near, rows)
        if has_cells and tiling.far is not None:
            far_tiles[own] = _tiles_of(tiling.far, tiles.far, rows)
    return Capture(
        about=About(
            layer=place[0],
            request=group.request,
            modality=group.modality,
            prefix=request.prefix,
            chunk=request.chunk,
            first_head=place[1] * heads,
            scale=operands.scale * operands.key_scale,
            tile_keys=group.view.keys.tile_keys,
            causal_tiles=causal,
            patterns=patterns,
        ),
        query=operands.query[rows].cpu(),
        key=key,
        positions=positions,
        probed=probed,
        near=_by_head(choice, sharing, "near"),
        near_tile=near_tiles,
        far=_by_head(choice, sharing, "far") if has_cells else nothing,
        far_tile=far_tiles if has_cells else torch.zeros(heads, 0).long(),
        cell_keys=_cell_keys(group) if has_cells else torch.zeros(0, group.view.keys.tile_keys, dtype=torch.int32),
        sink=_by_head(choice, sharing, "sink"),
        reach=_by_head(choice, sharing, "reach"),
        picked=picked,
        guarded=guarded,
        tiles=joined([one.tiles for one in choice]).masked_fill(guarded, causal),
        coverage=joined([one.coverage for one in choice]).masked_fill(guarded, 1.0),
        error=error,
        estimate=_relative(joined([one.error for one in choice]), energy),
        energy=energy,
        curve_error=_relative(curves["error"], energy[:, None]),
        curve_coverage=curves["coverage"],
        curve_tiles=curves["tiles"],
    )


_Pattern = tuple[str, int, int]


def _patterns(selected: Selected) -> list[_Pattern]:
    """What was proposed, in the order that picks count in."""
    return [
        (proposal.levels.pattern, proposal.levels.reach, offer.view.sharing)
        for offer in selected.offers
        for proposal in offer.proposals
    ]


def _curves(selected: Selected, patterns: Sequence[_Pattern], name: str) -> torch.Tensor:
    """A figure of a block of heads at every threshold of the patterns: fp32 [C, H, L]."""
    heads = selected.picked.numel()
    found = [torch.full((heads, LEVELS + 1), torch.nan)] * len(patterns)
    proposals = [proposal for offer in selected.offers for proposal in offer.proposals]
    for pattern, proposal in zip(_patterns(selected), proposals, strict=True):
        values = getattr(proposal.curves, name).float().cpu()
        if values.shape[0] != heads:
            values = values.repeat_interleave(pattern[2], dim=0) / pattern[2]
        found[patterns.index(pattern)] = values
    return torch.stack(found)


def _by_head(choice: Sequence[Choice], sharing: torch.Tensor, name: str) -> torch.Tensor:
    """A field of the maps that blocks of heads have, each head's own in as much memory as the largest needs: [H, ...].

    ``sharing`` int64 [H]: of the map that is a head's.
    """
    found = []
    for block, own in zip(choice, torch.split(sharing, [one.tiles.numel() for one in choice]), strict=True):
        maps = [(one.sharing, getattr(one, name).cpu()) for one in (block, *block.shared)]
        shape = [max(sizes) for sizes in zip(*(values.shape[1:] for _, values in maps), strict=True)]
        every = maps[0][1].new_zeros(len(own), *shape)
        for shared, values in maps:
            heads = (own == shared).nonzero()[:, 0]
            every[(heads, *(slice(size) for size in values.shape[1:]))] = values[heads // shared]
        found.append(every)
    return torch.cat(found)


def _relative(lost: torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    return (lost / energy.clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(0).sqrt()


def _cell_keys(group: RowGroup) -> torch.Tensor:
    assert group.keys.cell is not None
    return group.keys.cell.positions.cpu().clone()


def _rows(
    plan: ForwardPlan, group: RowGroup, query: torch.Tensor, room: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch rows of a group to keep so that their queries fit the room, their positions, and which were probed."""
    rows, positions = plan.near.rows[group.row_slots], plan.near.positions[group.row_slots]
    needed = rows.numel() * query[0].nbytes
    every = -(-needed // room) if room > 0 else rows.numel()
    probed = torch.isin(rows, group.probe_rows.rows)
    kept = probed.clone()
    kept[:: max(every, 1)] = True
    return rows[kept], positions[kept].cpu(), probed[kept].cpu()


def _tiles_of(tile_pass: TilePass, tiles: slice, rows: torch.Tensor) -> torch.Tensor:
    """The query tile of some batch rows, counted within ``tiles``: int64 [rows]."""
    indptr = tile_pass.indptr[tiles.start : tiles.stop + 1].long()
    slots = slice(int(indptr[0]), int(indptr[-1]))
    tile = torch.repeat_interleave(torch.arange(len(indptr) - 1, device=indptr.device), indptr.diff())
    of_row = torch.zeros(int(tile_pass.rows.max()) + 1, dtype=torch.int64, device=indptr.device)
    of_row[tile_pass.rows[slots]] = tile
    return of_row[rows].cpu()


@dataclass(frozen=True)
class HeadSummary:
    """What became of one head in all chunks that were captured; ``head`` counts over all ranks.

    ``pattern``: that of most chunks. ``density``: computed tiles over those of dense attention. ``coverage``: mean over
    the chunks; ``error``: the largest of them; ``guarded``: chunks in which the head was computed again, densely.
    """

    layer: int
    rows: str
    head: int
    pattern: str
    density: float
    coverage: float
    error: float
    guarded: int


def summary(found: Iterable[Capture]) -> list[HeadSummary]:
    """One line per layer, modality of rows and head, in this order; each capture is looked at once."""
    lines: dict[tuple[int, str, int], list[_HeadFigures]] = {}
    for one in found:
        about = one.about
        for head in range(one.heads):
            figures = _HeadFigures(
                one.pattern(head),
                int(one.tiles[head]),
                about.causal_tiles,
                float(one.coverage[head]),
                float(one.error[head]),
                bool(one.guarded[head]),
            )
            lines.setdefault((about.layer, about.modality, about.first_head + head), []).append(figures)
    return [
        HeadSummary(
            *key,
            pattern=Counter(one.pattern for one in own).most_common(1)[0][0],
            density=sum(one.tiles for one in own) / sum(one.causal for one in own),
            coverage=sum(one.coverage for one in own) / len(own),
            error=max(one.error for one in own),
            guarded=sum(one.guarded for one in own),
        )
        for key, own in sorted(lines.items())
    ]


@dataclass(frozen=True)
class _HeadFigures:
    """One head in one chunk."""

    pattern: str
    tiles: int
    causal: int
    coverage: float
    error: float
    guarded: bool
