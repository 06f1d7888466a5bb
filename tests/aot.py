"""Compiles the Triton kernels for GPU architectures without a GPU and reads what ptxas made of them.

``python tests/aot.py 90 100`` prints one JSON object per kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mminference_sgl.kernels import attend

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory that one block may use."""
HEAD_DIMS = (64, 128)
POINTERS = {
    "p_lse": "*fp32",
    "p_rows": "*i64",
    "p_slots": "*i64",
    **dict.fromkeys(
        [
            "p_row_pos",
            "p_row_indptr",
            "p_request",
            "p_key_pos",
            "p_tile_indptr",
            "p_order",
            "p_indptr",
            "p_tiles",
            "p_full",
            "p_sink",
            "p_reach",
        ],
        "*i32",
    ),
}


@dataclass(frozen=True)
class Compiled:
    """Resources of one kernel: registers per thread, bytes of stack per thread and of shared memory per block."""

    arch: int
    head_dim: int
    dtype: str
    tile_queries: int
    tile_keys: int
    far: bool
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int


def compile_attend(arch: int, head_dim: int, dtype: str, tile_queries: int, tile_keys: int, *, far: bool) -> Compiled:
    """Compiles the attend kernel with the options it would be launched with."""
    kernel = attend.attend_kernel
    width = triton.next_power_of_2(head_dim)
    constants = {
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim,
        "BLOCK_D": width,
        "BLOCK_DV": width,
        "BLOCK_M": tile_queries,
        "BLOCK_N": tile_keys,
        "FAR": far,
        "MERGE": far,
    }
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = POINTERS.get(name, f"*{dtype}")
        else:
            signature[name] = "fp32" if name == "scale_log2" else "i32"
        if name.startswith("p_") or (name.startswith("stride_") and name != "stride_lse_row"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    warps, stages = attend.launch_options(head_dim, tile_queries, tile_keys, 2)
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    usage = resources(compiled.asm["cubin"])
    return Compiled(
        arch,
        head_dim,
        dtype,
        tile_queries,
        tile_keys,
        far,
        warps,
        stages,
        usage["REG"],
        usage["STACK"],
        compiled.metadata.shared,
    )


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def compile_all(architectures: Sequence[int]) -> Iterator[Compiled]:
    """Every head size and pass with the default tiles."""
    for arch in architectures:
        for head_dim in HEAD_DIMS:
            for far in (False, True):
                yield compile_attend(arch, head_dim, "bf16", 128, 64, far=far)


if __name__ == "__main__":
    for result in compile_all([int(arch) for arch in sys.argv[1:]] or list(SHARED_MEMORY)):
        print(json.dumps(asdict(result)), flush=True)
