"""When each expert is asked for next: what oracle policies may look at, and no other."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled
from traces.layer_steps import LayerSteps

NEVER_AGAIN = np.iinfo(np.int64).max


@compiled
def next_steps(
    start: npt.NDArray[np.int64], objects: npt.NDArray[np.int32], n_objects: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Next layer-step of each cell's object after its own, and each object's first; NEVER_AGAIN."""
    upcoming = np.full(n_objects, np.iinfo(np.int64).max)
    after = np.empty(len(objects), np.int64)
    for step in range(len(start) - 2, -1, -1):
        for cell in range(start[step], start[step + 1]):
            after[cell] = upcoming[objects[cell]]
        for cell in range(start[step], start[step + 1]):
            upcoming[objects[cell]] = step
    return after, upcoming


class Future:
    """When every object is asked for, to be looked up from any layer-step."""

    def __init__(self, work: LayerSteps) -> None:
        objects = work.objects()
        step = np.repeat(np.arange(work.n_steps), np.diff(work.start))
        order = np.argsort(objects, kind="stable")
        self._steps: list[int] = step[order].tolist()
        self._start: list[int] = np.searchsorted(
            objects[order], np.arange(work.n_objects + 1)
        ).tolist()

    def next_use(self, expert: int, now: int) -> int:
        """Layer-step of the next use after `now`, NEVER_AGAIN for none."""
        low, high = self._start[expert], self._start[expert + 1]
        at = bisect_right(self._steps, now, low, high)
        return self._steps[at] if at < high else NEVER_AGAIN
