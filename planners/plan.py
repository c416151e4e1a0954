"""Placement and Plan: where every replica of every expert lives, and what was promised for it.

A Placement is the decision; a Plan is the decision with its inputs, the incumbents' figures,
the bound and the verdict, stored as JSON. Engine files are derived from a Plan (`export/`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError


@dataclass(frozen=True, slots=True)
class Placement:
    """Experts of every physical slot; slots are rank-major.

    physical_to_logical_map  int32[moe_layers, n_slots]: slot s is on rank s // (n_slots / n_ranks)
    ranks_per_node           rank r is on node r // ranks_per_node
    """

    physical_to_logical_map: npt.NDArray[np.int32]
    n_experts: int
    n_ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        check_slots(self.n_experts, self.physical_to_logical_map.shape[1], self.n_ranks)
        if self.n_ranks % self.ranks_per_node:
            raise PlanError(
                f"n_ranks={self.n_ranks} must be a multiple of ranks_per_node={self.ranks_per_node}"
            )
        low, high = self.physical_to_logical_map.min(), self.physical_to_logical_map.max()
        if low < 0 or high >= self.n_experts:
            raise PlanError(f"slots hold experts {low}..{high}, expected 0..{self.n_experts - 1}")
        missing = np.argwhere(replica_counts(self) == 0)
        if len(missing):
            layer, expert = missing[0]
            raise PlanError(
                f"expert {expert} of MoE layer {layer} has no slot ({len(missing)} such), expected"
                " every expert at least once"
            )

    @property
    def n_layers(self) -> int:
        """Number of MoE layers."""
        return int(self.physical_to_logical_map.shape[0])

    @property
    def n_slots(self) -> int:
        """Physical slots of a layer over all ranks."""
        return int(self.physical_to_logical_map.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Physical slots of a layer on one rank."""
        return self.n_slots // self.n_ranks

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return self.n_ranks // self.ranks_per_node


def check_slots(n_experts: int, n_slots: int, n_ranks: int) -> None:
    """PlanError unless n_slots covers every expert and divides evenly over the ranks."""
    if n_slots < n_experts:
        raise PlanError(
            f"slots={n_slots} cannot hold {n_experts} experts; {n_experts - n_slots} short"
        )
    if n_ranks < 1 or n_slots % n_ranks:
        below, above = (
            (n_slots // max(n_ranks, 1)) * n_ranks,
            -(-n_slots // max(n_ranks, 1)) * n_ranks,
        )
        raise PlanError(
            f"slots={n_slots} is not divisible by ranks={n_ranks}; the nearest that are: {below}"
            f" and {above}"
        )


def replica_counts(placement: Placement) -> npt.NDArray[np.int32]:
    """int32[moe_layers, n_experts]: number of slots of every expert."""
    n_layers = placement.physical_to_logical_map.shape[0]
    flat = placement.physical_to_logical_map.astype(np.int64)
    flat = flat + np.arange(n_layers, dtype=np.int64)[:, None] * placement.n_experts
    counts = np.bincount(flat.ravel(), minlength=n_layers * placement.n_experts)
    return counts.reshape(n_layers, placement.n_experts).astype(np.int32)


def rank_loads(
    placement: Placement, tokens_per_expert: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """float64[moe_layers, n_ranks]: load of every rank when replicas share evenly.

    tokens_per_expert  float64[moe_layers, n_experts], any unit
    """
    share = tokens_per_expert / replica_counts(placement)
    on_slot = np.take_along_axis(share, placement.physical_to_logical_map.astype(np.int64), axis=1)
    by_rank = on_slot.reshape(placement.n_layers, placement.n_ranks, -1)
    return np.asarray(by_rank.sum(axis=2))


def max_over_mean(loads: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """float64[moe_layers]: busiest rank over the mean; 1.0 for a layer without load."""
    mean = loads.mean(axis=1)
    ratio = np.divide(loads.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)
    return np.asarray(ratio)
