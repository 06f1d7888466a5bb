"""Arrays that are uploaded together."""

from __future__ import annotations

import numpy as np
import torch

from mminference_sgl.method.upload import ALIGNMENT, Packer

CPU = torch.device("cpu")


def test_parts_are_what_was_added() -> None:
    arrays = [np.arange(length, dtype=dtype) - 7 for length in (1, 16, 0, 63, 111) for dtype in (np.int32, np.int64)]
    packer = Packer()
    parts = [packer.add(array) for array in arrays]
    uploaded = packer.upload(CPU)
    assert (uploaded.int32.dtype, uploaded.int64.dtype) == (torch.int32, torch.int64)
    for part, array in zip(parts, arrays, strict=True):
        assert part.start % ALIGNMENT == 0
        for width in (uploaded.int32, uploaded.int64):
            assert width[part].tolist() == array.tolist()
            assert width[part].storage_offset() * width.element_size() % 64 == 0


def test_nothing_is_uploaded_as_nothing() -> None:
    assert Packer().upload(CPU).int64.tolist() == []
