"""What a runtime decided: where every expert was computed, and every load it issued.

Decisions hold no seconds. They are made in program order from what is known then, so that the
clock can be run over them afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESIDENT, LOADED, ON_CPU, ON_PIM, SKIPPED = 0, 1, 2, 3, 4
PLACES = ("resident", "loaded", "on_cpu", "on_pim", "skipped")
DEMAND, PREFETCH = 0, 1
NO_LOAD = -1
NO_VICTIM = -1
LOW, HIGH = 1, 2
"""Precision of a copy in the fast tier: the low-bit one, or the full one."""

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Loads:
    """Copies into the fast tier, in the order they were issued.

    object     int32[loads], layer * n_experts + expert
    step       int64[loads], layer-step at whose gate it was issued
    kind       int8[loads], DEMAND or PREFETCH
    units      int32[loads], size in the units of the cache's slots
    victim     int32[loads], object that left to make room, -1 for none; the last of several, and
               None where nobody noted it
    """

    object: Ints
    step: Longs
    kind: Bytes
    units: Ints
    victim: Ints | None = None


@dataclass(frozen=True, slots=True)
class Decisions:
    """One entry for every cell of the LayerSteps, and the loads.

    place      int8[cells], one of PLACES
    was_there  bool[cells], in the fast tier when the gate asked (pinned, cached, or prefetched)
    level      int8[cells], precision it was computed at: LOW or HIGH
    load       int32[cells], load whose end the computation must wait for, NO_LOAD for none
    loads      every copy, by demand or ahead of it
    evictions  copies thrown out to make room
    refused    prefetches not issued: every slot held an expert that was needed sooner
    wasted     prefetched copies thrown out before any use
    """

    place: Bytes
    was_there: npt.NDArray[np.bool_]
    level: Bytes
    load: Ints
    loads: Loads
    evictions: int
    refused: int
    wasted: int

    @property
    def hit_rate(self) -> float:
        """Share of requested experts that were in the fast tier when the gate asked."""
        return float(self.was_there.mean()) if len(self.was_there) else float("nan")
