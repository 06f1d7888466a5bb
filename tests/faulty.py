"""Faults that a test calls for while a server runs: a file says which, and the server's own code meets them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

ENV_FILE = "TEST_FAULT_FILE"
"""Names the file that a test writes a fault's name to; no file, no fault."""
NO_MEMORY, LYING_GEOMETRY = "no memory", "lying geometry"


def asked_for() -> str:
    path = Path(os.environ.get(ENV_FILE, ""))
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def install() -> None:
    """In a server's processes: selection of the second layer runs out of memory, spans of items overlap."""
    from mminference_sgl.backend.layout import LayoutCache
    from mminference_sgl.method import prefill

    select, get = prefill._select, LayoutCache.get

    def short_of_memory(layer: Any) -> Any:
        if asked_for() == NO_MEMORY and layer.id == 1:
            import torch

            raise torch.OutOfMemoryError("asked for 1 EiB")
        return select(layer)

    def lied_to(self: Any, mm_inputs: Any, *args: Any) -> Any:
        if asked_for() == LYING_GEOMETRY and mm_inputs is not None:
            mm_inputs = copy.copy(mm_inputs)
            mm_inputs.mm_items = [copy.copy(item) for item in mm_inputs.mm_items for _ in range(2)]
        return get(self, mm_inputs, *args)

    prefill._select, LayoutCache.get = short_of_memory, lied_to
