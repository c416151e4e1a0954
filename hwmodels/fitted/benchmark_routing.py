"""How many tokens each expert got in the public benchmark tables, which name only a distribution.

The tables say "balanced" or "power_law_A" and time one rank of an expert-parallel group: the one
with most tokens where loads differ. The rules below are those of the collector that made them
(ai-dynamo/aiconfigurator), with what the times themselves tell of its rounding: tokens left over
by it go to experts without any, evenly spread. Distinct experts that follow from them
explain the measured times of memory-bound rows on H100 and L40S; giving the rest to the busiest
experts instead leaves three times their error.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from hwmodels.errors import HardwareError
from hwmodels.fitted.experts import ROUTED, routed

DRAWS = 12  # of a power law, averaged: the table's own draw is not known
TRIES = 20
Counts = npt.NDArray[np.int64]


@functools.cache
def rank_counts(
    tokens: int, experts: int, top_k: int, ranks: int, distribution: str
) -> tuple[Counts, ...]:
    """Tokens of each expert of the timed rank, int64[experts / ranks], one array a draw.

    tokens        of the whole expert-parallel group
    distribution  "balanced" or "power_law_A"
    raises        HardwareError for sizes that do not divide, or another distribution
    """
    if ranks < 1 or experts % ranks or not 1 <= top_k <= experts:
        raise HardwareError(f"experts={experts}, ranks={ranks}, top_k={top_k} do not fit")
    if distribution == "balanced":
        return (_balanced(tokens, experts, top_k)[: experts // ranks],)
    if not distribution.startswith("power_law_"):
        raise HardwareError(f"distribution {distribution!r}: expected balanced or power_law_A")
    exponent = float(distribution.removeprefix("power_law_"))
    rng = np.random.default_rng([tokens, experts, top_k, ranks, round(exponent * 100)])
    draws = (_power_law(tokens, experts, top_k, exponent, rng) for _ in range(DRAWS))
    by_rank = (counts.reshape(ranks, -1) for counts in draws)
    return tuple(counts[counts.sum(axis=1).argmax()] for counts in by_rank)


@functools.cache
def mean_routed(
    tokens: int, experts: int, top_k: int, ranks: int, distribution: str
) -> tuple[float, ...]:
    """The columns `experts.ROUTED` of the timed rank, in their order, each the mean over draws."""
    columns = routed(np.stack(rank_counts(tokens, experts, top_k, ranks, distribution)))
    return tuple(float(columns[name].mean()) for name in ROUTED)


def _balanced(tokens: int, experts: int, top_k: int) -> Counts:
    """Token i takes experts i, i + s, i + 2 s, ... with s = experts / top_k, few tokens spread."""
    stride = -(-experts // top_k)
    token, slot = np.arange(tokens)[:, None], np.arange(top_k)[None] * stride
    first = token if tokens >= stride else token * stride / tokens
    ids = np.floor((first + slot) % experts).astype(np.int64)
    return np.bincount(ids.ravel(), minlength=experts)


def _power_law(
    tokens: int, experts: int, top_k: int, exponent: float, rng: np.random.Generator
) -> Counts:
    """Loads drawn from a bounded power law, rounded to all slots, at most one a token."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    for _ in range(TRIES):
        power = 1 - exponent
        drawn = (low**power + (high**power - low**power) * rng.random(experts)) ** (1 / power)
        counts = _rounded(drawn / drawn.sum() * tokens * top_k, tokens * top_k)
        if counts.max() <= tokens:
            return counts
    return np.minimum(counts, tokens)


def _rounded(loads: npt.NDArray[np.float64], total: int) -> Counts:
    counts = np.rint(loads).astype(np.int64)
    short = total - int(counts.sum())
    if short < 0:
        return _less(counts, -short)
    idle = np.flatnonzero(counts == 0)
    if short <= len(idle):
        counts[idle[np.arange(short) * len(idle) // max(short, 1)]] += 1
        return counts
    counts += short // len(counts)
    counts[np.argsort(counts, kind="stable")[: short % len(counts)]] += 1
    return counts


def _less(counts: Counts, surplus: int) -> Counts:
    """Take one token from each of the busiest experts, as often as needed."""
    while surplus:
        busiest = np.argsort(-counts, kind="stable")[:surplus]
        busiest = busiest[counts[busiest] > 0]
        counts[busiest] -= 1
        surplus -= len(busiest)
    return counts
