"""Compiled loops of `dispatch.py`; their plain form is tests/oracles/dispatch_plain.py."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

TOKENS, DISTINCT, UP_SEND, UP_RECV, OUT_SEND, OUT_RECV = range(6)
DEVICE, EXPERT, NODE = range(3)
EVEN, LOCAL = range(2)
BLOCK = 256  # tokens whose choices at all layers fit the second cache

Int16s = npt.NDArray[np.int16]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def count_steps(
    topk: Int16s,
    rows: Int64s,
    source_rank: Int32s,
    table: tuple[Int32s, Int32s],
    choice: Int32s,
    shape: tuple[int, int, int],
    modes: tuple[int, int],
    slot_tokens: Int64s,
    out: Floats,
) -> None:
    """Add every step's counts to slot_tokens [layers, slots] and out [6, steps, layers, ranks].

    Tokens go by in blocks that fit the cache, layer by layer within a block, so that a layer's
    counters stay in the nearest cache. `last_*` arrays hold the stamp of the last token (or step)
    that touched an entry, so nothing needs clearing. Under "even" the j-th choice of expert e in
    layer l takes replica (e + l + first row of the step + j) mod n, which staggers experts,
    layers and steps.
    """
    start, replica_slot = table
    n_ranks, per_rank, per_node = shape
    n_steps, n_tokens = rows.shape
    n_layers = topk.shape[1]
    n_experts = start.shape[1] - 1
    n_slots = slot_tokens.shape[1]
    rank_of = np.arange(n_slots) // per_rank
    node_of = np.arange(n_ranks) // per_node
    turn = np.zeros((n_layers, n_experts), dtype=np.int32)
    last_slot = np.full((n_layers, n_slots), -1, dtype=np.int64)
    last = np.full((2, n_ranks), -1, dtype=np.int64)
    counted = np.zeros((6, n_ranks), dtype=np.int64)
    stamp = 0
    for step in range(n_steps):
        if modes[1] == EVEN and n_tokens > 0:
            for layer in range(n_layers):
                for expert in range(n_experts):
                    n = start[layer, expert + 1] - start[layer, expert]
                    turn[layer, expert] = (expert + layer + rows[step, 0]) % n
        for low in range(0, n_tokens, BLOCK):
            high = min(low + BLOCK, n_tokens)
            for layer in range(n_layers):
                counted[:] = 0
                _count_block(
                    (topk, rows[step, low:high], source_rank[low:high], layer),
                    (start[layer], replica_slot[layer], turn[layer]),
                    choice[min(layer, len(choice) - 1)],
                    (rank_of, node_of, per_node),
                    modes,
                    (stamp, last[0], last[1], step, last_slot[layer]),
                    slot_tokens[layer],
                    counted,
                )
                stamp += high - low
                for field in range(6):
                    for rank in range(n_ranks):
                        out[field, step, layer, rank] += counted[field, rank]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _count_block(
    tokens: tuple[Int16s, Int64s, Int32s, int],
    replicas: tuple[Int32s, Int32s, Int32s],
    choice: Int32s,
    places: tuple[Int64s, Int64s, int],
    modes: tuple[int, int],
    stamps: tuple[int, Int64s, Int64s, int, Int64s],
    slot_tokens: Int64s,
    counted: Int64s,
) -> None:
    """Add a block of tokens at one layer to slot_tokens [slots] and counted [6, ranks]."""
    topk, rows, source_rank, layer = tokens
    start, replica_slot, turn = replicas
    rank_of, node_of, per_node = places
    mode, rule = modes
    stamp, last_rank, last_node, step, last_slot = stamps
    for token in range(len(rows)):
        stamp += 1
        row = rows[token]
        source = source_rank[token]
        home = node_of[source]
        index = source - home * per_node
        for j in range(topk.shape[2]):
            expert = topk[row, layer, j]
            if expert < 0:
                continue
            if rule == EVEN:
                first = start[expert]
                n = start[expert + 1] - first
                if n == 1:
                    slot = replica_slot[first]
                else:
                    slot = replica_slot[first + turn[expert]]
                    following = turn[expert] + 1
                    turn[expert] = following if following < n else 0
            else:
                slot = choice[source, expert]
            rank = rank_of[slot]
            slot_tokens[slot] += 1
            counted[TOKENS, rank] += 1
            if last_slot[slot] != step:
                last_slot[slot] = step
                counted[DISTINCT, rank] += 1
            if mode != EXPERT:
                if last_rank[rank] == stamp:
                    continue
                last_rank[rank] = stamp
            node = node_of[rank]
            if node == home:
                if rank != source:
                    counted[UP_SEND, source] += 1
                    counted[UP_RECV, rank] += 1
            elif mode != NODE:
                counted[OUT_SEND, source] += 1
                counted[OUT_RECV, rank] += 1
            else:
                relay = node * per_node + index
                if last_node[node] != stamp:
                    last_node[node] = stamp
                    counted[OUT_SEND, source] += 1
                    counted[OUT_RECV, relay] += 1
                if rank != relay:
                    counted[UP_SEND, relay] += 1
                    counted[UP_RECV, rank] += 1


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def choose_local(
    start: Int32s, replica_slot: Int32s, per_rank: int, per_node: int, choice: Int32s
) -> None:
    """Fill choice [layers, ranks, experts] with the nearest replica's slot, ties taken in turn."""
    n_layers, n_ranks, n_experts = choice.shape
    for layer in range(n_layers):
        for expert in range(n_experts):
            first, end = start[layer, expert], start[layer, expert + 1]
            n_far = 0
            for node in range(n_ranks // per_node):
                low, high = node * per_node, (node + 1) * per_node
                a = first
                while a < end and replica_slot[layer, a] // per_rank < low:
                    a += 1
                b = a
                while b < end and replica_slot[layer, b] // per_rank < high:
                    b += 1
                n_near = 0
                for rank in range(low, high):
                    own = -1
                    for i in range(a, b):
                        if replica_slot[layer, i] // per_rank == rank:
                            own = replica_slot[layer, i]
                            break
                    if own >= 0:
                        choice[layer, rank, expert] = own
                    elif b > a:
                        at = a + (n_near + expert) % (b - a)
                        choice[layer, rank, expert] = replica_slot[layer, at]
                        n_near += 1
                    else:
                        at = first + (n_far + expert) % (end - first)
                        choice[layer, rank, expert] = replica_slot[layer, at]
                        n_far += 1


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _reach(
    slots: Int32s, chance: Floats, opening: Floats, missed: Floats, scratch: Floats
) -> float:
    """Chance that a token reaches the unit (rank or node) that holds these slots.

    slots    experts in the unit's slots; chance float64[experts] of one replica of each
    missed   float64[groups] workspace; scratch float64[experts] workspace, zero before and after
    """
    n_groups = len(opening)
    group_size = len(chance) // n_groups
    missed[:] = 1.0
    for expert in slots:
        scratch[expert] += chance[expert]
    for expert in slots:
        if scratch[expert] > 0.0:
            group = expert // group_size
            missed[group] *= max(0.0, 1.0 - scratch[expert] / opening[group])
            scratch[expert] = 0.0
    none = 1.0
    for group in range(n_groups):
        none *= 1.0 - opening[group] * (1.0 - missed[group])
    return 1.0 - none


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def expected_counts(
    physical: Int32s,
    inclusion: Floats,
    opening: Floats,
    shape: tuple[int, int, int],
    mode: int,
    tokens_per_rank: float,
    slot_tokens: Floats,
    out: Floats,
) -> None:
    """Fill slot_tokens [layers, slots] and out [6, layers, ranks] with expectations."""
    n_ranks, per_rank, per_node = shape
    n_layers, n_slots = physical.shape
    n_experts = inclusion.shape[1]
    n_nodes = n_ranks // per_node
    total = tokens_per_rank * n_ranks
    replicas = np.zeros(n_experts, dtype=np.int64)
    chance = np.zeros(n_experts)
    scratch = np.zeros(n_experts)
    missed = np.zeros(opening.shape[1])
    reach = np.zeros(n_ranks)
    for layer in range(n_layers):
        replicas[:] = 0
        for slot in range(n_slots):
            replicas[physical[layer, slot]] += 1
        for expert in range(n_experts):
            chance[expert] = inclusion[layer, expert] / replicas[expert]
        for slot in range(n_slots):
            y = chance[physical[layer, slot]]
            rank = slot // per_rank
            slot_tokens[layer, slot] = total * y
            out[TOKENS, layer, rank] += total * y
            if y < 1.0:
                out[DISTINCT, layer, rank] -= np.expm1(total * np.log1p(-y))
            elif total > 0.0:
                out[DISTINCT, layer, rank] += 1.0
        everywhere = 0.0
        for rank in range(n_ranks):
            slots = physical[layer, rank * per_rank : (rank + 1) * per_rank]
            if mode == EXPERT:
                reach[rank] = 0.0
                for expert in slots:
                    reach[rank] += chance[expert]
            else:
                reach[rank] = _reach(slots, chance, opening[layer], missed, scratch)
            everywhere += reach[rank]
        out_total = 0.0
        if mode == NODE and n_nodes > 1:
            for node in range(n_nodes):
                low = node * per_node * per_rank
                slots = physical[layer, low : low + per_node * per_rank]
                entered = _reach(slots, chance, opening[layer], missed, scratch)
                out_total += entered
                for rank in range(node * per_node, (node + 1) * per_node):
                    out[OUT_RECV, layer, rank] = tokens_per_rank * (n_nodes - 1) * entered
                    out[OUT_SEND, layer, rank] = -tokens_per_rank * entered
            for rank in range(n_ranks):
                out[OUT_SEND, layer, rank] += tokens_per_rank * out_total
        for node in range(n_nodes):
            inside = 0.0
            for rank in range(node * per_node, (node + 1) * per_node):
                inside += reach[rank]
            for rank in range(node * per_node, (node + 1) * per_node):
                sources = n_nodes if mode == NODE else 1
                out[UP_SEND, layer, rank] = tokens_per_rank * sources * (inside - reach[rank])
                out[UP_RECV, layer, rank] = tokens_per_rank * sources * (per_node - 1) * reach[rank]
                if mode != NODE:
                    out[OUT_SEND, layer, rank] = tokens_per_rank * (everywhere - inside)
                    out[OUT_RECV, layer, rank] = (
                        tokens_per_rank * (n_ranks - per_node) * reach[rank]
                    )
