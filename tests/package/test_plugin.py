from __future__ import annotations

import subprocess
import sys
import types
from importlib import metadata

import pytest

import mminference_sgl.backend
from mminference_sgl import plugin


def python(code: str, **environment: str | None) -> str:
    import os

    env = {name: value for name, value in (os.environ | environment).items() if value is not None}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", ["mminference_sgl", "mminference_sgl.plugin", "mminference_sgl.portable.cpu"])
def test_import_is_light(module):
    heavy = {"sglang", "torch", "triton", "numpy"}
    assert python(f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))").strip() == "[]"


@pytest.mark.parametrize(
    ("distribution", "group", "name", "value"),
    [
        ("mminference-sgl", "sglang.srt.plugins", "mminference", "mminference_sgl.plugin:register"),
        ("mminference-sgl", "sglang.srt.plugins", "mminference_models", "mminference_sgl.model_plugin:register"),
        ("mminference-sgl-cpu", "sglang.srt.plugins", "portable_cpu", "mminference_sgl.portable.cpu:register"),
        ("mminference-sgl-cpu", "sglang.srt.platforms", "portable_cpu", "mminference_sgl.portable.cpu:activate"),
        ("mminference-sgl", "console_scripts", "mminference", "mminference_sgl.cli:main"),
    ],
    ids=["plugin", "models", "portable_cpu_plugin", "platform", "script"],
)
def test_entry_points(distribution, group, name, value):
    (point,) = [point for point in metadata.entry_points(group=group) if point.name == name]
    assert (point.value, point.dist.name) == (value, distribution)
    assert callable(point.load())


def test_another_platform_leaves_the_backend_alone(monkeypatch):
    """SGLang skips what comes with a platform that is not the one asked for, distribution by distribution."""
    from sglang.srt import plugins

    monkeypatch.setenv("SGLANG_PLATFORM", "another")
    excluded = plugins._get_excluded_dists()
    assert "mminference-sgl-cpu" in excluded
    found = plugins.load_plugins_by_group(plugins.GENERAL_PLUGINS_GROUP, excluded_dists=excluded)
    assert "mminference" in found
    assert "portable_cpu" not in found


def test_distributions_have_one_version():
    assert metadata.version("mminference-sgl-cpu") == mminference_sgl.__version__
    assert f"mminference-sgl=={mminference_sgl.__version__}" in metadata.requires("mminference-sgl-cpu")


def test_run_loads_plugins_before_a_module_reads_its_command_line():
    command = [sys.executable, "-m", "mminference_sgl.run"]
    benchmark = [*command, "sglang.benchmark.offline_throughput", "--attention-backend"]
    ours, other = (
        subprocess.run([*benchmark, name], capture_output=True, text=True, check=False)
        for name in ("mminference", "unheard-of")
    )
    # The model is what is missing then.
    assert ours.returncode != 0
    assert "invalid choice" not in ours.stderr
    assert "--model" in ours.stderr
    assert "invalid choice: 'unheard-of'" in other.stderr
    bare = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (bare.returncode, bare.stderr.split(":")[0]) == (1, "usage")


def test_register():
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    plugin.register()
    plugin.register()
    assert ATTENTION_BACKEND_CHOICES.count("mminference") == 1
    assert ATTENTION_BACKENDS["mminference"] is plugin.create


def test_create_imports_the_backend(monkeypatch):
    factory = types.ModuleType("mminference_sgl.backend.factory")
    factory.create = lambda runner: ("backend for", runner)
    monkeypatch.setitem(sys.modules, "mminference_sgl.backend.factory", factory)
    monkeypatch.setattr(mminference_sgl.backend, "factory", factory, raising=False)
    assert plugin.create("a runner") == ("backend for", "a runner")


def test_sglang_without_the_cpu_platform():
    """With the package installed but not asked for, SGLang's process differs by one name and one factory only."""
    out = python(
        """
import sys
import torch
pin_memory = torch.Tensor.pin_memory
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.attention import attention_registry, vision
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES
print("mminference" in ATTENTION_BACKEND_CHOICES, "portable_dense" in ATTENTION_BACKEND_CHOICES)
print(sorted({"mminference", "portable_dense"} & attention_registry.ATTENTION_BACKENDS.keys()))
print(torch.Tensor.pin_memory is pin_memory, type(current_platform).__module__.split(".")[0])
print(vision.QKV_BACKEND_IMPL["sdpa"].__name__)
print(sorted(name for name in sys.modules if name.startswith("mminference_sgl")))
""",
        SGLANG_PLATFORM=None,
    )
    assert out.splitlines()[-5:] == [
        "True False",
        "['mminference']",
        "True sglang",
        "VisionSdpaAttention",
        str(
            [
                "mminference_sgl",
                "mminference_sgl.backend",
                "mminference_sgl.backend.resolution",
                "mminference_sgl.model_plugin",
                "mminference_sgl.models",
                "mminference_sgl.models.configs",
                "mminference_sgl.plugin",
                "mminference_sgl.portable",
                "mminference_sgl.portable.cpu",
                "mminference_sgl.processors",
                "mminference_sgl.processors.chat",
            ]
        ),
    ]


