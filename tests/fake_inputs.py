"""Videos as SGLang decodes them and requests as its processors leave them, for tests without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

from mminference_sgl.backend.geometry import SPAN_FRAMES, SPAN_GRIDS, SPAN_TAILS, ModelGeometry
from mminference_sgl.backend.layout import LayoutCache

CPU = torch.device("cpu")
MERGED = ModelGeometry(2)


class Video:
    """As SGLang's decoder: ``count`` frames of one colour each, their number, at a rate."""

    def __init__(self, count: int, avg_fps: float) -> None:
        self.count, self.avg_fps = count, avg_fps

    def __len__(self) -> int:
        return self.count

    def get_frames_at(self, indices: list[int]) -> np.ndarray:
        return np.array(indices, dtype=np.uint8)[:, None, None, None] * np.ones((1, 20, 30, 3), dtype=np.uint8)


def media(modality: str, offsets: Any, **data: Any) -> MultimodalDataItem:
    """A processor's item with its model-specific data, grids among them."""
    return MultimodalDataItem(modality=Modality[modality], offsets=offsets, model_specific_data=data)


def own(
    modality: str, offsets: Any, grids: list[Any], frames: list[int] | None = None, tails: list[Any] | None = None
) -> MultimodalDataItem:
    """An item of this package's own processors: grid, first frame and tail by span; frames are numbered from 0."""
    numbers = list(range(len(offsets))) if frames is None else frames
    data = {SPAN_GRIDS: [one and list(one) for one in grids], SPAN_FRAMES: numbers}
    return media(modality, offsets, **data, **({} if tails is None else {SPAN_TAILS: tails}))


def request(*items: Any, prompt: int | None = None) -> MultimodalInputs:
    """Inputs of a request; ``prompt``: its length, for models with M-RoPE."""
    positions = None if prompt is None else torch.zeros(3, prompt, dtype=torch.long)
    return MultimodalInputs(mm_items=list(items), mrope_positions=positions)


def grid(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def frame_spans(start: int, frames: int, area: int, gaps: list[int]) -> list[tuple[int, int]]:
    """A span per frame; before each of them as many text tokens as ``gaps`` says in turn."""
    spans = []
    for frame in range(frames):
        start += gaps[frame % len(gaps)]
        spans.append((start, start + area - 1))
        start += area
    return spans


def cache_of(**sizes: int) -> LayoutCache:
    return LayoutCache(MERGED, **{"chunk_tokens": 512, "tile_queries": 64, "tile_keys": 16, "cell_size": 0} | sizes)
