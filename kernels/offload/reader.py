"""Who reads: the running thread where it needs the expert, or one thread in the background."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from moesim_kernels.offload.policy import Read
from moesim_kernels.offload.robbed import Taken, Watch
from moesim_kernels.offload.storage import Tier

NS = 1e-9


class Reader(Protocol):
    """Takes reads and says when they are done.

    taken    by each read so far
    dropped  reads given up so far, since their slot was given away before they began
    """

    taken: list[Taken]
    dropped: int

    def ask(self, reads: Sequence[Read]) -> None:
        """Reads that are needed now, after those asked for earlier."""

    def ask_ahead(self, reads: Sequence[Read]) -> None:
        """Reads that may be needed: after all that are needed."""

    def hurry(self, slots: Iterable[int]) -> list[int]:
        """What is to come into these slots is needed now; returns those it has not come to yet."""

    def wait(self, slot: int) -> float:
        """Seconds waited until what was asked for is in a slot."""

    def robbed_s(self) -> float:
        """Seconds that a thread of the reader's own was ready and had no core."""

    def drain(self) -> None:
        """Wait for all reads."""

    def close(self) -> None:
        """Wait for all reads and end."""


class Inline:
    """Reads in the running thread, when the slot is waited for."""

    def __init__(self, tier: Tier) -> None:
        self._tier, self._watch = tier, Watch()
        self._asked: dict[int, Read] = {}
        self.taken: list[Taken] = []
        self.dropped = 0

    def ask(self, reads: Sequence[Read]) -> None:
        """Note them."""
        self._asked.update((read.slot, read) for read in reads)

    def ask_ahead(self, reads: Sequence[Read]) -> None:
        """Refused: there is nobody to read ahead."""
        if reads:
            raise RuntimeError("reads ahead need a background reader")

    def hurry(self, slots: Iterable[int]) -> list[int]:
        """Nothing is ever on its way."""
        return []

    def wait(self, slot: int) -> float:
        """Read now, unless the expert is there."""
        read = self._asked.pop(slot, None)
        if read is None:
            return 0.0
        self.taken.append(self._watch.timed(partial(self._tier.read, *read)))
        return self.taken[-1].seconds

    def robbed_s(self) -> float:
        """There is no other thread."""
        return 0.0

    def drain(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing runs."""
        self._watch.close()


@dataclass(slots=True, eq=False)
class _Job:
    read: Read
    urgent: bool
    begun: bool = False


class Background:
    """One thread reads, one expert at a time: what is needed first, each kind in order.

    A read in progress is always finished. One that has not begun is dropped when its slot is
    given to another expert.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._changed = threading.Condition()
        self._urgent: deque[_Job] = deque()
        self._ahead: deque[_Job] = deque()
        self._last: dict[int, _Job] = {}  # the job of each slot that is not there yet
        self._error: BaseException | None = None
        self._ending = False
        self.taken: list[Taken] = []
        self.dropped = 0
        self._thread = threading.Thread(target=self._read_all, name="expert-reader", daemon=True)
        self._watch: Watch
        self._begun = threading.Event()
        self._thread.start()
        self._begun.wait()

    @property
    def waiting(self) -> int:
        """Reads that have not begun."""
        return len(self._urgent) + len(self._ahead)

    def ask(self, reads: Sequence[Read]) -> None:
        """Behind the read in progress and what is needed already, before all others."""
        self._add(reads, self._urgent)

    def ask_ahead(self, reads: Sequence[Read]) -> None:
        """Behind everything."""
        self._add(reads, self._ahead)

    def hurry(self, slots: Iterable[int]) -> list[int]:
        """Move what has not begun before all that is not needed."""
        if not self._last:
            return []
        with self._changed:
            jobs = [self._last[slot] for slot in slots if slot in self._last]
            for job in jobs:
                if not job.begun and not job.urgent:
                    self._ahead.remove(job)
                    job.urgent = True
                    self._urgent.append(job)
        return [job.read.slot for job in jobs]

    def wait(self, slot: int) -> float:
        """Sleep until the reader is done with a slot; raises what stopped the reader."""
        if slot not in self._last and self._error is None:
            return 0.0
        started = time.perf_counter_ns()
        with self._changed:
            while slot in self._last and self._error is None:
                self._changed.wait()
        if self._error is not None:
            raise self._error
        return (time.perf_counter_ns() - started) * NS

    def robbed_s(self) -> float:
        """Seconds that the reading thread was ready and had no core."""
        return self._watch.robbed_s()

    def drain(self) -> None:
        """Sleep until the reader has nothing to do; raises what stopped it."""
        for slot in list(self._last):
            self.wait(slot)

    def close(self) -> None:
        """Finish all reads and end the thread."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()
        self._watch.close()

    def _add(self, reads: Sequence[Read], queue: deque[_Job]) -> None:
        if not reads:
            return
        with self._changed:
            for read in reads:
                self._drop(read.slot)
                self._last[read.slot] = job = _Job(read, queue is self._urgent)
                queue.append(job)
            self._changed.notify_all()

    def _drop(self, slot: int) -> None:
        job = self._last.get(slot)
        if job is not None and not job.begun:
            (self._urgent if job.urgent else self._ahead).remove(job)
            self.dropped += 1

    def _read_all(self) -> None:
        self._watch = Watch()
        self._begun.set()
        while (job := self._next()) is not None:
            read = partial(self._tier.read, *job.read)
            try:
                self.taken.append(self._watch.timed(read))
            except BaseException as error:
                self._fail(error)
                return
            with self._changed:
                if self._last[job.read.slot] is job:
                    del self._last[job.read.slot]
                self._changed.notify_all()

    def _next(self) -> _Job | None:
        with self._changed:
            while not (self._urgent or self._ahead or self._ending):
                self._changed.wait()
            queue = self._urgent or self._ahead
            if not queue:
                return None
            job = queue.popleft()
            job.begun = True
            return job

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
