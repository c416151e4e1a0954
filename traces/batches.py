"""Steps of work from a trace: which tokens a serving system would run together.

Decode is lock-step continuous batching: every slot of the batch runs one request token by token,
and takes the next request when it ends. Prefill fills steps with requests one after the other, a
long one going on in the next step (chunked prefill). A trace that logged forward passes can be run
as it was instead.

A trace with fewer requests than slots is run again and again, every run from a random token of its
request on and round to it ("resampled"). What survives that: the popularity of experts, which
experts one token chooses together and from layer to layer, and reuse inside a request but for the
one seam of each run. What does not: the variety of requests in a batch, so that a step touches
fewer distinct experts and its load is less even than with as many real requests; and the
independence of steps, so that an error bar over steps is too narrow.
"""

from __future__ import annotations

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
    resampled  whether tokens may occur more than once, because the trace is too short for the batch
    left_out   tokens of the phase that are in no step: after the last full one, or, when forward
               passes were asked for, in passes of another size or kind
    """

    rows: Rows
    resampled: bool
    left_out: int = 0


def steps(
    trace: RoutingTrace, tokens_per_step: int, phase: Phase, seed: int, by_forward: bool = False
) -> Steps:
    """All full steps that the trace's tokens of one phase make, requests in a shuffled order.

    tokens_per_step  tokens of a step over all ranks
    by_forward       instead, the logged forward passes that held exactly tokens_per_step tokens,
                     all of this phase, in the order they ran
    raises           TraceError when the trace has no token of the phase, or no such forward pass
    """
    if tokens_per_step < 1:
        raise TraceError(f"tokens_per_step={tokens_per_step}, expected at least 1")
    code = {"prefill": PREFILL, "decode": DECODE}.get(phase)
    if code is None:
        raise TraceError(f"phase={phase!r}, expected 'prefill' or 'decode'")
    of_phase = np.flatnonzero(trace.phase == code)
    if not len(of_phase):
        raise TraceError(f"the trace has no {phase} token; pass --phase for the other")
    if by_forward:
        rows, resampled = _as_logged(trace, code, tokens_per_step), False
    else:
        rows, resampled = _batched(trace, of_phase, tokens_per_step, seed)
    seen = np.zeros(trace.n_tokens, dtype=bool)
    seen[rows] = True
    return Steps(rows, resampled, len(of_phase) - int(seen.sum()))


def source_rank(made: Steps, n_ranks: int) -> npt.NDArray[np.int32]:
    """int32[tokens_per_step]: the rank that runs attention for each slot, the same in every step.

    Data-parallel attention in equal consecutive blocks: slot i is on rank i // (slots / n_ranks),
    and a decode request stays on its rank because it stays in its slot.
    raises  TraceError when the slots cannot be shared out equally
    """
    n_slots = made.rows.shape[1]
    if n_ranks < 1 or n_slots % n_ranks:
        raise TraceError(f"n_ranks={n_ranks}, expected a divisor of {n_slots} tokens per step")
    return np.repeat(np.arange(n_ranks, dtype=np.int32), n_slots // n_ranks)


def _batched(
    trace: RoutingTrace, of_phase: Rows, tokens_per_step: int, seed: int
) -> tuple[Rows, bool]:
    """Steps of the given rows, and whether they are resampled."""
    rng = np.random.default_rng(seed)
    tokens = of_phase[np.lexsort((trace.position[of_phase], trace.request[of_phase]))]
    cuts = np.flatnonzero(np.diff(trace.request[tokens])) + 1
    start = np.concatenate(([0], cuts))
    size = np.diff(np.append(start, len(tokens)))
    order = rng.permutation(len(start))
    if trace.phase[of_phase[0]] == DECODE:
        return _lock_step(tokens, start[order], size[order], tokens_per_step, rng)
    whole = np.repeat(start[order] - (np.cumsum(size[order]) - size[order]), size[order])
    return _in_a_row(tokens[whole + np.arange(len(tokens))], tokens_per_step)


def _in_a_row(tokens: Rows, tokens_per_step: int) -> tuple[Rows, bool]:
    """Full steps of consecutive tokens; a trace shorter than a step is repeated to fill one."""
    if len(tokens) < tokens_per_step:
        return np.resize(tokens, (1, tokens_per_step)), True
    n_steps = len(tokens) // tokens_per_step
    return tokens[: n_steps * tokens_per_step].reshape(n_steps, tokens_per_step), False


def _lock_step(
    tokens: Rows, start: Rows, size: Rows, n_slots: int, rng: np.random.Generator
) -> tuple[Rows, bool]:
    """One request per slot at a time; stops before a step in which a slot would stand idle."""
    from traces.batch_kernels import lock_step

    resampled = len(size) < n_slots
    rows = np.empty((max(1, len(tokens) // n_slots), n_slots), dtype=np.int64)
    offset = np.zeros(len(size), dtype=np.int64)
    if resampled:
        # every slot ends at most one run before its time, so this many are enough
        n_runs = n_slots + -(-rows.size // int(size.min()))
        offset = rng.integers(0, size[np.arange(n_runs) % len(size)])
    full = lock_step(size, offset, start, rows)
    return tokens[rows[:full]], resampled


def _as_logged(trace: RoutingTrace, code: int, tokens_per_step: int) -> Rows:
    """Rows of the forward passes of exactly tokens_per_step tokens, all of the phase."""
    if trace.forward is None:
        raise TraceError("by_forward: the trace logs no forward passes (no forward column)")
    order = np.argsort(trace.forward, kind="stable")
    start = np.concatenate(([0], np.flatnonzero(np.diff(trace.forward[order])) + 1))
    size = np.diff(np.append(start, len(order)))
    of_phase = np.add.reduceat((trace.phase[order] == code).astype(np.int64), start)
    pure = size == of_phase
    fitting = pure & (size == tokens_per_step)
    if not fitting.any():
        sizes = f"{size[pure].min()}..{size[pure].max()} tokens" if pure.any() else "both phases"
        raise TraceError(
            f"tokens_per_step={tokens_per_step}: no forward pass of exactly that many tokens of the"
            f" phase and no others; the passes logged hold {sizes}"
        )
    return np.asarray(order[start[fitting][:, None] + np.arange(tokens_per_step)])
