"""Steps of work from a trace: which tokens a serving system would run together.

Decode is lock-step continuous batching: every slot of the batch runs one request token by token,
and takes the next request when it ends. Prefill fills steps with requests one after the other.
A trace with too few requests for the batch is run again from random places ("resampled"): expert
popularity, reuse inside a request and co-activation survive that, the variety of requests in a
batch does not.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError
from traces.routing import DECODE, PREFILL, RoutingTrace

Rows = npt.NDArray[np.int64]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Steps:
    """Token rows of every step.

    rows       int64[steps, tokens_per_step] indices into the trace; column i is batch slot i, which
               a decode request keeps for its whole life
    resampled  whether tokens occur more than once, because the trace is too short for the batch
    """

    rows: Rows
    resampled: bool


def steps(trace: RoutingTrace, tokens_per_step: int, phase: Phase, seed: int) -> Steps:
    """All full steps that the trace's tokens of one phase make, requests in a shuffled order.

    tokens_per_step  tokens of a step over all ranks
    raises           TraceError when the trace has no token of the phase
    """
    if tokens_per_step < 1:
        raise TraceError(f"tokens_per_step={tokens_per_step}, expected at least 1")
    code = {"prefill": PREFILL, "decode": DECODE}.get(phase)
    if code is None:
        raise TraceError(f"phase={phase!r}, expected 'prefill' or 'decode'")
    of_phase = np.flatnonzero(trace.phase == code)
    if not len(of_phase):
        raise TraceError(f"the trace has no {phase} token; pass --phase for the other")
    rng = np.random.default_rng(seed)
    requests = _tokens_by_request(trace, of_phase)
    order = [requests[i] for i in rng.permutation(len(requests))]
    if phase == "prefill":
        return _in_a_row(np.concatenate(order), tokens_per_step)
    return _lock_step(order, tokens_per_step, rng)


def _tokens_by_request(trace: RoutingTrace, rows: Rows) -> list[Rows]:
    """The given rows, a piece per request, by position."""
    order = rows[np.lexsort((trace.position[rows], trace.request[rows]))]
    cuts = np.flatnonzero(np.diff(trace.request[order])) + 1
    return np.split(order, cuts)


def _in_a_row(tokens: Rows, tokens_per_step: int) -> Steps:
    """Full steps of consecutive tokens; a trace shorter than a step is repeated to fill one."""
    if len(tokens) < tokens_per_step:
        return Steps(np.resize(tokens, (1, tokens_per_step)), resampled=True)
    n_steps = len(tokens) // tokens_per_step
    rows = tokens[: n_steps * tokens_per_step].reshape(n_steps, tokens_per_step)
    return Steps(rows, resampled=False)


def _lock_step(requests: list[Rows], n_slots: int, rng: np.random.Generator) -> Steps:
    """One request per slot at a time; stops before a step in which a slot would stand idle."""
    n_tokens = sum(len(tokens) for tokens in requests)
    resampled = len(requests) < n_slots or n_tokens < n_slots
    n_steps = max(1, n_tokens // n_slots) if resampled else n_tokens // n_slots
    rows = np.full((n_steps, n_slots), -1, dtype=np.int64)
    free = [(0, slot) for slot in range(n_slots)]  # (step from which the slot is free, slot)
    served = 0
    while free[0][0] < n_steps and (resampled or served < len(requests)):
        start, slot = heapq.heappop(free)
        tokens = requests[served % len(requests)]
        if resampled:
            tokens = np.roll(tokens, -int(rng.integers(len(tokens))))
        served += 1
        end = min(start + len(tokens), n_steps)
        rows[start:end, slot] = tokens[: end - start]
        heapq.heappush(free, (end, slot))
    full = free[0][0]
    if full == 0:
        raise TraceError(f"no step of {n_slots} tokens: {len(requests)} requests are too short")
    return Steps(rows[:full], resampled)
