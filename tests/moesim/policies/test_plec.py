"""PLEC: slots follow predicted need, nearest first; without predictions it is a global LRU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.offload.built_in import decide_built_in
from moesim.offload.decide import decide
from moesim.offload.decisions import DEMAND, LOADED, PREFETCH, RESIDENT, Decisions
from moesim.offload.policy import OffloadPolicy
from moesim.policies.plec import Plec, objects_by_step, plec
from moesim.policies.prefetch import Predictions, no_predictions, oracle
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.synth import zipf_trace

seeds = st.integers(0, 10**6)
LAYERS, EXPERTS = 4, 10


def random_work(seed: int, batch: int, tokens: int = 120, top_k: int = 1) -> LayerSteps:
    trace = zipf_trace(tokens, LAYERS, EXPERTS, top_k, 0.7, 0.1, seed)
    return layer_steps(trace, forward_passes(trace, batch, "decode"))


def run(work: LayerSteps, slots: int, predicted: Predictions) -> Decisions:
    policy = OffloadPolicy(slots=np.array([slots]))
    return decide(work, policy, plec(work, policy, predicted))


def widest(work: LayerSteps) -> int:
    return int(np.diff(work.start).max())


# --- the list of what is wanted -----------------------------------------------------------------


def test_predicted_demand_of_three_and_two_shares_four_slots_three_to_one() -> None:
    """The paper's example: the one that has no slot is streamed."""
    cache = Plec([[], [10, 11, 12], [20, 21]], slots=4, horizon=2)
    assert cache.wanted(0, 0, []) == [10, 11, 12, 20]


def test_slots_of_a_finished_layer_go_to_later_ones() -> None:
    named = [[0, 1], [10, 11], [20, 21], [30, 31]]
    cache = Plec(named, slots=4, horizon=3)
    assert cache.wanted(0, 0, [0, 1]) == [10, 11]
    assert cache.wanted(1, 1, [10, 11]) == [20, 21]
    assert cache.wanted(2, 2, [20, 21]) == [30, 31]


def test_nothing_beyond_the_horizon_is_wanted() -> None:
    cache = Plec([[0], [10], [20], [30]], slots=9, horizon=2)
    assert cache.wanted(0, 0, [0]) == [10, 20]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=2, max_size=8),
    st.integers(1, 12),
    st.integers(1, 8),
    st.data(),
)
def test_the_list_is_the_nearest_needs_that_fit_beside_the_running_layer(
    named: list[list[int]], slots: int, horizon: int, data: st.DataObject
) -> None:
    now = data.draw(st.integers(0, len(named) - 1))
    running = data.draw(st.lists(st.integers(31, 40), max_size=slots, unique=True))
    wanted = list(Plec(named, slots, horizon).wanted(now, 0, running))
    needs = [expert for step in named[now + 1 : now + 1 + horizon] for expert in step]
    distinct = list(dict.fromkeys(needs))
    assert wanted == distinct[: slots - len(running)]


def test_the_victim_is_not_on_the_list_or_else_the_last_on_it() -> None:
    cache = Plec([[], [1, 2], [3]], slots=3, horizon=2)
    for expert in (3, 2, 1, 9, 8):
        cache.insert(expert, -1, True)
    assert cache.wanted(0, 0, []) == [1, 2, 3]
    assert cache.victim([1, 2, 3, 8, 9], 7, 0) == 9  # not wanted, the longest unused of two
    assert cache.victim([1, 2, 3], 7, 0) == 3
    assert cache.victim([1, 2], 7, 0) == cache.victim([1, 2], 7, 0) == 2


