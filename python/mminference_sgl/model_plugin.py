"""The entry point that lets SGLang serve the models of this package; `SGLANG_PLUGINS` can leave it out.

SGLang calls :func:`register` in each of its processes before it reads the command line. Nothing here imports a model or
SGLang's registry of them: they are looked for when a model is loaded. What another plugin or transformers itself
already knows is left alone. `mminference doctor` lists the models and says when a hook no longer fits.
"""

from __future__ import annotations

from typing import Any

NAME = "mminference_models"
MODELS, PROCESSORS = "mminference_sgl.models", "mminference_sgl.processors"
HOOKS = {
    "sglang.srt.model_loader.utils.get_model_architecture": "register_models",
    "sglang.srt.managers.multimodal_processor.import_processors": "register_processors",
    "sglang.srt.utils.hf_transformers.tokenizer.get_tokenizer": "tokenizer_of_folder",
    "sglang.srt.utils.hf_transformers.config.HfModelConfigParser.parse": "config_of_llava_video",
    "sglang.srt.utils.hf_transformers.processor.get_processor": "processor_of_llava_video",
}
"""What of SGLang is wrapped, and by what of this module."""


def register() -> None:
    """Name configurations and chat templates, and hook into what has no registry."""
    from sglang.srt.multimodal.customized_mm_processor_utils import register_customized_processor
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from mminference_sgl.models import configs
    from mminference_sgl.processors import chat

    for config, processor in (
        (configs.VilaConfig, chat.VilaChat),
        (configs.VilaRemoteConfig, chat.VilaChat),
        (configs.VideoChatFlashConfig, chat.VideoChatFlashChat),
    ):
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
            register_customized_processor(processor)(config)
    for target, name in HOOKS.items():
        HookRegistry.register(target, globals()[name], HookType.AROUND)


def model_classes() -> dict[str, Any]:
    """The models by architecture name; imports them."""
    from sglang.srt.models.registry import import_model_classes

    return dict(import_model_classes(MODELS, strict=True))


def processor_classes() -> dict[str, Any]:
    """The processors of this package by name of the architecture; imports them."""
    import pkgutil
    from importlib import import_module

    from mminference_sgl.processors.prompt import PromptProcessor

    package = import_module(PROCESSORS)
    modules = [import_module(f"{PROCESSORS}.{name}") for _, name, _ in pkgutil.iter_modules(package.__path__)]
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PromptProcessor)
    }
    return {model.__name__: processor for processor in found for model in processor.models}


def register_models(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Before SGLang looks for a model's class, ours are in its registry where nobody else's are."""
    from sglang.srt.models.registry import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, model in model_classes().items():
        if name not in known:
            ModelRegistry.models[name] = model
    return original(*args, **kwargs)


def register_processors(original: Any, package_name: str, *args: Any, **kwargs: Any) -> Any:
    """Behind SGLang's processors come ours."""
    found = original(package_name, *args, **kwargs)
    if package_name == "sglang.srt.multimodal.processors":
        original(PROCESSORS, overwrite=True)
    return found


def tokenizer_of_folder(original: Any, tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """VILA keeps the tokenizer with the language model."""
    from mminference_sgl.models.configs import VilaConfig, VilaRemoteConfig

    if "subfolder" not in kwargs:
        config = _fields(tokenizer_name, kwargs.get("tokenizer_revision"))
        if config.get("model_type") in {VilaConfig.model_type, VilaRemoteConfig.model_type}:
            kwargs["subfolder"] = "llm"
    return original(tokenizer_name, *args, **kwargs)


def config_of_llava_video(original: Any, parser: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """LLaVA-Video shares its model type with LLaVA-OneVision, which stays SGLang's."""
    from mminference_sgl.models.configs import LlavaVideoConfig

    fields = _fields(model, kwargs.get("revision"))
    if not LlavaVideoConfig.wrote(fields):
        return original(parser, model, *args, **kwargs)
    fields.pop("model_type")
    return LlavaVideoConfig(**fields, name_or_path=str(model))


def processor_of_llava_video(original: Any, tokenizer_name: str, *args: Any, **kwargs: Any) -> Any:
    """LLaVA-Video has a tokenizer, and no files of the processor that transformers wants for its model type."""
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    from mminference_sgl.models.configs import LlavaVideoConfig
    from mminference_sgl.processors import chat

    revision = kwargs.get("revision", kwargs.get("tokenizer_revision"))
    if not LlavaVideoConfig.wrote(_fields(kwargs.get("model_name") or tokenizer_name, revision)):
        return original(tokenizer_name, *args, **kwargs)
    known = ("tokenizer_mode", "trust_remote_code", "tokenizer_backend")
    tokenizer = get_tokenizer(
        tokenizer_name, tokenizer_revision=revision, **{name: kwargs[name] for name in known if name in kwargs}
    )
    return chat.Chat(tokenizer, chat.LLAVA_VIDEO)


def _fields(path: Any, revision: str | None) -> dict[str, Any]:
    """What a checkpoint's configuration file says; nothing where there is none."""
    from transformers import PretrainedConfig

    try:
        fields: dict[str, Any] = PretrainedConfig.get_config_dict(path, revision=revision)[0]
    except (OSError, ValueError):
        return {}
    return fields
