"""Where a layer's experts are computed: small pure functions from what is resident to places.

Each takes the token copies of a layer-step's experts and which of them are in the fast tier, and
returns where each is computed. Times are those of `UnitTimes`, tables over token copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesim.offload.decisions import LOADED, ON_CPU, RESIDENT


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Estimates that decisions are made from, seconds (or any one unit).

    gpu_s, cpu_s  of one expert by token copies, index 0 to the most there can be
    cpu_start_s   once for the first expert on the CPU of a layer
    load_s        of moving one expert to the GPU
    """

    gpu_s: Sequence[float]
    cpu_s: Sequence[float]
    cpu_start_s: float
    load_s: float


def by_threshold(tokens: Sequence[int], there: Sequence[bool], threshold: float) -> list[int]:
    """Missing experts with fewer tokens than the threshold on the CPU (Fiddler, 2402.07033)."""
    return [
        RESIDENT if here else (ON_CPU if n < threshold else LOADED)
        for n, here in zip(tokens, there, strict=True)
    ]


def hss(tokens: Sequence[int], there: Sequence[bool], times: UnitTimes) -> list[int]:
    """Hybrid schedule of HybriMoE (arXiv 2504.05897, rule (a) as its code has it).

    Cached experts by falling tokens, then uncached by falling tokens, form one queue. The GPU takes
    from its head (a missing one after its transfer), the CPU from its tail, whichever ends sooner.
    Of equal token counts the earlier cell comes first.
    """
    order = sorted(range(len(tokens)), key=lambda cell: (not there[cell], -tokens[cell], cell))
    place = [RESIDENT] * len(tokens)
    gpu_s = cpu_s = moved_s = 0.0
    head, tail = 0, len(order) - 1
    while head <= tail:
        first, last = order[head], order[tail]
        on_gpu = times.gpu_s[tokens[first]]
        on_cpu = times.cpu_s[tokens[last]] + (times.cpu_start_s if cpu_s == 0.0 else 0.0)
        if not there[first]:
            on_gpu += max(0.0, moved_s + times.load_s - gpu_s)
        if gpu_s + on_gpu <= cpu_s + on_cpu:
            gpu_s += on_gpu
            if not there[first]:
                moved_s += times.load_s
                place[first] = LOADED
            head += 1
        else:
            cpu_s += on_cpu
            place[last] = ON_CPU
            tail -= 1
    return place
