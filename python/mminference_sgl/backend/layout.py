"""Layouts of requests, made once per request and kept on its life."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from mminference_sgl import _core
from mminference_sgl.backend.geometry import GeometryError, ModelGeometry, items_of
from mminference_sgl.method.items import AUDIO, IMAGE, VIDEO, Item
from mminference_sgl.method.plan import DeviceLayout
from mminference_sgl.method.stride import StrideSearch

logger = logging.getLogger(__name__)
_NAMES = {IMAGE: "image", VIDEO: "video", AUDIO: "audio"}


def request_length(mm_inputs: Any, items: Sequence[Item], seen: int) -> int:
    """Tokens of a request as far as known, so that its layout stays the same from chunk to chunk.

    ``seen``: tokens up to the end of the current chunk. Models with M-RoPE carry a position for every prompt token.
    A prompt that SGLang has cut (``--allow-auto-truncate``), maybe inside a span, keeps the layout of the whole: no
    chunk ever asks for the tokens that are gone.
    """
    last = max((end for _, spans, _ in items for _, end in spans), default=-1)
    return max(_prompt_length(mm_inputs), seen, last + 1)


class LayoutCache:
    """Layouts by request, kept on the life of SGLang's ``MultimodalInputs`` object and freed with it.

    Sessions append items to a request, and models without M-RoPE reveal its length chunk by chunk: a layout is made
    anew when either grows, and when a stride was found in a run without a grid, which ``counters`` counts.
    ``frame_stride``: that of such runs where it is known, else 0.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        *,
        chunk_tokens: int,
        tile_queries: int,
        tile_keys: int,
        cell_size: int,
        frame_stride: int = 0,
        counters: Counter[str] | None = None,
    ):
        self._counters = Counter() if counters is None else counters
        self._geometry = geometry
        self._sizes = {"chunk_tokens": chunk_tokens, "tile_queries": tile_queries, "cell_size": cell_size}
        self._tile_keys, self._frame_stride = tile_keys, frame_stride
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
        search = cached[1].search if cached is not None else None
        found = search is not None and search.conclude(self._counters)
        if cached is not None and cached[0] == key and seen <= cached[1].layout.length and not found:
            return cached[1]
        items = items_of(mm_inputs, self._geometry)
        search = StrideSearch.of(items, search, self._frame_stride)
        if search is not None:
            items = search.applied(items)
        layout = self._build(request_length(mm_inputs, items, seen), items, device)
        layout.search = search
        if cached is None:
            weakref.finalize(mm_inputs, self._layouts.pop, identity, None)
        self._layouts[identity] = (key, layout)
        logger.debug("mminference layout tokens=%d items=%s", layout.layout.length, _Described(items))
        return layout

    def _build(self, length: int, items: list[Item], device: torch.device) -> DeviceLayout:
        try:
            layout = _core.Layout(length, items, **self._sizes)
        except OverflowError as error:
            raise GeometryError(f"spans or grids are beyond any request: {error}") from None
        return DeviceLayout(layout, self._tile_keys, device)


class _Described:
    """Items in words, put together only if somebody reads the log: ``image:1x3x4,video:12x8x16,audio:opaque``."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = sorted(items, key=lambda item: min(item[1]))

    def __str__(self) -> str:
        return ",".join(
            f"{_NAMES[modality]}:{'x'.join(map(str, grid)) if grid else 'opaque'}" for modality, _, grid in self._items
        )


def _prompt_length(mm_inputs: Any) -> int:
    """Tokens of the prompt where M-RoPE positions tell, 0 elsewhere."""
    positions = getattr(mm_inputs, "mrope_positions", None)
    return int(positions.shape[-1]) if isinstance(positions, torch.Tensor) else 0
