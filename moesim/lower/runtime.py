"""Layers of the runtime in `kernels/offload` -> Programs: one thread computes, another may read.

Without a thread that reads, all is one stream and times add up (`inline_program`). With one, what
it does next depends on what has been asked for so far, so that a program runs from one gate to the
next only (`between_gates`): there the queue of reads is known.

A read beside the computation slows it and keeps its own pace. Both draw on one pool of rate 1: a
read at `Beside.read` at most, which is never more than its fair half, and the computation gets the
rest. So max-min sharing gives the measured slow-down, exactly while it is below a factor of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.builder import NONE, Draw, ProgramBuilder
from moesim.program import Names, Program

Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

THREADS = ("main thread", "reader")
MAIN, READER = 0, 1
READY = -1
"""What an expert waits for that is there already."""
MOST = 0.5  # of the pool: a draw's fair share beside one other


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of the parts of a layer, under the names of the runtime's `Costs`.

    loop_inline_s, loop_background_s  what a layer takes beyond its matrices and reads
    """

    dense_s: float
    dense_after_reads_s: float
    dense_beside_s: float
    expert_s: float
    expert_read_s: float
    expert_beside_s: float
    read_s: float
    read_next_s: float
    read_beside_s: float
    handoff_s: float
    loop_inline_s: float
    loop_background_s: float


@dataclass(frozen=True, slots=True)
class Beside:
    """Rates at which a read, the dense part and an expert draw on a pool of rate 1.

    The one that a read slows most draws at 1. The other draws at less, so that the same read takes
    less of its time: rate = (1 - read) / (its speed beside a read over its speed alone).
    capped  whether the measured slow-down is above a factor of two, which sharing cannot give
    """

    read: float
    dense: float
    expert: float
    capped: bool = False

    @classmethod
    def of(cls, parts: Parts) -> Beside:
        """Of measured parts; one that is not slower beside a read is not slowed."""
        slowed = [
            max(0.0, 1.0 - alone / beside)
            for alone, beside in (
                (parts.dense_s, parts.dense_beside_s),
                (parts.expert_s, parts.expert_beside_s),
            )
        ]
        read = min(max(slowed), MOST)
        dense, expert = (min(1.0, (1.0 - read) / (1.0 - share)) for share in slowed)
        return cls(read, dense, expert, max(slowed) > MOST)


@dataclass(frozen=True, slots=True)
class InlineProgram:
    """A program of tokens on one thread.

    token_end  int64[tokens], the last task of each; read, bool[tasks], whether a task is a read
    """

    program: Program
    names: Names
    token_end: Longs
    read: npt.NDArray[np.bool_]


def inline_program(misses: Longs, top_k: int, parts: Parts) -> InlineProgram:
    """Tokens one after the other; in a layer those resident compute, then each miss is read.

    misses  int64[tokens, layers], experts of the layer that must be read
    """
    n = misses.size
    builder = ProgramBuilder()
    main = builder.stream(THREADS[MAIN])
    kinds = (("dense part", "compute"), ("resident experts", "compute"))
    labels = [builder.label(*kind) for kind in kinds]
    labels += [builder.label("read", "read"), builder.label("expert after its read", "compute")] * (
        top_k
    )
    of_step = np.zeros((n, len(labels)))
    of_step[:, 0] = parts.loop_inline_s + _dense_s(misses.ravel(), top_k, parts)
    of_step[:, 1] = (top_k - misses.ravel()) * parts.expert_s
    read = np.arange(top_k) < misses.reshape(-1, 1)
    of_step[:, 2::2] = read * np.where(np.arange(top_k) == 0, parts.read_s, parts.read_next_s)
    of_step[:, 3::2] = read * parts.expert_read_s
    builder.extend(main, of_step.ravel(), label=np.tile(labels, n))
    per_token = misses.shape[1] * len(labels)
    is_read = np.zeros((n, len(labels)), np.bool_)
    is_read[:, 2::2] = read
    token_end = np.arange(1, len(misses) + 1, dtype=np.int64) * per_token - 1
    return InlineProgram(builder.build(), builder.names(), token_end, is_read.ravel())


def _dense_s(misses: Longs, top_k: int, parts: Parts) -> Doubles:
    """Seconds of the dense part of each layer-step, float64[layer-steps].

    Calibrated after layers that read none or one of their experts, and all; in between by a line.
    """
    before = np.concatenate(([0], misses[:-1])).astype(np.float64)
    share = (before - 1) / (top_k - 1) if top_k > 1 else before
    more = parts.dense_after_reads_s - parts.dense_s
    return np.asarray(parts.dense_s + np.clip(share, 0.0, 1.0) * more)


@dataclass(frozen=True, slots=True)
class Gap:
    """What happens from one gate to the next.

    wakes   whether a reader that was idle is woken for the first read; that costs both threads
    reads   seconds of the reads under way or asked for, in the order in which they are done
    waits   for each chosen expert in the order computed, the read it waits for, READY for none
    dense   whether the dense part of another layer follows
    """

    wakes: bool
    reads: Sequence[float]
    waits: Sequence[int]
    dense: bool


def between_gates(gap: Gap, parts: Parts, beside: Beside) -> Program:
    """Task 0 wakes the reader; reads are tasks 1.. on their stream; then the experts, the loop, and
    the dense part if any.

    What the other thread has read is in none of this one's caches: all experts take as long.
    """
    n_reads, n_experts, n_dense = len(gap.reads), len(gap.waits), int(gap.dense)
    seconds = [parts.handoff_s * gap.wakes, *gap.reads, *[parts.expert_s] * n_experts]
    seconds += [parts.loop_background_s, *[parts.dense_s] * n_dense]
    rate = np.array(
        [0.0] + [beside.read] * n_reads + [beside.expert] * n_experts + [0.0]
        + [beside.dense] * n_dense
    )  # fmt: skip
    waits = [NONE] + [0 if gap.wakes else NONE] * n_reads
    waits += [NONE if wait == READY else 1 + wait for wait in gap.waits]
    builder = ProgramBuilder()
    for name in THREADS:
        builder.stream(name)
    pool = builder.pool("what both threads share", 1.0)
    drawn = rate > 0
    builder.extend(
        np.array([MAIN] + [READER] * n_reads + [MAIN] * (n_experts + 1 + n_dense)),
        np.where(drawn, 0.0, seconds),
        np.array(waits + [NONE] * (1 + n_dense)),
        Draw(rate * seconds, np.where(drawn, pool, NONE), np.where(drawn, rate, np.inf)),
    )
    return builder.build()
