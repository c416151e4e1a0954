"""Predicted seconds of the MoE part of a step: dispatch, busiest rank's experts, combine.

`laws_for` turns a model and a system into constants; `moe_seconds` applies them to the counts of
`dispatch.py`. Ranks meet after every part, so each part lasts as long as its slowest rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwmodels.collective import AllToAllKernel, AllToAllLaw, all_to_all_law, all_to_all_seconds
from hwmodels.cost import (
    DEFAULT_EFFICIENCY,
    Efficiency,
    ExpertLaw,
    ExpertShape,
    expert_law,
    expert_seconds,
)
from hwmodels.device import Device
from hwmodels.system import System
from planners.dispatch import Counts, DispatchCounts
from planners.errors import PlanError
from planners.plan import Placement
from traces.model import ModelSpec

SCALE_BLOCK = 128  # hidden values that share one 4-byte scale when a copy is sent in 8 bits or less


@dataclass(frozen=True, slots=True)
class Precision:
    """Number formats of the MoE part.

    weight_bits    bits stored per expert weight
    compute_dtype  operand type of the experts' arithmetic
    dispatch_bits  bits per hidden value sent to the experts; 8 or less adds a scale per 128 values
    combine_bits   bits per hidden value sent back
    """

    weight_bits: float = 8
    compute_dtype: str = "fp8"
    dispatch_bits: int = 8
    combine_bits: int = 16


BF16 = Precision(16, "bf16", 16, 16)


@dataclass(frozen=True, slots=True)
class MoeLaws:
    """All constants of a MoE layer's time.

    dispatch_bytes, combine_bytes  bytes of one token copy on the way out and back
    """

    experts: ExpertLaw
    all_to_all: AllToAllLaw
    dispatch_bytes: float
    combine_bytes: float


@dataclass(frozen=True, slots=True)
class MoeParts:
    """Seconds of the three parts, float64[..., moe_layers] each."""

    dispatch_s: Counts
    experts_s: Counts
    combine_s: Counts

    @property
    def total_s(self) -> Counts:
        """float64[..., moe_layers]: the three one after the other."""
        return self.dispatch_s + self.experts_s + self.combine_s


def default_precision(device: Device) -> Precision:
    """FP8 experts, FP8 out, BF16 back where the device multiplies FP8; 16 bits elsewhere."""
    if "fp8" in device.flop_per_s:
        return Precision()
    if "bf16" in device.flop_per_s:
        return BF16
    return Precision(16, "fp16", 16, 16)


def copy_bytes(hidden: int, bits: int) -> float:
    """Bytes of one token copy: hidden values, and a 4-byte scale per 128 of them at <= 8 bits."""
    scales = 4.0 * -(-hidden // SCALE_BLOCK) if bits <= 8 else 0.0
    return hidden * bits / 8 + scales


def laws_for(
    model: ModelSpec,
    system: System,
    precision: Precision | None = None,
    kernel: AllToAllKernel = "low_latency",
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> MoeLaws:
    """The laws of a model on a system.

    precision  default_precision of the device when None
    kernel     "low_latency" for decode, "normal" for prefill
    raises     HardwareError when the device has no peak for precision.compute_dtype
    """
    chosen = precision or default_precision(system.device)
    shape = ExpertShape(model.hidden_size, model.expert_intermediate_size, model.ffn_matrices)
    return MoeLaws(
        expert_law(system.device, shape, chosen.weight_bits, chosen.compute_dtype, efficiency),
        all_to_all_law(system, kernel),
        copy_bytes(model.hidden_size, chosen.dispatch_bits),
        copy_bytes(model.hidden_size, chosen.combine_bits),
    )


def check_system(placement: Placement, system: System) -> None:
    """PlanError unless the placement's ranks and nodes are those of the system."""
    ranks, per_node = placement.n_ranks, placement.ranks_per_node
    if ranks != system.n_devices:
        raise PlanError(
            f"placement has n_ranks={ranks}, system {system.name} has {system.n_devices} devices"
        )
    if per_node != min(system.devices_per_node, ranks):
        raise PlanError(
            f"placement has ranks_per_node={per_node}, system {system.name} has"
            f" {system.devices_per_node} devices per node"
        )


def moe_parts(counts: DispatchCounts, laws: MoeLaws) -> MoeParts:
    """Seconds of dispatch, experts and combine of every layer (and step, if counts has steps)."""
    per_rank = expert_seconds(laws.experts, counts.rank_tokens, counts.rank_distinct)
    sent = (counts.up_send, counts.up_recv, counts.out_send, counts.out_recv)
    out, back = laws.dispatch_bytes, laws.combine_bytes
    return MoeParts(
        all_to_all_seconds(laws.all_to_all, *(copies * out for copies in sent)),
        np.asarray(per_rank.max(axis=-1)),
        all_to_all_seconds(laws.all_to_all, *(copies * back for copies in sent)),
    )


def moe_seconds(counts: DispatchCounts, laws: MoeLaws) -> Counts:
    """float64[..., moe_layers]: seconds of the MoE part of every layer, one after the other."""
    return moe_parts(counts, laws).total_s


def step_seconds_from_counts(counts: DispatchCounts, laws: MoeLaws) -> npt.NDArray[np.float64]:
    """float64[3, steps, moe_layers]: moe_parts in one compiled pass, for very many steps.

    counts  with a leading steps axis
    returns seconds of dispatch, experts and combine, equal to moe_parts
    """
    from planners.step_kernel import step_seconds

    if counts.rank_tokens.ndim != 3:
        raise PlanError(
            f"counts: rank_tokens has shape {counts.rank_tokens.shape}, expected"
            " [steps, moe_layers, n_ranks]"
        )
    experts, wire = laws.experts, laws.all_to_all
    constants = np.array(
        [
            experts.launch_s,
            experts.weight_s,
            experts.compute_s,
            experts.activation_s,
            wire.latency_s,
            wire.up_s_per_byte,
            wire.out_s_per_byte,
            laws.dispatch_bytes,
            laws.combine_bytes,
        ]
    )
    out = np.empty((3, *counts.rank_tokens.shape[:2]), dtype=np.float64)
    work = (counts.rank_tokens, counts.rank_distinct)
    sent = (counts.up_send, counts.up_recv, counts.out_send, counts.out_recv)
    step_seconds(work, sent, constants, out)
    return out
