"""What an operation costs on a device: a roofline with named constants, over arrays of work.

A cost is fixed time plus the larger of memory time and compute time. Every constant is a field
of Efficiency, with its source in EFFICIENCY_SOURCES, so that fitted curves can take their place.
The routed experts of one rank have a law of their own (ExpertLaw), four constants that the
planner, the step-time model and the simulator share. Other operators are in `operators.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from hwmodels.device import Device, Figure
from hwmodels.energy import energy_model
from hwmodels.errors import HardwareError

CostKind = Literal["measured", "fitted", "analytic", "extrapolated", "assumed"]
Work = float | npt.NDArray[np.float64] | npt.NDArray[np.int64]

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {"fp32": 32, "tf32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "fp4": 4, "int4": 4}
)


def dtype_bits(dtype: str) -> int:
    """Bits of one number of a dtype name; the error lists the known ones."""
    if dtype not in DTYPE_BITS:
        raise HardwareError(f"dtype {dtype!r} is unknown, known: {', '.join(DTYPE_BITS)}")
    return DTYPE_BITS[dtype]


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of an array of operations; the four arrays are float64 of one shape.

    seconds  duration of each operation alone on the device
    joules   energy drawn (`energy.py`: at most board power while it runs), NaN where the board
             power is not known
    bytes    bytes moved through the memory or link that the operation uses
    flops    floating-point operations, a multiply-add counted as two
    kind     how the seconds are known
    """

    seconds: npt.NDArray[np.float64]
    joules: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]
    flops: npt.NDArray[np.float64]
    kind: CostKind = "analytic"

    def __add__(self, other: Cost) -> Cost:
        """One operation after the other; the kind of the less certain of the two."""
        return Cost(
            self.seconds + other.seconds,
            self.joules + other.joules,
            self.bytes + other.bytes,
            self.flops + other.flops,
            max(self.kind, other.kind, key=_CERTAINTY.index),
        )


_CERTAINTY: tuple[CostKind, ...] = ("measured", "fitted", "analytic", "extrapolated", "assumed")


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of peak that operations reach, and fixed seconds; sources in EFFICIENCY_SOURCES.

    memory_share             of memory bandwidth, any memory-bound operation
    compute_share            of peak FLOP/s, one large multiplication in 16 bits or more
    compute_share_8bit       the same in 8 bits or less
    op_s                     least fixed seconds of a memory-bound operation, launch included
    attention_fixed_s        fixed seconds of an attention kernel, launch included
    attention_memory_share   of memory bandwidth, reading the KV cache
    attention_compute_share  of peak FLOP/s, attention scores and values
    expert_fixed_s           fixed seconds of the routed experts of a layer, launches included
    expert_memory_share      of memory bandwidth, reading expert weights
    expert_compute_share     of peak FLOP/s, grouped matrix multiplication in 16 bits or more
    expert_compute_share_8bit  the same in 8 bits or less
    expert_activation_share  of memory bandwidth, inputs and outputs of the experts
    """

    memory_share: float = 0.80
    compute_share: float = 0.80
    compute_share_8bit: float = 0.55
    op_s: float = 3e-6
    attention_fixed_s: float = 10e-6
    attention_memory_share: float = 0.85
    attention_compute_share: float = 0.58
    expert_fixed_s: float = 35e-6
    expert_memory_share: float = 0.88
    expert_compute_share: float = 0.92
    expert_compute_share_8bit: float = 0.39
    expert_activation_share: float = 0.27

    def __post_init__(self) -> None:
        for field in EFFICIENCY_SOURCES:
            value = getattr(self, field)
            if "_share" in field and not 0 < value <= 1:
                raise HardwareError(f"efficiency {field}={value} must be in (0, 1]")
            if field.endswith("_s") and not value >= 0:
                raise HardwareError(f"efficiency {field}={value} must be >= 0")


_LINEAR = "median share of large linear layers on one H100 SXM in aiconfigurator's measured rows"
_ATTENTION = "medians over attention kernels on one H100 SXM in aiconfigurator's measured rows"
_FUSED_MOE = (
    "least log error on one H100 SXM, balanced and skewed rows without expert parallelism: vLLM"
    " 0.24.0 Triton fused experts in BF16 and FP8 blocks, SGLang 0.5.14 Triton in FP8 blocks,"
    " TensorRT-LLM 1.3.0rc20 CUTLASS in BF16; mean error 9 to 15 %, median 5 to 8 % by kernel"
)
EFFICIENCY_SOURCES: Mapping[str, Figure] = MappingProxyType(
    {
        "memory_share": Figure(0.80, "derived", _LINEAR + "; aiconfigurator uses 0.8 too"),
        "compute_share": Figure(0.80, "derived", _LINEAR, when="0.73 to 0.80 by framework"),
        "compute_share_8bit": Figure(0.55, "derived", _LINEAR, when="0.50 to 0.63 by kernel"),
        "op_s": Figure(3e-6, "assumed", "ai-dynamo/aiconfigurator systems/*.yaml"),
        "attention_fixed_s": Figure(10e-6, "derived", _ATTENTION, when="8 to 16 us by kernel"),
        "attention_memory_share": Figure(0.85, "derived", _ATTENTION, when="0.77 to 0.89"),
        "attention_compute_share": Figure(0.58, "derived", _ATTENTION, when="0.53 to 0.65"),
        "expert_fixed_s": Figure(35e-6, "derived", _FUSED_MOE),
        "expert_memory_share": Figure(0.88, "derived", _FUSED_MOE),
        "expert_compute_share": Figure(0.92, "derived", _FUSED_MOE),
        "expert_compute_share_8bit": Figure(0.39, "derived", _FUSED_MOE),
        "expert_activation_share": Figure(0.27, "derived", _FUSED_MOE),
    }
)
DEFAULT_EFFICIENCY = Efficiency()


@dataclass(frozen=True, slots=True)
class Roof:
    """What limits one kind of operation: fixed seconds, bytes/s of memory, FLOP/s.

    bits  of the operands that are multiplied, for their energy
    """

    fixed_s: float
    bytes_per_s: float
    flop_per_s: float
    bits: float = 16


def roofline(device: Device, roof: Roof, flops: Work, n_bytes: Work) -> Cost:
    """fixed_s + max(bytes / bytes_per_s, flops / flop_per_s) for each operation; 0 for no work.

    flops, n_bytes  arrays of one shape, or that broadcast to one
    """
    work, moved = np.broadcast_arrays(
        np.asarray(flops, dtype=np.float64), np.asarray(n_bytes, dtype=np.float64)
    )
    busy_s = np.maximum(work / roof.flop_per_s, moved / roof.bytes_per_s)
    seconds = np.where((work > 0) | (moved > 0), roof.fixed_s + busy_s, 0.0)
    spent = device_joules(device, seconds, moved, work, roof.bits)
    return Cost(seconds, spent, moved.copy(), work.copy())


def device_joules(
    device: Device,
    seconds: npt.NDArray[np.float64],
    n_bytes: npt.NDArray[np.float64],
    flops: npt.NDArray[np.float64],
    bits: float,
) -> npt.NDArray[np.float64]:
    """Joules of operations that follow one another (`energy.py`), NaN without a board power."""
    model = energy_model(device)
    if model is None:
        return np.full(seconds.shape, np.nan)
    return model.joules(seconds, n_bytes, flops, bits)


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Shape of one expert: matrices * hidden * intermediate weights (3 matrices with a gate)."""

    hidden: int
    intermediate: int
    matrices: int = 3

    @property
    def n_params(self) -> int:
        """Weights of one expert."""
        return self.matrices * self.hidden * self.intermediate


