"""Runs the kernel that fills FlashInfer's page indices in Triton's interpreter, against its eager form.

``TRITON_INTERPRET=1 python tests/kernels/interpret_flashinfer.py`` prints a line per case.
"""

from __future__ import annotations

import torch

import problems
from mminference_sgl.kernels import flashinfer_fill, flashinfer_work
from test_attention import random_lists


def main() -> None:
    for page_size in (1, 32):
        problem = problems.make(problems.MIXED[:2], heads=2, kv_heads=1, tile_keys=32, page_size=page_size)
        for tile_pass in (problem.plan.near, problem.plan.far):
            lists = random_lists(problem, tile_pass, 1)
            packed = flashinfer_work.Packed.of(lists)
            total = int(lists.full.sum())
            per_tile = 32 // flashinfer_work.page_size(tile_pass.keys)
            for first, window in ((0, 1 << 20), (0, 5), (5, 5), (total, 5)):
                # Lists that begin in the window, to the end of the last one.
                starts = packed.start[packed.start < first + window]
                which = packed.order[starts.numel() - 1]
                end = int(starts[-1] + lists.full[which]) - first if starts.numel() else 0
                begins = packed.start[packed.start >= first]
                begin = min(int(begins[0]) - first, end) if begins.numel() else end
                eager, ours = torch.full((2, max(end, 1) * per_tile), -1, dtype=torch.int32)
                flashinfer_work.fill(tile_pass, lists, packed, first, window, eager)
                flashinfer_fill.fill(tile_pass, lists, packed.order, packed.start, first, window, ours)
                held = slice(begin * per_tile, end * per_tile)
                assert torch.equal(ours[held], eager[held]), (page_size, tile_pass.region, first, window)
                assert (ours[: held.start] == -1).all(), "a list that begins before the window is not this launch's"
                print(page_size, tile_pass.region.value, first, window, end - begin, flush=True)


if __name__ == "__main__":
    main()
