"""Compiles the attend kernel for GPU architectures without a GPU and reads what ptxas made of it.

``python tests/kernels/aot.py`` compiles every entry of the launch table in every variant that a server runs and prints
a table with the worst of the variants; ``--arch 90 --head 128 --every-variant`` asks for less or more;
``--launch 128,64,8,3`` tries something that is not in the table, and ``--launch 128,64,8,3,0,1`` the same through
descriptors (the fifth number is ``split``). ``--cost`` prints what the loops over key tiles consist of instead.
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
    OPTIONS,
    Launch,
    fitted,
    lookup,
)

J, C = TypeVar("J"), TypeVar("C")
TILE_QUERIES, TILE_KEYS = 128, 64
"""The configuration's defaults."""
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Dtypes and their bytes."""
GROUP = 7
"""Query heads on a KV head: an odd number, as it is in Qwen2.5-VL 7B."""
REGISTERS = 65536


@dataclass(frozen=True)
class Variant:
    """Compile-time switches of the kernel."""

    far: bool
    merge: bool
    in_pieces: bool = False

    def __str__(self) -> str:
        """Region, epilogue and whether lists are split."""
        words = ["far" if self.far else "near", "merge" if self.merge else "write"]
        return "-".join(words + ["in-pieces"] * self.in_pieces)


SERVED = (
    Variant(False, False),
    Variant(True, True),
    Variant(False, True, in_pieces=True),
)
"""A sequence pass that writes, a cell pass that merges, and long lists that the guard wants."""
EVERY = tuple(itertools.starmap(Variant, itertools.product((False, True), repeat=3)))


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
    one is computed, in the loop that has fewest; a buffer is the one that is computed with. ``loops``: instructions by
    kind of the loops with matrix instructions, over full tiles and then over the others.
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
    loops: list[dict[str, int]]

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
    """Every entry in the served variants, and at the head size of nearly all models in all variants on two devices.

    Of what differs least, fewer: sm_86 and sm_89, whose code is sm_80's; fp16, fp32, tiles of 64 rows.
    """
    result = []
    for arch in (arch for arch in ARCHITECTURES if arch != 89):
        for head_dim in HEAD_DIMS:
            every = head_dim == 128 and arch in {80, 90}
            result += jobs(arch, head_dim, "bf16", EVERY if every else SERVED[1:2] if arch == 86 else SERVED)
    for arch in (80, 90, 100):
        result += jobs(arch, 128, "fp16", SERVED[1:2])
        result += jobs(arch, 128, "bf16", SERVED[1:2], rows=64)
    result += jobs(90, 128, "fp32", SERVED[1:2])
    return result


def compile_job(job: Job) -> Compiled:
    """Compiles the attend kernel as it would be launched."""
    kernel = attend.attend_kernel
    constants = attend.constants_for(
        job.launch,
        TILE_QUERIES,
        TILE_KEYS,
        group=GROUP,
        head_dim=job.head_dim,
        head_dim_v=job.head_dim,
        far=job.variant.far,
        merge=job.variant.merge,
        in_pieces=job.variant.in_pieces,
    )
    pointers = {
        **dict.fromkeys(("p_query", "p_out", "p_key", "p_value", "p_piece_out"), job.dtype),
        **dict.fromkeys(("p_lse", "p_piece_lse"), "fp32"),
        "p_passes": "i64",
    }
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif constants["DESCRIPTORS"] and name in {"p_key", "p_value"}:
            box = [constants["BLOCK_N"], constants["BLOCK_D" if name == "p_key" else "BLOCK_DV"]]
            signature[name] = f"tensordesc<{job.dtype}{box}>"
            continue
        elif name.startswith("p_"):
            signature[name] = "*" + pointers.get(name, "i32")
        else:
            signature[name] = "fp32" if name in {"scale_log2", "value_scale"} else "i32"
        # Query and output rows are aligned; heads lie behind one another, so an LSE row need not be.
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
        loops(compiled.asm["cubin"]),
    )


def buffers(ttgir: str, keys: int) -> int:
    """Fewest buffers of keys or values that a loop has, 1 where loads are not pipelined."""
    found = re.findall(rf"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{keys}x\d+x", ttgir)
    return min(map(int, found), default=1)


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool that Triton brings prints of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


KINDS = {
    "matrix": ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA"),
    "exponential": ("MUFU",),
    "load": ("LDGSTS", "UTMALDG", "LDG"),
    "shared": ("LDS", "LDSM", "STS", "STSM", "LDTM", "STTM"),
    "stack": ("LDL", "STL"),
    "barrier": ("BAR", "SYNCS", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "UTCBAR", "WARPSYNC"),
}
"""Kinds of instructions by the first word of their names; all others are "other"."""


class Code:
    """The instructions of a cubin, and its loops: addresses of the first and the last instruction of each."""

    def __init__(self, cubin: bytes) -> None:
        text = cuobjdump(cubin, "-sass")
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(\S*)([^;]*);", text)
        self.names = {int(at, 16): name for at, name, _, _ in found}
        self.loops: list[tuple[int, int]] = []
        for at, name, _, rest in found:
            target = re.search(r"0x([0-9a-f]+)", rest) if name in {"BRA", "BRX"} else None
            if target and int(target[1], 16) < int(at, 16):
                self.loops.append((int(target[1], 16), int(at, 16)))
        self.loops.sort()

    def inside(self, loop: tuple[int, int]) -> list[tuple[int, int]]:
        """Loops in a loop."""
        return [one for one in self.loops if one != loop and loop[0] <= one[0] and one[1] <= loop[1]]

    def of(self, loop: tuple[int, int]) -> dict[str, int]:
        """Instructions of a loop by kind, :data:`KINDS`; those of loops in it once."""
        names = [name for at, name in self.names.items() if loop[0] <= at <= loop[1]]
        kinds = [next((kind for kind, own in KINDS.items() if name in own), "other") for name in names]
        return {kind: kinds.count(kind) for kind in (*KINDS, "other")}


def loops(cubin: bytes) -> list[dict[str, int]]:
    """Instructions by kind of the innermost loops of a cubin that have matrix instructions."""
    code = Code(cubin)
    found = [code.of(loop) for loop in code.loops if not code.inside(loop)]
    return [one for one in found if one["matrix"]]


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the kernel in a cubin."""
    report = cuobjdump(cubin, "-res-usage")
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


