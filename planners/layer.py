"""One layer as the planner sees it: what a busy rank and a visit cost.

`traffic.py` (tokens known) and `expected_traffic.py` (counts only) search slots of one layer;
this file holds what both price.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planners.drift import Drift
from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LayerPrice:
    """Seconds of one layer as a function of its busiest rank and most visited rank and node.

    seconds = max(floor_s, load * compute_s) + load * activation_s
            + max(rank_share * rank_copy_s, node_share * node_copy_s)

    load is in tokens of a step on the busiest rank; rank_share (node_share) is the share of all
    tokens of the step that visit the most visited rank (node).
    """

    floor_s: float
    compute_s: float
    activation_s: float
    rank_copy_s: float
    node_copy_s: float


@dataclass(frozen=True, slots=True)
class LayerTask:
    """Everything a search of one layer needs beside the slots and the evidence.

    share           float64[n_experts] tokens of a step that one replica of each expert gets
    kin             float64[n_experts, n_experts], which experts drift together (drift.py)
    cap             the busiest rank may not exceed this load (inf for none), unless it did before
    """

    share: FloatArray
    kin: FloatArray
    n_ranks: int
    ranks_per_node: int
    price: LayerPrice
    drift: Drift
    cap: float = np.inf

    def constants(self, n_tokens: int = 1) -> FloatArray:
        """Price and drift as an array for the compiled loops, visits counted out of n_tokens."""
        price, drift = self.price, self.drift
        return np.array(
            [
                price.floor_s,
                price.compute_s,
                price.activation_s,
                price.rank_copy_s / n_tokens,
                price.node_copy_s / n_tokens,
                drift.relative_sd**2 * (1 - drift.kin_share),
                drift.relative_sd**2 * drift.kin_share,
                drift.tail,
            ]
        )

    def shape(self) -> npt.NDArray[np.int64]:
        """n_ranks and ranks_per_node for the compiled loops."""
        return np.array([self.n_ranks, self.ranks_per_node], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Search:
    """How far a search looks, and what it may not do.

    trials_per_slot  swaps tried per slot
    within_nodes     swaps stay inside a node, so groups stay where they are
    """

    trials_per_slot: int = 100
    within_nodes: bool = False
    seed: int = 0


# Places in LayerTask.constants()
FLOOR, COMPUTE, ACTIVATION, RANK_COPY, NODE_COPY, OWN_VARIANCE, KIN_VARIANCE, TAIL = range(8)


@compiled
def tail_load(held: IntArray, share: FloatArray, kin: FloatArray, constants: FloatArray) -> float:
    """Load of a rank holding these experts, `tail` standard deviations above its mean.

    source  variance of a sum whose terms have the covariance share_i share_j kin_ij
    """
    load, squares, common = 0.0, 0.0, 0.0
    for i in range(len(held)):
        own = share[held[i]]
        load += own
        squares += own * own
        common += own * own
        for j in range(i):
            common += 2.0 * own * share[held[j]] * kin[held[i], held[j]]
    variance = constants[OWN_VARIANCE] * squares + constants[KIN_VARIANCE] * common
    return float(load + constants[TAIL] * np.sqrt(variance))


@compiled
def seconds_of(
    load: FloatArray,
    tail: FloatArray,
    touched: FloatArray,
    node_touched: FloatArray,
    constants: FloatArray,
) -> float:
    """LayerPrice at the tail of every rank; a tenth of the mean traffic parts equal maxima.

    A rank's visits are taken to drift with its load.
    """
    most, busiest = 0.0, 0.0
    for rank in range(len(load)):
        busiest = max(busiest, tail[rank])
        if load[rank] > 0:
            most = max(most, touched[rank] * tail[rank] / load[rank])
    compute = max(constants[FLOOR], busiest * constants[COMPUTE]) + busiest * constants[ACTIVATION]
    peak = max(most * constants[RANK_COPY], node_touched.max() * constants[NODE_COPY])
    mean = touched.mean() * constants[RANK_COPY] + node_touched.mean() * constants[NODE_COPY]
    return float(compute + peak + 0.1 * mean)


@compiled
def holds(slots: IntArray, rank: int, per_rank: int, expert: int) -> bool:
    """Whether a rank has a replica of the expert."""
    for slot in range(rank * per_rank, (rank + 1) * per_rank):  # noqa: SIM110 - compiled
        if slots[slot] == expert:
            return True
    return False
