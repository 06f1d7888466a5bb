"""Geometry of a request: items from what SGLang's processors leave behind.

The only place that knows how families lay out tokens. The result is the same for all: items of (modality, inclusive
spans, frame grid after merging or None). A span without a grid is still a media run, only without places in it.

======================  =============================================  ================================================
family                  spans                                          frame grid
======================  =============================================  ================================================
Qwen2-VL, Qwen2.5-VL,   one per image or video, several in one item    a ``*_grid_thw`` row for each of them
Qwen-Omni
Qwen3-VL, GLM-4.1V/4.5  one per temporal frame, timestamps between     one row per video, as many spans as its frames
Kimi-VL                 one per image                                  ``image_grid_hws`` or ``grid_thws``
any of these, encoder   as above, or an item per frame                 no key: from the M-RoPE coordinates
apart (EPD)
InternVL                video: one per frame, all videos in one item;  squares of tokens, their side from the
                        image: one of several tiles                    configuration
LLaVA-OneVision         none: ``image_offsets``, ``image_pad_len``     squares, unless an image is cut into tiles
LongVILA, NVILA and     one per frame, clip or video                   :data:`SPAN_GRIDS`, in tokens
others of this package
======================  =============================================  ================================================

Where none of this is there, or it does not match the spans, the span is opaque. Frames that come as spans of their own
are one clip where they have the same grid and little text between them. Spans without a grid are one where our own
processors number them and nothing is between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mminference_sgl.method.items import AUDIO, IMAGE, VIDEO, Grid, Item, Spans

_MODALITIES = {"IMAGE": IMAGE, "MULTI_IMAGES": IMAGE, "VIDEO": VIDEO, "AUDIO": AUDIO}
_GRID_KEYS = ("video_grid_thw", "image_grid_thw", "grid_thws", "image_grid_hws")
_LLAVA_POOLS_BEYOND = 16
"""Images of one request beyond which LLaVA reserves the tokens of pooled frames for each."""
SPAN_GRIDS, SPAN_FRAMES = "mminference_span_grids", "mminference_span_frames"
"""What this package's own processors say of each span: (frames, rows, columns) in tokens, and its first frame's number
in the clip. A span whose tokens have no places has None instead of a grid, and its own number among those of its video.
"""
SPAN_TAILS = "mminference_span_tails"
"""How many tokens at the end of each span lie outside its grid, as a newline behind a frame; none without this key."""
MAX_FRAME_GAP = 64
"""Most text tokens between two spans that are frames of one clip."""


class GeometryError(ValueError):
    """A request whose media cannot be laid out; it runs dense."""


@dataclass(frozen=True)
class ModelGeometry:
    """What of a model's configuration the geometry needs.

    ``merge``: side of the square of patches per token. ``square``: side of the square of tokens that a tile or frame is
    in models that record no grid, 0 where there is none; a span may hold several.
    """

    merge: int = 2
    square: int = 0

    @classmethod
    def of(cls, hf_config: object) -> ModelGeometry:
        """Reads the vision configuration, also where a thinker holds it."""
        for holder in (hf_config, getattr(hf_config, "thinker_config", None)):
            vision = getattr(holder, "vision_config", None)
            merge = getattr(vision, "spatial_merge_size", None)
            if isinstance(merge, int) and merge > 0:
                return cls(merge)
        vision = getattr(hf_config, "vision_config", None)
        image = _side(getattr(hf_config, "force_image_size", None)) or _side(getattr(vision, "image_size", None))
        patch = _side(getattr(vision, "patch_size", None))
        if not image or not patch:
            return cls()
        ratio = getattr(hf_config, "downsample_ratio", None)
        if isinstance(ratio, int | float) and 0 < ratio <= 1:
            return cls(square=int(image // patch * ratio))
        return cls()


@dataclass(frozen=True)
class _Piece:
    """An item in the making; ``frame``: one frame of a video, which may go on in the next piece.

    ``number``: of its first frame in its clip, or of a span without a grid in its video; None where not recorded.
    """

    modality: int
    spans: Spans
    grid: Grid | None
    frame: bool = False
    number: int | None = None


def items_of(mm_inputs: Any, geometry: ModelGeometry) -> list[Item]:
    """Items of a request, from SGLang's ``MultimodalInputs``.

    Raises:
        GeometryError: the spans cannot be known (pruned prompts), there are none, or they cannot be read.
    """
    positions = getattr(mm_inputs, "mrope_positions", None)
    pieces: list[_Piece] = []
    for number, item in enumerate(mm_inputs.mm_items):
        modality = _MODALITIES.get(getattr(item.modality, "name", str(item.modality)))
        if modality is None:
            raise GeometryError(f"item {number}: unknown modality {item.modality!r}")
        data = item.model_specific_data or {}
        if "pre_chunked_input_ids" in data:
            raise GeometryError(f"item {number}: its tokens are pruned, so its spans are not known")
        try:
            reserved = item.offsets is None
            offsets = _reserved(mm_inputs, number) if reserved else item.offsets
            spans = [(int(start), int(end)) for start, end in offsets]
            own = _own(data, len(spans))
            grids = _grids(data, geometry)
        except (TypeError, ValueError, OverflowError, IndexError, RuntimeError) as error:
            raise GeometryError(f"item {number}: offsets or grid cannot be read: {error}") from None
        if not spans:
            raise GeometryError(f"item {number}: no token spans")
        if own:
            pieces.extend(
                _Piece(modality, [(start, end - tail)], grid, number=number)
                for (start, end), (grid, number, tail) in zip(spans, own, strict=True)
            )
        elif grids:
            pieces.extend(_by_grid_key(modality, spans, grids, positions))
        elif reserved:
            pieces.extend(_reserved_square(modality, span, data, len(mm_inputs.mm_items)) for span in spans)
        else:
            for span in spans:
                pieces.extend(_without_key(modality, span, positions, geometry))
    return [(piece.modality, piece.spans, piece.grid) for piece in _clips(pieces)]


# -- spans and grids as the processors leave them ----------------------------------------------------------------------


def _reserved(mm_inputs: Any, number: int) -> Spans:
    """Spans of LLaVA's item ``number``: an image each, whose tokens the model itself reserved in the prompt."""
    starts, lengths = (getattr(mm_inputs, name, None) for name in ("image_offsets", "image_pad_len"))
    if not starts or not lengths:
        return []
    if not len(starts) == len(lengths) == len(mm_inputs.mm_items):
        raise ValueError(f"{len(starts)} offsets and {len(lengths)} lengths for {len(mm_inputs.mm_items)} items")
    start = int(starts[number])
    return [(start, start + int(lengths[number]) - 1)]


