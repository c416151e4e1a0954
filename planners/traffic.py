"""Traffic: swap experts between ranks so that tokens need fewer ranks and nodes.

A token sends one copy to each rank (or each node) that holds any of its experts, so experts that
are chosen together should live together. `relocate` is a local search on sampled tokens whose
copies it counts exactly; the load of the busiest rank stays in the objective and under a cap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planners.layer import LayerTask, Search, holds, seconds_of, tail_load
from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
Visits = npt.NDArray[np.int16]
Served = tuple[LongArray, IntArray]
Loads = tuple[FloatArray, FloatArray]  # share and kin of every expert


def relocate(
    slots: IntArray, topk: npt.NDArray[np.int16], task: LayerTask, search: Search
) -> IntArray:
    """Slots of one layer after the search; never dearer than before under the sample.

    slots   int32[n_slots] experts, rank-major
    topk    int16[tokens, k] sampled tokens, -1 for missing
    source  first-improvement local search over pairwise swaps
    """
    served = tokens_of_slots(slots, topk, len(task.share))
    best: IntArray = slots.copy()
    constants = task.constants(max(len(topk), 1))
    limits = (search.trials_per_slot * len(slots), search.within_nodes, task.cap)
    rng = np.random.default_rng(search.seed)
    _relocate(best, (task.share, task.kin), served, len(topk), task.shape(), constants, limits, rng)
    return best


def sampled_price(slots: IntArray, topk: npt.NDArray[np.int16], task: LayerTask) -> float:
    """Seconds of one layer under a placement, as the search prices it; see `relocate`."""
    served = tokens_of_slots(slots, topk, len(task.share))
    constants = task.constants(max(len(topk), 1))
    _, _, load, tail, touched, node_touched = _count(
        slots, (task.share, task.kin), served, len(topk), task.shape(), constants
    )
    return seconds_of(load, tail, touched, node_touched, constants)


@compiled
def tokens_of_slots(slots: IntArray, topk: npt.NDArray[np.int16], n_experts: int) -> Served:
    """Compressed rows: the tokens each slot serves; token t uses replica t mod replicas."""
    copies = np.zeros(n_experts + 1, dtype=np.int64)
    for expert in slots:
        copies[expert + 1] += 1
    first = np.cumsum(copies)
    slot_of = np.empty(len(slots), dtype=np.int64)
    filled = first.copy()
    for slot in range(len(slots)):
        slot_of[filled[slots[slot]]] = slot
        filled[slots[slot]] += 1
    slot_at = np.full(topk.shape, -1, dtype=np.int32)
    start = np.zeros(len(slots) + 1, dtype=np.int64)
    for token in range(topk.shape[0]):
        for choice in range(topk.shape[1]):
            expert = topk[token, choice]
            if expert >= 0:
                n_copies = first[expert + 1] - first[expert]
                slot_at[token, choice] = slot_of[first[expert] + token % n_copies]
                start[slot_at[token, choice] + 1] += 1
    start = np.cumsum(start)
    tokens = np.empty(start[-1], dtype=np.int32)
    at = start.copy()
    for token in range(topk.shape[0]):
        for slot in slot_at[token]:
            if slot >= 0:
                tokens[at[slot]] = token
                at[slot] += 1
    return start, tokens


@compiled
def _count(
    slots: IntArray,
    loads: Loads,
    served: Served,
    n_tokens: int,
    shape: LongArray,
    constants: FloatArray,
) -> tuple[Visits, Visits, FloatArray, FloatArray, FloatArray, FloatArray]:
    """Visits of every token to every rank and node; load, tail and visits of ranks, of nodes."""
    share, kin = loads
    n_ranks, per_node = shape
    start, tokens = served
    per_rank, n_nodes = len(slots) // n_ranks, n_ranks // per_node
    visits = np.zeros((n_tokens, n_ranks), dtype=np.int16)
    node_visits = np.zeros((n_tokens, n_nodes), dtype=np.int16)
    load, tail, touched = np.zeros(n_ranks), np.zeros(n_ranks), np.zeros(n_ranks)
    node_touched = np.zeros(n_nodes)
    for slot in range(len(slots)):
        rank = slot // per_rank
        _arrive(tokens[start[slot] : start[slot + 1]], visits, touched, rank)
        _arrive(tokens[start[slot] : start[slot + 1]], node_visits, node_touched, rank // per_node)
    for rank in range(n_ranks):
        held = slots[rank * per_rank : (rank + 1) * per_rank]
        load[rank] = share[held].sum()
        tail[rank] = tail_load(held, share, kin, constants)
    return visits, node_visits, load, tail, touched, node_touched


@compiled
def _relocate(
    slots: IntArray,
    loads: Loads,
    served: Served,
    n_tokens: int,
    shape: LongArray,
    constants: FloatArray,
    limits: tuple[int, bool, float],
    rng: np.random.Generator,
) -> None:
    """The search, in place. A swap is applied to the counters, priced, and undone if dearer."""
    share, kin = loads
    n_ranks, per_node = shape
    n_trials, within_nodes, cap = limits
    start, tokens = served
    n_slots, per_rank = len(slots), len(slots) // n_ranks
    row = np.arange(n_slots)  # which row of `served` the expert in a slot brought along
    visits, node_visits, load, tail, touched, node_touched = _count(
        slots, loads, served, n_tokens, shape, constants
    )
    price = seconds_of(load, tail, touched, node_touched, constants)
    cap = max(cap, load.max())
    for trial in range(n_trials):
        own = int(rng.random() * n_slots)
        if trial % 4 == 1:
            own = np.argmax(touched) * per_rank + int(rng.random() * per_rank)
        elif trial % 4 == 3:
            own = np.argmax(tail) * per_rank + int(rng.random() * per_rank)
        other = int(rng.random() * n_slots)
        rank = own // per_rank
        if within_nodes:
            in_node = per_node * per_rank
            other = own // in_node * in_node + int(rng.random() * in_node)
        to = other // per_rank
        moved = share[slots[own]] - share[slots[other]]
        if to == rank or load[to] + moved > cap or load[rank] - moved > cap:
            continue
        if holds(slots, to, per_rank, slots[own]) or holds(slots, rank, per_rank, slots[other]):
            continue
        going = tokens[start[row[own]] : start[row[own] + 1]]
        coming = tokens[start[row[other]] : start[row[other] + 1]]
        node, to_node = rank // per_node, to // per_node
        before = (tail[rank], tail[to])
        slots[own], slots[other] = slots[other], slots[own]
        for place in (rank, to):
            held = slots[place * per_rank : (place + 1) * per_rank]
            tail[place] = tail_load(held, share, kin, constants)
        _move(going, coming, visits, touched, rank, to)
        if node != to_node:
            _move(going, coming, node_visits, node_touched, node, to_node)
        load[rank] -= moved
        load[to] += moved
        candidate = seconds_of(load, tail, touched, node_touched, constants)
        if candidate < price * (1 - 1e-12):
            price = candidate
            row[own], row[other] = row[other], row[own]
            continue
        slots[own], slots[other] = slots[other], slots[own]
        tail[rank], tail[to] = before
        _move(coming, going, visits, touched, rank, to)
        if node != to_node:
            _move(coming, going, node_visits, node_touched, node, to_node)
        load[rank] += moved
        load[to] -= moved


@compiled
def _arrive(tokens: IntArray, visits: Visits, touched: FloatArray, place: int) -> None:
    for token in tokens:
        if visits[token, place] == 0:
            touched[place] += 1
        visits[token, place] += 1


@compiled
def _leave(tokens: IntArray, visits: Visits, touched: FloatArray, place: int) -> None:
    for token in tokens:
        visits[token, place] -= 1
        if visits[token, place] == 0:
            touched[place] -= 1


@compiled
def _move(
    going: IntArray, coming: IntArray, visits: Visits, touched: FloatArray, place: int, to: int
) -> None:
    """Tokens `going` leave place for to, tokens `coming` the other way."""
    _leave(going, visits, touched, place)
    _arrive(going, visits, touched, to)
    _leave(coming, visits, touched, to)
    _arrive(coming, visits, touched, place)
