"""The loop of an offloading runtime, in plain Python: read `decide`, top to bottom.

At every layer-step: the gate names the experts; each is looked up; what is missing is dispatched
(loaded, computed on the CPU, left out); loads take slots, from victims the running layer does not
need; then experts of a later layer are fetched ahead while slots can be had. A policy is asked one
question at a time (`moesim/policies/`) and never sees the future unless its name says so.

This is where a policy of one's own runs. Built-in policies run the same rules compiled
(`decide_kernel.py`), and a property test holds the two equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.offload.decisions import (
    DEMAND,
    HIGH,
    LOADED,
    LOW,
    NO_LOAD,
    NO_VICTIM,
    PREFETCH,
    RESIDENT,
    Decisions,
    Loads,
)
from moesim.offload.policy import OffloadPolicy
from moesim.policies.cache import CachePolicy
from moesim.policies.prefetch import Predictions, Prefetcher, no_predictions
from traces.layer_steps import LayerSteps

Dispatch = Callable[[Sequence[int], Sequence[bool]], Sequence[int]]
"""Token copies of a layer-step's experts and which are there -> place of each."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The parts of a policy that are code: which copy leaves, where misses go, what comes ahead."""

    cache: CachePolicy
    dispatch: Dispatch
    prefetcher: Prefetcher | None = None


@dataclass(slots=True)
class _Fast:
    """The fast tier: who holds a slot of which group, at which precision, and what is coming."""

    policy: OffloadPolicy
    group_of: list[int]
    slots: list[int]
    used: list[int]
    resident: list[dict[int, int]]
    pinned: list[bool]
    wanted_until: dict[int, int] = field(default_factory=dict)
    arriving: dict[int, int] = field(default_factory=dict)
    untouched: set[int] = field(default_factory=set)

    def level(self, expert: int) -> int:
        """Precision of the copy in the fast tier, 0 for none."""
        if self.pinned[expert]:
            return HIGH
        return self.resident[self.group_of[expert]].get(expert, 0)

    def units(self, level: int) -> int:
        """Size of a copy, 0 for none."""
        return {HIGH: self.policy.units_high, LOW: self.policy.units_low}.get(level, 0)

    def to_load(self, expert: int, level: int) -> int:
        """Size of what must be moved to have a copy of that precision."""
        had = self.units(self.level(expert)) if self.policy.nested else 0
        return self.units(level) - had


@dataclass(slots=True)
class _Log:
    """What has been decided so far."""

    place: list[int] = field(default_factory=list)
    was_there: list[bool] = field(default_factory=list)
    level: list[int] = field(default_factory=list)
    load: list[int] = field(default_factory=list)
    loads: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    left: int = NO_VICTIM  # the last copy thrown out for the load being decided
    evictions: int = 0
    refused: int = 0
    wasted: int = 0

    def issue(self, expert: int, step: int, kind: int, units: int) -> int:
        """A load's index."""
        self.loads.append((expert, step, kind, units, self.left))
        return len(self.loads) - 1


def decide(
    work: LayerSteps, policy: OffloadPolicy, hooks: Hooks, predicted: Predictions | None = None
) -> Decisions:
    """Run the loop over all layer-steps; policy gives slots, pins and the budget of prefetches.

    raises  SimulationError when the slots do not fit the model or one token's experts
    """
    policy.check(work.n_layers, work.n_experts, work.top_k)
    fast, log = _at_start(work, policy, hooks.cache), _Log()
    ahead = predicted or no_predictions(work)
    needed = needed_level(work, policy).tolist()
    start, objects, tokens = work.start.tolist(), work.objects().tolist(), work.tokens.tolist()
    for step in range(work.n_steps):
        cells = slice(start[step], start[step + 1])
        asked = objects[cells]
        there = [
            fast.level(expert) >= need for expert, need in zip(asked, needed[cells], strict=True)
        ]
        for expert in asked:
            hooks.cache.use(expert, step)
        places = hooks.dispatch(tokens[cells], there)
        log.was_there += there
        for expert, need, place in zip(asked, needed[cells], places, strict=True):
            _serve(fast, log, hooks.cache, (step, asked), (expert, need, place))
        wanted = _wanted(work, hooks, ahead, step, asked)
        _fetch_ahead(fast, log, hooks.cache, (step, step + ahead.distance, asked), wanted)
    return _decisions(log)


def _serve(
    fast: _Fast,
    log: _Log,
    cache: CachePolicy,
    at: tuple[int, list[int]],
    cell: tuple[int, int, int],
) -> None:
    """One expert of the layer-step: where it is computed, after which load, at which precision."""
    step, asked = at
    expert, need, place = cell
    waits_for = NO_LOAD
    fast.untouched.discard(expert)
    if place == LOADED:
        units = fast.to_load(expert, need)
        _take_slot(fast, log, cache, (expert, need), (step, asked, False))
        waits_for = log.issue(expert, step, DEMAND, units)
        log.level.append(need)
    else:
        if place == RESIDENT:
            waits_for = fast.arriving.pop(expert, NO_LOAD)
        log.level.append(fast.level(expert) if place == RESIDENT else HIGH)
    log.place.append(place)
    log.load.append(waits_for)


def _fetch_ahead(
    fast: _Fast,
    log: _Log,
    cache: CachePolicy,
    at: tuple[int, int, list[int]],
    wanted: Sequence[int],
) -> None:
    """Fetch what is expected and not there, best first, up to the budget."""
    step, target, asked = at
    for expert in wanted:
        fast.wanted_until[expert] = target
    issued = 0
    for expert in wanted:
        if issued == fast.policy.budget:
            break
        if fast.level(expert):
            continue
        units = fast.to_load(expert, HIGH)
        if not _take_slot(fast, log, cache, (expert, HIGH), (step, asked, True)):
            log.refused += 1
            continue
        fast.arriving[expert] = log.issue(expert, step, PREFETCH, units)
        fast.untouched.add(expert)
        issued += 1


