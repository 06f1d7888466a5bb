"""The dtype in which the `portable_cpu` platform serves a checkpoint: bfloat16, unless this CPU is slow at it.

A checkpoint's own dtype says how it was stored, not what a CPU multiplies. Where PyTorch has no instructions for
bfloat16 it converts element by element, and float16, which SGLang's ``auto`` would take for float16 and float32
checkpoints, is fast on fewer CPUs still. So this platform knows two dtypes, bfloat16 and float32, whatever is stored.

Which one is *measured*, on one linear layer in each: what a name of a capability promises differs between generations,
libraries and their caps (``ONEDNN_MAX_CPU_ISA``, ``ATEN_CPU_CAPABILITY``), and a CPU of tomorrow is judged by what it
does. The measure is processor time of a single thread, least of several runs in turn: what else the machine is doing
does not enter it. Seconds in bfloat16 over seconds in float32:

| instructions | ratio |
| --- | --- |
| AMX | well below 1 |
| AVX512-BF16, an Intel CPU with AMX masked | 1.9 to 2.1 |
| AVX512 | 4.3 to 5.5 |
| AVX2 (and its VNNI_2) | 6 to 14, above 100 on some |

float32 takes twice the memory for weights and KV pool, and twice the traffic of every decode step, so a ratio of 2 does
not buy it: :data:`WORTH_TWICE_THE_MEMORY` stands between the rows. `--dtype` overrides either way.

Attention computes in :func:`~mminference_sgl.kernels.torch_tiles.compute_dtype` of the served dtype, dense and sparse
alike: float32 stays float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WORTH_TWICE_THE_MEMORY = 3.0
"""Seconds in bfloat16 over seconds in float32 from which on float32 is served."""
_ROWS, _WIDTH = 64, 256
_RUNS = 9
_ENOUGH = 0.02
"""Seconds of a run after which a dtype is not measured again."""


@dataclass(frozen=True)
class LinearTimes:
    """Processor seconds of one linear layer in each dtype."""

    bfloat16: float
    float32: float

    @property
    def dtype(self) -> str:
        """The dtype to serve in, as `--dtype` names it."""
        return "float32" if self.bfloat16 > WORTH_TWICE_THE_MEMORY * self.float32 else "bfloat16"

    def __str__(self) -> str:
        """Why, for the log."""
        ratio = self.bfloat16 / self.float32
        return f"a linear layer in bfloat16 takes {ratio:.1f} times as long as in float32 on this CPU"


def measure_linear() -> LinearTimes:
    """Times a linear layer in bfloat16 and in float32 on one thread: milliseconds, a tenth of a second where slow."""
    threads = torch.get_num_threads()
    # Two threads wait for one another, and so for whatever else runs on their cores.
    torch.set_num_threads(1)
    try:
        candidates = [_linear(torch.bfloat16), _linear(torch.float32)]
        for run in candidates:
            # Kernels are generated in the first run.
            run()
        bfloat16, float32 = least(candidates, time.thread_time)
    finally:
        torch.set_num_threads(threads)
    return LinearTimes(bfloat16, float32)


def least(candidates: list[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    """The least time of each candidate, all run in turn; one that takes long is run once."""
    best = [float("inf")] * len(candidates)
    for _ in range(_RUNS):
        for index, run in enumerate(candidates):
            if _ENOUGH < best[index] < float("inf"):
                continue
            began = clock()
            run()
            best[index] = min(best[index], clock() - began)
    return best


def _linear(dtype: torch.dtype) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, _WIDTH, generator=generator).to(dtype) for size in (_ROWS, _WIDTH))

    def run() -> object:
        with torch.inference_mode():
            return torch.nn.functional.linear(x, weight)

    return run
