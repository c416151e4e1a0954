"""Decode attention, one query token per sequence: grouped-query (GQA) and latent (MLA, absorbed).

MLA's cache holds per token one latent of `rank` values and one rotary key shared by all heads.
With the up-projections absorbed into the query and the output, it is attention with one KV head
whose values are the latents themselves, so that a cache line is read once for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moesim_kernels.errors import KernelError

BLOCK = 64  # cache rows per step
BLOCK_LATENT = 32  # the same for MLA, whose rows are wide
MAX_HEADS = 64  # query heads of one program
MAX_HEADS_LATENT = 16  # the same for MLA: queries of 512 values fill shared memory
MAX_SPLITS = 32
PROGRAMS_WANTED = 264  # about two per multiprocessor of a large GPU


@dataclass(frozen=True, slots=True)
class Latent:
    """MLA's inputs.

    q_latent    [batch, heads, rank], queries in the latent space (W_UK absorbed)
    q_rope      [batch, heads, rope]
    cache       [batch, context, rank]
    cache_rope  [batch, context, rope]
    scale       1 / sqrt(head width before absorption), rotary part included
    """

    q_latent: torch.Tensor
    q_rope: torch.Tensor
    cache: torch.Tensor
    cache_rope: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class _Call:
    q: torch.Tensor
    q_rope: torch.Tensor | None
    k: torch.Tensor
    k_rope: torch.Tensor | None
    v: torch.Tensor | None
    lengths: torch.Tensor
    scale: float
    n_splits: int | None


def decode_gqa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    n_splits: int | None = None,
) -> torch.Tensor:
    """Softmax attention of one query per sequence, scaled by 1 / sqrt(dim).

    q         [batch, heads, dim]; heads a multiple of kv_heads, neighbours share a KV head
    k, v      [batch, context, kv_heads, dim], contiguous, of q's dtype
    lengths   int[batch] tokens of each cache in 1..context
    n_splits  parts of the context worked on side by side; None chooses
    returns   [batch, heads, dim] of q's dtype
    """
    if k.dim() != 4 or k.shape != v.shape:
        raise KernelError(
            f"k: shape {list(k.shape)}, v: shape {list(v.shape)}; expected equal "
            "[batch, context, kv_heads, dim]"
        )
    return _decode(_Call(q, None, k, None, v, lengths, q.shape[-1] ** -0.5, n_splits))


def decode_mla(latent: Latent, lengths: torch.Tensor, n_splits: int | None = None) -> torch.Tensor:
    """Latent attention of one query per sequence.

    lengths  int[batch] tokens of each cache in 1..context
    returns  [batch, heads, rank] of q_latent's dtype, before W_UV
    """
    k, k_rope = latent.cache[:, :, None], latent.cache_rope[:, :, None]
    if latent.q_rope.shape != (*latent.q_latent.shape[:2], k_rope.shape[-1]):
        raise KernelError(f"q_rope: shape {list(latent.q_rope.shape)} does not match the cache")
    return _decode(
        _Call(latent.q_latent, latent.q_rope, k, k_rope, None, lengths, latent.scale, n_splits)
    )


def _check(call: _Call) -> None:
    q, k = call.q, call.k
    if q.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[2]:
        raise KernelError(f"q: shape {list(q.shape)} does not match the cache {list(k.shape)}")
    if q.shape[1] % k.shape[2]:
        raise KernelError(f"{q.shape[1]} heads are not a multiple of {k.shape[2]} KV heads")
    if call.lengths.shape != (q.shape[0],):
        raise KernelError(f"lengths: shape {list(call.lengths.shape)}, expected [{q.shape[0]}]")
    given = [t for t in (q, call.q_rope, k, call.k_rope, call.v) if t is not None]
    if not all(t.is_contiguous() and t.dtype == q.dtype for t in given):
        raise KernelError("queries and caches must be contiguous and of one dtype")


def _splits(call: _Call, block: int) -> tuple[int, int]:
    """Number of splits and the cache rows of each, a multiple of block."""
    batch, context, kv_heads, _ = call.k.shape
    n_blocks = max(-(-context // block), 1)
    wanted = call.n_splits or min(MAX_SPLITS, -(-PROGRAMS_WANTED // max(batch * kv_heads, 1)))
    per_split = -(-n_blocks // min(wanted, n_blocks))
    return -(-n_blocks // per_split), per_split * block


def _decode(call: _Call) -> torch.Tensor:
    import triton
    from moesim_kernels.attention_kernel import decode_kernel

    _check(call)
    (batch, heads, dim), kv_heads = call.q.shape, call.k.shape[2]
    block = BLOCK if call.v is not None else BLOCK_LATENT
    n_splits, split_length = _splits(call, block)
    most = MAX_HEADS if call.v is not None else MAX_HEADS_LATENT
    block_heads = min(most, max(16, triton.next_power_of_2(heads // kv_heads)))
    head_blocks = triton.cdiv(heads // kv_heads, block_heads)
    rope = 0 if call.q_rope is None else call.q_rope.shape[2]
    out = torch.empty(batch, heads, n_splits, dim, dtype=torch.float32, device=call.q.device)
    lse = torch.empty(batch, heads, n_splits, dtype=torch.float32, device=call.q.device)
    decode_kernel[(batch * kv_heads, n_splits, head_blocks)](
        *(call.q, call.q if call.q_rope is None else call.q_rope),
        *(call.k, call.k if call.k_rope is None else call.k_rope),
        *(call.k if call.v is None else call.v, call.lengths.int(), out, lse),
        *(call.scale, call.k.shape[1], split_length),
        KV_HEADS=kv_heads,
        HEADS_PER_KV=heads // kv_heads,
        DIM=dim,
        ROPE=rope,
        V_DIM=dim,
        BLOCK_HEADS=block_heads,
        PADDED_DIM=max(16, triton.next_power_of_2(dim)),
        PADDED_ROPE=max(16, triton.next_power_of_2(rope)),
        PADDED_V=max(16, triton.next_power_of_2(dim)),
        SHARED_V=call.v is None,
        BLOCK=block,
    )
    return _join(out, lse).to(call.q.dtype)


def _join(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Splits weighted by their share of the softmax's denominator."""
    if out.shape[2] == 1:
        return out[:, :, 0]
    return (out * lse.softmax(2)[..., None]).sum(2)


def decode_gqa_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """float32 [batch, heads, dim] of what `decode_gqa` computes, one sequence at a time."""
    repeat = q.shape[1] // k.shape[2]
    rows = []
    for i, length in enumerate(lengths.tolist()):
        keys = k[i, :length].float().repeat_interleave(repeat, 1)
        values = v[i, :length].float().repeat_interleave(repeat, 1)
        scores = torch.einsum("hd,lhd->hl", q[i].float(), keys) * q.shape[2] ** -0.5
        rows.append(torch.einsum("hl,lhd->hd", scores.softmax(1), values))
    return torch.stack(rows)


def decode_mla_reference(latent: Latent, lengths: torch.Tensor) -> torch.Tensor:
    """float32 [batch, heads, rank] of what `decode_mla` computes, one sequence at a time."""
    rows = []
    for i, length in enumerate(lengths.tolist()):
        cache = latent.cache[i, :length].float()
        scores = latent.q_latent[i].float() @ cache.T
        scores = scores + latent.q_rope[i].float() @ latent.cache_rope[i, :length].float().T
        rows.append((scores * latent.scale).softmax(1) @ cache)
    return torch.stack(rows)
