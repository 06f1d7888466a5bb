"""What the processors have in common: the prompt is cut at its placeholders, and each becomes what its medium says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.managers.mm_utils import get_new_expanded_mm_items, hash_feature
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens

from mminference_sgl.backend.geometry import SPAN_FRAMES, SPAN_GRIDS, SPAN_TAILS

PLACEHOLDER = -1
"""Stands for an embedding among the ids of a medium."""


@dataclass(frozen=True)
class Medium:
    """An image or a video as the prompt shows it.

    ``ids``: token ids, :data:`PLACEHOLDER` where an embedding of its own belongs; runs of these are its spans, cut into
    spans of ``lengths`` where there are any. ``feature``: what the model's ``encode`` reads; if its first dimension is
    the number of spans, every span becomes an item of its own, and a chunk embeds only those that it holds. ``grids``
    (frames, rows, columns) by span, None where its tokens have no places, and each span's first frame in its clip, or
    its number in the video: what the geometry reads. ``tails``: by span, how many tokens at its end are not of the
    grid; none where it is empty. ``behind``: text that is tokenized with what follows. ``data``: more for the model.
    """

    modality: Modality
    ids: list[int]
    feature: torch.Tensor
    grids: Sequence[tuple[int, int, int] | None]
    first_frames: list[int]
    lengths: Sequence[int] = ()
    tails: Sequence[int] = ()
    behind: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def item(self, start: int) -> MultimodalDataItem:
        """SGLang's item, for ids that begin at a position of the prompt."""
        tails = {SPAN_TAILS: self.tails} if self.tails else {}
        grids = [grid and list(grid) for grid in self.grids]
        return MultimodalDataItem(
            modality=self.modality,
            feature=self.feature,
            offsets=[(start + first, start + last) for first, last in spans(self.ids, self.lengths)],
            model_specific_data={SPAN_GRIDS: grids, SPAN_FRAMES: self.first_frames, **tails, **self.data},
        )


def spans(ids: Sequence[int], lengths: Sequence[int] = ()) -> list[tuple[int, int]]:
    """First and last index of every run of placeholders, which ends earlier where its length is reached.

    Raises:
        ValueError: there are lengths, and they are not what the runs can be cut into.
    """
    found: list[tuple[int, int]] = []
    for index, one in enumerate(ids):
        if one != PLACEHOLDER:
            continue
        full = found and len(found) <= len(lengths) and index - found[-1][0] == lengths[len(found) - 1]
        if found and found[-1][1] == index - 1 and not full:
            found[-1] = found[-1][0], index
        else:
            found.append((index, index))
    if lengths and [last - first + 1 for first, last in found] != list(lengths):
        raise ValueError(f"{len(found)} runs of placeholders are not the {len(lengths)} spans that their grids tell")
    return found


def frame_by_frame(frames: int, tokens: int, between: list[int]) -> list[int]:
    """Ids of frames of so many tokens, each followed by the same text."""
    return ([PLACEHOLDER] * tokens + between) * frames


class PromptProcessor(BaseMultimodalProcessor):
    """A processor whose subclass says what an image and a video become."""

    IMAGE: str = "<image>"
    VIDEO: str = "<video>"

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.mm_tokens = MultimodalSpecialTokens(
            image_token=self.IMAGE,
            video_token=self.VIDEO,
            image_token_regex=re.compile(re.escape(self.IMAGE)),
            video_token_regex=re.compile(re.escape(self.VIDEO)),
        ).build(_processor)
        # Whatever stands there is overwritten; an id of the vocabulary fits wherever ids are looked at.
        self.placeholder_id = int(self._tokenizer.eos_token_id or 0)

    @classmethod
    def describe(cls, config: Any) -> str:
        """How the tokens of a video lie, in words."""
        raise NotImplementedError

    def image(self, picture: Any) -> Medium:
        """What an image becomes."""
        raise NotImplementedError

    def video(self, video: Any) -> Medium:
        """What a video becomes; ``video`` is SGLang's decoder or frames."""
        raise NotImplementedError

    def number_of_frames(self, default: int) -> int:
        """Most frames of a video, from ``--mm-process-config '{"video": {"num_frames": N}}'`` if it is there."""
        wanted = self.video_config.get("num_frames", default)
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise ValueError(f"video.num_frames must be a whole number from 1, not {wanted!r}")
        return wanted

    def frame_rate(self, default: float) -> float:
        """Frames per second to take of a video, 0 for none in particular; ``"fps"`` in the same place."""
        wanted = self.video_config.get("fps", default)
        if not isinstance(wanted, int | float) or isinstance(wanted, bool) or wanted < 0:
            raise ValueError(f"video.fps must be a number from 0, not {wanted!r}")
        return float(wanted)

    def text_ids(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a part of the prompt; only the first may get the tokenizer's own begin of text."""
        begin = self._tokenizer.bos_token
        special = first and not (begin and text.startswith(begin))
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    async def process_mm_data_async(
        self, image_data: Any, audio_data: Any, input_text: Any, request_obj: Any, **_: Any
    ) -> MultimodalProcessorOutput:
        """See SGLang's base class. Decoding and resizing do not block the event loop."""
        if audio_data:
            raise ValueError(f"{type(self).__name__} takes images and videos, no audio")
        loaded = await self.load_mm_data(
            prompt=input_text,
            multimodal_tokens=self.mm_tokens,
            image_data=image_data,
            video_data=request_obj.video_data,
        )
        if any(isinstance(one, dict) for one in [*loaded.images, *loaded.videos]):
            raise ValueError(f"{type(self).__name__} takes images and videos as they are, not precomputed")
        if any(len(video) == 0 for video in loaded.videos):
            raise ValueError("a video has no frames")
        return await asyncio.get_running_loop().run_in_executor(self.io_executor, self.assemble, loaded)

    def assemble(self, loaded: Any) -> MultimodalProcessorOutput:
        """Token ids and items of a prompt with its media."""
        images, videos = iter(loaded.images), iter(loaded.videos)
        ids: list[int] = []
        items: list[MultimodalDataItem] = []
        behind = ""
        for number, part in enumerate(re.split(self.mm_tokens.get_combined_regex(), loaded.input_text)):
            if part not in {self.IMAGE, self.VIDEO}:
                text, behind = behind + part, ""
                ids += self.text_ids(text, first=number == 0) if text or number == 0 else []
                continue
            medium = self.image(next(images)) if part == self.IMAGE else self.video(next(videos))
            items.append(medium.item(len(ids)))
            ids += [self.placeholder_id if one == PLACEHOLDER else one for one in medium.ids]
            behind = medium.behind
        items = get_new_expanded_mm_items(items)
        for item in items:
            # SGLang tells items apart by their pixels alone, and a picture may be a frame of the video beside it.
            if item.is_image():
                item.hash = hash_feature(item.feature) ^ 1
        return MultimodalProcessorOutput(
            input_ids=ids,
            mm_items=items,
            im_token_id=self.placeholder_id,
            video_token_id=self.placeholder_id,
        )
