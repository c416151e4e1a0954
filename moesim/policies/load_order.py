"""In which order a layer's experts are loaded, and how long loading and computing then take.

What a layer needs is a table of tokens by expert and precision. A cell is a segment: its planes
must be read, then its tokens can be computed. Reading is one queue, computing another that follows
the same order, so a layer is a flow shop of two machines. Precisions are nested: a cell's planes
come after those of the same expert's lower cells, which it then only adds to.

Whole experts are the special case of one column: `tokens[:, None]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError

Longs = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]
Order = Callable[[Longs], Longs]
"""int64[experts, precisions], tokens that ask for each (0: nobody does; precisions rise) ->
int64[segments], the cells asked for as `expert * precisions + precision`, first to be loaded first.
"""


def layer_order(tokens: Longs) -> Longs:
    """Experts as they are numbered, low precisions first."""
    return np.flatnonzero(_checked(tokens))


def popularity_order(tokens: Longs) -> Longs:
    """The expert with most tokens first, all its precisions at once; of equals the lower expert.

    source  prefill of Fate (arXiv 2502.12224): the long computations hide the loads behind them
    """
    cells = np.flatnonzero(_checked(tokens))
    of_expert = tokens.sum(axis=1)[cells // tokens.shape[1]]
    return cells[np.lexsort((cells, -of_expert))]


def hebf_order(tokens: Longs) -> Longs:
    """Hottest expert, lowest bit first: of all experts' next precisions the one with most tokens.

    Of equals the lower expert. A cell waits for the lower ones of its expert, so it goes when the
    smallest count among it and those does: the order is a sort by that.
    source  D2MoE (arXiv 2504.15299), HEBF
    """
    cells = np.flatnonzero(_checked(tokens))
    asked = np.where(tokens > 0, tokens, np.iinfo(np.int64).max)
    turn = np.minimum.accumulate(asked, axis=1).ravel()[cells]
    return cells[np.lexsort((cells, -turn))]


ORDERS: Mapping[str, Order] = MappingProxyType(
    {"layer": layer_order, "popularity": popularity_order, "hebf": hebf_order}
)


def order_by_name(name: str) -> Order:
    """One of ORDERS; SimulationError lists the known ones."""
    if name not in ORDERS:
        raise SimulationError(f"load order {name!r} is unknown, known: {', '.join(ORDERS)}")
    return ORDERS[name]


def keeps_nesting(order: Longs, n_precisions: int) -> bool:
    """Whether no expert's higher precision comes before a lower one of it."""
    by_expert = np.argsort(order // n_precisions, kind="stable")
    expert, place = order[by_expert] // n_precisions, order[by_expert] % n_precisions
    return bool(((np.diff(expert) > 0) | (np.diff(place) > 0)).all())


# --- time ---------------------------------------------------------------------------------------


def computed_s(ready_s: Seconds, compute_s: Seconds) -> Seconds:
    """float64[segments]: when each is computed, one after the other, none before it is ready.

    ready_s    float64[segments], when its planes have been read; np.cumsum of seconds of reading
               where one read follows another from second 0
    compute_s  float64[segments], >= 0
    """
    worked = np.cumsum(compute_s)
    return np.asarray(worked + np.maximum.accumulate(ready_s - worked + compute_s))


def bubbles_s(io_s: Seconds, compute_s: Seconds) -> Seconds:
    """float64[segments]: idle seconds before each: max(0, C_io(s) - C_comp(s - 1)).

    io_s, compute_s  float64[segments], >= 0, in the order in which they go
    """
    ready_s = np.cumsum(io_s)
    before = np.concatenate(([0.0], computed_s(ready_s, compute_s)[:-1]))[: len(io_s)]
    return np.maximum(0.0, ready_s - before)


def makespan_s(io_s: Seconds, compute_s: Seconds) -> float:
    """When the last segment is computed; 0 without segments."""
    return float(computed_s(np.cumsum(io_s), compute_s)[-1]) if len(io_s) else 0.0


def johnson_order(io_s: Seconds, compute_s: Seconds) -> Longs:
    """int64[segments], the best order of all when segments may go in any: ties as given.

    Where nesting forbids some orders, its makespan is a bound that none of the others beats.
    source  Johnson 1954: those that read faster than they compute, by rising reading; then the
            others, by falling computing
    """
    first = io_s < compute_s
    key = np.where(first, io_s, -compute_s)
    return np.lexsort((np.arange(len(io_s)), key, ~first)).astype(np.int64)


def bound_s(io_s: Seconds, compute_s: Seconds) -> float:
    """Seconds that no order beats, whatever is nested in what."""
    best = johnson_order(io_s, compute_s)
    return makespan_s(io_s[best], compute_s[best])


def _checked(tokens: Longs) -> Longs:
    if tokens.ndim != 2 or (tokens < 0).any():
        raise SimulationError(
            f"tokens: shape {tokens.shape}, expected [experts, precisions] of 0 or more"
        )
    return tokens
