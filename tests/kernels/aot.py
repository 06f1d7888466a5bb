"""Compiles the attend kernel for GPU architectures without a GPU and reads what ptxas made of it.

``python tests/kernels/aot.py`` compiles every entry of the launch table in every variant that a server runs and prints
a table with the worst of the variants; ``--arch 90 --head 128 --every-variant`` asks for less or more;
``--launch 128,64,8,3`` tries something that is not in the table, and ``--launch 128,64,8,3,0,1`` whole pages through
descriptors (the fifth number is ``split``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mminference_sgl.kernels import attend
from mminference_sgl.kernels.launch_table import (
    ARCHITECTURES,
    HEAD_DIMS,
    NATIVE_FP8,
    OPTIONS,
    PAGE_TABLE,
    Launch,
    fitted,
    lookup,
)

J, C = TypeVar("J"), TypeVar("C")
TILE_QUERIES, TILE_KEYS = 128, 64
"""The configuration's defaults."""
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
"""Dtype of the pool and its bytes; the query of an fp8 pool is bf16."""
GROUP = 7
"""Query heads on a KV head: an odd number, as it is in Qwen2.5-VL 7B."""
INT64_POINTERS = ("p_rows", "p_slots")
REGISTERS = 65536


@dataclass(frozen=True)
class Variant:
    """Compile-time switches of the kernel."""

    far: bool
    merge: bool
    contiguous: bool
    shared: bool = False

    def __str__(self) -> str:
        """Region, epilogue, body, and whether the heads of a KV group share lists."""
        body = "pages" if self.contiguous else "gather"
        shared = "-shared" if self.shared else ""
        return f"{'far' if self.far else 'near'}-{'merge' if self.merge else 'write'}-{body}{shared}"


