"""Copies keys and values into both orders in the interpreter; a JSON line for each says whether that is right.

``TRITON_INTERPRET=1 python tests/kernels/interpret_copy.py``
"""

from __future__ import annotations

import json

import torch

import problems
from interpret import BATCH
from mminference_sgl.kernels import copy_triton


def main() -> None:
    """Pools in the dtype of what they are copied to, and in fp8; tiles without keys keep what they held."""
    for dtype in (torch.float32, torch.float16, torch.float8_e4m3fn):
        for head_dim in (24, 80):
            problem = problems.make(BATCH, head_dim=head_dim, heads=4, kv_heads=2, tile_keys=16, dtype=torch.float16)
            key_pool, value_pool = (pool.to(dtype) for pool in (problem.key_pool, problem.value_pool[..., :16]))
            into = torch.float16 if dtype.itemsize == 1 else dtype
            for tile_pass in (problem.plan.near, problem.plan.far):
                order = tile_pass.keys
                copies = [
                    torch.full((2, order.slots.numel(), pool.shape[2]), -7.0, dtype=into)
                    for pool in (key_pool, value_pool)
                ]
                copy_triton.copy(key_pool, value_pool, order, *copies)
                held = order.arrival[: order.arrived].long()
                later = order.arrival[order.arrived :].long()
                same = True
                for pool, copy in zip((key_pool, value_pool), copies, strict=True):
                    tiles = copy.view(2, *order.slots.shape, -1)
                    want = pool.view(pool.dtype)[order.slots[held]].to(into).movedim(2, 0)
                    same &= bool(torch.equal(tiles[:, held], want)) and bool((tiles[:, later] == -7).all())
                line = {"dtype": str(dtype).removeprefix("torch."), "same": same, "left_out": later.numel()}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
