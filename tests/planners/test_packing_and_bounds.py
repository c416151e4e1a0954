"""Levelling only ever helps, and no placement beats the bound."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.bounds import busiest_rank_bound, node_limited_bound, spread_groups
from planners.incumbents import Shape, eplb_global
from planners.packing import level, pack
from planners.plan import Placement, rank_loads, replica_counts


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_every_pack_gets_equally_many_items(n_packs: int, room: int, seed: int) -> None:
    weight = np.random.default_rng(seed).random(n_packs * room)
    assert np.bincount(pack(weight, n_packs), minlength=n_packs).tolist() == [room] * n_packs


@given(st.integers(0, 2**32 - 1), st.sampled_from([(16, 4, 20), (32, 8, 40), (64, 8, 64)]))
@settings(max_examples=40, deadline=None)
def test_levelling_never_raises_the_busiest_rank_and_moves_no_expert_out(
    seed: int, shape: tuple[int, int, int]
) -> None:
    n_experts, n_ranks, n_slots = shape
    load = np.random.default_rng(seed).pareto(1.5, (1, n_experts)) + 0.01
    start = eplb_global(load, Shape(n_ranks, n_slots, n_ranks))
    slots = start.physical_to_logical_map[0].copy()
    level(slots, (load / replica_counts(start))[0], n_ranks, 0, n_ranks)
    levelled = Placement(slots[None], n_experts, n_ranks, n_ranks)
    assert sorted(slots) == sorted(start.physical_to_logical_map[0])
    before, after = rank_loads(start, load).max(), rank_loads(levelled, load).max()
    assert after <= before * (1 + 1e-12)


def _least_busiest_rank(load: np.ndarray, n_ranks: int, n_slots: int) -> float:
    """The best of all placements of three or four experts, by trying every one."""
    best = np.inf
    for slots in product(range(len(load)), repeat=n_slots):
        copies = np.bincount(slots, minlength=len(load))
        if copies.min() == 0:
            continue
        share = (load / copies)[list(slots)].reshape(n_ranks, -1).sum(axis=1)
        best = min(best, share.max())
    return float(best)


@given(st.lists(st.integers(1, 50), min_size=3, max_size=4))
@settings(max_examples=25, deadline=None)
def test_no_placement_beats_the_bound(loads: list[int]) -> None:
    load = np.array(loads, dtype=float)
    bound = busiest_rank_bound(load[None], Shape(n_ranks=2, n_slots=6, ranks_per_node=2))[0]
    assert bound <= _least_busiest_rank(load, n_ranks=2, n_slots=6) * (1 + 1e-12)


def test_node_limited_bound_is_the_best_assignment_of_groups_to_nodes() -> None:
    load = np.array([7.0] * 4 + [1.0] * 4 + [5.0] * 4 + [3.0] * 4)[None]
    shape = Shape(n_ranks=4, n_slots=16, ranks_per_node=2, n_groups=4)
    node_of_group, bound = spread_groups(load, shape)
    assert node_of_group[0, 0] == node_of_group[0, 1]
    assert bound[0] == pytest.approx((7 + 1) * 4 / 2)
    assert node_limited_bound(load, shape)[0] == bound[0]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_node_limit_never_lowers_the_bound(seed: int) -> None:
    load = np.random.default_rng(seed).pareto(2.0, (2, 32)) + 0.1
    shape = Shape(n_ranks=8, n_slots=40, ranks_per_node=4, n_groups=8)
    free, limited = busiest_rank_bound(load, shape), node_limited_bound(load, shape)
    assert (limited >= free * (1 - 1e-12)).all()
