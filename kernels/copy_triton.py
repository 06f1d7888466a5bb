"""Copies keys and values of the paged pool into a token order, once per layer: attention then reads whole tiles.

Floor: what is copied is read and written once, and 8 bytes of slot per key and KV head. 8-bit pools are converted here,
so that nothing else knows of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch_table import NATIVE_FP8, OPTIONS, device_architecture
from .tiles import KeyOrder


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
    """Some rows of one head."""
    o_d = tl.arange(0, BLOCK_D)
    m_row = (o_d < HEAD_DIM)[None, :]
    b_row = tl.load(p_pool + b_slot[:, None] * stride + o_d[None, :], mask=m_row)
    p_row = p_ordered + o_key.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_row, widen(b_row, p_ordered.dtype.element_ty, FP8_BITS), mask=m_row)


@triton.jit(do_not_specialize=["keys"])
def copy_kernel(
    p_key,
    p_value,
    p_arrival,
    p_slots,
    p_ordered_key,
    p_ordered_value,
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
    """A key tile of one KV head; heads of a tile are copied by neighbours, as the pool has them."""
    i_kv = tl.program_id(0).to(tl.int64)
    o_key = tl.load(p_arrival + tl.program_id(1)) * TILE_KEYS + tl.arange(0, TILE_KEYS)
    b_slot = tl.load(p_slots + o_key)
    p_key += i_kv * stride_key_head
    p_value += i_kv * stride_value_head
    p_ordered_key += i_kv * keys * HEAD_DIM
    p_ordered_value += i_kv * keys * HEAD_DIM_V
    copy_rows(p_key, p_ordered_key, b_slot, o_key, stride_key_slot, HEAD_DIM, BLOCK_D, FP8_BITS)
    copy_rows(p_value, p_ordered_value, b_slot, o_key, stride_value_slot, HEAD_DIM_V, BLOCK_DV, FP8_BITS)


def copy(
    key_pool: torch.Tensor, value_pool: torch.Tensor, order: KeyOrder, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Copies the pools' rows of the key tiles that hold keys to ``keys`` and ``values`` [KV heads, n * tile_keys, D].

    Pools [slots, KV heads, D] are in the dtype of what they are copied to, or in fp8 e4m3.
    """
    kv_heads, count, head_dim = keys.shape
    fp8_bits = key_pool.element_size() == 1 and device_architecture(key_pool.device) < NATIVE_FP8
    if fp8_bits:
        key_pool, value_pool = key_pool.view(torch.uint8), value_pool.view(torch.uint8)
    copy_kernel[kv_heads, order.arrived](
        key_pool,
        value_pool,
        order.arrival,
        order.slots,
        keys,
        values,
        count,
        key_pool.stride(0),
        key_pool.stride(1),
        value_pool.stride(0),
        value_pool.stride(1),
        HEAD_DIM=head_dim,
        HEAD_DIM_V=values.shape[2],
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_DV=triton.next_power_of_2(values.shape[2]),
        TILE_KEYS=order.tile_keys,
        FP8_BITS=fp8_bits,
        **OPTIONS,
    )
