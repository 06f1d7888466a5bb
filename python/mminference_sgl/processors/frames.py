"""Frames of a video: which ones, and as square pictures of a tower's size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional

DECODED_AT_A_TIME = 16
"""Frames held in the file's own size: 100 MB at 1080p."""


def uniform(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` frames at equal distances, the first and the last among them; each at most once."""
    return sorted(set(np.linspace(0, count - 1, min(count, wanted)).round().astype(int).tolist()))


def at_rate(count: int, rate: float, wanted_rate: float, most: int) -> list[int]:
    """Every ``1 / wanted_rate`` seconds a frame, the first ``most`` of them."""
    step = max(1.0, rate / wanted_rate)
    return [int(index) for index in np.arange(0, count, step)[:most]]


def middles(count: int, wanted: int) -> list[int]:
    """The middle frames of ``wanted`` equal parts of ``count`` frames; of each frame one where there are fewer."""
    ends = np.linspace(0, count, min(count, wanted) + 1).astype(int).tolist()
    return [(first + after - 1) // 2 for first, after in itertools.pairwise(ends)]


def repeated(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` frames at equal distances, rounded down; some several times if there are fewer."""
    found: list[int] = np.linspace(0, count - 1, wanted, dtype=int).tolist()
    return found


def rate_of(video: Any) -> float:
    """Frames per second of a decoder; 0 where it is not known, as of frames that come as pictures."""
    return float(getattr(video, "avg_fps", 0) or 0)


def squares(video: Any, indices: Sequence[int], side: int) -> torch.Tensor:
    """The frames at some indices, resized without regard to their shape: uint8 [T, 3, side, side].

    ``video``: SGLang's decoder, or frames as arrays [H, W, 3] or pictures.
    """
    parts = []
    for first in range(0, len(indices), DECODED_AT_A_TIME):
        some = list(indices[first : first + DECODED_AT_A_TIME])
        if hasattr(video, "get_frames_at"):
            decoded = torch.as_tensor(video.get_frames_at(some))
        else:
            decoded = torch.stack([torch.as_tensor(np.asarray(video[index])) for index in some])
        parts.append(_resized(decoded.permute(0, 3, 1, 2), side))
    return torch.cat(parts)


def square(picture: Any, side: int, border: int | None = None) -> torch.Tensor:
    """A picture as one such frame: uint8 [1, 3, side, side].

    ``border``: the grey that widens it to a square first; None: it is resized without regard to its shape.
    """
    if not isinstance(picture, torch.Tensor):
        picture = torch.as_tensor(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    if border is not None:
        height, width = picture.shape[-2:]
        longer = max(height, width)
        left, top = (longer - width) // 2, (longer - height) // 2
        picture = functional.pad(picture, [left, top, longer - width - left, longer - height - top], fill=border)
    return _resized(picture[None], side)


def _resized(frames: torch.Tensor, side: int) -> torch.Tensor:
    size = [side, side]
    resized: torch.Tensor = functional.resize(frames, size, functional.InterpolationMode.BICUBIC, antialias=True)
    resized = resized.cpu()
    return resized.contiguous()
