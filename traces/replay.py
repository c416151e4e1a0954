"""Timeless cache replay: how many expert requests a cache of a given size would have served.

`replay` takes any stream of object ids; `replay_trace` and `hit_rate` take a RoutingTrace, where
object layer_column * n_experts + expert is one expert. Nothing here knows seconds or bytes.

Two conventions (pick by name, and say which one a figure uses):

execution_order_cold_miss  requests one after another in row order, experts in the order they are
                           stored; one cache for the whole trace; a first request is a miss
                           (the policy `segment` sees past the end of a request here)
token_batch_free_fill      as published for segment caches (arXiv 2505.16056): all experts of a
                           token are looked up against the cache before the token, then inserted
                           one by one; a first request is a hit while fewer objects than slots
                           have been seen; every request of the trace begins with an empty cache

The compiled loops are in `replay_kernels.py`. LRU, LFU, FIFO and Belady give the miss counts of
libCacheSim exactly (objects of size 1); so does ARC on everything tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces import replay_kernels as kernels
from traces.errors import TraceError
from traces.routing import MISSING, ExpertCounts, RoutingTrace, require_tokens

Longs = npt.NDArray[np.int64]

EXECUTION_ORDER = "execution_order_cold_miss"
TOKEN_BATCH = "token_batch_free_fill"
CONVENTIONS = (TOKEN_BATCH, EXECUTION_ORDER)
SCOPES = ("global", "per_layer")
DEFAULT_LOOKAHEAD_TOKENS = 16

_MAX_REQUESTS = 2**31 - 1
_MAX_OBJECTS = 2**27
_ROUNDING = 1e-9  # rho * layers * top_k is a float: 0.7 * 10 must give 7 slots, not 6


@dataclass(frozen=True, slots=True)
class RequestStream:
    """Requests for objects, cut into tokens and into runs that each begin with an empty cache.

    objects     int32[requests], 0..n_objects-1
    token_end   int64[tokens], where each token's requests end in objects, non-decreasing
    run_end     int64[runs], where each run's tokens end in token_end, non-decreasing
    convention  one of CONVENTIONS
    n_missing   cells of the trace that held no expert and were left out
    """

    objects: npt.NDArray[np.int32]
    n_objects: int
    token_end: Longs
    run_end: Longs
    convention: str = EXECUTION_ORDER
    n_missing: int = 0

    def __post_init__(self) -> None:
        _known("convention", self.convention, CONVENTIONS)
        if len(self.objects) > _MAX_REQUESTS:
            raise TraceError(f"stream: {len(self.objects)} requests, expected < 2**31")
        if not 0 < self.n_objects <= _MAX_OBJECTS:
            raise TraceError(
                f"stream: n_objects={self.n_objects}, expected 1..{_MAX_OBJECTS};"
                " renumber the ids densely"
            )
        if len(self.objects) and not (
            self.objects.min() >= 0 and self.objects.max() < self.n_objects
        ):
            raise TraceError(
                f"stream: object ids {self.objects.min()}..{self.objects.max()},"
                f" expected 0..{self.n_objects - 1}"
            )
        _check_ends("token_end", self.token_end, len(self.objects))
        _check_ends("run_end", self.run_end, len(self.token_end))


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a cache did with a stream; every request is a hit or a miss.

    slots      capacity of the cache; of each layer's cache when scope is per_layer
    requests   int64[n_objects], how often each object was asked for
    hits       int64[n_objects], how often it was there
    evictions  int64[n_objects], how often it was thrown out
    """

    policy: str
    convention: str
    scope: str
    slots: int
    n_layers: int
    requests: Longs
    hits: Longs
    evictions: Longs

    @property
    def n_requests(self) -> int:
        """Requests replayed."""
        return int(self.requests.sum())

    @property
    def n_hits(self) -> int:
        """Requests served from the cache."""
        return int(self.hits.sum())

    @property
    def n_misses(self) -> int:
        """Requests that had to be fetched."""
        return self.n_requests - self.n_hits

    @property
    def n_evictions(self) -> int:
        """Objects thrown out to make room."""
        return int(self.evictions.sum())

    @property
    def hit_rate(self) -> float:
        """Hits over requests; nan for an empty stream."""
        return self.n_hits / self.n_requests if self.n_requests else float("nan")

    def per_layer(self, counts: Longs) -> Longs:
        """Sums int64[n_layers] of requests, hits or evictions (experts of a layer are adjacent)."""
        sums: Longs = counts.reshape(self.n_layers, -1).sum(axis=1)
        return sums


Run = tuple[npt.NDArray[np.int32], Longs]  # objects and token ends of one run
Kernel = Callable[[Run, int, int, bool, int], kernels.Counts]


