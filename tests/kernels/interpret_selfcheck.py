"""Runs the self-check of Triton in the interpreter for one served shape; prints what it ran as a JSON line.

``TRITON_INTERPRET=1 python tests/kernels/interpret_selfcheck.py``
"""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import torch

from mminference_sgl.backend import selfcheck
from mminference_sgl.kernels import attend, probe_triton

SERVED = selfcheck.Served(3, 1, 80, torch.float16, torch.float8_e4m3fn, 32, 64)


def main() -> None:
    """The verdict, and the compile-time arguments of every launch."""
    selfcheck._TOKENS = 100
    seen: dict[str, list[dict[str, Any]]] = {"attend": [], "probe": []}
    with (
        mock.patch.object(attend, "constants_for", recorder(attend.constants_for, seen["attend"])),
        mock.patch.object(probe_triton, "constants_for", recorder(probe_triton.constants_for, seen["probe"])),
    ):
        verdict = selfcheck.check("triton", torch.device("cpu"), SERVED)
    print(json.dumps({"verdict": verdict, **seen}))


def recorder(constants_for, seen: list[dict[str, Any]]):
    def recorded(*given: Any, **named: Any) -> dict[str, Any]:
        constants = constants_for(*given, **named)
        if constants not in seen:
            seen.append(constants)
        return constants

    return recorded


if __name__ == "__main__":
    main()
