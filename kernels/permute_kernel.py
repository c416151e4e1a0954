"""Triton kernels that move token rows; `permute.py` has the signatures."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def permute_kernel(
    x_ptr,  # [tokens, width]
    y_ptr,  # [slots, width]
    position_ptr,  # int32 [slots], row of y; -1 absent
    width,
    SLOTS_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy one slot's row to its place in expert order."""
    slot = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + slot).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = (column < width) & (position >= 0)
    x = tl.load(x_ptr + (slot // SLOTS_PER_ROW) * width + column, mask=ok, other=0.0)
    tl.store(y_ptr + position * width + column, x, mask=ok)


@triton.jit
def combine_kernel(
    rows_ptr,  # [slots, width]
    y_ptr,  # [tokens, width]
    position_ptr,  # int32 [slots]; negative marks an absent slot
    weight_ptr,  # float32 [slots], read when WEIGHTED
    width,
    TOP_K: tl.constexpr,
    BY_SLOT: tl.constexpr,  # the row of a slot is the slot itself, not its position
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weighted sum of one token's rows, in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(TOP_K):
        slot = token * TOP_K + choice
        position = tl.load(position_ptr + slot).to(tl.int64)
        row = slot if BY_SLOT else position
        ok = (column < width) & (position >= 0)
        part = tl.load(rows_ptr + row * width + column, mask=ok, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weight_ptr + slot)
        total += part
    y_at = y_ptr + token * width + column
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=column < width)
