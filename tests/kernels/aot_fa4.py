"""Compiles flash-attn-4's kernel with our masks for an architecture, without a GPU; prints a JSON line per kernel.

``python tests/kernels/aot_fa4.py sm_90|sm_100``
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton.backends.nvidia

CASES = ((64, 64, 1, (2,)), (80, 64, 4, (2,)), (128, 64, 7, (1, 2)), (128, 128, 1, (2,)), (256, 64, 2, (2,)))
"""Head size, keys of a tile, lists per KV head, numbers of query tiles."""
PROCESSORS = {"sm_90": 132, "sm_100": 148}


def main(arch: str, folder: Path) -> None:
    """CuTe DSL and flash-attn-4 read the environment; what they leave behind lies in ``folder`` for a while."""
    os.environ |= {
        "FLASH_ATTENTION_ARCH": arch,
        "FLASH_ATTENTION_NUM_SMS": str(PROCESSORS[arch]),
        "CUTE_DSL_ARCH": f"{arch}a",
        "CUTE_DSL_DUMP_DIR": str(folder),
        "CUTE_DSL_KEEP_CUBIN": "1",
        "CUTE_DSL_KEEP_PTX": "1",
    }
    import cutlass.utils

    from mminference_sgl.kernels import fa4

    class Hardware:
        """What a persistent kernel's launch asks the driver for."""

        def get_device_multiprocessor_count(self) -> int:
            return PROCESSORS[arch]

    cutlass.utils.HardwareInfo = Hardware
    for head_dim, tile_keys, lists_per_kv_head, tiles in CASES:
        begin = time.monotonic()
        fa4.build(torch.bfloat16, head_dim, tile_keys, lists_per_kv_head, int(arch[3:]) // 10, tiles)
        seconds = time.monotonic() - begin
        for cubin in sorted(folder.glob("*.cubin")):
            ptx = cubin.with_suffix(".ptx")
            found = resources(cubin) | {"loads": loads(ptx.read_text())}
            print(json.dumps({"head_dim": head_dim, "tile_keys": tile_keys, "seconds": seconds, **found}), flush=True)
            cubin.unlink()
            ptx.unlink()


def resources(cubin: Path) -> dict[str, int]:
    """Registers and bytes of stack."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(re.search(rf"{name}:(\d+)", said.stdout + said.stderr)[1]) for name in ("REG", "STACK")}


def loads(ptx: str) -> list[int]:
    """Of how many dimensions the tensors are that the kernel loads from."""
    return sorted({int(rank) for rank in re.findall(r"cp\.async\.bulk\.tensor\.(\d)d\.shared::", ptx)})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1], Path(folder))
