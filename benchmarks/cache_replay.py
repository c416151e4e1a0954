"""Requests per second of cache replay, beside libCacheSim in the same run where it is installed.

    python benchmarks/cache_replay.py                     # ../shared gpt-oss-20b, or a drawn trace
    python benchmarks/cache_replay.py --npz topk.npz --experts 64 --rho 2
    python benchmarks/cache_replay.py --small             # seconds; what the tests run

The limit of the job is reading every request once and counting it: the column "bare count" is our
time over the time of that. libCacheSim reads its requests from a file in the page cache; writing
that file is not timed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from traces.replay import RequestStream, replay, replay_trace, request_stream, slots_for
from traces.replay_kernels import count_requests, next_use
from traces.routing import RoutingTrace

POLICIES = ("lru", "lfu", "fifo", "belady", "arc", "perfect_lfu", "segment")
THEIRS = {"lru": "LRU", "lfu": "LFU", "fifo": "FIFO", "belady": "Belady", "arc": "ARC"}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "traces" / "gpt-oss-20b-decode.npz"
RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on one cache; rates in requests per second, None where not measured."""

    policy: str
    scope: str
    slots: int
    n_requests: int
    n_misses: int
    requests_per_s: float
    counting_per_s: float
    their_requests_per_s: float | None = None
    their_misses: int | None = None


