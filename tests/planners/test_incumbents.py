"""The incumbents are what the engines run today, and EPLB is EPLB."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.incumbents import Shape, contiguous, eplb_global, eplb_hierarchical, round_robin
from planners.plan import rank_loads, replica_counts
from tests.oracles import eplb_plain

SHAPES = st.sampled_from([(8, 4, 2, 12), (8, 2, 1, 8), (16, 4, 2, 20), (16, 8, 4, 24)])


def test_contiguous_repeats_expert_ids_in_order_as_sglang_does() -> None:
    placement = contiguous(2, 4, Shape(n_ranks=2, n_slots=6, ranks_per_node=2))
    assert placement.physical_to_logical_map.tolist() == [[0, 1, 2, 3, 0, 1]] * 2


def test_round_robin_puts_expert_e_on_rank_e_mod_ranks() -> None:
    placement = round_robin(1, 6, Shape(n_ranks=3, n_slots=6, ranks_per_node=3))
    assert placement.physical_to_logical_map.tolist() == [[0, 3, 1, 4, 2, 5]]


@given(SHAPES, st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_both_forms_of_eplb_equal_the_plain_oracle(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    n_experts, n_ranks, n_nodes, n_slots = shape
    load = np.random.default_rng(seed).integers(1, 1000, (2, n_experts)).astype(float)
    wanted = Shape(n_ranks, n_slots, n_ranks // n_nodes, n_groups=4)
    for form, groups, nodes in ((eplb_global, 1, 1), (eplb_hierarchical, 4, n_nodes)):
        busiest = rank_loads(form(load, wanted), load).max(axis=1)
        expected = [
            eplb_plain.busiest_rank(list(row), n_slots, n_ranks, groups, nodes) for row in load
        ]
        np.testing.assert_allclose(busiest, expected, rtol=1e-12)


def test_hierarchical_eplb_keeps_every_group_inside_one_node() -> None:
    load = np.random.default_rng(0).random((3, 16))
    placement = eplb_hierarchical(load, Shape(8, 24, 2, n_groups=4))
    groups = placement.physical_to_logical_map.reshape(3, 4, -1) // 4
    assert all(len(np.unique(node)) == 1 for layer in groups for node in layer)


def test_hierarchical_eplb_is_global_where_groups_do_not_divide_over_nodes() -> None:
    load = np.random.default_rng(0).random((1, 16))
    shape = Shape(n_ranks=6, n_slots=18, ranks_per_node=2, n_groups=4)
    ours, theirs = eplb_hierarchical(load, shape), eplb_global(load, shape)
    assert (ours.physical_to_logical_map == theirs.physical_to_logical_map).all()


def test_every_expert_has_a_slot_and_the_heaviest_have_more() -> None:
    load = np.arange(1.0, 9.0)[None, :] ** 2
    counts = replica_counts(eplb_global(load, Shape(4, 12, 4)))[0]
    assert counts.min() == 1
    assert (np.diff(counts) >= 0).all()


@pytest.mark.parametrize(("slots", "message"), [(7, "cannot hold 8"), (9, "nearest that are: 8")])
def test_slots_that_do_not_fit_are_refused_with_the_nearest_that_do(
    slots: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        contiguous(1, 8, Shape(n_ranks=4, n_slots=slots, ranks_per_node=4))
