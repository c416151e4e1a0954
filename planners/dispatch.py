"""Where each token goes under a placement: counted from the routing itself, or expected.

Everything is counted in copies of one token's hidden vector; bytes follow in `step_time.py`.
Copies of the way back (combine) are those of the way out (dispatch) with send and receive
exchanged, in every mode. Three modes say what travels:

device  one copy per token and destination device (the default: duplicates are dropped)
expert  one copy per token and expert, as DeepEP's low-latency kernels send them
node    one copy per token and destination node over the NIC, to the rank of the same index there,
        which forwards one copy per device over the in-node link, as DeepEP's normal kernels do

A copy that stays on its own rank moves no bytes. Grouped multiplication counts every (token,
expert) pair, whatever the mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.plan import Placement

Mode = Literal["device", "expert", "node"]
Rule = Literal["even", "local"]
Counts = npt.NDArray[np.float64]
MODES: Mapping[str, int] = MappingProxyType({"device": 0, "expert": 1, "node": 2})
RULES: Mapping[str, int] = MappingProxyType({"even": 0, "local": 1})


@dataclass(frozen=True, slots=True)
class DispatchCounts:
    """What a step of tokens does at every MoE layer and rank, in token copies.

    slot_tokens    float64[moe_layers, n_slots] (token, expert) pairs of each slot, all steps
    rank_tokens    float64[..., moe_layers, n_ranks] pairs each rank computes
    rank_distinct  float64[..., moe_layers, n_ranks] slots of the rank with at least one token
    up_send, up_recv    float64[..., moe_layers, n_ranks] copies over the in-node link (dispatch)
    out_send, out_recv  float64[..., moe_layers, n_ranks] copies over the link between nodes
    n_tokens       tokens of each step, over all ranks
    expected       True when computed from popularity alone (kind "assumed"), not from routing

    The leading axis is steps, or absent for one step. Counts from routing are whole numbers.
    """

    slot_tokens: Counts
    rank_tokens: Counts
    rank_distinct: Counts
    up_send: Counts
    up_recv: Counts
    out_send: Counts
    out_recv: Counts
    n_tokens: float
    expected: bool = False

    def step(self, index: int) -> DispatchCounts:
        """One step of many, without the steps axis (slot_tokens stays that of all steps)."""
        per_rank = ("rank_tokens", "rank_distinct", "up_send", "up_recv", "out_send", "out_recv")
        return replace(self, **{field: getattr(self, field)[index] for field in per_rank})


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses: top_k experts from topk_groups of n_groups groups (1, 1: no groups)."""

    top_k: int
    n_groups: int = 1
    topk_groups: int = 1


