"""Triton kernel of the routed experts' grouped GEMM; `grouped_gemm.py` has the signature.

One program makes one tile of block_m rows (slots of one expert, see `align.py`) by block_n output
columns. Rows are gathered from x and scattered to y by slot, so no permuted copy is ever made.
Quantised weights are widened in the K loop; a group's scale multiplies the partial sum of that
group, so that the tensor cores see exact small integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

DENSE = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
FP8 = tl.constexpr(3)
# Values that share a scale along K, and the bytes that hold them in int4.
GROUP = tl.constexpr(128)
HALF_GROUP = tl.constexpr(64)


@triton.jit
def _tile(pid, n_blocks_m, n_blocks_n, GROUP_M: tl.constexpr):
    """Block indices; GROUP_M row blocks walk the columns together and share weights in L2."""
    per_group = GROUP_M * n_blocks_n
    group = pid // per_group
    first = group * GROUP_M
    height = min(n_blocks_m - first, GROUP_M)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def _dense(acc, x, w_ptr, w_row, k, column_ok, K, EVEN_K: tl.constexpr):
    """acc plus x times a tile of 16- or 32-bit weights."""
    if EVEN_K:
        w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=column_ok[None, :], other=0.0)
    else:
        w = tl.load(
            w_ptr + w_row[None, :] + k[:, None],
            mask=column_ok[None, :] & (k[:, None] < K),
            other=0.0,
        )
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def _int8(acc, x, w_ptr, w_row, k, scale, column_ok, K):
    """acc plus scale times the product with a tile inside one group of int8 weights."""
    mask = column_ok[None, :] & (k[:, None] < K)
    w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask, other=0)
    return acc + tl.dot(x, w.to(x.dtype), input_precision="ieee") * scale[None, :]


@triton.jit
def _less_eight(nibble, dtype: tl.constexpr):
    """nibble - 8, exactly. As the last mantissa bits of 2**7 or 2**10 it needs no conversion."""
    if dtype == tl.bfloat16:
        wide = (nibble | 0x4300).to(dtype, bitcast=True) - 136.0
    elif dtype == tl.float16:
        wide = (nibble | 0x6400).to(dtype, bitcast=True) - 1032.0
    else:
        wide = nibble.to(dtype) - 8.0
    return wide


@triton.jit
def _int4(acc, x_low, x_high, w_ptr, w_row, byte, scale, column_ok):
    """acc plus scale times the product with a tile of packed weights: two nibbles, two products.

    A group of 128 is 64 bytes: byte j holds value j low and value j + 64 high, each plus 8. So a
    byte is loaded once and no interleaving is needed.
    """
    # Columns past the end hold -8, which nobody stores: to fill in 8s would cost instructions.
    w = tl.load(w_ptr + w_row[None, :] + byte[:, None], mask=column_ok[None, :], other=0)
    w = w.to(tl.int16)
    low = _less_eight(w & 0xF, x_low.dtype)
    high = _less_eight(w >> 4, x_low.dtype)
    part = tl.dot(x_low, low, input_precision="ieee")
    part = tl.dot(x_high, high, part, input_precision="ieee")
    return acc + part * scale[None, :]


@triton.jit
def _fp8(acc, x, x_scale, w_ptr, w_row, k, scale, column_ok, K):
    """acc plus both scales times the product with a tile inside one 128-wide block."""
    mask = column_ok[None, :] & (k[:, None] < K)
    w = tl.load(w_ptr + w_row[None, :] + k[:, None], mask=mask, other=0.0)
    return acc + tl.dot(x, w) * x_scale[:, None] * scale[None, :]


@triton.jit
def grouped_gemm_kernel(
    x_ptr,  # [rows, K]; for FP8 e4m3
    x_scale_ptr,  # float32 [rows, K groups], FP8 only
    w_ptr,  # [experts, N or 2N, K]; INT4 [.., K groups * 64] bytes
    w_scale_ptr,  # float32 [experts, N or 2N, K groups]; FP8 one per 128 rows
    y_ptr,  # [slots, N]
    weight_ptr,  # float32 [slots], read when WEIGHTED
    slot_ptr,  # int32, sorted and padded slots
    block_expert_ptr,
    n_padded_ptr,
    n_slots,
    n_blocks_m,
    N,
    K,
    w_expert_stride,  # elements from one expert to the next
    scale_expert_stride,
    SLOTS_PER_ROW: tl.constexpr,  # row of x = slot // SLOTS_PER_ROW
    FORMAT: tl.constexpr,
    SWIGLU: tl.constexpr,  # rows 0..N of w are the gate, N..2N the up projection
    WEIGHTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of y; see the top of this file."""
    n_blocks_n = tl.cdiv(N, BLOCK_N)
    block_m, block_n = _tile(tl.program_id(0), n_blocks_m, n_blocks_n, GROUP_M)
    if block_m * BLOCK_M >= tl.load(n_padded_ptr):
        return
    expert = tl.load(block_expert_ptr + block_m).to(tl.int64)
    slot = tl.load(slot_ptr + block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_ok = slot < n_slots
    row = slot // SLOTS_PER_ROW
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < N

    n_groups = tl.cdiv(K, GROUP)
    w_ptr += expert * w_expert_stride
    w_scale_ptr += expert * scale_expert_stride
    if FORMAT == INT4:
        w_width = n_groups * HALF_GROUP
        n_steps = n_groups * (GROUP // BLOCK_K)  # whole groups: low nibbles come before high ones
    else:
        w_width = K
        n_steps = tl.cdiv(K, BLOCK_K)
    w_row = column.to(tl.int64) * w_width
    up_row = (column.to(tl.int64) + N) * w_width
    if FORMAT == FP8:
        # The wrapper holds N to whole 128-row blocks where SWIGLU stacks two matrices.
        scale_row = (column // GROUP) * n_groups
        up_scale_offset = (N // GROUP) * n_groups
    else:
        scale_row = column * n_groups
        up_scale_offset = N * n_groups

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, n_steps):
        if FORMAT == INT4:
            byte = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
            k = (byte // HALF_GROUP) * GROUP + byte % HALF_GROUP
        else:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x_at = x_ptr + row[:, None] * K + k[None, :]
        if EVEN_K:
            x = tl.load(x_at, mask=row_ok[:, None], other=0.0)
        else:
            x = tl.load(x_at, mask=row_ok[:, None] & (k[None, :] < K), other=0.0)
        if FORMAT == DENSE:
            acc = _dense(acc, x, w_ptr, w_row, k, column_ok, K, EVEN_K)
            if SWIGLU:
                up = _dense(up, x, w_ptr, up_row, k, column_ok, K, EVEN_K)
        else:
            group = step * BLOCK_K // GROUP
            scale_at = w_scale_ptr + scale_row + group
            scale = tl.load(scale_at, mask=column_ok, other=0.0)
            if SWIGLU:
                up_scale = tl.load(scale_at + up_scale_offset, mask=column_ok, other=0.0)
            if FORMAT == INT8:
                acc = _int8(acc, x, w_ptr, w_row, k, scale, column_ok, K)
                if SWIGLU:
                    up = _int8(up, x, w_ptr, up_row, k, up_scale, column_ok, K)
            elif FORMAT == INT4:
                high_ok = row_ok[:, None] & (k[None, :] + HALF_GROUP < K)
                x_high = tl.load(x_at + HALF_GROUP, mask=high_ok, other=0.0)
                acc = _int4(acc, x, x_high, w_ptr, w_row, byte, scale, column_ok)
                if SWIGLU:
                    up = _int4(up, x, x_high, w_ptr, up_row, byte, up_scale, column_ok)
            else:
                x_scale = tl.load(x_scale_ptr + row * n_groups + group, mask=row_ok, other=0.0)
                acc = _fp8(acc, x, x_scale, w_ptr, w_row, k, scale, column_ok, K)
                if SWIGLU:
                    up = _fp8(up, x, x_scale, w_ptr, up_row, k, up_scale, column_ok, K)

    if SWIGLU:
        acc = acc * tl.sigmoid(acc) * up
    if WEIGHTED:
        acc *= tl.load(weight_ptr + slot, mask=row_ok, other=0.0)[:, None]
    y_at = y_ptr + slot[:, None] * N + column[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
