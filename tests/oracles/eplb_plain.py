"""EPLB in plain Python, from its description: the specification of planners/incumbents.py."""

from __future__ import annotations

from collections.abc import Sequence


def packed(weights: Sequence[float], n_packs: int) -> list[int]:
    """Pack of each item: heaviest item first, lightest pack with room, first pack on ties."""
    room = len(weights) // n_packs
    contents: list[list[int]] = [[] for _ in range(n_packs)]
    load = [0.0] * n_packs
    packs = [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        pack = min((p for p in range(n_packs) if len(contents[p]) < room), key=lambda p: load[p])
        contents[pack].append(item)
        load[pack] += weights[item]
        packs[item] = pack
    return packs


def replica_counts(weights: Sequence[float], n_slots: int) -> list[int]:
    """One slot each, then one more to the heaviest replica until the slots are used."""
    counts = [1] * len(weights)
    for _ in range(n_slots - len(weights)):
        heaviest = max(range(len(weights)), key=lambda e: (weights[e] / counts[e], -e))
        counts[heaviest] += 1
    return counts


def busiest_rank(
    weights: Sequence[float], n_slots: int, n_ranks: int, n_groups: int, n_nodes: int
) -> float:
    """Load of the busiest rank under EPLB (n_groups = n_nodes = 1: the global form)."""
    size = len(weights) // n_groups
    groups = [sum(weights[g * size : (g + 1) * size]) for g in range(n_groups)]
    node_of_group = packed(groups, n_nodes)
    busiest = 0.0
    for node in range(n_nodes):
        own = [w for e, w in enumerate(weights) if node_of_group[e // size] == node]
        counts = replica_counts(own, n_slots // n_nodes)
        replicas = [w / c for w, c in zip(own, counts, strict=True) for _ in range(c)]
        ranks = packed(replicas, n_ranks // n_nodes)
        loads = [0.0] * (n_ranks // n_nodes)
        for weight, rank in zip(replicas, ranks, strict=True):
            loads[rank] += weight
        busiest = max(busiest, *loads)
    return busiest
