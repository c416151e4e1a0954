"""What one step of a model costs on one rank outside the routed experts, part by part.

All ranks hold equally many tokens of equal context, so these parts take equally long on each.
Dispatch, experts and combine differ by rank and come from `planners/step_time.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hwmodels.collective import AllToAllKernel, ring_collective
from hwmodels.cost import Cost, Work
from hwmodels.operators import (
    AttentionShape,
    attention_decode,
    attention_prefill,
    elementwise,
    gate,
    gemm,
)
from hwmodels.system import System
from moesim.errors import SimulationError
from planners.dispatch import Mode, Rule
from planners.step_time import Precision, default_precision
from traces.model import ModelSpec

ACTIVATION_BYTES = 2  # hidden states are bf16 between operators


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step runs; the same for all its ranks.

    tokens_per_rank    tokens that start on every rank (decode: sequences)
    phase              "decode" or "prefill"
    context            decode: cached tokens of every sequence; prefill: tokens of every prompt
    attention_ranks    ranks that split the heads of one attention; 1 is data-parallel attention
    two_batch_overlap  two half batches; one computes while the other communicates
    shared_overlap     shared experts run while tokens are dispatched
    mode, rule         what travels and which replica serves (planners/dispatch.py)
    precision          number formats, the device's default when None
    lm_head            price the output projection
    """

    tokens_per_rank: int
    phase: Literal["decode", "prefill"] = "decode"
    context: int = 2048
    attention_ranks: int = 1
    two_batch_overlap: bool = False
    shared_overlap: bool = False
    mode: Mode = "device"
    rule: Rule = "even"
    precision: Precision | None = None
    lm_head: bool = True

    def __post_init__(self) -> None:
        least = 2 if self.two_batch_overlap else 1
        if self.tokens_per_rank < least:
            raise SimulationError(
                f"tokens_per_rank={self.tokens_per_rank}, expected at least {least}"
            )
        if self.phase not in ("decode", "prefill"):
            raise SimulationError(f"phase={self.phase!r}, expected 'decode' or 'prefill'")
        if self.context < 1 or self.attention_ranks < 1:
            raise SimulationError(
                f"context={self.context} and attention_ranks={self.attention_ranks} must be >= 1"
            )

    @property
    def kernel(self) -> AllToAllKernel:
        """All-to-all kernel of the phase."""
        return "low_latency" if self.phase == "decode" else "normal"


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds on every rank for one batch.

    attention_s  float64[n_layers], projections and all-reduce included
    norm_s       both norms with their residuals, of one layer
    gate_s, shared_s  router and shared experts of one MoE layer
    dense_s      feed-forward of one dense layer
    head_s       output projection of the step
    """

    attention_s: npt.NDArray[np.float64]
    norm_s: float
    gate_s: float
    shared_s: float
    dense_s: float
    head_s: float


def layer_costs(
    model: ModelSpec, system: System, options: StepOptions, tokens: float | None = None
) -> LayerCosts:
    """Costs of a batch of `tokens` per rank (options.tokens_per_rank when None)."""
    count = float(options.tokens_per_rank if tokens is None else tokens)
    device, hidden = system.device, model.hidden_size
    dtype = (options.precision or default_precision(device)).compute_dtype
    norms = elementwise(device, count * hidden * ACTIVATION_BYTES * 4)  # 2 reads, 2 writes
    router = gate(device, count, (hidden, model.n_experts), model.top_k)
    return LayerCosts(
        attention_s=attention_seconds(model, system, options, count),
        norm_s=2 * float(norms.seconds),
        gate_s=float(router.seconds),
        shared_s=_ffn_s(model, system, model.shared_intermediate_size, count, dtype),
        dense_s=_ffn_s(model, system, model.dense_intermediate_size, count, dtype),
        head_s=_head_s(model, system, options, count) if options.lm_head else 0.0,
    )


def attention_seconds(
    model: ModelSpec, system: System, options: StepOptions, tokens: float
) -> npt.NDArray[np.float64]:
    """float64[n_layers]: attention of every layer on one rank.

    Sliding layers, and layers that keep no KV cache (priced by their projections alone), are
    spread evenly over the model, since a ModelSpec says only how many there are.
    """
    width = options.attention_ranks
    if model.attention.n_heads % width or system.n_devices % width:
        raise SimulationError(
            f"attention_ranks={width} must divide {model.attention.n_heads} heads and"
            f" {system.n_devices} devices"
        )
    group_tokens = tokens * width
    fixed = projections(model, system, options, group_tokens)
    if width > 1:
        n_bytes = group_tokens * model.hidden_size * ACTIVATION_BYTES
        fixed = fixed + ring_collective(system, "all_reduce", n_bytes, width)
    full = _core(model, system, options, group_tokens, 0)
    windowed = _core(model, system, options, group_tokens, model.attention.sliding_window)
    is_sliding = _spread(model.attention.n_sliding_layers, model.n_layers)
    has_cache = _spread(model.kv_layers, model.n_layers)
    core = np.where(is_sliding, float(windowed.seconds), float(full.seconds))
    return np.asarray(float(fixed.seconds) + np.where(has_cache, core, 0.0))


def _core(
    model: ModelSpec, system: System, options: StepOptions, tokens: float, window: int
) -> Cost:
    """Scores and values of one layer for the tokens of an attention group, on one rank."""
    attention, width = model.attention, options.attention_ranks
    shape = AttentionShape(
        n_heads=attention.n_heads // width,
        n_kv_heads=max(1, attention.n_kv_heads // width),
        head_dim=attention.head_dim,
        v_head_dim=attention.v_head_dim,
        kv_rank=attention.kv_lora_rank,
        rope_dim=attention.qk_rope_dim,
        window=window,
    )
    dtype = _wide(system)
    if options.phase == "decode":
        return attention_decode(system.device, shape, (tokens, options.context), dtype)
    prompts = tokens / options.context
    one = attention_prefill(system.device, shape, (options.context, 0.0), dtype)
    return Cost(
        one.seconds * prompts, one.joules * prompts, one.bytes * prompts, one.flops * prompts
    )


def projections(model: ModelSpec, system: System, options: StepOptions, tokens: Work) -> Cost:
    """All matrix multiplications of one attention layer on one rank.

    source  handbook's counting formulas; latent attention absorbs its up-projections in decode
            (two small batched products per head) and applies them in prefill
    """
    attention, device, hidden = model.attention, system.device, model.hidden_size
    heads = attention.n_heads // options.attention_ranks
    dtype = (options.precision or default_precision(device)).compute_dtype
    query = heads * attention.head_dim
    if not attention.kv_lora_rank:
        kv_heads = max(1, attention.n_kv_heads // options.attention_ranks)
        fused = query + kv_heads * (attention.head_dim + attention.v_head_dim)
        total = gemm(device, (tokens, fused, hidden), dtype)
        return total + gemm(device, (tokens, hidden, heads * attention.v_head_dim), dtype)
    latent = attention.kv_lora_rank
    down = attention.q_lora_rank + latent + attention.qk_rope_dim
    total = gemm(device, (tokens, down, hidden), dtype)
    total = total + gemm(device, (tokens, query, attention.q_lora_rank or hidden), dtype)
    up = (attention.qk_nope_dim, attention.v_head_dim)
    if options.phase == "decode":
        for side in up:
            total = total + gemm(device, (tokens, heads * side, latent), _wide(system))
    else:
        total = total + gemm(device, (tokens, heads * sum(up), latent), dtype)
    return total + gemm(device, (tokens, hidden, heads * attention.v_head_dim), dtype)


def _ffn_s(model: ModelSpec, system: System, width: int, tokens: float, dtype: str) -> float:
    """Seconds of a feed-forward of a given width (0: none)."""
    return float(feed_forward(model, system, width, tokens, dtype).seconds) if width else 0.0


def feed_forward(model: ModelSpec, system: System, width: int, tokens: Work, dtype: str) -> Cost:
    """A dense feed-forward of a given width on one rank: up (and gate), then down."""
    device, hidden = system.device, model.hidden_size
    up = gemm(device, (tokens, (model.ffn_matrices - 1) * width, hidden), dtype)
    activation = elementwise(device, tokens * width * ACTIVATION_BYTES * model.ffn_matrices)
    return up + activation + gemm(device, (tokens, hidden, width), dtype)


def _head_s(model: ModelSpec, system: System, options: StepOptions, tokens: float) -> float:
    """Output projection: the ranks of a node split the vocabulary; prefill needs last tokens."""
    ranks = min(system.devices_per_node, system.n_devices)
    rows = tokens * ranks
    if options.phase == "prefill":
        rows = max(1.0, rows / options.context)
    shape = (rows, model.vocab_size / ranks, model.hidden_size)
    return float(gemm(system.device, shape, _wide(system)).seconds)


def _wide(system: System) -> str:
    """The device's 16-bit dtype."""
    return "bf16" if "bf16" in system.device.flop_per_s else "fp16"


def _spread(n_marked: int, n: int) -> npt.NDArray[np.bool_]:
    """bool[n] with n_marked True, spread evenly."""
    place = np.arange(n + 1) * min(n_marked, n) // n
    return np.asarray(np.diff(place) > 0)
