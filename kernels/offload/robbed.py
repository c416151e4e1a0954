"""How long a thread was ready to run and had no core, since other programs held them all."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

NS = 1e-9
CALM = 0.01  # of the time something took
LEAST = 5


class Taken(NamedTuple):
    """Seconds something took, and for how many of them its thread had no core."""

    seconds: float
    robbed_s: float

    @property
    def calm(self) -> bool:
        """Whether other programs took next to nothing of it."""
        return self.robbed_s <= CALM * self.seconds


def undisturbed(taken: Iterable[Taken]) -> list[float]:
    """Seconds of the calm ones; of all, where there are not LEAST calm ones."""
    every = list(taken)
    calm = [one.seconds for one in every if one.calm]
    return calm if len(calm) >= LEAST else [one.seconds for one in every]


class Watch:
    """Watches the thread that makes it; says 0 where the system does not count.

    The count is the second number of /proc/<pid>/task/<tid>/schedstat, in nanoseconds.
    """

    def __init__(self) -> None:
        path = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/schedstat"
        try:
            self._descriptor: int | None = os.open(path, os.O_RDONLY)
        except OSError:
            self._descriptor = None

    def robbed_s(self) -> float:
        """Seconds so far; any thread may ask."""
        if self._descriptor is None:
            return 0.0
        try:
            return int(os.pread(self._descriptor, 64, 0).split()[1]) * NS
        except (OSError, IndexError, ValueError):  # the thread has ended, or nothing is counted
            return 0.0

    def timed(self, call: Callable[[], object]) -> Taken:
        """Do something in the watched thread and say what it took."""
        robbed_s = self.robbed_s()
        started = time.perf_counter_ns()
        call()
        seconds = (time.perf_counter_ns() - started) * NS
        return Taken(seconds, self.robbed_s() - robbed_s)

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
