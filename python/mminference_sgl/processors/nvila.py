"""NVILA and NVILA-Lite in Hugging Face's layout, which SGLang serves: a video of any number of frames.

SGLang 0.5.23's own processor answers 500 to every video: it wants frames of a decoder that SGLang no longer has
(``multimodal/processors/nvila.py``, ``.asnumpy()``). Images go through the checkpoint's own processor.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.models.nvila import NVILAForConditionalGeneration
from sglang.srt.models.nvila_lite import NVILALiteForConditionalGeneration

from mminference_sgl.processors import frames
from mminference_sgl.processors.prompt import PLACEHOLDER, Medium, PromptProcessor, frame_by_frame, spans

FRAMES = 8
"""SGLang's own number."""
_POOLING = {NVILAForConditionalGeneration.__name__: 2, NVILALiteForConditionalGeneration.__name__: 3}
"""Side of the square of patches that become a token."""


def side_of(config: Any) -> int:
    """Tokens along a side of a frame."""
    vision = config.vision_config
    return -(-(int(vision.image_size) // int(vision.patch_size)) // _POOLING[config.architectures[0]])


class NvilaProcessor(PromptProcessor):
    """Frames at equal distances, each a square of tokens and a newline."""

    models: ClassVar[list[type]] = [NVILAForConditionalGeneration, NVILALiteForConditionalGeneration]

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        self.IMAGE, self.VIDEO = _processor.tokenizer.image_token, _processor.tokenizer.video_token
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.size = int(hf_config.vision_config.image_size)
        self.side = side_of(hf_config)
        self.frames = self.number_of_frames(FRAMES)
        self.newline = self.text_ids("\n")

    @classmethod
    def describe(cls, config: Any) -> str:
        """See :class:`PromptProcessor`."""
        side = side_of(config)
        return f"a square of {side} x {side} tokens and a newline for each frame"

    def image(self, picture: Any) -> Medium:
        """One or several tiles, each a plane of its own or all of them one, as the checkpoint's processor cuts them."""
        found = self._processor(text=self.IMAGE, images=[picture], return_tensors="pt")
        token = self.hf_config.image_token_id
        ids = [PLACEHOLDER if one == token else int(one) for one in found["input_ids"].flatten().tolist()]
        blocks = found.get("block_sizes")
        whole = [block or (1, 1) for block in blocks] if blocks is not None else []
        grids: list[Any] = [(1, self.side * rows, self.side * columns) for rows, columns in whole]
        lengths = [last - first + 1 for first, last in spans(ids)]
        if [rows * columns for _, rows, columns in grids] != lengths:
            grids = [(1, self.side, self.side) if length == self.side**2 else None for length in lengths]
        data = {} if blocks is None else {"block_sizes": blocks}
        return Medium(Modality.IMAGE, ids, found["pixel_values"], grids, [0] * len(grids), data=data)

    def video(self, video: Any) -> Medium:
        """Frames one after the other."""
        pixels = frames.squares(video, frames.uniform(len(video), self.frames), self.size)
        count = len(pixels)
        return Medium(
            Modality.VIDEO,
            frame_by_frame(count, self.side**2, self.newline),
            # Mean and deviation 1/2.
            pixels.float().div_(127.5).sub_(1),
            grids=[(1, self.side, self.side)] * count,
            first_frames=list(range(count)),
        )
