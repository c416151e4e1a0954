"""The baseline that every offload system should be shown against.

Per-layer LRU with next-gate prefetch, and misses on whichever side ends sooner: all of it is in
public runtimes. Claims that rest on a weaker baseline show their figure against this one too.
"""

from __future__ import annotations

import numpy as np

from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices
from moesim.offload.simulate import OffloadResult, simulate
from moesim.policies.prefetch import DEFAULT_NEXT_GATE, oracle
from traces.layer_steps import LayerSteps

NAME = "per-layer LRU with next-gate prefetch and CPU fallback"


def honest_baseline(
    work: LayerSteps,
    prices: Prices,
    slots_per_layer: int,
    recall: float = DEFAULT_NEXT_GATE,
    cpu: bool = True,
    seed: int = 0,
) -> OffloadResult:
    """Its run over the same work.

    recall  share of experts that the next layer's gate names
    cpu     whether misses may be computed on the CPU (split by HSS), else they are loaded
    """
    policy = OffloadPolicy(
        cache="lru",
        slots=np.full(work.n_layers, slots_per_layer, np.int64),
        warm=first_experts(work, slots_per_layer),
        on_miss="hss" if cpu else "load",
        budget=1,
    )
    return simulate(work, prices, policy, oracle(work, recall, seed=seed))


def first_experts(
    work: LayerSteps, per_layer: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """bool[n_objects]: the first experts of every layer, what a cold runtime starts with."""
    marked = np.zeros((work.n_layers, work.n_experts), np.bool_)
    marked[:, :per_layer] = True
    return marked.reshape(-1)
