"""Packing: put weighted replicas on ranks with equal slots so that the busiest rank is light.

`pack` is the longest-processing-time rule of EPLB; `level` improves any packing by swaps
between the busiest rank and the others until no swap helps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]


@compiled
def pack(weight: FloatArray, n_packs: int) -> IntArray:
    """Pack of every item: heaviest first into the lightest pack with room.

    weight   float64[items], items divisible by n_packs
    returns  int32[items], every pack appears items / n_packs times
    source   deepseek-ai/EPLB `balanced_packing`
    """
    n_items = len(weight)
    room = n_items // n_packs
    packs = np.empty(n_items, dtype=np.int32)
    load = np.zeros(n_packs)
    filled = np.zeros(n_packs, dtype=np.int64)
    for item in np.argsort(-weight, kind="mergesort"):
        lightest = -1
        for candidate in range(n_packs):
            if filled[candidate] < room and (lightest < 0 or load[candidate] < load[lightest]):
                lightest = candidate
        packs[item] = lightest
        load[lightest] += weight[item]
        filled[lightest] += 1
    return packs


@compiled
def separate(slots: IntArray, share: FloatArray, n_ranks: int, first: int, last: int) -> None:
    """Swap slots in place so that no rank of first <= rank < last holds an expert twice.

    Each second replica goes to the rank where the swap leaves the two loads closest; it stays
    where no swap is possible. Arguments as in `level`.
    """
    per_rank = len(slots) // n_ranks
    for own in range(first * per_rank, last * per_rank):
        start = own // per_rank * per_rank
        if not (slots[start:own] == slots[own]).any():
            continue
        best, best_other = np.inf, -1
        for other in range(first * per_rank, last * per_rank):
            moved = abs(share[slots[own]] - share[slots[other]])
            if other // per_rank == own // per_rank or moved >= best:
                continue
            if not _would_double(slots, own, other, per_rank):
                best, best_other = moved, other
        if best_other >= 0:
            slots[own], slots[best_other] = slots[best_other], slots[own]


@compiled
def level(slots: IntArray, share: FloatArray, n_ranks: int, first: int, last: int) -> None:
    """Swap slots in place until no swap with the busiest rank lowers the load of both above it.

    slots        int32[n_slots] experts of one layer, rank-major
    share        float64[n_experts] load of one replica of each expert
    first, last  only ranks first <= rank < last take part (a node); the others stay
    """
    per_rank = len(slots) // n_ranks
    load = np.zeros(n_ranks)
    for slot in range(first * per_rank, last * per_rank):
        load[slot // per_rank] += share[slots[slot]]
    for _ in range(64 * (last - first) * per_rank):
        busiest = first + np.argmax(load[first:last])
        own, other, _ = _best_swap(slots, share, load, int(busiest), first, last)
        if own < 0:
            return
        moved = share[slots[own]] - share[slots[other]]
        load[busiest] -= moved
        load[other // per_rank] += moved
        slots[own], slots[other] = slots[other], slots[own]


@compiled
def _best_swap(
    slots: IntArray, share: FloatArray, load: FloatArray, busiest: int, first: int, last: int
) -> tuple[int, int, float]:
    """The swap after which the heavier of the two ranks is lightest, or (-1, -1, ...)."""
    per_rank = len(slots) // len(load)
    best_own, best_other = -1, -1
    best = load[busiest] * (1.0 - 1e-12)
    for rank in range(first, last):
        if rank == busiest:
            continue
        half = 0.5 * (load[busiest] - load[rank])
        if load[busiest] - half >= best:
            continue
        for own in range(busiest * per_rank, (busiest + 1) * per_rank):
            for other in range(rank * per_rank, (rank + 1) * per_rank):
                moved = share[slots[own]] - share[slots[other]]
                heavier = max(load[busiest] - moved, load[rank] + moved)
                if heavier < best and not _would_double(slots, own, other, per_rank):
                    best, best_own, best_other = heavier, own, other
    return best_own, best_other, best


@compiled
def _would_double(slots: IntArray, own: int, other: int, per_rank: int) -> bool:
    """Whether swapping two slots puts an expert twice on one rank."""
    for base, arriving, leaving in ((own, slots[other], own), (other, slots[own], other)):
        start = base // per_rank * per_rank
        for slot in range(start, start + per_rank):
            if slot != leaving and slots[slot] == arriving:
                return True
    return False
