"""Draws in progress: how fast each one goes and when it is due to end.

Max-min fair sharing by progressive filling (Bertsekas and Gallager, Data Networks, section
6.5.2): the rates of all draws rise together; a draw stops rising at its own maximum or when one
of its pools is full. A draw that begins or ends changes only the rates of draws tied to it,
directly or through others, by a common pool; `share` looks at no more than these.

The main loop of `moesim/engine.py` calls these functions, compiled into it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from moesim.program import Program

_NOBODY = -1
_NEVER = np.inf
_SPLITTINGS, _N_CHANGED = 0, 1
_Function = TypeVar("_Function", bound=Callable[..., Any])

_Item = TypeVar("_Item", bound=np.generic)

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


def compiled(function: _Function) -> _Function:
    """Compile a loop; always inlined, since passing many arrays would cost more than the work."""
    return cast(_Function, numba.njit(cache=True, error_model="numpy", forceinline=True)(function))


@compiled
def set_due(due: npt.NDArray[np.float64], stream: int, when: float) -> None:
    """Change one leaf of the tournament tree."""
    at = len(due) // 2 + stream
    due[at] = when
    while at > 1:
        at //= 2
        earliest = min(due[2 * at], due[2 * at + 1])
        if due[at] == earliest:
            break
        due[at] = earliest


@compiled
def first_due(due: npt.NDArray[np.float64], now: float) -> int:
    """The lowest stream that is due by now; there must be one."""
    at = 1
    while at < len(due) // 2:
        at *= 2
        if due[at] > now:
            at += 1
    return at - len(due) // 2


@compiled
def begin_draw(
    draws: Draws, stream: int, row: tuple[int, int], limits: tuple[float, float], now: float
) -> None:
    """Join the pools draw_pool[row[0]:row[1]] with (bytes, max_rate); `share` gives the rate."""
    set_due(draws.due, stream, _NEVER)
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
        node.before, node.after = _NOBODY, pool.first_node
        if node.after != _NOBODY:
            draws.node[node.after].before = at
        pool.first_node = at


@compiled
def end_draw(draws: Draws, stream: int) -> None:
    """Leave the pools."""
    set_due(draws.due, stream, _NEVER)
    draw = draws.draw[stream]
    draw.in_progress = False
    for i in range(draw.n_pools):
        pool = _changed_pool(draws, draw.first_pool + i)
        pool.n_draws -= 1
        pool.n_special -= _is_special(draw)
        node = draws.node[stream * draws.width + i]
        if node.before == _NOBODY:
            pool.first_node = node.after
        else:
            draws.node[node.before].after = node.after
        if node.after != _NOBODY:
            draws.node[node.after].before = node.before


@compiled
def _is_special(draw: Any) -> bool:
    return bool(draw.n_pools > 1 or draw.max_rate < _NEVER)


@compiled
def _changed_pool(draws: Draws, place: int) -> Any:
    """The pool at a place of draw_pool, noted as changed at this instant."""
    p = draws.draw_pool[place]
    pool = draws.pool[p]
    if not pool.is_changed:
        pool.is_changed = True
        draws.changed[draws.tally[_N_CHANGED]] = p
        draws.tally[_N_CHANGED] += 1
    return pool


@compiled
def share(draws: Draws, now: float) -> None:
    """New rates for all draws tied to the pools that changed at this instant."""
    earlier = draws.tally[_SPLITTINGS]
    for i in range(draws.tally[_N_CHANGED]):
        p = draws.changed[i]
        draws.pool[p].is_changed = False
        if draws.pool[p].met <= earlier:
            draws.tally[_SPLITTINGS] += 1
            _split(draws, p, draws.tally[_SPLITTINGS], now)
    draws.tally[_N_CHANGED] = 0


@compiled
def _split(draws: Draws, p: int, splitting: int, now: float) -> None:
    """Max-min fair rates for the draws tied to pool p.

    The equal share of a pool is its room over its open draws. Open draws whose own maximum is
    within the smallest equal share get that maximum; if there are none, all open draws on the
    pools with that share get it. Each turn serves at least one draw.
    """
    n_group, n_capped = _tied(draws, p, splitting)
    while n_group > 0:
        smallest = _NEVER
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
                _give(draws, stream, draw.max_rate, _NOBODY, splitting, now)
            elif draw.served != splitting:
                draws.capped[n_left] = stream
                n_left += 1
        if n_left == n_capped:
            _fill(draws, n_group, smallest, splitting, now)
        n_capped = n_left


@compiled
def _fill(draws: Draws, n_group: int, equal_share: float, splitting: int, now: float) -> None:
    """Give the equal share to all open draws on the pools that have it."""
    for i in range(n_group):
        p = draws.group[i]
        pool = draws.pool[p]
        if pool.equal_share == equal_share:
            at = pool.first_node
            while at != _NOBODY:
                stream = draws.node[at].stream
                if draws.draw[stream].served != splitting:
                    _give(draws, stream, equal_share, p, splitting, now)
                at = draws.node[at].after
            pool.n_open = 0


@compiled
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
        at = pool.first_node if pool.n_special > 0 else _NOBODY
        while at != _NOBODY:
            stream = draws.node[at].stream
            draw = draws.draw[stream]
            if draw.met != splitting:
                draw.met = splitting
                if draw.max_rate < _NEVER:
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


@compiled
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
        set_due(draws.due, stream, now + draw.left / rate)


def new_draws(program: Program) -> Draws:
    """Nothing in progress and nothing due."""
    n_streams, n_pools = program.n_streams, program.n_pools
    width = int(np.diff(program.draw_start).max(initial=1))
    pool = np.zeros(n_pools, dtype=_POOL)
    pool["rate"] = program.pool_rate
    pool["first_node"] = _NOBODY
    node = np.zeros(n_streams * width, dtype=_NODE)
    node["stream"] = np.arange(len(node)) // width
    n_leaves = 1 << max(0, n_streams - 1).bit_length()
    return Draws(
        draw=np.zeros(n_streams, dtype=_DRAW),
        pool=pool,
        node=node,
        width=width,
        draw_pool=plain(program.draw_pool),
        due=np.full(2 * n_leaves, _NEVER),
        tally=np.zeros(2, dtype=np.int64),
        changed=np.empty(n_pools, dtype=np.int32),
        group=np.empty(n_pools, dtype=np.int32),
        capped=np.empty(n_streams, dtype=np.int32),
    )


def plain(array: npt.NDArray[_Item]) -> npt.NDArray[_Item]:
    """The array in the one memory layout that loops are compiled for; copied only if needed."""
    return np.require(array, requirements=["C", "A", "W"])
