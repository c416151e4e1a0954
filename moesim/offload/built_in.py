"""Built-in policies by name: compiled (`decide_built_in`), or as hooks of the plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.offload import decide_kernel as kernel
from moesim.offload.decide import Hooks, gate_weights, needed_level
from moesim.offload.decisions import HIGH, LOADED, ON_CPU, RESIDENT, SKIPPED, Decisions, Loads
from moesim.offload.future import Future, next_steps
from moesim.offload.policy import CACHES, ON_MISS, OffloadPolicy
from moesim.policies.cache import Arc, Belady, CachePolicy, Fifo, Lfu, Lookahead, Lru, Mrs
from moesim.policies.dispatch import UnitTimes, by_threshold, hss
from moesim.policies.prefetch import Predictions, no_predictions
from traces.layer_steps import LayerSteps

_LOADS_AT_FIRST = 4096
_ORACLES = ("belady", "lookahead")


def decide_built_in(
    work: LayerSteps,
    policy: OffloadPolicy,
    times: UnitTimes | None = None,
    predicted: Predictions | None = None,
) -> Decisions:
    """The decisions of built-in policies, compiled; as `decide` with `hooks_for` gives them.

    times   estimates that `on_miss="hss"` decides from
    raises  SimulationError when the slots do not fit the model, or the trace has no gate weights
            where the policy needs them, or HSS has no estimates
    """
    policy.check(work.n_layers, work.n_experts, work.top_k)
    ahead = predicted or no_predictions(work)
    rules = _rules(work, policy, ahead)
    fast = _at_start(work, policy, rules)
    arrays, estimates = _arrays(work, policy, ahead), _times(policy, times)
    n_cells = len(work.expert)
    log = kernel.Log(
        place=np.empty(n_cells, np.int8),
        was_there=np.empty(n_cells, np.bool_),
        level=np.empty(n_cells, np.int8),
        load=np.empty(n_cells, np.int32),
        loads=np.empty(max(_LOADS_AT_FIRST, n_cells // 4), kernel.LOAD_RECORD),
    )
    scratch = np.empty(int(np.diff(work.start).max(initial=0)), np.int32)
    kernel.decide(arrays, rules, estimates, fast, log, scratch)
    while fast.tally[kernel.STEP] < work.n_steps:
        more = np.empty(len(log.loads) + _LOADS_AT_FIRST, kernel.LOAD_RECORD)
        log = log._replace(loads=np.concatenate([log.loads, more]))
        kernel.decide(arrays, rules, estimates, fast, log, scratch)
    return _decisions(log, fast.tally)


def hooks_for(work: LayerSteps, policy: OffloadPolicy, times: UnitTimes | None = None) -> Hooks:
    """The same policies as classes and functions, for the plain loop."""
    return Hooks(cache=_cache(work, policy), dispatch=_Places(policy, times))


@dataclass(frozen=True, slots=True)
class _Places:
    """Dispatch of a built-in name."""

    policy: OffloadPolicy
    times: UnitTimes | None

    def __call__(self, tokens: Sequence[int], there: Sequence[bool]) -> Sequence[int]:
        on_miss = self.policy.on_miss
        if on_miss == "hss":
            return hss(tokens, there, _require(self.times))
        if on_miss == "threshold":
            return by_threshold(tokens, there, self.policy.threshold_tokens)
        missing = {"cpu": ON_CPU, "skip": SKIPPED}.get(on_miss, LOADED)
        return [RESIDENT if here else missing for here in there]


def _cache(work: LayerSteps, policy: OffloadPolicy) -> CachePolicy:
    slots = policy.capacity(work.n_layers)
    layer = np.arange(work.n_objects) // work.n_experts
    group = (layer if len(slots) > 1 else np.zeros_like(layer)).tolist()
    if policy.cache == "mrs":
        return Mrs(work, gate_weights(work, "the cache mrs"), policy.score_decay)
    if policy.cache == "lookahead":
        return Lookahead(Future(work), policy.horizon * work.n_layers)
    if policy.cache == "belady":
        return Belady(Future(work))
    if policy.cache == "arc":
        return Arc(group, (slots // policy.units_high).tolist())
    simple: dict[str, Callable[[], CachePolicy]] = {"lru": Lru, "lfu": Lfu, "fifo": Fifo}
    return simple[policy.cache]()


def _require(times: UnitTimes | None) -> UnitTimes:
    if times is None:
        raise SimulationError('on_miss="hss" needs estimated times of GPU, CPU and load')
    return times


def _rules(work: LayerSteps, policy: OffloadPolicy, ahead: Predictions) -> kernel.Rules:
    return kernel.Rules(
        cache=CACHES.index(policy.cache),
        on_miss=ON_MISS.index(policy.on_miss),
        budget=policy.budget,
        distance=ahead.distance,
        window_steps=policy.horizon * work.n_layers,
        decay=policy.score_decay,
        threshold=policy.threshold_tokens,
        units_low=policy.units_low,
        units_high=policy.units_high,
        nested=policy.nested,
        n_layers=work.n_layers,
        n_experts=work.n_experts,
        per_layer=len(policy.capacity(work.n_layers)) > 1,
        keep_expected=policy.keep_expected,
    )


def _times(policy: OffloadPolicy, times: UnitTimes | None) -> kernel.Times:
    if policy.on_miss != "hss":
        return kernel.Times(np.zeros(1), np.zeros(1), 0.0, 0.0)
    known = _require(times)
    gpu_s, cpu_s = np.array(known.gpu_s, np.float64), np.array(known.cpu_s, np.float64)
    return kernel.Times(gpu_s, cpu_s, float(known.cpu_start_s), float(known.load_s))


def _arrays(work: LayerSteps, policy: OffloadPolicy, ahead: Predictions) -> kernel.Work:
    weight = np.zeros(0, np.float32)
    if policy.cache == "mrs":
        weight = gate_weights(work, "the cache mrs")
    after = np.zeros(0, np.int64)
    if policy.cache in _ORACLES:
        after, _ = next_steps(work.start, work.objects(), work.n_objects)
    return kernel.Work(
        work.start,
        work.expert,
        work.tokens,
        needed_level(work, policy),
        weight,
        after,
        ahead.start,
        ahead.expert,
    )


def _at_start(work: LayerSteps, policy: OffloadPolicy, rules: kernel.Rules) -> kernel.Fast:
    slots = policy.capacity(work.n_layers)
    objects = np.zeros(work.n_objects, kernel.OBJECT)
    for field in ("slot", "arriving", "wanted_until", "asked_at"):
        objects[field] = -1
    if policy.pinned is not None:
        objects["level"][policy.pinned] = HIGH
    if policy.cache in _ORACLES:
        objects["upcoming"] = next_steps(work.start, work.objects(), work.n_objects)[1]
    groups = np.zeros(len(slots), kernel.GROUP)
    groups["slots"] = slots
    smallest = policy.units_low or policy.units_high
    in_group = work.n_experts if len(slots) > 1 else work.n_objects
    width = min(int(slots.max(initial=0)) // smallest, in_group)
    fast = kernel.Fast(
        objects=objects,
        groups=groups,
        row=np.zeros((len(slots), max(1, width)), np.int32),
        in_list=np.zeros((len(slots), 5), np.int64),
        tally=np.zeros(kernel.N_TALLY, np.int64),
    )
    if policy.warm is not None:
        kernel.fill(rules, fast, np.flatnonzero(policy.warm))
    return fast


def _decisions(log: kernel.Log, tally: npt.NDArray[np.int64]) -> Decisions:
    loads = log.loads[: tally[kernel.LOADS]]
    return Decisions(
        place=log.place,
        was_there=log.was_there,
        level=log.level,
        load=log.load,
        loads=Loads(
            np.ascontiguousarray(loads["object"]),
            np.ascontiguousarray(loads["step"]),
            np.ascontiguousarray(loads["kind"]),
            np.ascontiguousarray(loads["units"]),
            np.ascontiguousarray(loads["victim"]),
        ),
        evictions=int(tally[kernel.EVICTIONS]),
        refused=int(tally[kernel.REFUSED]),
        wasted=int(tally[kernel.WASTED]),
    )
