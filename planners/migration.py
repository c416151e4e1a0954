"""Migration: what moving from the placement that runs today to a plan costs, and how to move less.

Ranks of a node are alike, and so are nodes. Which rank gets which set of experts is therefore
free, and `align` chooses it so that as many experts as possible are already where they should be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from planners.errors import PlanError
from planners.plan import Placement

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Migration:
    """Slots whose expert changes and is not on the rank already.

    moved_slots       over all layers
    n_bytes           moved_slots times the bytes of one expert
    busiest_rank_bytes  received by the rank that receives most
    """

    moved_slots: int
    n_bytes: float
    busiest_rank_bytes: float


def align(plan: Placement, current: Placement) -> Placement:
    """The same plan with ranks renamed inside the cluster's symmetry to move fewest experts.

    raises  PlanError when the two are not of one shape
    source  linear assignment of rank contents, first inside every pair of nodes, then of nodes
    """
    _check_alike(plan, current)
    table = plan.physical_to_logical_map.copy()
    for layer in range(plan.n_layers):
        ours = table[layer].reshape(plan.n_ranks, -1)
        theirs = current.physical_to_logical_map[layer].reshape(plan.n_ranks, -1)
        order = _rank_order(_shared(ours, theirs, plan.n_experts), plan.ranks_per_node)
        moved = [_keep_places(ours[o], theirs[r]) for r, o in enumerate(order)]
        table[layer] = np.concatenate(moved)
    return replace(plan, physical_to_logical_map=table)


def migration(plan: Placement, current: Placement, expert_bytes: float) -> Migration:
    """What it takes to go from current to plan; an expert already on the rank is not moved."""
    _check_alike(plan, current)
    shape = (plan.n_layers * plan.n_ranks, plan.slots_per_rank)
    ours = plan.physical_to_logical_map.reshape(shape)
    theirs = current.physical_to_logical_map.reshape(shape)
    arrives = ~(ours[:, :, None] == theirs[:, None, :]).any(axis=2)
    per_rank = arrives.sum(axis=1).reshape(plan.n_layers, plan.n_ranks).sum(axis=0)
    return Migration(
        int(per_rank.sum()),
        float(per_rank.sum() * expert_bytes),
        float(per_rank.max()) * expert_bytes,
    )


def _check_alike(plan: Placement, current: Placement) -> None:
    ours = (plan.physical_to_logical_map.shape, plan.n_experts, plan.n_ranks, plan.ranks_per_node)
    theirs = (
        current.physical_to_logical_map.shape,
        current.n_experts,
        current.n_ranks,
        current.ranks_per_node,
    )
    if ours != theirs:
        raise PlanError(
            f"current placement has (layers, slots), experts, ranks, ranks per node = {theirs},"
            f" the plan has {ours}; they must be equal"
        )


def _shared(ours: IntArray, theirs: IntArray, n_experts: int) -> npt.NDArray[np.int64]:
    """int64[ranks, ranks]: experts that rank i of theirs and rank j of ours have in common."""
    have = np.zeros((2, len(ours), n_experts), dtype=np.int64)
    for side, slots in enumerate((theirs, ours)):
        np.put_along_axis(have[side], slots.astype(np.int64), 1, axis=1)
    return np.asarray(have[0] @ have[1].T)


def _rank_order(shared: npt.NDArray[np.int64], per_node: int) -> list[int]:
    """For each rank of today, which rank of the plan takes its place."""
    n_nodes = len(shared) // per_node
    blocks = shared.reshape(n_nodes, per_node, n_nodes, per_node).swapaxes(1, 2)
    inside = np.array(
        [[linear_sum_assignment(block, maximize=True)[1] for block in row] for row in blocks]
    )
    kept = np.take_along_axis(blocks, inside[..., None], axis=3).sum(axis=(2, 3))
    nodes = linear_sum_assignment(kept, maximize=True)[1]
    return [
        int(nodes[node]) * per_node + int(rank)
        for node in range(n_nodes)
        for rank in inside[node, nodes[node]]
    ]


def _keep_places(ours: IntArray, theirs: IntArray) -> IntArray:
    """Our experts in an order that leaves those already there in their slots."""
    placed = np.full(len(ours), -1, dtype=np.int32)
    left = list(ours)
    for slot, expert in enumerate(theirs):
        if expert in left:
            placed[slot] = expert
            left.remove(expert)
    placed[placed < 0] = left
    return placed
