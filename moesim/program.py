"""Program: the tasks of a simulated step as arrays; `builder.py` puts one together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError

_DTYPES: dict[str, type[np.generic]] = {
    "stream": np.int32,
    "seconds": np.float64,
    "bytes": np.float64,
    "max_rate": np.float64,
    "wait_start": np.int64,
    "wait_for": np.int32,
    "draw_start": np.int64,
    "draw_pool": np.int32,
    "pool_rate": np.float64,
}


@dataclass(frozen=True, slots=True)
class Program:
    """Tasks on streams, as arrays; the order of the arrays is the order of issue.

    A task starts when its stream has ended all earlier tasks and every task it waits for has
    ended. From its start, its fixed seconds pass and its bytes are drawn side by side; it ends
    when both are done, so a kernel is max(compute, memory). What must come one after the other
    (a latency, then a copy) is two tasks in a row on one stream.

    A draw goes through all of its pools at one rate: its max-min fair share of them (the rates
    of all draws in progress rise together; a draw stops rising when it reaches its own max_rate
    or when one of its pools is full). A draw without pools runs at max_rate.

    stream      int32[tasks], the in-order queue a task runs on
    seconds     float64[tasks], fixed duration, >= 0
    bytes       float64[tasks], bytes to draw, >= 0
    max_rate    float64[tasks], most bytes/s of this draw, > 0; inf: only pools limit it
    wait_start  int64[tasks + 1] and wait_for int32[waits]: compressed rows of the tasks waited
                for; always earlier tasks, so a program cannot deadlock
    draw_start  int64[tasks + 1] and draw_pool int32[draws]: compressed rows of the pools drawn
                from, increasing within a row
    pool_rate   float64[pools], bytes/s of each pool, > 0; inf: never full
    raises      SimulationError naming the first task or pool that breaks one of these rules
    """

    stream: npt.NDArray[np.int32]
    seconds: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]
    max_rate: npt.NDArray[np.float64]
    wait_start: npt.NDArray[np.int64]
    wait_for: npt.NDArray[np.int32]
    draw_start: npt.NDArray[np.int64]
    draw_pool: npt.NDArray[np.int32]
    pool_rate: npt.NDArray[np.float64]
    n_streams: int

    def __post_init__(self) -> None:
        self._check_types()
        self._check_ranges()
        _check_rows("wait_start", self.wait_start, len(self.wait_for))
        _check_rows("draw_start", self.draw_start, len(self.draw_pool))
        self._check_waits()
        self._check_draws()

    @property
    def n_tasks(self) -> int:
        """Number of tasks."""
        return self.stream.size

    @property
    def n_pools(self) -> int:
        """Number of pools."""
        return self.pool_rate.size

    def _check_types(self) -> None:
        n = self.n_tasks
        length = {"seconds": n, "bytes": n, "max_rate": n, "wait_start": n + 1, "draw_start": n + 1}
        for field, dtype in _DTYPES.items():
            array = getattr(self, field)
            expected = (length.get(field, array.size),)
            if array.dtype != dtype or array.shape != expected:
                raise SimulationError(
                    f"{field}: {array.dtype}{list(array.shape)},"
                    f" expected {np.dtype(dtype)}{list(expected)}"
                )

    def _check_ranges(self) -> None:
        if self.n_streams < 0:
            raise SimulationError(f"n_streams={self.n_streams}, expected >= 0")
        wanted = f"a stream in 0..{self.n_streams - 1}"
        _check_values("stream", self.stream, (0, self.n_streams - 1), wanted)
        largest, smallest = float(np.finfo(np.float64).max), float(np.finfo(np.float64).tiny)
        for field in ("seconds", "bytes"):
            _check_values(field, getattr(self, field), (0.0, largest), "a finite number >= 0")
        for field in ("max_rate", "pool_rate"):
            _check_values(field, getattr(self, field), (smallest, np.inf), "a rate > 0")

    def _check_waits(self) -> None:
        task = _row_of(self.wait_start)
        bad = (self.wait_for < 0) | (self.wait_for >= task)
        if bad.any():
            at = int(bad.argmax())
            raise SimulationError(
                f"task {task[at]}: waits for task {self.wait_for[at]}, expected an earlier task"
            )

    def _check_draws(self) -> None:
        task = _row_of(self.draw_start)
        bad = (self.draw_pool < 0) | (self.draw_pool >= self.n_pools)
        if bad.any():
            at = int(bad.argmax())
            raise SimulationError(
                f"task {task[at]}: draws from pool {self.draw_pool[at]},"
                f" expected a pool in 0..{self.n_pools - 1}"
            )
        bad = (task[1:] == task[:-1]) & (self.draw_pool[1:] <= self.draw_pool[:-1])
        if bad.any():
            at = int(bad.argmax())
            raise SimulationError(
                f"task {task[at]}: draws from pool {self.draw_pool[at]} and then from pool"
                f" {self.draw_pool[at + 1]}, expected increasing pools, each once"
            )


@dataclass(frozen=True, slots=True)
class Names:
    """What the parts of a program are called; the engine never reads this.

    stream    name of each stream, and process: the device or rank it belongs to
    pool      name of each pool
    label     int32[tasks], index into labels
    labels    what a task does ("gate of layer 3"), and categories: its sort ("compute")
    """

    stream: tuple[str, ...]
    process: tuple[str, ...]
    pool: tuple[str, ...]
    label: npt.NDArray[np.int32]
    labels: tuple[str, ...]
    categories: tuple[str, ...]


def _row_of(start: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The row of each entry of compressed rows."""
    return np.repeat(np.arange(len(start) - 1), np.diff(start))


def _check_rows(field: str, start: npt.NDArray[np.int64], n_entries: int) -> None:
    """Refuse offsets that do not cover the entries in order."""
    if start[0] != 0 or start[-1] != n_entries:
        raise SimulationError(
            f"{field}: runs from {start[0]} to {start[-1]}, expected 0 to {n_entries}"
        )
    falling = np.diff(start) < 0
    if falling.any():
        task = int(falling.argmax())
        raise SimulationError(f"task {task}: {field} falls from {start[task]} to {start[task + 1]}")


def _check_values(
    field: str,
    values: npt.NDArray[Any],
    limits: tuple[float, float],
    wanted: str,
) -> None:
    """Refuse the first value outside the limits (both included), or not a number."""
    low, high = limits
    if values.size and not (values.min() >= low and values.max() <= high):
        at = int(np.argmin((values >= low) & (values <= high)))
        thing = "pool" if field == "pool_rate" else "task"
        raise SimulationError(f"{thing} {at}: {field}={values[at]}, expected {wanted}")
