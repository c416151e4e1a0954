"""Impact-driven prefetch (HybriMoE, arXiv 2504.05897): fetch what shortens coming schedules most.

The gates of the next layers are applied early; what they name is a forecast. For every expert of
it that is not there, the layer's hybrid schedule is made once more as if it were: the time that
this saves is its impact. While the link has time left in the running layer, the copy of highest
impact is fetched. For the plain loop (`moesim/offload/decide.py`):

    held = Watched(Mrs(...))
    ahead = ImpactPrefetch(work, forecasts, held, times)
    decide(work, policy, Hooks(held, dispatch, ahead), no_predictions(work).known_at(3))

where the distance given last keeps what is fetched in its slot until its layer has run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.offload.decisions import LOADED, ON_CPU
from moesim.policies.cache import CachePolicy
from moesim.policies.dispatch import UnitTimes, hss
from moesim.policies.prefetch import Predictions
from traces.layer_steps import LayerSteps

_MOST_KEPT = 4096
Scheduler = Callable[[Sequence[int], Sequence[bool], UnitTimes], Sequence[int]]
"""Token copies, which experts are there, times -> place of each."""


@dataclass(frozen=True, slots=True)
class Busy:
    """When GPU, CPU and link are done with a layer's experts, in the unit of the times."""

    gpu_s: float
    cpu_s: float
    moved_s: float

    @property
    def makespan_s(self) -> float:
        """When the last expert is computed."""
        return max(self.gpu_s, self.cpu_s)


def busy_seconds(
    tokens: Sequence[int], there: Sequence[bool], place: Sequence[int], times: UnitTimes
) -> Busy:
    """How long a schedule keeps the GPU, the CPU and the link.

    The GPU computes experts that are there, then moved ones as they arrive, both by falling
    tokens; the link moves in that order without a pause; the CPU starts once.
    """
    gpu_s = cpu_s = moved_s = 0.0
    for cell in sorted(range(len(tokens)), key=lambda cell: (not there[cell], -tokens[cell], cell)):
        if place[cell] == ON_CPU:
            cpu_s += times.cpu_s[tokens[cell]] + (times.cpu_start_s if cpu_s == 0.0 else 0.0)
            continue
        if place[cell] == LOADED:
            moved_s += times.load_s
            gpu_s = max(gpu_s, moved_s)
        gpu_s += times.gpu_s[tokens[cell]]
    return Busy(gpu_s, cpu_s, moved_s)


