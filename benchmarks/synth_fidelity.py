"""How near generated traces come to their source, and how fast they are made.

    python benchmarks/synth_fidelity.py                      # gpt-oss-20b and Mixtral of ../shared
    python benchmarks/synth_fidelity.py trace.parquet --seeds 5
    python benchmarks/synth_fidelity.py --small              # a drawn trace, seconds; in the tests

Every figure is the mean over layers, source against generated traces of as many tokens; the errors
are the largest over the seeds. Popularity, reuse and affinity are what the fit calibrates, to be
kept within 5 %; the others show what else survives. Needs no more than one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from traces import synth
from traces.batches import steps
from traces.consistency import srp
from traces.formats.detect import read_any
from traces.locality import coactivation, distinct_per_batch, reuse_ratio, working_set
from traces.replay import replay_trace, slots_for
from traces.routing import DECODE, RoutingTrace, expert_counts, require_tokens

SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces"
FILES = ("gpt-oss-20b-decode.npz", "mixtral-8x7b-mtbench.npz")
BAR = 0.05
KEPT = ("popularity distance", "reuse ratio", "affinity ratio")
BATCHES = 200


@dataclass(frozen=True, slots=True)
class Row:
    """One statistic: the source's, the generated traces' mean, and the errors over the seeds.

    error      largest |generated / source - 1| of the mean over layers; of popularity, the largest
               mean total variation distance
    layer      the same, of the worst single layer; None for a statistic that has no layers
    """

    statistic: str
    source: float
    generated: float
    error: float
    layer: float | None


@dataclass(frozen=True, slots=True)
class Study:
    """A trace's rows and how long they took; rates in routed choices per second."""

    name: str
    n_tokens: int
    rows: tuple[Row, ...]
    fit_s: float
    choices_per_s: float
    batched_tokens_per_s: float


def study(name: str, source: RoutingTrace, n_seeds: int, rounds: int) -> Study:
    """Fit once, generate n_seeds traces as long as the source, compare."""
    start = time.perf_counter()
    fitted = synth.fit(source, rounds=rounds)
    fit_s = time.perf_counter() - start
    synth.generate(fitted, n_tokens=1)  # so that compiling is not timed
    start = time.perf_counter()
    made = [synth.generate(fitted, n_tokens=source.n_tokens, seed=s) for s in range(n_seeds)]
    rate = sum(m.topk.size for m in made) / (time.perf_counter() - start)
    ours, theirs = [statistics(m) for m in made], statistics(source)
    rows = [_popularity(source, made)]
    rows += [_row(key, theirs[key], [o[key] for o in ours]) for key in theirs]
    return Study(name, source.n_tokens, tuple(rows), fit_s, rate, _batching_rate(made[0]))


def statistics(trace: RoutingTrace) -> dict[str, np.ndarray]:
    """Arrays of one value a layer, or of one value in all."""
    figures = {"reuse ratio": reuse_ratio(trace), "affinity ratio": synth.affinity_ratio(trace)}
    for apart in (2, 8):
        if trace.n_layers > 2 * apart:
            figures[f"affinity, {apart} layers apart"] = _affinity_apart(trace, apart)
    if trace.top_k > 1:
        figures["co-activation ratio"] = _coactivation_ratio(trace)
    for window in (4, 16, 64):
        figures[f"working set, {window} tokens"] = working_set(trace, window)
    figures["SRP, 16 tokens"] = np.array([srp(trace, 16).srp])
    rng = synth.stream(0, "batches")
    for n in (8, 64):
        distinct = distinct_per_batch(trace, n, BATCHES, rng).mean(axis=0)
        figures[f"distinct experts, batch of {n}"] = distinct
    for rho in (1.0, 2.0):
        hits = replay_trace(trace, slots_for(trace, rho), "lru").hit_rate
        figures[f"LRU hit rate, rho {rho:g}"] = np.array([hits])
    return figures


def _popularity(source: RoutingTrace, made: list[RoutingTrace]) -> Row:
    counts = [expert_counts(t).counts for t in (source, *made)]
    share, *others = [c / c.sum(axis=1, keepdims=True) for c in counts]
    distance = np.array([np.abs(other - share).sum(axis=1) / 2 for other in others])
    mean = distance.mean(axis=1)
    return Row(KEPT[0], 0.0, float(mean.mean()), float(mean.max()), float(distance.max()))


