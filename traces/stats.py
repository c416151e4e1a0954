"""What a trace says: how uneven the load is, how often experts repeat, what a cache would hold.

`summarize` answers all of it at once; the single measures are here (load), in `locality.py`
(affinity, reuse, working set), `consistency.py` (SRP, SCH) and `replay.py` (caches).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.consistency import SegmentRouting, best_segment_rule, sch, srp, srp_floor
from traces.errors import TraceError
from traces.locality import (
    coactivation,
    distinct_per_batch,
    distinct_per_forward,
    independent_working_set,
    reuse_ratio,
    transitions,
    working_set,
)
from traces.replay import CONVENTIONS, RequestStream, replay, request_stream, slots_for
from traces.routing import DECODE, PREFILL, ExpertCounts, RoutingTrace, expert_counts

__all__ = [
    "CacheFigure",
    "LayerFigure",
    "SegmentRouting",
    "TraceStats",
    "WindowFigure",
    "best_segment_rule",
    "coactivation",
    "coefficient_of_variation",
    "distinct_per_batch",
    "distinct_per_forward",
    "entropy",
    "independent_working_set",
    "load",
    "max_over_mean",
    "rank_load",
    "reuse_ratio",
    "sch",
    "srp",
    "srp_floor",
    "summarize",
    "to_json",
    "transitions",
    "working_set",
]

Doubles = npt.NDArray[np.float64]

WINDOWS_TOKENS = (4, 16, 64)
CACHE_RHOS = (1.0, 2.0)
CACHE_POLICIES = ("lru", "perfect_lfu", "belady")


@dataclass(frozen=True, slots=True)
class LayerFigure:
    """One number a captured layer and their mean; None where it is not defined."""

    per_layer: tuple[float | None, ...]
    mean: float | None


@dataclass(frozen=True, slots=True)
class WindowFigure:
    """Segments of window_tokens tokens: SRP with its floor, and distinct experts of a layer.

    working_set is the mean over layers; working_set_independent that of independent even draws.
    """

    window_tokens: int
    n_windows: int
    srp: float | None
    srp_floor: float
    srp_threshold: int
    srp_rho_hat: float | None
    working_set: float | None
    working_set_independent: float


@dataclass(frozen=True, slots=True)
class CacheFigure:
    """Hit rate of one cache over all layers; a cache of random experts would hit expert_share."""

    policy: str
    convention: str
    rho: float
    slots: int
    expert_share: float
    hit_rate: float | None
    misses_per_token: float


@dataclass(frozen=True, slots=True)
class TraceStats:
    """Everything `trace stats` prints. What needs token order is None or empty for counts.

    kind     routing_trace or expert_counts
    layers   absolute indices of the captured MoE layers
    phases   tokens of each phase
    max_over_mean, cv, entropy  of the experts' load in each layer (entropy: 1 is even)
    """

    kind: str
    model: str
    capture: str
    layers: tuple[int, ...]
    n_experts: int
    top_k: int
    max_over_mean: LayerFigure
    cv: LayerFigure
    entropy: LayerFigure
    tokens: int | None = None
    requests: int | None = None
    phases: dict[str, int] | None = None
    missing_cells: int | None = None
    reuse_ratio: LayerFigure | None = None
    windows: tuple[WindowFigure, ...] = ()
    caches: tuple[CacheFigure, ...] = ()


def load(trace: RoutingTrace | ExpertCounts) -> Doubles:
    """How often each expert of each layer was chosen: float64[moe_layers, n_experts]."""
    return (trace if isinstance(trace, ExpertCounts) else expert_counts(trace)).counts


def max_over_mean(counts: Doubles) -> Doubles:
    """Busiest over mean of each row: of experts for `load`, of ranks for `rank_load`.

    counts   float64[layers, n]; returns float64[layers] >= 1, nan for a row without load
    """
    return _over(counts.max(axis=1), counts.mean(axis=1))


def coefficient_of_variation(counts: Doubles) -> Doubles:
    """Standard deviation over mean of each row [layers, n]: float64[layers], nan without load."""
    return _over(counts.std(axis=1), counts.mean(axis=1))


def entropy(counts: Doubles) -> Doubles:
    """Shannon entropy of each row's shares over log n: 1 is even, 0 is one expert only.

    counts   float64[layers, n]; returns float64[layers], nan without load; 1 when n is 1
    """
    total = counts.sum(axis=1)
    share = counts / np.where(total > 0, total, 1.0)[:, None]
    terms = -share * np.log(np.where(share > 0, share, 1.0))
    n = counts.shape[1]
    value = terms.sum(axis=1) / math.log(n) if n > 1 else np.ones(len(counts))
    return np.where(total > 0, value, np.nan)


def rank_load(
    counts: Doubles, physical_to_logical: npt.NDArray[np.integer[Any]], n_ranks: int
) -> Doubles:
    """Load of each rank when every expert's load is split evenly among its replicas.

    counts               float64[layers, n_experts]
    physical_to_logical  int[layers, slots], logical expert of each slot, rank-major; slots
                         divisible by n_ranks
    returns              float64[layers, n_ranks]
    raises               TraceError for a wrong shape, an id out of range, an unplaced expert
    """
    n_layers, n_experts = counts.shape
    placement = np.asarray(physical_to_logical)
    if placement.ndim != 2 or len(placement) != n_layers:
        raise TraceError(
            f"physical_to_logical: shape {list(placement.shape)}, expected [{n_layers}, slots]"
        )
    if n_ranks < 1 or placement.shape[1] % n_ranks:
        raise TraceError(
            f"physical_to_logical: {placement.shape[1]} slots cannot be shared by {n_ranks} ranks"
        )
    if placement.size and (placement.min() < 0 or placement.max() >= n_experts):
        raise TraceError(
            f"physical_to_logical: ids {placement.min()}..{placement.max()},"
            f" expected 0..{n_experts - 1}"
        )
    replicas = _replicas(placement.astype(np.int64), n_experts)
    unplaced = np.argwhere((replicas == 0) & (counts > 0))
    if len(unplaced):
        layer, expert = unplaced[0]
        raise TraceError(
            f"physical_to_logical: expert {expert} of row {layer} has load but no slot"
            f" ({len(unplaced)} such)"
        )
    per_replica = counts / np.maximum(replicas, 1)
    slot_load = np.take_along_axis(per_replica, placement.astype(np.int64), axis=1)
    loads: Doubles = slot_load.reshape(n_layers, n_ranks, -1).sum(axis=2)
    return loads


def summarize(trace: RoutingTrace | ExpertCounts) -> TraceStats:
    """All statistics of a trace; of counts, those that need no token order.

    raises  TraceError when the trace holds no expert choice at all
    """
    counts = load(trace)
    if not counts.sum() > 0:
        raise TraceError("trace: no expert was ever chosen, so there is nothing to summarize")
    stats = TraceStats(
        kind="expert_counts",
        model=trace.model,
        capture=trace.capture,
        layers=tuple(int(layer) for layer in trace.layers),
        n_experts=trace.n_experts,
        top_k=trace.top_k,
        max_over_mean=_figure(max_over_mean(counts)),
        cv=_figure(coefficient_of_variation(counts)),
        entropy=_figure(entropy(counts)),
    )
    return stats if isinstance(trace, ExpertCounts) else _with_tokens(stats, trace, counts)


def to_json(stats: TraceStats) -> dict[str, Any]:
    """The statistics as plain dicts, lists, numbers and text, ready for json.dumps."""
    return asdict(stats)


def _with_tokens(stats: TraceStats, trace: RoutingTrace, counts: Doubles) -> TraceStats:
    """The same statistics with those that need token order."""
    return replace(
        stats,
        kind="routing_trace",
        tokens=trace.n_tokens,
        requests=len(np.unique(trace.request)),
        phases={
            "prefill": int((trace.phase == PREFILL).sum()),
            "decode": int((trace.phase == DECODE).sum()),
        },
        missing_cells=trace.topk.size - int(counts.sum()),
        reuse_ratio=_figure(reuse_ratio(trace)),
        windows=tuple(_window(trace, window) for window in WINDOWS_TOKENS),
        caches=tuple(_caches(trace)),
    )


def _window(trace: RoutingTrace, window_tokens: int) -> WindowFigure:
    segments = srp(trace, window_tokens)
    return WindowFigure(
        window_tokens,
        segments.n_windows,
        _defined(segments.srp),
        segments.floor,
        segments.threshold,
        _defined(segments.rho_hat),
        _figure(working_set(trace, window_tokens)).mean,
        independent_working_set(trace.n_experts, trace.top_k, window_tokens),
    )


def _caches(trace: RoutingTrace) -> Iterable[CacheFigure]:
    for convention in CONVENTIONS:
        stream = request_stream(trace, convention)
        for policy in CACHE_POLICIES:
            for rho in CACHE_RHOS:
                yield _cache(trace, stream, policy, rho)


def _cache(trace: RoutingTrace, stream: RequestStream, policy: str, rho: float) -> CacheFigure:
    slots = slots_for(trace, rho)
    result = replay(stream, slots, policy)
    return CacheFigure(
        policy,
        stream.convention,
        rho,
        slots,
        slots / stream.n_objects,
        _defined(result.hit_rate),
        result.n_misses / trace.n_tokens,
    )


def _replicas(placement: npt.NDArray[np.int64], n_experts: int) -> npt.NDArray[np.int64]:
    """Slots of each expert in each layer: int64[layers, n_experts]."""
    n_layers = len(placement)
    flat = (placement + np.arange(n_layers)[:, None] * n_experts).ravel()
    counts: npt.NDArray[np.int64] = np.bincount(flat, minlength=n_layers * n_experts)
    return counts.reshape(n_layers, n_experts)


def _over(part: Doubles, whole: Doubles) -> Doubles:
    ratio: Doubles = np.full(len(whole), np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _figure(values: Doubles) -> LayerFigure:
    known = values[~np.isnan(values)]
    mean = float(known.mean()) if len(known) else None
    return LayerFigure(tuple(_defined(float(value)) for value in values), mean)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
