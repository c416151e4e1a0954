"""Triton kernel of decode attention: one query per sequence over a cache of keys and values.

One program takes a block of the query heads that share one KV head, and one split of the context;
splits are joined in `attention.py` by their log-sum-exp, as in flash decoding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    q_ptr,  # [batch, heads, DIM]
    q_rope_ptr,  # [batch, heads, ROPE], read when ROPE > 0
    k_ptr,  # [batch, context, kv_heads, DIM]
    k_rope_ptr,  # [batch, context, kv_heads, ROPE]
    v_ptr,  # [batch, context, kv_heads, V_DIM]
    length_ptr,  # int32 [batch]
    out_ptr,  # float32 [batch, heads, splits, V_DIM]
    lse_ptr,  # float32 [batch, heads, splits]
    scale,
    context,
    split_length,  # a multiple of BLOCK
    KV_HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # query heads of one program
    PADDED_DIM: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    PADDED_V: tl.constexpr,
    SHARED_V: tl.constexpr,  # values are the keys without their rotary part (MLA)
    BLOCK: tl.constexpr,
):
    """Softmax-weighted values of one split and their log-sum-exp."""
    batch = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head_ok = head < HEADS_PER_KV
    query = batch * (KV_HEADS * HEADS_PER_KV) + kv_head * HEADS_PER_KV + head
    dim = tl.arange(0, PADDED_DIM)
    v_dim = tl.arange(0, PADDED_V)
    q_ok = head_ok[:, None] & (dim[None, :] < DIM)
    q = tl.load(q_ptr + query[:, None] * DIM + dim[None, :], mask=q_ok, other=0.0)
    if ROPE > 0:
        rope = tl.arange(0, PADDED_ROPE)
        rope_ok = rope < ROPE
        q_rope_at = q_rope_ptr + query[:, None] * ROPE + rope[None, :]
        q_rope = tl.load(q_rope_at, mask=head_ok[:, None] & rope_ok[None, :], other=0.0)

    length = tl.load(length_ptr + batch)
    first = split * split_length
    last = tl.minimum(first + split_length, length)
    best = tl.full((BLOCK_HEADS,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    acc = tl.zeros((BLOCK_HEADS, PADDED_V), tl.float32)
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        seen = place < last
        row = (batch * context + place) * KV_HEADS + kv_head
        k_ok = seen[:, None] & (dim[None, :] < DIM)
        k = tl.load(k_ptr + row[:, None] * DIM + dim[None, :], mask=k_ok, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if ROPE > 0:
            k_rope_at = k_rope_ptr + row[:, None] * ROPE + rope[None, :]
            k_rope = tl.load(k_rope_at, mask=seen[:, None] & rope_ok[None, :], other=0.0)
            score = tl.dot(q_rope, tl.trans(k_rope), score, input_precision="ieee")
        score = tl.where(seen[None, :], score * scale, -1e30)
        new_best = tl.maximum(best, tl.max(score, axis=1))
        shrink = tl.exp(best - new_best)
        weight = tl.exp(score - new_best[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        if SHARED_V:
            v = k
        else:
            v_ok = seen[:, None] & (v_dim[None, :] < V_DIM)
            v = tl.load(v_ptr + row[:, None] * V_DIM + v_dim[None, :], mask=v_ok, other=0.0)
        part = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        acc = acc * shrink[:, None] + part
        best = new_best

    # A split past the sequence's end saw nothing: log-sum-exp of about -1e30 weighs it zero.
    some = tl.maximum(total, 1e-30)
    at = query * tl.num_programs(1) + split
    out_at = out_ptr + at[:, None] * V_DIM + v_dim[None, :]
    tl.store(out_at, acc / some[:, None], mask=head_ok[:, None] & (v_dim[None, :] < V_DIM))
    tl.store(lse_ptr + at, best + tl.log(some), mask=head_ok)
