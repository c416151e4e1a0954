"""Local routing consistency: can a few experts serve a segment of tokens? (arXiv 2505.16056)

SRP(m) scores the best rule "an expert is on for m consecutive tokens when they use it at least t
times"; SCH(m, rho) is the hit rate of a cache that sees m tokens ahead. Neither may be compared
between models of different k/E without its random floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled
from traces.errors import TraceError
from traces.locality import check_window, windows_in
from traces.replay import TOKEN_BATCH, hit_rate, in_request_order
from traces.routing import ExpertCounts, RoutingTrace, require_tokens


@dataclass(frozen=True, slots=True)
class SegmentRouting:
    """SRP of one window length, pooled over layers, experts and windows.

    srp        max over t of F1(t), in 0..1; nan when no request is window_tokens long
    threshold  the smallest such t, in uses per window; 0 when srp is nan
    rho_hat    experts that rule turns on over experts the tokens use
    floor      srp of independent even routing with the same k/E
    per_layer  float64[moe_layers], srp of each layer by itself
    n_windows  windows of each layer
    """

    window_tokens: int
    srp: float
    threshold: int
    rho_hat: float
    floor: float
    per_layer: npt.NDArray[np.float64]
    n_windows: int


def srp(trace: RoutingTrace | ExpertCounts, window_tokens: int) -> SegmentRouting:
    """Segment routing best performance over all windows (stride 1) inside each request."""
    trace = require_tokens(trace, "segment routing (SRP)")
    floor = srp_floor(trace.n_experts, trace.top_k, window_tokens)
    topk, starts = in_request_order(trace)
    n_windows = windows_in(starts, window_tokens)
    if n_windows == 0:
        nothing = np.full(trace.n_layers, np.nan)
        return SegmentRouting(window_tokens, math.nan, 0, math.nan, floor, nothing, 0)
    uses = _use_histogram(topk, starts, trace.n_experts, window_tokens)
    best, threshold, rho_hat = best_segment_rule(uses.sum(axis=0).astype(float), window_tokens)
    per_layer = [best_segment_rule(layer.astype(float), window_tokens)[0] for layer in uses]
    return SegmentRouting(
        window_tokens, best, threshold, rho_hat, floor, np.array(per_layer), n_windows
    )


def srp_floor(n_experts: int, top_k: int, window_tokens: int) -> float:
    """SRP of independent even routing: uses in a window are Binomial(m, k/E), in closed form."""
    check_window(window_tokens)
    if not 0 < top_k <= n_experts:
        raise TraceError(f"top_k={top_k}, expected 1..n_experts={n_experts}")
    if top_k == n_experts:
        return 1.0
    m, p = window_tokens, top_k / n_experts
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, m + 1)))))
    c = np.arange(m + 1)
    log_pmf = log_factorial[m] - log_factorial - log_factorial[::-1]
    log_pmf += c * math.log(p) + (m - c) * math.log1p(-p)
    return best_segment_rule(np.exp(log_pmf), m)[0]


def best_segment_rule(
    uses: npt.NDArray[np.float64], window_tokens: int
) -> tuple[float, int, float]:
    """The threshold t >= 1 of the largest F1, from how often an expert is used c times.

    uses     float64[highest c + 1], how many (expert, window) pairs have c uses; any scale
    returns  (F1, t, rho_hat); with matches M = sum_{c>=t} c n_c, predictions
             P = m sum_{c>=t} n_c and uses A = sum c n_c: F1 = 2 M / (P + A), rho_hat = P / A;
             (nan, 0, nan) when nothing was used
    source   arXiv 2505.16056, section 3
    """
    c = np.arange(len(uses))
    at_least = np.cumsum(uses[::-1])[::-1][1:]
    matches = np.cumsum((c * uses)[::-1])[::-1][1:]
    if len(matches) == 0 or matches[0] == 0:
        return math.nan, 0, math.nan
    predictions, used = window_tokens * at_least, matches[0]
    f1 = 2 * matches / (predictions + used)
    best = int(np.argmax(f1))
    return float(f1[best]), best + 1, float(predictions[best] / used)


def sch(
    trace: RoutingTrace | ExpertCounts,
    window_tokens: int,
    rho: float,
    convention: str = TOKEN_BATCH,
) -> float:
    """Segment cache best hit rate: rho * layers * top_k slots, window_tokens of foresight."""
    return hit_rate(trace, "segment", rho, convention, lookahead_tokens=window_tokens)


@compiled
def _use_histogram(
    topk: npt.NDArray[np.int16], starts: npt.NDArray[np.int64], n_experts: int, window: int
) -> npt.NDArray[np.int64]:
    """How many (expert, window) pairs of each layer have c uses: int64[layers, window * k + 1].

    A count is entered when it changes, times the windows it lasted: O(k) a token, not O(E).
    """
    _, n_layers, k = topk.shape
    uses = np.zeros((n_layers, window * k + 1), np.int64)
    count, since = np.zeros(n_experts, np.int64), np.zeros(n_experts, np.int64)
    for layer in range(n_layers):
        for request in range(len(starts) - 1):
            first, stop = starts[request], starts[request + 1]
            if stop - first < window:
                continue
            count[:] = 0
            since[:] = first + window - 1  # last token of the first whole window
            for token in range(first, stop):
                for i in range(k):
                    gone = topk[token - window, layer, i] if token - window >= first else -1
                    if gone >= 0:
                        uses[layer, count[gone]] += max(token - since[gone], 0)
                        since[gone] = max(token, since[gone])
                        count[gone] -= 1
                for i in range(k):
                    expert = topk[token, layer, i]
                    if expert >= 0:
                        uses[layer, count[expert]] += max(token - since[expert], 0)
                        since[expert] = max(token, since[expert])
                        count[expert] += 1
            for expert in range(n_experts):
                uses[layer, count[expert]] += stop - since[expert]
    return uses