def _plain(kernel: Callable[..., kernels.Counts], *extra: bool) -> Kernel:
    def of_run(
        run: Run, slots: int, n_objects: int, batched: bool, lookahead_tokens: int
    ) -> kernels.Counts:
        counts: kernels.Counts = kernel(*run, slots, n_objects, batched, *extra)
        return counts

    return of_run


def _segment(
    run: Run, slots: int, n_objects: int, batched: bool, lookahead_tokens: int
) -> kernels.Counts:
    return kernels.segment(*run, slots, n_objects, batched, lookahead_tokens)


POLICIES: dict[str, Kernel] = {
    "lru": _plain(kernels.lru),
    "lfu": _plain(kernels.lfu, False),  # count kept while resident
    "perfect_lfu": _plain(kernels.lfu, True),  # count never forgotten
    "fifo": _plain(kernels.fifo),
    "arc": _plain(kernels.arc),
    "belady": _plain(kernels.belady),
    "segment": _segment,  # most requests left in the next lookahead_tokens tokens stay
}


def replay(
    stream: RequestStream | npt.NDArray[np.int32] | npt.NDArray[np.int64],
    slots: int,
    policy: str = "lru",
    lookahead_tokens: int = DEFAULT_LOOKAHEAD_TOKENS,
) -> ReplayResult:
    """Replay a stream through an empty cache of `slots` objects.

    stream            a RequestStream, or int[requests] of ids >= 0 (execution order, one run)
    policy            a name in POLICIES
    lookahead_tokens  window of the policy `segment`; the others ignore it
    raises            TraceError for an unknown policy, slots < 1, ids out of range
    """
    if not isinstance(stream, RequestStream):
        stream = stream_of(stream)
    _known("policy", policy, tuple(POLICIES))
    if slots < 1 or lookahead_tokens < 1:
        raise TraceError(f"slots={slots}, lookahead_tokens={lookahead_tokens}: expected >= 1 each")
    hits = np.zeros(stream.n_objects, np.int64)
    evictions = np.zeros(stream.n_objects, np.int64)
    # More slots than objects, or foresight past the end, change nothing but memory.
    enough, lookahead = min(slots, stream.n_objects), min(lookahead_tokens, len(stream.token_end))
    batched = stream.convention == TOKEN_BATCH
    for run in _runs(stream):
        more = POLICIES[policy](run, enough, stream.n_objects, batched, lookahead)
        hits += more[0]
        evictions += more[1]
    requests = kernels.count_requests(stream.objects, stream.n_objects)
    return ReplayResult(policy, stream.convention, "global", slots, 1, requests, hits, evictions)


def replay_trace(
    trace: RoutingTrace | ExpertCounts,
    slots: int,
    policy: str = "lru",
    convention: str = EXECUTION_ORDER,
    scope: str = "global",
    lookahead_tokens: int = DEFAULT_LOOKAHEAD_TOKENS,
) -> ReplayResult:
    """Replay a trace through one cache of `slots` experts, or one such cache per layer.

    returns  counts over objects layer_column * n_experts + expert
    raises   TraceError for counts without token order, unknown names, slots < 1
    """
    _known("scope", scope, SCOPES)
    _known("convention", convention, CONVENTIONS)
    trace = require_tokens(trace, "cache replay")
    if scope == "global":
        parts = [replay(request_stream(trace, convention), slots, policy, lookahead_tokens)]
    else:
        topk, run_end = _rows_and_runs(trace, convention)
        columns = (topk[:, layer : layer + 1] for layer in range(trace.n_layers))
        streams = (_stream(column, run_end, trace.n_experts, convention) for column in columns)
        parts = [replay(stream, slots, policy, lookahead_tokens) for stream in streams]
    return ReplayResult(
        policy,
        convention,
        scope,
        slots,
        trace.n_layers,
        np.concatenate([part.requests for part in parts]),
        np.concatenate([part.hits for part in parts]),
        np.concatenate([part.evictions for part in parts]),
    )


def hit_rate(
    trace: RoutingTrace | ExpertCounts,
    policy: str,
    rho: float,
    convention: str = EXECUTION_ORDER,
    scope: str = "global",
    lookahead_tokens: int = DEFAULT_LOOKAHEAD_TOKENS,
) -> float:
    """Share of requests served by a cache of rho times one token's experts (see `slots_for`)."""
    trace = require_tokens(trace, "cache hit rate")
    slots = slots_for(trace, rho, scope)
    return replay_trace(trace, slots, policy, convention, scope, lookahead_tokens).hit_rate


