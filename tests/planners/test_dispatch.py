"""Token-level counts against the plain form, their laws, and expectations against draws."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.dispatch import (
    MODES,
    RULES,
    Mode,
    Routing,
    capped_shares,
    dispatch_counts,
    expected_dispatch,
    inclusion_chances,
    local_choice,
    source_ranks,
    step_counts,
)
from planners.errors import PlanError
from planners.plan import Placement, replica_counts
from tests.ep_examples import contiguous, random_topk, replicated
from tests.oracles.dispatch_plain import FIELDS, local_slot, plain_counts

seeds = st.integers(0, 2**32 - 1)
modes = st.sampled_from(list(MODES))
rules = st.sampled_from(list(RULES))


def small_case(seed: int) -> tuple[np.ndarray, np.ndarray, Placement]:
    """Random placement, routing with missing choices, and sources."""
    rng = np.random.default_rng(seed)
    per_node, n_nodes = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    n_ranks = per_node * n_nodes
    per_rank = int(rng.integers(1, 5))
    n_slots = n_ranks * per_rank
    n_experts = int(rng.integers(1, n_slots + 1))
    n_layers, n_tokens = int(rng.integers(1, 4)), int(rng.integers(0, 12))
    placement = replicated(rng, (n_layers, n_experts, n_slots), (n_ranks, per_node))
    top_k = int(rng.integers(1, n_experts + 1))
    topk = random_topk(rng, (n_tokens, n_layers, n_experts), top_k)
    topk[rng.random(topk.shape) < 0.1] = -1
    return topk, rng.integers(0, n_ranks, n_tokens).astype(np.int32), placement


@settings(max_examples=150, deadline=None)
@given(seeds, modes, rules)
def test_counts_equal_their_plain_form(seed: int, mode: Mode, rule: str) -> None:
    topk, source, placement = small_case(seed)
    counts = dispatch_counts(topk, source, placement, mode, rule)  # type: ignore[arg-type]
    plain = plain_counts(topk, source, placement, (mode, rule))
    for field in (*FIELDS, "slot_tokens"):
        np.testing.assert_array_equal(getattr(counts, field), plain[field], err_msg=field)


@settings(max_examples=30, deadline=None)
@given(seeds, modes, rules)
def test_many_steps_at_once_equal_each_step_alone(seed: int, mode: Mode, rule: str) -> None:
    topk, _, placement = small_case(seed)
    if not len(topk):
        return
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(topk), (3, 5))
    source = source_ranks(5, placement.n_ranks)
    counts = step_counts(topk, rows, source, placement, mode, rule)  # type: ignore[arg-type]
    alone = [
        plain_counts(topk[step], source, placement, (mode, rule), int(step[0])) for step in rows
    ]
    for field in FIELDS:
        expected = np.stack([step[field] for step in alone])
        np.testing.assert_array_equal(getattr(counts, field), expected, err_msg=field)
    total = sum(step["slot_tokens"] for step in alone)
    np.testing.assert_array_equal(counts.slot_tokens, total)


@settings(max_examples=50, deadline=None)
@given(seeds, modes, rules)
def test_every_choice_is_computed_once_and_every_copy_sent_is_received(
    seed: int, mode: Mode, rule: str
) -> None:
    topk, source, placement = small_case(seed)
    counts = dispatch_counts(topk, source, placement, mode, rule)  # type: ignore[arg-type]
    made = (topk >= 0).sum(axis=(0, 2))
    np.testing.assert_array_equal(counts.slot_tokens.sum(axis=1), made)
    np.testing.assert_array_equal(counts.rank_tokens.sum(axis=1), made)
    np.testing.assert_array_equal(counts.up_send.sum(axis=1), counts.up_recv.sum(axis=1))
    np.testing.assert_array_equal(counts.out_send.sum(axis=1), counts.out_recv.sum(axis=1))
    assert (counts.rank_distinct <= np.minimum(counts.rank_tokens, placement.slots_per_rank)).all()


@settings(max_examples=50, deadline=None)
@given(seeds, rules)
def test_dropping_duplicates_never_adds_bytes_and_the_nic_carries_least_in_node_mode(
    seed: int, rule: str
) -> None:
    topk, source, placement = small_case(seed)
    by_mode = {
        mode: dispatch_counts(topk, source, placement, mode, rule)  # type: ignore[arg-type]
        for mode in MODES
    }
    device, expert, node = (by_mode[m] for m in ("device", "expert", "node"))  # type: ignore[index]
    assert (device.up_send <= expert.up_send).all()
    assert (device.out_send <= expert.out_send).all()
    assert (node.out_send <= device.out_send).all()
    for counts in (device, node):
        np.testing.assert_array_equal(counts.rank_tokens, expert.rank_tokens)


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_even_replicas_differ_by_at_most_one_token(seed: int) -> None:
    topk, source, placement = small_case(seed)
    counts = dispatch_counts(topk, source, placement, rule="even")
    for layer, row in enumerate(placement.physical_to_logical_map):
        for expert in range(placement.n_experts):
            tokens = counts.slot_tokens[layer, row == expert]
            assert tokens.max() - tokens.min() <= 1


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_local_choice_takes_the_nearest_replica_and_spreads_the_others(seed: int) -> None:
    _, _, placement = small_case(seed)
    choice = local_choice(placement)
    node_of_slot = np.arange(placement.n_slots) // (
        placement.slots_per_rank * placement.ranks_per_node
    )
    for layer in range(placement.n_layers):
        for expert in range(placement.n_experts):
            far: list[int] = []
            for rank in range(placement.n_ranks):
                slot = int(choice[layer, rank, expert])
                assert slot == local_slot(placement, layer, rank, expert)
                if node_of_slot[slot] != rank // placement.ranks_per_node:
                    far.append(slot)
            slots = np.flatnonzero(placement.physical_to_logical_map[layer] == expert)
            used = [far.count(int(slot)) for slot in slots]
            assert max(used) - min(used) <= 1


def test_one_rank_sends_nothing() -> None:
    topk = random_topk(np.random.default_rng(0), (20, 2, 8), 2)
    counts = dispatch_counts(topk, np.zeros(20, np.int32), contiguous(2, 8, 1))
    for field in ("up_send", "up_recv", "out_send", "out_recv"):
        assert not getattr(counts, field).any()


def test_more_replicas_of_the_hottest_expert_lighten_the_busiest_rank() -> None:
    topk = np.zeros((64, 1, 1), dtype=np.int16)
    source = source_ranks(64, 4)
    busiest = []
    for n_copies in (1, 2, 4):
        slots = np.array([[0, 1, 2, 3, *[0] * (n_copies - 1), *[1] * (5 - n_copies)]], np.int32)
        counts = dispatch_counts(topk, source, Placement(slots, 4, 4, 4))
        busiest.append(counts.slot_tokens.max())
    assert busiest == [64, 32, 16]


def drawn_choices(
    rng: np.random.Generator, shares: np.ndarray, routing: Routing, n_tokens: int
) -> np.ndarray:
    """int16[tokens, 1, experts] choices (-1: not chosen) as expected_dispatch assumes them."""
    chance, opening = inclusion_chances(shares, routing)
    n_experts, size = shares.shape[1], shares.shape[1] // routing.n_groups
    n_drawn = n_tokens if routing.n_groups > 1 else 8 * n_tokens
    is_open = np.repeat(rng.random((n_drawn, routing.n_groups)) < opening[0], size, axis=1)
    inside = chance[0] / np.repeat(opening[0], size)
    is_chosen = is_open & (rng.random((n_drawn, n_experts)) < inside)
    if routing.n_groups == 1:
        is_chosen = is_chosen[is_chosen.sum(axis=1) == routing.top_k]
    assert len(is_chosen) >= n_tokens
    return np.where(is_chosen[:n_tokens], np.arange(n_experts), -1).astype(np.int16)[:, None, :]


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_expectations_equal_the_mean_of_independent_draws(
    mode: Mode, groups: tuple[int, int]
) -> None:
    rng = np.random.default_rng(3)
    n_ranks, n_tokens, n_draws = 8, 32, 1500
    routing = Routing(4, *groups)
    placement = replicated(rng, (1, 32, 40), (n_ranks, 4))
    shares = rng.random((1, 32)) + 0.1
    topk = drawn_choices(rng, shares, routing, n_draws * n_tokens)
    rows = np.arange(n_draws * n_tokens, dtype=np.int64).reshape(n_draws, n_tokens)
    counts = step_counts(topk, rows, source_ranks(n_tokens, n_ranks), placement, mode)
    expected = expected_dispatch(shares, n_tokens // n_ranks, placement, routing, mode)
    assert expected.expected
    assert not counts.expected
    for field in FIELDS:
        # replicas taken in turn keep a little more slots busy than replicas taken at random
        rel = 0.06 if field == "rank_distinct" else 0.03
        want = getattr(counts, field).mean(axis=0)
        np.testing.assert_allclose(
            getattr(expected, field), want, rtol=rel, atol=rel * want.mean(), err_msg=field
        )


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_the_chance_to_reach_a_rank_is_that_of_all_sets_of_experts(seed: int) -> None:
    """All sets of top_k experts, each weighted by the product of its odds."""
    rng = np.random.default_rng(seed)
    n_experts, top_k = int(rng.integers(3, 9)), int(rng.integers(1, 3))
    placement = replicated(rng, (1, n_experts, 12), (4, 4))
    shares = rng.random((1, n_experts)) ** rng.integers(1, 9)
    odds = inclusion_chances(shares, Routing(top_k))[0][0]
    odds = np.minimum(odds / np.maximum(1 - odds, 1e-300), 1e6)
    held = np.array(
        [[np.sum(part == e) for e in range(n_experts)] for part in
         placement.physical_to_logical_map.reshape(4, 3)]
    )  # fmt: skip
    elsewhere = 1 - held / held.sum(axis=0)
    total, missed = 0.0, np.zeros(4)
    for chosen in combinations(range(n_experts), top_k):
        weight = float(np.prod(odds[list(chosen)]))
        total += weight
        missed += weight * np.prod(elsewhere[:, list(chosen)], axis=1)
    counts = expected_dispatch(shares, 1.0, placement, Routing(top_k))
    np.testing.assert_allclose(counts.up_recv[0] / 3, 1 - missed / total, atol=1e-9)


def test_expectations_of_many_experts_are_near_counts_of_real_top_k() -> None:
    rng = np.random.default_rng(0)
    placement = replicated(rng, (1, 256, 288), (32, 8))
    topk = random_topk(rng, (32 * 256, 1, 256), 8)
    counts = dispatch_counts(topk, source_ranks(len(topk), 32), placement)
    expected = expected_dispatch(np.ones((1, 256)), 256, placement, Routing(8))
    for field in ("rank_distinct", "up_send", "out_send", "up_recv", "out_recv", "rank_tokens"):
        got, want = getattr(expected, field).sum(), getattr(counts, field).sum()
        assert got == pytest.approx(want, rel=0.02), field


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_inclusion_chances_add_up_and_stay_within_their_group(
    seed: int, n_groups: int, open_groups: int
) -> None:
    rng = np.random.default_rng(seed)
    open_groups = min(open_groups, n_groups)
    size = int(rng.integers(1, 6))
    top_k = int(rng.integers(1, size * open_groups + 1))
    shares = rng.random((3, n_groups * size)) ** 6
    shares[0, rng.random(n_groups * size) < 0.5] = 0.0
    chance, opening = inclusion_chances(shares, Routing(top_k, n_groups, open_groups))
    np.testing.assert_allclose(opening.sum(axis=1), open_groups, rtol=1e-6)
    np.testing.assert_allclose(chance.sum(axis=1), top_k, rtol=1e-6)
    assert (chance <= np.repeat(opening, size, axis=1) + 1e-12).all()
    assert (chance >= 0).all()


def test_shares_without_a_cap_in_reach_stay_proportional() -> None:
    shares = np.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(capped_shares(shares, 1.0), shares / 10)


def test_expected_tokens_of_a_rank_follow_the_even_split() -> None:
    rng = np.random.default_rng(1)
    placement = replicated(rng, (2, 64, 96), (8, 8))
    shares = rng.random((2, 64)) + 1.0
    counts = expected_dispatch(shares, 10, placement, Routing(4))
    per_replica = shares / shares.sum(axis=1, keepdims=True) * 4 * 80 / replica_counts(placement)
    want = np.take_along_axis(per_replica, placement.physical_to_logical_map.astype(int), axis=1)
    np.testing.assert_allclose(counts.slot_tokens, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": np.zeros((4, 3, 2), np.int16)}, r"shape \(4, 3, 2\), expected \[tokens, 2"),
        ({"topk": np.full((4, 2, 2), 99, np.int16)}, "expert 99, expected below 8"),
        ({"source_rank": np.zeros(3, np.int32)}, r"source_rank: shape \(3,\)"),
        ({"source_rank": np.full(4, 7, np.int32)}, "source_rank: 7..7, expected 0..3"),
        ({"mode": "fast"}, "mode 'fast' is unknown, known: device, expert, node"),
        ({"rule": "far"}, "rule 'far' is unknown, known: even, local"),
    ],
)
def test_what_does_not_fit_the_placement_is_refused_by_name(
    change: dict[str, object], message: str
) -> None:
    good: dict[str, object] = {
        "topk": np.zeros((4, 2, 2), np.int16),
        "source_rank": np.zeros(4, np.int32),
        "placement": contiguous(2, 8, 4),
    }
    with pytest.raises(PlanError, match=message):
        dispatch_counts(**(good | change))  # type: ignore[arg-type]


def test_shares_and_groups_that_do_not_fit_are_refused_by_name() -> None:
    placement = contiguous(2, 8, 4)
    with pytest.raises(PlanError, match=r"shares: shape \(1, 8\)"):
        expected_dispatch(np.ones((1, 8)), 1, placement, Routing(2))
    with pytest.raises(PlanError, match="negative"):
        expected_dispatch(-np.ones((2, 8)), 1, placement, Routing(2))
    with pytest.raises(PlanError, match="2 of 3 groups"):
        expected_dispatch(np.ones((2, 8)), 1, placement, Routing(2, 3, 2))
    with pytest.raises(PlanError, match="top_k=3"):
        expected_dispatch(np.ones((2, 8)), 1, placement, Routing(3, 4, 1))
