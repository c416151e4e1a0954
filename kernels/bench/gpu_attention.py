"""Attention on a GPU: one new token per sequence over a cold cache, and whole prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from moesim_kernels.attention import (
    Latent,
    decode_gqa,
    decode_gqa_reference,
    decode_mla,
    decode_mla_reference,
)
from moesim_kernels.bench.accelerator import Accelerator, Call
from moesim_kernels.bench.measured import Measured
from moesim_kernels.bench.points import Point

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED = 2  # sequences
OURS, SDPA = "moesim", "torch_sdpa"
SOURCES = {OURS: "moesim.triton.decode_attention", SDPA: "torch.scaled_dot_product_attention"}


def decode(point: Point, gpu: Accelerator) -> Measured:
    """One query per sequence; all sequences are `context` long, their caches take turns.

    kind gqa  keys and values of `kv_heads` heads
    kind mla  latents of `kv_rank` values and rotary keys of `rope_dim`, weights absorbed
    """
    return (_decode_mla if point.shape["kind"] == "mla" else _decode_gqa)(point, gpu)


def prefill(point: Point, gpu: Accelerator) -> Measured:
    """Causal attention of `batch` prompts of `tokens` each, over their own keys and values."""
    batch, n_tokens, heads, kv_heads, dim = _sizes(
        point, "batch", "tokens", "heads", "kv_heads", "head_dim"
    )
    draw = _drawing(point, gpu)
    q, k, v = (draw(batch, n_tokens, n, dim) for n in (heads, kv_heads, kv_heads))
    turned = tuple(x.transpose(1, 2) for x in (q, k, v))

    def call() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            *turned, is_causal=True, enable_gqa=heads != kv_heads
        )

    last = call()[:CHECKED, :, -1]
    lengths = torch.full((len(last),), n_tokens, device=gpu.device)
    expected = decode_gqa_reference(q[:CHECKED, -1], k[:CHECKED], v[:CHECKED], lengths)
    pairs = n_tokens * (n_tokens + 1) // 2
    return gpu.measured(
        [call], source=SOURCES[SDPA], n_bytes=_bytes(q, q, k, v),
        flops=4 * batch * heads * dim * pairs, max_rel_err=_error(last, expected),
    )  # fmt: skip


def _decode_gqa(point: Point, gpu: Accelerator) -> Measured:
    batch, context, heads, kv_heads, dim = _sizes(
        point, "batch", "context", "heads", "kv_heads", "head_dim"
    )
    draw = _drawing(point, gpu)
    q, lengths = draw(batch, heads, dim), _lengths(batch, context, gpu)
    cache_bytes = 2 * batch * context * kv_heads * dim * q.element_size()
    shape = (batch, context, kv_heads, dim)
    caches = [(draw(*shape), draw(*shape)) for _ in range(gpu.copies(cache_bytes, cache_bytes))]
    run = _sdpa if point.kernel == SDPA else partial(_ours, lengths)
    k, v = (of_all[:CHECKED] for of_all in caches[0])
    expected = decode_gqa_reference(q[:CHECKED], k, v, lengths[:CHECKED])
    error = _error(run(q, *caches[0])[:CHECKED], expected)
    del k, v, expected
    return gpu.measured(
        [partial(run, q, k, v) for k, v in caches], source=SOURCES[point.kernel],
        n_bytes=cache_bytes + _bytes(q, q), flops=4 * batch * heads * context * dim,
        max_rel_err=error,
    )  # fmt: skip


def _ours(lengths: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return decode_gqa(q, k, v, lengths)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), enable_gqa=q.shape[1] != k.shape[2]
    )
    return out[:, :, 0]


def _decode_mla(point: Point, gpu: Accelerator) -> Measured:
    batch, context, heads, rank, rope = _sizes(
        point, "batch", "context", "heads", "kv_rank", "rope_dim"
    )
    draw, lengths = _drawing(point, gpu), _lengths(batch, context, gpu)
    q, q_rope = draw(batch, heads, rank), draw(batch, heads, rope)
    scale = (rank + rope) ** -0.5
    cache_bytes = batch * context * (rank + rope) * q.element_size()
    latents = [
        Latent(q, q_rope, draw(batch, context, rank), draw(batch, context, rope), scale)
        for _ in range(gpu.copies(cache_bytes, cache_bytes))
    ]
    calls: list[Call] = [partial(decode_mla, latent, lengths) for latent in latents]
    expected = decode_mla_reference(_first(latents[0]), lengths[:CHECKED])
    return gpu.measured(
        calls, source=SOURCES[OURS], n_bytes=cache_bytes + _bytes(q, q_rope, q),
        flops=2 * batch * heads * context * (2 * rank + rope),
        max_rel_err=_error(decode_mla(latents[0], lengths)[:CHECKED], expected),
    )  # fmt: skip


def _first(latent: Latent) -> Latent:
    given = (latent.q_latent, latent.q_rope, latent.cache, latent.cache_rope)
    return Latent(*(of_all[:CHECKED] for of_all in given), latent.scale)


def _sizes(point: Point, *names: str) -> list[int]:
    return [int(point.shape[name]) for name in names]


def _drawing(point: Point, gpu: Accelerator) -> Callable[..., torch.Tensor]:
    """randn of the point's activations on the device."""
    return partial(torch.randn, dtype=DTYPES[str(point.dtype["a"])], device=gpu.device)


def _lengths(batch: int, context: int, gpu: Accelerator) -> torch.Tensor:
    return torch.full((batch,), context, dtype=torch.int32, device=gpu.device)


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())
