"""Impact-driven prefetch: it knows what is held, takes the largest saving, and only free time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.offload.built_in import hooks_for
from moesim.offload.decide import Hooks, decide
from moesim.offload.decisions import LOADED, ON_CPU, PREFETCH, RESIDENT, Decisions
from moesim.offload.policy import OffloadPolicy
from moesim.policies.cache import Lru
from moesim.policies.dispatch import UnitTimes, hss
from moesim.policies.impact import Forecast, ImpactPrefetch, Watched, busy_seconds, forecast
from moesim.policies.prefetch import Predictions, no_predictions, oracle
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.synth import zipf_trace

LAYERS, EXPERTS, TOP_K = 5, 16, 3


def times(gpu: float = 0.1, load: float = 0.3, most: int = 9) -> UnitTimes:
    """A CPU of one unit a token, and a GPU that is faster by far."""
    return UnitTimes([0.0] + [gpu] * most, [1.0 * n for n in range(most + 1)], 0.5, load)


def decode_work(seed: int, n_tokens: int = 60) -> LayerSteps:
    trace = zipf_trace(n_tokens, LAYERS, EXPERTS, TOP_K, 0.6, 0.2, seed)
    return layer_steps(trace, forward_passes(trace))


def hybrid(work: LayerSteps, policy: OffloadPolicy, by: UnitTimes, ahead: bool) -> Decisions:
    """The plain loop with the hybrid schedule, with or without impact-driven prefetch."""
    forecasts = [forecast(work, oracle(work, 1.0).known_at(d)) for d in (1, 2, 3)]
    held = Watched(hooks_for(work, policy).cache, policy.pinned)
    impact = ImpactPrefetch(work, forecasts, held, by, dense_s=1.0)
    hooks = Hooks(held, lambda tokens, there: hss(tokens, there, by), impact if ahead else None)
    return decide(work, policy, hooks, no_predictions(work).known_at(3))


def slots(n: int) -> OffloadPolicy:
    return OffloadPolicy(slots=np.full(LAYERS, n))


# --- when a schedule ends -----------------------------------------------------------------------


def test_a_moved_expert_waits_for_the_link_and_the_cpu_starts_once() -> None:
    by = UnitTimes([0.0, 1.0, 2.0], [0.0, 3.0, 4.0], 0.5, 5.0)
    busy = busy_seconds([1, 2, 1, 1], [True, False, False, False], [0, LOADED, ON_CPU, ON_CPU], by)
    assert (busy.gpu_s, busy.cpu_s, busy.moved_s) == (5.0 + 2.0, 0.5 + 3.0 + 3.0, 5.0)
    assert busy.makespan_s == 7.0


# --- what is held -------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(TOP_K, EXPERTS))
def test_watching_a_cache_changes_nothing_and_sees_all(seed: int, n: int) -> None:
    work, policy = decode_work(seed), slots(n)
    seen: list[bool] = []

    class Listening(Watched):
        def use(self, expert: int, now: int) -> None:
            super().use(expert, now)
            seen.append(self.was_there(expert))

    held = Listening(Lru())
    hooks = hooks_for(work, policy)
    watched = decide(work, policy, Hooks(held, hooks.dispatch))
    plain = decide(work, policy, hooks)
    assert (watched.was_there == plain.was_there).all()
    assert (watched.loads.object == plain.loads.object).all()
    assert seen == plain.was_there.tolist()
    assert sum(held.holds(expert) for expert in range(work.n_objects)) <= n * LAYERS


def test_pinned_and_warm_copies_are_held() -> None:
    work = decode_work(0, 1)
    pinned = np.zeros(work.n_objects, np.bool_)
    pinned[:2] = True
    warm = np.zeros(work.n_objects, np.bool_)
    warm[2:4] = True
    policy = OffloadPolicy(slots=np.full(LAYERS, 4), pinned=pinned, warm=warm, on_miss="cpu")
    held = Watched(Lru(), pinned)
    decide(work, policy, Hooks(held, hooks_for(work, policy).dispatch))
    assert [held.holds(expert) for expert in range(5)] == [True] * 4 + [False]


# --- forecasts ----------------------------------------------------------------------------------


def test_a_forecast_has_true_token_copies_and_one_for_what_is_named_wrongly() -> None:
    trace = zipf_trace(8, 2, 6, 2, 0.5, seed=3)
    passes = forward_passes(trace, batch_size=4, phase="decode")
    work = layer_steps(trace, passes)
    every = np.tile(np.arange(6, dtype=np.int32), work.n_steps)
    start = np.arange(work.n_steps + 1, dtype=np.int64) * 6
    found = forecast(work, Predictions(start, every)).tokens.reshape(work.n_steps, 6)
    for step in range(work.n_steps):
        cells = slice(work.start[step], work.start[step + 1])
        expected = np.ones(6, np.int32)
        expected[work.expert[cells]] = work.tokens[cells]
        assert (found[step] == expected).all()


def test_a_forecast_of_another_length_is_refused() -> None:
    work = decode_work(0, 2)
    with pytest.raises(SimulationError, match="one of each"):
        Forecast(oracle(work, 1.0), np.ones(1, np.int32))


# --- impact -------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10), st.floats(0.05, 2.0))
def test_the_first_copy_wanted_saves_most_and_no_more_are_wanted_than_fit(
    seed: int, n_held: int, load: float
) -> None:
    work, by = decode_work(seed, 4), times(load=load)
    held = Watched(Lru())
    rng = np.random.default_rng(seed)
    for expert in rng.permutation(work.n_objects)[: n_held * LAYERS].tolist():
        held.insert(expert, -1, True)
    forecasts = [forecast(work, oracle(work, 0.7, seed=seed).known_at(d)) for d in (1, 2, 3)]
    impact = ImpactPrefetch(work, forecasts, held, by)
    for now in range(work.n_steps):
        objects = work.objects()[work.start[now] : work.start[now + 1]].tolist()
        for expert in objects:
            held.use(expert, now)
        wanted = impact.wanted(now, now % LAYERS, objects)
        assert len(wanted) <= impact.free_copies(now, objects)
        assert len(set(wanted)) == len(wanted)
        assert not any(held.holds(expert) for expert in wanted)
        savings = _savings(work, forecasts, held, by, now)
        if wanted:
            assert savings[wanted[0]] == pytest.approx(max(savings.values()))
        elif impact.free_copies(now, objects):
            assert max(savings.values(), default=0.0) <= 1e-12


def _savings(
    work: LayerSteps, forecasts: list[Forecast], held: Watched, by: UnitTimes, now: int
) -> dict[int, float]:
    """By how much one more copy shortens its layer, for every absent expert of the forecasts."""
    found: dict[int, float] = {}
    for of in forecasts:
        target = now + of.named.distance
        if target >= work.n_steps:
            continue
        cells = slice(of.named.start[target], of.named.start[target + 1])
        objects = of.named.expert[cells] + target % LAYERS * EXPERTS
        tokens, there = of.tokens[cells].tolist(), [held.holds(int(e)) for e in objects]
        before = busy_seconds(tokens, there, hss(tokens, there, by), by).makespan_s
        for cell, expert in enumerate(objects.tolist()):
            if not there[cell]:
                more = [*there[:cell], True, *there[cell + 1 :]]
                after = busy_seconds(tokens, more, hss(tokens, more, by), by).makespan_s
                found[expert] = max(found.get(expert, -np.inf), before - after)
    return found


def test_the_layer_that_misses_most_is_served_first() -> None:
    # Two tokens' worth of layers: the next layer misses one expert, the one after misses three.
    work, by = decode_work(1, 2), times(gpu=0.1, load=0.4)
    held = Watched(Lru())
    objects = work.objects()
    first, second = (objects[work.start[s] : work.start[s + 1]].tolist() for s in (1, 2))
    for expert in first[:2]:
        held.insert(expert, -1, True)
    forecasts = [forecast(work, oracle(work, 1.0).known_at(d)) for d in (1, 2)]
    impact = ImpactPrefetch(work, forecasts, held, by, dense_s=0.5)
    running = objects[: work.start[1]].tolist()
    for expert in running:
        held.use(expert, 0)
    assert impact.wanted(0, 0, running)[0] in second


def test_nothing_is_wanted_while_the_link_is_busy_or_all_is_there() -> None:
    work = decode_work(2, 3)
    forecasts = [forecast(work, oracle(work, 1.0))]
    running = work.objects()[: work.start[1]].tolist()
    for all_there, by in ((False, times(load=100.0)), (True, times())):
        held = Watched(Lru())
        for expert in range(work.n_objects if all_there else 0):
            held.insert(expert, -1, True)
        for expert in running:
            held.use(expert, 0)
        assert ImpactPrefetch(work, forecasts, held, by).wanted(0, 0, running) == []


def test_in_the_plain_loop_good_forecasts_raise_hits_and_shorten_layers() -> None:
    work, policy, by = decode_work(5, 200), slots(6), times(gpu=0.1, load=0.35)
    without = hybrid(work, policy, by, ahead=False)
    ahead = hybrid(work, policy, by, ahead=True)
    assert ahead.hit_rate > without.hit_rate + 0.05
    assert (ahead.loads.kind == PREFETCH).any()
    ends = [_schedules(work, one, by) for one in (ahead, without)]
    assert ends[0] < ends[1]


def _schedules(work: LayerSteps, decided: Decisions, by: UnitTimes) -> float:
    """Time of all layers' experts, prefetch hidden."""
    total = 0.0
    for step in range(work.n_steps):
        cells = slice(work.start[step], work.start[step + 1])
        tokens, there = work.tokens[cells].tolist(), decided.was_there[cells].tolist()
        total += busy_seconds(tokens, there, decided.place[cells].tolist(), by).makespan_s
    return total


def test_what_is_fetched_three_layers_ahead_is_there_when_its_layer_runs() -> None:
    work, by = decode_work(7, 100), times(gpu=0.1, load=0.2)
    decided = hybrid(work, slots(8), by, ahead=True)
    fetched = decided.loads.kind == PREFETCH
    n_used = fetched.sum() - decided.wasted
    assert fetched.sum() > 50
    assert n_used / fetched.sum() > 0.9
    step = np.repeat(np.arange(work.n_steps), np.diff(work.start))
    waits = decided.load[(decided.place == RESIDENT) & (decided.load >= 0)]
    used_at = step[(decided.place == RESIDENT) & (decided.load >= 0)]
    assert (decided.loads.step[waits] < used_at).all()
