"""Our miss counts are libCacheSim's, request for request, where that library is installed.

libCacheSim (GPL) is used in this test only. It reads requests from a file of its own binary form
(`oracleGeneral`, 24 bytes a request); every object has size 1. Its LFU forgets
an object's count on eviction and breaks ties by last use, as our `lfu`; its Belady inserts every
miss, as ours.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from traces.replay import replay, request_stream
from traces.replay_kernels import next_use
from traces.routing import RoutingTrace

libcachesim = pytest.importorskip("libcachesim", reason="libCacheSim is optional: not installed")

POLICIES = {"lru": "LRU", "lfu": "LFU", "fifo": "FIFO", "belady": "Belady", "arc": "ARC"}
NEVER = np.iinfo(np.int64).max
RECORD = np.dtype([("time", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])


def write_requests(ids: np.ndarray, path: Path) -> Path:
    """The stream as a file that libCacheSim reads, with each request's next access."""
    upcoming = next_use(ids.astype(np.int32), int(ids.max()) + 1).astype(np.int64)
    records = np.zeros(len(ids), RECORD)
    records["time"] = np.arange(len(ids))
    records["object"] = ids + 1
    records["size"] = 1
    records["next"] = np.where(upcoming < len(ids), upcoming, NEVER)
    records.tofile(path)
    return path


def their_misses(path: Path, slots: int, policy: str, n_requests: int) -> int:
    kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE
    cache = getattr(libcachesim, POLICIES[policy])(slots, hashpower=12)
    miss_share, _ = cache.process_trace(libcachesim.TraceReader(str(path), kind))
    return round(miss_share * n_requests)


def assert_same_misses(ids: np.ndarray, slots: tuple[int, ...], folder: Path) -> None:
    path = write_requests(ids, folder / "requests.oracleGeneral.bin")
    for policy in POLICIES:
        for c in slots:
            ours = replay(ids, c, policy).n_misses
            assert ours == their_misses(path, c, policy, len(ids)), (policy, c)


def load(path: Path, n_experts: int, rows: int) -> RoutingTrace:
    with np.load(path, allow_pickle=False) as file:
        topk, request = file["topk"][:rows], file["seq"][:rows]
    return RoutingTrace(
        topk=topk,
        n_experts=n_experts,
        layers=tuple(range(topk.shape[1])),
        request=request,
        position=np.arange(len(topk), dtype=np.int32),
        phase=np.zeros(len(topk), np.int8),
    )


@pytest.mark.parametrize("seed", range(3))
def test_on_uniform_streams(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    assert_same_misses(rng.integers(0, 40, 4000), (1, 2, 7, 20, 39, 40, 50), tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_on_skewed_streams_with_a_drifting_favourite(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    skewed = (rng.zipf(1.3, 6000) + np.arange(6000) // 500 * 7) % 300
    assert_same_misses(skewed, (1, 3, 17, 100, 250), tmp_path)


def test_on_scans_and_bursts(tmp_path: Path) -> None:
    scan, burst = np.tile(np.arange(30), 20), np.repeat(np.arange(50), 7)
    assert_same_misses(np.concatenate([scan, burst, scan, burst[::-1]]), (1, 29, 30, 31), tmp_path)


@pytest.mark.parametrize(
    ("name", "n_experts", "rows"),
    [
        ("gpt-oss-20b-decode.npz", 32, 4000),
        ("mixtral-8x7b-mtbench.npz", 8, 6000),
        ("deepseek-v2-lite-law.npz", 64, 2500),
    ],
)
def test_on_captured_routing(
    name: str, n_experts: int, rows: int, shared: Path, tmp_path: Path
) -> None:
    trace = load(shared / "traces" / name, n_experts, rows)
    per_token = trace.n_layers * trace.top_k
    slots = (per_token // 2, per_token, 2 * per_token, 3 * per_token)
    assert_same_misses(request_stream(trace).objects, slots, tmp_path)
