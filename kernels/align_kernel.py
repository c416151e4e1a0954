"""Triton kernels of the alignment: one program for all experts, or one for each."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def align_kernel(
    ids_ptr,  # int [n_slots]; negative marks an absent expert
    slot_ptr,  # int32 [n_blocks * BLOCK_M], filled with n_slots before the call
    block_expert_ptr,  # int32 [n_blocks]
    n_padded_ptr,  # int32 [1]
    n_slots,
    n_blocks,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,  # slots compared with all experts at a time
):
    """Counting sort by expert, stable, each expert's list padded to whole blocks."""
    expert = tl.arange(0, PADDED_EXPERTS)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros((PADDED_EXPERTS,), tl.int32)
    for start in range(0, n_slots, CHUNK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < n_slots, other=-1)
        counts += tl.sum((ids[:, None] == expert[None, :]).to(tl.int32), axis=0)
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    ends = tl.cumsum(padded, axis=0)
    tl.store(n_padded_ptr, tl.sum(padded, axis=0))

    # An expert's rank within the chunk, after those of earlier chunks, from where its list begins.
    following = ends - padded
    for start in range(0, n_slots, CHUNK):
        slot = start + lane
        ids = tl.load(ids_ptr + slot, mask=slot < n_slots, other=-1)
        is_expert = (ids[:, None] == expert[None, :]).to(tl.int32)
        place = following[None, :] + tl.cumsum(is_expert, axis=0) - 1
        row = tl.sum(place * is_expert, axis=1)
        tl.store(slot_ptr + row, slot, mask=ids >= 0)
        following += tl.sum(is_expert, axis=0)

    for start in range(0, n_blocks, CHUNK):
        block = start + lane
        done = (ends[None, :] <= block[:, None] * BLOCK_M) & (expert[None, :] < EXPERTS)
        owner = tl.sum(done.to(tl.int32), axis=1)
        owner = tl.where(owner < EXPERTS, owner, -1)
        tl.store(block_expert_ptr + block, owner, mask=block < n_blocks)


@triton.jit
def count_kernel(
    ids_ptr,  # int [n_slots]
    count_ptr,  # int32 [experts], one program each
    n_slots,
    CHUNK: tl.constexpr,
):
    """How many slots have the program's expert."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    found = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, n_slots, CHUNK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < n_slots, other=-1)
        found += (ids == expert).to(tl.int32)
    tl.store(count_ptr + expert, tl.sum(found, axis=0))


@triton.jit
def place_kernel(
    ids_ptr,  # int [n_slots]
    count_ptr,  # int32 [EXPERTS] of count_kernel
    slot_ptr,  # int32, filled with n_slots before the call
    block_expert_ptr,  # int32, filled with -1 before the call
    n_padded_ptr,  # int32 [1]
    n_slots,
    EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Slots of the program's expert in order, behind the padded lists of the experts before it."""
    expert = tl.program_id(0)
    lane = tl.arange(0, CHUNK)
    other = tl.arange(0, PADDED_EXPERTS)
    counts = tl.load(count_ptr + other, mask=other < EXPERTS, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(other < expert, blocks, 0), axis=0)
    last = tl.sum(tl.where(other <= expert, blocks, 0), axis=0)
    if expert == 0:
        tl.store(n_padded_ptr, tl.sum(blocks, axis=0) * BLOCK_M)
    for start in range(first, last, CHUNK):
        tl.store(block_expert_ptr + start + lane, expert, mask=start + lane < last)

    following = first * BLOCK_M
    for start in range(0, n_slots, CHUNK):
        slot = start + lane
        ids = tl.load(ids_ptr + slot, mask=slot < n_slots, other=-1)
        mine = (ids == expert).to(tl.int32)
        row = following + tl.cumsum(mine, axis=0) - 1
        tl.store(slot_ptr + row, slot, mask=mine == 1)
        following += tl.sum(mine, axis=0)
