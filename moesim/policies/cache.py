"""Which copy leaves the fast tier: one small class a policy.

A cache holds objects (layer * n_experts + expert). The loop tells a policy what was used,
inserted and evicted, with `now`, the layer-step; when a slot is needed it asks for a victim among
candidates: resident objects of the group (a layer, or all) that the running layer does not need.
Candidates come in increasing order, and of equals the lowest object leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moesim.offload.future import NEVER_AGAIN, Future
from traces.layer_steps import LayerSteps


class CachePolicy(Protocol):
    """What the loop asks of a cache policy; a class of one's own needs these four methods."""

    def use(self, expert: int, now: int) -> None:
        """The gate asked for an expert at layer-step `now`, whether it was there or not."""

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """A copy takes a slot: ahead of any use, or for the use that was just told."""

    def evict(self, expert: int) -> None:
        """A copy has left its slot."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """The candidate that leaves for the incoming expert; asking twice changes nothing."""


class Lru:
    """Longest unused leaves; a copy fetched ahead counts as used when it is inserted."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._clock = 0

    def use(self, expert: int, now: int) -> None:
        """Newest of all."""
        self._clock += 1
        self._last[expert] = self._clock

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """Newest of all; a copy loaded by demand is as new as its use."""
        if ahead:
            self.use(expert, now)

    def evict(self, expert: int) -> None:
        """Nothing to forget: a new insertion sets the time anew."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Oldest use."""
        return min(candidates, key=self._last.__getitem__)


class Fifo:
    """Oldest insertion leaves; use changes nothing."""

    def __init__(self) -> None:
        self._since: dict[int, int] = {}
        self._clock = 0

    def use(self, expert: int, now: int) -> None:
        """Use changes nothing."""

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """Newest of all."""
        self._clock += 1
        self._since[expert] = self._clock

    def evict(self, expert: int) -> None:
        """Nothing to forget: a new insertion sets the time anew."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Oldest insertion."""
        return min(candidates, key=self._since.__getitem__)


