"""Compiled loops of `dispatch.py`; their plain form is tests/oracles/dispatch_plain.py."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

TOKENS, DISTINCT, UP_SEND, UP_RECV, OUT_SEND, OUT_RECV = range(6)
DEVICE, EXPERT, NODE = range(3)
EVEN, LOCAL = range(2)
BLOCK = 256  # tokens whose choices at all layers fit the second cache
MIX = 2654435761  # golden ratio * 2^32 (Knuth): scrambles the first row of a step
MOST_ODDS = 1e6  # of an expert that every token chooses

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
    counters stay in the nearest cache. Under "even" the j-th choice of expert e in layer l takes
    replica (e + l + mixed + j) mod n, where mixed scrambles the first row of the step: so
    experts, layers and steps are staggered, and a step's counts depend on itself alone.
    """
    start, replica_slot = table
    n_ranks, per_rank, per_node = shape
    mode, rule = modes
    n_steps, n_tokens = rows.shape
    n_layers = topk.shape[1]
    n_slots = slot_tokens.shape[1]
    rank_of = np.arange(n_slots) // per_rank
    node_of = np.arange(n_ranks) // per_node
    turn = np.zeros((n_layers, start.shape[1] - 1), dtype=np.int32)
    used = np.zeros((n_layers, n_slots), dtype=np.int64)
    copies = np.zeros((n_layers, 4, n_ranks), dtype=np.int64)
    last = np.full((2, n_ranks), -1, dtype=np.int64)
    stamp = 0
    for step in range(n_steps):
        used[:] = 0
        copies[:] = 0
        if rule == EVEN and n_tokens > 0:
            _first_turns(start, ((rows[step, 0] * MIX) & 0xFFFFFFFF) >> 15, turn)
        for low in range(0, n_tokens, BLOCK):
            high = min(low + BLOCK, n_tokens)
            for layer in range(n_layers):
                served = (start[layer], replica_slot[layer], turn[layer])
                nearest = choice[min(layer, len(choice) - 1)]
                tokens = (topk, rows[step, low:high], source_rank[low:high], layer, stamp)
                places = (rank_of, node_of, per_node)
                if mode == NODE:
                    _relayed(
                        tokens, served, nearest, places, rule, last, used[layer], copies[layer]
                    )
                else:
                    dropped = mode == DEVICE
                    _direct(
                        tokens,
                        served,
                        nearest,
                        places,
                        (rule, dropped),
                        last[0],
                        used[layer],
                        copies[layer],
                    )
                stamp += high - low
        for layer in range(n_layers):
            for slot in range(n_slots):
                rank = rank_of[slot]
                slot_tokens[layer, slot] += used[layer, slot]
                out[TOKENS, step, layer, rank] += used[layer, slot]
                out[DISTINCT, step, layer, rank] += used[layer, slot] > 0
            for link in range(4):
                for rank in range(n_ranks):
                    out[UP_SEND + link, step, layer, rank] = copies[layer, link, rank]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _first_turns(start: Int32s, mixed: int, turn: Int32s) -> None:
    """Fill turn [layers, experts] with the replica that serves each expert's first choice."""
    for layer in range(turn.shape[0]):
        for expert in range(turn.shape[1]):
            n = start[layer, expert + 1] - start[layer, expert]
            turn[layer, expert] = (expert + layer + mixed) % n


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _served_by(
    expert: int,
    source: int,
    rule: int,
    served: tuple[Int32s, Int32s, Int32s],
    nearest: Int32s,
) -> int:
    """Slot that serves a choice; under "even" the next choice takes the next replica."""
    if rule == LOCAL:
        return int(nearest[source, expert])
    start, replica_slot, turn = served
    first = start[expert]
    now = turn[expert]
    turn[expert] = now + 1 if now + 1 < start[expert + 1] - first else 0
    return int(replica_slot[first + now])


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _direct(
    tokens: tuple[Int16s, Int64s, Int32s, int, int],
    served: tuple[Int32s, Int32s, Int32s],
    nearest: Int32s,
    places: tuple[Int64s, Int64s, int],
    options: tuple[int, bool],
    last_rank: Int64s,
    used: Int64s,
    copies: Int64s,
) -> None:
    """Add a block of tokens at one layer, each copy going straight to its rank.

    Without branches in the inner loop, because none of its questions can be guessed well:
    whether a copy is new (last_rank holds the stamp of the last token that went there), and
    whether it stays in the node, are added as 0 or 1.
    """
    topk, rows, source_rank, layer, stamp = tokens
    rank_of, node_of, _ = places
    rule, dropped = options
    for token in range(len(rows)):
        stamp += 1
        row, source = rows[token], source_rank[token]
        home = node_of[source]
        near_sent, far_sent = 0, 0
        for j in range(topk.shape[2]):
            expert = topk[row, layer, j]
            if expert < 0:
                continue
            slot = _served_by(expert, source, rule, served, nearest)
            used[slot] += 1
            rank = rank_of[slot]
            is_new = (last_rank[rank] != stamp) | (not dropped)
            last_rank[rank] = stamp
            is_far = node_of[rank] != home
            far = 1 if is_new & is_far else 0
            near = 1 if is_new & (not is_far) & (rank != source) else 0
            copies[UP_RECV - UP_SEND, rank] += near
            copies[OUT_RECV - UP_SEND, rank] += far
            near_sent += near
            far_sent += far
        copies[0, source] += near_sent
        copies[OUT_SEND - UP_SEND, source] += far_sent


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _relayed(
    tokens: tuple[Int16s, Int64s, Int32s, int, int],
    served: tuple[Int32s, Int32s, Int32s],
    nearest: Int32s,
    places: tuple[Int64s, Int64s, int],
    rule: int,
    last: Int64s,
    used: Int64s,
    copies: Int64s,
) -> None:
    """Add a block of tokens at one layer, copies going to the rank of the same index first.

    In the token's own node that relay is the source itself. last holds the stamps of the last
    token that went to each rank (row 0) and node (row 1).
    """
    topk, rows, source_rank, layer, stamp = tokens
    rank_of, node_of, per_node = places
    for token in range(len(rows)):
        stamp += 1
        row, source = rows[token], source_rank[token]
        home = node_of[source]
        index = source - home * per_node
        for j in range(topk.shape[2]):
            expert = topk[row, layer, j]
            if expert < 0:
                continue
            slot = _served_by(expert, source, rule, served, nearest)
            used[slot] += 1
            rank = rank_of[slot]
            node = node_of[rank]
            relay = node * per_node + index
            far = 1 if (last[1, node] != stamp) & (node != home) else 0
            near = 1 if (last[0, rank] != stamp) & (rank != relay) else 0
            last[0, rank] = stamp
            last[1, node] = stamp
            copies[0, relay] += near
            copies[UP_RECV - UP_SEND, rank] += near
            copies[OUT_SEND - UP_SEND, source] += far
            copies[OUT_RECV - UP_SEND, relay] += far


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
def _reach_groups(
    slots: Int32s, chance: Floats, opening: Floats, missed: Floats, scratch: Floats
) -> float:
    """Chance that a token reaches the unit (rank or node) of these slots, groups being limited.

    chance   float64[experts] of one replica of each expert; opening float64[groups]
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
def _times(series: Floats, weight: float) -> None:
    """Multiply a truncated power series by (1 + weight z)."""
    for i in range(len(series) - 1, 0, -1):
        series[i] += weight * series[i - 1]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _reach_fixed(
    slots: Int32s, replicas: Int64s, odds: Floats, every: Floats, work: tuple[Floats, Floats]
) -> float:
    """Chance that a token with exactly top_k experts reaches the unit of these slots.

    Choices are independent given their number (conditional Poisson): the share of weight in
    e_k, the elementary symmetric polynomial of the odds, that avoids the unit. An expert with a
    share f of its replicas in the unit keeps odds * (1 - f). Factors are divided out of the
    whole product where that is stable (odds <= 1); else the product is formed anew.

    every  float64[top_k + 1] product of (1 + odds z) over all experts, truncated
    work   float64[top_k + 1], and float64[experts] that is zero before and after
    """
    series, held = work
    series[:] = every
    is_stable = True
    for expert in slots:
        held[expert] += 1.0
    for expert in slots:
        is_stable = is_stable and odds[expert] <= 1.0
    if is_stable:
        for expert in slots:
            if held[expert] > 0.0:
                for i in range(1, len(series)):
                    series[i] -= odds[expert] * series[i - 1]
                _times(series, odds[expert] * (1.0 - held[expert] / replicas[expert]))
                held[expert] = 0.0
    else:
        series[:] = 0.0
        series[0] = 1.0
        for expert in range(len(odds)):
            share = held[expert] / replicas[expert]
            _times(series, odds[expert] * (1.0 - share))
            held[expert] = 0.0
    return float(min(1.0, max(0.0, 1.0 - series[-1] / every[-1])))


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _reaches(
    slots: Int32s,
    n_units: int,
    layer_chances: tuple[Int64s, Floats, Floats, Floats, Floats],
    is_fixed: bool,
    work: tuple[Floats, Floats, Floats],
    reach: Floats,
) -> None:
    """Fill reach [units] for the units that hold equal consecutive parts of a layer's slots."""
    replicas, chance, opening, odds, every = layer_chances
    series, scratch, missed = work
    width = len(slots) // n_units
    for unit in range(n_units):
        part = slots[unit * width : (unit + 1) * width]
        if is_fixed:
            reach[unit] = _reach_fixed(part, replicas, odds, every, (series, scratch))
        else:
            reach[unit] = _reach_groups(part, chance, opening, missed, scratch)


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def expected_counts(
    physical: Int32s,
    inclusion: Floats,
    opening: Floats,
    shape: tuple[int, int, int],
    mode: int,
    router: tuple[int, bool],
    tokens_per_rank: float,
    slot_tokens: Floats,
    out: Floats,
) -> None:
    """Fill slot_tokens [layers, slots] and out [6, layers, ranks] with expectations.

    router  (top_k, whether a token's choices are taken to be exactly top_k)
    """
    n_ranks, per_rank, per_node = shape
    top_k, is_fixed = router
    n_layers, n_slots = physical.shape
    n_experts = inclusion.shape[1]
    n_nodes = n_ranks // per_node
    total = tokens_per_rank * n_ranks
    replicas = np.zeros(n_experts, dtype=np.int64)
    chance, odds = np.zeros(n_experts), np.zeros(n_experts)
    series, every = np.zeros(top_k + 1), np.zeros(top_k + 1)
    work = (series, np.zeros(n_experts), np.zeros(opening.shape[1]))
    reach, entered = np.zeros(n_ranks), np.zeros(n_nodes)
    for layer in range(n_layers):
        slots = physical[layer]
        replicas[:] = 0
        for expert in slots:
            replicas[expert] += 1
        every[:] = 0.0
        every[0] = 1.0
        for expert in range(n_experts):
            x = inclusion[layer, expert]
            chance[expert] = x / replicas[expert]
            odds[expert] = min(x / max(1.0 - x, 1e-300), MOST_ODDS)
            if is_fixed:
                _times(every, odds[expert])
        for slot in range(n_slots):
            y = chance[slots[slot]]
            rank = slot // per_rank
            slot_tokens[layer, slot] = total * y
            out[TOKENS, layer, rank] += total * y
            if y < 1.0:
                out[DISTINCT, layer, rank] -= np.expm1(total * np.log1p(-y))
            elif total > 0.0:
                out[DISTINCT, layer, rank] += 1.0
        chances = (replicas, chance, opening[layer], odds, every)
        if mode == EXPERT:
            for rank in range(n_ranks):
                reach[rank] = chance[slots[rank * per_rank : (rank + 1) * per_rank]].sum()
        else:
            _reaches(slots, n_ranks, chances, is_fixed, work, reach)
        if mode == NODE:
            _reaches(slots, n_nodes, chances, is_fixed, work, entered)
        _copies((n_ranks, per_node, mode), tokens_per_rank, reach, entered, out[:, layer])


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _copies(
    shape: tuple[int, int, int],
    tokens_per_rank: float,
    reach: Floats,
    entered: Floats,
    out: Floats,
) -> None:
    """Fill the four copy rows of out [6, ranks] from the chances to reach ranks and nodes."""
    n_ranks, per_node, mode = shape
    n_nodes = n_ranks // per_node
    for rank in range(n_ranks):
        node = rank // per_node
        inside = reach[node * per_node : (node + 1) * per_node].sum()
        if mode == NODE:  # every token that enters the node is handed on inside it
            handed_on = tokens_per_rank * n_nodes
            out[OUT_SEND, rank] = tokens_per_rank * (entered.sum() - entered[node])
            out[OUT_RECV, rank] = tokens_per_rank * (n_nodes - 1) * entered[node]
        else:
            handed_on = tokens_per_rank
            out[OUT_SEND, rank] = tokens_per_rank * (reach.sum() - inside)
            out[OUT_RECV, rank] = tokens_per_rank * (n_ranks - per_node) * reach[rank]
        out[UP_SEND, rank] = handed_on * (inside - reach[rank])
        out[UP_RECV, rank] = handed_on * (per_node - 1) * reach[rank]
