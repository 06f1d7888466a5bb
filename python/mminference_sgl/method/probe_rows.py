"""Which rows of a chunk are probed for those of one request and one modality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEAST_OF_HEAD = 32
"""Probe rows that a head has at least where heads take turns."""
FEWEST_SEARCHED = 512
"""Rows of a chunk, if it has as many, that the offline search probes at least: heads are compared by what they say."""

_GOLDEN = (5**0.5 - 1) / 2
"""Its multiples spread evenly over the unit interval, whatever their number."""

Int32Array = npt.NDArray[np.int32]


def rows_to_probe(chunk: int, one_in: int = 0) -> int:
    """Probe rows of a chunk: one in 128, which is 0.8 % of dense attention; 64 of chunks
    below 8K tokens, one in 32 below 2K, at least 16.

    ``one_in``: one in so many instead, at least :data:`FEWEST_SEARCHED`; 0 for what serving can afford.
    """
    if one_in:
        return max(FEWEST_SEARCHED, chunk // one_in)
    return max(16, min(64, chunk // 32), chunk // 128)


def turns_of(rows: int, sharing: int) -> int:
    """Heads, of so many that may share a list, among which the probe rows are divided: a power of two.

    What the heads read together needs all rows, to find those that read everything; what one of them reads it shows
    with :data:`LEAST_OF_HEAD`.
    """
    return 1 << (max(1, min(sharing, rows // LEAST_OF_HEAD)).bit_length() - 1)


@dataclass(frozen=True)
class ChosenRows:
    """Probe rows on the host: batch rows and positions, see :class:`.probe.ProbeRows`.

    ``near_slots``, ``far_slots``: their row slots in the two passes, which are the same whatever the query tiles' size;
    none of the latter without a cell pass. ``band_slots``: first row slot of each band, ascending. ``turns``: heads
    among which the rows are divided.
    """

    rows: Int32Array
    positions: Int32Array
    near_slots: npt.NDArray[np.int64]
    far_slots: npt.NDArray[np.int64]
    band_slots: npt.NDArray[np.int64]
    turns: int

    def bands_at(self, slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The bands of row slots of the cell pass."""
        return np.searchsorted(self.band_slots, slots, side="right") - 1


def choose(on_host: Callable[[str], Int32Array], near: slice, far: slice, count: int, turns: int) -> ChosenRows:
    """Chooses the rows to probe: for media spread over the chunk's places and times, for text over its length.

    Rows of text lie at another place of each of as many equal parts, the last row of all among them: the last rows
    alone stand for nothing but themselves. Media: the cell pass is cut into as many bands of consecutive query tiles as
    rows are wanted. The rows that stand for a band are taken from all its rows alike, at another moment in each band:
    what the probe rows hold on average is then what the chunk's rows hold.
    """
    tiles = far.stop - far.start
    near_indptr = on_host("seq.row_indptr")
    first, end = int(near_indptr[near.start]), int(near_indptr[near.stop])
    if tiles == 0:
        count = min(count, end - first)
        bounds = first + np.arange(count + 1) * (end - first) // count
        place = np.arange(count) * _GOLDEN % 1
        slots = bounds[:-1] + (place * np.diff(bounds)).astype(np.int64)
        turns = min(turns, count)
        # Every head sees the last row.
        slots[count - turns :] = end - 1
        slots = _in_turns(slots, turns)
        nothing = np.zeros(0, dtype=np.int64)
        rows, positions = on_host("seq.rows")[slots], on_host("seq.positions")[slots]
        return ChosenRows(rows, positions, slots, nothing, nothing, turns)
    num_bands = min(count, tiles)
    starts = far.start + np.searchsorted(np.arange(tiles) * num_bands // tiles, np.arange(num_bands + 1))
    indptr = on_host("cell.row_indptr").astype(np.int64)
    sizes = np.diff(indptr[starts])
    lane, band = np.divmod(np.arange(count // num_bands * num_bands), num_bands)
    moment = (lane + np.arange(1, num_bands + 1)[band] * _GOLDEN % 1) / (count // num_bands)
    slots = np.unique(indptr[starts[band]] + np.minimum(moment * sizes[band], sizes[band] - 1).astype(np.int64))
    slots = _in_turns(slots, turns)
    rows, positions = on_host("cell.rows")[slots], on_host("cell.positions")[slots]
    # Row slots ascend in the sequence pass, so a position finds its slot.
    near_slots = first + np.searchsorted(on_host("seq.positions")[first:end], positions)
    return ChosenRows(rows, positions, near_slots, slots, indptr[starts[:-1]], turns)


def _in_turns(slots: npt.NDArray[np.int64], turns: int) -> npt.NDArray[np.int64]:
    """As many for every turn: the last slot is in more of them where the number does not divide."""
    return np.append(slots, np.repeat(slots[-1:], -len(slots) % turns))