SERVED = (
    Variant(False, False, False),
    Variant(True, True, False),
    Variant(False, True, True),
    Variant(True, True, False, shared=True),
)
"""A sequence pass that writes, a cell pass that merges, heads that the guard runs again, from whole pages, and a cell
pass of shared lists."""
PAGES = (Variant(False, False, True), Variant(False, True, True))
"""What runs from whole pages: sequence passes that write, and those that merge."""
EVERY = (*PAGES, *itertools.starmap(Variant, itertools.product((False, True), (False, True), (False,))))
"""Whole pages come in token order only, so never with the far region."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    arch: int
    head_dim: int
    dtype: str
    variant: Variant
    launch: Launch


@dataclass(frozen=True)
class Compiled:
    """Registers and bytes of stack per thread, bytes of shared memory per block, matrix instructions in the loop.

    ``bulk_loads``: whether it loads through descriptors. ``ahead``: steps whose keys and values may be under way while
    one is computed, in the loop that has fewest; a buffer is the one that is computed with.
    """

    arch: int
    head_dim: int
    dtype: str
    variant: str
    launch: Launch
    registers: int
    stack: int
    shared: int
    matrix: str
    bulk_loads: bool
    ahead: int

    @property
    def fits(self) -> bool:
        """Whether nothing spills and a block finds its shared memory.

        fp32 exists for tests: a few bytes, which ptxas trades for one more block, are let pass.
        """
        return (
            self.stack <= (16 if self.dtype == "fp32" else 0) and self.shared <= ARCHITECTURES[self.arch].block_shared
        )

    @property
    def blocks(self) -> int:
        """Blocks that one processor holds at a time: the smaller of what registers and shared memory allow."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.launch.warps)
        return min(by_registers, ARCHITECTURES[self.arch].total_shared // (self.shared + 1024))


def jobs(
    arch: int, head_dim: int, dtype: str, variants: Iterable[Variant], launch: Launch | None = None, rows: int = 128
) -> list[Job]:
    """The kernels of one table entry, or of a launch in its place, for query tiles of ``rows``."""
    launch = fitted(launch or lookup(arch, head_dim, DTYPES[dtype]), rows, TILE_KEYS)
    return [Job(arch, head_dim, dtype, variant, launch) for variant in variants]


def table_jobs() -> list[Job]:
    """Every entry: in the served variants, and at the head size of nearly all models in all variants on two devices.

    Of what differs least, one variant: fp8 pools; sm_86, whose code is sm_80's; whole pages by pointers where the
    device has descriptors; other head sizes with descriptors; fp16, fp32 and tiles of 64 rows on some devices.
    """
    result = []
    for arch in (arch for arch in ARCHITECTURES if arch != 89):
        for head_dim in HEAD_DIMS:
            described = (arch, head_dim, 2) in PAGE_TABLE
            variants = SERVED[:2] if described else SERVED[2:] if arch == 86 else SERVED
            result += jobs(arch, head_dim, "bf16", EVERY if head_dim == 128 and arch in {80, 90} else variants)
            result += jobs(89 if arch == 86 else arch, head_dim, "fp8", SERVED[1:2] if described else SERVED[2:])
    for (arch, head_dim, width), launch in PAGE_TABLE.items():
        dtype = {1: "fp8", 2: "bf16"}[width]
        result += jobs(arch, head_dim, dtype, PAGES if (head_dim, width) == (128, 2) else PAGES[1:], launch)
    result += jobs(90, 128, "bf16", PAGES[1:], PAGE_TABLE[90, 128, 2], rows=64)
    for arch in (80, 90, 100):
        result += jobs(arch, 128, "fp16", SERVED[1:2])
        result += jobs(arch, 128, "bf16", SERVED[2:], rows=64)
    result += jobs(90, 128, "fp32", SERVED[1:2])
    return result


def compile_job(job: Job) -> Compiled:
    """Compiles the attend kernel as it would be launched."""
    kernel = attend.attend_kernel
    fp8 = job.dtype == "fp8"
    bits = fp8 and job.arch < NATIVE_FP8
    constants = attend.constants_for(
        job.launch,
        TILE_QUERIES // GROUP * GROUP if job.variant.shared else TILE_QUERIES,
        TILE_KEYS,
        group=GROUP,
        sharing=GROUP if job.variant.shared else 1,
        head_dim=job.head_dim,
        head_dim_v=job.head_dim,
        contiguous=job.variant.contiguous,
        fp8_bits=bits,
        far=job.variant.far,
        merge=job.variant.merge,
    )
    pool = {"fp8": "u8" if bits else "fp8e4nv"}.get(job.dtype, job.dtype)
    pointers = {
        **dict.fromkeys(("p_query", "p_out"), "bf16" if fp8 else job.dtype),
        **dict.fromkeys(("p_key", "p_value"), pool),
        **dict.fromkeys(INT64_POINTERS, "i64"),
        "p_lse": "fp32",
    }
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif constants["DESCRIPTORS"] and name in {"p_key", "p_value"}:
            box = [1, constants["BLOCK_N"], constants["BLOCK_D" if name == "p_key" else "BLOCK_DV"]]
            signature[name] = f"tensordesc<{pool}{box}>"
            continue
        elif name.startswith("p_"):
            signature[name] = "*" + pointers.get(name, "i32")
        else:
            signature[name] = "fp32" if name in {"scale_log2", "value_scale"} else "i32"
        # Pool, query and output rows are aligned; heads lie behind one another, so an LSE row need not be.
        if name.startswith("p_") or (name.startswith("stride_") and name != "stride_lse_row"):
            attributes[index,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", job.arch, 32),
        options={**OPTIONS, "num_warps": job.launch.warps, "num_stages": job.launch.stages},
    )
    usage, ptx = resources(compiled.asm["cubin"]), compiled.asm["ptx"]
    matrix = next((name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if name in ptx), "fma")
    return Compiled(
        job.arch,
        job.head_dim,
        job.dtype,
        str(job.variant),
        job.launch,
        usage["REG"],
        usage["STACK"],
        compiled.metadata.shared,
        matrix,
        "cp.async.bulk.tensor" in ptx,
        buffers(compiled.asm["ttgir"], constants["BLOCK_N"]) - 1,
    )


def buffers(ttgir: str, keys: int) -> int:
    """Fewest buffers of keys or values that a loop has, 1 where loads are not pipelined."""
    found = re.findall(rf"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{keys}x\d+x", ttgir)
    return min(map(int, found), default=1)


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def compile_all(compile_one: Callable[[J], C], work: list[J], processes: int = 2) -> Iterator[C]:
    """In order; nothing stays in Triton's cache."""
    with tempfile.TemporaryDirectory(prefix="mminference-aot-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(compile_one, work)


def table(results: Iterable[Compiled]) -> list[str]:
    """One line per architecture, head size and dtype: the launch and the worst of its variants."""
    names = ("sm", "head", "pool", "rows x keys", "warps", "stages", "ahead", "variants", "registers", "stack")
    names += ("shared", "blocks", "matrix")
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    ordered = sorted(results, key=lambda r: (r.arch, r.dtype, r.head_dim, r.launch))
    for (arch, dtype, head_dim, launch), found in itertools.groupby(
        ordered, key=lambda r: (r.arch, r.dtype, r.head_dim, r.launch)
    ):
        group = list(found)
        switches = " split" * launch.split + " TMA" * launch.descriptors
        low, high = min(r.registers for r in group), max(r.registers for r in group)
        cells = [
            *(arch, head_dim, dtype, f"{launch.rows} x {launch.keys}{switches}"),
            *(launch.warps, launch.stages, min(r.ahead for r in group), len(group)),
            str(high) if low == high else f"{low}-{high}",
            max(r.stack for r in group),
            f"{max(r.shared for r in group):,}",
            min(r.blocks for r in group),
            group[0].matrix,
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES))
    parser.add_argument("--head", type=int, action="append")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--every-variant", action="store_true")
    parser.add_argument(
        "--launch", type=lambda text: Launch(*map(int, text.split(","))), metavar="ROWS,KEYS,WARPS,STAGES[,SPLIT[,TMA]]"
    )
    parser.add_argument("--json", action="store_true", help="one object per kernel instead of a table")
    options = parser.parse_args()
    if options.arch or options.head or options.dtype or options.every_variant or options.launch:
        chosen = itertools.product(options.arch or ARCHITECTURES, options.head or HEAD_DIMS, options.dtype or ["bf16"])
        variants = EVERY if options.every_variant else SERVED
        if options.launch and options.launch.descriptors:
            variants = PAGES
        work = [job for entry in chosen for job in jobs(*entry, variants, options.launch)]
    else:
        work = table_jobs()
    results = compile_all(compile_job, work)
    if options.json:
        for result in results:
            print(json.dumps({**asdict(result), "launch": result.launch}), flush=True)
    else:
        found = list(results)
        print("\n".join(table(found)))
        sys.exit(0 if all(result.fits for result in found) else 1)


if __name__ == "__main__":
    main()
