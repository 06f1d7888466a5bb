"""The planner: segments, token orders and query tiles of multimodal requests (Rust).

All arrays are one-dimensional, C-contiguous and lent without a copy. Those of a `Layout` are shared
with it and with every other caller: treat them as read-only. The GIL is released during the work.

Token kinds are 0 (text outside every item's extent: the rows that decide), 1 (a token of an item)
and 2 (interstitial: text strictly between the first and the last span of one item, such as
timestamps).
"""

from collections.abc import Sequence
from typing import Literal, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layout", "LayoutError", "Plan", "__version__", "plan"]

__version__: str

_Order = Literal["sequence", "modality", "cell"]

class LayoutError(ValueError):
    """A layout or plan that cannot be made; the message names the item or request."""

@final
class Layout:
    """Segments, token orders and key tiles of one request; immutable, made once per request."""

    def __new__(
        cls,
        length: int,
        items: Sequence[tuple[int, Sequence[tuple[int, int]], tuple[int, int, int] | None]],
        *,
        chunk_tokens: int,
        tile_queries: int,
        cell_size: int = 0,
    ) -> Layout:
        """Lay out a sequence of `length` tokens.

        `items`, in any order: (modality, spans, grid) with modality 1 image, 2 video or 3 audio,
        spans as inclusive (start, end) token positions, in any order and with text between them,
        and grid as (frames, rows, cols) after merging, or None. `chunk_tokens` is the size of a
        prefill chunk (0: no chunks) and `tile_queries` the rows of a query tile; from them follows
        the size of an item's cells unless `cell_size` is given.

        Raises LayoutError for a length outside 1..2**31 - 1, more than 2**20 items, and spans that
        are missing, reversed, out of range or overlapping; for a grid with a dimension below 1 or
        whose product is not the number of span tokens; and for sizes below their minimum.
        """

    @property
    def length(self) -> int:
        """Tokens of the sequence."""

    @property
    def num_items(self) -> int:
        """Number of items."""

    @property
    def num_cells(self) -> int:
        """Runs of items in cell order: an item's cells, or one for an item without a grid."""

    @property
    def max_frame_stride(self) -> int:
        """Largest `frame_stride` of an item, 0 without an item that has a grid."""

    def frame_stride(self, item: int) -> int:
        """Largest distance between the first tokens of consecutive frames of item `item`.

        rows * cols for a single frame, 0 without a grid. Raises LayoutError for an unknown item.
        """

    def cell_size(self, item: int) -> int:
        """Spatial positions in a cell of item `item`, 0 without a grid. LayoutError if unknown."""

    def segments(
        self,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8], NDArray[np.int32]]:
        """(start, length, modality, item), each [segments]; item indexes the list given, -1 text.

        Segments are maximal, ascend, and partition [0, length).
        """

    def segment_kinds(self) -> NDArray[np.uint8]:
        """Kind of each segment's tokens, [segments]."""

    def kinds(self) -> NDArray[np.uint8]:
        """Kind of every token, [length]."""

    def order(self, name: _Order) -> NDArray[np.int32]:
        """Token position at each order position, [length]. LayoutError for an unknown name.

        Computed at the first call, then kept; so is the inverse.

        `sequence` is the identity; `modality` is text, image, video, audio, ascending in each;
        `cell` is all text, ascending, then the items by first token, each by (cell, frame, position
        in cell).
        """

    def inverse(self, name: _Order) -> NDArray[np.int32]:
        """Order position of each token position, [length]. LayoutError for an unknown name."""

    def runs(self, name: _Order) -> NDArray[np.int32]:
        """Offsets of the runs in the order, [runs + 1]. LayoutError for an unknown name.

        Token positions ascend strictly inside a run. `sequence` has one run, `modality` four (one
        per modality, maybe empty), `cell` one of text (maybe empty) and `num_cells` more.
        """

    def run_items(self) -> NDArray[np.int32]:
        """Item of each run of cell order, [num_cells + 1]; the first one is the text run, -1."""

    def key_tiles(self, name: _Order, tile_keys: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uint8]]:
        """(min_pos, max_pos, modality_mask) per tile of `tile_keys` order positions, each [tiles].

        Smallest and largest token position of a tile, and bit m set if it holds a token of modality
        m. The last tile may be short. Computed at the first call, then kept. LayoutError for an
        unknown name or size.
        """

    def key_tile_of_token(self, name: _Order, tile_keys: int) -> NDArray[np.int32]:
        """Key tile of each token position, [length]: `inverse(name) // tile_keys`.

        Computed at the first call, then kept. LayoutError for an unknown name or size.
        """

@final
class Plan:
    """Query tiles of one forward, as int32 arrays in one packed buffer. Made by `plan`.

    Fields of both passes, `seq.` and `cell.`; S row slots, T tiles:

    - `rows` [S]: row of the batch; `positions` [S]: token position in the request
    - `row_indptr` [T + 1]: slots of each tile
    - `tile_request` [T]: index in the list given to `plan`
    - `tile_kind` [T]: kind of the tile's rows; in `seq` 1 stands for kinds 1 and 2 together
    - `tile_min_pos`, `tile_max_pos` [T]: bounds of the tile's token positions
    - `cell.own_lo`, `cell.own_hi` [T]: key tiles [lo, hi) in cell order that cover the whole runs
      its rows belong to, also where they go on after the chunk; cells without a row in the chunk
      may lie between

    `seq` holds every row once: per request first kinds 1 and 2, ascending, then kind 0, ascending.
    `cell` holds every row of kinds 1 and 2 once: per request kind 2, ascending, then per item tiles
    of whole cells; a cell of more than `tile_queries` rows has tiles of its own.
    """

    @property
    def buffer(self) -> NDArray[np.int32]:
        """The packed buffer; fields start at multiples of 16 elements, gaps are zero."""

    def fields(self) -> dict[str, tuple[int, int]]:
        """(offset, length) in `buffer` of each field, by name such as `seq.rows`."""

def plan(requests: Sequence[tuple[Layout, int, int, int]], *, tile_queries: int, tile_keys: int) -> Plan:
    """Plan a forward from (layout, prefix length, chunk length, row offset) per request.

    The row offset is the batch row of the chunk's first token. The cost grows with the chunks, not
    with the prefixes. Raises LayoutError for an empty chunk, a chunk that ends behind its layout,
    rows beyond int32 and tile sizes below 1.
    """
