"""Steps drawn from the popularity of experts, for inputs that hold counts and no tokens.

Tokens per expert are drawn, so compute and its busiest rank are priced with the noise of small
batches; what travels is an expectation (`expected_dispatch`), since who is chosen together with
whom is unknown.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from planners.dispatch import (
    Counts,
    DispatchCounts,
    Mode,
    Routing,
    expected_dispatch,
    inclusion_chances,
)
from planners.plan import Placement, replica_counts

Tokens = npt.NDArray[np.int64]


def draw_tokens(
    shares: Counts, n_tokens: int, routing: Routing, n_steps: int, rng: np.random.Generator
) -> Tokens:
    """int64[n_steps, moe_layers, n_experts] tokens that choose each expert in each step.

    shares  float64[moe_layers, n_experts] popularity, any unit
    Each expert's tokens are binomial with the chance of `inclusion_chances`, experts drawn
    independently; so the sum over experts is n_tokens * top_k on average only.
    """
    chance, _ = inclusion_chances(shares, routing)
    chance = np.clip(chance, 0.0, 1.0)
    return np.asarray(rng.binomial(n_tokens, chance, size=(n_steps, *chance.shape)))


def drawn_dispatch(
    shares: Counts, tokens: Tokens, n_tokens: int, placement: Placement, plan: tuple[Routing, Mode]
) -> DispatchCounts:
    """Counts of steps whose tokens per expert are given; copies are expectations.

    tokens   int64[steps, moe_layers, n_experts], as draw_tokens gives them; the same tokens can
             be used for several placements, which pairs their steps
    n_tokens tokens of a step over all ranks, as for draw_tokens
    plan     how the router chooses, and what travels
    returns  DispatchCounts with a steps axis and expected=True; replicas share an expert's tokens
             evenly, the first of the longer shares going by turns (expert + layer + step)
    """
    routing, mode = plan
    expected = expected_dispatch(shares, n_tokens / placement.n_ranks, placement, routing, mode)
    slot_tokens = _split(tokens, placement)
    by_rank = slot_tokens.reshape(*slot_tokens.shape[:2], placement.n_ranks, -1)
    shape = by_rank.shape[:3]
    return replace(
        expected,
        slot_tokens=slot_tokens.sum(axis=0).astype(np.float64),
        rank_tokens=by_rank.sum(axis=3).astype(np.float64),
        rank_distinct=(by_rank > 0).sum(axis=3).astype(np.float64),
        up_send=_every_step(expected.up_send, shape),
        up_recv=_every_step(expected.up_recv, shape),
        out_send=_every_step(expected.out_send, shape),
        out_recv=_every_step(expected.out_recv, shape),
    )


def _every_step(copies: Counts, shape: tuple[int, ...]) -> Counts:
    return np.ascontiguousarray(np.broadcast_to(copies, shape))


def _split(tokens: Tokens, placement: Placement) -> Tokens:
    """int64[steps, moe_layers, n_slots]: an even share of its expert's tokens for every slot."""
    physical = placement.physical_to_logical_map.astype(np.int64)
    n_replicas = np.take_along_axis(replica_counts(placement).astype(np.int64), physical, axis=1)
    ordinal = _ordinals(physical)
    layer = np.arange(physical.shape[0])[:, None]
    step = np.arange(tokens.shape[0])[:, None, None]
    place = (ordinal + physical + layer + step) % n_replicas
    of_expert = np.take_along_axis(
        tokens, np.broadcast_to(physical, (len(tokens), *physical.shape)), 2
    )
    return np.asarray((of_expert + n_replicas - 1 - place) // n_replicas)


def _ordinals(physical: Tokens) -> Tokens:
    """int64[moe_layers, n_slots]: how many earlier slots of the layer hold the same expert."""
    order = np.argsort(physical, axis=1, kind="stable")
    sorted_experts = np.take_along_axis(physical, order, axis=1)
    column = np.broadcast_to(np.arange(physical.shape[1]), physical.shape)
    is_first = np.ones(physical.shape, dtype=np.bool_)
    is_first[:, 1:] = sorted_experts[:, 1:] != sorted_experts[:, :-1]
    first = np.maximum.accumulate(np.where(is_first, column, 0), axis=1)
    ordinal = np.empty_like(physical)
    np.put_along_axis(ordinal, order, column - first, axis=1)
    return ordinal