def drawn_trace(n_tokens: int, n_layers: int, n_experts: int, top_k: int) -> RoutingTrace:
    """A trace with skewed, independent choices, for machines without a captured one."""
    rng = np.random.default_rng(0)
    weight = rng.random((1, n_layers, n_experts)) ** 2
    score = rng.random((n_tokens, n_layers, n_experts)) ** (1 / (weight + 0.05))
    topk = np.argpartition(-score, top_k, axis=2)[:, :, :top_k].astype(np.int16)
    return as_trace(topk, np.arange(n_tokens) // 300, n_experts)


def as_trace(topk: np.ndarray, request: np.ndarray, n_experts: int) -> RoutingTrace:
    """A trace from choices [tokens, layers, top_k] and request ids."""
    return RoutingTrace(
        topk=topk,
        n_experts=n_experts,
        layers=tuple(range(topk.shape[1])),
        request=request.astype(np.int32),
        position=np.arange(len(topk), dtype=np.int32),
        phase=np.ones(len(topk), np.int8),
    )


def best_time_s(job: Callable[[], object]) -> float:
    """Shortest of REPEATS runs after one that compiles."""
    job()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(trace: RoutingTrace, rhos: Sequence[float], folder: Path) -> list[Row]:
    """Every policy through a global cache of each size, then through one cache per layer."""
    stream = request_stream(trace)
    counting = best_time_s(lambda: count_requests(stream.objects, stream.n_objects))
    counting_per_s = len(stream.objects) / counting
    rows = []
    for rho in rhos:
        slots = slots_for(trace, rho)
        rows += [_global_row(stream, slots, policy, counting_per_s) for policy in POLICIES]
    rows = _beside_libcachesim(rows, stream, folder)
    slots = slots_for(trace, rhos[-1], "per_layer")
    return rows + [_layer_row(trace, slots, policy, counting_per_s) for policy in POLICIES[:4]]


def _global_row(stream: RequestStream, slots: int, policy: str, counting_per_s: float) -> Row:
    seconds = best_time_s(lambda: replay(stream, slots, policy))
    misses, n = replay(stream, slots, policy).n_misses, len(stream.objects)
    return Row(policy, "global", slots, n, misses, n / seconds, counting_per_s)


def _layer_row(trace: RoutingTrace, slots: int, policy: str, counting_per_s: float) -> Row:
    seconds = best_time_s(lambda: replay_trace(trace, slots, policy, scope="per_layer"))
    result = replay_trace(trace, slots, policy, scope="per_layer")
    n = result.n_requests
    return Row(policy, "per layer", slots, n, result.n_misses, n / seconds, counting_per_s)


def _beside_libcachesim(rows: list[Row], stream: RequestStream, folder: Path) -> list[Row]:
    """The same rows with libCacheSim's rate and misses, unchanged where it is not installed."""
    try:
        import libcachesim
    except ImportError:
        return rows
    path = folder / "requests.oracleGeneral.bin"
    _write_requests(stream, path)

    def theirs(row: Row) -> Row:
        if row.policy not in THEIRS:
            return row
        best_s, misses = float("inf"), 0
        for _ in range(REPEATS):
            reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
            cache = getattr(libcachesim, THEIRS[row.policy])(row.slots, hashpower=12)
            start = time.perf_counter()
            miss_share, _ = cache.process_trace(reader)
            best_s = min(best_s, time.perf_counter() - start)
            misses = round(miss_share * row.n_requests)
        ours = (row.policy, row.scope, row.slots, row.n_requests, row.n_misses)
        rate = row.n_requests / best_s
        return Row(*ours, row.requests_per_s, row.counting_per_s, rate, misses)

    return [theirs(row) for row in rows]


def _write_requests(stream: RequestStream, path: Path) -> None:
    """The stream in the binary form that libCacheSim reads, with next accesses for Belady."""
    n = len(stream.objects)
    upcoming = next_use(stream.objects, stream.n_objects).astype(np.int64)
    records = np.zeros(n, RECORD)
    records["time"] = np.arange(n)
    records["object"] = stream.objects.astype(np.uint64) + 1
    records["size"] = 1
    records["next"] = np.where(upcoming < n, upcoming, np.iinfo(np.int64).max)
    records.tofile(path)


def table(rows: list[Row], title: str) -> Table:
    """The rows as a table for people."""
    result = Table(title=title)
    for heading in ("policy", "cache", "slots", "hit rate", "M requests/s", "bare count"):
        result.add_column(heading, justify="right")
    for heading in ("libCacheSim M/s", "faster", "misses"):
        result.add_column(heading, justify="right")
    for row in rows:
        cells = [row.policy, row.scope, str(row.slots), f"{1 - row.n_misses / row.n_requests:.4f}"]
        cells.append(f"{row.requests_per_s / 1e6:.1f}")
        cells.append(f"{row.counting_per_s / row.requests_per_s:.1f} x")
        if row.their_requests_per_s is None:
            cells += ["-", "-", "-"]
        else:
            cells.append(f"{row.their_requests_per_s / 1e6:.1f}")
            cells.append(f"{row.requests_per_s / row.their_requests_per_s:.1f} x")
            cells.append("identical" if row.their_misses == row.n_misses else "DIFFERENT")
        result.add_row(*cells)
    return result


def load(arguments: argparse.Namespace) -> tuple[RoutingTrace, str]:
    """The trace to replay and what to call it."""
    if arguments.small:
        return drawn_trace(1000, 4, 16, 2), "drawn, 1000 tokens"
    path = arguments.npz or SHARED
    if not path.exists():
        return drawn_trace(40_000, 24, 32, 4), "drawn, 40000 tokens"
    with np.load(path, allow_pickle=False) as file:
        topk = file["topk"]
        request = file["seq"] if "seq" in file.files else np.zeros(len(topk))
    return as_trace(topk, request, arguments.experts), path.name


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, show the table, return its rows."""
    parser = argparse.ArgumentParser(description="Requests per second of cache replay")
    parser.add_argument("--npz", type=Path, help="file with topk int16[tokens, layers, k]")
    parser.add_argument("--experts", type=int, default=32, help="experts of a layer of --npz")
    parser.add_argument("--rho", type=float, nargs="+", default=[1.0, 2.0], help="cache sizes")
    parser.add_argument("--small", action="store_true", help="a drawn trace of 1000 tokens")
    arguments = parser.parse_args(argv)
    trace, name = load(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(trace, arguments.rho, Path(folder))
    Console(width=110).print(table(rows, f"cache replay, {name}, {rows[0].n_requests} requests"))
    return rows


if __name__ == "__main__":
    main()
