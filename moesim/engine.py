"""The engine: a Program of tasks on streams and pools goes in, a Timeline comes out.

Read `run`, then `_simulate`, which is the main loop. Two facts keep it small:

* Who runs before whom never depends on time: a stream runs its tasks in order and waits point
  backwards. So the start of a task is known as soon as the ends of its predecessors are, even
  while they lie in the future. A program without shared pools needs no clock at all: one pass
  over the tasks (`_forward`). With pools only draws need a clock; all else is worked out on the
  side (`_advance`).
* A stream runs one task at a time, so there is at most one draw in progress per stream. What
  changes with time is a record per stream and a record per pool, small enough for the cache
  (`moesim/sharing.py`, which also splits the rates).

Equal inputs give equal bytes: nothing is random, nothing iterates over a set, and of several
streams due at one instant the lowest goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.program import Program
from moesim.sharing import (
    Draws,
    begin_draw,
    compiled,
    end_draw,
    first_due,
    new_draws,
    plain,
    set_due,
    share,
)

__all__ = ["Program", "Timeline", "run"]

_NOBODY = -1
_UNKNOWN = -1.0  # an end not worked out yet; true ends are >= 0
_NEVER = np.inf

_QUEUE = np.dtype(
    [
        ("task", np.int32),  # first task of the stream that has no end yet, or NOBODY
        ("next_waiter", np.int32),  # next stream waiting for the same task as this one
        ("wait_at", np.int64),  # how far that task's waits have been looked at
        ("ready", np.float64),  # latest end among the predecessors looked at
    ],
    align=True,
)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each task ran: start_s and end_s, float64[tasks], seconds from the program's start."""

    start_s: npt.NDArray[np.float64]
    end_s: npt.NDArray[np.float64]

    @property
    def makespan_s(self) -> float:
        """End of the last task; 0 for an empty program."""
        return float(self.end_s.max(initial=0.0))


def run(program: Program) -> Timeline:
    """Simulate a program: when each task starts and ends.

    raises  SimulationError when a task would end beyond the largest float64
    """
    tasks = _Tasks(*(plain(getattr(program, field)) for field in _Tasks._fields))
    start = np.empty(program.n_tasks, dtype=np.float64)
    end = np.full(program.n_tasks, _UNKNOWN, dtype=np.float64)
    if len(program.draw_pool):
        _simulate(tasks, _new_queues(program), new_draws(program), start, end)
    else:
        _forward(tasks, program.n_streams, start, end)
    if program.n_tasks and not (end.min() >= 0.0 and end.max() < np.inf):
        beyond = ~((end >= 0.0) & (end < np.inf))
        raise SimulationError(f"task {beyond.argmax()}: ends beyond the largest float64 second")
    return Timeline(start, end)


class _Tasks(NamedTuple):
    """The arrays of a Program, in a form compiled code takes."""

    stream: npt.NDArray[np.int32]
    seconds: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]
    max_rate: npt.NDArray[np.float64]
    wait_start: npt.NDArray[np.int64]
    wait_for: npt.NDArray[np.int32]
    draw_start: npt.NDArray[np.int64]


class _Queues(NamedTuple):
    """Where each stream stands in its tasks."""

    stream: npt.NDArray[Any]  # QUEUE[streams]
    next_task: npt.NDArray[np.int32]  # [tasks] the next task on the same stream
    waiter: npt.NDArray[np.int32]  # [tasks] first stream in the list of those waiting for a task
    stack: npt.NDArray[np.int32]  # [streams] streams that can go on


@compiled
def _forward(
    tasks: _Tasks, n_streams: int, start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]
) -> None:
    """A program without shared pools: one pass in task order."""
    stream_end = np.zeros(n_streams)
    for task in range(len(tasks.stream)):
        stream = tasks.stream[task]
        now = stream_end[stream]
        for i in range(tasks.wait_start[task], tasks.wait_start[task + 1]):
            now = max(now, end[tasks.wait_for[i]])
        start[task] = now
        end[task] = stream_end[stream] = now + _alone_s(tasks, task)


