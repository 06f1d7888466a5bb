"""Tables that kernels read their memory from: rows of 64-bit numbers and addresses, made once for all layers.

What a row holds is named once (:class:`Fields`), for the kernels that read it and for the host that writes it.
"""

from __future__ import annotations

import struct
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl


class Fields(tl.constexpr):
    """What a row of a table holds: by name the number of each field, and how many there are as ``width``.

    That is even, so that rows begin at multiples of 16 bytes. A constant of the compiler, so that kernels are compiled
    anew where a row changes.
    """

    def __init__(self, names: str) -> None:
        fields = names.split()
        width = len(fields) + len(fields) % 2
        make: Any = namedtuple
        super().__init__(make("Fields", [*fields, "width"])(*range(len(fields)), width))

    def __getattr__(self, name: str) -> int:
        """The number of a field. The interpreter asks here, the compiler asks the value."""
        if name == "value" or name.startswith("__"):
            raise AttributeError(name)
        return int(getattr(self.value, name))


class Table:
    """Rows of a table that is being made; what they have the addresses of is kept."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.numbers: list[int] = []
        self.kept: list[torch.Tensor] = []

    def __len__(self) -> int:
        """Rows."""
        return len(self.numbers) // self.fields.width

    def add(self, **values: int | torch.Tensor | None) -> int:
        """Adds a row of numbers and addresses, 0 where there is none; returns its number."""
        row = [0] * self.fields.width
        for name, value in values.items():
            field = getattr(self.fields, name)
            if isinstance(value, torch.Tensor):
                self.kept.append(value)
                row[field] = value.data_ptr()
            elif value is not None:
                row[field] = value
        self.numbers += row
        return len(self) - 1


def bits(value: float) -> int:
    """A number in fp32, for :func:`real`."""
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)


def upload(tables: Sequence[Table], device: torch.device) -> list[torch.Tensor]:
    """Tables on a device, by one copy: int64 each, of one row at least, as kernels read a first one without need."""
    numbers = [table.numbers or [0] * table.fields.width for table in tables]
    uploaded = on_device([number for own in numbers for number in own], torch.int64, device)
    return list(torch.split(uploaded, [len(own) for own in numbers]))


@triton.jit
def number(p_row, FIELD: tl.constexpr):
    """A number of a table's row."""
    return tl.load(p_row + FIELD).to(tl.int32)


@triton.jit
def real(p_row, FIELD: tl.constexpr):
    """A number in fp32 of a table's row."""
    return number(p_row, FIELD).to(tl.float32, bitcast=True)


@triton.jit
def address(p_row, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """An address of a table's row."""
    return tl.load(p_row + FIELD).to(tl.pointer_type(DTYPE))


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers of the host on a device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)
