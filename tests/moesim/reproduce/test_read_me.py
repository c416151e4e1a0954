"""Read-ME: slots against two oracles, a batch's time against arithmetic, and the claims."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.reproduce import read_me
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from traces.replay import replay
from traces.synth import uniform_trace

seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return read_me.claims(Sources())


# --- expectation --------------------------------------------------------------------------------


def test_a_batch_of_ten_tokens_needs_nearly_all_of_eight_experts() -> None:
    assert read_me.expected_unique(10.6) == pytest.approx(7.62, abs=0.005)
    assert read_me.expected_unique(1) == 2
    assert read_me.expected_unique(56.8) == pytest.approx(8, abs=1e-5)


def test_the_expectation_is_what_even_choices_give() -> None:
    topk = uniform_trace(40_000, 1, 8, 2).topk[:, 0].reshape(-1, 8 * 2)
    distinct = [len(set(batch)) for batch in topk.tolist()]
    assert np.mean(distinct) == pytest.approx(read_me.expected_unique(8), rel=0.005)


# --- slots --------------------------------------------------------------------------------------


def one_by_one(objects: np.ndarray) -> tuple[read_me.Step, ...]:
    """Requests of one expert each that see all requests behind them."""
    needs = np.zeros((len(objects), read_me.N_EXPERTS), bool)
    needs[np.arange(len(objects)), objects] = True
    return tuple(
        read_me.Step((int(expert),), read_me.next_uses(needs[i + 1 :]))
        for i, expert in enumerate(objects)
    )


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 8))
def test_slots_miss_as_often_as_lru_and_with_the_whole_queue_as_belady(
    seed: int, slots: int
) -> None:
    objects = np.random.default_rng(seed).integers(0, 8, 60)
    steps = one_by_one(objects)
    for victim, policy in (
        (read_me.least_recent, "lru"),
        (read_me.farthest_in_queue, "belady"),
    ):
        expected = replay(objects, slots, policy).hit_rate
        assert read_me.hit_rate(steps, slots, victim) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 8))
def test_a_request_of_two_keeps_both_and_more_slots_never_hurt_lru(seed: int, slots: int) -> None:
    needs = np.argsort(np.random.default_rng(seed).random((50, 8)), axis=1)[:, :2]
    steps = tuple(read_me.Step(tuple(row), np.full(8, read_me.NEVER)) for row in needs.tolist())
    cache = read_me.Slots(slots, read_me.farthest_in_queue)
    for step in steps:
        cache.misses(step)
        assert cache.misses(step) == 0  # both are there right after
    rates = [read_me.hit_rate(steps, n, read_me.least_recent) for n in range(2, 9)]
    assert rates == sorted(rates)


def test_a_batch_larger_than_the_slots_runs_and_loads_what_is_not_there() -> None:
    cache = read_me.Slots(2, read_me.least_recent)
    far = np.full(8, read_me.NEVER)
    assert cache.misses(read_me.Step((0, 1, 2, 3), far)) == 4
    assert cache.misses(read_me.Step((2, 3), far)) == 0


def test_beyond_the_queue_the_least_recently_used_leaves() -> None:
    next_use = np.full(8, read_me.NEVER)
    last = {1: 5, 2: 3, 3: 4}
    assert read_me.farthest_in_queue([1, 2, 3], last, next_use) == 2
    next_use[2] = 7
    assert read_me.farthest_in_queue([1, 2, 3], last, next_use) == 3
    assert read_me.next_uses(np.zeros((0, 8), bool)).tolist() == [read_me.NEVER] * 8


# --- serving ------------------------------------------------------------------------------------

ORDERS = (read_me.decode_first, read_me.prefill_first, read_me.expert_aware, read_me.oldest_inside)


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 12), st.sampled_from(ORDERS))
def test_every_token_of_every_conversation_is_served_once(
    seed: int, users: int, order: read_me.Order
) -> None:
    load = read_me.traffic(6, seed)
    schedule = read_me.serve(load, users, order)
    answers = np.array([len(rows) for rows in load.experts])
    assert sum(step.tokens for step in schedule.steps) == (load.prompt + answers - 1).sum()
    assert (schedule.ended - schedule.begun >= answers).all()
    assert schedule.ended.max() == len(schedule.steps)
    assert (schedule.begun[: min(users, 6)] == 0).all()
    assert len(schedule.steps) >= answers.sum() / read_me.BATCH_SEQUENCES


def test_one_user_is_served_alone_whatever_the_order() -> None:
    load = read_me.traffic(3, 0)
    schedules = [read_me.serve(load, 1, order) for order in ORDERS]
    answers = np.array([len(rows) for rows in load.experts])
    for schedule in schedules:
        assert (schedule.ended - schedule.begun).tolist() == answers.tolist()
        assert schedule.begun.tolist() == [0, *np.cumsum(answers)[:-1].tolist()]


def test_a_conversation_lasts_as_long_as_the_batches_it_lives_through() -> None:
    load = read_me.traffic(4, 1)
    schedule = read_me.serve(load, 2, read_me.decode_first)
    seconds, total_s = read_me.latencies(schedule, 8, read_me.least_recent)
    cold = read_me.Slots(8, read_me.least_recent)
    spent = [
        read_me.batch_seconds(len(s.distinct), cold.misses(s), s.tokens) for s in schedule.steps
    ]
    assert total_s == pytest.approx(sum(spent))
    for one in range(4):
        lived = spent[schedule.begun[one] : schedule.ended[one]]
        assert seconds[one] == pytest.approx(sum(lived))


# --- time ---------------------------------------------------------------------------------------


def test_a_batch_without_misses_takes_what_reading_its_weights_takes() -> None:
    read = read_me.ATTENTION_BYTES + 6 * read_me.EXPERT_BYTES  # five experts and the permanent one
    expected = 32 * (read / read_me.MEMORY_BYTES_PER_S + read_me.KERNELS_S)
    expected += read_me.HEAD_BYTES / read_me.MEMORY_BYTES_PER_S
    assert read_me.batch_seconds(5, 0, 5) == pytest.approx(expected)
    assert read_me.batch_seconds(5, 0, 5, False) == pytest.approx(expected)


@pytest.mark.parametrize("misses", [1, 3])
def test_prefetch_hides_what_it_can_and_on_demand_hides_nothing(misses: int) -> None:
    copy_s = (
        32 * misses * (read_me.LINK_LATENCY_S + read_me.EXPERT_BYTES / read_me.LINK_BYTES_PER_S)
    )
    compute_s = read_me.batch_seconds(5, 0, 5)
    on_demand = read_me.batch_seconds(5, misses, 5, False)
    assert on_demand == pytest.approx(copy_s + compute_s)
    ahead = read_me.batch_seconds(5, misses, 5)
    assert max(copy_s, compute_s) < ahead < on_demand


def test_a_long_prompt_is_bound_by_arithmetic() -> None:
    short, long = read_me.batch_seconds(8, 0, 5), read_me.batch_seconds(8, 0, 4000)
    flop = 4000 * 32 * (read_me.ATTENTION_BYTES + 3 * read_me.EXPERT_BYTES)
    assert long > 2 * short
    assert long == pytest.approx(flop / read_me.FLOP_PER_S, rel=0.02)


# --- claims -------------------------------------------------------------------------------------


def test_the_expectation_and_the_gap_of_belady_over_lru_are_reproduced(
    claims: list[Claim],
) -> None:
    exact = [claim for claim in claims if claim.tier == "A"]
    assert [claim.verdict for claim in exact] == ["inside"]
    (gap,) = [claim for claim in claims if claim.claim.endswith("Belady minus LRU")]
    assert (gap.verdict, gap.low, gap.high) == ("inside", 0.07, 0.14)


def test_batches_need_fewer_experts_the_deeper_the_queue_and_enough_fewer_in_a_deep_one(
    claims: list[Claim],
) -> None:
    for base in ("decode first", "prefill first"):
        changes = [
            claim
            for users in read_me.USERS
            for claim in claims
            if claim.claim == f"experts per batch, nested queues against {base}, {users} users"
        ]
        saved = [claim.simulated for claim in changes]
        assert saved == sorted(saved, reverse=True)
        assert [claim.verdict for claim in changes] == ["outside", "outside", "inside"]
        assert {(claim.low, claim.high) for claim in changes} == {(-0.40, -0.20)}


def test_latency_bands_are_the_ones_set_beforehand_and_nothing_is_left_without_a_verdict(
    claims: list[Claim],
) -> None:
    bands = {
        claim.claim.split(",")[0]: (claim.low, claim.high)
        for claim in claims
        if "latency, " in claim.claim
    }
    assert bands == {"mean latency": (-0.10, -0.03), "p95 latency": (-0.15, -0.05)}
    assert all(np.isfinite(claim.simulated) for claim in claims)
    assert all(claim.note for claim in claims if claim.verdict == "outside")
