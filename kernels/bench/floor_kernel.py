"""Triton kernels that do nothing, or nothing but read: the floor under all others."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def empty_kernel():
    """Nothing."""


@triton.jit
def read_kernel(x_ptr, sum_ptr, BLOCK: tl.constexpr):
    """Sum of one block of x; the length of x is a multiple of BLOCK."""
    program = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + program * BLOCK + tl.arange(0, BLOCK))
    tl.store(sum_ptr + program, tl.sum(x, axis=0))
