"""Geometry of a request from what SGLang's processors leave behind, and the cache of layouts.

Families differ in where spans and frame grids are found; this file is the only place that knows. The result is the
same for all: items of (modality, inclusive spans, frame grid after merging or None). A span without a grid is still a
media run, only without places in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mminference_sgl import _core
from mminference_sgl.plan import DeviceLayout

IMAGE, VIDEO, AUDIO = 1, 2, 3
_MODALITIES = {"IMAGE": IMAGE, "MULTI_IMAGES": IMAGE, "VIDEO": VIDEO, "AUDIO": AUDIO}
_GRID_KEYS = ("video_grid_thw", "image_grid_thw", "grid_thws", "image_grid_hws")

Spans = list[tuple[int, int]]
Grid = tuple[int, int, int]
Item = tuple[int, Spans, Grid | None]


class GeometryError(ValueError):
    """A request whose media cannot be laid out; it runs dense."""


@dataclass(frozen=True)
class ModelGeometry:
    """What of a model's configuration the geometry needs: ``merge``, the side of the square of patches per token."""

    merge: int = 2

    @classmethod
    def of(cls, hf_config: object) -> ModelGeometry:
        """Reads the vision configuration, also where a thinker holds it."""
        for holder in (hf_config, getattr(hf_config, "thinker_config", None)):
            vision = getattr(holder, "vision_config", None)
            merge = getattr(vision, "spatial_merge_size", None)
            if isinstance(merge, int) and merge > 0:
                return cls(merge)
        return cls()


def items_of(mm_inputs: Any, geometry: ModelGeometry) -> list[Item]:
    """Items of a request, from SGLang's ``MultimodalInputs``.

    Raises:
        GeometryError: the spans cannot be known (pruned prompts), there are none, or they cannot be read.
    """
    items: list[Item] = []
    for number, item in enumerate(mm_inputs.mm_items):
        modality = _MODALITIES.get(getattr(item.modality, "name", str(item.modality)))
        if modality is None:
            raise GeometryError(f"item {number}: unknown modality {item.modality!r}")
        data = item.model_specific_data or {}
        if "pre_chunked_input_ids" in data:
            raise GeometryError(f"item {number}: its tokens are pruned, so its spans are not known")
        try:
            spans = [(int(start), int(end)) for start, end in item.offsets or ()]
            grids = _grids(data, geometry)
        except (TypeError, ValueError, OverflowError, IndexError, RuntimeError) as error:
            raise GeometryError(f"item {number}: offsets or grid cannot be read: {error}") from None
        if not spans:
            raise GeometryError(f"item {number}: no token spans")
        items.extend(_split(modality, spans, grids))
    return items


def request_length(mm_inputs: Any, items: Sequence[Item], seen: int) -> int:
    """Tokens of a request as far as known, so that its layout stays the same from chunk to chunk.

    ``seen``: tokens up to the end of the current chunk. Models with M-RoPE carry a position for every prompt token.
    """
    last = max((end for _, spans, _ in items for _, end in spans), default=-1)
    return max(_prompt_length(mm_inputs), seen, last + 1)


class LayoutCache:
    """Layouts by request, kept on the life of SGLang's ``MultimodalInputs`` object and freed with it.

    Sessions append items to a request, and models without M-RoPE reveal its length chunk by chunk: a layout is made
    anew when either grows.
    """

    def __init__(
        self, geometry: ModelGeometry, *, chunk_tokens: int, tile_queries: int, tile_keys: int, cell_size: int
    ):
        self._geometry = geometry
        self._sizes = {"chunk_tokens": chunk_tokens, "tile_queries": tile_queries, "cell_size": cell_size}
        self._tile_keys = tile_keys
        self._layouts: dict[int, tuple[tuple[int, int], DeviceLayout]] = {}

    def __len__(self) -> int:
        return len(self._layouts)

    def get(self, mm_inputs: Any, seen: int, device: torch.device) -> DeviceLayout:
        """The layout of a request that has ``seen`` tokens by the end of this chunk; ``mm_inputs`` None: text only.

        Raises:
            GeometryError: see :func:`items_of`, and numbers that no integer of the planner holds.
            _core.LayoutError: spans overlap, leave the request, or do not match their grid.
        """
        if mm_inputs is None or not mm_inputs.mm_items:
            return self._build(seen, [], device)
        identity, key = id(mm_inputs), (len(mm_inputs.mm_items), _prompt_length(mm_inputs))
        cached = self._layouts.get(identity)
        if cached is not None and cached[0] == key and seen <= cached[1].layout.length:
            return cached[1]
        items = items_of(mm_inputs, self._geometry)
        layout = self._build(request_length(mm_inputs, items, seen), items, device)
        if cached is None:
            weakref.finalize(mm_inputs, self._layouts.pop, identity, None)
        self._layouts[identity] = (key, layout)
        return layout

    def _build(self, length: int, items: list[Item], device: torch.device) -> DeviceLayout:
        try:
            layout = _core.Layout(length, items, **self._sizes)
        except OverflowError as error:
            raise GeometryError(f"spans or grids are beyond any request: {error}") from None
        return DeviceLayout(layout, self._tile_keys, device)


def _prompt_length(mm_inputs: Any) -> int:
    """Tokens of the prompt where M-RoPE positions tell, 0 elsewhere."""
    positions = getattr(mm_inputs, "mrope_positions", None)
    return int(positions.shape[-1]) if isinstance(positions, torch.Tensor) else 0


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


def _split(modality: int, spans: Spans, grids: list[Grid]) -> list[Item]:
    """One processor item to items of one image or clip each: one span per grid, or one span per frame.

    A grid that matches neither is handed on with all spans: the planner refuses it and names the numbers.
    """
    lengths = [end - start + 1 for start, end in spans]
    if not grids:
        return [(modality, [span], None) for span in spans]
    if len(spans) == len(grids) and all(n == t * h * w for n, (t, h, w) in zip(lengths, grids, strict=True)):
        return [(modality, [span], grid) for span, grid in zip(spans, grids, strict=True)]
    if len(spans) == sum(t for t, _, _ in grids):
        items: list[Item] = []
        first = 0
        for grid in grids:
            items.append((modality, spans[first : first + grid[0]], grid))
            first += grid[0]
        return items
    return [(modality, spans, (sum(t for t, _, _ in grids), *grids[0][1:]))]
