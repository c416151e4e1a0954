"""How fast the engine is: tasks/s on one core, beside SimPy and beside the memory's limit.

Run: python benchmarks/engine.py [--small]

Each case runs one program through the engine (best of three, CPU seconds) and a short program of
the same make through the SimPy twin of tests/oracles. The limit is the time one core needs to
move, once, the bytes of the tasks that must be read and written (44 a task, 4 a wait, 4 a pool);
sharing pools also needs at least one division per draw whose rate changes, which is not in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.builder import NONE, Draw, ProgramBuilder
from moesim.engine import run
from moesim.program import Program

TWIN = Path(__file__).resolve().parents[1] / "tests" / "oracles" / "engine_simpy.py"


@dataclass(frozen=True)
class Case:
    """One kind of program: a name, how to make it with n tasks, and n for SimPy."""

    name: str
    make: Callable[[int], Program]
    n_simpy: int = 4_000


@dataclass(frozen=True)
class Row:
    """One line of the table; the last field is how far engine and twin are apart at most."""

    name: str
    tasks: int
    tasks_per_s: float
    simpy_tasks_per_s: float
    limit_tasks_per_s: float
    difference: float


def fixed_tasks(n: int) -> Program:
    """No pools: 8 streams, each task waits for 1 or 2 of the 40 tasks before it."""
    rng, builder = np.random.default_rng(0), _streams(8)
    waits = np.arange(n)[:, None] - rng.integers(1, 40, (n, 2))
    waits[:, 1][rng.random(n) < 0.5] = NONE
    builder.extend(rng.integers(0, 8, n), rng.random(n), np.maximum(waits, NONE))
    return builder.build()


def one_pool(n_draws: int) -> Callable[[int], Program]:
    """One pool, n_draws streams that draw from it without a pause."""

    def make(n: int) -> Program:
        rng, builder = np.random.default_rng(0), _streams(n_draws)
        pool = builder.pool("memory", 1e12)
        builder.extend(np.arange(n) % n_draws, draw=Draw(rng.uniform(1e3, 1e6, n), pool))
        return builder.build()

    return make


def copies_over_two_pools(n: int) -> Program:
    """16 streams, each copy over 2 of 4 pools, a third of them with a maximum of their own.

    Never idle and all tied together, such a network is chaotic: one size changed by 1e-14 moves
    the makespan of 1,000 tasks by 3e-14, that of 4,000 by 3e-4. No two programs that round
    differently agree on a long one, so the twin gets a short one.
    """
    rng, builder = np.random.default_rng(0), _streams(16)
    for rate in (1e12, 2e12, 3e12, 4e12):
        builder.pool("link", rate)
    pools = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)[:, :2]
    max_rate = rng.choice([5e10, np.inf, np.inf], n)
    builder.extend(np.arange(n) % 16, draw=Draw(rng.uniform(1e3, 1e6, n), pools, max_rate))
    return builder.build()


def kernels_and_copies(n: int) -> Program:
    """16 streams, kernels with waits of which half draw from one memory while they compute."""
    rng, builder = np.random.default_rng(0), _streams(16)
    pool = builder.pool("memory", 1e12)
    waits = np.arange(n) - rng.integers(1, 40, n)
    n_bytes = rng.uniform(1e3, 1e6, n) * (rng.random(n) < 0.5)
    seconds = rng.uniform(0.0, 1e-6, n)
    builder.extend(np.arange(n) % 16, seconds, np.maximum(waits, NONE), Draw(n_bytes, pool))
    return builder.build()


def many_devices(n: int) -> Program:
    """64 devices, each with a memory of its own that 4 streams draw from."""
    rng, builder = np.random.default_rng(0), _streams(256)
    for _ in range(64):
        builder.pool("memory", 1e12)
    stream = np.arange(n) % 256
    builder.extend(stream, draw=Draw(rng.uniform(1e3, 1e6, n), stream % 64))
    return builder.build()


CASES = (
    Case("no pools, 1-2 waits", fixed_tasks),
    Case("1 draw at a time", one_pool(1)),
    Case("4 draws at a time", one_pool(4)),
    Case("16 draws at a time", one_pool(16)),
    Case("16 draws on 2 of 4 pools", copies_over_two_pools, 1_000),
    Case("16 streams, kernels, waits", kernels_and_copies),
    Case("64 pools, 4 draws on each", many_devices),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cases and write the table; --small takes about a second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="few tasks: a check, not a figure")
    small = parser.parse_args(arguments).small
    n_fixed, n_drawing = (2_000, 2_000) if small else (10_000_000, 1_000_000)
    speed = bytes_per_s(1 << 20 if small else 1 << 27)
    head = f"{'case':28}{'tasks':>11}{'M tasks/s':>11}{'SimPy':>11}{'ratio':>8}{'of limit':>10}"
    sys.stdout.write(f"memory: {speed / 1e9:.1f} GB/s copied (read and written)\n{head}\n")
    for case in CASES:
        n = n_fixed if case.make is fixed_tasks else n_drawing
        row = measure(case, n, 200 if small else case.n_simpy, speed)
        sys.stdout.write(
            f"{row.name:28}{row.tasks:11,}{row.tasks_per_s / 1e6:11.2f}"
            f"{row.simpy_tasks_per_s:11,.0f}{row.tasks_per_s / row.simpy_tasks_per_s:8,.0f}"
            f"{row.tasks_per_s / row.limit_tasks_per_s:10.1%}\n"
        )
        sys.stdout.flush()
        if not row.difference <= 1e-9:
            raise RuntimeError(f"{case.name}: engine and twin differ by {row.difference}")
    return 0


def measure(case: Case, n: int, n_simpy: int, memory_bytes_per_s: float) -> Row:
    """Time one case in the engine with n tasks and in SimPy with n_simpy tasks."""
    program, short = case.make(n), case.make(n_simpy)
    fast = run(short)  # compiles, or loads what was compiled before
    seconds, _ = _best_of(3, lambda: run(program))
    simpy_seconds, plain = _best_of(1, lambda: _twin().simulate(short))
    return Row(
        name=case.name,
        tasks=n,
        tasks_per_s=n / seconds,
        simpy_tasks_per_s=n_simpy / simpy_seconds,
        limit_tasks_per_s=memory_bytes_per_s / (fewest_bytes(program) / n),
        difference=float(np.abs(fast.end_s - plain.end_s).max() / plain.makespan_s),
    )


def fewest_bytes(program: Program) -> int:
    """Bytes that any engine reads and writes: each input once, start and end once."""
    per_task = program.stream.itemsize + 8 + 8 + 8 + 8 + 8  # seconds bytes wait_start start end
    return per_task * program.n_tasks + program.wait_for.nbytes + program.draw_pool.nbytes


def bytes_per_s(n_bytes: int) -> float:
    """What one core moves when it copies: bytes read and bytes written."""
    source = np.ones(n_bytes // 8)
    target = np.zeros_like(source)
    seconds, _ = _best_of(3, lambda: np.copyto(target, source))
    return 2 * n_bytes / seconds


def _streams(n: int) -> ProgramBuilder:
    builder = ProgramBuilder()
    for stream in range(n):
        builder.stream(f"stream {stream}")
    return builder


def _best_of(times: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Shortest CPU seconds of several runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(times):
        begin = time.process_time()
        result = work()
        best = min(best, time.process_time() - begin)
    return max(best, 1e-9), result


def _twin() -> Any:
    """The SimPy twin, which lives with the tests and not in the package."""
    spec = importlib.util.spec_from_file_location("engine_simpy", TWIN)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{TWIN}: not found")
    module = importlib.util.module_from_spec(spec)
    sys.modules["engine_simpy"] = module  # its dataclass looks itself up by name
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    raise SystemExit(main())
