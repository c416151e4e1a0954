"""Triton kernel of the alignment of little batches: one program counts, sums and scatters."""

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
