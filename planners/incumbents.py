"""Incumbents: the placements people run today, which every plan is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.packing import pack
from planners.plan import Placement, check_slots
from planners.replication import replicate
from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a placement must fit: slots over ranks over nodes, experts in groups."""

    n_ranks: int
    n_slots: int
    ranks_per_node: int
    n_groups: int = 1

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return self.n_ranks // self.ranks_per_node


def contiguous(n_layers: int, n_experts: int, shape: Shape) -> Placement:
    """Expert ids in order, then again from 0: the default of SGLang and vLLM."""
    check_slots(n_experts, shape.n_slots, shape.n_ranks)
    return _same_in_all_layers(np.arange(shape.n_slots) % n_experts, n_layers, n_experts, shape)


def round_robin(n_layers: int, n_experts: int, shape: Shape) -> Placement:
    """Expert e on rank e mod n_ranks: vLLM's `--expert-placement-strategy round_robin`."""
    check_slots(n_experts, shape.n_slots, shape.n_ranks)
    rank_major = np.arange(shape.n_slots).reshape(-1, shape.n_ranks).T.ravel()
    return _same_in_all_layers(rank_major % n_experts, n_layers, n_experts, shape)


def eplb_global(tokens_per_expert: FloatArray, shape: Shape) -> Placement:
    """EPLB without node limits: replicate over the whole cluster, then pack on ranks."""
    return _eplb(tokens_per_expert, shape, n_groups=1, n_nodes=1)


def eplb_hierarchical(tokens_per_expert: FloatArray, shape: Shape) -> Placement:
    """EPLB's node-limited form; the global form when groups do not divide over the nodes.

    source  deepseek-ai/EPLB `rebalance_experts`: groups packed on nodes, replicas made inside a
            node, replicas packed on its ranks
    """
    if shape.n_groups % shape.n_nodes:
        return eplb_global(tokens_per_expert, shape)
    return _eplb(tokens_per_expert, shape, shape.n_groups, shape.n_nodes)


def _same_in_all_layers(
    slots: npt.NDArray[np.int64], n_layers: int, n_experts: int, shape: Shape
) -> Placement:
    table = np.tile(slots.astype(np.int32), (n_layers, 1))
    return Placement(table, n_experts, shape.n_ranks, shape.ranks_per_node)


def _eplb(tokens_per_expert: FloatArray, shape: Shape, n_groups: int, n_nodes: int) -> Placement:
    n_experts = tokens_per_expert.shape[1]
    check_slots(n_experts, shape.n_slots, shape.n_ranks)
    if shape.n_slots % n_nodes or n_experts % n_groups:
        raise PlanError(
            f"EPLB needs slots={shape.n_slots} divisible by nodes={n_nodes} and experts="
            f"{n_experts} by groups={n_groups}"
        )
    load = np.ascontiguousarray(tokens_per_expert, dtype=np.float64)
    node_of_group = pack_groups(load, n_groups, n_nodes)
    experts = experts_by_node(node_of_group, n_experts, n_nodes)
    slots = fill_nodes(load, experts, shape)
    return Placement(slots, n_experts, shape.n_ranks, shape.ranks_per_node)


def pack_groups(load: FloatArray, n_groups: int, n_nodes: int) -> IntArray:
    """int32[layers, n_groups]: node of every expert group, heaviest group first."""
    per_group = load.reshape(len(load), n_groups, -1).sum(axis=2)
    return np.stack([pack(row, n_nodes) for row in per_group]).astype(np.int32)


def experts_by_node(node_of_group: IntArray, n_experts: int, n_nodes: int) -> IntArray:
    """int32[layers, n_nodes, experts per node]: which experts live on each node."""
    n_layers, n_groups = node_of_group.shape
    node_of_expert = np.repeat(node_of_group, n_experts // n_groups, axis=1)
    order = np.argsort(node_of_expert, axis=1, kind="stable")
    return order.reshape(n_layers, n_nodes, -1).astype(np.int32)


def fill_nodes(
    load: FloatArray, experts: IntArray, shape: Shape, most_copies: int | None = None
) -> IntArray:
    """Slots of all layers when each node replicates and packs its own experts.

    load     float64[layers, n_experts]
    experts  int32[layers, nodes, experts per node]
    most_copies  replicas of one expert at most, None for no limit (as EPLB has it)
    returns  int32[layers, n_slots], rank-major
    """
    n_layers, n_nodes, per_node = experts.shape
    on_node = np.take_along_axis(load[:, None, :], experts.astype(np.int64), axis=2)
    on_node = on_node.reshape(n_layers * n_nodes, per_node)
    limit = () if most_copies is None else (most_copies,)
    copies = replicate(on_node, shape.n_slots // n_nodes, *limit)
    local: IntArray = _pack_replicas(on_node, copies, shape.n_ranks // n_nodes)
    ids = np.take_along_axis(
        experts.reshape(n_layers * n_nodes, per_node), local.astype(np.int64), axis=1
    )
    return np.ascontiguousarray(ids.reshape(n_layers, shape.n_slots))


@compiled
def _pack_replicas(load: FloatArray, copies: IntArray, n_ranks: int) -> IntArray:
    """Experts of every slot, rank-major, for each row of loads and replica counts."""
    n_rows, n_experts = load.shape
    n_slots = copies[0].sum()
    per_rank = n_slots // n_ranks
    slots = np.empty((n_rows, n_slots), dtype=np.int32)
    for row in range(n_rows):
        expert = np.repeat(np.arange(n_experts), copies[row])
        ranks = pack(load[row][expert] / copies[row][expert], n_ranks)
        filled = np.zeros(n_ranks, dtype=np.int64)
        for item in range(n_slots):
            rank = ranks[item]
            slots[row, rank * per_rank + filled[rank]] = expert[item]
            filled[rank] += 1
    return slots
