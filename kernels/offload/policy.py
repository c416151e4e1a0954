"""What is read when, and into which slot: one small class a policy.

All is decided in the order of the program and from what has been asked so far, never from how
long anything took: the same routing gives the same hits and the same reads on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from moesim_kernels.errors import KernelError
from moesim_kernels.offload.cache import LruSlots
from moesim_kernels.offload.stack import StackSpec

Ids = npt.NDArray[np.int64]


class Read(NamedTuple):
    """An expert to bring into a slot."""

    layer: int
    expert: int
    slot: int


class Decision(NamedTuple):
    """What a layer does for one token.

    slots   of the chosen experts, in the order in which the router named them
    order   positions in `slots` as they are computed: experts found resident or on their way
            first, then those to be read
    demand  reads to do now; ahead, reads for the next layer
    """

    slots: list[int]
    order: list[int]
    demand: list[Read]
    ahead: list[Read]


class Policy(Protocol):
    """Decides for one layer after another, one token after another.

    n_slots     slots in all
    background  whether reads run beside the computation
    """

    n_slots: int
    background: bool

    def decide(self, layer: int, chosen: Sequence[int], predicted: Sequence[int]) -> Decision:
        """What to do for the experts chosen in a layer; predicted, those expected in the next."""

    def contents(self) -> list[Read]:
        """What should be in the slots now."""


class OnDemand:
    """Nothing is kept: each layer has slots for its chosen experts, read anew for every token."""

    background = False

    def __init__(self, spec: StackSpec) -> None:
        self.n_slots = spec.n_layers * spec.top_k

    def decide(self, layer: int, chosen: Sequence[int], predicted: Sequence[int]) -> Decision:
        """Read all, in the order of the router."""
        first = layer * len(chosen)
        reads = [Read(layer, expert, first + i) for i, expert in enumerate(chosen)]
        return Decision([read.slot for read in reads], list(range(len(chosen))), reads, [])

    def contents(self) -> list[Read]:
        """Nothing that would be used."""
        return []


class Static:
    """Pinned experts stay; the others are read each time, into k more slots of their layer."""

    background = False

    def __init__(self, spec: StackSpec, pinned: Ids) -> None:
        """pinned  int64[layers, slots], the experts that stay"""
        n_layers, n_pinned = pinned.shape
        self._slot = [
            {int(expert): layer * n_pinned + i for i, expert in enumerate(pinned[layer])}
            for layer in range(n_layers)
        ]
        self._unpinned = n_layers * n_pinned
        self.n_slots = self._unpinned + n_layers * spec.top_k

    def decide(self, layer: int, chosen: Sequence[int], predicted: Sequence[int]) -> Decision:
        """Read what is not pinned."""
        held, first = self._slot[layer], self._unpinned + layer * len(chosen)
        slots = [held.get(expert, first + i) for i, expert in enumerate(chosen)]
        missing = [i for i, expert in enumerate(chosen) if expert not in held]
        reads = [Read(layer, chosen[i], slots[i]) for i in missing]
        return Decision(slots, _found_first(len(chosen), missing), reads, [])

    def contents(self) -> list[Read]:
        """The pinned experts."""
        return [
            Read(layer, expert, slot)
            for layer, held in enumerate(self._slot)
            for expert, slot in held.items()
        ]


class Lru:
    """Each layer has its slots, and the expert longest unused leaves."""

    background = False

    def __init__(self, spec: StackSpec, slots: int) -> None:
        self._layers = [LruSlots(layer * slots, slots) for layer in range(spec.n_layers)]
        self.n_slots = spec.n_layers * slots

    def decide(self, layer: int, chosen: Sequence[int], predicted: Sequence[int]) -> Decision:
        """Read what is missing; no chosen expert leaves."""
        cache = self._layers[layer]
        missing = [i for i, expert in enumerate(chosen) if expert not in cache]
        reads = self.bring(layer, chosen)
        cache.touch(chosen)
        slots = [cache.slot(expert) for expert in chosen]
        return Decision(slots, _found_first(len(chosen), missing), reads, [])

    def bring(self, layer: int, experts: Sequence[int]) -> list[Read]:
        """Make experts of a layer resident; the reads this takes."""
        return [Read(layer, *placed) for placed in self._layers[layer].bring(experts)]

    def contents(self) -> list[Read]:
        """What is resident, layer by layer."""
        return [
            Read(layer, *placed)
            for layer, cache in enumerate(self._layers)
            for placed in cache.resident()
        ]


class LruPrefetch:
    """LRU; while a layer computes, the experts expected in the next are read into its slots.

    An expected expert that is resident already stays, but only use makes it recent.
    """

    background = True

    def __init__(self, spec: StackSpec, slots: int) -> None:
        self._lru = Lru(spec, slots)
        self._n_layers = spec.n_layers
        self.n_slots = self._lru.n_slots

    def decide(self, layer: int, chosen: Sequence[int], predicted: Sequence[int]) -> Decision:
        """Read what is missing, then what is expected in the next layer."""
        decision = self._lru.decide(layer, chosen, ())
        if layer + 1 == self._n_layers:
            return decision
        return decision._replace(ahead=self._lru.bring(layer + 1, predicted))

    def contents(self) -> list[Read]:
        """What is resident or on its way, layer by layer."""
        return self._lru.contents()


POLICIES = ("on_demand", "static", "lru", "lru_prefetch")


def policy_of(name: str, spec: StackSpec, slots: int, pinned: Ids) -> Policy:
    """A fresh policy by its name.

    slots   of each layer
    pinned  int64[layers, slots], used by `static`
    """
    if name not in POLICIES:
        raise KernelError(f"policy={name!r}, expected one of {', '.join(POLICIES)}")
    if name == "on_demand":
        return OnDemand(spec)
    if name == "static":
        return Static(spec, pinned)
    return Lru(spec, slots) if name == "lru" else LruPrefetch(spec, slots)


def most_frequent(topk: Ids, n_experts: int, slots: int) -> Ids:
    """The experts chosen most often in each layer, int64[layers, slots]; ties: the lowest id.

    topk  int64[tokens, layers, k]
    """
    n_layers = topk.shape[1]
    counts = [np.bincount(topk[:, layer].ravel(), minlength=n_experts) for layer in range(n_layers)]
    return np.argsort(-np.stack(counts), axis=1, kind="stable")[:, :slots]


def _found_first(n: int, missing: Sequence[int]) -> list[int]:
    return [i for i in range(n) if i not in missing] + list(missing)
