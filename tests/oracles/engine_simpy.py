"""The engine's specification in SimPy: one process per stream, one object for all pools.

Written from the docstring of `Program`, slowly and plainly. The engine must agree with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from moesim.engine import Timeline
from moesim.program import Program

ROUNDING = 1e-12  # draws this close to their end, relative to their size, have ended


def simulate(program: Program) -> Timeline:
    """The timeline of a program, by discrete events."""
    env = simpy.Environment()
    pools = FairPools(env, [float(rate) for rate in program.pool_rate])
    ended = [env.event() for _ in range(program.n_tasks)]
    timeline = Timeline(np.full(program.n_tasks, np.nan), np.full(program.n_tasks, np.nan))
    for stream in range(program.n_streams):
        env.process(_stream(env, program, stream, pools, ended, timeline))
    env.run()
    return timeline


def _stream(
    env: simpy.Environment,
    program: Program,
    stream: int,
    pools: FairPools,
    ended: list[simpy.Event],
    timeline: Timeline,
) -> Iterator[simpy.Event]:
    """Run the tasks of one stream in order."""
    for task in np.flatnonzero(program.stream == stream):
        waits = program.wait_for[program.wait_start[task] : program.wait_start[task + 1]]
        yield env.all_of([ended[other] for other in waits])
        timeline.start_s[task] = env.now
        row = program.draw_pool[program.draw_start[task] : program.draw_start[task + 1]]
        drawn = pools.draw(program.bytes[task], list(row), program.max_rate[task])
        yield env.all_of([env.timeout(program.seconds[task]), drawn])
        timeline.end_s[task] = env.now
        ended[task].succeed()


@dataclass
class Flow:
    """One draw in progress."""

    size: float
    left: float
    pools: list[int]
    max_rate: float
    finished: simpy.Event
    rate: float = 0.0


class FairPools:
    """All draws in progress; whenever one begins or ends, all rates are worked out again."""

    def __init__(self, env: simpy.Environment, pool_rate: list[float]) -> None:
        self.env = env
        self.pool_rate = pool_rate
        self.flows: list[Flow] = []
        self.settled_at = 0.0
        self.plan = 0

    def draw(self, size: float, pools: list[int], max_rate: float) -> simpy.Event:
        """Begin to draw; the event happens when all bytes are drawn."""
        finished = self.env.event()
        if size == 0:
            finished.succeed()
        else:
            self._settle()
            self.flows.append(Flow(size, size, pools, max_rate, finished))
            self._plan()
        return finished

    def _settle(self) -> None:
        """Take what was drawn since the last change of rates from what is left."""
        for flow in self.flows:
            if flow.rate < np.inf:
                flow.left -= flow.rate * (self.env.now - self.settled_at)
        self.settled_at = self.env.now

    def _plan(self) -> None:
        """New rates; wake up when the first flows will end, unless the plan changes before."""
        self.plan += 1
        rates = fair_rates([(f.pools, f.max_rate) for f in self.flows], self.pool_rate)
        for flow, rate in zip(self.flows, rates, strict=True):
            flow.rate = rate
        if self.flows:
            delays = [max(flow.left, 0.0) / flow.rate for flow in self.flows]
            first = self.flows[int(np.argmin(delays))]
            self.env.process(self._wake(self.plan, min(delays), first))

    def _wake(self, plan: int, delay: float, first: Flow) -> Iterator[simpy.Event]:
        yield self.env.timeout(delay)
        if plan != self.plan:
            return
        self._settle()
        over = [f for f in self.flows if f is first or f.left <= ROUNDING * f.size]
        self.flows = [f for f in self.flows if all(f is not gone for gone in over)]
        for flow in over:
            flow.finished.succeed()
        self._plan()


def fair_rates(flows: list[tuple[list[int], float]], pool_rate: list[float]) -> list[float]:
    """Max-min fair rates of flows (pools, max_rate), by raising all rates together."""
    rate: list[Any] = [None] * len(flows)
    while None in rate:
        rising = [i for i, r in enumerate(rate) if r is None]
        limit = {}
        for i in rising:
            pools, max_rate = flows[i]
            limit[i] = max_rate
            for pool in pools:
                if pool_rate[pool] < np.inf:
                    users = [j for j in range(len(flows)) if pool in flows[j][0]]
                    taken = sum(rate[j] for j in users if rate[j] is not None)
                    n_rising = sum(rate[j] is None for j in users)
                    limit[i] = min(limit[i], (pool_rate[pool] - taken) / n_rising)
        level = min(limit.values())
        for i in rising:
            if limit[i] <= level * (1 + 1e-13):
                rate[i] = level
    return rate
