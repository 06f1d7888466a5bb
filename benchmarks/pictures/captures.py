"""Captures without a server: of a planted layer, and of the toy model's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.method import planted
from benchmarks.method.cases import MAPS, Case
from benchmarks.method.forward import forward
from benchmarks.toy import offline
from benchmarks.toy.scenes import make_scene
from benchmarks.toy.serving import CHANGE, COLUMNS, ROWS
from mminference_sgl import _core
from mminference_sgl.backend.capture import Capture, captures
from mminference_sgl.kernels.operands import Operands
from mminference_sgl.method import plan as planning
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config

if TYPE_CHECKING:
    import numpy as np

    from mminference_sgl.method.plan import ForwardPlan

AUTO = HeadSpec()


def planted_captures(name: str, tokens: int, geometry: str = "qwen2.5", config: Config | None = None) -> list[Capture]:
    """A planted layer of one head in one chunk, run as it would be in a server: one capture per modality that chose."""
    case = Case(name, geometry, tokens, heads=1)
    spec = MAPS["map:2d"] if case.boundary else AUTO
    problem = planted.plant(case.scene(), case.plants, heads=1, kv_heads=1, seed=case.seed)
    config = (config or Config()).for_chunks(0, 64)
    length = problem.scene.length
    one = forward(problem, 0, length, config, torch.arange(length).numpy())
    return _run(one.operands, one.plan, [spec], config, 0)


def toy_captures(rng: np.random.Generator, frames: int = 64, config: Config | None = None) -> list[Capture]:
    """The toy model's layers, one capture each: the second half of a video of ``frames``, behind the first half."""
    scene = make_scene(rng, frames, ROWS, COLUMNS, change=CHANGE)
    found = offline.prefill(scene, scene.frames(rng))
    end = found.first + scene.tokens
    start = found.first + scene.tokens // 2
    config = (config or Config()).for_chunks(end - start, 16)
    video = (planted.VIDEO, [(found.first, end - 1)], scene.colours.shape)
    layout = _core.Layout(
        end, [video], chunk_tokens=end - start, tile_queries=config.tile_queries, cell_size=config.cell_size
    )
    device_layout = planning.DeviceLayout(layout, config.tile_keys, torch.device("cpu"))
    plan = planning.build(
        [planning.SparseRequest(device_layout, start, end - start, torch.tensor([0]), 0)],
        torch.arange(end, dtype=torch.int32)[None],
        tile_queries=config.tile_queries,
        tile_keys=config.tile_keys,
        probe_rows=config.probe_rows,
    )
    made = []
    for index, layer in enumerate(found.layers):
        operands = Operands(layer.query[start:end], layer.key[:end], layer.value[:end], layer.scale)
        made += _run(operands, plan, [AUTO] * operands.heads, config, index)
    return made


def _run(operands: Operands, plan: ForwardPlan, specs: list[HeadSpec], config: Config, layer: int) -> list[Capture]:
    trace = prefill.Trace()
    out = torch.zeros(*operands.query.shape[:2], operands.value_pool.shape[2])
    prefill.run_layer(operands, plan, specs, config, out, "torch", layer, trace)
    return captures(operands, plan, out, layer, trace)
