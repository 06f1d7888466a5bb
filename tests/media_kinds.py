"""Small files of many formats and shapes, and broken ones, made by the FFmpeg and the Pillow that are installed."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

FRAMES, HEIGHT, WIDTH = 6, 112, 140
X264 = ("-c:v", "libx264", "-preset", "ultrafast")

VIDEOS: dict[str, tuple[str, tuple[str, ...]]] = {
    "h264": ("mp4", (*X264, "-pix_fmt", "yuv420p")),
    "h264, index first": ("mp4", (*X264, "-pix_fmt", "yuv420p", "-movflags", "+faststart")),
    "h264, fragmented": ("mp4", (*X264, "-pix_fmt", "yuv420p", "-movflags", "frag_keyframe+empty_moov")),
    "h264 in 4:4:4": ("mp4", (*X264, "-pix_fmt", "yuv444p")),
    "h264 in 10 bits": ("mkv", (*X264, "-pix_fmt", "yuv420p10le")),
    "h264 in grey": ("mp4", (*X264, "-pix_fmt", "gray")),
    "h264 in a transport stream": ("ts", (*X264, "-pix_fmt", "yuv420p")),
    "h264 with sound": (
        "mp4",
        ("-f", "lavfi", "-i", "sine=duration=3", *X264, "-pix_fmt", "yuv420p", "-c:a", "aac", "-shortest"),
    ),
    "hevc": ("mp4", ("-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none")),
    "mpeg4": ("avi", ("-c:v", "mpeg4")),
    "mpeg4, mov": ("mov", ("-c:v", "mpeg4")),
    "mpeg2": ("mpg", ("-c:v", "mpeg2video", "-r", "25")),
    "vp8": ("webm", ("-c:v", "libvpx", "-deadline", "realtime")),
    "vp9": ("webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime")),
    "vp9 with alpha": ("webm", ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-pix_fmt", "yuva420p")),
    "mjpeg": ("avi", ("-c:v", "mjpeg", "-pix_fmt", "yuvj420p")),
    "ffv1": ("mkv", ("-c:v", "ffv1")),
    "prores": ("mov", ("-c:v", "prores_ks")),
    "animated gif": ("gif", ()),
    "one frame": ("mp4", (*X264, "-pix_fmt", "yuv420p", "-frames:v", "1")),
    "two frames": ("mp4", (*X264, "-pix_fmt", "yuv420p", "-frames:v", "2")),
    "odd size": ("mp4", ("-vf", "scale=113:75", *X264, "-pix_fmt", "yuv444p")),
    "tall": ("mp4", ("-vf", "scale=30:600", *X264, "-pix_fmt", "yuv420p")),
    "wide": ("mp4", ("-vf", "scale=600:30", *X264, "-pix_fmt", "yuv420p")),
    "pixels that are not square": ("mp4", ("-vf", "setsar=2/1", *X264, "-pix_fmt", "yuv420p")),
    "frames of varying length": ("mkv", ("-vf", "setpts=N*N/TB/4", "-fps_mode", "vfr", *X264, "-pix_fmt", "yuv420p")),
    "120 frames a second": ("mp4", ("-vf", "setpts=N/120/TB", "-r", "120", *X264, "-pix_fmt", "yuv420p")),
}
"""By name, the file's extension and what FFmpeg is asked for."""
REFUSED = ("mpeg2", "one frame")
"""What SGLang 0.5.23 itself may refuse: fewer frames than the file says, and fewer than it takes."""

BROKEN = (
    "video of no bytes",
    "text as mp4",
    "page of a web server as mp4",
    "noise as mp4",
    "noise as webm",
    "mp4 cut in half",
    "mp4 without its index",
    "mp4 of its first bytes",
    "mp4 of its index alone",
    "index that is noise",
    "gif of its first bytes",
    "sound alone",
    "file that is not there",
    "image of no bytes",
    "text as png",
    "noise as jpeg",
    "png of its first bytes",
    "png that is 0 x 0",
    "png that says it is huge",
    "drawing as png",
)
DAMAGED = (
    "frames of zeros",
    "one bad frame",
    "width that is not the stream's",
    "jpeg cut in half",
    "mp4 named webm",
    "jpeg named png",
    "jpeg as video",
)

_Pictures = dict[str, tuple[str, Callable[[Image.Image, Path], None]]]


def _saved(mode: str = "RGB", **options: object) -> Callable[[Image.Image, Path], None]:
    return lambda image, path: image.convert(mode).save(path, **options)


