"""A plan is renamed to move little, and is worth deploying only when the error bar says so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.incumbents import Shape, contiguous, eplb_global
from planners.judge import paired_gain, verdict
from planners.migration import align, migration
from planners.plan import Placement, rank_loads

SHAPE = Shape(n_ranks=8, n_slots=24, ranks_per_node=4)


def _plan(seed: int) -> tuple[Placement, np.ndarray]:
    load = np.random.default_rng(seed).random((3, 16))
    return eplb_global(load, SHAPE), load


def _shuffled(placement: Placement, seed: int) -> Placement:
    """The same placement with ranks renamed inside nodes and nodes renamed."""
    rng = np.random.default_rng(seed)
    table = []
    for layer in placement.physical_to_logical_map:
        nodes = layer.reshape(2, 4, 3)[rng.permutation(2)]
        table.append(np.concatenate([node[rng.permutation(4)].ravel() for node in nodes]))
    return Placement(np.array(table, dtype=np.int32), 16, 8, 4)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_plan_that_is_only_renamed_needs_no_migration_after_aligning(seed: int) -> None:
    plan, _ = _plan(seed)
    renamed = _shuffled(plan, seed)
    assert migration(align(renamed, plan), plan, 1.0).moved_slots == 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_aligning_keeps_every_rank_load_and_never_moves_more(seed: int) -> None:
    plan, load = _plan(seed)
    today = contiguous(3, 16, SHAPE)
    aligned = align(plan, today)
    before, after = (np.sort(rank_loads(p, load), axis=1) for p in (plan, aligned))
    np.testing.assert_allclose(before, after, rtol=1e-12)
    assert migration(aligned, today, 1.0).moved_slots <= migration(plan, today, 1.0).moved_slots


def test_bytes_of_a_migration_are_moved_slots_times_expert_bytes() -> None:
    today = Placement(np.array([[0, 1, 2, 3]], dtype=np.int32), 4, 2, 2)
    plan = Placement(np.array([[0, 2, 1, 3]], dtype=np.int32), 4, 2, 2)
    moved = migration(plan, today, expert_bytes=10.0)
    assert (moved.moved_slots, moved.n_bytes, moved.busiest_rank_bytes) == (2, 20.0, 10.0)


def test_placements_of_different_shape_are_refused() -> None:
    with pytest.raises(PlanError, match="must be equal"):
        migration(contiguous(1, 16, SHAPE), contiguous(3, 16, SHAPE), 1.0)


def test_a_gain_inside_the_noise_is_not_worth_it() -> None:
    rng = np.random.default_rng(0)
    today = rng.normal(1.0, 0.2, 30)
    plan = today[rng.permutation(30)] * 0.999
    gain = paired_gain(today, plan, seed=0)
    assert gain.low < 0 < gain.high
    assert verdict(gain, least_gain_share=0.0) == "not_worth_it"


def test_a_gain_beyond_the_noise_is_deployed_and_its_interval_holds_the_truth() -> None:
    today = np.random.default_rng(1).normal(1.0, 0.01, 200)
    gain = paired_gain(today, today * 0.9, seed=0)
    assert gain.low <= 0.1 + 1e-12
    assert gain.high >= 0.1 - 1e-12
    assert verdict(gain, least_gain_share=0.05) == "deploy"
    assert verdict(gain, least_gain_share=0.2) == "not_worth_it"


def test_steps_must_be_paired() -> None:
    with pytest.raises(PlanError, match="expected equal"):
        paired_gain(np.ones(3), np.ones(4), seed=0)
