"""Slots per layer: rules keep to the total, the program equals brute force, costs behave."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.slot_split import equal_split, expected_loads, least_cost_split, shallow_first

# Share of experts that Mixtral's next gates name, layers 1 to 31 (AdapMoE's src/dp.py).
MIXTRAL = [
    *(0.566, 0.721, 0.789, 0.866, 0.859, 0.830, 0.840, 0.849, 0.801, 0.898, 0.898, 0.893, 0.910),
    *(0.925, 0.881, 0.915, 0.939, 0.905, 0.879, 0.876, 0.893, 0.879, 0.876, 0.888, 0.884, 0.922),
    *(0.913, 0.886, 0.900, 0.903, 0.850),
]
shares = st.floats(0, 1)


def test_shallow_first_is_the_papers_formula_on_qwen() -> None:
    slots = shallow_first(24 * 30, 24, 60, full_layers=4)
    assert slots.tolist() == [60] * 4 + [(720 - 240) // 20] * 20


@given(st.integers(0, 3000), st.integers(1, 30), st.integers(1, 64), st.integers(0, 30))
def test_a_rule_spends_the_total_up_to_a_rest_smaller_than_the_layers(
    total: int, n_layers: int, n_experts: int, full: int
) -> None:
    full = min(full, n_layers)
    if total < full * n_experts:
        with pytest.raises(PlanError, match="short"):
            shallow_first(total, n_layers, n_experts, full)
        return
    slots = shallow_first(total, n_layers, n_experts, full)
    assert slots.shape == (n_layers,)
    assert (slots[:full] == n_experts).all()
    assert len(set(slots[full:].tolist())) <= 1
    assert slots.max() <= n_experts
    assert slots.sum() <= total
    unspent = min(total, n_layers * n_experts) - slots.sum()
    assert unspent < max(1, n_layers - full) or full == n_layers


@given(st.integers(0, 3000), st.integers(1, 30), st.integers(1, 64))
def test_the_equal_split_is_the_shallow_one_without_whole_layers(
    total: int, n_layers: int, n_experts: int
) -> None:
    assert (
        equal_split(total, n_layers, n_experts) == shallow_first(total, n_layers, n_experts, 0)
    ).all()


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 14))
def test_no_split_of_the_total_costs_less(seed: int, n_layers: int, most: int, total: int) -> None:
    cost = np.random.default_rng(seed).integers(0, 20, (n_layers, most + 1)).astype(float)
    slots = least_cost_split(cost, total)
    assert slots.sum() <= total
    every = itertools.product(range(most + 1), repeat=n_layers)
    lowest = min(
        sum(cost[layer, t] for layer, t in enumerate(split))
        for split in every
        if sum(split) <= total
    )
    assert cost[np.arange(n_layers), slots].sum() == lowest


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 20))
def test_more_slots_never_cost_more(seed: int, n_layers: int, total: int) -> None:
    cost = np.random.default_rng(seed).random((n_layers, 7))
    layers = np.arange(n_layers)
    costs = [cost[layers, least_cost_split(cost, t)].sum() for t in (total, total + 1)]
    assert costs[1] <= costs[0]


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 10))
def test_every_layer_gets_the_least(seed: int, n_layers: int, least: int, more: int) -> None:
    cost = np.random.default_rng(seed).random((n_layers, 7))
    slots = least_cost_split(cost, least * n_layers + more, least)
    assert slots.min() >= least
    assert slots.sum() <= least * n_layers + more


@given(st.integers(2, 64), shares, shares)
def test_loads_of_adapmoe_fall_with_slots_to_none(n: int, recall: float, single: float) -> None:
    loads = expected_loads(n, recall, single)
    assert loads.shape == (n + 1,)
    assert loads[n] == 0
    assert (np.diff(loads) <= 1e-12).all()
    assert loads[0] <= 2 + 1e-12


def test_loads_without_slots_are_the_mispredicted_ones() -> None:
    assert expected_loads(8, recall=0.0, single_share=0.0)[0] == pytest.approx(2)
    assert expected_loads(8, recall=0.0, single_share=1.0)[0] == pytest.approx(1)
    assert expected_loads(8, recall=1.0, single_share=1.0).max() == pytest.approx(0)
    assert expected_loads(8, recall=1.0, single_share=0.0)[0] == pytest.approx(1)


def test_a_missing_pair_costs_as_much_as_two_draws_say() -> None:
    # 5 of 8 experts absent: 20 of 56 ordered pairs miss both, 30 miss one.
    loads = expected_loads(8, recall=0.75, single_share=0.0)[3]
    assert loads == pytest.approx((20 * (2 * 0.25 + 0.75) + 30 * 0.25) / 56)


def test_layers_that_are_predicted_worse_get_more_slots_on_mixtral() -> None:
    cost = np.stack([expected_loads(8, recall, 0.2) for recall in MIXTRAL])
    slots = least_cost_split(cost, 4 * len(MIXTRAL))
    assert slots.sum() == 4 * len(MIXTRAL)
    by_recall = slots[np.argsort(MIXTRAL, kind="stable")]
    assert (np.diff(by_recall) <= 0).all()
    assert slots[0] == slots.max() > 4
    layers = np.arange(len(MIXTRAL))
    equal = equal_split(4 * len(MIXTRAL), len(MIXTRAL), 8)
    assert cost[layers, slots].sum() < cost[layers, equal].sum()


def test_ninety_four_layers_of_512_experts_take_seconds() -> None:
    cost = np.stack([expected_loads(512, recall, 0.0) for recall in np.linspace(0.5, 0.9, 94)])
    slots = least_cost_split(cost, 94 * 128)
    assert slots.sum() == 94 * 128


@pytest.mark.parametrize(
    "call",
    [
        lambda: shallow_first(-1, 2, 4, 0),
        lambda: shallow_first(8, 2, 4, 3),
        lambda: equal_split(8, 0, 4),
        lambda: expected_loads(1, 0.5, 0.5),
        lambda: expected_loads(8, 1.5, 0.5),
        lambda: least_cost_split(np.zeros((0, 3)), 4),
        lambda: least_cost_split(np.full((2, 3), np.nan), 4),
        lambda: least_cost_split(np.zeros((2, 3)), 1, least=1),
    ],
)
def test_sizes_out_of_range_are_refused_in_one_line(call: object) -> None:
    with pytest.raises(PlanError) as raised:
        call()  # type: ignore[operator]
    assert "\n" not in str(raised.value)
