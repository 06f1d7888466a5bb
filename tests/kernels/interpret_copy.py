"""Copies keys and values into both orders in the interpreter; a JSON line for each pool says whether that is right.

``TRITON_INTERPRET=1 python tests/kernels/interpret_copy.py``
"""

from __future__ import annotations

import json

import torch

import problems
from interpret import BATCH, distance
from mminference_sgl.kernels import copy_triton, operands
from mminference_sgl.kernels.operands import Copies


def main() -> None:
    """Pools in the dtype of what they are copied to, and in fp8; tiles without keys keep what they held."""
    for dtype in (torch.float32, torch.float16, torch.float8_e4m3fn):
        for head_dim in (24, 80):
            problem = problems.make(BATCH, head_dim=head_dim, heads=4, kv_heads=2, tile_keys=16, dtype=torch.float16)
            key_pool, value_pool = (pool.to(dtype) for pool in (problem.key_pool, problem.value_pool[..., :16]))
            into = torch.float16 if dtype.itemsize == 1 else dtype
            every = problem.plan.near.keys.all_keys
            here, later = every.arrived.long(), torch.ones(len(every.slots), dtype=torch.bool)
            later[here] = False
            ours, want = (
                Copies(*(torch.full((2, every.slots.numel(), width), -7.0, dtype=into) for width in (head_dim, 16, 8)))
                for _ in range(2)
            )
            copy_triton.copy(key_pool, value_pool, 1.5, every, ours)
            operands._copy(key_pool, value_pool, 1.5, every, want)
            held = [pool[every.slots[here]].to(into).movedim(2, 0) for pool in (key_pool, value_pool)]
            tiles = [copied.view(2, *every.slots.shape, -1) for copied in ours]
            line = {
                "dtype": str(dtype).removeprefix("torch."),
                "into": str(into).removeprefix("torch."),
                "same": all(torch.equal(a[:, here], b) for a, b in zip(tiles, held, strict=False)),
                "parts": distance(ours.parts, want.parts) / float(want.parts.abs().max()),
                "untouched": all(bool((one[:, later] == -7).all()) for one in tiles),
                "left_out": int(later.sum()),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
