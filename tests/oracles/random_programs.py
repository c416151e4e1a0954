"""Random programs for property tests: many ties, zeros, infinities and tasks on several pools."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from moesim.builder import Draw, ProgramBuilder
from moesim.program import Program

INF = float("inf")
SECONDS = st.sampled_from([0.0, 0.0, 0.25, 1.0, 1.0, 3.0]) | st.floats(0.0, 5.0)
BYTES = st.sampled_from([0.0, 1.0, 1.0, 2.0, 6.0]) | st.floats(1e-6, 20.0)
RATES = st.sampled_from([0.5, 1.0, 1.0, 3.0, INF]) | st.floats(0.05, 20.0)
MAX_RATES = st.sampled_from([INF, INF, INF, 0.5, 1.0]) | st.floats(0.05, 20.0)


@st.composite
def programs(draw: st.DrawFn, max_tasks: int = 40, max_pools: int = 3) -> Program:
    """Up to max_tasks tasks on 1 to 4 streams and 0 to max_pools pools."""
    builder = ProgramBuilder()
    n_streams = draw(st.integers(1, 4))
    n_pools = draw(st.integers(0, max_pools))
    for stream in range(n_streams):
        builder.stream(f"stream {stream}")
    for pool in range(n_pools):
        builder.pool(f"pool {pool}", draw(RATES))
    pools = st.lists(st.integers(0, n_pools - 1), unique=True) if n_pools else st.just([])
    for task in range(draw(st.integers(0, max_tasks))):
        waits = st.lists(st.integers(0, task - 1), max_size=2) if task else st.just([])
        amount = Draw(draw(BYTES), draw(pools), draw(MAX_RATES)) if draw(st.booleans()) else None
        stream = draw(st.integers(0, n_streams - 1))
        builder.append(stream, draw(SECONDS), draw(waits), amount or Draw(0.0))
    return builder.build()


def pool_free_programs() -> st.SearchStrategy[Program]:
    """Programs whose tasks share nothing."""
    return programs(max_pools=0)


def same(program: Program, **changed: object) -> Program:
    """A copy of a program with some of its arrays replaced."""
    fields = {name: getattr(program, name) for name in Program.__slots__}
    return Program(**(fields | changed))


def random_program(rng: np.random.Generator, n_tasks: int, n_streams: int, n_pools: int) -> Program:
    """A large random program with draws on up to two pools."""
    builder = ProgramBuilder()
    for stream in range(n_streams):
        builder.stream(f"stream {stream}")
    for pool in range(n_pools):
        builder.pool(f"pool {pool}", float(rng.uniform(0.5, 2.0)))
    task = np.arange(n_tasks)
    waits = task[:, None] - rng.integers(1, 30, (n_tasks, 2))
    waits[(waits < 0) | (rng.random(waits.shape) < 0.5)] = -1
    pools = rng.permuted(np.tile(np.arange(n_pools), (n_tasks, 1)), axis=1)[:, :2]
    pools[rng.random(pools.shape) < 0.4] = -1
    builder.extend(
        rng.integers(0, n_streams, n_tasks),
        rng.choice([0.0, 1.0], n_tasks) * rng.random(n_tasks),
        waits,
        Draw(rng.choice([0.0, 1.0], n_tasks) * rng.random(n_tasks), pools, rng.choice([INF, 0.3])),
    )
    return builder.build()
