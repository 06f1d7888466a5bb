"""VideoChat-Flash: clips of four frames, each a run of 64 tokens, next to each other, and a sentence about time.

Facts: OpenGVLab/VideoChat-Flash ``llava/video_utils.py``, ``llava/train/train.py``, and ``chat`` of the published
checkpoints' code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import Modality

from mminference_sgl.models.videochat_flash import VideoChatFlashQwenForCausalLM
from mminference_sgl.processors import frames
from mminference_sgl.processors.prompt import PLACEHOLDER, Medium, PromptProcessor

FEWEST, MOST = 64, 512
"""Frames of a video that has them."""


def number_of_frames(count: int, rate: float, most: int, clip: int) -> int:
    """One frame a second, in whole clips, at least 64 and at most ``most``, and no more than the ``count`` there are.

    One clip at the least. ``rate``: frames per second; without one they count as seconds.
    """
    wanted = max(FEWEST, int(count / (rate or 1) // clip) * clip)
    return max(clip, min(wanted, most // clip * clip, count // clip * clip))


class VideoChatFlashProcessor(PromptProcessor):
    """One frame a second, from the middles of equal parts of a video.

    A video shorter than a clip ends with its last frame repeated. An image is one square, not cut into tiles.
    """

    models: ClassVar[list[type]] = [VideoChatFlashQwenForCausalLM]

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        self.size, self.clip, self.tokens = hf_config.vision_config.image_size, hf_config.clip, hf_config.clip_tokens
        self.most = self.number_of_frames(MOST)

    @classmethod
    def describe(cls, config: Any) -> str:
        """See :class:`PromptProcessor`."""
        return f"a run without places, {config.clip_tokens} tokens for each {config.clip} frames"

    def image(self, picture: Any) -> Medium:
        """A clip of one frame."""
        return self._medium(Modality.IMAGE, frames.square(picture, self.size)[None], "\n")

    def video(self, video: Any) -> Medium:
        """Clips, and how long the video lasts if that is known."""
        count, rate = len(video), frames.rate_of(video)
        indices = frames.middles(count, number_of_frames(count, rate, self.most, self.clip))
        indices += indices[-1:] * (-len(indices) % self.clip)
        behind = "\n"
        if rate:
            behind += (
                f"The video lasts for {count / rate:.2f} seconds, and {len(indices)} frames are uniformly sampled"
                " from it. "
            )
        pixels = frames.squares(video, indices, self.size)
        return self._medium(Modality.VIDEO, pixels.unflatten(0, (-1, self.clip)), behind)

    def _medium(self, modality: Modality, pixels: torch.Tensor, behind: str) -> Medium:
        """Of clips uint8 [n, T, 3, H, W]. Tokens of a clip have no places: they are what merging has left."""
        count = len(pixels)
        return Medium(
            modality,
            [PLACEHOLDER] * (self.tokens * count),
            pixels,
            grids=[None] * count,
            first_frames=list(range(count)),
            lengths=[self.tokens] * count,
            behind=behind,
        )
