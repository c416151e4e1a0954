"""Projections stay within the room, lose as little as can be, and say what is lost."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.export import projection
from planners.residency_file import CacheEntry, ResidencyFile
from tests.planners.export_case import EXPERT_BYTES, plan_of, plans


def _room(plan: ResidencyFile) -> np.ndarray:
    return projection.rooms(plan, projection.experts(plan))


@given(plans(mixed_bits=True))
def test_room_is_what_the_capacity_leaves_beside_all_but_the_experts(plan: ResidencyFile) -> None:
    held = projection.experts(plan)
    for index, (entry, room) in enumerate(zip(plan.tiers, _room(plan), strict=True)):
        pinned = int(held.n_bytes[held.tier == index].sum())
        slots = projection.cache_bytes(plan, held) if index == 0 else 0
        assert entry.used_bytes - pinned <= slots + entry.capacity_bytes - room
        assert pinned <= room <= entry.capacity_bytes


@given(plans(mixed_bits=True))
def test_whole_layers_fit_every_tier_and_none_is_left(plan: ResidencyFile) -> None:
    held = projection.experts(plan)
    tier = projection.whole_layers(plan, held)
    n_bytes = held.n_bytes.sum(axis=1)
    used = np.bincount(tier, weights=n_bytes, minlength=3)
    assert (used <= _room(plan)).all()
    assert (tier >= 0).all()


@given(plans(mixed_bits=True))
def test_no_other_choice_of_layers_serves_more_activations_from_the_device(
    plan: ResidencyFile,
) -> None:
    held = projection.experts(plan)
    n_bytes, room = held.n_bytes.sum(axis=1), _room(plan)[0]
    layers = range(len(n_bytes))
    fits = [c for n in range(len(n_bytes) + 1) for c in combinations(layers, n)]
    best = max(len(c) for c in fits if sum(n_bytes[i] for i in c) <= room)
    loss = projection.layer_loss(plan, held, projection.whole_layers(plan, held))
    assert loss.device_share == pytest.approx(best / len(n_bytes))
    assert loss.device_bytes <= room


@given(plans())
def test_of_equal_layers_those_go_first_that_the_plan_serves_from_there(
    plan: ResidencyFile,
) -> None:
    held = projection.experts(plan)
    tier = projection.whole_layers(plan, held)
    wanted = np.where(held.on_device, held.share, 0).sum(axis=1).round(9)
    chosen, left = wanted[tier == 0], wanted[tier != 0]
    assert not len(chosen) or not len(left) or chosen.min() >= left.max()


@given(plans())
def test_a_plan_of_whole_layers_is_its_own_projection(plan: ResidencyFile) -> None:
    rows = np.arange(len(plan.moe_layers)) % 2
    tier = np.repeat(rows[:, None], plan.n_experts, axis=1)
    whole = plan_of(tier, spare=(0, 0, 0))
    held = projection.experts(whole)
    found = projection.whole_layers(whole, held)
    assert (found == rows).all()
    assert projection.layer_loss(whole, held, found).lost_share == pytest.approx(0)


@given(plans(mixed_bits=True))
def test_the_most_equal_slots_fit_and_one_more_does_not(plan: ResidencyFile) -> None:
    held, room = projection.experts(plan), _room(plan)[0]
    one_slot = int(held.n_bytes.max(axis=1).sum())
    if room < one_slot:
        with pytest.raises(PlanError, match=f"short by {one_slot - room} bytes"):
            projection.equal_slots(plan, held, 0)
        return
    slots = projection.equal_slots(plan, held, 0)
    assert slots * one_slot <= room
    assert slots == plan.n_experts or (slots + 1) * one_slot > room


@given(plans())
def test_shares_of_equal_slots_lie_between_uniform_choice_and_the_best_experts(
    plan: ResidencyFile,
) -> None:
    held, before = projection.experts(plan), 0.0
    for slots in range(1, plan.n_experts + 1):
        loss = projection.slots_loss(plan, held, slots)
        assert loss.device_share is not None
        assert slots / plan.n_experts - 1e-6 <= loss.device_share
        assert before <= loss.device_share <= loss.device_share_at_most + 1e-9 <= 1 + 2e-9
        before = loss.device_share
    assert before == pytest.approx(1)


@pytest.mark.parametrize("slots", [2, 6, 12])
def test_the_lru_estimate_is_what_lru_does_on_independent_draws(slots: int) -> None:
    rng = np.random.default_rng(3)
    share = rng.dirichlet(np.full(16, 0.5))
    order = list(range(slots))
    hits, draws = 0, rng.choice(16, 20_000, p=share)
    for expert in draws.tolist():
        if expert in order:
            hits += 1
            order.remove(expert)
        else:
            order.pop(0)
        order.append(expert)
    estimate = projection.lru_share(share[None], slots)[0]
    assert estimate == pytest.approx(hits / len(draws), abs=0.02)


@given(plans(mixed_bits=True))
def test_what_the_plan_pins_is_no_loss_when_the_engine_pins_it_too(plan: ResidencyFile) -> None:
    held = projection.experts(plan)
    loss = projection.loss_of(plan, held, held.on_device)
    assert loss.lost_share == 0
    assert loss.device_bytes == loss.plan_device_bytes
    unknown = sum(not row.load for row in plan.layers if row.kind == "moe")
    assert loss.layers_without_load == unknown


def test_layers_without_a_load_count_as_uniform_and_are_counted() -> None:
    load = np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    plan = plan_of(np.array([[0, 1, 1, 1], [0, 1, 1, 1]]), load=load)
    held = projection.experts(plan)
    loss = projection.loss_of(plan, held, held.on_device)
    assert loss.plan_device_share == pytest.approx((1 + 0.25) / 2)
    assert loss.layers_without_load == 1


def test_fewer_bits_take_fewer_bytes() -> None:
    bits = np.array([[16.0, 8.0, 4.25, 4.0]])
    held = projection.experts(plan_of(np.zeros((1, 4), int), bits=bits))
    assert held.n_bytes.tolist() == [[1000, 500, 266, 250]]


@given(st.integers(1, 5000))
@settings(max_examples=20)
def test_a_plan_that_does_not_fit_names_the_tier_and_the_bytes_it_is_short_by(short: int) -> None:
    plan = plan_of(np.array([[0, 0, 1, 1]]), spare=(-short, 0, 0) if short <= 2000 else (0, 0, 0))
    if short > 2000:
        assert _room(plan)[0] == 2000
        return
    with pytest.raises(PlanError, match=f"tier gpu: 2000 bytes.*short by {short}$"):
        _room(plan)


def test_room_of_the_cache_is_room_for_layers() -> None:
    tier = np.ones((2, 4), int)
    cache = CacheEntry(slots=[2, 2], policy="lru")
    plan = plan_of(tier, spare=(0, 0, 0), others=777, cache=cache)
    held = projection.experts(plan)
    assert _room(plan)[0] == 4 * EXPERT_BYTES
    assert projection.whole_layers(plan, held).tolist() == [1, 0]
    globally = plan.model_copy(update={"cache": CacheEntry(scope="global", slots=[4])})
    assert projection.cache_bytes(globally, held) == 4 * EXPERT_BYTES


def test_a_tier_whose_use_is_not_stated_holds_experts_only() -> None:
    plan = plan_of(np.array([[0, 1]]), spare=(500, 0, 0))
    tiers = [entry.model_copy(update={"used_bytes": 0}) for entry in plan.tiers]
    assert _room(plan.model_copy(update={"tiers": tiers}))[0] == 1500


def test_layers_that_fit_nowhere_are_refused_with_their_bytes() -> None:
    plan = plan_of(np.array([[0, 1], [0, 1]]), spare=(0, 0, 0))
    held = projection.experts(plan)
    assert projection.whole_layers(plan, held).tolist() == [1, 0]
    split = plan_of(np.array([[0, 0, 1, 1], [0, 1, 1, 1]]), spare=(0, 0, 0))
    with pytest.raises(PlanError, match=r"tier nvme: whole layers leave 1 layers \(4000 bytes\)"):
        projection.whole_layers(split, projection.experts(split))


def test_engines_without_a_form_for_it_refuse_pim_attention_elsewhere_and_several_devices() -> None:
    plan = plan_of(np.array([[0, 1]]))
    held = projection.experts(plan)
    tiers = [entry.model_copy() for entry in plan.tiers]
    tiers[1].kind = "pim"
    with pytest.raises(PlanError, match="tier dram: 1 experts are in a tier of kind pim"):
        projection.refuse_kinds(plan.model_copy(update={"tiers": tiers}), held, "X", "pim")
    tiers[1].kind = "device"
    with pytest.raises(PlanError, match="gpu, dram; X takes a plan with exactly one"):
        projection.only_device(plan.model_copy(update={"tiers": tiers}), "X")
    away = plan.model_copy(deep=True)
    away.layers[0].attention_tier = 1
    with pytest.raises(PlanError, match=r"layers\[0\].attention_tier is dram"):
        projection.need_attention_on_device(away, "X")
    with pytest.raises(PlanError, match="host memory: all takes .* short by 1$"):
        projection.need_host_room(plan, held, int(_room(plan)[1]) + 1, "all")
