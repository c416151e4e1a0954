"""An accelerator that is this CPU: what a GPU would run, in Triton's interpreter, timed roughly."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from moesim_kernels.bench.accelerator import Accelerator
from moesim_kernels.bench.routing import CapturedRouting
from moesim_kernels.bench.timing import Timed


def time_once(
    calls: Sequence[Callable[[], object]], graph: bool
) -> tuple[Timed, dict[str, object]]:
    seconds = []
    for call in calls:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return Timed(seconds), {"timer": "perf_counter", "copies": len(calls)}


def stand_in(traces: Sequence[CapturedRouting] = (), **changed: object) -> Accelerator:
    """Little caches, so that one or two copies of tiny weights are cold already."""
    facts = {"name": "stand-in", "kind": "gpu"}
    made = {"l2_bytes": 1 << 10, "memory_bytes": 1 << 30, "time": time_once, "traces": traces}
    return Accelerator(torch.device("cpu"), facts, **(made | changed))
