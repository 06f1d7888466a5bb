"""`mminference check-model` on every tiny checkpoint, and on broken ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import tiny_models
from mminference_sgl.cli import main
from readme import served_by

VIDEOS = {
    "longvila": "a square of 7 x 7 tokens and a newline for each frame, as the processor says",
    "longvila_llama": "a square of 7 x 7 tokens and a newline for each frame, as the processor says",
    "longvila_pooled": "a square of 7 x 7 tokens and a newline for each frame, one for 4 frames, as the processor says",
    "nvila": "a square of 4 x 4 tokens and a newline for each frame, as the processor says",
    "nvila_lite": "a square of 3 x 3 tokens and a newline for each frame, as the processor says",
    "llava_video": "6 x 6 tokens and a newline column for each frame, as the processor says",
    "videochat_flash": "a run without places, 64 tokens for each 4 frames, as the processor says",
    "internvl": "frames of 8 x 8 tokens, from the configuration",
    "qwen2_5_vl": "grids as the processor records them, 2 x 2 patches to a token",
    "kimi_vl": "no grid known in advance: as the processor records it, else opaque",
}
DENSE = {"kimi_vl": "none runs sparse: MLA models have no layer with keys and values per head"}
MIXED = {
    "gemma3": "2 of 4 can run sparse, 2 dense (sliding window)",
    "qwen3_5": "1 of 4 can run sparse, 3 dense (linear)",
    "qwen3_5_moe": "1 of 4 can run sparse, 3 dense (linear)",
}


@pytest.fixture(scope="module")
def path_of(pytestconfig: pytest.Config):
    cache = Path(str(pytestconfig.cache.mkdir("tiny_models")))
    return lambda name: tiny_models.path_of(name, cache)


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    code = main(["check-model", "--trust-remote-code", str(path)])
    text = capsys.readouterr().out
    rows = (line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  ") and "  " in line.strip())
    return code, {name: value.strip() for name, value in rows}, text


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_every_tiny_checkpoint_is_whole(name, path_of, capsys):
    code, rows, text = check(path_of(name), capsys)
    assert code == 0, text
    assert rows["tensors"].endswith("0 would not load") or "not checked" in rows["tensors"]
    assert ("a model of this package" in rows["model"]) == (name in served_by()["this package"])
    assert rows["videos"] == VIDEOS.get(name, rows["videos"])
    assert rows["layers"].startswith(DENSE.get(name) or MIXED.get(name) or f"{2} of {2} can run sparse")
    assert text.rstrip().endswith("ok, and dense" if name in DENSE else "ok")


@pytest.fixture
def broken(path_of, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path_of("longvila"), tmp_path / "broken"))


def change(file: Path, **tensors) -> None:
    weights = {name: weight for name, weight in (load_file(file) | tensors).items() if weight is not None}
    save_file(weights, file, metadata={"format": "pt"})


def test_json_says_the_same(path_of, capsys):
    _, rows, _ = check(path_of("qwen2_5_vl"), capsys)
    assert main(["check-model", "--json", str(path_of("qwen2_5_vl"))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in rows} == rows
    assert (found["ok"], found["sparse"], found["problems"]) == (True, True, [])


def test_json_of_broken_checkpoints(broken, tmp_path, capsys):
    change(broken / "mm_projector" / "model.safetensors", **{"layers.2.weight": None})
    assert main(["check-model", "--json", str(broken)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["problems"]) == (False, ["mm_projector.layers.2.weight is missing"])
    (tmp_path / "empty").mkdir()
    assert main(["check-model", "--json", str(tmp_path / "empty")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert found["error"]


def test_a_folder_that_is_no_checkpoint_is_told_in_one_line(tmp_path, capsys):
    code, _, text = check(tmp_path, capsys)
    assert code == 1
    assert text.startswith(f"{tmp_path}: ")
    assert text.count("\n") == 1


def test_a_missing_tensor_is_named(broken, capsys):
    change(broken / "mm_projector" / "model.safetensors", **{"layers.2.weight": None})
    code, _, text = check(broken, capsys)
    assert code == 1
    assert "mm_projector.layers.2.weight is missing" in text
    assert "1 would not load" in text


def test_a_wrong_shape_is_named_with_both(broken, capsys):
    file = broken / "llm" / "model.safetensors"
    weight = load_file(file)["model.layers.1.mlp.up_proj.weight"]
    change(file, **{"model.layers.1.mlp.up_proj.weight": weight[:-1].contiguous()})
    code, _, text = check(broken, capsys)
    assert code == 1
    assert "model.layers.1.mlp.up_proj.weight is (255, 128), the model has (256, 128)" in text


def test_an_unknown_tensor_is_named(broken, capsys):
    file = broken / "vision_tower" / "model.safetensors"
    change(file, **{"vision_model.gate": load_file(file)["vision_model.post_layernorm.bias"]})
    code, _, text = check(broken, capsys)
    assert code == 1
    assert "vision_tower.vision_model.gate is unknown to the model" in text


@pytest.mark.parametrize(
    ("part", "value", "known"),
    [
        ("mm_projector_cfg", {"mm_projector_type": "resampler"}, "mlp_downsample"),
        ("vision_tower_cfg", {"model_type": "intern_vit_6b"}, "siglip_vision_model"),
        ("llm_cfg", {"model_type": "mixtral"}, "qwen2, llama"),
        ("video_encoder", {"_target_": "encoders.Other"}, "TSPVideoEncoder"),
        ("video_encoder", {"_target_": "encoders.TSPVideoEncoder", "pool_sizes": [[2, 1, 1], [1, 4, 4]]}, "one size"),
    ],
    ids=["projector", "tower", "language model", "video encoder", "pool sizes"],
)
def test_an_unknown_part_is_refused_by_name(part, value, known, broken, capsys):
    file = broken / "config.json"
    config = json.loads(file.read_text())
    config[part] = config.get(part, {}) | value
    file.write_text(json.dumps(config))
    code, _, text = check(broken, capsys)
    assert code == 1
    assert str(next(iter(reversed(value.values()))))[-5:] in text
    assert known in text


def test_a_folder_without_weights_is_named(broken, capsys):
    shutil.rmtree(broken / "mm_projector")
    code, _, text = check(broken, capsys)
    assert code == 1
    assert "mm_projector has no .safetensors file" in text


def test_transformers_models_are_checked_as_transformers_reads_them(path_of, tmp_path, capsys):
    folder = Path(shutil.copytree(path_of("qwen2_5_vl"), tmp_path / "broken"))
    change(folder / "model.safetensors", **{"lm_head.weight": None})
    code, _, text = check(folder, capsys)
    assert code == 1
    assert "lm_head.weight is missing" in text
