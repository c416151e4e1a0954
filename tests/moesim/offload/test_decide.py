"""What the loop of an offloading runtime decides: laws, twins, and figures known from elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from moesim.errors import SimulationError
from moesim.offload.built_in import decide_built_in, hooks_for
from moesim.offload.decide import Hooks, decide
from moesim.offload.decisions import (
    DEMAND,
    LOADED,
    LOW,
    NO_LOAD,
    ON_CPU,
    PREFETCH,
    RESIDENT,
    SKIPPED,
)
from moesim.offload.policy import CACHES, OffloadPolicy
from moesim.policies.cache import CachePolicy
from moesim.policies.prefetch import Predictions, oracle
from tests.moesim.offload.example import TIMES, cases, random_topk, trace_of, work_of
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.replay import replay_trace
from traces.synth import zipf_trace

Case = tuple[LayerSteps, OffloadPolicy, Predictions | None]


@settings(deadline=None, max_examples=150)
@given(cases())
def test_the_compiled_loop_decides_what_the_plain_one_does(case: Case) -> None:
    work, policy, predicted = case
    fast = decide_built_in(work, policy, TIMES, predicted)
    plain = decide(work, policy, hooks_for(work, policy, TIMES), predicted)
    for field in ("place", "was_there", "level", "load"):
        np.testing.assert_array_equal(getattr(fast, field), getattr(plain, field), field)
    for field in ("object", "step", "kind", "units"):
        np.testing.assert_array_equal(getattr(fast.loads, field), getattr(plain.loads, field))
    assert (fast.evictions, fast.refused, fast.wasted) == (
        plain.evictions, plain.refused, plain.wasted,
    )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(cases())
def test_every_request_is_served_once_and_every_load_has_a_reason(case: Case) -> None:
    work, policy, predicted = case
    made = decide_built_in(work, policy, TIMES, predicted)
    loads = made.loads
    by_demand = loads.kind == DEMAND
    assert len(made.place) == len(work.expert)
    assert int((made.place == LOADED).sum()) == int(by_demand.sum())
    # A demand load is issued at its own layer-step for an expert that the step asked for.
    objects, step = work.objects(), np.repeat(np.arange(work.n_steps), np.diff(work.start))
    waits = made.load != NO_LOAD
    np.testing.assert_array_equal(loads.object[made.load[waits]], objects[waits])
    assert (loads.step[made.load[waits]] <= step[waits]).all()
    assert (np.diff(loads.step) >= 0).all()
    ahead = int((loads.kind == PREFETCH).sum())
    assert made.wasted <= ahead
    # Without low-bit copies a copy that was there is never loaded by demand.
    assert not (made.was_there & (made.place == LOADED)).any()


class _Counting:
    """Wraps a policy and refuses to see more copies in a group than its slots hold."""

    def __init__(self, inner: CachePolicy, group_of: np.ndarray, most: np.ndarray) -> None:
        self.inner, self.group_of, self.most = inner, group_of, most
        self.held: list[set[int]] = [set() for _ in most]

    def use(self, expert: int, now: int) -> None:
        self.inner.use(expert, now)

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        held = self.held[self.group_of[expert]]
        assert expert not in held
        held.add(expert)
        assert len(held) <= self.most[self.group_of[expert]]
        self.inner.insert(expert, now, ahead)

    def evict(self, expert: int) -> None:
        self.held[self.group_of[expert]].remove(expert)
        self.inner.evict(expert)

    def victim(self, candidates: list[int], incoming: int, now: int) -> int:
        chosen = self.inner.victim(candidates, incoming, now)
        assert chosen in candidates
        assert chosen == self.inner.victim(candidates, incoming, now)  # asking changes nothing
        return chosen


@settings(deadline=None, max_examples=60)
@given(cases())
def test_slots_are_never_overfull_and_only_what_is_there_leaves(case: Case) -> None:
    work, policy, predicted = case
    slots = policy.capacity(work.n_layers)
    layer = np.arange(work.n_objects) // work.n_experts
    group_of = layer if len(slots) > 1 else np.zeros_like(layer)
    hooks = hooks_for(work, policy, TIMES)
    smallest = policy.units_low or policy.units_high
    watched = _Counting(hooks.cache, group_of, slots // smallest)
    decide(work, policy, Hooks(watched, hooks.dispatch), predicted)


@pytest.mark.parametrize("cache", ["lru", "lfu", "fifo", "arc", "belady"])
@pytest.mark.parametrize("slots", [1, 3, 5])
def test_top_1_routing_misses_as_timeless_replay_does(cache: str, slots: int) -> None:
    trace = zipf_trace(1500, 4, 8, 1, 0.8, 0.4, seed=3)
    work = layer_steps(trace, forward_passes(trace))
    policy = OffloadPolicy(cache=cache, slots=np.full(4, slots, np.int64))
    timeless = replay_trace(trace, slots, cache, scope="per_layer")
    assert int(decide_built_in(work, policy).was_there.sum()) == timeless.n_hits


def test_one_cache_over_all_layers_misses_as_global_replay_does() -> None:
    trace = zipf_trace(1500, 4, 8, 1, 0.8, 0.4, seed=4)
    work = layer_steps(trace, forward_passes(trace))
    policy = OffloadPolicy(cache="lru", slots=np.array([9], np.int64))
    timeless = replay_trace(trace, 9, "lru")
    assert int(decide_built_in(work, policy).was_there.sum()) == timeless.n_hits


@pytest.mark.parametrize("cache", [name for name in CACHES if name != "mrs"])
def test_a_cache_of_all_experts_misses_each_once(cache: str) -> None:
    work = work_of(200)
    made = decide_built_in(work, OffloadPolicy(cache=cache, slots=np.full(3, 8, np.int64)))
    assert int((~made.was_there).sum()) == len(np.unique(work.objects()))
    assert made.evictions == 0


def test_more_slots_never_hurt_lru() -> None:
    work = work_of(400, n_experts=12)
    hits = [
        decide_built_in(work, OffloadPolicy(slots=np.full(3, c, np.int64))).was_there.sum()
        for c in range(2, 13)
    ]
    assert (np.diff(hits) >= 0).all()


def test_no_cache_beats_belady_when_every_miss_is_loaded() -> None:
    work = work_of(600, n_experts=12, top_k=1, seed=5)
    hits = {
        cache: int(
            decide_built_in(
                work, OffloadPolicy(cache=cache, slots=np.full(3, 4, np.int64))
            ).was_there.sum()
        )
        for cache in CACHES
    }
    assert max(hits.values()) == hits["belady"]
    assert hits["belady"] >= hits["lookahead"] > hits["fifo"]


def test_a_cyclic_scan_defeats_lru_entirely_and_belady_not() -> None:
    topk = (np.arange(90) % 5).reshape(-1, 1, 1)
    trace = trace_of(topk, 5)
    work = layer_steps(trace, forward_passes(trace))
    four = np.full(1, 4, np.int64)
    assert decide_built_in(work, OffloadPolicy(cache="lru", slots=four)).hit_rate == 0.0
    assert decide_built_in(work, OffloadPolicy(cache="belady", slots=four)).hit_rate > 0.6


def test_an_expert_of_the_running_layer_is_never_evicted() -> None:
    # b misses while d, unused for longest, is asked for by the same token: d must stay.
    topk = np.array([[[3, 2]], [[1, 0]], [[2, 3]]])
    trace = trace_of(topk, 4)
    work = layer_steps(trace, forward_passes(trace))
    made = decide_built_in(work, OffloadPolicy(slots=np.array([3], np.int64)))
    assert made.was_there.tolist() == [False, False, False, False, True, False]


def test_perfect_foresight_one_layer_ahead_hits_all_but_the_first_layer() -> None:
    work = work_of(100, n_layers=4)
    policy = OffloadPolicy(slots=np.full(4, 4, np.int64))
    made = decide_built_in(work, policy, None, oracle(work, 1.0))
    assert made.was_there[np.repeat(np.arange(work.n_steps) > 0, 2)].all()
    assert made.wasted == 0
    assert int((made.loads.kind == PREFETCH).sum()) > 0


def test_a_budget_of_none_fetches_nothing_ahead() -> None:
    work = work_of(50)
    policy = OffloadPolicy(slots=np.full(3, 4, np.int64), budget=0)
    assert not (decide_built_in(work, policy, None, oracle(work, 1.0)).loads.kind == PREFETCH).any()


def test_misses_go_where_the_rule_says() -> None:
    work = work_of(60)
    slots = np.full(3, 2, np.int64)
    pinned = np.zeros(24, np.bool_)
    pinned[::3] = True
    for on_miss, place in (("cpu", ON_CPU), ("skip", SKIPPED), ("load", LOADED)):
        made = decide_built_in(work, OffloadPolicy(slots=slots, pinned=pinned, on_miss=on_miss))
        assert set(made.place[~made.was_there].tolist()) == {place}
        assert set(made.place[made.was_there].tolist()) == {RESIDENT}
    assert made.was_there[pinned[work.objects()]].all()


def test_the_threshold_sends_small_batches_to_the_cpu() -> None:
    work = work_of(80, n_prefill=40)
    policy = OffloadPolicy(slots=np.full(3, 2, np.int64), on_miss="threshold", threshold_tokens=5)
    made = decide_built_in(work, policy)
    missing = ~made.was_there
    np.testing.assert_array_equal(made.place[missing] == ON_CPU, work.tokens[missing] < 5)


def test_low_bit_copies_serve_what_holds_little_gate_weight() -> None:
    work = work_of(60, top_k=3)
    policy = OffloadPolicy(
        slots=np.full(3, 16, np.int64), units_high=4, units_low=2, high_share=0.6
    )
    made = decide_built_in(work, policy)
    assert 0 < (made.level == LOW).mean() < 1
    small = set(made.loads.units.tolist())
    assert small == {2, 4}


def test_a_nested_upgrade_loads_the_difference_only() -> None:
    topk = np.array([[[0, 1]], [[1, 0]]])
    trace = trace_of(topk, 4)
    gate = np.array([[[0.9, 0.1]], [[0.9, 0.1]]], np.float16)
    work = layer_steps(replace(trace, weights=gate), forward_passes(trace))
    policy = OffloadPolicy(
        slots=np.array([16], np.int64), units_high=4, units_low=3, high_share=0.8, nested=True
    )
    made = decide_built_in(work, policy)
    assert made.loads.units.tolist() == [4, 3, 1]  # 0 full, 1 low; then 1 is upgraded by a plane


def test_warm_experts_are_there_at_once_and_may_leave() -> None:
    work = work_of(200)
    warm = np.zeros(24, np.bool_)
    warm[[0, 1, 8, 9, 16, 17]] = True
    made = decide_built_in(work, OffloadPolicy(slots=np.full(3, 2, np.int64), warm=warm))
    first = work.objects()[:6]
    np.testing.assert_array_equal(made.was_there[:6], warm[first])
    assert made.evictions > 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (OffloadPolicy(slots=np.full(3, 1, np.int64)), "fewer than the top_k=2"),
        (OffloadPolicy(slots=np.full(2, 4, np.int64)), "2 values, expected 1 or 3"),
        (OffloadPolicy(slots=np.full(3, 4, np.int64), pinned=np.zeros(7, np.bool_)), "pinned"),
        (OffloadPolicy(slots=np.full(3, 2, np.int64), warm=np.ones(24, np.bool_)), "warm"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_with_the_numbers(
    policy: OffloadPolicy, message: str
) -> None:
    work = work_of(10)
    for run in (
        lambda: decide_built_in(work, policy),
        lambda: decide(work, policy, hooks_for(work, policy)),
    ):
        with pytest.raises(SimulationError, match=message):
            run()


def test_scores_that_a_trace_lacks_are_named() -> None:
    trace = trace_of(random_topk(20, 2, 6, 2, 0), 6, weights=False)
    work = layer_steps(trace, forward_passes(trace))
    slots = np.full(2, 3, np.int64)
    with pytest.raises(SimulationError, match="gate weights"):
        decide_built_in(work, OffloadPolicy(cache="mrs", slots=slots))
    with pytest.raises(SimulationError, match="gate weights"):
        decide_built_in(
            work, OffloadPolicy(slots=slots * 4, units_high=4, units_low=1, high_share=0.5)
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"cache": "clock"},
        {"on_miss": "pray"},
        {"slots": np.array([-1])},
        {"score_decay": 0.0},
        {"units_low": 1},
        {"on_miss": "load_low"},
    ],
)
def test_wrong_parameters_are_refused_at_once(wrong: dict[str, object]) -> None:
    with pytest.raises(SimulationError):
        OffloadPolicy(**wrong)  # type: ignore[arg-type]


def test_a_policy_of_ones_own_runs_in_the_plain_loop() -> None:
    class Newest:
        """The newest copy leaves (LIFO)."""

        def __init__(self) -> None:
            self.order: list[int] = []

        def use(self, expert: int, now: int) -> None:
            """Nothing to learn."""

        def insert(self, expert: int, now: int, ahead: bool) -> None:
            self.order.append(expert)

        def evict(self, expert: int) -> None:
            self.order.remove(expert)

        def victim(self, candidates: list[int], incoming: int, now: int) -> int:
            return next(expert for expert in reversed(self.order) if expert in candidates)

    topk = (np.arange(90) % 5).reshape(-1, 1, 1)
    trace = trace_of(topk, 5)
    work = layer_steps(trace, forward_passes(trace))
    policy = OffloadPolicy(slots=np.array([4], np.int64))
    hooks = Hooks(cache=Newest(), dispatch=hooks_for(work, policy).dispatch)
    assert decide(work, policy, hooks).hit_rate > 0.5  # LIFO comes near Belady in a cyclic scan


def test_mrs_keeps_more_than_lru_on_captured_gate_weights(shared: Path) -> None:
    from traces.formats.detect import read_any

    trace = read_any(shared / "traces" / "deepseek-v2-lite-law.npz").rows(slice(0, 3000))
    work = layer_steps(trace, forward_passes(trace, phase="both", chunk_tokens=1))
    slots = np.full(work.n_layers, 16, np.int64)
    rate = {
        cache: decide_built_in(work, OffloadPolicy(cache=cache, slots=slots)).hit_rate
        for cache in ("lru", "mrs", "belady")
    }
    assert rate["belady"] > max(rate["lru"], rate["mrs"])
    assert min(rate.values()) > 16 / 64  # above chance
