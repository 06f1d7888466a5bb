"""Planted attention: queries and keys of one layer whose attention map is known.

A score is a sum of feature products, one block of the head size per feature, so that a row's softmax has an exact known
top: the keys of its *relations*. A relation is a pair of labels, ``rows`` and ``keys``: row ``r`` reads key ``k <= r``
when the two are equal. Every row scales its features so that each relation holds the wanted share of its mass, whatever
the number of keys before it, and about ``BACKGROUND`` is left for everything else:

- *sink*: the first tokens;
- *slash*: same place (or same 2 x 2 patch), all frames of the item so far;
- *vlines*: some places that all rows see;
- *hlines*: rows at some places have no features at all and read every key alike;
- *window*: the block of tokens before the row's own, and with no slash in the mix the row's own too;
- *diagonal*: a block of tokens at a fixed distance behind the row;
- *columns*: spans of media tokens that stand out;
- *text*: all tokens outside of frames.

Keys belong to one relation: a sink, a v-line, a column has neither place nor block, otherwise products of shares would
gather a row's mass on the few keys that have both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

HEAD_DIM = 128
BACKGROUND = 0.015
"""Share of a row's mass outside of the planted map, before cross-talk of the codes."""
NOISE = 0.5
"""Standard deviation of the random part of a score."""

_PRIME = 29
_CODE_DIM = 2 * _PRIME
_BIASES = ("sink", "vlines", "columns", "text")
_NOISE_DIM = HEAD_DIM - 2 * _CODE_DIM - len(_BIASES)
_SINK_TOKENS = 4
_NOBODY = -1

Ints = npt.NDArray[np.int64]
Item = tuple[int, list[tuple[int, int]], tuple[int, int, int] | None]
IMAGE, VIDEO = 1, 2


@dataclass(frozen=True)
class Geometry:
    """Frames of a model family: ``rows`` x ``cols`` tokens, ``gap(frame)`` tokens of text before each of them."""

    name: str
    rows: int
    cols: int
    gap: Callable[[int], int] = lambda _: 0

    @property
    def area(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.cols


def _timestamp(frame: int) -> int:
    """Tokens of a timestamp such as "<9.5 seconds>" with its markers: they grow with its digits."""
    return 5 + (frame >= 20) + (frame >= 200)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        # One newline token between frames, seen as text.
        Geometry("longvila", 16, 16, lambda frame: int(frame > 0)),
        # The newline column belongs to the grid.
        Geometry("llava-video", 13, 14),
        Geometry("videochat", 4, 4),
        Geometry("qwen2.5", 12, 20),
        Geometry("qwen3", 10, 16, _timestamp),
        Geometry("qwen3-plain", 10, 16),
    )
}


@dataclass(frozen=True)
class Scene:
    """Tokens of one request. ``items`` as the layout takes them; the arrays are [length].

    ``item``: index of the token's item; of the text between two of its frames too, else -1.
    ``place``: row * cols + col in the frame, -1 for text; ``cols``: of the item's grid, 1 for text.
    """

    length: int
    items: list[Item]
    item: Ints
    place: Ints
    cols: Ints

    @cached_property
    def media(self) -> npt.NDArray[np.bool_]:
        """Tokens of frames."""
        return self.place >= 0

    @cached_property
    def deciding(self) -> npt.NDArray[np.bool_]:
        """Text outside of every item."""
        return self.item < 0