def test_objects_by_step_are_experts_of_their_layer() -> None:
    work = random_work(0, 3)
    predicted = oracle(work, 0.5)
    found = objects_by_step(work, predicted)
    assert len(found) == work.n_steps
    assert sum(map(len, found)) == len(predicted.expert)
    for step, objects in enumerate(found):
        assert all(each // EXPERTS == step % LAYERS for each in objects)


# --- in the loop --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 4, 8]), st.integers(0, 30))
def test_without_predictions_plec_decides_as_a_global_lru(seed: int, batch: int, more: int) -> None:
    work = random_work(seed, batch)
    policy = OffloadPolicy(cache="lru", slots=np.array([widest(work) + more]))
    ours = decide(work, policy, plec(work, policy, no_predictions(work)))
    lru = decide_built_in(work, policy)
    np.testing.assert_array_equal(ours.was_there, lru.was_there)
    np.testing.assert_array_equal(ours.loads.object, lru.loads.object)
    assert ours.evictions == lru.evictions


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 4, 8]), st.floats(0, 1))
def test_every_miss_is_loaded_on_demand_and_every_hit_was_loaded_before(
    seed: int, batch: int, recall: float
) -> None:
    """Correction of wrong predictions, and no expert from nowhere."""
    work = random_work(seed, batch)
    found = run(work, 2 * widest(work), oracle(work, recall, seed=seed))
    np.testing.assert_array_equal(found.place == RESIDENT, found.was_there)
    np.testing.assert_array_equal(found.place == LOADED, ~found.was_there)
    demand = found.loads.kind == DEMAND
    np.testing.assert_array_equal(found.loads.object[demand], work.objects()[~found.was_there])
    step = np.repeat(np.arange(work.n_steps), np.diff(work.start))
    first = {}
    for at, expert in zip(found.loads.step.tolist(), found.loads.object.tolist(), strict=True):
        first.setdefault(expert, at)
    for at, expert in zip(
        step[found.was_there].tolist(), work.objects()[found.was_there].tolist(), strict=True
    ):
        assert first[expert] < at


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 4, 8]), st.floats(0, 1))
def test_the_slots_are_never_overfull(seed: int, batch: int, recall: float) -> None:
    work = random_work(seed, batch)
    slots = widest(work) + 2
    found = run(work, slots, oracle(work, recall, seed=seed))
    assert len(found.loads.object) - found.evictions <= slots


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 4, 8]))
def test_right_predictions_and_room_for_two_layers_leave_misses_in_the_first_step_only(
    seed: int, batch: int
) -> None:
    work = random_work(seed, batch)
    found = run(work, 2 * widest(work), oracle(work, 1.0))
    assert not found.was_there[: work.start[1]].any()
    assert found.was_there[work.start[1] :].all()
    assert found.refused == 0


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0, 1))
def test_with_room_for_everything_nothing_is_loaded_twice(seed: int, recall: float) -> None:
    work = random_work(seed, 4)
    found = run(work, work.n_objects, oracle(work, recall, seed=seed))
    assert len(set(found.loads.object.tolist())) == len(found.loads.object)
    assert found.evictions == 0


def test_a_better_predictor_hits_more_and_demands_less() -> None:
    work = random_work(3, 6, tokens=600)
    runs = [run(work, 12, oracle(work, recall)) for recall in (0.0, 0.5, 0.8, 1.0)]
    assert (np.diff([one.hit_rate for one in runs]) > 0.02).all()
    loads = [(one.loads.kind == DEMAND).sum() for one in runs]
    assert (np.diff(loads) < 0).all()
    assert (runs[-1].loads.kind == PREFETCH).any()


def test_a_step_wider_than_the_slots_passes_its_rest_through() -> None:
    """More experts than slots in one layer: all are computed, none of the others breaks."""
    work = random_work(5, 9)
    assert widest(work) > 3
    found = run(work, 3, oracle(work, 1.0))
    assert len(found.place) == len(work.expert)
    assert len(found.loads.object) - found.evictions >= 3


def test_plec_wants_one_group_of_slots() -> None:
    work = random_work(0, 2)
    policy = OffloadPolicy(slots=np.full(LAYERS, 3))
    with pytest.raises(SimulationError, match="slots of one group"):
        plec(work, policy, no_predictions(work))
    with pytest.raises(SimulationError, match="slots of one group"):
        plec(work, replace(policy, slots=None), no_predictions(work))
