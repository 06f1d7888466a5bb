"""A bfloat16 checkpoint on a CPU that is slow at bfloat16: the whole server computes in float32."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.toy.scenes import make_scene
from benchmarks.toy.serving import CHANGE, CHECKPOINT, COLUMNS, FPS, ROWS, Score, ask, server
from mminference_sgl.testing import prefills, write_mp4

pytestmark = pytest.mark.server

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
EXACT = {"min_tokens": 256, "error": 0.0}
PARTS = {"vision tower": ["visual.*"], "attention": ["model.layers.*.attn"], "language model": ["model.layers.*"]}


def test_served_in_float32_where_bfloat16_is_slow(tmp_path: Path) -> None:
    assert json.loads((CHECKPOINT / "config.json").read_text())["dtype"] == "bfloat16"
    rng = np.random.default_rng(3)
    scene = make_scene(rng, 8, ROWS, COLUMNS, change=CHANGE)
    video = write_mp4(tmp_path / "video.mp4", scene.frames(rng), FPS)
    score = Score()
    hooks = [
        {"name": part, "target_modules": names, "hook_factory": "dtype_hook:log_dtypes", "config": {"part": part}}
        for part, names in PARTS.items()
    ]
    args = ["--forward-hooks", json.dumps(hooks)]
    env = {**AVX2, "PYTHONPATH": str(Path(__file__).parent)}
    with server("mminference", EXACT, 512, args, quick=True, **env) as running:
        ask(running, score, scene, video)
        log = running.log()
    assert score.all_right
    assert prefills(log)
    (reason,) = re.findall(r"portable_cpu: serving in float32: (.*)", log)
    assert "bfloat16 takes" in reason
    assert set(re.findall(r"computes in: (.*)", log)) == {f"{part} torch.float32" for part in PARTS}
    assert set(re.findall(r"KV Cache is allocated.*dtype: (torch\.\w+)", log)) == {"torch.float32"}
