"""Random projections of values, whose squares sum to the squared length on average.

What is kept of a key besides its weight is 1, to add up mass, and its projected value: its *parts*.
"""

from __future__ import annotations

from functools import cache

import torch

SKETCH = 7
"""Random projections of a value, or of the deviation of one."""
HELD = 1 + SKETCH
"""What a tile holds of a row: its mass, and the projections of its deviation."""


@cache
def signs(head_dim: int, device: torch.device) -> torch.Tensor:
    """The projections: fp32 [head_dim, SKETCH], each entry plus or minus ``SKETCH ** -0.5``."""
    bits = torch.randint(2, (head_dim, SKETCH), generator=torch.Generator().manual_seed(0))
    return torch.sub(2 * bits, 1).mul(SKETCH**-0.5).to(device)