TENSOR_FLOPS = {80: 2048, 90: 4096, 100: 8192}
"""FLOPs per cycle and processor of 16-bit matrix instructions (NVIDIA's figures for A100, H100 and B200)."""
EXPONENTIALS = 4
"""Exponentials per cycle and quarter of a processor."""


def cycles(result: Compiled, loop: dict[str, int]) -> tuple[int, int, int]:
    """Cycles of a step of a loop that the matrix unit, the issue of instructions and exponentials each take at least.

    A step takes at least the largest of them, and their sum where warps do not hide one behind another; what loads
    leave exposed comes on top. A processor's quarter issues one instruction per cycle for its share of the warps.
    """
    launch = result.launch
    matrix = 4 * launch.rows * launch.keys * result.head_dim // TENSOR_FLOPS[result.arch]
    warps = launch.warps // 4
    return matrix, warps * sum(loop.values()), warps * loop["exponential"] * 32 // EXPONENTIALS


def cost_table(results: Iterable[Compiled]) -> list[str]:
    """What the loops of a cell pass consist of, and cycles as far as they can be counted."""
    names = ("sm", "head", "launch", "loop", "ahead", *KINDS, "other", "all", "cycles: matrix", "issue", "exponentials")
    lines = ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]
    for result in results:
        if result.variant != "far-merge" or result.dtype != "bf16":
            continue
        launch = result.launch
        words = f"{launch.rows} x {launch.keys}" + " split" * launch.split + " TMA" * launch.descriptors
        for name, loop in zip(("full", "compared"), result.loops, strict=False):
            counted = cycles(result, loop) if result.arch in TENSOR_FLOPS else ("", "", "")
            cells = (result.arch, result.head_dim, words, name, result.ahead, *loop.values(), sum(loop.values()))
            lines.append("| " + " | ".join(str(cell) for cell in (*cells, *counted)) + " |")
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
    parser.add_argument("--cost", action="store_true", help="what the loops consist of instead")
    options = parser.parse_args()
    if options.arch or options.head or options.dtype or options.every_variant or options.launch:
        chosen = itertools.product(options.arch or ARCHITECTURES, options.head or HEAD_DIMS, options.dtype or ["bf16"])
        variants = EVERY if options.every_variant else SERVED
        work = [job for entry in chosen for job in jobs(*entry, variants, options.launch)]
    else:
        work = table_jobs()
    results = compile_all(compile_job, work)
    if options.json:
        for result in results:
            print(json.dumps({**asdict(result), "launch": result.launch}), flush=True)
    else:
        found = list(results)
        print("\n".join((cost_table if options.cost else table)(found)))
        sys.exit(0 if all(result.fits for result in found) else 1)


if __name__ == "__main__":
    main()
