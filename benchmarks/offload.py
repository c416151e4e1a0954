"""Layer-steps per second of the offload simulator, beside timeless cache replay in the same run.

    python benchmarks/offload.py            # ../shared gpt-oss-20b, or a drawn trace
    python benchmarks/offload.py --small    # seconds; what the tests run

"decide" makes the decisions, "clock" turns them into a Program and runs it, "both" is their rate
together. The last column is the time of `traces.replay` for the same requests over ours for the
decisions: it looks up and evicts, and decides nothing else (`cache_replay.py` holds it against
libCacheSim). The plain loop is the one that policies of one's own run in; it is timed on the first
tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hwmodels.box import load_box
from moesim.offload.built_in import decide_built_in, hooks_for
from moesim.offload.decide import decide
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Weights, prices
from moesim.offload.simulate import run
from moesim.policies.prefetch import oracle
from traces.formats.detect import read_any
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.models import load_model
from traces.replay import replay_trace
from traces.routing import RoutingTrace
from traces.synth import zipf_trace

SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces" / "gpt-oss-20b-decode.npz"
MODEL, BOX, BITS = "gpt-oss-20b", "rtx-4090-xeon-6454s", 4.25
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One policy: seconds of its parts, layer-steps, and seconds of timeless replay or None."""

    name: str
    decide_s: float
    clock_s: float
    n_steps: int
    replay_s: float | None = None


def best_time_s(job: Callable[[], object]) -> float:
    """Shortest of REPEATS runs after one that compiles."""
    job()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(trace: RoutingTrace, plain_tokens: int) -> list[Row]:
    """Built-in policies on all tokens, the plain loop on some."""
    model = load_model(MODEL)
    work = layer_steps(trace, forward_passes(trace))
    priced = prices(model, load_box(BOX), work, Weights(BITS))
    half = np.full(work.n_layers, work.n_experts // 2, np.int64)
    warm = np.zeros((work.n_layers, work.n_experts), np.bool_)
    warm[:, : work.n_experts // 2] = True
    policies = {
        f"{cache}, load": OffloadPolicy(cache=cache, slots=half)
        for cache in ("lru", "lfu", "fifo", "arc", "belady")
    } | {
        f"lru, {rule}": OffloadPolicy(slots=half, warm=warm.reshape(-1), on_miss=rule)
        for rule in ("cpu", "hss")
    }
    rows = []
    for name, policy in policies.items():
        decided = decide_built_in(work, policy, priced.unit_times())
        decide_s = best_time_s(lambda p=policy: decide_built_in(work, p, priced.unit_times()))
        clock_s = best_time_s(lambda d=decided: run(work, d, priced))
        replay_s = best_time_s(
            lambda c=policy.cache: replay_trace(trace, int(half[0]), c, scope="per_layer")
        )
        rows.append(Row(name, decide_s, clock_s, work.n_steps, replay_s))
    rows.append(_prefetching(work, priced, half))
    return rows + _plain(trace, plain_tokens, half)


def _prefetching(work: LayerSteps, priced: object, half: np.ndarray) -> Row:
    told = oracle(work, 0.85)
    policy = OffloadPolicy(slots=half, budget=1)
    decided = decide_built_in(work, policy, None, told)
    decide_s = best_time_s(lambda: decide_built_in(work, policy, None, told))
    clock_s = best_time_s(lambda: run(work, decided, priced))  # type: ignore[arg-type]
    return Row("lru, next-gate prefetch", decide_s, clock_s, work.n_steps)


def _plain(trace: RoutingTrace, n_tokens: int, half: np.ndarray) -> list[Row]:
    part = trace.rows(slice(0, n_tokens))
    work = layer_steps(part, forward_passes(part))
    priced = prices(load_model(MODEL), load_box(BOX), work, Weights(BITS))
    rows = []
    for cache in ("lru", "lfu", "arc"):
        policy = OffloadPolicy(cache=cache, slots=half)
        start = time.perf_counter()
        decided = decide(work, policy, hooks_for(work, policy))
        decide_s = time.perf_counter() - start
        clock_s = best_time_s(lambda d=decided: run(work, d, priced))
        rows.append(Row(f"{cache} in Python", decide_s, clock_s, work.n_steps))
    return rows


def end_to_end_s(path: Path) -> float:
    """Seconds from the file to figures, LRU with half the experts in slots, after compilation."""
    start = time.perf_counter()
    trace = read_any(path)
    work = layer_steps(trace, forward_passes(trace))
    priced = prices(load_model(MODEL), load_box(BOX), work, Weights(BITS))
    policy = OffloadPolicy(slots=np.full(work.n_layers, work.n_experts // 2, np.int64))
    run(work, decide_built_in(work, policy), priced)
    return time.perf_counter() - start


def show(rows: Sequence[Row]) -> None:
    """The table."""
    grid = Table(title=f"layer-steps/s, {rows[0].n_steps:,} of them")
    for column in ("policy", "decide", "clock", "both", "timeless replay / decide"):
        grid.add_column(column, justify="left" if column == "policy" else "right")
    for row in rows:
        rates = (row.decide_s, row.clock_s, row.decide_s + row.clock_s)
        ratio = "-" if row.replay_s is None else f"{row.replay_s / row.decide_s:.2f}"
        grid.add_row(row.name, *(f"{row.n_steps / s / 1e6:.3f} M" for s in rates), ratio)
    Console(width=100).print(grid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args(arguments).small
    captured = SHARED.exists() and not small
    drawn = 200 if small else 20_000
    trace = read_any(SHARED) if captured else zipf_trace(drawn, 24, 32, 4, 1.0, 0.4)
    show(measure(trace, 100 if small else 2_000))
    if captured:
        seconds = min(end_to_end_s(SHARED) for _ in range(REPEATS))
        Console().print(f"file to figures under LRU: {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
