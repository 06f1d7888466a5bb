"""Items of a request as the planner takes them: (modality, inclusive spans, frame grid after merging or None)."""

from __future__ import annotations

IMAGE, VIDEO, AUDIO = 1, 2, 3
"""Modalities of items, as the planner numbers them; text is 0."""

Spans = list[tuple[int, int]]
Grid = tuple[int, int, int]
Item = tuple[int, Spans, Grid | None]
