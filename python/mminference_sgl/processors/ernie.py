"""Ernie-4.5-VL, which SGLang serves: its videos are decoded by what SGLang has now.

SGLang 0.5.23 asks its decoder for methods that only its predecessor had (``multimodal/processors/ernie45_vl.py``,
``preprocess_video``), and pins memory where there may be no GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.multimodal.processors import ernie45_vl
from torchvision.transforms import functional


async def preprocess_video(
    video: Any, image_factor: int = ernie45_vl.IMAGE_FACTOR
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Frames uint8 [T, H, W, 3] resized to whole patches, and what is known of the video, as SGLang's own does."""
    total, rate = len(video), float(video.avg_fps)
    wanted = ernie45_vl.smart_nframes({}, total_frames=total, video_fps=rate)
    indices = np.unique(np.linspace(0, total - 1, num=wanted, dtype=np.int64))
    frames = torch.as_tensor(video.get_frames_at(indices.tolist())).permute(0, 3, 1, 2)
    height, width = frames.shape[2:]
    share = ernie45_vl.VIDEO_TOTAL_PIXELS / len(frames) * ernie45_vl.FRAME_FACTOR
    least = ernie45_vl.VIDEO_MIN_PIXELS
    most = max(min(ernie45_vl.VIDEO_MAX_PIXELS, share), int(least * 1.05))
    size = ernie45_vl.smart_resize(height, width, factor=image_factor, min_pixels=least, max_pixels=most)
    resized = functional.resize(frames, list(size), functional.InterpolationMode.BILINEAR)
    about = {
        "fps": rate,
        "duration": total / rate,
        "total_num_frames": total,
        "frames_indices": indices,
        "video_backend": "torchvision",
    }
    return resized.permute(0, 2, 3, 1), about


# The processor reads it by this name; there is no place to hand it in.
ernie45_vl.preprocess_video = preprocess_video
