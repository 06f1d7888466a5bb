"""What a server does at its start with a pattern file that was made for a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import catalogue
import tiny_models
from mminference_sgl.backend.start import served_model
from mminference_sgl.method import catalog
from mminference_sgl.method.catalog import Model


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes the backend of a model of SGLang's kit with a pattern file for some model."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.test.kits.attention_unittest.attention_methods import dense_attention as kit

    def start(name: str, *rules: Any, **model: Any) -> Any:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"schema": 1, "id": "mine", "heads": list(rules), "model": model}))
        settings = {"min_tokens": 64, "pattern": name, "pattern_folder": str(tmp_path)}
        monkeypatch.setenv("MMINFERENCE_CONFIG", json.dumps(settings))
        case = kit.DenseAttentionCase("any", "mminference", ForwardMode.EXTEND, 4, 2, 1, (0,), (8,))
        config = kit.TinyModelConfig(num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, context_len=256)
        config.hf_config.num_hidden_layers = 2
        runner = kit.MockModelRunner(
            case=case, model_config=config, dtype=torch.float32, device="cpu", max_context_len=256, head_dim=16
        )
        runner.model = torch.nn.ModuleList([RadixAttention(4, 16, 0.25, 2, 0)])
        return ATTENTION_BACKENDS["mminference"](runner).prefill_backend

    return start


@pytest.mark.parametrize("name", ["mine", "searched"])
def test_a_file_for_the_served_model_is_used(start, name):
    made = start(name, architecture="TinyForCausalLM", layers=2, heads=4, head_dim=16)
    assert made._start.pattern.id == "mine"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"architecture": "Qwen"}, "architecture is Qwen in the file and TinyForCausalLM in the model"),
        ({"layers": 28}, "layers is 28 in the file and 2 in the model"),
        ({"heads": 28}, "heads is 28 in the file and 4 in the model"),
        ({"head_dim": 128}, "head_dim is 128 in the file and 16 in the model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_for_another_model_stops_the_server_with_both_numbers(start, model, said):
    with pytest.raises(SystemExit, match=f"^mminference: pattern 'mine' is for another model: {said}; name a pattern "):
        start("mine", **model)
    with pytest.raises(
        SystemExit, match=r"^mminference: pattern 'searched': none in the package and .* is for this model"
    ):
        start("searched", **{"architecture": "TinyForCausalLM", "layers": 2, "heads": 4} | model)


def test_a_rule_beyond_the_model_stops_the_server(start):
    with pytest.raises(
        SystemExit, match=r"^mminference: pattern 'mine': heads\[0\]\.layers names 2, the model has 2 lay"
    ):
        start("mine", {"layers": [2], "map": {}})


@pytest.mark.parametrize("name", [name for name in tiny_models.BUILDERS if name not in catalogue.WITHOUT_VIDEO])
def test_a_searched_file_is_found_for_its_model(pytestconfig: pytest.Config, name: str):
    """By architecture and shape of the checkpoint as SGLang reads it, where no other file has these, or by its name."""
    from sglang.srt.configs.model_config import ModelConfig

    path = tiny_models.path_of(name, Path(str(pytestconfig.cache.mkdir("tiny_models"))))
    served = served_model(ModelConfig(str(path), trust_remote_code="--trust-remote-code" in catalogue.arguments(name)))
    found = catalog.load("searched", str(catalogue.FOLDER), dataclasses.replace(served, id=f"tiny-{name}"))
    assert found.id == f"tiny-{name}-searched"
    found.check(served)
    assert len(found.measured) == len(found.provenance["clips"]) * (served.heads or 0) * len(
        {one["layer"] for one in found.measured}
    )


def test_a_server_knows_its_model(pytestconfig: pytest.Config):
    """As SGLang reads a checkpoint: counts over all ranks, whatever the language model's configuration lies below."""
    from sglang.srt.configs.model_config import ModelConfig

    path = tiny_models.path_of("qwen2_5_vl", Path(str(pytestconfig.cache.mkdir("tiny_models"))))
    config = json.loads((Path(path) / "config.json").read_text())
    text = config.get("text_config", config)
    assert served_model(ModelConfig(str(path))) == Model(
        id=str(path),
        architecture=config["architectures"][0],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["hidden_size"] // text["num_attention_heads"],
    )
