"""Vision attention of the `portable_cpu` platform.

SGLang's `VisionSdpaAttention` masks frames (or windows) from one another with a matrix of patches x
patches: 9.6 GB for the 98K patches of a 340-frame clip, and as many products that are thrown away.
Here each segment attends to itself, segments of one length together.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.vision import VisionSdpaAttention

# Rows of q, k and v that are gathered at a time.
_ROWS_AT_A_TIME = 32768


class SegmentedVisionAttention(VisionSdpaAttention):
    """One batched attention for the segments of each length, without a mask."""

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bsz: int,
        cu_seqlens: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q, k, v: [patches, heads, head_dim]; cu_seqlens: [segments + 1]; returns q's shape."""
        segmented = (
            self.flatten_batch
            and bsz == 1
            and cu_seqlens is not None
            and attention_mask is None
            and not self.softmax_in_single_precision
        )
        if not segmented:
            out: torch.Tensor = super().forward(
                q, k, v, bsz, cu_seqlens=cu_seqlens, attention_mask=attention_mask, **kwargs
            )
            return out

        bounds = torch.as_tensor(cu_seqlens, dtype=torch.int64, device="cpu")
        starts, lengths = bounds[:-1], bounds.diff()
        out = torch.zeros_like(q)
        for length in sorted(set(lengths.tolist()) - {0}):
            same = starts[lengths == length]
            step = max(1, _ROWS_AT_A_TIME // length)
            for first in range(0, len(same), step):
                some = same[first : first + step]
                patches = _patches(some, length)
                shape = (len(some), length, -1, self.head_size)
                attended = self._attend(q[patches].view(shape), k[patches].view(shape), v[patches].view(shape))
                out[patches] = attended.flatten(0, 1)
        return out

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v: [segments, length, heads, head_dim]; returns q's shape."""
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return out.transpose(1, 2)


def _patches(starts: torch.Tensor, length: int) -> slice | torch.Tensor:
    """The patches of segments of one length: a slice where they follow one another, so that nothing is copied."""
    begin, end = int(starts[0]), int(starts[-1]) + length
    if end - begin == len(starts) * length:
        return slice(begin, end)
    return (starts.unsqueeze(1) + torch.arange(length)).flatten()
