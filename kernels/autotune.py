"""Search for the launch configuration of a problem on the device at hand.

Makes the tables that `tuning.py` reads. Candidates follow vLLM's search space, less those that
cannot fit or that split little token lists needlessly; which one wins is measured, never assumed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moesim_kernels.errors import KernelError
from moesim_kernels.tuning import Config, default_config

SHARED_MEMORY_BYTES = 232_448  # one program's limit on sm_90
ACCUMULATORS_PER_THREAD = 160  # float32 registers of 255; the rest holds tiles and addresses
_BYTES = {"dense": (2.0, 2.0), "int8": (2.0, 1.0), "int4": (2.0, 0.5), "fp8": (1.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is tuned for: slots (tokens times top_k), experts, weight format."""

    n_slots: int
    n_experts: int
    weight_format: str = "dense"


@dataclass(frozen=True, slots=True)
class Tuned:
    """The quickest configuration, its time, and how many were tried and refused by the device."""

    config: Config
    seconds: float
    n_tried: int
    n_refused: int


def fits(config: Config, weight_format: str, shared_memory_bytes: int) -> bool:
    """Whether tiles and accumulators of the SwiGLU GEMM (two of each weight tile) can fit."""
    x_bytes, w_bytes = _BYTES[weight_format]
    step = config.block_k * (config.block_m * x_bytes + 2 * config.block_n * w_bytes)
    accumulators = 2 * config.block_m * config.block_n / (32 * config.n_warps)
    return step * config.n_stages <= shared_memory_bytes and accumulators <= ACCUMULATORS_PER_THREAD


def candidates(
    workload: Workload, limit: int | None = None, shared_memory_bytes: int = SHARED_MEMORY_BYTES
) -> list[Config]:
    """Configurations worth timing, the untuned default first.

    limit    keep this many, drawn with a fixed seed; None keeps all
    raises   KernelError on an unknown weight format
    source   search space of vLLM's fused-MoE tuner
    """
    if workload.weight_format not in _BYTES:
        raise KernelError(f"weight_format={workload.weight_format!r}: expected {sorted(_BYTES)}")
    mean = workload.n_slots / max(workload.n_experts, 1)
    dense = workload.weight_format == "dense"
    axes = itertools.product(
        [m for m in (16, 32, 64, 128, 256) if m <= max(16, 4 * mean)],
        (32, 64, 128, 256),
        (64, 128, 256) if dense else (64, 128),  # a step stays inside one scale's group
        (1, 16, 32, 64) if mean > 16 else (1,),  # one row block per expert has nothing to share
        (4, 8),
        (2, 3, 4, 5),
    )
    kind = workload.weight_format
    made = [c for c in itertools.starmap(Config, axes) if fits(c, kind, shared_memory_bytes)]
    first = default_config(workload.n_slots, workload.n_experts, workload.weight_format)
    rest = [config for config in made if config != first]
    if limit is not None and limit - 1 < len(rest):
        rest = random.Random(0).sample(rest, max(limit - 1, 0))
    return [first, *rest]


def tune(configs: Sequence[Config], time_s: Callable[[Config], float]) -> Tuned:
    """Time each configuration and keep the quickest.

    time_s   seconds of one call under a configuration; what it raises where the device or the
             compiler refuses one is counted and passed over
    raises   KernelError when all are refused
    """
    best: tuple[float, Config] | None = None
    n_refused = 0
    for config in configs:
        try:
            seconds = time_s(config)
        except Exception as error:
            if not _is_refusal(error):
                raise
            n_refused += 1
            continue
        if best is None or seconds < best[0]:
            best = seconds, config
    if best is None:
        raise KernelError(f"the device refused all {len(configs)} configurations")
    return Tuned(best[1], best[0], len(configs), n_refused)


def _is_refusal(error: Exception) -> bool:
    """Whether a configuration asks too much, of the device or of the compiler."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, OutOfResources | PTXASError | CompilationError) or (
        isinstance(error, RuntimeError) and "PassManager" in str(error)
    )