def source_ranks(n_tokens: int, n_ranks: int) -> npt.NDArray[np.int32]:
    """int32[n_tokens]: data-parallel ranks of tokens in equal consecutive blocks (as near as)."""
    return (np.arange(n_tokens, dtype=np.int64) * n_ranks // max(n_tokens, 1)).astype(np.int32)


def dispatch_counts(
    topk: npt.NDArray[np.int16],
    source_rank: npt.NDArray[np.int32],
    placement: Placement,
    mode: Mode = "device",
    rule: Rule = "even",
) -> DispatchCounts:
    """Counts of one step, token by token.

    topk         int16[tokens, moe_layers, top_k] logical experts, -1 where missing (not counted)
    source_rank  int32[tokens] rank that holds the token before dispatch and after combine
    rule         which replica: "even" takes an expert's replicas in turn, so that their tokens
                 differ by at most one; "local" takes a replica on the token's rank, else on its
                 node, else anywhere, each source rank always the same one
    raises       PlanError when shapes, ids or ranks do not fit the placement
    """
    rows = np.arange(topk.shape[0], dtype=np.int64)[None, :]
    return step_counts(topk, rows, source_rank, placement, mode, rule).step(0)


def step_counts(
    topk: npt.NDArray[np.int16],
    rows: npt.NDArray[np.int64],
    source_rank: npt.NDArray[np.int32],
    placement: Placement,
    mode: Mode = "device",
    rule: Rule = "even",
) -> DispatchCounts:
    """Counts of many steps: step i runs tokens topk[rows[i]]; see dispatch_counts.

    rows         int64[steps, tokens_per_step] indices into topk
    source_rank  int32[tokens_per_step], the same for every step
    returns      DispatchCounts with a leading steps axis
    """
    from planners.dispatch_kernel import count_steps

    _check_tokens(topk, rows, source_rank, placement)
    steps = rows.shape[0]
    table = replica_table(placement)
    out = np.zeros((6, steps, placement.n_layers, placement.n_ranks), dtype=np.float64)
    slot_tokens = np.zeros((placement.n_layers, placement.n_slots), dtype=np.int64)
    choice = local_choice(placement) if rule == "local" else np.zeros((1, 1, 1), dtype=np.int32)
    shape = (placement.n_ranks, placement.slots_per_rank, placement.ranks_per_node)
    modes = (_code(MODES, mode, "mode"), _code(RULES, rule, "rule"))
    count_steps(topk, rows, source_rank, table, choice, shape, modes, slot_tokens, out)
    return _assemble(slot_tokens.astype(np.float64), out, float(rows.shape[1]), False)


def expected_dispatch(
    shares: Counts,
    tokens_per_rank: float,
    placement: Placement,
    routing: Routing,
    mode: Mode = "device",
) -> DispatchCounts:
    """Expected counts of one step when only the popularity of experts is known.

    shares           float64[moe_layers, n_experts] tokens per expert, any unit, >= 0
    tokens_per_rank  tokens that start on every rank
    returns          DispatchCounts of expectations, expected=True, no steps axis

    Assumes that every rank's tokens follow the same popularity, that tokens are independent, and
    that each replica of an expert is equally likely ("even"). x_e = top_k * popularity, capped at
    1, is the chance of an expert. A slot with chance y gets a token with chance 1 - (1 - y)^n.

    Without groups a token's choices are independent but for being top_k in number. With groups a
    group is open with chance q_g (in proportion to its popularity, capped, summing to
    topk_groups), independently of the others; inside open groups experts are drawn independently
    with chance x_e / q_g. Then a token reaches rank r with chance
    1 - prod_g (1 - q_g (1 - prod_{e of g on r} (1 - x_e / q_g))).

    Real routing is correlated, across experts and in time, so all of this is an estimate.
    """
    from planners.dispatch_kernel import expected_counts

    _check_shares(shares, placement, routing)
    inclusion, opening = inclusion_chances(shares, routing)
    out = np.zeros((6, placement.n_layers, placement.n_ranks), dtype=np.float64)
    slot_tokens = np.zeros((placement.n_layers, placement.n_slots), dtype=np.float64)
    shape = (placement.n_ranks, placement.slots_per_rank, placement.ranks_per_node)
    physical = np.ascontiguousarray(placement.physical_to_logical_map)
    code = _code(MODES, mode, "mode")
    router = (routing.top_k, _is_fixed(routing, placement))
    expected_counts(
        physical, inclusion, opening, shape, code, router, float(tokens_per_rank), slot_tokens, out
    )
    n_tokens = float(tokens_per_rank) * placement.n_ranks
    return _assemble(slot_tokens, out, n_tokens, True)


def inclusion_chances(shares: Counts, routing: Routing) -> tuple[Counts, Counts]:
    """(x, q): chance that a token chooses each expert, and that each group is open for it.

    shares   float64[moe_layers, n_experts] popularity, any unit; a layer without any is uniform
    returns  x float64[moe_layers, n_experts] summing to top_k, x <= q of the expert's group;
             q float64[moe_layers, n_groups] summing to topk_groups
    """
    n_layers, n_experts = shares.shape
    by_group = shares.reshape(n_layers, routing.n_groups, -1)
    opening = capped_shares(by_group.sum(axis=2), float(routing.topk_groups))
    if routing.n_groups == routing.topk_groups:
        opening = np.ones_like(opening)
    limit = np.repeat(opening, n_experts // routing.n_groups, axis=1)
    return capped_shares(shares, float(routing.top_k), limit), opening


def capped_shares(shares: Counts, total: float, limit: Counts | None = None) -> Counts:
    """float64 like shares: proportional to shares, each at most its limit (1), summing to total.

    What is cut off is spread over the others in proportion, a few times; where all with any
    share are at their limit the rest is spread by room, so the sum is reached exactly.
    """
    cap = np.ones_like(shares) if limit is None else limit
    sums = shares.sum(axis=1, keepdims=True)
    weights = np.where(sums > 0, shares / np.where(sums > 0, sums, 1.0), 1.0 / shares.shape[1])
    result = np.minimum(weights * total, cap)
    for _ in range(8):
        short = total - result.sum(axis=1, keepdims=True)
        if not (short > 1e-9).any():
            return result
        free = np.where(result < cap, weights, 0.0)
        scale = free.sum(axis=1, keepdims=True)
        grow = np.divide(short * free, scale, out=np.zeros_like(free), where=scale > 0)
        result = np.minimum(result + grow, cap)
    room = cap - result
    short = np.maximum(total - result.sum(axis=1, keepdims=True), 0.0)
    spread = np.divide(
        room, room.sum(axis=1, keepdims=True), out=np.zeros_like(room), where=room > 0
    )
    return np.asarray(np.minimum(result + short * spread, cap))


def replica_table(placement: Placement) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """(start, slot) of every expert's replicas: slot[l, start[l, e] : start[l, e + 1]].

    start  int32[moe_layers, n_experts + 1]
    slot   int32[moe_layers, n_slots], increasing within an expert
    """
    physical = placement.physical_to_logical_map
    slot = np.argsort(physical, axis=1, kind="stable").astype(np.int32)
    start = np.zeros((placement.n_layers, placement.n_experts + 1), dtype=np.int32)
    for layer in range(placement.n_layers):
        counts = np.bincount(physical[layer], minlength=placement.n_experts)
        np.cumsum(counts, out=start[layer, 1:])
    return start, slot


def local_choice(placement: Placement) -> npt.NDArray[np.int32]:
    """int32[moe_layers, n_ranks, n_experts]: slot that each source rank uses for each expert.

    A replica of its own rank, else one of its node, else any. Ranks of a node that must share its
    replicas take them in turn, and so do ranks without any in their node, so that the sources of
    an expert are spread evenly over the replicas that serve them.
    """
    from planners.dispatch_kernel import choose_local

    start, slot = replica_table(placement)
    choice = np.zeros((placement.n_layers, placement.n_ranks, placement.n_experts), dtype=np.int32)
    choose_local(start, slot, placement.slots_per_rank, placement.ranks_per_node, choice)
    return choice


def _is_fixed(routing: Routing, placement: Placement) -> bool:
    """Whether the number of choices is held at top_k: no closed groups, and e_k within float64."""
    all_open = routing.n_groups == routing.topk_groups
    return all_open and routing.top_k < placement.n_experts and routing.top_k <= 40


def _code(table: Mapping[str, int], name: str, field: str) -> int:
    if name not in table:
        raise PlanError(f"{field} {name!r} is unknown, known: {', '.join(table)}")
    return table[name]


def _assemble(slot_tokens: Counts, out: Counts, n_tokens: float, expected: bool) -> DispatchCounts:
    """DispatchCounts from out[6, ...] in the order of the kernel's index names."""
    rank_tokens, distinct, up_send, up_recv, out_send, out_recv = out
    return DispatchCounts(
        slot_tokens=slot_tokens,
        rank_tokens=rank_tokens,
        rank_distinct=distinct,
        up_send=up_send,
        up_recv=up_recv,
        out_send=out_send,
        out_recv=out_recv,
        n_tokens=n_tokens,
        expected=expected,
    )


def _check_tokens(
    topk: npt.NDArray[np.int16],
    rows: npt.NDArray[np.int64],
    source_rank: npt.NDArray[np.int32],
    placement: Placement,
) -> None:
    if topk.ndim != 3 or topk.shape[1] != placement.n_layers:
        raise PlanError(f"topk: shape {topk.shape}, expected [tokens, {placement.n_layers}, top_k]")
    if topk.size and topk.max() >= placement.n_experts:
        raise PlanError(f"topk: expert {topk.max()}, expected below {placement.n_experts}")
    if rows.ndim != 2 or (rows.size and (rows.min() < 0 or rows.max() >= topk.shape[0])):
        raise PlanError(f"rows: shape {rows.shape}, expected [steps, tokens] in 0..{len(topk) - 1}")
    if source_rank.shape != rows.shape[1:]:
        raise PlanError(f"source_rank: shape {source_rank.shape}, expected {rows.shape[1:]}")
    if source_rank.size and not 0 <= source_rank.min() <= source_rank.max() < placement.n_ranks:
        raise PlanError(
            f"source_rank: {source_rank.min()}..{source_rank.max()}, expected"
            f" 0..{placement.n_ranks - 1}"
        )


def _check_shares(shares: Counts, placement: Placement, routing: Routing) -> None:
    expected = (placement.n_layers, placement.n_experts)
    if shares.shape != expected:
        raise PlanError(f"shares: shape {shares.shape}, expected {expected}")
    if not np.isfinite(shares).all() or (shares < 0).any():
        raise PlanError("shares: found a negative or non-finite value, expected >= 0")
    if placement.n_experts % routing.n_groups or not 0 < routing.topk_groups <= routing.n_groups:
        raise PlanError(
            f"routing: {routing.topk_groups} of {routing.n_groups} groups of"
            f" {placement.n_experts} experts is not possible"
        )
    if not 0 < routing.top_k <= placement.n_experts // routing.n_groups * routing.topk_groups:
        raise PlanError(f"routing: top_k={routing.top_k} does not fit the open groups")
