"""Bounds: the least load of the busiest rank that no placement can beat."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

from planners.incumbents import Shape
from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

_MOST_SUBSETS = 20_000


def busiest_rank_bound(tokens_per_expert: FloatArray, shape: Shape) -> FloatArray:
    """float64[layers]: least possible load of the busiest rank, any placement.

    tokens_per_expert  float64[layers, n_experts]; replicas share the load of an expert evenly
    source             `_node_bound` over the whole cluster
    """
    load = np.ascontiguousarray(tokens_per_expert, dtype=np.float64)
    everything = np.arange(load.shape[1])[None, :]
    bound: FloatArray = _node_bounds(load, everything, shape.n_slots, shape.n_ranks)[:, 0]
    return bound


def node_limited_bound(tokens_per_expert: FloatArray, shape: Shape) -> FloatArray:
    """float64[layers]: the same when every expert group must stay inside one node.

    Exact over all assignments of groups to nodes while these are few; otherwise the mean load
    and the heaviest replica bound it.
    """
    return spread_groups(tokens_per_expert, shape)[1]


def spread_groups(tokens_per_expert: FloatArray, shape: Shape) -> tuple[IntArray, FloatArray]:
    """Node of every group so that the worst node's bound is least, and that bound.

    returns  int32[layers, n_groups] and float64[layers]
    source   dynamic program over sets of groups (each node takes n_groups / n_nodes of them);
             groups packed heaviest first when there are too many sets
    """
    load = np.ascontiguousarray(tokens_per_expert, dtype=np.float64)
    per_node = shape.n_groups // shape.n_nodes
    members = list(combinations(range(shape.n_groups), per_node))
    if len(members) > _MOST_SUBSETS or shape.n_groups > 16:
        return _packed_groups(load, shape), busiest_rank_bound(load, shape)
    size = load.shape[1] // shape.n_groups
    experts = np.array([[g * size + i for g in m for i in range(size)] for m in members])
    masks = np.array([sum(1 << g for g in m) for m in members])
    slots, ranks = shape.n_slots // shape.n_nodes, shape.ranks_per_node
    cost = _node_bounds(load, experts, slots, ranks)
    node_of_group, bound = _best_partition(cost, masks, shape.n_groups, shape.n_nodes)
    return node_of_group, bound


def _packed_groups(load: FloatArray, shape: Shape) -> IntArray:
    from planners.incumbents import pack_groups

    return pack_groups(load, shape.n_groups, shape.n_nodes)


@compiled
def _node_bounds(
    load: FloatArray, members: npt.NDArray[np.int64], n_slots: int, n_ranks: int
) -> FloatArray:
    """Bound on the busiest of n_ranks for each set of experts: [layers, sets]."""
    bounds = np.empty((len(load), len(members)))
    for layer in range(len(load)):
        for row in range(len(members)):
            bounds[layer, row] = _node_bound(load[layer][members[row]], n_slots, n_ranks)
    return bounds


@compiled
def _node_bound(load: FloatArray, n_slots: int, n_ranks: int) -> float:
    """The greater of the mean rank load and of the heaviest replica with its lightest company.

    Greedy apportionment makes the heaviest replica as light as n_slots allow, so some rank holds
    at least that much; its other slots hold at least the lightest replica any plan can make,
    which is an expert's load over the most copies it can get.
    """
    share = load.copy()
    copies = np.ones(len(load))
    for _ in range(n_slots - len(load)):
        expert = np.argmax(share)
        copies[expert] += 1
        share[expert] = load[expert] / copies[expert]
    lightest = load.min() / (n_slots - len(load) + 1)
    company = (n_slots // n_ranks - 1) * lightest
    return float(max(load.sum() / n_ranks, share.max() + company))


@compiled
def _best_partition(
    cost: FloatArray, masks: npt.NDArray[np.int64], n_groups: int, n_nodes: int
) -> tuple[IntArray, FloatArray]:
    """Partition of groups into sets of equal size whose dearest set is cheapest, per layer."""
    full = (1 << n_groups) - 1
    node_of_group = np.zeros((len(cost), n_groups), dtype=np.int32)
    bound = np.empty(len(cost))
    for layer in range(len(cost)):
        best = np.full(full + 1, np.inf)
        chosen = np.full(full + 1, -1, dtype=np.int64)
        best[0] = 0.0
        for mask in range(1, full + 1):
            lowest = mask & -mask
            for row in range(len(masks)):
                subset = masks[row]
                if subset & lowest and subset & mask == subset:
                    worst = max(cost[layer, row], best[mask ^ subset])
                    if worst < best[mask]:
                        best[mask], chosen[mask] = worst, row
        bound[layer] = best[full]
        mask = full
        for node in range(n_nodes):
            subset = masks[chosen[mask]]
            for group in range(n_groups):
                if subset >> group & 1:
                    node_of_group[layer, group] = node
            mask ^= subset
    return node_of_group, bound
