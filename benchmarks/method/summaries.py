"""``make bench-summaries``: would a mean key and value per left-out tile bring the output closer to dense attention?

Takes what `auto` leaves out in every layer of the toy model, at the probe rows, and lets it back in through *tile
summaries*: one softmax term ``exp(q k_mean + log n)`` with the mean value, for each tile of 64 keys in sequence order
or in cell order. This is their best case: means over exactly the n keys of the tile that the row sees and does not
read, for each row anew. Prints the relative output error of each layer without and with them.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.toy import offline
from benchmarks.toy.scenes import make_scene
from benchmarks.toy.serving import CHANGE, COLUMNS, ROWS
from mminference_sgl import _core
from mminference_sgl.kernels import choice as choices
from mminference_sgl.kernels import probe
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.kernels.select import Selection, kept
from mminference_sgl.method import prefill
from mminference_sgl.method.config import Config
from mminference_sgl.method.plan import DeviceLayout, SparseRequest, build

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 20260402


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; there is no verdict to miss."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="video tokens, prefilled in one chunk")
    tokens = parser.parse_args(argv).tokens
    rng = np.random.default_rng(SEED)
    scene = make_scene(rng, tokens // (ROWS * COLUMNS), ROWS, COLUMNS, change=CHANGE)
    video = offline.prefill(scene, scene.frames(rng))
    config = Config().for_chunks(0, 64)
    plan = plan_of(video, scene.colours.shape, config)
    (group,) = [group for group in plan.groups if group.modality == "media"]
    print(f"{'layer':>5} {'left out':>10} {'by sequence tile':>18} {'by cell tile':>14}   relative output error")
    for number, layer in enumerate(video.layers):
        pools = [torch.cat([torch.zeros_like(x[:1]), x]) for x in (layer.key, layer.value)]
        probed = probe.run(Operands(layer.query, *pools, layer.scale), group.keys, group.probe_rows)
        heads = layer.query.shape[1]
        want = prefill.Want.of(group.view, [("auto", "auto")] * heads)
        budget = prefill.budget_of(probed.output, config.error, config)
        proposed = prefill.propose(Selection(group.view, probed, budget), config, want.pairs)
        choice, _ = choices.decide([want.offer([proposed])], budget, torch.full((heads,), -1))
        kept_keys = kept(group.view, probed, choice)[..., : video.length]
        sequence = torch.arange(video.length) // config.tile_keys
        errors = [
            error(layer, probed, kept_keys, tiles) for tiles in (None, sequence, group.probe_rows.key_tile.long())
        ]
        print(f"{number:>5} {errors[0]:>10.3f} {errors[1]:>18.3f} {errors[2]:>14.3f}", flush=True)
    return 0


def plan_of(video: offline.Prefill, grid: tuple[int, ...], config: Config) -> prefill.ForwardPlan:
    """The plan of the video in one chunk, token i in slot i + 1."""
    frames, rows, cols = grid
    item = (2, [(video.first, video.first + frames * rows * cols - 1)], (frames, rows, cols))
    layout = _core.Layout(video.length, [item], chunk_tokens=0, tile_queries=config.tile_queries)
    on_device = DeviceLayout(layout, config.tile_keys, torch.device("cpu"))
    request = SparseRequest(on_device, 0, video.length, torch.zeros(1, dtype=torch.int64), 0)
    sizes = {name: getattr(config, name) for name in ("tile_queries", "tile_keys", "probe_rows")}
    return build([request], torch.arange(1, video.length + 1, dtype=torch.int32)[None], **sizes)


def error(layer: offline.Layer, probed: probe.WeightProbe, kept: torch.Tensor, tiles: torch.Tensor | None) -> float:
    """Relative output error of the probe rows, what is not kept lost or summarised by the tile of each key, [keys]."""
    rows, group = probed.rows.rows, layer.query.shape[1] // layer.key.shape[1]
    causal = torch.arange(kept.shape[-1]) <= probed.rows.positions[:, None]
    wrong = 0.0
    for head in range(layer.query.shape[1]):
        query, key, value = layer.query[rows, head], layer.key[:, head // group], layer.value[:, head // group]
        scores = (query @ key.T * layer.scale).masked_fill(~kept[head], -torch.inf)
        terms, values = scores, value.expand(len(rows), -1, -1)
        if tiles is not None:
            means = summaries(query * layer.scale, key, value, causal & ~kept[head], tiles)
            terms, values = torch.cat([scores, means[0]], 1), torch.cat([values, means[1]], 1)
        output = torch.einsum("pk,pkd->pd", terms.softmax(-1), values)
        wrong += float((output - probed.output[head]).square().sum())
    return (wrong / float(probed.output.square().sum())) ** 0.5


def summaries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lost: torch.Tensor, tiles: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [P, tiles] and mean values [P, tiles, D] of the tiles' lost keys, bool [P, keys]; -inf where none is."""
    shape = len(query), int(tiles.max()) + 1
    count = query.new_zeros(shape).index_add_(1, tiles, lost.float())
    mean_key, mean_value = (
        query.new_zeros(*shape, x.shape[1]).index_add_(1, tiles, lost[..., None] * x) / count.clamp_min(1)[..., None]
        for x in (key, value)
    )
    return torch.einsum("pd,ptd->pt", query, mean_key) + count.log(), mean_value


if __name__ == "__main__":
    sys.exit(main())
