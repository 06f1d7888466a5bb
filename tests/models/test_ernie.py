"""Ernie-4.5-VL's videos: SGLang's own preparation fails with SGLang's own decoder, ours does not."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sglang.srt.multimodal.processors import ernie45_vl
from sglang.srt.utils.common import load_video

from mminference_sgl.processors import ernie
from mminference_sgl.testing import write_mp4
from serving import squares


@pytest.fixture
def video(tmp_path: Path):
    return load_video(str(write_mp4(tmp_path / "clip.mp4", squares(24, 24, 6, 8))), use_gpu=False)


def stock() -> ModuleType:
    """SGLang's module as it is without this package."""
    spec = importlib.util.find_spec(ernie45_vl.__name__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stock_fails(video):
    """On the day it does not, ours is no longer needed."""
    with pytest.raises(AttributeError, match="get_avg_fps"):
        asyncio.run(stock().preprocess_video(video))


def test_ours_is_in_its_place(video):
    assert ernie45_vl.preprocess_video is ernie.preprocess_video
    frames, about = asyncio.run(ernie45_vl.preprocess_video(video))
    assert (frames.dtype, frames.shape[3]) == (torch.uint8, 3)
    assert frames.shape[1] % ernie45_vl.IMAGE_FACTOR == frames.shape[2] % ernie45_vl.IMAGE_FACTOR == 0
    assert about["total_num_frames"] == 24
    assert about["duration"] == pytest.approx(24 / video.avg_fps)
    assert len(about["frames_indices"]) == len(frames)


def test_the_same_as_stock_with_a_decoder_that_has_what_it_asks(video, monkeypatch: pytest.MonkeyPatch):
    """A decoder of the old interface, and memory that is not pinned."""

    class Old:
        def __len__(self) -> int:
            return len(video)

        def get_avg_fps(self) -> float:
            return video.avg_fps

        def get_batch(self, indices: np.ndarray):
            frames = video.get_frames_at(indices.tolist())
            return type("Batch", (), {"asnumpy": lambda _: frames})()

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    wanted, told = asyncio.run(stock().preprocess_video(Old()))
    frames, about = asyncio.run(ernie.preprocess_video(video))
    assert torch.equal(frames, wanted)
    assert about.keys() == told.keys()
    assert np.array_equal(about.pop("frames_indices"), told.pop("frames_indices"))
    assert about == told
