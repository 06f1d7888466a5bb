"""LongVILA: every frame is a square of tokens and a newline.

Facts: NVlabs/VILA ``llava/utils/media.py``, ``llava/model/encoders``, ``llava/model/language_model/chat_templates``,
``llava/conversation.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.managers.schedule_batch import Modality

from mminference_sgl.models.vila import LlavaLlamaModel, VILAForCausalLM
from mminference_sgl.processors import frames
from mminference_sgl.processors.prompt import Medium, PromptProcessor, frame_by_frame


class VilaProcessor(PromptProcessor):
    """Frames at equal distances, or every ``1 / fps`` seconds where the checkpoint has a rate.

    A video shorter than the frames asked for gives each of its frames once. Where frames are pooled over time, the last
    one is repeated until they fill a group.
    """

    models: ClassVar[list[type]] = [LlavaLlamaModel, VILAForCausalLM]
    VIDEO = "<vila/video>"

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.side, self.pool = hf_config.side, hf_config.pool
        self.size = hf_config.vision_config.image_size
        self.frames, self.rate = self.number_of_frames(hf_config.num_video_frames), self.frame_rate(hf_config.fps)
        # One token: what a tokenizer puts in front of any text is not part of a line break.
        self.newline = self.text_ids("\n")

    @classmethod
    def describe(cls, config: Any) -> str:
        """See :class:`PromptProcessor`."""
        pooled = f", one for {config.pool} frames" if config.pool > 1 else ""
        return f"a square of {config.side} x {config.side} tokens and a newline for each frame{pooled}"

    def image(self, picture: Any) -> Medium:
        """One frame."""
        return self._medium(Modality.IMAGE, frames.square(picture, self.size)[:, None])

    def video(self, video: Any) -> Medium:
        """Frames one after the other."""
        rate = frames.rate_of(video)
        if rate and self.rate:
            indices = frames.at_rate(len(video), rate, self.rate, self.frames)
        else:
            indices = frames.uniform(len(video), self.frames)
        indices += indices[-1:] * (-len(indices) % self.pool)
        pixels = frames.squares(video, indices, self.size)
        return self._medium(Modality.VIDEO, pixels.unflatten(0, (-1, self.pool)))

    def _medium(self, modality: Modality, pixels: Any) -> Medium:
        """Of frames uint8 [n, pooled, 3, H, W]."""
        count = len(pixels)
        return Medium(
            modality,
            frame_by_frame(count, self.side**2, self.newline),
            pixels,
            grids=[(1, self.side, self.side)] * count,
            first_frames=list(range(count)),
        )
