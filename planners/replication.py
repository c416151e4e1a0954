"""Replication: how many slots each expert gets before anyone decides where they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

_NO_LIMIT = 1 << 30


def replicate(
    tokens_per_expert: FloatArray, n_slots: int, most_copies: int = _NO_LIMIT
) -> IntArray:
    """Replicas of every expert that make the heaviest replica as light as it can be.

    tokens_per_expert  float64[layers, n_experts], >= 0
    most_copies        replicas of one expert at most; more than ranks would share a rank
    returns            int32[layers, n_experts], each >= 1, rows sum to n_slots
    raises             PlanError when n_slots < n_experts or > n_experts * most_copies
    source             greedy argmax(load / replicas), exact for min-max apportionment; the same
                       rule as deepseek-ai/EPLB `replicate_experts`
    """
    n_experts = tokens_per_expert.shape[1]
    if n_slots < n_experts:
        raise PlanError(f"slots={n_slots} cannot hold {n_experts} experts")
    if n_slots > n_experts * most_copies:
        raise PlanError(
            f"slots={n_slots} exceed {n_experts} experts on each of {most_copies} ranks"
        )
    return _replicate(np.ascontiguousarray(tokens_per_expert), n_slots, most_copies)


@compiled
def _replicate(load: FloatArray, n_slots: int, most_copies: int) -> IntArray:
    n_layers, n_experts = load.shape
    counts = np.ones((n_layers, n_experts), dtype=np.int32)
    for layer in range(n_layers):
        share = load[layer].copy()
        for _ in range(n_slots - n_experts):
            expert = np.argmax(share)
            counts[layer, expert] += 1
            share[expert] = load[layer, expert] / counts[layer, expert]
            if counts[layer, expert] >= most_copies:
                share[expert] = -1.0
    return counts
