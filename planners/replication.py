"""Replication: how many slots each expert gets before anyone decides where they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


def replicate(tokens_per_expert: FloatArray, n_slots: int) -> IntArray:
    """Replicas of every expert that make the heaviest replica as light as it can be.

    tokens_per_expert  float64[layers, n_experts], >= 0
    returns            int32[layers, n_experts], each >= 1, rows sum to n_slots
    raises             PlanError when n_slots < n_experts
    source             greedy argmax(load / replicas), exact for min-max apportionment; the same
                       rule as deepseek-ai/EPLB `replicate_experts`
    """
    n_experts = tokens_per_expert.shape[1]
    if n_slots < n_experts:
        raise PlanError(f"slots={n_slots} cannot hold {n_experts} experts")
    counts: IntArray = _replicate(np.ascontiguousarray(tokens_per_expert), n_slots)
    return counts


@compiled
def _replicate(load: FloatArray, n_slots: int) -> IntArray:
    n_layers, n_experts = load.shape
    counts = np.ones((n_layers, n_experts), dtype=np.int32)
    for layer in range(n_layers):
        share = load[layer].copy()
        for _ in range(n_slots - n_experts):
            expert = np.argmax(share)
            counts[layer, expert] += 1
            share[expert] = load[layer, expert] / counts[layer, expert]
    return counts
