"""Compiles the Triton kernels around attention, probe, search and lists, for GPU architectures without a GPU.

``python tests/kernels/aot_selection.py`` prints a table of registers, stack and shared memory; ``--json`` an object per
kernel; ``--cost`` what the loops of selection consist of.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aot import Code, compile_all, resources
from mminference_sgl.kernels import attend, copy_triton, probe_triton, select_triton, work_triton
from mminference_sgl.kernels.launch_table import ARCHITECTURES, NATIVE_FP8, OPTIONS

ARCHS = (80, 90, 100, 120)
"""sm_86 and sm_89 run sm_80's code but for fp8, and have as much shared memory as sm_120."""
HEADS = (64, 80, 128, 256)
TILE_KEYS = 64
SELECTION = ("rows", "candidates", "curves", "decide", "lists", "guard")
"""Kernels of :mod:`.select_triton`."""
POINTERS = {
    **dict.fromkeys(("p_rows", "p_slots", "p_probes", "p_jobs"), "i64"),
    **dict.fromkeys(("p_searches", "p_forms", "p_groups", "p_offers", "p_segments", "p_passes", "p_requests"), "i64"),
    **dict.fromkeys(("p_held", "p_lse", "p_piece_lse", "p_out"), "fp32"),
    "p_levels": "i8",
}
"""Element types of pointers that are not int32; query and pools aside."""
FLOATS = ("scale_log2", "value_scale")


@dataclass(frozen=True)
class Job:
    """One kernel to compile; ``head_dim`` 0 where it has none."""

    arch: int
    kernel: str
    dtype: str
    head_dim: int


@dataclass(frozen=True)
class Compiled:
    """Registers and bytes of stack per thread, bytes of shared memory per block.

    ``read_and_written``: arguments through which it loads and stores. Triton puts no barrier between the two, so they
    are right only where each thread loads what it stored itself. ``steps``: of each loop, instructions, those of loops
    in it once, and how many of them load from memory.
    """

    arch: int
    kernel: str
    dtype: str
    head_dim: int
    warps: int
    registers: int
    stack: int
    shared: int
    read_and_written: tuple[str, ...]
    steps: list[list[int]]

    @property
    def fits(self) -> bool:
        """Whether nothing spills and a block finds its shared memory, on sm_86 and sm_89 as well."""
        limit = min(ARCHITECTURES[arch].block_shared for arch in ({self.arch, 86} if self.arch == 80 else {self.arch}))
        return self.stack == 0 and self.shared <= limit


def jobs() -> list[Job]:
    """Every kernel on every architecture, by head size where it has one."""
    result = []
    for arch in ARCHS:
        for kernel in ("probe", "held", "join"):
            result += [Job(arch, kernel, "bf16", head_dim) for head_dim in HEADS]
        result += [Job(arch, "copy", dtype, head) for dtype, head in (("bf16", 128), ("fp8", 80))]
        result += [Job(arch, kernel, "fp32", 0) for kernel in SELECTION if kernel != "guard"]
        result += [Job(arch, "guard", "bf16", head_dim) for head_dim in HEADS]
    return result


def compile_job(job: Job) -> Compiled:
    """Compiles a kernel as it would be launched for query tiles and bands of a long chunk."""
    module = dict.fromkeys(("probe", "held"), probe_triton)
    module |= {"copy": copy_triton, "join": attend}
    kernel = getattr(module.get(job.kernel, select_triton), f"{job.kernel}_kernel")
    bits = job.dtype == "fp8" and job.arch < NATIVE_FP8
    pool = {"fp8": "u8" if bits else "fp8e4nv"}.get(job.dtype, job.dtype)
    pointers = {**POINTERS, "p_key": pool, "p_value": pool}
    bf16 = ("p_query", "p_parts", "p_signs", "p_ordered_key", "p_ordered_value", "p_piece_out")
    pointers |= dict.fromkeys((*bf16, *("p_out",) * (job.kernel in {"join", "guard"})), "bf16")
    options, warps = {}, 8 if job.kernel in {"decide", "guard"} else 4
    if job.kernel in {"probe", "held"}:
        launch = getattr(probe_triton, f"{job.kernel}_launch")(job.head_dim, 2, TILE_KEYS)
        constants = probe_triton.constants_for(launch, TILE_KEYS, 7, job.head_dim, job.head_dim)
        options, warps = {"num_warps": launch.warps, "num_stages": launch.stages}, launch.warps
    else:
        block_dv = triton.next_power_of_2(job.head_dim)
        constants = {
            "BLOCK": select_triton.BLOCK,
            "BLOCK_HELD": select_triton.BLOCK_HELD,
            "BLOCK_BANDS": select_triton.BLOCK_BANDS,
            "BLOCK_H": 32,
            "BLOCK_L": 32,
            "SPLIT": work_triton.SPLIT,
            "BLOCK_ORDERED": work_triton.BLOCK_ORDERED,
            "HEAD_DIM_V": job.head_dim,
            "BLOCK_DV": max(128, block_dv) if job.kernel == "guard" else block_dv,
            "FP8_BITS": bits,
            "HEAD_DIM": job.head_dim,
            "BLOCK_D": block_dv,
            "TILE_KEYS": TILE_KEYS,
            "BLOCK_M": attend.JOINED,
            "LANES": 128,
            "SPLIT_TILES": work_triton.SPLIT,
        }
        options = {"num_warps": warps}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*" + pointers.get(name, "i32")
            if name not in kernel.do_not_specialize_on_alignment:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if name.startswith("stride_"):
                attributes[index,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", job.arch, 32),
        options={**OPTIONS, **options},
    )
    usage = resources(compiled.asm["cubin"])
    names = [name for name in kernel.arg_names if signature[name] != "constexpr"]
    return Compiled(
        *(job.arch, job.kernel, job.dtype, job.head_dim, warps),
        *(usage["REG"], usage["STACK"], compiled.metadata.shared),
        read_and_written(compiled.asm["ttir"], names),
        steps_of(compiled.asm["cubin"]),
    )


