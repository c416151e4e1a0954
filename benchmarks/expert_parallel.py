"""Speed of expert-parallel lowering: token-level counting, and steps from counts per rank.

    python benchmarks/expert_parallel.py            # DeepSeek-V3 shapes on 64 ranks
    python benchmarks/expert_parallel.py --small    # seconds; what the tests run

Targets on one core: 20 M routed expert choices/s token by token, 20,000 decode steps/s of 58 MoE
layers over 64 ranks from counts. "limit" is the least that token-level counting needs, timed
here: counting each choice once per layer and expert. Steps from counts are bound by reading their
six arrays, 178 kB a step at full size. Times are CPU seconds of this process, the best of a few
runs after one that compiles.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from rich.console import Console
from rich.table import Table

from hwmodels.collective import AllToAllLaw
from hwmodels.cost import ExpertLaw
from planners.dispatch import MODES, RULES, DispatchCounts, source_ranks, step_counts
from planners.plan import Placement
from planners.step_time import MoeLaws, step_seconds_from_counts

REPEATS = 5
LAWS = MoeLaws(  # one expert of DeepSeek-V3 in FP8 on an H800; the values do not change the speed
    ExpertLaw(36e-6, 15e-6, 0.11e-6, 0.05e-6),
    AllToAllLaw(25.6e-6, 6.5e-12, 22e-12),
    7392.0,
    14336.0,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the measured job."""

    n_layers: int
    n_experts: int
    n_slots: int
    n_ranks: int
    ranks_per_node: int
    top_k: int
    n_tokens: int
    n_steps: int


LARGE = Shape(58, 256, 320, 64, 8, 8, 4096, 500)
SMALL = Shape(4, 16, 24, 8, 4, 4, 64, 10)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; rates are in `unit` per CPU second."""

    job: str
    unit: str
    amount: int
    per_s: float
    limit_per_s: float | None


def best_time_s(job: Callable[[], object]) -> float:
    """Fewest CPU seconds of REPEATS runs after one that compiles."""
    job()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        job()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


@numba.njit  # not cached: a cache remembers the name the file was imported under
def count_choices(topk: np.ndarray, counts: np.ndarray) -> None:
    """Count every choice once: counts[layer, expert]."""
    for token in range(topk.shape[0]):
        for layer in range(topk.shape[1]):
            for j in range(topk.shape[2]):
                counts[layer, topk[token, layer, j]] += 1


def token_rows(shape: Shape) -> list[Row]:
    """Token-level counting in every mode and with every replica rule."""
    rng = np.random.default_rng(0)
    extra = rng.integers(0, shape.n_experts, (shape.n_layers, shape.n_slots - shape.n_experts))
    every = np.tile(np.arange(shape.n_experts), (shape.n_layers, 1))
    slots = rng.permuted(np.concatenate([every, extra], axis=1), axis=1).astype(np.int32)
    placement = Placement(slots, shape.n_experts, shape.n_ranks, shape.ranks_per_node)
    scores = rng.random((min(shape.n_tokens, 512), shape.n_layers, shape.n_experts))
    topk = np.argpartition(scores, shape.top_k, axis=2)[:, :, : shape.top_k].astype(np.int16)
    rows = rng.integers(0, len(topk), (1, shape.n_tokens))
    source = source_ranks(shape.n_tokens, shape.n_ranks)
    amount = shape.n_tokens * shape.n_layers * shape.top_k
    counts, chosen = np.zeros((shape.n_layers, shape.n_experts), np.int64), topk[rows[0]]
    limit = amount / best_time_s(lambda: count_choices(chosen, counts))
    result = []
    for mode in MODES:
        for rule in RULES:
            seconds = best_time_s(
                lambda m=mode, r=rule: step_counts(topk, rows, source, placement, m, r)
            )
            result.append(Row(f"{mode}, {rule}", "choices", amount, amount / seconds, limit))
    return result


def step_row(shape: Shape) -> Row:
    """Steps priced from counts per rank."""
    rng = np.random.default_rng(0)
    size = (shape.n_steps, shape.n_layers, shape.n_ranks)
    arrays = [rng.integers(0, 100, size).astype(np.float64) for _ in range(6)]
    slot_tokens = np.zeros((shape.n_layers, shape.n_slots))
    counts = DispatchCounts(slot_tokens, *arrays, n_tokens=float(shape.n_tokens))
    seconds = best_time_s(lambda: step_seconds_from_counts(counts, LAWS))
    return Row("from counts", "steps", shape.n_steps, shape.n_steps / seconds, None)


def table(rows: list[Row], shape: Shape) -> Table:
    """The rows as a table for people."""
    title = f"{shape.n_layers} MoE layers, {shape.n_slots} slots, {shape.n_ranks} ranks"
    result = Table(title=f"expert-parallel lowering, {title}")
    for heading in ("job", "amount", "per CPU second", "limit", "of the limit"):
        result.add_column(heading, justify="right")
    for row in rows:
        limit, share = "-", "-"
        if row.limit_per_s:
            limit, share = f"{row.limit_per_s:,.0f}", f"{row.per_s / row.limit_per_s:.0%}"
        rate = f"{row.per_s:,.0f} {row.unit}"
        result.add_row(row.job, f"{row.amount:,} {row.unit}", rate, limit, share)
    return result


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, show the table, return its rows."""
    parser = argparse.ArgumentParser(description="Speed of expert-parallel lowering")
    parser.add_argument("--small", action="store_true", help="a job of milliseconds")
    shape = SMALL if parser.parse_args(argv).small else LARGE
    rows = [*token_rows(shape), step_row(shape)]
    Console(width=110).print(table(rows, shape))
    return rows


if __name__ == "__main__":
    main()
