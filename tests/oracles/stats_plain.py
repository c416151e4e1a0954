"""Statistics of a trace, counted one by one in plain Python: the specification of the fast ones."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

from traces.routing import RoutingTrace

Row = list[int]


def requests_of(trace: RoutingTrace, layer: int) -> list[list[Row]]:
    """Choices of one layer: per request, in order of position, the experts of each token."""
    rows: dict[int, list[tuple[int, Row]]] = {}
    for token in range(trace.n_tokens):
        chosen = [int(expert) for expert in trace.topk[token, layer] if expert >= 0]
        rows.setdefault(int(trace.request[token]), []).append((int(trace.position[token]), chosen))
    return [[row for _, row in sorted(rows[r], key=lambda item: item[0])] for r in sorted(rows)]


def windows(trace: RoutingTrace, layer: int, window_tokens: int) -> list[list[int]]:
    """All experts used in every whole window of every request of one layer."""
    return [
        [expert for row in request[i : i + window_tokens] for expert in row]
        for request in requests_of(trace, layer)
        for i in range(len(request) - window_tokens + 1)
    ]


def srp_plain(trace: RoutingTrace, layers: list[int], m: int) -> tuple[float, int, float]:
    """(F1, threshold, rho_hat) by trying every rule "on when used at least t times"."""
    uses = [
        Counter(window)[expert]
        for layer in layers
        for window in windows(trace, layer, m)
        for expert in range(trace.n_experts)
    ]
    best = (Fraction(-1), 0, Fraction(0))
    for t in range(1, max(uses) + 1):
        on = [c for c in uses if c >= t]
        f1 = Fraction(2 * sum(on), m * len(on) + sum(uses))
        if f1 > best[0]:
            best = (f1, t, Fraction(m * len(on), sum(uses)))
    return float(best[0]), best[1], float(best[2])


def floor_plain(n_experts: int, top_k: int, m: int) -> float:
    """SRP of Binomial(m, k/E) uses with exact fractions."""
    p = Fraction(top_k, n_experts)
    share = [math.comb(m, c) * p**c * (1 - p) ** (m - c) for c in range(m + 1)]
    return float(
        max(
            2 * sum(c * share[c] for c in range(t, m + 1)) / (m * sum(share[t:]) + m * p)
            for t in range(1, m + 1)
        )
    )


def reuse_plain(trace: RoutingTrace, layer: int) -> float:
    """Mean overlap of consecutive tokens over sum q_e**2, tokens without experts left out."""
    requests = requests_of(trace, layer)
    rows = [row for request in requests for row in request if row]
    pairs = [
        len(set(one) & set(two))
        for request in requests
        for one, two in pairwise(request)
        if one and two
    ]
    if not pairs:
        return math.nan
    used = Counter(expert for row in rows for expert in row)
    independent = sum((count / len(rows)) ** 2 for count in used.values())
    return sum(pairs) / len(pairs) / independent
