"""Reuse distances: the hit rate of LRU caches of every size from one pass over a trace.

The reuse distance of a request is the number of distinct experts of its layer asked for since the
same expert was last, itself included; an LRU cache of c slots holds it exactly when the distance is
at most c (Mattson and others, IBM Systems Journal 9, 1970).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled
from traces.layer_steps import LayerSteps

Longs = npt.NDArray[np.int64]


def reuse_distances(work: LayerSteps) -> Longs:
    """How often each distance occurs in each layer, one cache a layer.

    returns  int64[n_layers, n_experts + 1]: column d counts requests at distance d, 1..n_experts;
             column 0 counts first requests, which no cache holds
    """
    return _distances(work.start, work.expert, work.n_layers, work.n_experts)


def lru_hits(work: LayerSteps) -> Longs:
    """int64[n_layers, n_experts + 1]: hits of an LRU cache of c slots in each layer, column c."""
    counts = reuse_distances(work)
    counts[:, 0] = 0
    return np.cumsum(counts, axis=1)


@compiled
def _distances(start: Longs, expert: npt.NDArray[np.int32], n_layers: int, n_experts: int) -> Longs:
    """Each layer keeps its experts from the last used to the longest unused."""
    counts = np.zeros((n_layers, n_experts + 1), np.int64)
    recent = np.full((n_layers, n_experts), -1, np.int64)
    for step in range(len(start) - 1):
        layer = step % n_layers
        for cell in range(start[step], start[step + 1]):
            wanted, moved = expert[cell], expert[cell]
            for place in range(n_experts):
                moved, recent[layer, place] = recent[layer, place], moved
                if moved == wanted:
                    counts[layer, place + 1] += 1
                    break
                if moved < 0:
                    counts[layer, 0] += 1
                    break
    return counts