class Watched:
    """A cache policy that remembers which copies it holds, for a prefetcher beside it."""

    def __init__(self, cache: CachePolicy, pinned: npt.NDArray[np.bool_] | None = None) -> None:
        """`pinned` copies, bool[n_objects], are always held, though the cache is not told."""
        self._cache = cache
        self._held = set() if pinned is None else set(np.flatnonzero(pinned).tolist())
        self._asked_at = -1
        self._at_gate: dict[int, bool] = {}

    def holds(self, expert: int) -> bool:
        """Whether a copy is in the fast tier, or on its way there."""
        return expert in self._held

    def was_there(self, expert: int) -> bool:
        """Whether a copy was there when the running layer's gate asked for it."""
        return self._at_gate[expert]

    def use(self, expert: int, now: int) -> None:
        """Remembers whether the copy is there, before a load can bring it."""
        if now != self._asked_at:
            self._asked_at = now
            self._at_gate.clear()
        self._at_gate[expert] = expert in self._held
        self._cache.use(expert, now)

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """One copy more."""
        self._held.add(expert)
        self._cache.insert(expert, now, ahead)

    def evict(self, expert: int) -> None:
        """One copy less."""
        self._held.discard(expert)
        self._cache.evict(expert)

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """As the cache says."""
        return self._cache.victim(candidates, incoming, now)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Experts expected at every layer-step, known `named.distance` layer-steps before it.

    tokens  int32[predicted], token copies expected for each of them, >= 1
    """

    named: Predictions
    tokens: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.tokens.shape != self.named.expert.shape:
            raise SimulationError(
                f"forecast: tokens {self.tokens.shape} for {self.named.expert.shape} names,"
                " expected one of each"
            )


def forecast(work: LayerSteps, named: Predictions) -> Forecast:
    """Names with the token copies that the layer-step will have, 1 for experts named wrongly."""
    step = np.repeat(np.arange(work.n_steps), np.diff(work.start))
    named_step = np.repeat(np.arange(work.n_steps), np.diff(named.start))
    true = step * work.n_experts + work.expert
    order = np.argsort(true)
    wanted = named_step * work.n_experts + named.expert
    at = np.minimum(np.searchsorted(true[order], wanted), max(0, len(true) - 1))
    right = true[order][at] == wanted if len(true) else np.zeros(len(wanted), np.bool_)
    tokens = np.ones(len(wanted), np.int32)
    tokens[right] = work.tokens[order][at][right]
    return Forecast(named, tokens)


@dataclass(slots=True)
class _Coming:
    """One of the next layers, with what is expected there and what would be there by then."""

    objects: list[int]
    tokens: list[int]
    there: list[bool]


class ImpactPrefetch:
    """What to fetch at a gate, by how much sooner the next layers would end with it."""

    def __init__(
        self,
        work: LayerSteps,
        forecasts: Sequence[Forecast],
        held: Watched,
        times: UnitTimes,
        dense_s: float = 0.0,
        scheduler: Scheduler = hss,
    ) -> None:
        """`forecasts` of the next layers, one a distance; `dense_s` between one layer's experts
        and the next one's gate, in which the link is free too."""
        self._work, self._forecasts, self._held = work, forecasts, held
        self._times, self._dense_s, self._scheduler = times, dense_s, scheduler
        self._scheduled: dict[tuple[tuple[int, ...], tuple[bool, ...]], Busy] = {}

    def wanted(self, now: int, layer: int, objects: Sequence[int]) -> list[int]:
        """As many copies as the link has time for, highest impact first."""
        free = self.free_copies(now, objects)
        coming = self._coming(now) if free else []
        best = [self._best(one) for one in coming]
        found: list[int] = []
        while best and len(found) < free:
            nearest = max(range(len(best)), key=lambda i: (best[i][0], -i))
            gain, cell = best[nearest]
            if gain <= 0.0:
                break
            found.append(coming[nearest].objects[cell])
            coming[nearest].there[cell] = True
            best[nearest] = self._best(coming[nearest])
        return found

    def free_copies(self, now: int, objects: Sequence[int]) -> int:
        """Copies the link has time for before the next gate, behind those of the running layer."""
        cells = slice(int(self._work.start[now]), int(self._work.start[now + 1]))
        tokens = self._work.tokens[cells].tolist()
        there = [self._held.was_there(expert) for expert in objects]
        busy = self.schedule(tokens, there)
        return int(max(0.0, self._dense_s + busy.makespan_s - busy.moved_s) / self._times.load_s)

    def schedule(self, tokens: Sequence[int], there: Sequence[bool]) -> Busy:
        """A layer's experts scheduled as they would be; in decode the same few come back."""
        asked = (tuple(tokens), tuple(there))
        found = self._scheduled.get(asked)
        if found is None:
            place = self._scheduler(tokens, there, self._times)
            found = busy_seconds(tokens, there, place, self._times)
            if len(self._scheduled) == _MOST_KEPT:
                self._scheduled.clear()
            self._scheduled[asked] = found
        return found

    def _coming(self, now: int) -> list[_Coming]:
        """The next layers of the forecasts, those beyond the trace's end left out."""
        found = []
        for of in self._forecasts:
            target = now + of.named.distance
            if target >= self._work.n_steps:
                continue
            cells = slice(int(of.named.start[target]), int(of.named.start[target + 1]))
            first = target % self._work.n_layers * self._work.n_experts
            objects = [first + expert for expert in of.named.expert[cells].tolist()]
            there = [self._held.holds(expert) for expert in objects]
            found.append(_Coming(objects, of.tokens[cells].tolist(), there))
        return found

    def _best(self, layer: _Coming) -> tuple[float, int]:
        """Largest impact of one more copy, and its cell; 0 and -1 when none shortens the layer.

        Absent experts of equal tokens have equal impact: the one named first stands for them.
        """
        tried: set[int] = set()
        before_s = self.schedule(layer.tokens, layer.there).makespan_s if layer.objects else 0.0
        best = (0.0, -1)
        for cell, n in enumerate(layer.tokens):
            if layer.there[cell] or n in tried:
                continue
            tried.add(n)
            there = [*layer.there]
            there[cell] = True
            gain = before_s - self.schedule(layer.tokens, there).makespan_s
            if gain > best[0]:
                best = (gain, cell)
        return best
