"""What the models have in common: a tower and a projector of their own before one of SGLang's language models."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.managers.mm_utils import general_mm_embed_routine
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.utils import add_prefix
from torch import nn

from mminference_sgl.backend.sglang_compat import pad_mm_tokens

_LANGUAGE_MODELS = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}


class VideoLanguageModel(nn.Module):
    """Embeds media with :meth:`encode` and leaves the rest to SGLang.

    A subclass sets up its own parts beside ``language_model``, and says what weights set in them.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "", *, language_prefix: str) -> None:
        super().__init__()
        self.config = config
        text = config.text_config
        self.language_model = _LANGUAGE_MODELS[text.model_type](
            config=text, quant_config=quant_config, prefix=add_prefix(language_prefix, prefix)
        )

    def encode(self, items: list[MultimodalDataItem]) -> torch.Tensor:
        """Embeddings of the placeholders of items of one modality, one after the other: [rows, hidden size]."""
        raise NotImplementedError

    @classmethod
    def parameter_of(cls, config: Any, name: str) -> str | None:
        """The parameter that a weight of the checkpoint sets; "" if it is not read, None if the language model's."""
        raise NotImplementedError

    @classmethod
    def tensors(cls, config: Any) -> dict[str, torch.Size]:
        """Names and shapes of what a checkpoint holds beside the language model, also of what is not read."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        get_embedding: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Embeds what the batch holds of media, and runs the language model."""
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.IMAGE: self.encode, Modality.VIDEO: self.encode},
            get_embedding=get_embedding,
            positions=positions,
            **kwargs,
        )

    def pad_input_ids(self, input_ids: array[int], mm_inputs: MultimodalInputs) -> array[int]:
        """Puts each item's hash in place of its placeholders, as SGLang asks."""
        return pad_mm_tokens(input_ids, mm_inputs)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sets all parameters.

        Raises:
            ValueError: a weight of the tower or the projector is unknown, or one is missing.
        """
        own = {n: p for n, p in self.named_parameters() if not n.startswith("language_model.")}
        unset = set(own)

        def of_language_model() -> Iterator[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                target = self.parameter_of(self.config, name)
                if target is None:
                    yield name, weight
                elif target:
                    if target not in own:
                        raise ValueError(f"{name} is no weight of {type(self).__name__}")
                    default_weight_loader(own[target], weight)
                    unset.discard(target)

        self.language_model.load_weights(of_language_model())
        if unset:
            raise ValueError(f"the checkpoint lacks {len(unset)} weights of {type(self).__name__}: {sorted(unset)[:8]}")