def steps_of(cubin: bytes) -> list[list[int]]:
    """See :class:`Compiled`."""
    code = Code(cubin)
    found = [code.of(loop) for loop in code.loops]
    return [[sum(kinds.values()), kinds["load"]] for kinds in found]


def read_and_written(ttir: str, names: list[str]) -> tuple[str, ...]:
    """Which of a kernel's arguments it loads through and stores through, from what the front end made of it.

    A value is derived from an argument if some value is that it is computed from; what is loaded is not. Regions beside
    one another use the same names for values of their own.
    """
    head, _, body = ttir.partition("tt.func public")[2].partition("{\n")
    derived = {value: {name} for value, name in zip(re.findall(r"(%\w+): ", head), names, strict=True)}
    loaded: set[str] = set()
    stored: set[str] = set()
    for line in body.splitlines():
        results, _, operation = line.strip().partition(" = ") if re.match(r"\s*%[^=]* = ", line) else ("", "", line)
        used = re.findall(r"%[\w#]+", operation)
        sources = set().union(*(derived.get(value.partition("#")[0], set()) for value in used))
        if "tt.load" in operation:
            loaded |= derived.get(used[0], set())
            sources = set()
        elif "tt.store" in operation:
            stored |= derived.get(used[0], set())
        # What a loop carries has names in its first line.
        for result in re.findall(r"%\w+", line if "scf." in line else results):
            derived[result] = sources | (derived.get(result, set()) if "scf." in line else set())
    return tuple(sorted(name for name in loaded & stored if name.startswith("p_")))


def table(results: Iterable[Compiled]) -> list[str]:
    """One line per kernel, with the range over architectures."""
    lines = [
        "| kernel | head | pool | warps | registers | stack | shared |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]

    def key(result: Compiled) -> tuple[str, int, str]:
        return result.kernel, result.head_dim, result.dtype

    for (kernel, head_dim, dtype), found in groupby(sorted(results, key=key), key=key):
        group = list(found)
        registers, shared = [r.registers for r in group], [r.shared for r in group]
        cells = kernel, head_dim or "", dtype if head_dim else "", group[0].warps
        ranges = f"{min(registers)}-{max(registers)}", max(r.stack for r in group), f"{min(shared):,}-{max(shared):,}"
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, *ranges)) + " |")
    return lines


def cost_table(results: Iterable[Compiled]) -> list[str]:
    """One line per loop of the kernels of selection: instructions of a warp, and how many of them load."""
    lines = ["| sm | kernel | loop | instructions | loads |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        for number, (count, loads) in enumerate(result.steps):
            lines.append(f"| {result.arch} | {result.kernel} | {number} | {count} | {loads} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object per kernel instead of a table")
    parser.add_argument("--cost", action="store_true", help="what the loops of selection consist of, on sm_90, instead")
    options = parser.parse_args()
    if options.cost:
        work = [job for job in jobs() if job.arch == 90 and job.kernel in SELECTION]
        print("\n".join(cost_table(compile_all(compile_job, work))))
        return
    results = list(compile_all(compile_job, jobs()))
    if options.json:
        for result in results:
            print(json.dumps(asdict(result)), flush=True)
    else:
        print("\n".join(table(results)))
        sys.exit(0 if all(result.fits for result in results) else 1)


if __name__ == "__main__":
    main()
