"""``mminference check-model``: would a checkpoint load, where do its videos lie, and what of it runs sparse."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from mminference_sgl.cli.report import Json, one_line, print_json, print_rows, quiet

_SHOWN = 20
"""Tensors named of those that would not load."""
_KINDS = {"full_attention": "full attention", "sliding_attention": "sliding window", "linear_attention": "linear"}


def run(
    path: Annotated[
        Path, typer.Argument(help="Folder of the checkpoint.", metavar="PATH", exists=True, file_okay=False)
    ],
    *,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of the checkpoint's own, as SGLang does.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Tell whether a checkpoint would load, where its videos lie and what of it runs sparse.

    Reads configuration and headers, no weights. Exits with 1 when the checkpoint would not load.
    """
    with quiet(as_json=as_json):
        try:
            model = _model_config(path, trust_remote_code)
        except Exception as error:  # noqa: BLE001 - whatever keeps SGLang from reading it is what was asked for
            problem, model = f"{type(error).__name__}: {one_line(error)}", None
        if model is not None:
            rows = [("model", _name(model)), ("videos", _geometry(model))]
            sparse, layers = _layers(model)
            rows.append(("layers", layers))
            try:
                tensors, problems = _tensors(path, model)
            except OSError as error:
                tensors, problems = str(error), [str(error)]
            rows.append(("tensors", tensors))
    if model is None:
        if as_json:
            print_json({"ok": False, "path": str(path), "error": problem})
        else:
            print(f"{path}: {problem}")
        return 1
    if as_json:
        print_json({"ok": not problems, "path": str(path), **dict(rows), "sparse": sparse, "problems": problems})
        return 1 if problems else 0
    print_rows(rows)
    for problem in problems[:_SHOWN]:
        print(f"    {problem}")
    if len(problems) > _SHOWN:
        print(f"    and {len(problems) - _SHOWN} more")
    print("\nbroken: it would not load" if problems else "\nok" if sparse else "\nok, and dense")
    return 1 if problems else 0


def _model_config(path: Path, trust_remote_code: bool) -> Any:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig(str(path), trust_remote_code=trust_remote_code)


def _own(model: Any) -> Any:
    """The class of this package for the checkpoint, None if another is."""
    from mminference_sgl import model_plugin

    return model_plugin.model_classes().get(model.hf_config.architectures[0])


def _name(model: Any) -> str:
    served = "served by a model of this package" if _own(model) is not None else "served by SGLang's own model"
    if not model.is_multimodal:
        served += ", without media"
    return f"{model.hf_config.architectures[0]} ({model.hf_config.model_type}), {served}"


def _geometry(model: Any) -> str:
    """Where the tokens of a video lie."""
    from mminference_sgl import model_plugin
    from mminference_sgl.backend.geometry import ModelGeometry

    own = model_plugin.processor_classes().get(model.hf_config.architectures[0])
    if own is not None:
        return f"{own.describe(model.hf_config)}, as the processor says"
    found = ModelGeometry.of(model.hf_config)
    if found.square:
        return f"frames of {found.square} x {found.square} tokens, from the configuration"
    if getattr(getattr(model.hf_config, "vision_config", None), "spatial_merge_size", None):
        return f"grids as the processor records them, {found.merge} x {found.merge} patches to a token"
    return "no grid known in advance: as the processor records it, else opaque"


def _layers(model: Any) -> tuple[bool, str]:
    """Whether any layer can run sparse, and which."""
    from mminference_sgl.backend.support import Deployment

    text = model.hf_text_config
    reason = Deployment.of(SimpleNamespace(), model, "").dense_reason()
    if reason:
        return False, f"none runs sparse: {reason}"
    full = getattr(text, "full_attention_layer_ids", None)
    kinds = getattr(text, "layer_types", None) or [
        "full_attention" if full is None or layer in full else "linear_attention"
        for layer in range(text.num_hidden_layers)
    ]
    counts = Counter(_KINDS.get(kind, kind) for kind in kinds)
    sparse = counts.pop(_KINDS["full_attention"], 0)
    rest = "".join(f", {count} dense ({kind})" for kind, count in counts.items())
    heads = f"{text.num_attention_heads} heads on {model.get_total_num_kv_heads()}, head size {model.head_dim}"
    return sparse > 0, f"{sparse} of {len(kinds)} can run sparse{rest}; {heads}"


def _tensors(path: Path, model: Any) -> tuple[str, list[str]]:
    """What there is to say of the weights, and what would not load."""
    from mminference_sgl.models import checkpoint

    own = _own(model)
    found = checkpoint.read(path, getattr(own, "FOLDERS", None))
    if own is not None:
        tensors = checkpoint.of_own(own, model.hf_config, found)
    else:
        known = checkpoint.of_transformers(model.hf_config.architectures[0], path, found)
        if known is None:
            return f"{len(found)}, not checked: only SGLang's loader knows this model's names", []
        tensors = known
    problems = list(tensors.problems())
    unread = f", {tensors.unread} of them behind the layer that is read" if tensors.unread else ""
    return f"{tensors.found} in the files{unread}; {len(problems)} would not load", problems
