"""Which experts follow, accompany and repeat each other: affinity, reuse, working set.

A request is a sample: "consecutive" and "window" mean rows of one request in order of position,
and nothing reaches across requests. Missing cells (-1) are skipped.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled
from traces.errors import TraceError
from traces.replay import compiled_form, in_request_order
from traces.routing import ExpertCounts, RoutingTrace, require_tokens

Choices: TypeAlias = npt.NDArray[np.int16]
Longs: TypeAlias = npt.NDArray[np.int64]
Doubles: TypeAlias = npt.NDArray[np.float64]

_DEFAULT_MAX_BYTES = 2**31
_MAX_WINDOW_TOKENS = 2**20


def transitions(trace: RoutingTrace | ExpertCounts, max_bytes: int = _DEFAULT_MAX_BYTES) -> Longs:
    """How often a token that chose e at one captured layer chose f at the next.

    returns  int64[moe_layers - 1, n_experts (e), n_experts (f)], every pair of a token counted
    raises   TraceError for counts, or when the result would exceed max_bytes
    """
    trace = require_tokens(trace, "transition matrices")
    _check_bytes("transition matrices", trace.n_layers - 1, trace.n_experts, max_bytes)
    return _transitions(compiled_form(trace.topk), trace.n_experts)


def coactivation(trace: RoutingTrace | ExpertCounts, max_bytes: int = _DEFAULT_MAX_BYTES) -> Longs:
    """How many tokens chose both e and f at a layer; the diagonal is how many chose e.

    returns  int64[moe_layers, n_experts, n_experts], symmetric
    raises   TraceError for counts, or when the result would exceed max_bytes
    """
    trace = require_tokens(trace, "co-activation matrices")
    _check_bytes("co-activation matrices", trace.n_layers, trace.n_experts, max_bytes)
    return _coactivation(compiled_form(trace.topk), trace.n_experts)


def reuse_ratio(trace: RoutingTrace | ExpertCounts) -> Doubles:
    """Overlap of consecutive tokens of a request over that of independent draws; 1 is no reuse.

    mean |S_t & S_t+1| over sum_e q_e**2, where q_e is the share of tokens that chose e. A token
    without any expert at a layer takes no part there.
    returns  float64[moe_layers], nan where no two consecutive tokens or no choice was captured
    """
    trace = require_tokens(trace, "reuse of consecutive tokens")
    topk, starts = in_request_order(trace)
    overlap, pairs, tokens, chosen = _overlaps(topk, starts, trace.n_experts)
    share = chosen / np.maximum(tokens, 1)[:, None]
    independent = (share**2).sum(axis=1)
    ratio = np.full(trace.n_layers, np.nan)
    measured = pairs > 0
    ratio[measured] = overlap[measured] / pairs[measured] / independent[measured]
    return ratio


def working_set(trace: RoutingTrace | ExpertCounts, window_tokens: int) -> Doubles:
    """Mean number of distinct experts in windows of consecutive tokens of a request.

    returns  float64[moe_layers], over all windows (stride 1); nan when no request is long enough
    """
    trace = require_tokens(trace, "working set")
    check_window(window_tokens)
    topk, starts = in_request_order(trace)
    n_windows = windows_in(starts, window_tokens)
    if n_windows == 0:
        return np.full(trace.n_layers, np.nan)
    return _distinct_in_windows(topk, starts, trace.n_experts, window_tokens) / n_windows


def independent_working_set(n_experts: int, top_k: int, window_tokens: int) -> float:
    """Distinct experts of window_tokens independent even draws: E (1 - (1 - k/E)**n)."""
    return n_experts * (1.0 - (1.0 - top_k / n_experts) ** window_tokens)


def check_window(window_tokens: int) -> None:
    """Refuse a window that holds no token, or more than any table of counts should."""
    if not 1 <= window_tokens <= _MAX_WINDOW_TOKENS:
        raise TraceError(f"window_tokens={window_tokens}, expected 1..{_MAX_WINDOW_TOKENS}")


def windows_in(starts: Longs, window_tokens: int) -> int:
    """Windows of window_tokens tokens, stride 1, in requests that begin at starts[:-1]."""
    return int(np.maximum(np.diff(starts) - window_tokens + 1, 0).sum())


def distinct_per_forward(trace: RoutingTrace | ExpertCounts) -> tuple[Longs, Longs]:
    """Tokens and distinct experts of every forward pass, in the order of their ids.

    returns  tokens int64[passes], distinct int64[passes, moe_layers]
    raises   TraceError when the trace did not log forward passes
    """
    trace = require_tokens(trace, "distinct experts per batch")
    if trace.forward is None:
        raise TraceError("forward: the trace logs no forward passes, so its batches are unknown")
    order = np.argsort(trace.forward, kind="stable")
    bounds = np.flatnonzero(np.diff(trace.forward[order])) + 1
    starts = np.concatenate(([0], bounds, [trace.n_tokens])).astype(np.int64)
    if trace.n_tokens == 0:
        starts = starts[:1]
    topk = compiled_form(trace.topk)
    return np.diff(starts), _distinct_in_batches(topk, order, starts, trace.n_experts)


def distinct_per_batch(
    trace: RoutingTrace | ExpertCounts,
    batch_tokens: int,
    n_batches: int,
    rng: np.random.Generator,
) -> Longs:
    """Distinct experts of batches made up of batch_tokens different tokens drawn at random.

    returns  int64[n_batches, moe_layers]
    raises   TraceError when the trace has fewer tokens than a batch
    """
    trace = require_tokens(trace, "distinct experts per batch")
    if not 1 <= batch_tokens <= trace.n_tokens or n_batches < 1:
        raise TraceError(
            f"batch_tokens={batch_tokens}, n_batches={n_batches}:"
            f" expected 1..{trace.n_tokens} (the trace's tokens) and >= 1"
        )
    draws = [rng.choice(trace.n_tokens, batch_tokens, replace=False) for _ in range(n_batches)]
    starts = np.arange(n_batches + 1, dtype=np.int64) * batch_tokens
    rows = np.concatenate(draws)
    return _distinct_in_batches(compiled_form(trace.topk), rows, starts, trace.n_experts)


def _check_bytes(what: str, n_layers: int, n_experts: int, max_bytes: int) -> None:
    needed = max(n_layers, 0) * n_experts**2 * 8
    if needed > max_bytes:
        raise TraceError(
            f"{what}: {n_layers} x {n_experts} x {n_experts} counts need {needed} bytes,"
            f" expected at most {max_bytes}; take fewer layers or raise max_bytes"
        )


@compiled
def _transitions(topk: Choices, n_experts: int) -> Longs:
    n_tokens, n_layers, k = topk.shape
    counts = np.zeros((max(n_layers - 1, 0), n_experts, n_experts), np.int64)
    for token in range(n_tokens):
        for layer in range(n_layers - 1):
            for i in range(k):
                here = topk[token, layer, i]
                if here < 0:
                    continue
                for j in range(k):
                    after = topk[token, layer + 1, j]
                    if after >= 0:
                        counts[layer, here, after] += 1
    return counts


@compiled
def _coactivation(topk: Choices, n_experts: int) -> Longs:
    n_tokens, n_layers, k = topk.shape
    counts = np.zeros((n_layers, n_experts, n_experts), np.int64)
    for token in range(n_tokens):
        for layer in range(n_layers):
            for i in range(k):
                one = topk[token, layer, i]
                if one < 0:
                    continue
                counts[layer, one, one] += 1
                for j in range(i):
                    other = topk[token, layer, j]
                    if other >= 0:
                        counts[layer, one, other] += 1
                        counts[layer, other, one] += 1
    return counts


@compiled
def _overlaps(topk: Choices, starts: Longs, n_experts: int) -> tuple[Longs, Longs, Longs, Longs]:
    """Per layer: experts shared by consecutive tokens, such pairs, tokens with any expert.

    The fourth is how often each expert was chosen [layers, experts].
    """
    _, n_layers, k = topk.shape
    overlap, pairs = np.zeros(n_layers, np.int64), np.zeros(n_layers, np.int64)
    tokens, chosen = np.zeros(n_layers, np.int64), np.zeros((n_layers, n_experts), np.int64)
    last_token = np.full((n_layers, n_experts), -2, np.int64)  # token that last chose an expert
    last_row = np.full(n_layers, -2, np.int64)  # token that last chose any
    for request in range(len(starts) - 1):
        first = starts[request]
        for token in range(first, starts[request + 1]):
            for layer in range(n_layers):
                chose = False
                for i in range(k):
                    expert = topk[token, layer, i]
                    if expert < 0:
                        continue
                    chose = True
                    chosen[layer, expert] += 1
                    if token > first and last_token[layer, expert] == token - 1:
                        overlap[layer] += 1
                    last_token[layer, expert] = token
                if chose:
                    tokens[layer] += 1
                    if token > first and last_row[layer] == token - 1:
                        pairs[layer] += 1
                    last_row[layer] = token
    return overlap, pairs, tokens, chosen


@compiled
def _distinct_in_windows(topk: Choices, starts: Longs, n_experts: int, window: int) -> Longs:
    """Per layer: distinct experts summed over all windows."""
    _, n_layers, k = topk.shape
    total = np.zeros(n_layers, np.int64)
    count = np.zeros(n_experts, np.int64)
    for layer in range(n_layers):
        for request in range(len(starts) - 1):
            first, distinct = starts[request], 0
            count[:] = 0
            for token in range(first, starts[request + 1]):
                for i in range(k):
                    expert = topk[token, layer, i]
                    if expert >= 0:
                        distinct += count[expert] == 0
                        count[expert] += 1
                    if token - window >= first:
                        gone = topk[token - window, layer, i]
                        if gone >= 0:
                            count[gone] -= 1
                            distinct -= count[gone] == 0
                if token - first >= window - 1:
                    total[layer] += distinct
    return total


@compiled
def _distinct_in_batches(topk: Choices, order: Longs, starts: Longs, n_experts: int) -> Longs:
    """Distinct experts [batches, layers]; batch b holds the rows order[starts[b]:starts[b + 1]]."""
    _, n_layers, k = topk.shape
    n_batches = len(starts) - 1
    distinct = np.zeros((n_batches, n_layers), np.int64)
    last_batch = np.full((n_layers, n_experts), -1, np.int64)
    for batch in range(n_batches):
        for row in order[starts[batch] : starts[batch + 1]]:
            for layer in range(n_layers):
                for i in range(k):
                    expert = topk[row, layer, i]
                    if expert >= 0 and last_batch[layer, expert] != batch:
                        last_batch[layer, expert] = batch
                        distinct[batch, layer] += 1
    return distinct
