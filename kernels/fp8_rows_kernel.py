"""Triton kernel that makes fp8 activations in one launch; `quantise.fp8_rows` has the signature."""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(128)
FP8_MAX = tl.constexpr(448.0)
LEAST_SCALE = tl.constexpr(1e-12)


@triton.jit
def _rounded(value):
    """The e4m3 value nearest to a float32 in -448..448, ties to even, still as float32."""
    bits = value.to(tl.int32, bitcast=True)
    bits += 0x7FFFF + ((bits >> 20) & 1)  # half of the last of three mantissa bits, less for evens
    normal = (bits & -0x100000).to(tl.float32, bitcast=True)
    subnormal = (value + 24576.0) - 24576.0  # 1.5 * 2**14: there a float32 has steps of 2**-9
    return tl.where(tl.abs(value) < 0.015625, subnormal, normal)


@triton.jit
def fp8_rows_kernel(
    x_ptr,  # [rows, width]
    y_ptr,  # e4m3 [rows, width]
    scale_ptr,  # float32 [rows, groups]
    n_rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,  # where the cast itself does not round: in the interpreter
):
    """One group of 128 columns of a block of rows: its scales, and its values over them."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    row_ok = row < n_rows
    ok = row_ok[:, None] & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    # Division rounds to nearest, so that a device gives the bits of torch on a CPU.
    most = tl.max(tl.abs(x), axis=1)
    scale = tl.maximum(tl.div_rn(most, tl.full((BLOCK_ROWS,), FP8_MAX, tl.float32)), LEAST_SCALE)
    tl.store(scale_ptr + row * tl.cdiv(width, GROUP) + group, scale, mask=row_ok)
    divisor = tl.broadcast_to(scale[:, None], (BLOCK_ROWS, GROUP))
    scaled = tl.clamp(tl.div_rn(x, divisor), -FP8_MAX, FP8_MAX)
    if ROUND_FIRST:
        scaled = _rounded(scaled)
    tl.store(y_ptr + at, scaled.to(y_ptr.dtype.element_ty), mask=ok)
