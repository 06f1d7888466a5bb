"""A checkpoint's tensors against those of its model, by names and shapes alone; no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Size
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mminference_sgl.models.video_language import VideoLanguageModel


@dataclass(frozen=True)
class Tensors:
    """``found``: how many the files hold. ``missing``, ``unknown``: names; ``shapes``: name, the file's, the model's.

    ``unread``: how many are known and behind the layer that is read.
    """

    found: int
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    shapes: list[tuple[str, Size, Size]] = field(default_factory=list)
    unread: int = 0

    def problems(self) -> Iterator[str]:
        """One line for each tensor that would not load."""
        yield from (f"{name} is missing" for name in self.missing)
        yield from (f"{name} is unknown to the model" for name in self.unknown)
        yield from (f"{name} is {tuple(file)}, the model has {tuple(model)}" for name, file, model in self.shapes)


def read(folder: Path, folders: Mapping[str, str] | None = None) -> dict[str, Size]:
    """Names and shapes in a checkpoint's safetensors files; ``folders``: those it is in, with a prefix for each.

    Raises:
        FileNotFoundError: a folder has no such file.
    """
    found: dict[str, Size] = {}
    for part, prefix in (folders or {"": ""}).items():
        files = sorted((folder / part).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder / part} has no .safetensors file")
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                found |= {f"{prefix}{name}": Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return found


def of_own(model: type[VideoLanguageModel], config: Any, found: Mapping[str, Size]) -> Tensors:
    """The tensors of a checkpoint of one of this package's models."""
    own = model.tensors(config)
    expected = own | _shapes(AutoModelForCausalLM, config.text_config)
    return _compare(expected, found, {name for name in own if model.parameter_of(config, name) == ""})


def of_transformers(architecture: str, folder: Path, found: Mapping[str, Size]) -> Tensors | None:
    """The tensors of a checkpoint as transformers writes them; None for a model that it does not know.

    SGLang's own names are others, but it reads these files.
    """
    kind = getattr(transformers, architecture, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)) or kind.config_class is None:
        return None
    # SGLang has configurations of its own for some types.
    shapes = _shapes(kind, kind.config_class.from_pretrained(folder))
    expected, found = ({_plain(name): shape for name, shape in some.items()} for some in (shapes, found))
    return _compare(expected, {name: _as_expected(shape, expected.get(name)) for name, shape in found.items()}, set())


def _as_expected(shape: Size, expected: Size | None) -> Size:
    """Stacked experts [experts, rows, columns] are stored either way round, and read as their sizes say."""
    turned = Size([*shape[:-2], *shape[:-3:-1]])
    return turned if len(shape) == 3 and turned == expected else shape


def _plain(name: str) -> str:
    """Without a level that towers had in earlier versions of transformers, and in the files of then and now."""
    return name.replace("vision_model.", "")


def _shapes(kind: Any, config: Any) -> dict[str, Size]:
    """Names and shapes in the files of a model of transformers, but for those that are tied to others."""
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    tied = set(model.all_tied_weights_keys)
    weights = {name: weight for name, weight in model.state_dict().items() if name not in tied}
    return {name: weight.shape for name, weight in revert_weight_conversion(model, weights).items()}


def _compare(expected: Mapping[str, Size], found: Mapping[str, Size], unread: set[str]) -> Tensors:
    both = expected.keys() & found.keys()
    return Tensors(
        found=len(found),
        missing=sorted(expected.keys() - found.keys() - unread),
        # Copies of what is tied to others may be there.
        unknown=sorted(name for name in found.keys() - expected.keys() if not name.endswith("lm_head.weight")),
        shapes=[(n, found[n], expected[n]) for n in sorted(both - unread) if found[n] != expected[n]],
        unread=len(unread & both),
    )
