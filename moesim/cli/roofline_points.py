"""Where a model's routed experts lie under a device's roofline, as the batch grows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hwmodels.cost import ExpertShape
from hwmodels.device import Device
from hwmodels.operators import routed_experts
from moesim.report.roofline import Points
from planners.step_time import default_precision
from traces.model import ModelSpec

_TOKENS = np.array([4.0**i for i in range(9)], dtype=np.float64)  # 1 to 65,536


def expert_points(model: ModelSpec, device: Device) -> Points:
    """One MoE layer's experts on one device that holds them all, for 1 to 65,536 tokens.

    Routing is taken as even and independent: tokens * top_k copies on
    n_experts * (1 - (1 - top_k / n_experts) ** tokens) distinct experts.
    """
    precision = default_precision(device)
    missed: npt.NDArray[np.float64] = (1.0 - model.top_k / model.n_experts) ** _TOKENS
    work = (_TOKENS * model.top_k, model.n_experts * (1.0 - missed))
    shape = ExpertShape(model.hidden_size, model.expert_intermediate_size, model.ffn_matrices)
    cost = routed_experts(device, shape, work, precision.weight_bits, precision.compute_dtype)
    return Points(
        name=f"experts of {model.name}, {precision.compute_dtype}, by tokens of a step",
        flop_per_byte=cost.flops / cost.bytes,
        flop_per_s=cost.flops / cost.seconds,
        labels=[f"{int(n):,}" for n in _TOKENS],
    )
