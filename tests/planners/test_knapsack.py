"""The multiple-choice knapsack: exact on small cases, bounded on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.knapsack import Choices, choose, used


def best_of_all(choices: Choices) -> float:
    """The cheapest of all combinations that fit, by trying each."""
    n_items, n_options = choices.cost.shape
    costs = [
        choices.cost[np.arange(n_items), option].sum()
        for option in map(np.array, itertools.product(range(n_options), repeat=n_items))
        if (used(choices, option) <= choices.capacity).all()
    ]
    return min(costs, default=np.inf)


@st.composite
def small_choices(draw: st.DrawFn) -> Choices:
    """Up to six items of three options over two memories; the last option takes no room."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n = draw(st.integers(1, 6))
    cost = np.sort(rng.random((n, 3)), axis=1)
    size = rng.integers(1, 9, (n, 3, 2)).astype(float)
    size[:, 2] = 0.0
    capacity = rng.integers(0, 12, 2).astype(float)
    return Choices(cost, size, capacity, ("a", "b"))


@settings(deadline=None, max_examples=80)
@given(small_choices())
def test_a_choice_fits_and_lies_between_the_bound_and_twice_the_best_gap(choices: Choices) -> None:
    found = choose(choices)
    best = best_of_all(choices)
    assert (used(choices, found.option) <= choices.capacity).all()
    assert found.bound <= best + 1e-9
    assert found.cost >= best - 1e-9
    # Items are coarse here, so that a fraction of two items is what relaxing can be worth.
    two_items = np.sort(choices.cost[:, 2] - choices.cost[:, 0])[-2:].sum()
    assert found.cost <= best + two_items + 1e-9


def test_equal_experts_go_by_how_often_they_are_used() -> None:
    rng = np.random.default_rng(1)
    often = rng.dirichlet(np.full(64, 0.3), 20).ravel()
    cost = often[:, None] * np.array([1.0, 40.0, 400.0])
    size = np.zeros((len(often), 3, 2))
    size[:, 0, 0] = size[:, 1, 1] = 1.0
    found = choose(Choices(cost, size, np.array([300.0, 500.0]), ("device", "host")))
    order = np.argsort(-often)
    best = often[order[:300]].sum() + 40 * often[order[300:800]].sum()
    best += 400 * often[order[800:]].sum()
    assert found.cost == pytest.approx(best, rel=1e-4)
    assert found.gap < 1e-3


def test_more_room_never_costs_more() -> None:
    rng = np.random.default_rng(2)
    cost = np.sort(rng.random((200, 3)), axis=1)
    size = np.zeros((200, 3, 1))
    size[:, 0, 0], size[:, 1, 0] = 4.0, 2.0
    costs = [
        choose(Choices(cost, size, np.array([room]), ("m",))).cost for room in range(0, 801, 50)
    ]
    assert (np.diff(costs) <= 1e-9).all()


def test_what_cannot_fit_names_the_memory_and_by_how_much() -> None:
    cost, size = np.ones((4, 1)), np.full((4, 1, 2), 3.0 * 2**30)
    with pytest.raises(PlanError, match=r"host is short by 2\.00 GiB of 10\.00 GiB"):
        choose(Choices(cost, size, np.array([99.0, 10.0]) * 2**30, ("device", "host")))


def test_an_item_without_options_is_refused() -> None:
    with pytest.raises(PlanError, match="item 1 has no option"):
        Choices(np.array([[1.0], [np.inf]]), np.zeros((2, 1, 1)), np.array([1.0]), ("m",))