def slots_for(trace: RoutingTrace, rho: float, scope: str = "global") -> int:
    """Slots of a cache of size rho: floor(rho * layers * top_k), per layer floor(rho * top_k).

    raises  TraceError when that is not at least one slot
    """
    _known("scope", scope, SCOPES)
    per_token = trace.top_k * (trace.n_layers if scope == "global" else 1)
    if not np.isfinite(rho) or int(rho * per_token + _ROUNDING) < 1:
        raise TraceError(f"rho={rho}: gives no slot ({per_token} experts a token, {scope})")
    return int(rho * per_token + _ROUNDING)


def request_stream(
    trace: RoutingTrace | ExpertCounts, convention: str = EXECUTION_ORDER
) -> RequestStream:
    """The requests of a trace: token by token, layer by layer, experts as stored; -1 left out."""
    trace = require_tokens(trace, "a request stream")
    _known("convention", convention, CONVENTIONS)
    topk, run_end = _rows_and_runs(trace, convention)
    return _stream(topk, run_end, trace.n_experts, convention)


def _rows_and_runs(trace: RoutingTrace, convention: str) -> tuple[npt.NDArray[np.int16], Longs]:
    """The choices in the order they are replayed, and where each run's tokens end."""
    if convention == TOKEN_BATCH:
        topk, starts = in_request_order(trace)
        return topk, starts[1:]
    return trace.topk, np.array([trace.n_tokens], np.int64)


def _stream(
    topk: npt.NDArray[np.int16], run_end: Longs, n_experts: int, convention: str
) -> RequestStream:
    n_tokens, n_layers, top_k = topk.shape
    first = np.arange(n_layers, dtype=np.int32)[:, None] * n_experts
    cells = (topk + first).reshape(n_tokens, -1)
    n_objects = n_layers * n_experts
    if n_tokens == 0 or topk.min() != MISSING:
        token_end = np.arange(1, n_tokens + 1, dtype=np.int64) * (n_layers * top_k)
        return RequestStream(cells.reshape(-1), n_objects, token_end, run_end, convention)
    present = (topk != MISSING).reshape(n_tokens, -1)
    token_end = np.cumsum(present.sum(axis=1, dtype=np.int64))
    n_missing = present.size - int(token_end[-1])
    return RequestStream(cells[present], n_objects, token_end, run_end, convention, n_missing)


def in_request_order(trace: RoutingTrace) -> tuple[npt.NDArray[np.int16], Longs]:
    """Rows grouped by request, in order of position, and where each request's rows start.

    returns  topk int16[tokens, moe_layers, top_k], contiguous and writable, which is the
             trace's own array when it is that already, and starts int64[requests + 1]
    """
    request, position = trace.request, trace.position
    step, advance = np.diff(request.astype(np.int64)), np.diff(position.astype(np.int64))
    topk = trace.topk
    if ((step < 0) | ((step == 0) & (advance < 0))).any():
        order = np.lexsort((position, request))
        topk, request = topk[order], request[order]
    bounds = np.flatnonzero(np.diff(request)) + 1
    starts = np.concatenate(([0], bounds, [len(request)])).astype(np.int64)
    return compiled_form(topk), starts


def compiled_form(topk: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """The same choices, contiguous and writable: other layouts would each compile every loop."""
    return np.require(topk, np.int16, ["C", "W"])


def stream_of(objects: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> RequestStream:
    """A stream in execution order from plain ids, every request a token of its own."""
    if objects.ndim != 1 or objects.dtype.kind not in "iu":
        raise TraceError(
            f"stream: {objects.dtype}{list(objects.shape)}, expected integers[requests]"
        )
    highest = int(objects.max()) if len(objects) else 0
    if highest >= _MAX_OBJECTS:
        raise TraceError(
            f"stream: object id {highest}, expected < {_MAX_OBJECTS}; renumber the ids densely"
        )
    ends = np.arange(1, len(objects) + 1, dtype=np.int64)
    run_end = np.array([len(objects)], np.int64)
    return RequestStream(objects.astype(np.int32), highest + 1, ends, run_end)


def _runs(stream: RequestStream) -> Iterator[Run]:
    """The stream cut at run_end, the token ends of each run counting from its own start."""
    token, start = 0, 0
    for token_stop in stream.run_end.tolist():
        stop = int(stream.token_end[token_stop - 1]) if token_stop else 0
        yield stream.objects[start:stop], stream.token_end[token:token_stop] - start
        token, start = token_stop, stop


def _check_ends(field: str, ends: Longs, total: int) -> None:
    last = int(ends[-1]) if len(ends) else 0
    if last != total or (len(ends) and int(ends[0]) < 0) or (np.diff(ends) < 0).any():
        raise TraceError(f"stream: {field} must rise from 0 to {total}, found the last at {last}")


def _known(field: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise TraceError(f"{field}: {name!r} is unknown, expected one of {', '.join(names)}")