@dataclass(frozen=True, slots=True)
class ExpertLaw:
    """Seconds of the routed experts of one layer on one rank, as four constants.

    launch_s      once, if the rank has any token
    weight_s      per distinct expert with at least one token: reading its weights
    compute_s     per token copy: arithmetic
    activation_s  per token copy: reading inputs, intermediate results, writing outputs
    """

    launch_s: float
    weight_s: float
    compute_s: float
    activation_s: float


def expert_law(
    device: Device,
    shape: ExpertShape,
    weight_bits: float = 8,
    compute_dtype: str = "fp8",
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
) -> ExpertLaw:
    """The law of a device, an expert shape and a number format.

    weight_bits    bits stored per weight, scales included if they matter (4, 4.25, 8, 16)
    compute_dtype  operand type of the grouped multiplication; weight-only formats use "bf16"
    source         SOL form of the handbook's cost model, shares fitted as EFFICIENCY_SOURCES says
    """
    if not 0 < weight_bits <= 32:
        raise HardwareError(f"weight_bits={weight_bits} must be in (0, 32]")
    memory = device.memory_bytes_per_s
    bits = dtype_bits(compute_dtype)
    narrow, wide = efficiency.expert_compute_share_8bit, efficiency.expert_compute_share
    compute = device.peak_flop_per_s(compute_dtype) * (narrow if bits <= 8 else wide)
    operand_bytes = bits / 8
    rows = shape.hidden * operand_bytes + shape.hidden * 2.0  # input; output in bf16
    middle = (shape.matrices - 1) * 2.0 + 2 * operand_bytes  # written in bf16, re-read as operand
    activation_bytes = rows + shape.intermediate * middle
    return ExpertLaw(
        launch_s=efficiency.expert_fixed_s,
        weight_s=shape.n_params * weight_bits / 8 / (memory * efficiency.expert_memory_share),
        compute_s=2.0 * shape.n_params / compute,
        activation_s=activation_bytes / (memory * efficiency.expert_activation_share),
    )


def expert_seconds(law: ExpertLaw, tokens: Work, distinct: Work) -> npt.NDArray[np.float64]:
    """Seconds of the routed experts of a layer on each rank.

    tokens    token copies the rank's experts process, any shape
    distinct  experts of the rank with at least one token, same shape
    returns   float64: launch_s * (tokens > 0) + max(distinct * weight_s, tokens * compute_s)
              + tokens * activation_s; never falls when tokens or distinct rise
    """
    copies = np.asarray(tokens, dtype=np.float64)
    weights_s = np.asarray(distinct, dtype=np.float64) * law.weight_s
    busy = np.maximum(weights_s, copies * law.compute_s) + copies * law.activation_s
    return np.asarray(np.where(copies > 0, law.launch_s + busy, 0.0))
