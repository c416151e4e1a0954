"""Placing experts, attention and KV caches over tiers, and splitting slots over layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planners.errors import PlanError
from planners.residency import Needs, Tier, Uses, knee, plan_residency, split_slots

GIB = 2**30
TIERS = (Tier("device memory", "device", 10 * GIB), Tier("host memory", "host", 100 * GIB))
USES = Uses(np.array([[1e-5, 1e-3]]), np.array([0.0, 0.1]), np.array([0.0, 0.05]))


def needs(n_layers: int = 4, n_experts: int = 16, seed: int = 0) -> Needs:
    """Experts of 0.5 GiB with Zipf-like use, some attention and KV cache."""
    rng = np.random.default_rng(seed)
    often = rng.permuted(np.tile(1.0 / np.arange(1, n_experts + 1), (n_layers, 1)), axis=1)
    return Needs(
        activations=often,
        expert_bits=(16.0,),
        expert_bytes=(GIB // 2,),
        attention_bytes=GIB // 8,
        kv_bytes=GIB // 16,
        n_layers=n_layers,
        n_kv_layers=n_layers,
        fixed_bytes=GIB,
    )


def test_attention_and_kv_come_before_any_expert() -> None:
    found = plan_residency(needs(), TIERS, USES)
    assert not found.attention_tier.any()
    assert not found.kv_tier.any()
    assert (found.used_bytes <= [tier.capacity_bytes for tier in TIERS]).all()


def test_the_experts_on_the_device_are_the_most_used() -> None:
    wanted = needs()
    found = plan_residency(wanted, TIERS, USES)
    here = found.expert_tier == 0
    assert wanted.activations[here].min() >= wanted.activations[~here].max()
    assert int(here.sum()) == int((10 - 1 - 0.5 - 0.25) // 0.5)


def test_layers_with_flat_use_get_fewer_places_than_skewed_ones() -> None:
    flat_and_steep = np.stack([np.full(16, 1 / 16), np.r_[0.9, np.full(15, 0.1 / 15)]])
    wanted = replace(needs(2), activations=flat_and_steep)
    small = (replace(TIERS[0], capacity_bytes=2 * GIB), TIERS[1])
    found = plan_residency(wanted, small, USES)
    assert found.expert_tier[1, 0] == 0
    assert found.gap < 0.05


def test_pinned_experts_stay_on_the_device_at_full_bits() -> None:
    wanted = needs()
    least = np.unravel_index(wanted.activations.argmin(), wanted.activations.shape)
    pinned = np.zeros(wanted.activations.shape, np.bool_)
    pinned[least] = True
    two_bits = Uses(np.tile(USES.expert_s, (2, 1)), USES.attention_s, USES.kv_s)
    wanted = replace(
        wanted, pinned=pinned, expert_bits=(16.0, 4.0), expert_bytes=(GIB // 2, GIB // 8),
        low_share=0.5,
    )  # fmt: skip
    found = plan_residency(wanted, TIERS, two_bits)
    assert found.expert_tier[least] == 0
    assert found.expert_bits[least] == 16.0


def test_low_bits_serve_at_most_the_share_allowed_and_let_more_in() -> None:
    wanted = needs()
    two_bits = Uses(np.tile(USES.expert_s, (2, 1)), USES.attention_s, USES.kv_s)
    both = replace(wanted, expert_bits=(16.0, 4.0), expert_bytes=(GIB // 2, GIB // 8))
    full = plan_residency(wanted, TIERS, USES)
    for share in (0.0, 0.1, 0.3):
        found = plan_residency(replace(both, low_share=share), TIERS, two_bits)
        low = wanted.activations[found.expert_bits == 4.0].sum() / wanted.activations.sum()
        assert low <= share + 1e-9
        assert found.seconds <= full.seconds * (1 + 1e-3)
    assert found.seconds < 0.9 * full.seconds


def test_a_device_too_small_for_the_fixed_part_is_named() -> None:
    tiny = (replace(TIERS[0], capacity_bytes=GIB // 2), TIERS[1])
    with pytest.raises(PlanError, match=r"device memory is short by 0\.50 GiB"):
        plan_residency(needs(), tiny, USES)


def test_a_host_too_small_for_the_rest_is_named() -> None:
    short = (TIERS[0], replace(TIERS[1], capacity_bytes=GIB))
    with pytest.raises(PlanError, match="host memory is short by"):
        plan_residency(needs(), short, USES)


def test_slots_go_where_they_serve_most() -> None:
    hits = np.array([[0, 10, 11, 12, 13], [0, 4, 8, 12, 16]])
    np.testing.assert_array_equal(split_slots(hits, 4, 0), [1, 3])
    np.testing.assert_array_equal(split_slots(hits, 8, 0), [4, 4])
    np.testing.assert_array_equal(split_slots(hits, 4, 2), [2, 2])


def test_a_curve_that_gains_late_is_not_starved() -> None:
    hits = np.array([[0, 0, 0, 30], [0, 5, 8, 9]])  # a cyclic scan: nothing until all fits
    np.testing.assert_array_equal(split_slots(hits, 3, 0), [3, 0])


def test_too_few_slots_for_one_token_are_refused() -> None:
    with pytest.raises(PlanError, match="3 slots cannot give 2 layers 2 each"):
        split_slots(np.zeros((2, 5), np.int64), 3, 2)


def test_the_knee_of_a_bent_curve_is_at_its_bend() -> None:
    assert knee(np.array([0.0, 0.5, 0.9, 0.93, 0.96, 1.0])) == 2
