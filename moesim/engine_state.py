"""What the engine keeps while it runs: records per stream and per pool, ready for compiled code."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from moesim.program import Program

NOBODY = -1
UNKNOWN = -1.0  # an end not worked out yet; true ends are >= 0
NEVER = np.inf
SPLITTINGS, N_CHANGED = 0, 1  # places of Draws.tally
_Item = TypeVar("_Item", bound=np.generic)

_QUEUE = np.dtype(
    [
        ("task", np.int32),  # first task of the stream that has no end yet, or NOBODY
        ("next_waiter", np.int32),  # next stream waiting for the same task as this one
        ("wait_at", np.int64),  # how far that task's waits have been looked at
        ("ready", np.float64),  # latest end among the predecessors looked at
    ],
    align=True,
)
_DRAW = np.dtype(
    [
        ("in_progress", np.bool_),
        ("n_pools", np.int32),
        ("first_pool", np.int64),  # where its row of pools starts in draw_pool
        ("left", np.float64),  # bytes left at time `since`
        ("since", np.float64),  # when the rate last changed
        ("rate", np.float64),  # bytes/s from then on
        ("max_rate", np.float64),
        ("met", np.int64),  # the last splitting that met it
        ("served", np.int64),  # the last splitting that gave it a rate
    ],
    align=True,
)
_POOL = np.dtype(
    [
        ("rate", np.float64),
        ("room", np.float64),  # bytes/s not given away yet
        ("equal_share", np.float64),  # room over open draws
        ("met", np.int64),  # the last splitting that met it
        ("first_node", np.int32),  # list of its draws
        ("n_draws", np.int32),
        ("n_open", np.int32),  # of these, not given a rate yet
        ("n_special", np.int32),  # of these, on other pools too or with a maximum of their own
        ("is_changed", np.bool_),  # a draw on it began or ended at this instant
    ],
    align=True,
)
_NODE = np.dtype(
    [("stream", np.int32), ("before", np.int32), ("after", np.int32)],
    align=True,
)


class Tasks(NamedTuple):
    """The arrays of a Program, in a form compiled code takes."""

    stream: npt.NDArray[np.int32]
    seconds: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]
    max_rate: npt.NDArray[np.float64]
    wait_start: npt.NDArray[np.int64]
    wait_for: npt.NDArray[np.int32]
    draw_start: npt.NDArray[np.int64]


class Queues(NamedTuple):
    """Where each stream stands in its tasks."""

    stream: npt.NDArray[Any]  # QUEUE[streams]
    next_task: npt.NDArray[np.int32]  # [tasks] the next task on the same stream
    waiter: npt.NDArray[np.int32]  # [tasks] first stream in the list of those waiting for a task
    stack: npt.NDArray[np.int32]  # [streams] streams that can go on


class Draws(NamedTuple):
    """At most one draw in progress per stream, and the pools they draw on.

    due  tournament tree over streams, float64[2 * leaves]: when a draw begins or ends, inf for
         never; leaf of stream s at leaves + s, due[1] the earliest of all
    """

    draw: npt.NDArray[Any]  # DRAW[streams]
    pool: npt.NDArray[Any]  # POOL[pools]
    node: npt.NDArray[Any]  # NODE[streams * width]: the lists of the pools
    width: int  # most pools of a task; nodes of stream s start at s * width
    draw_pool: npt.NDArray[np.int32]  # rows of pools, as in Program
    due: npt.NDArray[np.float64]
    tally: npt.NDArray[np.int64]  # [SPLITTINGS] so far, [N_CHANGED] pools at this instant
    changed: npt.NDArray[np.int32]  # [pools] which pools these are
    group: npt.NDArray[np.int32]  # [pools] scratch: pools tied together
    capped: npt.NDArray[np.int32]  # [streams] scratch: draws with a maximum of their own


def tasks_of(program: Program) -> Tasks:
    """The program's arrays."""
    return Tasks(*(_plain(getattr(program, field)) for field in Tasks._fields))


def new_queues(program: Program) -> Queues:
    """No stream has a task yet; the main loop lines them up."""
    queue = np.zeros(program.n_streams, dtype=_QUEUE)
    queue["task"] = NOBODY
    return Queues(
        stream=queue,
        next_task=np.empty(program.n_tasks, dtype=np.int32),
        waiter=np.full(program.n_tasks, NOBODY, dtype=np.int32),
        stack=np.empty(program.n_streams, dtype=np.int32),
    )


def new_draws(program: Program) -> Draws:
    """Nothing in progress and nothing due."""
    n_streams, n_pools = program.n_streams, program.n_pools
    width = int(np.diff(program.draw_start).max(initial=1))
    pool = np.zeros(n_pools, dtype=_POOL)
    pool["rate"] = program.pool_rate
    pool["first_node"] = NOBODY
    node = np.zeros(n_streams * width, dtype=_NODE)
    node["stream"] = np.arange(len(node)) // width
    n_leaves = 1 << max(0, n_streams - 1).bit_length()
    return Draws(
        draw=np.zeros(n_streams, dtype=_DRAW),
        pool=pool,
        node=node,
        width=width,
        draw_pool=_plain(program.draw_pool),
        due=np.full(2 * n_leaves, NEVER),
        tally=np.zeros(2, dtype=np.int64),
        changed=np.empty(n_pools, dtype=np.int32),
        group=np.empty(n_pools, dtype=np.int32),
        capped=np.empty(n_streams, dtype=np.int32),
    )


def _plain(array: npt.NDArray[_Item]) -> npt.NDArray[_Item]:
    """The array in the one memory layout that loops are compiled for; copied only if needed."""
    return np.require(array, requirements=["C", "A", "W"])
