"""What the references have in common: a prompt of ids and embeddings, and its log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from sglang.srt.utils.common import load_video
from torch import nn

MEDIUM = -1


@dataclass
class Prompt:
    """Ids, :data:`MEDIUM` where an embedding stands, and these embeddings in order.

    `behind`: text of a medium that is tokenized with what follows.
    """

    ids: list[int] = field(default_factory=list)
    embeddings: list[torch.Tensor] = field(default_factory=list)
    behind: str = ""

    def text(self, ids: Sequence[int]) -> None:
        self.ids += ids

    def medium(self, rows: torch.Tensor) -> None:
        self.ids += [MEDIUM] * len(rows)
        self.embeddings += list(rows)


class Reference:
    """`mutant`: the fault to make, "" for none. `dtype`: of all arithmetic."""

    image_token, video_token = "<image>", "<video>"

    def __init__(self, folder: Path, mutant: str = "", dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.mutant, self.dtype = folder, mutant, dtype

    tokenizer: Any
    language: nn.Module

    def image(self, prompt: Prompt, pixels: np.ndarray) -> None:
        raise NotImplementedError

    def video(self, prompt: Prompt, video: Any) -> None:
        raise NotImplementedError

    def load(self, part: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
        part.load_state_dict(weights)
        return part.to(self.dtype).eval()

    def prompt(self, text: str, images: Sequence[np.ndarray] = (), videos: Sequence[str] = ()) -> Prompt:
        found, pictures, clips = Prompt(), iter(images), iter(videos)
        for part in parts(text, (self.image_token, self.video_token)):
            if part == self.image_token:
                self.image(found, next(pictures))
            elif part == self.video_token:
                self.video(found, load_video(next(clips), use_gpu=False))
            else:
                found.text(self.tokenizer.encode(found.behind + part, add_special_tokens=False))
                found.behind = ""
        return found

    @torch.no_grad()
    def logits(self, prompt: Prompt) -> torch.Tensor:
        """[length, vocabulary]."""
        table = self.language.get_input_embeddings().weight
        media = iter(prompt.embeddings)
        rows = [next(media) if one == MEDIUM else table[one] for one in prompt.ids]
        return self.language(inputs_embeds=torch.stack(rows)[None].to(self.dtype)).logits[0]

    def logprobs(self, prompt: Prompt) -> list[float | None]:
        """Of every token of text, given what stands before it; None for media and the first."""
        rows = self.logits(prompt).log_softmax(-1)
        return [
            None if index == 0 or one == MEDIUM else float(rows[index - 1, one]) for index, one in enumerate(prompt.ids)
        ]


def parts(text: str, tokens: Sequence[str]) -> Iterator[str]:
    """The text cut before and behind every one of the tokens."""
    while text:
        at = {text.find(token): token for token in tokens if token in text}
        if not at:
            yield text
            return
        first = min(at)
        if first:
            yield text[:first]
        yield at[first]
        text = text[first + len(at[first]) :]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder's files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those with a prefix, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
