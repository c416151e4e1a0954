"""OffloadPolicy: the built-in policies by name, their parameters, and what they may use.

Names are checked here, once. What each name means is the small class of that name in
`moesim/policies/`; `decide_kernel.py` has the same rules compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError

CACHES = ("lru", "lfu", "fifo", "arc", "mrs", "belady", "lookahead")
ON_MISS = ("load", "load_low", "cpu", "threshold", "hss", "skip")
Scope = Literal["per_layer", "global"]


@dataclass(frozen=True, slots=True)
class OffloadPolicy:
    """Which experts stay in the fast tier, what happens to the others, what is fetched ahead.

    cache        one of CACHES: which copy leaves
    slots        slots of every layer int64[n_layers], or int64[1] for one cache over all layers;
                 counted in units (`units_high` for a full copy, `units_low` for a low-bit one)
    pinned       bool[n_objects], always in the fast tier, outside the slots; None for none
    warm         bool[n_objects], in the slots at the start, free to be evicted; None for none
    on_miss      one of ON_MISS: load it; load the low-bit copy; compute it on the CPU; compute it
                 on the CPU below `threshold_tokens` (Fiddler); split the layer between CPU and GPU
                 so that it ends soonest (HSS, HybriMoE); leave it out
    budget       prefetches issued at most at one layer-step
    horizon      tokens the `lookahead` cache sees ahead
    score_decay  share of the newest score in MRS
    units_high, units_low  size of a copy; units_low is 0 when there are no low-bit ones
    high_share   below 1, an expert is served by a low-bit copy once better ones of its layer-step
                 hold this share of the gate weight
    nested       an upgrade from low to high loads only the difference
    keep_expected  a load by demand throws out what is expected later only where nothing else is
                 left; False: it takes whichever copy the cache names
    """

    cache: str = "lru"
    slots: npt.NDArray[np.int64] | None = None
    pinned: npt.NDArray[np.bool_] | None = None
    warm: npt.NDArray[np.bool_] | None = None
    on_miss: str = "load"
    threshold_tokens: float = 10.0
    budget: int = 1 << 30
    horizon: int = 16
    score_decay: float = 0.5
    units_high: int = 1
    units_low: int = 0
    high_share: float = 1.0
    nested: bool = False
    keep_expected: bool = True

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise SimulationError(f"cache {self.cache!r} is unknown, known: {', '.join(CACHES)}")
        if self.on_miss not in ON_MISS:
            raise SimulationError(f"on_miss {self.on_miss!r}: known are {', '.join(ON_MISS)}")
        if self.slots is not None and (self.slots < 0).any():
            raise SimulationError(f"slots={self.slots.min()}, expected 0 or more")
        if not 0 < self.score_decay <= 1 or self.budget < 0 or self.horizon < 1:
            raise SimulationError(
                f"score_decay={self.score_decay} must be in (0, 1], budget={self.budget} >= 0 and"
                f" horizon={self.horizon} >= 1"
            )
        if (self.on_miss == "load_low" or self.high_share < 1) and not self.units_low:
            raise SimulationError("units_low=0: low-bit copies need a size; give their bits")
        if not 0 <= self.units_low < self.units_high:
            raise SimulationError(
                f"units_low={self.units_low} must be in 0..units_high - 1 = {self.units_high - 1}"
            )

    def check(self, n_layers: int, n_experts: int, top_k: int) -> None:
        """SimulationError when slots do not fit the model, or cannot hold one token's experts."""
        slots, n_objects = self.capacity(n_layers), n_layers * n_experts
        for name, marked in (("pinned", self.pinned), ("warm", self.warm)):
            if marked is not None and marked.shape != (n_objects,):
                raise SimulationError(
                    f"{name}: shape {marked.shape}, expected ({n_objects},) = layers * experts"
                )
        if len(slots) not in (1, n_layers):
            raise SimulationError(f"slots: {len(slots)} values, expected 1 or {n_layers} layers")
        self._check_room(slots, n_experts, top_k)
        self._check_warm(slots)

    def _check_room(self, slots: npt.NDArray[np.int64], n_experts: int, top_k: int) -> None:
        """A cache that misses go through must hold one token's experts of a layer; none may."""
        held = slots // self.units_high
        if self.pinned is not None and len(slots) > 1:
            held = held + self.pinned.reshape(-1, n_experts).sum(axis=1) * (slots > 0)
        short = np.flatnonzero((slots > 0) & (held < top_k))
        if self.on_miss in ("cpu", "skip") or not len(short):
            return
        where = f"layer {short[0]}" if len(slots) > 1 else "the cache"
        raise SimulationError(
            f"{where} has room for {held[short[0]]} experts, fewer than the top_k={top_k} of one"
            f" token; give it {top_k} slots, none at all, or compute misses on the CPU"
        )

    def _check_warm(self, slots: npt.NDArray[np.int64]) -> None:
        if self.warm is None:
            return
        if self.pinned is not None and (self.warm & self.pinned).any():
            raise SimulationError("warm: an expert is both pinned and in a slot, expected one")
        filled = self.warm.reshape(len(slots), -1).sum(axis=1) * self.units_high
        over = np.flatnonzero(filled > slots)
        if len(over):
            raise SimulationError(
                f"warm: {filled[over[0]]} units in group {over[0]} of slots, which has"
                f" {slots[over[0]]}"
            )

    def capacity(self, n_layers: int) -> npt.NDArray[np.int64]:
        """Slots of every group; zeros when none were given."""
        return np.zeros(n_layers, np.int64) if self.slots is None else self.slots
