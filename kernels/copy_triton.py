"""Copies keys and values of the paged pool into token orders, once per layer: attention then reads whole tiles.

What the probe needs of values, their parts (:mod:`.sketch`), is computed on the way.

Floor: what is copied is read and written once, and 8 bytes of slot per key and KV head; ``2 * HELD`` bytes of parts and
``32 * Dv`` FLOPs. 8-bit pools are converted here, so that nothing else knows of them.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from .launch_table import NATIVE_FP8, OPTIONS, device_architecture
from .operands import Copies
from .sketch import HELD, signs
from .tiles import ForwardKeys

CHANNELS = 16
"""Parts of a value and room beside them: the fewest columns that matrix instructions have."""
CHANNELS_HELD = tl.constexpr(HELD)
CHANNELS_ALL = tl.constexpr(CHANNELS)


@triton.jit
def widen(b_block, DTYPE: tl.constexpr, FP8_BITS: tl.constexpr):
    """Pool elements in another dtype; with ``FP8_BITS`` they are bytes of e4m3."""
    if FP8_BITS:
        # Moved into the fields of e5m10, whose bias is 8 larger; subnormal numbers stay right.
        b_block = b_block.to(tl.uint16)
        b_block = (((b_block & 0x80) << 8) | ((b_block & 0x7F) << 7)).to(tl.float16, bitcast=True)
        b_block = b_block.to(tl.float32) * 256
    return b_block.to(DTYPE)


@triton.jit
def copy_rows(
    p_pool,
    p_ordered,
    b_slot,
    o_key,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP8_BITS: tl.constexpr,
):
    """Some rows of one head, which it returns."""
    o_d = tl.arange(0, BLOCK_D)
    m_row = (o_d < HEAD_DIM)[None, :]
    b_row = tl.load(p_pool + b_slot[:, None] * stride + o_d[None, :], mask=m_row)
    b_row = widen(b_row, p_ordered.dtype.element_ty, FP8_BITS)
    p_row = p_ordered + o_key.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_row, b_row, mask=m_row)
    return b_row


@triton.jit(do_not_specialize=["keys"])
def copy_kernel(
    p_key,
    p_value,
    p_arrived,
    p_slots,
    p_signs,
    p_ordered_key,
    p_ordered_value,
    p_parts,
    value_scale,
    keys,
    stride_key_slot,
    stride_key_head,
    stride_value_slot,
    stride_value_head,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    FP8_BITS: tl.constexpr,
):
    """A key tile of one KV head; heads of a tile are copied by neighbours, as the pool has them.

    ``p_signs`` [Dv, HELD]: the projections, behind a column of zeros.
    """
    i_kv = tl.program_id(0).to(tl.int64)
    o_key = tl.load(p_arrived + tl.program_id(1)) * TILE_KEYS + tl.arange(0, TILE_KEYS)
    b_slot = tl.load(p_slots + o_key)
    p_key += i_kv * stride_key_head
    p_value += i_kv * stride_value_head
    p_ordered_key += i_kv * keys * HEAD_DIM
    p_ordered_value += i_kv * keys * HEAD_DIM_V
    copy_rows(p_key, p_ordered_key, b_slot, o_key, stride_key_slot, HEAD_DIM, BLOCK_D, FP8_BITS)
    b_value = copy_rows(p_value, p_ordered_value, b_slot, o_key, stride_value_slot, HEAD_DIM_V, BLOCK_DV, FP8_BITS)
    o_d, o_c = tl.arange(0, BLOCK_DV), tl.arange(0, CHANNELS_ALL)
    m_c, m_d = (o_c < CHANNELS_HELD)[None, :], o_d < HEAD_DIM_V
    if BLOCK_DV > HEAD_DIM_V:
        b_value = tl.where(m_d[None, :], b_value, 0.0)
    b_sign = tl.load(p_signs + o_d[:, None] * CHANNELS_HELD + o_c[None, :], mask=m_d[:, None] & m_c, other=0.0)
    b_part = tl.dot(b_value, b_sign, input_precision="ieee") * value_scale
    b_part = tl.where(o_c[None, :] == 0, 1.0, b_part)
    p_part = p_parts + (i_kv * keys + o_key[:, None]) * CHANNELS_HELD + o_c[None, :]
    tl.store(p_part, b_part.to(p_parts.dtype.element_ty), mask=m_c)


@cache
def padded_signs(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """:func:`.sketch.signs` behind a column of zeros: [head_dim, HELD]."""
    return torch.nn.functional.pad(signs(head_dim, device), (1, 0)).to(dtype)


def copy(
    key_pool: torch.Tensor, value_pool: torch.Tensor, value_scale: float, every: ForwardKeys, copies: Copies
) -> None:
    """Copies the pools' rows of the key tiles that hold keys.

    Pools [slots, KV heads, D] are in the dtype of what they are copied to, or in fp8 e4m3; ``value_scale``: what values
    are multiplied by before they are projected.
    """
    keys, values, parts = copies
    kv_heads, count, head_dim = keys.shape
    fp8_bits = key_pool.element_size() == 1 and device_architecture(key_pool.device) < NATIVE_FP8
    if fp8_bits:
        key_pool, value_pool = key_pool.view(torch.uint8), value_pool.view(torch.uint8)
    copy_kernel[kv_heads, len(every.arrived)](
        key_pool,
        value_pool,
        every.arrived,
        every.slots,
        padded_signs(values.shape[2], values.dtype, values.device),
        keys,
        values,
        parts,
        value_scale,
        count,
        key_pool.stride(0),
        key_pool.stride(1),
        value_pool.stride(0),
        value_pool.stride(1),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=values.shape[2],
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_DV=max(16, triton.next_power_of_2(values.shape[2])),
        TILE_KEYS=every.slots.shape[1],
        FP8_BITS=fp8_bits,
        **OPTIONS,
    )
