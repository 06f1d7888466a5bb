"""Captures: what is written equals what plain code finds, and where nothing is asked for nothing is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import problems
from mminference_sgl.backend import capture
from mminference_sgl.method import prefill
from mminference_sgl.method.catalog import HeadSpec
from mminference_sgl.method.config import Config, ConfigError

GRID, SLASH, AUTO = (HeadSpec("dense", "dense", name, name) for name in ("grid", "vertical_slash", "auto"))
SPECS = [GRID, SLASH, AUTO, HeadSpec("dense", "dense", "dense", "dense")]
CONFIG = Config(error=0.4, tile_queries=64, tile_keys=64)
REQUESTS = (
    problems.Request(700, [problems.one_span_video(10, 8, 6, 10)], 0, 700),
    problems.Request(900, [problems.timestamped_video(18, 10, 6, 10)], 307, 557),
)


def run(run_layer: capture.RunLayer, config: Config = CONFIG, layer: int = 3) -> tuple[problems.Problem, torch.Tensor]:
    problem = problems.make(REQUESTS, tile_queries=64)
    out = torch.zeros(problem.operands.query.shape)
    run_layer(problem.operands, problem.plan, SPECS, config, out, "torch", layer)
    return problem, out


def recorded(folder: Path, **environ: str) -> capture.RunLayer:
    return capture.recording(prefill.run_layer, {capture.ENV_FOLDER: str(folder), **environ}, rank=1)


@pytest.mark.parametrize("value", [{}, {capture.ENV_FOLDER: ""}, {capture.ENV_LAYERS: "1"}])
def test_off_is_the_function_itself(value: dict[str, str]) -> None:
    assert capture.recording(prefill.run_layer, value) is prefill.run_layer


def test_the_output_is_the_same(tmp_path: Path) -> None:
    assert torch.equal(run(recorded(tmp_path))[1], run(prefill.run_layer)[1])


def test_only_the_layers_that_are_asked_for(tmp_path: Path) -> None:
    run(recorded(tmp_path, **{capture.ENV_LAYERS: "1,3"}), layer=2)
    assert capture.files(tmp_path) == []
    run(recorded(tmp_path, **{capture.ENV_LAYERS: "1,3"}), layer=3)
    names = [path.name for path in capture.files(tmp_path)]
    assert names == ["00001-r0-l003-h004-media.safetensors", "00001-r1-l003-h004-media.safetensors"]


def test_bad_layers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MMINFERENCE_CAPTURE_LAYERS"):
        recorded(tmp_path, **{capture.ENV_LAYERS: "one"})


@pytest.mark.parametrize("file_bytes", [capture.FILE_BYTES, 1], ids=["all-rows", "probe-rows"])
@pytest.mark.parametrize("map_tiles", [prefill.MAP_TILES, 1], ids=["one-block", "blocks-of-heads"])
def test_what_is_written_is_what_was_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int, map_tiles: int
) -> None:
    """The output follows from the capture: attention by plain code over the keys that it says were read."""
    monkeypatch.setattr(capture, "FILE_BYTES", file_bytes)
    monkeypatch.setattr(prefill, "MAP_TILES", map_tiles)
    problem, out = run(recorded(tmp_path))
    dense = problem.dense(torch.float32)
    densities = []
    for index, path in enumerate(capture.files(tmp_path)):
        found = capture.load(path)
        request = REQUESTS[index]
        about = found.about
        assert (about.layer, about.request, about.first_head) == (3, index, 4)
        assert (about.prefix, about.chunk, about.modality) == (request.prefix, request.chunk, "media")
        (group,) = (g for g in problem.plan.groups if g.request == index and g.modality == "media")
        assert found.probed.sum() == len(group.probe_rows.rows)
        every_row = group.row_slots.stop - group.row_slots.start
        assert len(found.positions) == (every_row if file_bytes > 1 else len(group.probe_rows.rows) + 1)
        slots = problem.req_to_token[index, : request.prefix + request.chunk].long()
        assert torch.equal(found.key, problem.key_pool[slots])
        assert found.pattern(3) == "dense"
        assert found.pattern(1) in {"vertical_slash", "dense"}
        batch_row = found.positions - request.prefix + (REQUESTS[0].chunk if index else 0)
        for head in range(found.heads):
            weights, kept = found.weights(head), found.kept(head)
            value = problem.value_pool[slots][:, head // 2]
            torch.testing.assert_close(weights @ value, dense[batch_row, head], rtol=1e-4, atol=1e-4)
            if found.guarded[head]:
                kept = torch.ones_like(kept)
            seen = weights * (kept > 0)
            mass = seen.sum(1)
            torch.testing.assert_close((seen @ value) / mass[:, None], out[batch_row, head], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(
                float(found.coverage[head]), float(mass[found.probed].mean()), rtol=1e-3, atol=1e-3
            )
            probed = batch_row[found.probed]
            error = (out[probed, head] - dense[probed, head]).norm() / dense[probed, head].norm()
            torch.testing.assert_close(float(found.error[head]), float(error), rtol=1e-2, atol=1e-4)
        densities += found.density.tolist()
        assert found.layer_error <= CONFIG.error
    assert min(densities) < 0.95
    assert max(densities) == 1.0


def test_tiles_and_curves_belong_together(tmp_path: Path) -> None:
    """What a head has is a point of its pattern's curve, and counting its tiles gives that point's."""
    run(recorded(tmp_path), config=Config(error=0.4, tile_queries=64, tile_keys=64, error_ceiling=1e9))
    checked = 0
    for path in capture.files(tmp_path):
        found = capture.load(path)
        for head in range(found.heads):
            count = int(found.near[head].sum()) + int(found.far[head].sum())
            assert int(found.tiles[head]) == count
            if (pick := int(found.picked[head])) >= 0:
                points = zip(found.curve_tiles[pick, head], found.curve_error[pick, head], strict=True)
                assert any(int(t) == count and abs(float(e - found.estimate[head])) < 1e-6 for t, e in points)
                checked += 1
    assert checked >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_keys_are_kept_as_the_pool_has_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """With their scale, so that the weights are those of the keys that the pool stands for."""
    problem = problems.make(REQUESTS[:1], tile_queries=64)
    if dtype == torch.bfloat16:
        operands = meant = problems.cast(problem.operands, dtype)
    else:
        operands, meant = problems.in_fp8(problem.operands, 0.5, 2.0)
    out = torch.zeros_like(operands.query)
    recorded(tmp_path)(operands, problem.plan, SPECS, CONFIG, out, "torch", 0)
    (path,) = capture.files(tmp_path)
    found = capture.load(path)
    assert found.key.dtype == dtype
    slots = problem.req_to_token[0, : REQUESTS[0].length].long()
    row = -1
    query, key = meant.query[found.positions[row], 2].float(), meant.key_pool[slots, 1].float()
    scores = (key @ query * meant.scale)[: found.positions[row] + 1]
    weights = found.weights(2)[row, : found.positions[row] + 1]
    torch.testing.assert_close(weights, scores.softmax(0), rtol=1e-3, atol=1e-5)


def test_a_full_folder_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(capture, "FOLDER_BYTES", 1)
    run_layer: Any = recorded(tmp_path)
    run(run_layer)
    first = capture.files(tmp_path)
    run(run_layer)
    assert capture.files(tmp_path) == first != []
    assert "that was the last" in caplog.text
