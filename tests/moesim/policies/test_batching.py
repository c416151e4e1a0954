"""Batch forming: every piece goes once, longest queues first, nobody starves, unions shrink."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.policies import batching
from moesim.policies.batching import Waiting

seeds = st.integers(0, 10**6)
ORDERS = (batching.expert_aware_order, batching.longest_queue_order)


def queue_of(*needs: str, waited: list[int] | None = None) -> Waiting:
    """Pieces of one token, each needing the experts whose digits it names, out of ten."""
    experts = np.array([[str(expert) in one for expert in range(10)] for one in needs])
    ages = np.array(waited or [0] * len(needs))
    return Waiting(experts, np.ones(len(needs), np.int64), ages)


def random_queue(seed: int) -> Waiting:
    rng = np.random.default_rng(seed)
    pieces, experts = int(rng.integers(1, 25)), int(rng.integers(1, 9))
    needs = rng.random((pieces, experts)) < rng.random()
    return Waiting(needs, rng.integers(1, 30, pieces), rng.integers(0, 9, pieces))


def random_paths(seed: int, tokens: int) -> np.ndarray:
    """Paths of a few layers, for odd seeds of tokens that repeat each other."""
    rng = np.random.default_rng(seed)
    layers, experts, k = (int(rng.integers(low, high)) for low, high in ((1, 5), (4, 17), (1, 4)))
    topk = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k].astype(np.int16)
    if seed % 2:
        topk = topk[rng.integers(0, max(1, tokens // 2), tokens)]
    return batching.paths_of(topk, experts)


# --- orders of the queue ------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_the_longest_queue_goes_first_and_takes_its_pieces_out_of_the_others(
    order: object,
) -> None:
    waiting = queue_of("01", "12", "23", "13", "45", "46")
    places = order(waiting, 99).tolist()  # type: ignore[operator]
    assert sorted(places[:3]) == [0, 1, 3]  # expert 1 has three pieces
    assert sorted(places[3:5]) == [4, 5]  # without them expert 4 has most
    assert places[5] == 2


def test_inside_a_queue_equal_needs_stand_together_or_the_oldest_goes_first() -> None:
    waiting = queue_of("01", "02", "03", "02", waited=[0, 1, 3, 2])
    assert batching.expert_aware_order(waiting, 99).tolist() == [3, 1, 0, 2]
    assert batching.longest_queue_order(waiting, 99).tolist() == [2, 3, 1, 0]


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 12), st.sampled_from(ORDERS))
def test_every_piece_stands_in_the_order_once_and_the_overdue_stand_first(
    seed: int, most_waited: int, order: object
) -> None:
    waiting = random_queue(seed)
    places = order(waiting, most_waited)  # type: ignore[operator]
    assert sorted(places.tolist()) == list(range(len(waiting.tokens)))
    overdue = waiting.waited[places] >= most_waited
    assert overdue.tolist() == sorted(overdue.tolist(), reverse=True)
    ages = waiting.waited[places][overdue]
    assert ages.tolist() == sorted(ages.tolist(), reverse=True)


@pytest.mark.parametrize("order", ORDERS)
def test_a_rare_expert_is_not_starved_by_a_queue_that_never_empties(order: object) -> None:
    """Three of four pieces need expert 0 and come back at once; the fourth needs expert 1."""
    waited = np.zeros(4, np.int64)
    needs = np.array([[True, False]] * 3 + [[False, True]])
    longest = 0
    for _ in range(50):
        waiting = Waiting(needs, np.ones(4, np.int64), waited)
        batch = batching.first_fitting(order(waiting, 5), waiting.tokens, 2)  # type: ignore[operator]
        waited += 1
        waited[batch] = 0
        longest = max(longest, int(waited[3]))
    assert longest == 5


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 10), st.integers(1, 60))
def test_a_batch_keeps_its_limits_and_leaves_out_only_what_does_not_fit(
    seed: int, max_pieces: int, max_tokens: int
) -> None:
    waiting = random_queue(seed)
    order = batching.expert_aware_order(waiting, 5)
    batch = batching.first_fitting(order, waiting.tokens, max_pieces, max_tokens)
    used = int(waiting.tokens[batch].sum())
    assert batch[0] == order[0]
    assert len(batch) <= max_pieces
    assert used <= max_tokens or len(batch) == 1
    left = np.setdiff1d(order, batch)
    if len(batch) < max_pieces:
        assert (waiting.tokens[left] > max_tokens - used).all()
    assert batching.first_fitting(order, waiting.tokens, max_pieces).tolist() == (
        order[:max_pieces].tolist()
    )


def test_what_cannot_be_batched_is_refused() -> None:
    one = np.ones(1, np.int64)
    with pytest.raises(SimulationError, match=r"one row for each of 1 pieces"):
        Waiting(np.ones((2, 3), bool), one, one)
    with pytest.raises(SimulationError, match="expected tokens of 1 or more"):
        Waiting(np.ones((1, 3), bool), 0 * one, one)
    with pytest.raises(SimulationError, match="most_waited=0"):
        batching.expert_aware_order(queue_of("1"), 0)
    with pytest.raises(SimulationError, match="max_pieces=0"):
        batching.first_fitting(np.arange(1), one, 0)
    with pytest.raises(SimulationError, match=r"paths: shape \(3, 4\), expected"):
        batching.regroup(np.ones((3, 4), bool))


# --- regrouping by paths ------------------------------------------------------------------------


def union(paths: np.ndarray, groups: np.ndarray) -> int:
    """Active experts of all groups, by plain sets."""
    return sum(len({int(b) for row in g for b in np.flatnonzero(paths[row])}) for g in groups)


def best_union(paths: np.ndarray) -> int:
    """The least over all splits into equal halves."""
    tokens = set(range(len(paths)))
    halves = (
        {0, *rest} for rest in itertools.combinations(range(1, len(paths)), len(paths) // 2 - 1)
    )
    return min(union(paths, [sorted(half), sorted(tokens - half)]) for half in halves)


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 12))
def test_regrouping_keeps_every_token_and_never_needs_more_experts(seed: int, half: int) -> None:
    paths = random_paths(seed, 2 * half)
    groups = batching.regroup(paths)
    assert groups.shape == (2, half)
    assert sorted(groups.ravel().tolist()) == list(range(2 * half))
    given_order = np.arange(2 * half).reshape(2, -1)
    assert union(paths, groups) <= union(paths, given_order)
    assert batching.active_experts(paths, groups).sum() == union(paths, groups)


def test_regrouping_of_eight_tokens_is_within_a_third_of_the_best_split_and_mostly_is_it() -> None:
    ratio = []
    for seed in range(150):
        paths = random_paths(seed, 8)
        ratio.append(union(paths, batching.regroup(paths)) / best_union(paths))
    assert max(ratio) <= 4 / 3
    assert np.mean(ratio) <= 1.01
    assert np.mean(np.array(ratio) == 1) >= 0.95


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_two_kinds_of_tokens_that_share_no_expert_are_told_apart(seed: int) -> None:
    kind = np.random.default_rng(seed).permutation(np.repeat([0, 1], 8))
    paths = np.zeros((16, 12), bool)
    paths[np.arange(16)[:, None], kind[:, None] * 6 + np.arange(5)] = True
    groups = batching.regroup(paths)
    assert {len(set(kind[group].tolist())) for group in groups} == {1}


def test_two_batches_of_switch_base_128_are_regrouped_in_milliseconds() -> None:
    rng = np.random.default_rng(0)
    paths = batching.paths_of(rng.integers(0, 128, (64, 12, 1)).astype(np.int16), 128)
    batching.regroup(paths)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        batching.regroup(paths)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.010


def test_a_path_has_a_bit_for_each_chosen_expert_and_none_for_a_missing_one() -> None:
    topk = np.array([[[0, 2], [1, -1]]], np.int16)
    assert batching.paths_of(topk, 3).tolist() == [[True, False, True, False, True, False]]
