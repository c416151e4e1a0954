"""What planners/dispatch.py counts, in plain Python: one token, one layer, one copy at a time."""

from __future__ import annotations

import numpy as np

from planners.plan import Placement

FIELDS = ("rank_tokens", "rank_distinct", "up_send", "up_recv", "out_send", "out_recv")


def slots_of(placement: Placement, layer: int, expert: int) -> list[int]:
    """Slots of an expert's replicas, increasing."""
    row = placement.physical_to_logical_map[layer].tolist()
    return [slot for slot, held in enumerate(row) if held == expert]


def local_slot(placement: Placement, layer: int, source: int, expert: int) -> int:
    """The replica a source rank uses under rule "local"."""
    slots = slots_of(placement, layer, expert)
    rank_of = {slot: slot // placement.slots_per_rank for slot in slots}
    node_of = {slot: rank_of[slot] // placement.ranks_per_node for slot in slots}
    home = source // placement.ranks_per_node
    on_rank = [slot for slot in slots if rank_of[slot] == source]
    if on_rank:
        return on_rank[0]
    near = [slot for slot in slots if node_of[slot] == home]
    if near:
        holders = {rank_of[slot] for slot in near}
        first = home * placement.ranks_per_node
        turn = sum(rank not in holders for rank in range(first, source))
        return near[(turn + expert) % len(near)]
    nodes = {node_of[slot] for slot in slots}
    turn = sum(rank // placement.ranks_per_node not in nodes for rank in range(source))
    return slots[(turn + expert) % len(slots)]


def chosen_slots(
    topk: np.ndarray, source: np.ndarray, placement: Placement, rule: str, first_row: int = 0
) -> list[list[list[int]]]:
    """Slot of every choice: [tokens][layers][choices made]."""
    used: dict[tuple[int, int], int] = {}
    mixed = (first_row * 2654435761 % 2**32) >> 15
    result = []
    for token in range(len(topk)):
        by_layer = []
        for layer in range(topk.shape[1]):
            slots = []
            for expert in topk[token, layer].tolist():
                if expert < 0:
                    continue
                if rule == "local":
                    slots.append(local_slot(placement, layer, int(source[token]), expert))
                    continue
                replicas = slots_of(placement, layer, expert)
                turn = used.get((layer, expert), 0)
                used[layer, expert] = turn + 1
                slots.append(replicas[(expert + layer + mixed + turn) % len(replicas)])
            by_layer.append(slots)
        result.append(by_layer)
    return result


def hops(source: int, ranks: list[int], per_node: int, mode: str) -> list[tuple[int, int]]:
    """(from, to) of every copy of one token that leaves a rank."""
    if mode == "expert":
        return [(source, rank) for rank in ranks if rank != source]
    wanted = sorted(set(ranks))
    if mode == "device":
        return [(source, rank) for rank in wanted if rank != source]
    made = []
    for node in sorted({rank // per_node for rank in wanted}):
        relay = node * per_node + source % per_node
        if relay != source:
            made.append((source, relay))
        made += [(relay, r) for r in wanted if r // per_node == node and r != relay]
    return made


def plain_counts(
    topk: np.ndarray,
    source: np.ndarray,
    placement: Placement,
    modes: tuple[str, str],
    first_row: int = 0,
) -> dict[str, np.ndarray]:
    """Every field of DispatchCounts for one step; modes is (mode, rule)."""
    mode, rule = modes
    shape = (placement.n_layers, placement.n_ranks)
    out = {field: np.zeros(shape) for field in FIELDS}
    slot_tokens = np.zeros((placement.n_layers, placement.n_slots))
    chosen = chosen_slots(topk, source, placement, rule, first_row)
    for token, by_layer in enumerate(chosen):
        for layer, slots in enumerate(by_layer):
            for slot in slots:
                slot_tokens[layer, slot] += 1
            ranks = [slot // placement.slots_per_rank for slot in slots]
            for a, b in hops(int(source[token]), ranks, placement.ranks_per_node, mode):
                same = a // placement.ranks_per_node == b // placement.ranks_per_node
                out["up_send" if same else "out_send"][layer, a] += 1
                out["up_recv" if same else "out_recv"][layer, b] += 1
    by_rank = slot_tokens.reshape(*shape, -1)
    out["rank_tokens"], out["rank_distinct"] = by_rank.sum(axis=2), (by_rank > 0).sum(axis=2)
    return out | {"slot_tokens": slot_tokens}