def _own(data: Any, spans: int) -> list[tuple[Grid | None, int, int]]:
    """Grid, number and tail of each span, where this package's processors said so."""
    grids, numbers = data.get(SPAN_GRIDS), data.get(SPAN_FRAMES)
    if grids is None:
        return []
    tails = data.get(SPAN_TAILS, [0] * spans)
    if not len(grids) == len(numbers) == len(tails) == spans:
        raise ValueError(f"{len(grids)} grids, {len(numbers)} frame numbers and {len(tails)} tails for {spans} spans")
    rows = zip(grids, numbers, tails, strict=True)
    return [(grid and _grid(grid), int(number), int(tail)) for grid, number, tail in rows]


def _grid(sizes: Any) -> Grid:
    t, h, w = sizes
    return int(t), int(h), int(w)


def _grids(data: Any, geometry: ModelGeometry) -> list[Grid]:
    """Frame grids after merging, from whichever key the processor left; none if it left none."""
    for key in _GRID_KEYS:
        rows = data.get(key)
        if rows is None:
            continue
        rows = torch.as_tensor(rows)
        if rows.device.type != "cpu":
            raise GeometryError(f"{key} is on {rows.device}; reading it would wait for the device")
        rows = rows.reshape(-1, rows.shape[-1]).tolist()
        full = [(1, *row) if len(row) == 2 else tuple(row) for row in rows]
        return [(int(t), int(h) // geometry.merge, int(w) // geometry.merge) for t, h, w in full]
    return []


def _side(size: Any) -> int:
    """A size that configurations give as a number or as a list of two; 0 if it is neither."""
    if isinstance(size, list | tuple) and size:
        size = size[0]
    return size if isinstance(size, int) and size > 0 else 0


# -- where the places come from ----------------------------------------------------------------------------------------


def _by_grid_key(modality: int, spans: Spans, grids: list[Grid], positions: Any) -> Iterator[_Piece]:
    """One processor item to items of one image or clip each: one span per grid, or one span per frame.

    A grid that matches neither, where M-RoPE does not know better, is handed on with all spans: the planner refuses it
    and names the numbers.
    """
    lengths = [_length(span) for span in spans]
    if len(spans) == len(grids) and all(n == t * h * w for n, (t, h, w) in zip(lengths, grids, strict=True)):
        yield from (_Piece(modality, [span], grid) for span, grid in zip(spans, grids, strict=True))
        return
    frames = [(h, w) for t, h, w in grids for _ in range(min(t, len(spans) + 1))]
    if len(spans) == len(frames) and all(n == h * w for n, (h, w) in zip(lengths, frames, strict=True)):
        first = 0
        for grid in grids:
            yield _Piece(modality, spans[first : first + grid[0]], grid)
            first += grid[0]
        return
    rasters = [_raster(positions, span) for span in spans]
    if all(raster is not None for raster in rasters):
        yield from (_of_raster(modality, span, raster) for span, raster in zip(spans, rasters, strict=True))
    else:
        yield _Piece(modality, spans, (sum(t for t, _, _ in grids), *grids[0][1:]))


def _without_key(modality: int, span: tuple[int, int], positions: Any, geometry: ModelGeometry) -> Iterator[_Piece]:
    """One span of a request without grid keys: by its M-RoPE coordinates, by the model's square, or opaque."""
    raster = _raster(positions, span) if modality != AUDIO else None
    area = geometry.square**2
    tiles, rest = divmod(_length(span), area) if area else (0, 1)
    if raster is not None:
        yield _of_raster(modality, span, raster)
    elif modality == AUDIO or tiles < 1 or rest:
        yield _Piece(modality, [span], None)
    elif modality == VIDEO:
        # The tiles of a frame lie below one another: their rasters follow each other.
        yield _Piece(VIDEO, [span], (1, tiles * geometry.square, geometry.square), frame=True)
    else:
        # How the tiles of an image lie to each other is not recorded, so each is a plane of its own.
        starts = range(span[0], span[1] + 1, area)
        plane = (1, geometry.square, geometry.square)
        yield from (_Piece(modality, [(start, start + area - 1)], plane) for start in starts)


def _reserved_square(modality: int, span: tuple[int, int], data: Any, images: int) -> _Piece:
    """An image or frame of LLaVA: a square unless the image is cut into tiles.

    Up to 16 frames it reserves a whole image's tokens for each, and writes pooled features to a part of them; beyond 16
    images it reserves pooled ones, and writes a part of the whole.
    """
    tiled = "anyres" in str(data.get("image_aspect_ratio"))
    pooled = images > _LLAVA_POOLS_BEYOND
    side = math.isqrt(max(0, _length(span)))
    if tiled or pooled != (modality == VIDEO) or side < 1 or side * side != _length(span):
        return _Piece(modality, [span], None)
    return _Piece(modality, [span], (1, side, side), frame=modality == VIDEO)


def _of_raster(modality: int, span: tuple[int, int], raster: Grid | None) -> _Piece:
    return _Piece(modality, [span], raster, frame=raster is not None and modality == VIDEO and raster[0] == 1)


def _raster(positions: Any, span: tuple[int, int]) -> Grid | None:
    """Frame grid of a span by its M-RoPE coordinates; None unless they are rows by columns, frame after frame.

    The first coordinate is no frame index: it may stand still, jump, or start anew with every frame.
    """
    start, end = span
    known = isinstance(positions, torch.Tensor) and positions.device.type == "cpu" and positions.dim() == 2
    if not known or positions.shape[0] != 3 or not 0 <= start <= end < positions.shape[1]:
        return None
    y, x = (line - line.min() for line in positions[1:, start : end + 1])
    rows, columns = int(y.max()) + 1, int(x.max()) + 1
    frames = int(((y == 0) & (x == 0)).sum())
    if frames * rows * columns != y.numel() or frames == y.numel() > 1:
        return None  # in the second case no token has a place of its own
    place = torch.arange(y.numel())
    matches = torch.equal(y, place // columns % rows) and torch.equal(x, place % columns)
    return (frames, rows, columns) if matches else None


# -- frames to clips ---------------------------------------------------------------------------------------------------


def _clips(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Frames that follow each other in the prompt, alike and with little text between, as one piece."""
    clips: list[list[int]] = []
    for number in sorted(range(len(pieces)), key=lambda number: pieces[number].spans[0]):
        if clips and _continues(pieces[clips[-1][-1]], pieces[number]):
            clips[-1].append(number)
        else:
            clips.append([number])
    clips.sort(key=min)
    return [_joined([pieces[number] for number in numbers]) for numbers in clips]


def _continues(frame: _Piece, following: _Piece) -> bool:
    gap = following.spans[0][0] - frame.spans[-1][1] - 1
    if frame.modality != following.modality:
        return False
    if frame.grid is None or following.grid is None:
        numbered = frame.number is not None and frame.number + 1 == following.number
        return numbered and frame.grid is following.grid and gap == 0
    if frame.number is not None:
        return frame.grid[1:] == following.grid[1:] and frame.number + frame.grid[0] == following.number
    return frame.frame and following.frame and frame.grid == following.grid and 0 <= gap <= MAX_FRAME_GAP


def _joined(frames: Sequence[_Piece]) -> _Piece:
    first = frames[0]
    if len(frames) == 1:
        return first
    if first.grid is None:
        return _Piece(first.modality, [(first.spans[0][0], frames[-1].spans[-1][1])], None)
    spans = [span for frame in frames for span in frame.spans]
    return _Piece(first.modality, spans, (sum(piece.grid[0] for piece in frames if piece.grid), *first.grid[1:]))


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0] + 1