@compiled
def _simulate(
    tasks: _Tasks,
    queues: _Queues,
    draws: Draws,
    start: npt.NDArray[np.float64],
    end: npt.NDArray[np.float64],
) -> None:
    """The main loop: go to the next instant at which draws begin or end, then split rates anew.

    Each turn of the inner loop begins or ends one draw, so there are two turns per draw in all,
    whatever the rounding. Draws that are due within rounding of each other end one after the
    other, at instants that differ by the rounding.
    """
    for stream in range(len(queues.stream)):
        _advance(tasks, queues, draws, stream, start, end)
    while draws.due[1] < _NEVER:
        now = draws.due[1]
        while draws.due[1] <= now:
            stream = first_due(draws.due, now)
            task = queues.stream[stream].task
            if draws.draw[stream].in_progress:
                end_draw(draws, stream)
                end[task] = max(start[task] + tasks.seconds[task], now)
                _advance(tasks, queues, draws, stream, start, end)
            else:
                limits = (tasks.bytes[task], tasks.max_rate[task])
                row = (tasks.draw_start[task], tasks.draw_start[task + 1])
                begin_draw(draws, stream, row, limits, now)
        share(draws, now)


@compiled
def _advance(
    tasks: _Tasks,
    queues: _Queues,
    draws: Draws,
    stream: int,
    start: npt.NDArray[np.float64],
    end: npt.NDArray[np.float64],
) -> None:
    """Work out all that follows now that a stream can go on.

    A stream stops at a wait without an end (it joins that task's waiters and goes on when the
    end is known) or at a draw (whose beginning goes on the clock).
    """
    queues.stack[0] = stream
    n_ready = 1
    while n_ready > 0:
        n_ready -= 1
        stream = queues.stack[n_ready]
        queue = queues.stream[stream]
        while queue.task != _NOBODY:
            task = queue.task
            if end[task] == _UNKNOWN:
                if not _may_start(tasks, queues, stream, task, end):
                    break
                start[task] = queue.ready
                if tasks.bytes[task] > 0.0 and tasks.draw_start[task] < tasks.draw_start[task + 1]:
                    set_due(draws.due, stream, start[task])
                    break
                end[task] = start[task] + _alone_s(tasks, task)
            other = queues.waiter[task]
            while other != _NOBODY:
                queues.stack[n_ready] = other
                n_ready += 1
                other = queues.stream[other].next_waiter
            queue.ready = end[task]
            queue.task = queues.next_task[task]
            if queue.task != _NOBODY:
                queue.wait_at = tasks.wait_start[queue.task]


@compiled
def _may_start(
    tasks: _Tasks, queues: _Queues, stream: int, task: int, end: npt.NDArray[np.float64]
) -> bool:
    """Look at the waits not looked at yet; join the waiters of the first one without an end."""
    queue = queues.stream[stream]
    for i in range(queue.wait_at, tasks.wait_start[task + 1]):
        other = tasks.wait_for[i]
        if end[other] == _UNKNOWN:
            queue.wait_at = i
            queue.next_waiter = queues.waiter[other]
            queues.waiter[other] = stream
            return False
        queue.ready = max(queue.ready, end[other])
    queue.wait_at = tasks.wait_start[task + 1]
    return True


@compiled
def _alone_s(tasks: _Tasks, task: int) -> Any:
    """Duration of a task that shares nothing."""
    if tasks.bytes[task] > 0.0:
        return max(tasks.seconds[task], tasks.bytes[task] / tasks.max_rate[task])
    return tasks.seconds[task]


def _new_queues(program: Program) -> _Queues:
    """Every stream at its first task."""
    first_task = np.full(program.n_streams, _NOBODY, dtype=np.int32)
    next_task = np.empty(program.n_tasks, dtype=np.int32)
    _link_tasks(plain(program.stream), first_task, next_task)
    queue = np.zeros(program.n_streams, dtype=_QUEUE)
    queue["task"] = first_task
    used = first_task != _NOBODY
    queue["wait_at"][used] = program.wait_start[first_task[used]]
    return _Queues(
        stream=queue,
        next_task=next_task,
        waiter=np.full(program.n_tasks, _NOBODY, dtype=np.int32),
        stack=np.empty(program.n_streams, dtype=np.int32),
    )


@compiled
def _link_tasks(
    stream: npt.NDArray[np.int32],
    first_task: npt.NDArray[np.int32],
    next_task: npt.NDArray[np.int32],
) -> None:
    """Chain the tasks of each stream, last to first."""
    for task in range(len(stream) - 1, -1, -1):
        next_task[task] = first_task[stream[task]]
        first_task[stream[task]] = task