def test_command_line_accepts_the_backends():
    out = python(
        """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(
    ["--model-path", "dummy", "--attention-backend", "mminference", "--decode-attention-backend", "portable_dense"]
)
print(args.attention_backend, args.decode_attention_backend)
""",
        SGLANG_PLATFORM="portable_cpu",
    )
    assert out.splitlines()[-1] == "mminference portable_dense"


MODELS = """
import sys
from sglang.srt.plugins import load_plugins
BEFORE
load_plugins()
print("sglang.srt.models.registry" in sys.modules, "mminference_sgl.models.vila" in sys.modules)
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(CONFIG_MAPPING["vila"].__module__, CONFIG_MAPPING["llava"].__module__)
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.model_loader.utils import get_model_architecture
from types import SimpleNamespace
from sglang.srt.configs.model_config import ModelImpl
model = SimpleNamespace(architectures=["ARCHITECTURE"])
config = SimpleNamespace(hf_config=model, quantization=None, model_impl=ModelImpl.SGLANG)
print(get_model_architecture(config)[0].__module__)
"""


def test_models_are_registered_when_one_is_looked_for():
    out = python(MODELS.replace("BEFORE", "").replace("ARCHITECTURE", "VILAForCausalLM")).splitlines()
    assert out[-3:] == [
        "False False",
        "mminference_sgl.models.configs transformers.models.llava.configuration_llava",
        "mminference_sgl.models.vila",
    ]


def test_models_stand_back_where_a_type_is_known():
    """Another plugin's configuration and model stay; SGLang's own models are what they were."""
    another = """
from transformers import AutoConfig, PretrainedConfig
class Config(PretrainedConfig):
    model_type = "vila"
AutoConfig.register("vila", Config)
"""
    out = python(MODELS.replace("BEFORE", another).replace("ARCHITECTURE", "Qwen2_5_VLForConditionalGeneration"))
    assert out.splitlines()[-2:] == [
        "__main__ transformers.models.llava.configuration_llava",
        "sglang.srt.models.qwen2_5_vl",
    ]


def test_models_can_be_left_out():
    code = """
from sglang.srt.plugins import load_plugins
load_plugins()
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print("vila" in CONFIG_MAPPING)
"""
    left_out, there = (python(code, SGLANG_PLUGINS=plugins) for plugins in ("mminference", "mminference_models"))
    assert (left_out.split()[-1], there.split()[-1]) == ("False", "True")


def test_a_model_package_of_the_users_own_wins(tmp_path, monkeypatch):
    package = tmp_path / "models_of_mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "vila.py").write_text("class VILAForCausalLM: pass\nEntryClass = VILAForCausalLM\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = MODELS.replace("BEFORE", "").replace("ARCHITECTURE", "VILAForCausalLM")
    assert python(code, SGLANG_EXTERNAL_MODEL_PACKAGE="models_of_mine").splitlines()[-1] == "models_of_mine.vila"


def test_doctor_says_when_a_hook_no_longer_fits(monkeypatch):
    from sglang.srt.plugins import load_plugins

    from mminference_sgl import model_plugin
    from mminference_sgl.cli import doctor

    load_plugins()
    assert doctor._check_hooks() == "fit"
    monkeypatch.setitem(model_plugin.HOOKS, "sglang.srt.gone.function", "register_models")
    with pytest.raises(RuntimeError, match=r"SGLang no longer has sglang\.srt\.gone\.function"):
        doctor._check_hooks()
    monkeypatch.setenv("SGLANG_PLUGINS", "mminference")
    assert doctor._check_hooks() == "SGLANG_PLUGINS=mminference leaves the models out"


def test_doctor_lists_the_models():
    from mminference_sgl.cli import doctor

    names = doctor._check_models().split(", ")
    assert {"LlavaLlamaModel", "VILAForCausalLM", "LlavaVideoModel", "VideoChatFlashQwenForCausalLM"} == set(names)
