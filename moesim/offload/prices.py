"""What every layer-step of an offloaded model costs, part by part, on one box.

Seconds come from the operator formulas (dense part, on the device) and from `host_costs.py`
(experts on either side, copies, drives). All of it is tabulated once: dense parts by pass, experts
by token copies, so that the lowering only looks up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box
from hwmodels.collective import ring_collective
from hwmodels.cost import DEFAULT_EFFICIENCY, Cost, ExpertShape
from hwmodels.host_costs import gpu_expert_seconds, host_bytes_per_s, host_flop_per_s
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
from moesim.lower.layer_costs import ACTIVATION_BYTES, StepOptions, feed_forward, projections
from moesim.policies.dispatch import UnitTimes
from planners.step_time import BF16
from traces.counting import expert_bytes
from traces.layer_steps import ForwardPasses, LayerSteps
from traces.model import ModelSpec
from traces.routing import DECODE

Seconds = npt.NDArray[np.float64]

EXPERT_START_S = 10e-6  # assumed: four kernels of one expert at 2.5 us, the period of launches


@dataclass(frozen=True, slots=True)
class Weights:
    """Number formats of the weights and how devices share the model.

    expert_bits  bits stored per weight of a routed expert, scales included
    low_bits     of its low-bit copy, 0 for none
    dense_bits   of everything else: 16, or 8 and below where the device multiplies FP8
    split        "tensor": every matrix over all devices; "layers": whole layers in a row
    """

    expert_bits: float = 16.0
    low_bits: float = 0.0
    dense_bits: float = 16.0
    split: str = "tensor"

    def __post_init__(self) -> None:
        if self.split not in ("tensor", "layers"):
            raise SimulationError(f"split={self.split!r}, expected 'tensor' or 'layers'")
        if not 0 <= self.low_bits < self.expert_bits <= 32:
            raise SimulationError(
                f"low_bits={self.low_bits}, expert_bits={self.expert_bits}: expected"
                " 0 <= low < expert <= 32"
            )


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds and bytes of the work of a run; tables over token copies start at 0 tokens.

    first_s      float64[n_passes], layers without routed experts, once a pass before all others
    before_s     float64[n_passes], device work of a MoE layer up to and with its gate
    after_s      float64[n_passes], its shared experts, beside the routed ones
    tail_s       float64[n_passes], the output projection, once a pass
    gpu_s        float64[most + 1], one resident expert on the device, by token copies
    gpu_fixed_s  once for the resident experts of a layer-step, launched together
    gpu_start_s  once for an expert that starts alone, after its load
    cpu_s        float64[most + 1], arithmetic of one expert on the CPU
    cpu_fixed_s  once per layer-step with any expert on the CPU, hand-over included
    cpu_bytes_per_s  at which the CPU alone reads expert weights
    expert_bytes  a full copy; unit_bytes of one unit of the cache's slots
    """

    box: Box
    first_s: Seconds
    before_s: Seconds
    after_s: Seconds
    tail_s: Seconds
    gpu_s: Seconds
    gpu_fixed_s: float
    gpu_start_s: float
    cpu_s: Seconds
    cpu_fixed_s: float
    cpu_bytes_per_s: float
    expert_bytes: int
    unit_bytes: float
    n_gpus: int = 1
    links: int = 1

    def unit_times(self) -> UnitTimes:
        """What a scheduler estimates from: the same prices, without contention."""
        weights_s = self.expert_bytes / self.cpu_bytes_per_s
        cpu_s = np.maximum(self.cpu_s, np.where(np.arange(len(self.cpu_s)) > 0, weights_s, 0.0))
        load_s = self.box.copy_s + self.expert_bytes / (self.box.copy_bytes_per_s * self.links)
        return UnitTimes(self.gpu_s.tolist(), cpu_s.tolist(), self.cpu_fixed_s, load_s)


def prices(model: ModelSpec, box: Box, work: LayerSteps, weights: Weights | None = None) -> Prices:
    """Prices of a trace's layer-steps on a box.

    raises  SimulationError when the trace does not fit the model, or the host cannot compute
    """
    form = weights or Weights()
    if (work.n_experts, work.top_k) != (model.n_experts, model.top_k):
        raise SimulationError(
            f"the trace has {work.n_experts} experts, top-{work.top_k}; {model.name} has"
            f" {model.n_experts}, top-{model.top_k}"
        )
    most = int(work.tokens.max(initial=1))
    shape = ExpertShape(model.hidden_size, model.expert_intermediate_size, model.ffn_matrices)
    links = box.n_devices if form.split == "tensor" else 1
    tokens = np.arange(most + 1)
    first, before, after, tail = _dense_seconds(model, box, work, form)
    full = expert_bytes(model, form.expert_bits)
    return Prices(
        box=box,
        first_s=first,
        before_s=before,
        after_s=after,
        tail_s=tail,
        gpu_s=gpu_expert_seconds(box.device, shape, tokens, form.expert_bits, box.efficiency)
        / links,
        gpu_fixed_s=DEFAULT_EFFICIENCY.expert_fixed_s,
        gpu_start_s=EXPERT_START_S,
        cpu_s=_cpu_arithmetic(box, shape, tokens),
        cpu_fixed_s=box.efficiency.dispatch_s + box.efficiency.handshake_s,
        cpu_bytes_per_s=host_bytes_per_s(box.host, box.efficiency) if box.host else 1.0,
        expert_bytes=full,
        unit_bytes=full / units_of(form)[1],
        n_gpus=box.n_devices if form.split == "layers" else 1,
        links=links,
    )