def make_scene(parts: Sequence[int | tuple[Geometry, int]]) -> Scene:
    """Lays out ``parts`` one after the other: so many tokens of text, or so many frames of a geometry."""
    sizes = [_video_length(*part) if isinstance(part, tuple) else part for part in parts]
    length, at = sum(sizes), 0
    items: list[Item] = []
    item, place = np.full(length, _NOBODY), np.full(length, _NOBODY)
    cols = np.ones(length, dtype=np.int64)
    for part, size in zip(parts, sizes, strict=True):
        if isinstance(part, tuple):
            geometry, frames = part
            spans, start = [], at
            for frame in range(frames):
                start += geometry.gap(frame)
                place[start : start + geometry.area] = np.arange(geometry.area)
                spans.append((start, start + geometry.area - 1))
                start += geometry.area
            item[spans[0][0] : start] = len(items)
            cols[spans[0][0] : start] = geometry.cols
            if all(end + 1 == begin for (_, end), (begin, _) in pairwise(spans)):
                spans = [(spans[0][0], spans[-1][1])]
            items.append((VIDEO if frames > 1 else IMAGE, spans, (frames, geometry.rows, geometry.cols)))
        at += size
    return Scene(length, items, item, place, cols)


def one_video(geometry: Geometry, length: int, *, lead: int = 24, question: int = 48) -> Scene:
    """One video between a short text and a question, as many whole frames as ``length`` holds."""
    frames = 1
    while lead + _video_length(geometry, frames + 1) + question <= length:
        frames += 1
    return make_scene([lead, (geometry, frames), question])


def interleaved(geometry: Geometry, length: int) -> Scene:
    """Two videos, an image between them, and text around each; at most ``length`` tokens."""
    texts = (150, 120, 90, 64)
    frames = 3
    while sum(texts) + _video_length(geometry, frames + 1) <= length:
        frames += 1
    # A video's first gap may differ from the others, so one frame is left for that.
    first = frames // 2
    media = [(geometry, first), (geometry, 1), (geometry, max(1, frames - first - 2))]
    return make_scene([texts[0], *(part for pair in zip(media, texts[1:], strict=True) for part in pair)])


def _video_length(geometry: Geometry, frames: int) -> int:
    return frames * geometry.area + sum(geometry.gap(frame) for frame in range(frames))


@dataclass(frozen=True)
class Mix:
    """Shares of a row's mass by relation, in proportion; those without a key yet leave theirs to the others."""

    sink: float = 0.1
    slash: float = 0.0
    vlines: float = 0.0
    window: float = 0.0
    diagonal: float = 0.0
    columns: float = 0.0
    text: float = 0.0
    flat: bool = False
    """No features: the row reads every key alike."""

    def shares(self) -> dict[str, float]:
        """The relations with a share."""
        names = ("sink", "slash", "vlines", "window", "diagonal", "columns", "text")
        return {name: getattr(self, name) for name in names if getattr(self, name) > 0}


@dataclass(frozen=True)
class Plant:
    """What a head attends to: ``media`` for rows of items, ``question`` for text outside of them (None: the same).

    ``vline_places``, ``hline_places``: shares of the frame; ``patch``: side of the patch that counts as one place.
    """

    media: Mix
    question: Mix | None = None
    vline_places: float = 0.016
    hline_places: float = 0.0
    patch: int = 1


@dataclass(frozen=True)
class Relation:
    """Labels int64 [length] of rows and keys; -1 matches nothing."""

    name: str
    rows: Ints
    keys: Ints

    def counts(self) -> Ints:
        """Keys that each row reads."""
        length = self.rows.size
        keys = np.flatnonzero(self.keys >= 0)
        ranked = np.sort(self.keys[keys] * (length + 1) + keys)
        first = self.rows * (length + 1)
        counts = np.searchsorted(ranked, first + np.arange(length), "right") - np.searchsorted(ranked, first)
        return np.where(self.rows >= 0, counts, 0)

    def pairs(self, positions: Ints, keys: int) -> npt.NDArray[np.bool_]:
        """Whether rows at ``positions`` read the first ``keys`` keys: bool [positions, keys]."""
        rows = self.rows[positions, None]
        return (rows == self.keys[:keys]) & (rows >= 0) & (np.arange(keys) <= positions[:, None])


@dataclass(frozen=True)
class Head:
    """A planted head: its relations and the rows' strength of each feature, fp32 [length]."""

    plant: Plant
    relations: list[Relation]
    strength: dict[str, npt.NDArray[np.float32]] = field(repr=False)

    def planted(self, positions: Ints, keys: int) -> npt.NDArray[np.bool_]:
        """The planted map of some rows: bool [positions, keys]."""
        return np.logical_or.reduce([relation.pairs(positions, keys) for relation in self.relations])


