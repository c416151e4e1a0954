"""Expected traffic: the search of `traffic.py` when only expert counts are known.

Without tokens nobody knows which experts are chosen together, except through the router's group
limit: experts of one group are. Copies are therefore expected values of independent choices
inside the chosen groups, a smooth function of the placement that needs no sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planners.layer import NODE_COPY, LayerTask, Search, holds, seconds_of, tail_load
from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
Given = tuple[FloatArray, FloatArray, FloatArray, FloatArray]


@dataclass(frozen=True, slots=True)
class GroupChances:
    """Chances of one layer, per token.

    group   float64[n_groups], chance that a token may use the group; sums to topk_groups
    expert  float64[n_experts], chance of one replica of the expert given its group
    """

    group: FloatArray
    expert: FloatArray


def relocate_expected(
    slots: IntArray, chances: GroupChances, task: LayerTask, search: Search
) -> IntArray:
    """Slots of one layer after a swap search on expected traffic; never dearer than before.

    slots   int32[n_slots] experts, rank-major
    source  first-improvement local search over pairwise swaps; half of the proposals bring an
            expert to others of its group
    """
    best: IntArray = slots.copy()
    limits = (search.trials_per_slot * len(slots), search.within_nodes, task.cap)
    rng = np.random.default_rng(search.seed)
    given = (task.share, task.kin, chances.group, chances.expert)
    _relocate(best, given, task.shape(), task.constants(), limits, rng)
    return best


def expected_price(slots: IntArray, chances: GroupChances, task: LayerTask) -> float:
    """Seconds of one layer under a placement, as the search prices it."""
    given = (task.share, task.kin, chances.group, chances.expert)
    load, tail, touched, node_touched = _expect(slots, given, task.shape(), task.constants())
    return seconds_of(load, tail, touched, node_touched, task.constants())


@compiled
def visit_share(
    held: IntArray, group_chance: FloatArray, expert_chance: FloatArray, missed: FloatArray
) -> float:
    """Share of tokens that visit a place holding these experts.

    missed  float64[n_groups] scratch
    source  1 - prod_g (1 - q_g (1 - prod_{e in g} (1 - x_e))), groups taken as independent
    """
    group_size = len(expert_chance) // len(group_chance)
    missed[:] = 1.0
    for expert in held:
        missed[expert // group_size] *= 1.0 - expert_chance[expert]
    none = 1.0
    for group in range(len(group_chance)):
        none *= 1.0 - group_chance[group] * (1.0 - missed[group])
    return 1.0 - none


@compiled
def _expect(
    slots: IntArray, given: Given, shape: LongArray, constants: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Load, tail load and visit share of every rank, visit share of every node."""
    share, kin, group_chance, expert_chance = given
    n_ranks, per_node = shape
    n_groups = len(group_chance)
    per_rank, n_nodes = len(slots) // n_ranks, n_ranks // per_node
    load, tail, touched = np.zeros(n_ranks), np.zeros(n_ranks), np.zeros(n_ranks)
    node_touched, scratch = np.zeros(n_nodes), np.zeros(n_groups)
    for rank in range(n_ranks):
        held = slots[rank * per_rank : (rank + 1) * per_rank]
        load[rank] = share[held].sum()
        tail[rank] = tail_load(held, share, kin, constants)
        touched[rank] = visit_share(held, group_chance, expert_chance, scratch)
    for node in range(n_nodes):
        held = slots[node * per_rank * per_node : (node + 1) * per_rank * per_node]
        node_touched[node] = visit_share(held, group_chance, expert_chance, scratch)
    return load, tail, touched, node_touched


@compiled
def _by_group(
    slots: IntArray, n_groups: int, group_size: int
) -> tuple[LongArray, LongArray, LongArray]:
    """Replicas numbered by expert, so by group: slot of each, number at each slot, group starts."""
    slot_of = np.argsort(slots, kind="mergesort")
    replica_at = np.empty(len(slots), dtype=np.int64)
    replica_at[slot_of] = np.arange(len(slots))
    start = np.zeros(n_groups + 1, dtype=np.int64)
    for expert in slots:
        start[expert // group_size + 1] += 1
    return slot_of, replica_at, np.cumsum(start)


@compiled
def _relocate(
    slots: IntArray,
    given: Given,
    shape: LongArray,
    constants: FloatArray,
    limits: tuple[int, bool, float],
    rng: np.random.Generator,
) -> None:
    """The search, in place: swap, price the two ranks (and nodes) anew, undo if dearer."""
    share, kin, group_chance, expert_chance = given
    n_ranks, per_node = shape
    n_groups = len(group_chance)
    n_trials, within_nodes, cap = limits
    n_slots, per_rank = len(slots), len(slots) // n_ranks
    in_node, group_size = per_rank * per_node, len(share) // n_groups
    load, tail, touched, node_touched = _expect(slots, given, shape, constants)
    slot_of, replica_at, group_start = _by_group(slots, n_groups, group_size)
    price = seconds_of(load, tail, touched, node_touched, constants)
    cap = max(cap, load.max())
    scratch = np.zeros(n_groups)
    reach = in_node if constants[NODE_COPY] > 0 else per_rank  # where company of the group pays
    for trial in range(n_trials):
        own = int(rng.random() * n_slots)
        if trial % 4 == 1:
            own = np.argmax(touched) * per_rank + int(rng.random() * per_rank)
        elif trial % 4 == 3:
            own = np.argmax(tail) * per_rank + int(rng.random() * per_rank)
        group = slots[own // reach * reach + int(rng.random() * reach)] // group_size
        other = slot_of[
            group_start[group] + int(rng.random() * (group_start[group + 1] - group_start[group]))
        ]
        if trial % 8 >= 6:
            other = int(rng.random() * n_slots)
        if within_nodes:
            other = own // in_node * in_node + int(rng.random() * in_node)
        rank, to = own // per_rank, other // per_rank
        moved = share[slots[own]] - share[slots[other]]
        if to == rank or load[to] + moved > cap or load[rank] - moved > cap:
            continue
        if holds(slots, to, per_rank, slots[own]) or holds(slots, rank, per_rank, slots[other]):
            continue
        node, to_node = rank // per_node, to // per_node
        before = (touched[rank], touched[to], tail[rank], tail[to])
        node_before = (node_touched[node], node_touched[to_node])
        slots[own], slots[other] = slots[other], slots[own]
        for place in (rank, to):
            held = slots[place * per_rank : (place + 1) * per_rank]
            tail[place] = tail_load(held, share, kin, constants)
            touched[place] = visit_share(held, group_chance, expert_chance, scratch)
        if node != to_node and constants[NODE_COPY] > 0:
            for place in (node, to_node):
                held = slots[place * in_node : (place + 1) * in_node]
                node_touched[place] = visit_share(held, group_chance, expert_chance, scratch)
        load[rank] -= moved
        load[to] += moved
        candidate = seconds_of(load, tail, touched, node_touched, constants)
        if candidate < price * (1 - 1e-12):
            price = candidate
            replica_at[own], replica_at[other] = replica_at[other], replica_at[own]
            slot_of[replica_at[own]], slot_of[replica_at[other]] = own, other
            continue
        slots[own], slots[other] = slots[other], slots[own]
        touched[rank], touched[to], tail[rank], tail[to] = before
        node_touched[node], node_touched[to_node] = node_before
        load[rank] += moved
        load[to] -= moved
