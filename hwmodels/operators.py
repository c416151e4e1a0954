"""Costs of the operators around the experts: multiplication, attention, router, copies.

Each function prices an array of work on one device and returns a Cost of that shape. Dtypes name
the operands ("bf16", "fp8"); results are written in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.cost import (
    DEFAULT_EFFICIENCY,
    Cost,
    Efficiency,
    ExpertShape,
    Roof,
    Work,
    device_joules,
    dtype_bits,
    expert_law,
    expert_seconds,
    roofline,
)
from hwmodels.device import Device, Link

OUTPUT_BYTES = 2.0  # results leave an operator in bf16


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Attention of one layer on one device.

    n_heads, n_kv_heads   heads on this device
    head_dim, v_head_dim  width of a query/key head and of a value head
    kv_rank, rope_dim     latent width and rotary width of multi-head latent attention, 0 for none
    window                sliding window in tokens, 0 for none
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_rank: int = 0
    rope_dim: int = 0
    window: int = 0

    @property
    def kv_values_per_token(self) -> int:
        """Numbers kept in the KV cache per token; latent attention shares one over all heads."""
        if self.kv_rank:
            return self.kv_rank + self.rope_dim
        return self.n_kv_heads * (self.head_dim + self.v_head_dim)


def gemm(
    device: Device,
    shape: tuple[Work, Work, Work],
    dtype: str = "bf16",
    weight_bits: float | None = None,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> Cost:
    """C[m, n] = A[m, k] B[k, n]; shape is (m, n, k), B holds the weights.

    weight_bits  bits stored per weight, those of dtype when None
    """
    m, n, k = (np.asarray(side, dtype=np.float64) for side in shape)
    bits = dtype_bits(dtype)
    share = efficiency.compute_share_8bit if bits <= 8 else efficiency.compute_share
    roof = Roof(
        device.launch_s,
        device.memory_bytes_per_s * efficiency.memory_share,
        device.peak_flop_per_s(dtype) * share,
        bits,
    )
    stored = (bits if weight_bits is None else weight_bits) / 8
    n_bytes = (m * k * bits / 8 + n * k * stored + m * n * OUTPUT_BYTES) * (m > 0)
    return roofline(device, roof, 2.0 * m * n * k, n_bytes)


def routed_experts(
    device: Device,
    shape: ExpertShape,
    work: tuple[Work, Work],
    weight_bits: float = 8,
    compute_dtype: str = "fp8",
) -> Cost:
    """The routed experts of a layer on one rank, by ExpertLaw with default efficiencies.

    work  (token copies, distinct experts with a token), arrays of one shape
    """
    tokens, distinct = (np.asarray(part, dtype=np.float64) for part in work)
    law = expert_law(device, shape, weight_bits, compute_dtype)
    seconds = expert_seconds(law, tokens, distinct)
    width = shape.hidden * (dtype_bits(compute_dtype) / 8 + OUTPUT_BYTES)
    n_bytes = distinct * shape.n_params * weight_bits / 8 + tokens * width
    flops = 2.0 * shape.n_params * tokens + 0.0 * distinct
    spent = device_joules(device, seconds, n_bytes, flops, dtype_bits(compute_dtype))
    return Cost(seconds, spent, n_bytes, flops, "fitted")


def attention_prefill(
    device: Device,
    shape: AttentionShape,
    work: tuple[Work, Work],
    dtype: str = "bf16",
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> Cost:
    """Causal attention of new tokens, scores and values only (projections are GEMMs).

    work    (new tokens of a sequence, tokens already in its cache); one sequence per element
    source  FLOPs 2 n (d_qk + d_v) per visible pair and head; a token sees itself, all before it
            in the cache and half the new ones, at most the window
    """
    new, cached = (np.asarray(part, dtype=np.float64) for part in work)
    seen = cached + (new + 1) / 2
    if shape.window:
        seen = np.minimum(seen, shape.window)
    pairs = new * seen * shape.n_heads
    flops = 2.0 * pairs * (shape.head_dim + shape.v_head_dim)
    operand = dtype_bits(dtype) / 8
    queries = new * shape.n_heads * (shape.head_dim * operand + shape.v_head_dim * OUTPUT_BYTES)
    keys = shape.n_kv_heads * (shape.head_dim + shape.v_head_dim) * operand
    span = np.minimum(cached + new, new + shape.window) if shape.window else cached + new
    roof = _attention_roof(device, dtype, efficiency)
    return roofline(device, roof, flops, (queries + span * keys) * (new > 0))


def attention_decode(
    device: Device,
    shape: AttentionShape,
    work: tuple[Work, Work],
    dtype: str = "bf16",
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> Cost:
    """One new token for each sequence, reading its KV cache (latent attention: absorbed form).

    work    (sequences, cached tokens of each, on average)
    source  KV bytes once per sequence; FLOPs 2 (d_qk + d_v) per head and cached token, with
            d_qk = kv_rank + rope_dim and d_v = kv_rank in the absorbed form
    """
    sequences, context = (np.asarray(part, dtype=np.float64) for part in work)
    if shape.window:
        context = np.minimum(context, shape.window)
    d_qk, d_v = shape.head_dim, shape.v_head_dim
    if shape.kv_rank:
        d_qk, d_v = shape.kv_rank + shape.rope_dim, shape.kv_rank
    flops = 2.0 * sequences * context * shape.n_heads * (d_qk + d_v)
    operand = dtype_bits(dtype) / 8
    queries = sequences * shape.n_heads * (d_qk * operand + d_v * OUTPUT_BYTES)
    n_bytes = sequences * context * shape.kv_values_per_token * operand + queries
    return roofline(device, _attention_roof(device, dtype, efficiency), flops, n_bytes)


def gate(
    device: Device,
    tokens: Work,
    sides: tuple[int, int],
    top_k: int,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> Cost:
    """Router: scores of every expert in 16 bits, then top-k.

    sides  (hidden, n_experts)
    """
    hidden, n_experts = sides
    wide = "bf16" if "bf16" in device.flop_per_s else "fp16"
    scores = gemm(device, (tokens, n_experts, hidden), wide, None, efficiency)
    count = np.asarray(tokens, dtype=np.float64)
    return scores + elementwise(device, count * (4.0 * n_experts + 8.0 * top_k), efficiency)


def permute(
    device: Device,
    copies: Work,
    hidden: int,
    bits: int = 16,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> Cost:
    """Gather token copies in expert order (or scatter and add them back): read and write each."""
    n_bytes = np.asarray(copies, dtype=np.float64) * hidden * bits / 8 * 2
    return elementwise(device, n_bytes, efficiency)


def elementwise(device: Device, n_bytes: Work, efficiency: Efficiency = DEFAULT_EFFICIENCY) -> Cost:
    """A memory-bound operation (norm, activation, residual) that moves n_bytes in all."""
    fixed_s = max(device.launch_s, efficiency.op_s)
    rate = device.memory_bytes_per_s * efficiency.memory_share
    return roofline(device, Roof(fixed_s, rate, np.inf), 0.0, n_bytes)


def copy(link: Link, n_bytes: Work) -> Cost:
    """Move n_bytes over a link, one direction, one transfer per element; 0 bytes cost 0 s."""
    size = np.asarray(n_bytes, dtype=np.float64)
    seconds = np.where(size > 0, link.latency_s + size / link.bytes_per_s, 0.0)
    return Cost(seconds, size * link.energy_j_per_byte, size.copy(), np.zeros_like(size))


def _attention_roof(device: Device, dtype: str, efficiency: Efficiency) -> Roof:
    return Roof(
        efficiency.attention_fixed_s,
        device.memory_bytes_per_s * efficiency.attention_memory_share,
        device.peak_flop_per_s(dtype) * efficiency.attention_compute_share,
        dtype_bits(dtype),
    )