@dataclass(frozen=True)
class Problem:
    """Operands of one layer, [length, heads, HEAD_DIM] each, and the map of every query head."""

    scene: Scene
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    heads: list[Head]
    hline: npt.NDArray[np.bool_]
    """Rows at places of h-lines, of any head."""

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return HEAD_DIM**-0.5


def codes() -> npt.NDArray[np.float32]:
    """Unit vectors [29 * 29, 58] with inner products of at most 1 / sqrt(29): chirps of a prime length, real parts."""
    slope, shift = np.divmod(np.arange(_PRIME**2)[:, None], _PRIME)
    n = np.arange(_PRIME)
    phase = 2 * np.pi / _PRIME * ((slope * n * n + shift * n) % _PRIME)
    return (np.concatenate([np.cos(phase), np.sin(phase)], axis=1) / np.sqrt(_PRIME)).astype(np.float32)


def _shuffled_codes(count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Codes in random order, so that those of neighbours have no relation, and zeros at -1: [count + 1, 58]."""
    if count > _PRIME**2:
        raise ValueError(f"{count} places or blocks, there are {_PRIME**2} codes")
    table = codes()[rng.permutation(_PRIME**2)[:count]]
    return np.vstack([table, np.zeros_like(table[:1])])


def plant(scene: Scene, plants: Sequence[Plant], *, heads: int, kv_heads: int, seed: int = 0) -> Problem:
    """Plants head ``h`` with ``plants[h % len(plants)]``; heads of a GQA group share their keys and so their places.

    Plants of one group therefore need the same ``patch`` and ``vline_places``.
    """
    # Places are drawn apart from what depends on the number of tokens: scenes of one geometry have the same.
    rng, places = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    length, group = scene.length, heads // kv_heads
    query = np.zeros((length, heads, HEAD_DIM), dtype=np.float32)
    key = np.zeros((length, kv_heads, HEAD_DIM), dtype=np.float32)
    value = rng.standard_normal((length, kv_heads, HEAD_DIM), dtype=np.float32)
    planted: list[Head] = []
    fraction = max(one.hline_places for one in plants)
    hline = _block_of_places(scene, fraction, places) if fraction else np.zeros(length, dtype=bool)
    for kv_head in range(kv_heads):
        own = [plants[head % len(plants)] for head in range(kv_head * group, (kv_head + 1) * group)]
        labels = _Labels(scene, own, places)
        _key_features(labels, key[:, kv_head], rng)
        # Values agree within a place and within a stretch of time, so that leaving keys out is neither free nor fatal.
        seen = labels.place + 1
        value[:, kv_head] += rng.standard_normal((seen.max() + 1, HEAD_DIM), dtype=np.float32)[seen]
        stretch = np.arange(length) // 1024
        value[:, kv_head] += rng.standard_normal((stretch[-1] + 1, HEAD_DIM), dtype=np.float32)[stretch]
        for offset, one in enumerate(own):
            head = _head(labels, one, hline if one.hline_places else np.zeros_like(hline))
            _query_features(labels, head, query[:, kv_head * group + offset], rng)
            planted.append(head)
    query *= np.float32(HEAD_DIM**0.5)
    return Problem(scene, *(torch.from_numpy(operand) for operand in (query, key, value)), planted, hline)


class _Labels:
    """Labels of the tokens as the keys of one KV head have them, int64 [length] each, -1 for none.

    ``row_place``, ``row_block`` are those of the same tokens as rows.
    """

    def __init__(self, scene: Scene, plants: Sequence[Plant], rng: np.random.Generator) -> None:
        self.scene = scene
        shares: dict[str, float] = {}
        for one in plants:
            for mix in (one.media, one.question or one.media):
                shares |= mix.shares()
        patch, length = plants[0].patch, scene.length
        position = np.arange(length)
        row, col = scene.place // scene.cols // patch, scene.place % scene.cols // patch
        spot = np.where(scene.media, (scene.item * 1024 + row) * 1024 + col, _NOBODY)
        self.row_place = np.unique(spot, return_inverse=True)[1] - int(not scene.media.all())
        frame = min((rows * cols for _, _, (_, rows, cols) in scene.items), default=256)
        # Two blocks are less than a frame, so that no key is in the window and at the row's place a frame before.
        self.block_tokens = max(8, frame // 2, -(-length // _PRIME**2))
        self.row_block = position // self.block_tokens

        self.codes_of_places, self.codes_of_blocks = (
            _shuffled_codes(int(label.max()) + 1, rng) for label in (self.row_place, self.row_block)
        )
        self.sink = np.where(position < _SINK_TOKENS, 0, _NOBODY)
        free = self.sink < 0
        self.vlines = np.full(length, _NOBODY)
        if "vlines" in shares:
            lines = _scattered_places(scene, plants[0].vline_places, rng) & free
            self.vlines[lines] = 0
            free &= ~lines
        self.columns = np.full(length, _NOBODY)
        if "columns" in shares:
            spans = _spans(scene, rng) & free
            self.columns[spans] = 0
            free &= ~spans
        self.text = np.full(length, _NOBODY)
        if "text" in shares:
            self.text[~scene.media & free] = 0
            free &= scene.media
        self.place = np.where(free, self.row_place, _NOBODY)
        self.block = np.where(free, self.row_block, _NOBODY)

    @property
    def distance(self) -> int:
        """Blocks from a row to its diagonal."""
        return max(3, int(0.3 * (self.row_block[-1] + 1)))

    def relations(self, name: str, mix: Mix) -> list[Relation]:
        """Relations of a share; labels of rows not yet limited to those that have it."""
        if name == "slash":
            return [Relation(name, self.row_place, self.place)]
        if name == "window":
            before = Relation(name, self.row_block - 1, self.block)
            return [before] if mix.slash else [before, Relation(name, self.row_block, self.block)]
        if name == "diagonal":
            return [Relation(name, np.maximum(self.row_block - self.distance, _NOBODY), self.block)]
        return [Relation(name, np.zeros_like(self.sink), getattr(self, name))]


def _head(labels: _Labels, one: Plant, hline: npt.NDArray[np.bool_]) -> Head:
    """Relations and strengths; every row of a mix gets the mix's shares of its mass."""
    scene = labels.scene
    strength = {name: np.zeros(scene.length, dtype=np.float32) for name in (*_BIASES, "slash", "window", "diagonal")}
    relations: list[Relation] = []
    question = one.question or one.media
    flat = hline | (scene.deciding & question.flat) | (~scene.deciding & one.media.flat)
    for mix, rows in ((one.media, ~scene.deciding & ~flat), (question, scene.deciding & ~flat)):
        if not rows.any():
            continue
        counts: dict[str, Ints] = {}
        for name in mix.shares():
            own = [Relation(name, np.where(rows, r.rows, _NOBODY), r.keys) for r in labels.relations(name, mix)]
            relations += own
            counts[name] = np.sum([relation.counts() for relation in own], axis=0)
        for name, amount in _strengths(mix, counts, scene.length).items():
            strength[name] += np.where(rows, amount, 0)
    if flat.any():
        everything = np.zeros(scene.length, dtype=np.int64)
        relations.append(Relation("hlines", np.where(flat, 0, _NOBODY), everything))
    return Head(one, relations, strength)


def _strengths(mix: Mix, counts: dict[str, Ints], length: int) -> dict[str, npt.NDArray[np.float32]]:
    """Scores of the relations' keys so that each holds its share, codes' cross-talk in the mean taken into account."""
    shares = {name: np.where(counts[name] > 0, share, 0.0) for name, share in mix.shares().items()}
    total = np.maximum(sum(shares.values()), 1e-9)
    rest = np.maximum(np.arange(1, length + 1) - sum(counts.values()), 1)
    strength = {name: np.zeros(length) for name in shares}
    zero = np.zeros(length)
    for _ in range(6):
        place, window, diagonal = (
            strength.get(name, zero) ** 2 / (2 * _CODE_DIM) for name in ("slash", "window", "diagonal")
        )
        block = window * (1 if mix.slash else 2) + diagonal
        # A key has no cross-talk with the feature that it matches.
        gain = {"slash": block, "window": place + block - window, "diagonal": place + block - diagonal}
        for name, share in shares.items():
            wanted = share / total * (1 - BACKGROUND) / BACKGROUND * rest / np.maximum(counts[name], 1)
            amount = np.log(np.maximum(wanted, 1.0)) + place + block - gain.get(name, zero)
            strength[name] = np.where(counts[name] > 0, np.maximum(amount, 0), 0)
    return {name: amount.astype(np.float32) for name, amount in strength.items()}


def _key_features(labels: _Labels, key: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
    """Fills [length, HEAD_DIM]: place code, block code, one dimension per bias, noise."""
    key[:, :_CODE_DIM] = labels.codes_of_places[labels.place]
    key[:, _CODE_DIM : 2 * _CODE_DIM] = labels.codes_of_blocks[labels.block]
    for dim, name in enumerate(_BIASES, start=2 * _CODE_DIM):
        key[:, dim] = getattr(labels, name) == 0
    key[:, -_NOISE_DIM:] = rng.standard_normal((key.shape[0], _NOISE_DIM))


def _query_features(labels: _Labels, head: Head, query: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
    """Fills [length, HEAD_DIM], scaled by the row's strengths, to be multiplied by the root of HEAD_DIM."""
    query[:, :_CODE_DIM] = head.strength["slash"][:, None] * labels.codes_of_places[labels.row_place]
    for relation in head.relations:
        if relation.name in {"window", "diagonal"}:
            strength = head.strength[relation.name][:, None]
            query[:, _CODE_DIM : 2 * _CODE_DIM] += strength * labels.codes_of_blocks[relation.rows]
    for dim, name in enumerate(_BIASES, start=2 * _CODE_DIM):
        query[:, dim] = head.strength[name]
    query[:, -_NOISE_DIM:] = NOISE / np.sqrt(_NOISE_DIM) * rng.standard_normal((query.shape[0], _NOISE_DIM))


def _block_of_places(scene: Scene, fraction: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Tokens at one rectangle of places of every item, about ``fraction`` of the frame."""
    chosen = np.zeros(scene.length, dtype=bool)
    for index, (_, _, (_, rows, cols)) in enumerate(scene.items):
        height = max(1, round((fraction * rows * cols) ** 0.5))
        width = min(cols, max(1, round(fraction * rows * cols / height)))
        top, left = rng.integers(0, rows - height + 1), rng.integers(0, cols - width + 1)
        row, col = scene.place // scene.cols, scene.place % scene.cols
        inside = (row >= top) & (row < top + height) & (col >= left) & (col < left + width)
        chosen |= (scene.item == index) & scene.media & inside
    return chosen


def _scattered_places(scene: Scene, fraction: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Tokens at some places of every item, each drawn on its own."""
    chosen = np.zeros(scene.length, dtype=bool)
    for index, (_, _, (_, rows, cols)) in enumerate(scene.items):
        places = rng.choice(rows * cols, size=max(1, round(fraction * rows * cols)), replace=False)
        chosen |= (scene.item == index) & np.isin(scene.place, places)
    return chosen


def _spans(scene: Scene, rng: np.random.Generator, count: int = 8, tokens: int = 48) -> npt.NDArray[np.bool_]:
    """Spans of media tokens, the same distance from one another on average."""
    media = np.flatnonzero(scene.media)
    chosen = np.zeros(scene.length, dtype=bool)
    starts = (np.arange(count) + rng.random(count) * 0.8) / count * max(1, media.size - tokens)
    for start in starts.astype(np.int64):
        chosen[media[start : start + tokens]] = True
    return chosen