def units_of(weights: Weights) -> tuple[int, int]:
    """Sizes of a low-bit and a full copy in units of slots: (0, 1) without low-bit copies."""
    if not weights.low_bits:
        return 0, 1
    scale = 4  # quarter bits are the finest in use
    return round(weights.low_bits * scale), round(weights.expert_bits * scale)


def _cpu_arithmetic(box: Box, shape: ExpertShape, tokens: npt.NDArray[np.int64]) -> Seconds:
    """Seconds of multiplying alone; reading the weights is drawn from the memory."""
    if box.host is None:
        return np.full(len(tokens), np.inf)
    flops = 2.0 * shape.n_params * tokens
    return np.asarray(flops / host_flop_per_s(box.host, box.efficiency))


def _dense_seconds(
    model: ModelSpec, box: Box, work: LayerSteps, form: Weights
) -> tuple[Seconds, Seconds, Seconds, Seconds]:
    """first_s, before_s, after_s and tail_s of Prices.

    A trace may hold some of the model's MoE layers only: the dense layers then count by the share
    captured, so that a pass costs that share of the model.
    """
    attention, dense, shared, router, head = _parts(model, box, work.passes, form)
    n_dense = model.n_layers - model.n_moe_layers
    captured_share = work.n_layers / max(1, model.n_moe_layers)
    first = (attention + dense) * n_dense * captured_share
    return first, attention + router, shared, head


def _parts(model: ModelSpec, box: Box, passes: ForwardPasses, form: Weights) -> tuple[Seconds, ...]:
    """float64[n_passes] each: attention with norms, dense FFN, shared experts, router, head."""
    tokens = passes.tokens.astype(np.float64)
    decode = passes.phase == DECODE
    ranks = box.n_devices if form.split == "tensor" else 1
    system = box.system
    hidden = model.hidden_size
    dtype = _dtype(system, form.dense_bits)
    norms = elementwise(system.device, tokens * hidden * ACTIVATION_BYTES * 4).seconds * 2
    attention = norms + np.where(
        decode,
        _attention(model, system, passes, (ranks, dtype, "decode")),
        _attention(model, system, passes, (ranks, dtype, "prefill")),
    )
    if ranks > 1:
        moved = tokens * hidden * ACTIVATION_BYTES
        attention = attention + 2 * ring_collective(system, "all_reduce", moved, ranks).seconds
    rows = np.where(decode, tokens, passes.requests)
    wide = _dtype(system, 16)
    head = gemm(system.device, (rows, model.vocab_size / ranks, hidden), wide).seconds
    router = gate(system.device, tokens, (hidden, model.n_experts), model.top_k).seconds
    return (
        attention,
        _ffn(model, system, model.dense_intermediate_size / ranks, (tokens, dtype)),
        _ffn(model, system, model.shared_intermediate_size / ranks, (tokens, dtype)),
        router,
        head,
    )


def _attention(
    model: ModelSpec, system: System, passes: ForwardPasses, how: tuple[int, str, str]
) -> Seconds:
    """float64[n_passes]: mean seconds of one layer's attention, projections included."""
    ranks, dtype, phase = how
    tokens = passes.tokens.astype(np.float64)
    a = model.attention
    options = StepOptions(
        tokens_per_rank=1,
        phase="decode" if phase == "decode" else "prefill",
        attention_ranks=ranks,
        precision=replace(BF16, compute_dtype=dtype),
    )
    fixed = projections(model, system, options, tokens).seconds
    full = _scores(model, system, passes, (ranks, phase, 0))
    if not a.sliding_window:
        return fixed + full * (model.kv_layers / model.n_layers)
    windowed = _scores(model, system, passes, (ranks, phase, a.sliding_window))
    slid = a.n_sliding_layers / model.n_layers
    return fixed + windowed * slid + full * (model.kv_layers / model.n_layers - slid)


def _scores(
    model: ModelSpec, system: System, passes: ForwardPasses, how: tuple[int, str, int]
) -> Seconds:
    """float64[n_passes]: scores and values of one layer."""
    ranks, phase, window = how
    a = model.attention
    shape = AttentionShape(
        n_heads=max(1, a.n_heads // ranks),
        n_kv_heads=max(1, a.n_kv_heads // ranks),
        head_dim=a.head_dim,
        v_head_dim=a.v_head_dim,
        kv_rank=a.kv_lora_rank,
        rope_dim=a.qk_rope_dim,
        window=window,
    )
    dtype = _dtype(system, 16)
    requests = passes.requests.astype(np.float64)
    context = passes.context + 1.0
    if phase == "decode":
        return attention_decode(system.device, shape, (requests, context), dtype).seconds
    new = passes.tokens / requests
    cost: Cost = attention_prefill(system.device, shape, (new, passes.context), dtype)
    return np.asarray(cost.seconds * requests)


def _ffn(model: ModelSpec, system: System, width: float, how: tuple[Seconds, str]) -> Seconds:
    tokens, dtype = how
    if not width:
        return np.zeros(len(tokens))
    return feed_forward(model, system, int(width), tokens, dtype).seconds


def _dtype(system: System, bits: float) -> str:
    known = system.device.flop_per_s
    if bits <= 8 and "fp8" in known:
        return "fp8"
    return "bf16" if "bf16" in known else "fp16"
