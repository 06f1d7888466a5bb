"""Images and videos from arrays, in the forms that a chat message takes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def png_url(pixels: NDArray[np.uint8]) -> str:
    """An image, uint8 ``[height, width, 3]``, as a PNG in a data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_mp4(path: str | Path, frames: NDArray[np.uint8], fps: float = 2.0, crf: int = 18) -> Path:
    """Write frames, uint8 ``[frames, height, width, 3]`` of even height and width, as H.264."""
    import torch
    from torchcodec.encoders import VideoEncoder

    planar = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).contiguous()
    encoder = VideoEncoder(planar, frame_rate=fps)
    encoder.to_file(str(path), codec="libx264", pixel_format="yuv420p", crf=crf, preset="veryfast")
    return Path(path)