class Lfu:
    """Least often used since it last left leaves, of those the longest unused."""

    def __init__(self) -> None:
        self._count: dict[int, int] = {}
        self._lru = Lru()

    def use(self, expert: int, now: int) -> None:
        """One use more."""
        self._lru.use(expert, now)
        self._count[expert] = self._count.get(expert, 0) + 1

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """A copy starts with the use it was loaded for, or none when fetched ahead."""
        self._lru.insert(expert, now, ahead)
        self._count.setdefault(expert, 0)

    def evict(self, expert: int) -> None:
        """The count is lost."""
        del self._count[expert]

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Fewest uses, then oldest use."""
        last = self._lru._last
        return min(candidates, key=lambda expert: (self._count[expert], last[expert]))


class Arc:
    """Adaptive replacement (Megiddo and Modha, FAST'03): recency and frequency, split by ghosts.

    Copies used once (T1) and more often (T2) of a group are two LRU lists whose wanted sizes move
    with hits in the memory of what left them (B1, B2). Groups are told by `group_of`.
    """

    def __init__(self, group_of: Sequence[int], slots: Sequence[int]) -> None:
        n_groups = len(slots)
        self._group = group_of
        self._slots = slots
        self._wanted_t1 = [0.0] * n_groups
        self._lists: list[list[dict[int, None]]] = [[{}, {}, {}, {}] for _ in range(n_groups)]

    def use(self, expert: int, now: int) -> None:
        """A resident copy moves to the fresh end of T2; a ghost moves the wanted size of T1."""
        group = self._group[expert]
        t1, t2, b1, b2 = self._lists[group]
        wanted = self._wanted_t1[group]
        if expert in t1 or expert in t2:
            t1.pop(expert, None)
            t2.pop(expert, None)
            t2[expert] = None
        elif expert in b1:
            grown = wanted + max(1.0, len(b2) / len(b1))
            self._wanted_t1[group] = min(float(self._slots[group]), grown)
        elif expert in b2:
            self._wanted_t1[group] = max(0.0, wanted - max(1.0, len(b1) / len(b2)))

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """Into T1, or into T2 when it left not long ago; ghosts are cut to their room."""
        group = self._group[expert]
        t1, t2, b1, b2 = self._lists[group]
        into = t2 if expert in b1 or expert in b2 else t1
        b1.pop(expert, None)
        b2.pop(expert, None)
        into[expert] = None
        slots = self._slots[group]
        while b1 and len(t1) + len(b1) > slots:
            b1.pop(next(iter(b1)))
        while b2 and len(t1) + len(t2) + len(b1) + len(b2) > 2 * slots:
            b2.pop(next(iter(b2)))

    def evict(self, expert: int) -> None:
        """The list's ghost remembers it."""
        t1, t2, b1, b2 = self._lists[self._group[expert]]
        left, ghost = (t1, b1) if expert in t1 else (t2, b2)
        left.pop(expert, None)
        ghost[expert] = None

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Oldest of T1 while T1 is longer than wanted, else oldest of T2."""
        group = self._group[incoming]
        t1, t2, _, b2 = self._lists[group]
        wanted = self._wanted_t1[group]
        from_t1 = len(t1) > wanted or (incoming in b2 and len(t1) == wanted and len(t1) > 0)
        first, second = (t1, t2) if from_t1 else (t2, t1)
        allowed = set(candidates)
        return next(expert for part in (first, second) for expert in part if expert in allowed)


class Mrs:
    """Minus recent score (HybriMoE, arXiv 2504.05897): lowest running mean of gate weight leaves.

    S <- decay * s + (1 - decay) * S of the whole layer at each of its steps, where s is the gate
    weight per token of the chosen experts and 0 for all others.
    """

    def __init__(
        self, work: LayerSteps, weight: npt.NDArray[np.float32], decay: float = 0.5
    ) -> None:
        self._score = np.zeros((work.n_layers, work.n_experts))
        self._work, self._weight, self._decay = work, weight, decay
        self._heard = -1

    def use(self, expert: int, now: int) -> None:
        """At the first expert of a layer-step the gate weights of all of them are heard."""
        if now == self._heard:
            return
        self._heard = now
        cells = slice(int(self._work.start[now]), int(self._work.start[now + 1]))
        row = self._score[now % self._work.n_layers]
        row *= 1.0 - self._decay
        row[self._work.expert[cells]] += self._decay * self._weight[cells].astype(np.float64)

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """A copy keeps the score it had."""

    def evict(self, expert: int) -> None:
        """Scores are kept for absent experts too."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Lowest score."""
        scores = self._score.reshape(-1)
        return min(candidates, key=lambda expert: scores[expert])


class Belady:
    """Oracle: the copy whose next use lies farthest ahead leaves."""

    def __init__(self, future: Future) -> None:
        self._future = future

    def use(self, expert: int, now: int) -> None:
        """Use changes nothing."""

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """Insertion changes nothing."""

    def evict(self, expert: int) -> None:
        """Nothing to forget."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Farthest next use."""
        return max(candidates, key=lambda expert: (self._future.next_use(expert, now), -expert))


class Lookahead:
    """Oracle over a window: as Belady inside it, and least recently used beyond it."""

    def __init__(self, future: Future, window_steps: int) -> None:
        self._future = future
        self._window = window_steps
        self._lru = Lru()

    def use(self, expert: int, now: int) -> None:
        """As LRU."""
        self._lru.use(expert, now)

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """As LRU."""
        self._lru.insert(expert, now, ahead)

    def evict(self, expert: int) -> None:
        """Nothing to forget."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Longest unused of those not needed inside the window, else farthest next use."""
        ahead = {expert: self._future.next_use(expert, now) for expert in candidates}
        beyond = [e for e in candidates if ahead[e] - now > self._window or ahead[e] == NEVER_AGAIN]
        if beyond:
            return self._lru.victim(beyond, incoming, now)
        return max(candidates, key=lambda expert: (ahead[expert], -expert))
