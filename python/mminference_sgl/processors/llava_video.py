"""LLaVA-Video: frames of a video in rows of tokens, newlines as the configuration has them, and what time it shows.

Facts: LLaVA-VL/LLaVA-NeXT ``docs/LLaVA_Video_1003.md`` (sampling, prompt), ``llava/model/llava_arch.py`` (newlines),
``llava/mm_utils.py`` (pictures).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sglang.srt.managers.schedule_batch import Modality

from mminference_sgl.models.llava_video import LlavaVideoModel
from mminference_sgl.processors import frames
from mminference_sgl.processors.prompt import PLACEHOLDER, Medium, PromptProcessor

FRAMES = 64
"""Of a video, where ``--mm-process-config`` names no other number."""
_GREY = 127
"""SigLIP's mean, with which pictures are widened to a square."""


def sampled(count: int, rate: float, most: int, *, force: bool) -> tuple[list[int], list[float]]:
    """Which of ``count`` frames, and at how many seconds each is.

    One a second, unless these are more than ``most``; then, and with ``force`` always, ``most`` at equal distances, a
    frame several times where there are fewer. Without a rate there are no seconds, and frames are at equal distances.
    """
    step = max(1, round(rate))
    seconds = list(range(0, count, step))
    if rate > 0 and not force and len(seconds) <= most:
        # LLaVA-NeXT divides by the rounded rate here.
        return seconds, [index / step for index in seconds]
    indices = frames.repeated(count, most)
    return indices, [index / rate for index in indices] if rate > 0 else []


def time_instruction(duration: float, seconds: list[float]) -> str:
    """What the prompt says of a video's frames."""
    places = ",".join(f"{second:.2f}s" for second in seconds)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(seconds)} frames are uniformly sampled from it."
        f" These frames are located at {places}.Please answer the following questions related to this video."
    )


class LlavaVideoProcessor(PromptProcessor):
    """Every frame is a span and an item of its own, so that a chunk embeds the frames that it holds.

    Behind a picture and a video comes a line break, behind a video the time instruction before it, where the
    configuration has one and the video a rate.
    """

    models: ClassVar[list[type]] = [LlavaVideoModel]

    def __init__(self, hf_config: Any, server_args: Any, _processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, _processor, *args, **kwargs)
        hf_config.check()
        self.size = hf_config.vision_config.image_size
        self.frames = self.number_of_frames(FRAMES)

    @classmethod
    def describe(cls, config: Any) -> str:
        """See :class:`PromptProcessor`."""
        column = " and a newline column" if config.newline_column else ""
        return f"{config.side} x {config.side} tokens{column} for each frame"

    def image(self, picture: Any) -> Medium:
        """A picture widened to a square, not pooled, and a newline."""
        side = self.hf_config.whole_side
        pixels = frames.square(picture, self.size, border=_GREY)
        return _medium(Modality.IMAGE, pixels, (1, side, side), [1], "\n")

    def video(self, video: Any) -> Medium:
        """Frames one after the other."""
        config, rate = self.hf_config, frames.rate_of(video)
        indices, seconds = sampled(len(video), rate, self.frames, force=bool(config.force_sample))
        last = len(indices) - 1
        tails = {"frame": [1] * (last + 1), "one_token": [0] * last + [1]}
        timed = config.add_time_instruction and seconds
        return _medium(
            Modality.VIDEO,
            frames.squares(video, indices, self.size),
            (1, config.side, config.side + config.newline_column),
            tails.get(config.mm_newline_position, [0] * (last + 1)),
            (time_instruction(len(video) / rate, seconds) if timed else "") + "\n",
        )


def _medium(
    modality: Modality, pixels: torch.Tensor, grid: tuple[int, int, int], tails: list[int], behind: str
) -> Medium:
    """Of frames uint8 [T, 3, H, W] of one grid, with so many newlines behind each."""
    _, rows, columns = grid
    return Medium(
        modality,
        [PLACEHOLDER] * (len(tails) * rows * columns + sum(tails)),
        pixels,
        grids=[grid] * len(tails),
        first_frames=list(range(len(tails))),
        lengths=[rows * columns + tail for tail in tails],
        tails=tails,
        behind=behind,
    )