def _row(statistic: str, source: np.ndarray, made: list[np.ndarray]) -> Row:
    means = np.array([m.mean() for m in made])
    error = float(np.abs(means / source.mean() - 1).max())
    layer = float(np.nanmax([np.abs(m / source - 1) for m in made])) if len(source) > 1 else None
    return Row(statistic, float(source.mean()), float(means.mean()), error, layer)


def _affinity_apart(trace: RoutingTrace, apart: int) -> np.ndarray:
    """Affinity of layers `apart` captured layers apart, of every apart-th layer."""
    columns = slice(0, None, apart)
    thinned = RoutingTrace(
        topk=trace.topk[:, columns],
        n_experts=trace.n_experts,
        layers=trace.layers[columns],
        request=trace.request,
        position=trace.position,
        phase=trace.phase,
    )
    return synth.affinity_ratio(thinned)


def _coactivation_ratio(trace: RoutingTrace) -> np.ndarray:
    """float64[layers], sum over i != j of P_ij^2 / (x_i x_j) of the pairs of one token's set."""
    together = coactivation(trace).astype(np.float64)
    share = np.einsum("lee->le", together) / np.einsum("lee->l", together)[:, None]
    together[:, np.arange(trace.n_experts), np.arange(trace.n_experts)] = 0
    p = together / together.sum(axis=(1, 2), keepdims=True)
    independent = np.maximum(share[:, :, None] * share[:, None, :], 1e-30)
    return np.asarray((p**2 / independent).sum(axis=(1, 2)))


def _batching_rate(trace: RoutingTrace) -> float:
    """Tokens per second of cutting a trace into decode steps of 64."""
    decode = int(np.count_nonzero(trace.phase == DECODE))
    if not decode:
        return float("nan")
    steps(trace, 64, "decode", 0)
    start = time.perf_counter()
    steps(trace, 64, "decode", 0)
    return decode / (time.perf_counter() - start)


def table(result: Study) -> Table:
    """A study as a table for people."""
    shown = Table(title=f"{result.name}: {result.n_tokens} tokens generated against the source")
    for heading in ("statistic", "source", "generated", "error", "worst layer"):
        shown.add_column(heading, justify="left" if heading == "statistic" else "right")
    for row in result.rows:
        verdict = "" if row.statistic not in KEPT else " ok" if row.error <= BAR else " TOO FAR"
        layer = "-" if row.layer is None else f"{row.layer:.1%}"
        source = "-" if row.statistic == KEPT[0] else f"{row.source:.4f}"
        shown.add_row(
            row.statistic, source, f"{row.generated:.4f}", f"{row.error:.1%}{verdict}", layer
        )
    shown.caption = (
        f"fit {result.fit_s:.1f} s; {result.choices_per_s / 1e6:.1f} M routed choices/s generated;"
        f" {result.batched_tokens_per_s / 1e6:.1f} M tokens/s into decode steps"
    )
    return shown


def main(argv: Sequence[str] | None = None) -> list[Study]:
    """Measure, show the tables, return the studies."""
    parser = argparse.ArgumentParser(description="Fidelity and speed of generated traces")
    parser.add_argument("files", type=Path, nargs="*", help="captured traces in any known format")
    parser.add_argument("--seeds", type=int, default=3, help="traces generated per source")
    parser.add_argument("--rounds", type=int, default=24, help="calibration rounds")
    parser.add_argument("--small", action="store_true", help="a drawn trace of 4000 tokens")
    arguments = parser.parse_args(argv)
    if arguments.small:
        drawn = synth.zipf_trace(4000, 5, 8, 2, exponent=0.8, reuse=0.4)
        sources = {"drawn": drawn}
    else:
        files = arguments.files or [SHARED / file for file in FILES]
        sources = {f.name: require_tokens(read_any(f), "generating") for f in files}
    console, studies = Console(width=110), []
    for name, source in sources.items():
        studies.append(study(name, source, arguments.seeds, arguments.rounds))
        console.print(table(studies[-1]))
    return studies


if __name__ == "__main__":
    main()
