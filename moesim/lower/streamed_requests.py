"""Offline requests on a box that streams its weights: which tokens run in which iteration.

All requests wait from the start, so decisions do not depend on how long an iteration takes:
`schedule` replays the scheduler, and the caller prices all iterations at once. The scheduler is
that of MoE-Lens: decoding sequences go first, then prompts fill the iteration up to a number of
tokens; when pages of the KV cache run out the newest sequence leaves, its pages are free, and it
waits at the head of the queue to be prefilled again with what it has generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError

Longs = npt.NDArray[np.int64]
_FIELDS = 4  # columns of an iteration: decoded, prefilled, pages in use, KV tokens resident


@dataclass(frozen=True, slots=True)
class Scheduler:
    """How requests are admitted.

    n_pages, page_tokens  the KV cache
    most_tokens     decoded and prefilled tokens of one iteration (n_real)
    per_iteration   most new requests per iteration, on average; 0 for as many as fit
    phases_apart    a batch is admitted with room for its whole output, prefilled, and decoded to
                    its end before the next is admitted
    """

    n_pages: int
    page_tokens: int
    most_tokens: int
    per_iteration: float = 0.0
    phases_apart: bool = False

    def __post_init__(self) -> None:
        for field in ("n_pages", "page_tokens", "most_tokens"):
            if getattr(self, field) < 1:
                raise SimulationError(f"{field}={getattr(self, field)}, expected at least 1")
        if not self.per_iteration >= 0:
            raise SimulationError(f"per_iteration={self.per_iteration}, expected >= 0")


@dataclass(frozen=True, slots=True)
class Iterations:
    """What ran in each iteration, int64[iterations].

    decoded      decoding sequences, one token each; prefilled prompt tokens, recomputed included
    pages        in use at the end; kv_tokens resident at the end
    finished_at  int64[requests], iteration of the last token
    n_preempted  how often a sequence had to leave
    """

    decoded: Longs
    prefilled: Longs
    pages: Longs
    kv_tokens: Longs
    finished_at: Longs
    n_preempted: int

    @property
    def n_iterations(self) -> int:
        """Number of iterations."""
        return len(self.decoded)


def schedule(prompt: npt.ArrayLike, output: npt.ArrayLike, scheduler: Scheduler) -> Iterations:
    """Run all requests to their end.

    prompt, output  int[requests], >= 1; a request is prefilled once and then decoded `output`
                    times, so it occupies prompt + j tokens for j = 0..output, as MoE-Lens counts
    raises          SimulationError for a request that can never fit, by number
    """
    prompts, outputs = _lengths("prompt", prompt), _lengths("output", output)
    if len(prompts) != len(outputs):
        raise SimulationError(f"{len(prompts)} prompts and {len(outputs)} outputs, expected equal")
    _check_fits(prompts + outputs, scheduler)
    rows, finished, preempted = _run(
        prompts,
        outputs,
        np.array([scheduler.n_pages, scheduler.page_tokens, scheduler.most_tokens]),
        scheduler.per_iteration,
        scheduler.phases_apart,
    )
    decoded, prefilled, pages, kv_tokens = np.ascontiguousarray(rows.T)
    return Iterations(decoded, prefilled, pages, kv_tokens, finished, int(preempted))


def _lengths(field: str, values: npt.ArrayLike) -> Longs:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < 1):
        raise SimulationError(f"{field}: expected whole numbers >= 1, one per request")
    return array.astype(np.int64)


def _check_fits(total: Longs, scheduler: Scheduler) -> None:
    pages = -(-total // scheduler.page_tokens)
    for limit, need, words in (
        (scheduler.n_pages, pages, "KV pages"),
        (scheduler.most_tokens, total, "tokens in one iteration"),
    ):
        if len(need) and need.max() > limit:
            request = int(need.argmax())
            raise SimulationError(
                f"request {request} needs {need[request]} {words}, there are {limit}"
            )


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _run(
    prompt: Longs, output: Longs, limits: Longs, per_iteration: float, apart: bool
) -> tuple[Any, Any, int]:
    """The loop. State of a request: generated tokens and pages; running ones by age of entry."""
    n_pages, page, most = limits
    n = len(prompt)
    generated, pages = np.zeros(n, np.int64), np.zeros(n, np.int64)
    finished = np.zeros(n, np.int64)
    queue, head = np.arange(n), 0
    running, n_running = np.empty(n, np.int64), 0
    rows = np.empty((1024, _FIELDS), np.int64)
    n_rows, n_done, preempted, free, kv, credit = 0, 0, 0, n_pages, 0, 0.0
    decoding = False  # with phases apart: the batch is complete
    while n_done < n:
        decoded, at = 0, 0
        while at < n_running and (decoding or not apart):
            r = running[at]
            if not apart and (prompt[r] + generated[r]) == pages[r] * page:
                while free == 0:
                    n_running -= 1
                    newest = running[n_running]
                    free += pages[newest]
                    kv -= prompt[newest] + generated[newest]
                    pages[newest] = 0
                    head -= 1
                    queue[head] = newest
                    preempted += 1
                    if newest == r:
                        break
                if pages[r] == 0:
                    break
                free -= 1
                pages[r] += 1
            generated[r] += 1
            kv += 1
            decoded += 1
            at += 1
        prefilled, n_old, credit = 0, n_running, credit + per_iteration
        while head < n and not (apart and decoding):
            r = queue[head]
            need = prompt[r] + generated[r]
            held = prompt[r] + output[r] if apart else need
            if decoded + prefilled + need > most or (held + page - 1) // page > free:
                break
            if per_iteration > 0.0 and credit < 1.0:
                break
            credit -= 1.0 if per_iteration > 0.0 else 0.0
            head += 1
            pages[r] = (held + page - 1) // page
            free -= pages[r]
            kv += need
            prefilled += need
            running[n_running] = r
            n_running += 1
        if apart and prefilled == 0:
            decoding = True
        if n_rows == len(rows):
            longer = np.empty((2 * n_rows, _FIELDS), np.int64)
            longer[:n_rows] = rows
            rows = longer
        rows[n_rows] = (decoded, prefilled, n_pages - free, kv)
        kept = 0
        for i in range(n_running):
            r = running[i]
            if i < n_old and generated[r] == output[r]:
                free += pages[r]
                kv -= prompt[r] + output[r]
                pages[r] = 0
                finished[r] = n_rows
                n_done += 1
            else:
                running[kept] = r
                kept += 1
        n_running = kept
        decoding = decoding and n_running > 0
        if decoded + prefilled > 0:
            n_rows += 1
    return rows[:n_rows], finished, preempted