def _sixteen_bits(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def _turned(image: Image.Image, path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(path, exif=turned)


IMAGES: _Pictures = {
    "jpeg": ("jpg", _saved()),
    "progressive jpeg": ("jpg", _saved(progressive=True)),
    "grey jpeg": ("jpg", _saved("L")),
    "cmyk jpeg": ("jpg", _saved("CMYK")),
    "jpeg turned by its exif": ("jpg", _turned),
    "png": ("png", _saved()),
    "png with alpha": ("png", _saved("RGBA")),
    "png with a palette": ("png", _saved("P")),
    "png in grey with alpha": ("png", _saved("LA")),
    "png in 16 bits": ("png", _sixteen_bits),
    "black and white png": ("png", _saved("1")),
    "webp": ("webp", _saved()),
    "webp without loss": ("webp", _saved("RGBA", lossless=True)),
    "bmp": ("bmp", _saved()),
    "tiff": ("tiff", _saved()),
    "gif": ("gif", _saved("P")),
    "tall picture": ("png", lambda image, path: image.resize((29, 700)).save(path)),
    "tiny picture": ("png", lambda image, path: image.resize((3, 2)).save(path)),
}
"""By name, the file's extension and who writes it."""


def available() -> bool:
    """Whether FFmpeg's program is there; its libraries alone cannot write these."""
    return shutil.which("ffmpeg") is not None


def frames() -> np.ndarray:
    """Moving coloured squares, uint8 ``[FRAMES, HEIGHT, WIDTH, 3]``."""
    colours = np.random.default_rng(3).integers(256, size=(FRAMES, HEIGHT // 28, WIDTH // 28, 3), dtype=np.uint8)
    return colours.repeat(28, 1).repeat(28, 2)


def videos(folder: Path) -> dict[str, Path]:
    return {name: video(folder, *kind) for name, kind in VIDEOS.items()}


def video(folder: Path, extension: str, arguments: tuple[str, ...]) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.{extension}"
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "2", "-i", "-")
    # Written by one thread and without the encoder's version: the same bytes each time.
    command = ("ffmpeg", "-v", "error", "-y", *source, *arguments, "-threads", "1", "-bitexact", str(path))
    subprocess.run(command, input=frames().tobytes(), check=True)
    return path


def images(folder: Path) -> dict[str, Path]:
    picture, made = Image.fromarray(frames()[0]), {}
    for number, (name, (extension, write)) in enumerate(IMAGES.items()):
        made[name] = folder / f"picture-{number}.{extension}"
        write(picture, made[name])
    return made


def broken(folder: Path, whole: Path) -> dict[str, tuple[str, Path]]:
    """By name, the modality that a file is sent as and the file; `whole` is an H.264 file with its index last."""
    data, picture = whole.read_bytes(), io.BytesIO()
    Image.fromarray(frames()[0]).save(picture, "PNG")
    png = picture.getvalue()
    index, media = data.index(b"moov") - 4, data.index(b"mdat") - 4
    noise = np.random.default_rng(0).bytes(4000)
    sizeless, huge = (_png_of(width, height) for width, height in ((0, 0), (2**31 - 1, 2**31 - 1)))
    files = {
        "video of no bytes": ("mp4", b""),
        "text as mp4": ("mp4", b"this is no video\n" * 90),
        "page of a web server as mp4": ("mp4", b"<!DOCTYPE html><title>404</title>" * 9),
        "noise as mp4": ("mp4", noise),
        "noise as webm": ("webm", b"\x1aE\xdf\xa3" + noise),
        "mp4 cut in half": ("mp4", data[: len(data) // 2]),
        "mp4 without its index": ("mp4", data[:index]),
        "mp4 of its first bytes": ("mp4", data[:media]),
        "mp4 of its index alone": ("mp4", data[index:]),
        "index that is noise": ("mp4", data[: index + 8] + noise),
        "gif of its first bytes": ("gif", b"GIF89a\x10\x00\x10\x00"),
        "image of no bytes": ("png", b""),
        "text as png": ("png", b"this is no image\n" * 9),
        "noise as jpeg": ("jpg", b"\xff\xd8\xff\xe0" + noise),
        "png of its first bytes": ("png", png[:20]),
        "png that is 0 x 0": ("png", sizeless),
        "png that says it is huge": ("png", huge),
        "drawing as png": ("png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
    }
    made = {}
    for number, (name, (extension, content)) in enumerate(files.items()):
        path = folder / f"broken-{number}.{extension}"
        path.write_bytes(content)
        made[name] = ("image" if extension in {"png", "jpg"} else "video", path)
    sound = folder / "sound.mp4"
    tone = ("ffmpeg", "-v", "error", "-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", str(sound))
    subprocess.run(tone, check=True)
    made["sound alone"] = ("video", sound)
    made["file that is not there"] = ("video", folder / "nothing.mp4")
    assert set(made) == set(BROKEN)
    return made


def damaged(folder: Path, whole: Path) -> dict[str, tuple[str, Path]]:
    """Files of which a decoder may still make something: as `broken`."""
    data, picture = bytearray(whole.read_bytes()), io.BytesIO()
    Image.fromarray(frames()[0]).save(picture, "JPEG")
    jpeg = picture.getvalue()
    media, index = data.index(b"mdat") + 4, data.index(b"moov") - 4
    middle = (media + index) // 2
    files = {
        "frames of zeros": ("mp4", data[:media] + bytes(index - media) + data[index:]),
        "one bad frame": ("mp4", data[:middle] + b"\xff" * 40 + data[middle + 40 :]),
        "width that is not the stream's": ("mp4", data.replace(struct.pack(">HH", WIDTH, HEIGHT), b"\xff\xff\xff\xff")),
        "jpeg cut in half": ("jpg", jpeg[: len(jpeg) // 2]),
        "mp4 named webm": ("webm", data),
        "jpeg named png": ("png", jpeg),
        "jpeg as video": ("mp4", jpeg),
    }
    made = {}
    for number, (name, (extension, content)) in enumerate(files.items()):
        path = folder / f"damaged-{number}.{extension}"
        path.write_bytes(content)
        made[name] = ("image" if extension in {"png", "jpg"} else "video", path)
    assert set(made) == set(DAMAGED)
    return made


def _png_of(width: int, height: int) -> bytes:
    """A PNG whose header says a size, with no pixels behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
