"""Load orders: HEBF against its loop, the recursion against the engine, orders against all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesim import engine
from moesim.builder import ProgramBuilder
from moesim.errors import SimulationError
from moesim.policies import load_order
from moesim.policies.load_order import (
    ORDERS,
    bound_s,
    bubbles_s,
    computed_s,
    hebf_order,
    johnson_order,
    keeps_nesting,
    layer_order,
    makespan_s,
    popularity_order,
)

seeds = st.integers(0, 10**6)


def random_tokens(seed: int, experts: int = 6, most: int = 5) -> np.ndarray:
    """Small counts, so that ties are common and many cells are empty."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, most, (int(rng.integers(1, experts + 1)), int(rng.integers(1, 5))))


def random_seconds(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, n) / 4, rng.integers(0, 9, n) / 4  # sums are exact


def hebf_loop(tokens: np.ndarray) -> list[int]:
    """Queues of every expert's precisions; the longest head leaves, of equals the lowest expert."""
    width = tokens.shape[1]
    queues = {
        expert: [expert * width + level for level in range(width) if row[level]]
        for expert, row in enumerate(tokens.tolist())
    }
    order = []
    while any(queues.values()):
        heads = [(-int(tokens.flat[queue[0]]), expert) for expert, queue in queues.items() if queue]
        order.append(queues[min(heads)[1]].pop(0))
    return order


def legal_orders(tokens: np.ndarray) -> list[np.ndarray]:
    cells, width = layer_order(tokens), tokens.shape[1]
    orders = [np.array(order, np.int64) for order in itertools.permutations(cells.tolist())]
    return [order for order in orders if keeps_nesting(order, width)]


# --- orders -------------------------------------------------------------------------------------


def test_hebf_orders_the_hand_example() -> None:
    tokens = np.array([[3, 0, 1], [3, 5, 0], [0, 4, 0]])
    # 4 tokens of expert 2; then 3 and 3: expert 0; expert 1, whose 5 follow; expert 0's last.
    assert hebf_order(tokens).tolist() == [7, 0, 3, 4, 2]


@settings(max_examples=300, deadline=None)
@given(seeds)
def test_hebf_is_the_loop_over_heads_of_queues(seed: int) -> None:
    tokens = random_tokens(seed)
    assert hebf_order(tokens).tolist() == hebf_loop(tokens)


@pytest.mark.parametrize("name", sorted(ORDERS))
@settings(deadline=None)
@given(seed=seeds)
def test_every_order_loads_what_is_asked_once_and_never_a_plane_before_a_lower_one(
    name: str, seed: int
) -> None:
    tokens = random_tokens(seed)
    order = load_order.order_by_name(name)(tokens)
    assert sorted(order.tolist()) == np.flatnonzero(tokens).tolist()
    assert keeps_nesting(order, tokens.shape[1])


@settings(deadline=None)
@given(seeds)
def test_popularity_finishes_an_expert_before_a_less_popular_one(seed: int) -> None:
    tokens = random_tokens(seed)
    experts = popularity_order(tokens) // tokens.shape[1]
    total = tokens.sum(axis=1)[experts]
    assert (np.diff(total) <= 0).all()
    changes = np.flatnonzero(np.diff(experts)) + 1
    assert len(changes) + 1 == max(1, len(set(experts.tolist())))


def test_on_whole_experts_hebf_and_popularity_agree_and_of_equals_the_lower_goes_first() -> None:
    tokens = np.array([2, 5, 0, 5, 1])[:, None]
    assert popularity_order(tokens).tolist() == hebf_order(tokens).tolist() == [1, 3, 0, 4]
    assert layer_order(tokens).tolist() == [0, 1, 3, 4]


def test_a_higher_precision_before_a_lower_one_is_noticed() -> None:
    assert keeps_nesting(np.array([0, 3, 1, 5]), 3)
    assert not keeps_nesting(np.array([1, 3, 0]), 3)


