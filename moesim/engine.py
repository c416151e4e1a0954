"""The engine: a Program of tasks on streams and pools goes in, a Timeline comes out.

Read `run`, then `_simulate`, which is the main loop. Two facts keep it small:

* Who runs before whom never depends on time: a stream runs its tasks in order and waits point
  backwards. So the start of a task is known as soon as the ends of its predecessors are, even
  while they lie in the future. A program without shared pools needs no clock at all: one pass
  over the tasks (`_forward`). With pools only draws need a clock; all else is worked out on the
  side (`_advance`).
* A stream runs one task at a time, so there is at most one draw in progress per stream. What
  changes with time is a record per stream and a record per pool (`engine_state.py`), small
  enough for the cache.

Rates are max-min fair, by progressive filling (Bertsekas and Gallager, Data Networks, section
6.5.2): the rates of all draws rise together; a draw stops rising at its own maximum or when one
of its pools is full. A draw that begins or ends changes only the rates of draws tied to it,
directly or through others, by a common pool; `_share` looks at no more than these.

Equal inputs give equal bytes: nothing is random, nothing iterates over a set, and of several
streams due at one instant the lowest goes first. All compiled functions stay in this one file:
a change in a file makes numba compile that file's functions again, not those that call them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from moesim.engine_state import (
    N_CHANGED,
    NEVER,
    NOBODY,
    SPLITTINGS,
    UNKNOWN,
    Draws,
    Queues,
    Tasks,
    new_draws,
    new_queues,
    tasks_of,
)
from moesim.errors import SimulationError
from moesim.program import Program

__all__ = ["Program", "Timeline", "run"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Seconds = npt.NDArray[np.float64]


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
    tasks = tasks_of(program)
    start = np.empty(program.n_tasks, dtype=np.float64)
    end = np.full(program.n_tasks, UNKNOWN, dtype=np.float64)
    if len(program.draw_pool):
        _simulate(tasks, new_queues(program), new_draws(program), start, end)
    else:
        _forward(tasks, program.n_streams, start, end)
    if program.n_tasks and not (end.min() >= 0.0 and end.max() < np.inf):
        beyond = ~((end >= 0.0) & (end < np.inf))
        raise SimulationError(f"task {beyond.argmax()}: ends beyond the largest float64 second")
    return Timeline(start, end)


def _compiled(function: _Function) -> _Function:
    """Compile a loop; always inlined, since passing many arrays would cost more than the work."""
    return cast(_Function, numba.njit(cache=True, error_model="numpy", forceinline=True)(function))


@_compiled
def _forward(tasks: Tasks, n_streams: int, start: _Seconds, end: _Seconds) -> None:
    """A program without shared pools: one pass in task order."""
    stream_end = np.zeros(n_streams)
    for task in range(len(tasks.stream)):
        stream = tasks.stream[task]
        now = stream_end[stream]
        for i in range(tasks.wait_start[task], tasks.wait_start[task + 1]):
            now = max(now, end[tasks.wait_for[i]])
        start[task] = now
        end[task] = stream_end[stream] = now + _alone_s(tasks, task)


@_compiled
def _simulate(tasks: Tasks, queues: Queues, draws: Draws, start: _Seconds, end: _Seconds) -> None:
    """The main loop: go to the next instant at which draws begin or end, then split rates anew.

    Each turn of the inner loop begins or ends one draw, so there are two turns per draw in all,
    whatever the rounding. Draws that are due within rounding of each other end one after the
    other, at instants that differ by the rounding.
    """
    _line_up(tasks, queues)
    for stream in range(len(queues.stream)):
        _advance(tasks, queues, draws, stream, start, end)
    while draws.due[1] < NEVER:
        now = draws.due[1]
        while draws.due[1] <= now:
            stream = _first_due(draws.due, now)
            task = queues.stream[stream].task
            if draws.draw[stream].in_progress:
                _end_draw(draws, stream)
                end[task] = max(start[task] + tasks.seconds[task], now)
                _advance(tasks, queues, draws, stream, start, end)
            else:
                limits = (tasks.bytes[task], tasks.max_rate[task])
                row = (tasks.draw_start[task], tasks.draw_start[task + 1])
                _begin_draw(draws, stream, row, limits, now)
        _share(draws, now)


@_compiled
def _advance(
    tasks: Tasks, queues: Queues, draws: Draws, stream: int, start: _Seconds, end: _Seconds
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
        while queue.task != NOBODY:
            task = queue.task
            if end[task] == UNKNOWN:
                if not _may_start(tasks, queues, stream, task, end):
                    break
                start[task] = queue.ready
                if tasks.bytes[task] > 0.0 and tasks.draw_start[task] < tasks.draw_start[task + 1]:
                    _set_due(draws.due, stream, start[task])
                    break
                end[task] = start[task] + _alone_s(tasks, task)
            other = queues.waiter[task]
            while other != NOBODY:
                queues.stack[n_ready] = other
                n_ready += 1
                other = queues.stream[other].next_waiter
            queue.ready = end[task]
            queue.task = queues.next_task[task]
            if queue.task != NOBODY:
                queue.wait_at = tasks.wait_start[queue.task]


@_compiled
def _may_start(tasks: Tasks, queues: Queues, stream: int, task: int, end: _Seconds) -> bool:
    """Look at the waits not looked at yet; join the waiters of the first one without an end."""
    queue = queues.stream[stream]
    for i in range(queue.wait_at, tasks.wait_start[task + 1]):
        other = tasks.wait_for[i]
        if end[other] == UNKNOWN:
            queue.wait_at = i
            queue.next_waiter = queues.waiter[other]
            queues.waiter[other] = stream
            return False
        queue.ready = max(queue.ready, end[other])
    queue.wait_at = tasks.wait_start[task + 1]
    return True


@_compiled
def _line_up(tasks: Tasks, queues: Queues) -> None:
    """Chain the tasks of each stream, last to first."""
    for task in range(len(tasks.stream) - 1, -1, -1):
        queue = queues.stream[tasks.stream[task]]
        queues.next_task[task] = queue.task
        queue.task = task
        queue.wait_at = tasks.wait_start[task]


@_compiled
def _alone_s(tasks: Tasks, task: int) -> Any:
    """Duration of a task that shares nothing."""
    if tasks.bytes[task] > 0.0:
        return max(tasks.seconds[task], tasks.bytes[task] / tasks.max_rate[task])
    return tasks.seconds[task]


@_compiled
def _set_due(due: _Seconds, stream: int, when: float) -> None:
    """Change one leaf of the tournament tree."""
    at = len(due) // 2 + stream
    due[at] = when
    while at > 1:
        at //= 2
        earliest = min(due[2 * at], due[2 * at + 1])
        if due[at] == earliest:
            break
        due[at] = earliest


@_compiled
def _first_due(due: _Seconds, now: float) -> int:
    """The lowest stream that is due by now; there must be one."""
    at = 1
    while at < len(due) // 2:
        at *= 2
        if due[at] > now:
            at += 1
    return at - len(due) // 2


@_compiled
def _begin_draw(
    draws: Draws, stream: int, row: tuple[int, int], limits: tuple[float, float], now: float
) -> None:
    """Join the pools draw_pool[row[0]:row[1]] with (bytes, max_rate); `_share` gives the rate."""
    _set_due(draws.due, stream, NEVER)
    draw = draws.draw[stream]
    draw.in_progress = True
    draw.first_pool, draw.n_pools = row[0], row[1] - row[0]
    draw.left, draw.max_rate = limits
    draw.since, draw.rate = now, 0.0
    for i in range(draw.n_pools):
        pool = _changed_pool(draws, draw.first_pool + i)
        pool.n_draws += 1
        pool.n_special += _is_special(draw)
        at = stream * draws.width + i
        node = draws.node[at]
        node.before, node.after = NOBODY, pool.first_node
        if node.after != NOBODY:
            draws.node[node.after].before = at
        pool.first_node = at


@_compiled
def _end_draw(draws: Draws, stream: int) -> None:
    """Leave the pools."""
    _set_due(draws.due, stream, NEVER)
    draw = draws.draw[stream]
    draw.in_progress = False
    for i in range(draw.n_pools):
        pool = _changed_pool(draws, draw.first_pool + i)
        pool.n_draws -= 1
        pool.n_special -= _is_special(draw)
        node = draws.node[stream * draws.width + i]
        if node.before == NOBODY:
            pool.first_node = node.after
        else:
            draws.node[node.before].after = node.after
        if node.after != NOBODY:
            draws.node[node.after].before = node.before


@_compiled
def _is_special(draw: Any) -> bool:
    return bool(draw.n_pools > 1 or draw.max_rate < NEVER)


@_compiled
def _changed_pool(draws: Draws, place: int) -> Any:
    """The pool at a place of draw_pool, noted as changed at this instant."""
    p = draws.draw_pool[place]
    pool = draws.pool[p]
    if not pool.is_changed:
        pool.is_changed = True
        draws.changed[draws.tally[N_CHANGED]] = p
        draws.tally[N_CHANGED] += 1
    return pool


@_compiled
def _share(draws: Draws, now: float) -> None:
    """New rates for all draws tied to the pools that changed at this instant."""
    earlier = draws.tally[SPLITTINGS]
    for i in range(draws.tally[N_CHANGED]):
        p = draws.changed[i]
        draws.pool[p].is_changed = False
        if draws.pool[p].met <= earlier:
            draws.tally[SPLITTINGS] += 1
            _split(draws, p, draws.tally[SPLITTINGS], now)
    draws.tally[N_CHANGED] = 0


@_compiled
def _split(draws: Draws, p: int, splitting: int, now: float) -> None:
    """Max-min fair rates for the draws tied to pool p.

    The equal share of a pool is its room over its open draws. Open draws whose own maximum is
    within the smallest equal share get that maximum; if there are none, all open draws on the
    pools with that share get it. Each turn serves at least one draw.
    """
    n_group, n_capped = _tied(draws, p, splitting)
    while n_group > 0:
        smallest = NEVER
        n_left = 0
        for i in range(n_group):
            pool = draws.pool[draws.group[i]]
            if pool.n_open > 0:
                pool.equal_share = pool.room / pool.n_open
                smallest = min(smallest, pool.equal_share)
                draws.group[n_left] = draws.group[i]
                n_left += 1
        n_group = n_left
        n_left = 0
        for i in range(n_capped):
            stream = draws.capped[i]
            draw = draws.draw[stream]
            if draw.served != splitting and draw.max_rate <= smallest:
                _give(draws, stream, draw.max_rate, NOBODY, splitting, now)
            elif draw.served != splitting:
                draws.capped[n_left] = stream
                n_left += 1
        if n_left == n_capped:
            _fill(draws, n_group, smallest, splitting, now)
        n_capped = n_left


@_compiled
def _fill(draws: Draws, n_group: int, equal_share: float, splitting: int, now: float) -> None:
    """Give the equal share to all open draws on the pools that have it."""
    for i in range(n_group):
        p = draws.group[i]
        pool = draws.pool[p]
        if pool.equal_share == equal_share:
            at = pool.first_node
            while at != NOBODY:
                stream = draws.node[at].stream
                if draws.draw[stream].served != splitting:
                    _give(draws, stream, equal_share, p, splitting, now)
                at = draws.node[at].after
            pool.n_open = 0


@_compiled
def _tied(draws: Draws, p: int, splitting: int) -> tuple[int, int]:
    """Collect the pools tied to pool p and the capped draws on them; returns how many of each."""
    draws.group[0] = p
    draws.pool[p].met = splitting
    n_group, n_capped, done = 1, 0, 0
    while done < n_group:
        pool = draws.pool[draws.group[done]]
        done += 1
        pool.room = pool.rate
        pool.n_open = pool.n_draws
        at = pool.first_node if pool.n_special > 0 else NOBODY
        while at != NOBODY:
            stream = draws.node[at].stream
            draw = draws.draw[stream]
            if draw.met != splitting:
                draw.met = splitting
                if draw.max_rate < NEVER:
                    draws.capped[n_capped] = stream
                    n_capped += 1
                for i in range(draw.n_pools):
                    q = draws.draw_pool[draw.first_pool + i]
                    if draws.pool[q].met != splitting:
                        draws.pool[q].met = splitting
                        draws.group[n_group] = q
                        n_group += 1
            at = draws.node[at].after
    return n_group, n_capped


@_compiled
def _give(
    draws: Draws, stream: int, rate: float, full_pool: int, splitting: int, now: float
) -> None:
    """Take a rate from the pools; if it is a new rate, the draw gets a new instant to end.

    full_pool  is being filled: what is left in it no longer matters
    """
    draw = draws.draw[stream]
    draw.served = splitting
    for i in range(draw.n_pools):
        p = draws.draw_pool[draw.first_pool + i]
        if p != full_pool:
            draws.pool[p].room -= rate
            draws.pool[p].n_open -= 1
    if rate != draw.rate:
        draw.left = max(0.0, draw.left - draw.rate * (now - draw.since))
        draw.since, draw.rate = now, rate
        _set_due(draws.due, stream, now + draw.left / rate)