def _take_slot(
    fast: _Fast,
    log: _Log,
    cache: CachePolicy,
    copy: tuple[int, int],
    at: tuple[int, list[int], bool],
) -> bool:
    """Room for a copy of an expert; False when every other copy is needed sooner.

    A load by demand then passes through without a slot. It may push out what is wanted later (only
    if nothing else is left, with `keep_expected`), a load ahead may not.
    """
    expert, level = copy
    step, asked, ahead = at
    log.left = NO_VICTIM
    group = fast.group_of[expert]
    resident = fast.resident[group]
    more = fast.units(level) - fast.units(resident.get(expert, 0))
    busy = set(asked)
    while fast.used[group] + more > fast.slots[group]:
        free_to_go = [other for other in sorted(resident) if other not in busy]
        idle = [other for other in free_to_go if fast.wanted_until.get(other, -1) < step]
        spared = ahead or (fast.policy.keep_expected and idle)
        candidates = idle if spared else free_to_go
        if not candidates:
            return False
        _evict(fast, log, cache, cache.victim(candidates, expert, step))
    if expert not in resident:
        cache.insert(expert, step, ahead)
    resident[expert] = level
    fast.used[group] += more
    return True


def _evict(fast: _Fast, log: _Log, cache: CachePolicy, victim: int) -> None:
    group = fast.group_of[victim]
    fast.used[group] -= fast.units(fast.resident[group].pop(victim))
    fast.arriving.pop(victim, None)
    cache.evict(victim)
    log.left = victim
    log.evictions += 1
    if victim in fast.untouched:
        fast.untouched.discard(victim)
        log.wasted += 1


def _wanted(
    work: LayerSteps, hooks: Hooks, ahead: Predictions, step: int, asked: list[int]
) -> Sequence[int]:
    """Objects to fetch at this gate, best first, from the prefetcher or the predictions."""
    if hooks.prefetcher is not None:
        return hooks.prefetcher.wanted(step, step % work.n_layers, asked)
    target = step + ahead.distance
    if target >= work.n_steps:
        return ()
    cells = slice(int(ahead.start[target]), int(ahead.start[target + 1]))
    first = target % work.n_layers * work.n_experts
    return [first + expert for expert in ahead.expert[cells].tolist()]


def needed_level(work: LayerSteps, policy: OffloadPolicy) -> npt.NDArray[np.int8]:
    """int8[cells]: precision each expert is asked for, LOW or HIGH.

    HIGH, unless misses load low-bit copies, or better experts of the layer-step hold `high_share`
    of its gate weight already.
    raises  SimulationError when that needs gate weights and the trace has none
    """
    if policy.on_miss == "load_low":
        return np.full(len(work.expert), LOW, np.int8)
    if policy.high_share >= 1 or not len(work.expert):
        return np.full(len(work.expert), HIGH, np.int8)
    gate = gate_weights(work, "a share of the gate weight at full precision").astype(np.float64)
    step = np.repeat(np.arange(work.n_steps), np.diff(work.start))
    order = np.lexsort((-gate, step))
    total = np.add.reduceat(gate, work.start[:-1])
    before = np.cumsum(gate[order]) - gate[order]
    before -= np.repeat(np.append(0.0, np.cumsum(total)[:-1]), np.diff(work.start))
    level = np.full(len(gate), HIGH, np.int8)
    level[order[before >= policy.high_share * total[step[order]]]] = LOW
    return level


def gate_weights(work: LayerSteps, purpose: str) -> npt.NDArray[np.float32]:
    """float32[cells]: gate weight of each expert per token; SimulationError when not captured."""
    if work.gate is None:
        raise SimulationError(
            f"{purpose} needs gate weights, but the trace holds expert ids only (no weights);"
            " capture them, or choose another policy"
        )
    pass_tokens = np.repeat(work.passes.tokens, work.n_layers)
    per_cell = np.repeat(pass_tokens, np.diff(work.start))
    return np.asarray(work.gate / per_cell, dtype=np.float32)


def _at_start(work: LayerSteps, policy: OffloadPolicy, cache: CachePolicy) -> _Fast:
    slots = policy.capacity(work.n_layers).tolist()
    layer = np.arange(work.n_objects) // work.n_experts
    group_of = (layer if len(slots) > 1 else np.zeros_like(layer)).tolist()
    pinned = policy.pinned if policy.pinned is not None else np.zeros(work.n_objects, np.bool_)
    fast = _Fast(policy, group_of, slots, [0] * len(slots), [{} for _ in slots], pinned.tolist())
    warm = [] if policy.warm is None else np.flatnonzero(policy.warm).tolist()
    for expert in warm:
        cache.insert(expert, -1, True)
        fast.resident[group_of[expert]][expert] = HIGH
        fast.used[group_of[expert]] += policy.units_high
    return fast


def _decisions(log: _Log) -> Decisions:
    columns = np.array(log.loads, dtype=np.int64).reshape(-1, 5)
    return Decisions(
        place=np.array(log.place, np.int8),
        was_there=np.array(log.was_there, np.bool_),
        level=np.array(log.level, np.int8),
        load=np.array(log.load, np.int32),
        loads=Loads(
            columns[:, 0].astype(np.int32),
            columns[:, 1].copy(),
            columns[:, 2].astype(np.int8),
            columns[:, 3].astype(np.int32),
            columns[:, 4].astype(np.int32),
        ),
        evictions=log.evictions,
        refused=log.refused,
        wasted=log.wasted,
    )
