"""Where the time of a server's forwards goes: attention, linear layers, and what is neither.

SGLang puts functions behind a model's modules when it is asked to (``--forward-hooks``). :func:`timing_hook` makes
one that times attention and linear layers of the language model and writes their seconds to the log at the end of
each forward; :func:`module_times` and :func:`forward_times` read them. A call of a module costs a microsecond more.
Only for devices that compute while they are waited for, which is what a CPU does; a model's first forward is not
timed.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_KINDS = {"RadixAttention": "attention", "LinearBase": "linear", "LogitsProcessor": "end"}
"""SGLang's classes, which this package's harness does not import."""
_LANGUAGE_MODEL = ["model.layers.*", "language_model.*layers.*", "*logits_processor"]
_LINE = re.compile(r"mminference modules attention=(\S+) linear=(\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class ModuleTimes:
    """Seconds of one forward, or of several."""

    attention: float
    linear: float

    def __add__(self, other: ModuleTimes) -> ModuleTimes:
        return ModuleTimes(self.attention + other.attention, self.linear + other.linear)


def timing_arguments() -> list[str]:
    """What a server is started with so that it times its modules."""
    hook = {"name": "times", "target_modules": _LANGUAGE_MODEL, "hook_factory": f"{__name__}:timing_hook"}
    return ["--forward-hooks", json.dumps([hook])]


def forward_times(log: str) -> list[ModuleTimes]:
    """One for each forward that a part of a server's log tells of, on one rank."""
    return [ModuleTimes(float(m[1]), float(m[2])) for m in _LINE.finditer(log)]


def module_times(log: str) -> ModuleTimes:
    """Those of all its forwards."""
    return sum(forward_times(log), ModuleTimes(0.0, 0.0))


def timing_hook(_settings: dict[str, Any]) -> Any:
    """The function behind each module; SGLang calls this once a server."""
    seconds: defaultdict[str, float] = defaultdict(float)
    begun: dict[int, float] = {}

    def begin(module: Any, _arguments: Any) -> None:
        begun[id(module)] = time.perf_counter()

    def end(module: Any, _arguments: Any, _output: Any) -> None:
        kind = next((_KINDS[base.__name__] for base in type(module).__mro__ if base.__name__ in _KINDS), None)
        if kind is None:
            return
        if id(module) not in begun:
            # SGLang puts functions behind modules only; this one sees a module for the first time.
            module.register_forward_pre_hook(begin)
            begin(module, None)
        elif kind != "end":
            seconds[kind] += time.perf_counter() - begun[id(module)]
        if kind == "end":
            logger.info("mminference modules attention=%.6f linear=%.6f", seconds["attention"], seconds["linear"])
            seconds.clear()

    return end
