"""The clock of the runtime's `lru_prefetch`: one thread computes, another reads, gate by gate.

The reading thread finishes the read in progress, then does what is needed, then what was asked for
ahead; each kind in the order asked. A read that has not begun is dropped when its slot is given
away. So what it does next is known at a gate only from what the clock said so far: each gap between
two gates is a program of its own, and the read in progress at its end goes on in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moesim import engine
from moesim.errors import SimulationError
from moesim.lower.runtime import READY, Beside, Gap, Parts, between_gates
from moesim.offload.decisions import DEMAND, LOADED, NO_LOAD, NO_VICTIM, Decisions
from traces.layer_steps import LayerSteps

Longs = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Clocked:
    """What tokens took.

    step_s   float64[tokens], a token through all layers; stall_s, waiting for reads, part of it
    late     int64[tokens], experts that were on their way and waited for
    dropped  int64[tokens], reads ahead given up before they began
    """

    step_s: Doubles
    stall_s: Doubles
    late: Longs
    dropped: Longs


@dataclass(slots=True)
class Reads:
    """Reads asked for and not done; a load is its place in `Decisions.loads`.

    Laws: one read at a time, never left idle while any is asked for; one in progress is finished.
    """

    running: int = NO_LOAD
    left_s: float = 0.0
    urgent: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)

    @property
    def in_order(self) -> list[int]:
        """Loads in the order in which they will be done, if nothing more is asked for."""
        return [*([] if self.running == NO_LOAD else [self.running]), *self.urgent, *self.ahead]

    def hurry(self, loads: Sequence[int]) -> list[int]:
        """These are needed now; returns those that have not come yet."""
        for load in loads:
            if load in self.ahead:
                self.ahead.remove(load)
                self.urgent.append(load)
        late = set(self.in_order)
        return [load for load in loads if load in late]

    def drop(self, load: int) -> bool:
        """Its slot is given away; False when it has begun or is done."""
        for queue in (self.urgent, self.ahead):
            if load in queue:
                queue.remove(load)
                return True
        return False

    def seconds(self, parts: Parts) -> list[float]:
        """Seconds of each read of `in_order`; the first of an idle thread is upon no other."""
        n_waiting = len(self.urgent) + len(self.ahead)
        if self.running != NO_LOAD:
            return [self.left_s] + [parts.read_beside_s] * n_waiting
        return [parts.read_s, *[parts.read_beside_s] * n_waiting][:n_waiting]

    def advance(self, to_s: float, start_s: Doubles, end_s: Doubles) -> None:
        """The clock went on; start and end of each read of `in_order`."""
        loads = self.in_order
        begun = int((start_s < to_s).sum())
        done = int((end_s <= to_s).sum())
        waiting = set(loads[begun:])
        self.urgent = [load for load in self.urgent if load in waiting]
        self.ahead = [load for load in self.ahead if load in waiting]
        self.running, self.left_s = NO_LOAD, 0.0
        if done < begun:
            self.running, self.left_s = loads[done], float(end_s[done]) - to_s


def clock(work: LayerSteps, decided: Decisions, parts: Parts, first: int, chunk: int) -> Clocked:
    """Run the tokens from `first` on, each a pass of its own.

    chunk   tokens after which the reader is waited for, outside any step
    raises  SimulationError when the decisions do not say who left for a load
    """
    beside, asked = Beside.of(parts), _Asked(work, decided)
    n_tokens, n_layers = work.n_steps // work.n_layers, work.n_layers
    step_s, stall_s = np.zeros((2, n_tokens))
    late, dropped = np.zeros((2, n_tokens), np.int64)
    for begin in range(first, n_tokens, chunk):
        end = min(begin + chunk, n_tokens)
        reads = Reads()
        step_s[begin] += parts.dense_s
        for step in range(begin * n_layers, end * n_layers):
            token, last = step // n_layers, step + 1 == end * n_layers
            n_late, n_dropped, waits = asked.at_gate(reads, step)
            late[token] += n_late
            dropped[token] += n_dropped
            wakes = reads.running == NO_LOAD and bool(reads.in_order)
            gap = Gap(wakes, reads.seconds(parts), waits, not last)
            layer_s, dense_s, waited_s = _run(gap, reads, parts, beside)
            step_s[token] += layer_s
            stall_s[token] += waited_s
            if not last:
                step_s[(step + 1) // n_layers] += dense_s
    kept = slice(first, None)
    return Clocked(step_s[kept], stall_s[kept], late[kept], dropped[kept])


class _Asked:
    """What every gate asks of the reader."""

    def __init__(self, work: LayerSteps, decided: Decisions) -> None:
        n_steps, loads, victim = work.n_steps, decided.loads, decided.loads.victim
        if victim is None:
            raise SimulationError("decisions: no victims, needed to know which reads are dropped")
        self._cells = work.start.tolist()
        self._first = np.searchsorted(loads.step, np.arange(n_steps + 1)).tolist()
        self._place, self._load = decided.place.tolist(), decided.load.tolist()
        self._demand = (loads.kind == DEMAND).tolist()
        self._drops = _load_before(loads.object, victim)

    def at_gate(self, reads: Reads, step: int) -> tuple[int, int, list[int]]:
        """Late experts, dropped reads, and what each expert waits for in the order computed."""
        cells = range(self._cells[step], self._cells[step + 1])
        missing = [self._load[cell] for cell in cells if self._place[cell] == LOADED]
        coming = [self._load[cell] for cell in cells if self._place[cell] != LOADED]
        late = reads.hurry([load for load in coming if load != NO_LOAD])
        n_dropped = 0
        for load in range(self._first[step], self._first[step + 1]):
            n_dropped += self._drops[load] != NO_LOAD and reads.drop(self._drops[load])
            (reads.urgent if self._demand[load] else reads.ahead).append(load)
        place = {load: i for i, load in enumerate(reads.in_order)}
        ready = [READY] * (len(coming) - len(late))
        return len(late), n_dropped, ready + [place[load] for load in (*late, *missing)]


def _load_before(objects: npt.NDArray[np.int32], victim: npt.NDArray[np.int32]) -> list[int]:
    """Of each load, the one that brought the copy which leaves for it, NO_LOAD for none."""
    brought_by: dict[int, int] = {}
    before = []
    for load, (new, old) in enumerate(zip(objects.tolist(), victim.tolist(), strict=True)):
        before.append(NO_LOAD if old == NO_VICTIM else brought_by.get(old, NO_LOAD))
        brought_by[new] = load
    return before


def _run(gap: Gap, reads: Reads, parts: Parts, beside: Beside) -> tuple[float, float, float]:
    """Seconds to the end of the layer, of the dense part behind it, and waited for reads."""
    timeline = engine.run(between_gates(gap, parts, beside))
    start_s, end_s = timeline.start_s, timeline.end_s
    first, loop = 1 + len(gap.reads), 1 + len(gap.reads) + len(gap.waits)
    began_s = np.concatenate((end_s[:1], end_s[first : loop - 1]))  # of waiting for each expert
    gate_s = float(end_s[-1])
    reads.advance(gate_s, start_s[1:first], end_s[1:first])
    layer_s = float(end_s[loop])
    return layer_s, gate_s - layer_s, float((start_s[first:loop] - began_s).sum())
