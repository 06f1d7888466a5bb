"""Imported by a server: functions behind a model's modules that write down what these compute in."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def log_dtypes(settings: dict[str, Any]) -> Any:
    """The function behind the modules of one part of a model: one line per dtype of a weight or a result."""
    seen = set()

    def behind(module: Any, _arguments: Any, output: Any) -> None:
        results = output if isinstance(output, tuple) else (output,)
        for tensor in (*module.parameters(), *(x for x in results if hasattr(x, "is_floating_point"))):
            if tensor.is_floating_point() and tensor.dtype not in seen:
                seen.add(tensor.dtype)
                logger.info("computes in: %s %s", settings["part"], tensor.dtype)

    return behind
