"""Host memory as a cache over a drive: which loads and CPU experts must be read first.

What misses the fast tier is the request stream of host memory, in the order of issue: loads, and
experts computed on the CPU, which are read where they lie. The least recently touched leaves.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.lower.offload import Extras
from moesim.offload.decisions import ON_CPU, Decisions
from traces.compiled import compiled
from traces.layer_steps import LayerSteps

Flags = npt.NDArray[np.bool_]


def cold_reads(work: LayerSteps, decided: Decisions, host_slots: int) -> Extras:
    """Loads and CPU cells whose expert is not among the host_slots experts in host memory.

    Host memory begins with the experts of the lowest layers, as a loader leaves it.
    raises  SimulationError for fewer than one slot
    """
    if host_slots < 1:
        raise SimulationError(f"host_slots={host_slots}: host memory must hold at least one expert")
    load_cold, cpu_cold = _replay(
        work.start,
        work.objects(),
        decided.place == ON_CPU,
        decided.loads.object,
        decided.loads.step,
        min(host_slots, work.n_objects),
        work.n_objects,
    )
    return Extras(load_cold=load_cold, cpu_cold=cpu_cold)


@compiled
def _replay(
    start: npt.NDArray[np.int64],
    objects: npt.NDArray[np.int32],
    on_cpu: Flags,
    load_object: npt.NDArray[np.int32],
    load_step: npt.NDArray[np.int64],
    slots: int,
    n_objects: int,
) -> tuple[Flags, Flags]:
    """LRU over a ring of all objects; the root is n_objects, its next the most recent."""
    after = np.empty(n_objects + 1, np.int64)
    before = np.empty(n_objects + 1, np.int64)
    root = n_objects
    after[root] = before[root] = root
    inside = np.zeros(n_objects, np.bool_)
    for x in range(slots - 1, -1, -1):  # the lowest is touched last of all
        after[x], before[x] = after[root], root
        before[after[root]] = x
        after[root] = x
        inside[x] = True
    load_cold = np.zeros(len(load_object), np.bool_)
    cpu_cold = np.zeros(len(objects), np.bool_)
    load = 0
    for step in range(len(start) - 1):
        while load < len(load_object) and load_step[load] == step:
            load_cold[load] = _touch(load_object[load], after, before, inside, root)
            load += 1
        for cell in range(start[step], start[step + 1]):
            if on_cpu[cell]:
                cpu_cold[cell] = _touch(objects[cell], after, before, inside, root)
    return load_cold, cpu_cold


@compiled
def _touch(
    x: int,
    after: npt.NDArray[np.int64],
    before: npt.NDArray[np.int64],
    inside: Flags,
    root: int,
) -> bool:
    """Put an object at the fresh end; True when it had to be read, in place of the oldest."""
    missing = not inside[x]
    leaves = before[root] if missing else x
    after[before[leaves]] = after[leaves]
    before[after[leaves]] = before[leaves]
    inside[leaves] = False
    after[x], before[x] = after[root], root
    before[after[root]] = x
    after[root] = x
    inside[x] = True
    return missing