def test_unknown_orders_and_tables_of_another_shape_are_refused() -> None:
    with pytest.raises(SimulationError, match="known: layer, popularity, hebf"):
        load_order.order_by_name("hottest")
    with pytest.raises(SimulationError, match=r"shape \(3,\), expected \[experts, precisions\]"):
        hebf_order(np.array([1, 2, 3]))
    with pytest.raises(SimulationError, match="of 0 or more"):
        layer_order(np.array([[-1]]))


# --- time ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(0, 12))
def test_the_recursion_is_two_streams_of_the_engine(seed: int, n: int) -> None:
    io_s, compute_s = random_seconds(seed, n)
    builder = ProgramBuilder()
    drive, device = builder.stream("drive"), builder.stream("device")
    computed = []
    for io, compute in zip(io_s.tolist(), compute_s.tolist(), strict=True):
        read = builder.append(drive, io)
        computed.append(builder.append(device, compute, [read]))
    timeline = engine.run(builder.build())
    assert computed_s(np.cumsum(io_s), compute_s).tolist() == timeline.end_s[computed].tolist()
    assert makespan_s(io_s, compute_s) == timeline.makespan_s
    starts = timeline.start_s[computed]
    before = np.concatenate(([0.0], timeline.end_s[computed]))[:n]
    assert bubbles_s(io_s, compute_s).tolist() == (starts - before).tolist()


@settings(deadline=None)
@given(seeds, st.integers(1, 12))
def test_no_order_ends_before_either_total_and_all_time_is_work_or_bubble(
    seed: int, n: int
) -> None:
    io_s, compute_s = random_seconds(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    total_s = makespan_s(io_s[order], compute_s[order])
    assert total_s >= max(io_s.sum() + compute_s.min(), io_s.min() + compute_s.sum())
    assert total_s <= io_s.sum() + compute_s.sum()
    assert total_s == compute_s.sum() + bubbles_s(io_s[order], compute_s[order]).sum()
    assert total_s >= bound_s(io_s, compute_s)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 6))
def test_johnson_is_the_best_of_all_orders(seed: int, n: int) -> None:
    io_s, compute_s = random_seconds(seed, n)
    orders = [np.array(order) for order in itertools.permutations(range(n))]
    best = min(makespan_s(io_s[order], compute_s[order]) for order in orders)
    assert sorted(johnson_order(io_s, compute_s).tolist()) == list(range(n))
    assert bound_s(io_s, compute_s) == best


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_hebf_lies_between_the_bound_and_the_worst_order_and_near_the_best_legal_one(
    seed: int,
) -> None:
    tokens = random_tokens(seed, experts=3, most=9)
    assume(1 <= np.count_nonzero(tokens) <= 6)
    io_s, compute_s = _seconds(tokens)
    totals = [makespan_s(io_s[order], compute_s[order]) for order in legal_orders(tokens)]
    hot = hebf_order(tokens)
    cells = layer_order(tokens)
    ours = makespan_s(io_s[hot], compute_s[hot])
    assert bound_s(io_s[cells], compute_s[cells]) <= min(totals) + 1e-12
    assert min(totals) <= ours + 1e-12 <= max(totals) + 2e-12
    assert ours <= 2 * min(totals)  # no flow shop of two machines does worse in any order


def test_hebf_is_within_a_few_percent_of_the_best_order_on_average() -> None:
    lost = []
    for seed in range(150):
        tokens = random_tokens(seed, experts=3, most=9)
        if not 3 <= np.count_nonzero(tokens) <= 6:
            continue
        io_s, compute_s = _seconds(tokens)
        best = min(makespan_s(io_s[order], compute_s[order]) for order in legal_orders(tokens))
        hot = hebf_order(tokens)
        lost.append(makespan_s(io_s[hot], compute_s[hot]) / best - 1)
    assert len(lost) > 30
    assert 0 < np.mean(lost) < 0.02
    assert max(lost) < 0.2


def _seconds(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Planes cost 2, 1, 1, ...; computing is by tokens and as long as reading in all."""
    io_s = np.where(tokens > 0, np.r_[2.0, np.ones(tokens.shape[1] - 1)], 0.0).ravel()
    compute_s = tokens.ravel() * (io_s.sum() / tokens.sum())
    return io_s, compute_s
