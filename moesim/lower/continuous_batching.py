"""Time per output token of a server under steady load, from the passes it runs.

C requests are always under way; as one ends the next is sent. A request decodes osl tokens, and in
that time each of the other C - 1 is replaced once, so that (C - 1) / osl prompts on average are
computed between two of its tokens. A prompt is one unit of work, or several chunks when it is
longer than the token budget of a pass; units that come together share a pass up to the budget.

    time per token = sum over k of P(k) t(k),  P Poisson with mean (C - 1) / osl * chunks

t(k) is the pass with k units beside the decode tokens, or, in an engine that runs prompts in passes
of their own, the decode pass plus that of the prompts. Units over the budget wait, which costs
later tokens the same time: their mean is added at the cost of one more unit in a full pass. What a
request's own prompt takes is time to first token, and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.fitted.parts import Floats
from moesim.errors import SimulationError
from moesim.lower.engine_step import Formats, Passes, Ranks, operators
from moesim.lower.step_prices import Prices
from traces.model import ModelSpec

MOST_UNITS = 5  # in a pass; more together are as rare as the tail of the Poisson law


@dataclass(frozen=True, slots=True)
class Load:
    """Steady loads, float64[n] each: prompt and output tokens, and requests under way in all."""

    isl: Floats
    osl: Floats
    concurrency: Floats

    def __post_init__(self) -> None:
        for name in ("isl", "osl", "concurrency"):
            if not (getattr(self, name) >= 1).all():
                raise SimulationError(f"{name}={getattr(self, name).min():g} must be >= 1")


@dataclass(frozen=True, slots=True)
class Scheduler:
    """How an engine makes passes.

    token_budget  most tokens of a pass
    mixes         prompts and decode tokens share a pass
    step_s        seconds of the host between passes that nothing hides
    """

    token_budget: int
    mixes: bool
    step_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Serving:
    """A model on an engine."""

    model: ModelSpec
    ranks: Ranks
    formats: Formats
    scheduler: Scheduler
    prices: Prices


def pass_seconds(serving: Serving, passes: Passes) -> Floats:
    """Seconds of each pass, float64[n]: the sum of its operators, one after the other."""
    total = np.full(len(passes.sequences), serving.scheduler.step_s)
    listed = operators(serving.model, serving.ranks, serving.formats, passes)
    for operator, seconds in zip(listed, serving.prices.seconds(listed), strict=True):
        total = total + operator.times * seconds
    return total * (passes.tokens > 0)


def time_per_output_token(serving: Serving, load: Load) -> Floats:
    """Mean seconds between two tokens of a request, float64[n]; the formula is above."""
    units = _units(serving, load)
    alone = pass_seconds(serving, _passes(serving, load, units, 0, decode=True))
    mixes = serving.scheduler.mixes
    extra = [np.zeros(len(alone))]
    for k in range(1, MOST_UNITS + 1):
        together = pass_seconds(serving, _passes(serving, load, units, k, decode=mixes))
        extra.append(np.maximum(together - alone, 0.0) if mixes else together)
    return alone + _mean_extra(units, np.stack(extra))


@dataclass(frozen=True, slots=True)
class _Units:
    """Chunks of prompts: tokens of one, cached before it, how many fit a pass, mean per pass."""

    tokens: Floats
    cached: Floats
    most: Floats
    mean: Floats


def _units(serving: Serving, load: Load) -> _Units:
    budget = serving.scheduler.token_budget
    chunks = np.ceil(load.isl / budget)
    tokens = load.isl / chunks
    most = np.maximum(np.floor(budget / tokens), 1) * serving.ranks.attention_dp
    return _Units(
        tokens, (load.isl - tokens) / 2, np.minimum(most, MOST_UNITS),
        (load.concurrency - 1) / load.osl * chunks,
    )  # fmt: skip


def _passes(serving: Serving, load: Load, units: _Units, k: int, *, decode: bool) -> Passes:
    dp = serving.ranks.attention_dp
    held = np.minimum(k, units.most)
    decoding = load.concurrency * (1.0 if decode else 0.0)
    return Passes(
        np.ceil(decoding / dp), load.isl + load.osl / 2, np.ceil(held / dp), units.tokens,
        units.cached, decoding + held * units.tokens,
    )  # fmt: skip


def _mean_extra(units: _Units, extra: Floats) -> Floats:
    """Sum over k of P(k) extra[k]; what does not fit a pass comes at the cost of the last unit.

    extra  float64[MOST_UNITS + 1, n]
    """
    from scipy.stats import poisson

    at, n = units.most.astype(np.int64), np.arange(len(units.mean))
    total, served = np.zeros(len(n)), np.zeros(len(n))
    for k in range(1, MOST_UNITS + 1):
        exact, beyond = poisson.pmf(k, units.mean), poisson.sf(k - 1, units.mean)
        share = np.where(k < at, exact, np.where(k == at, beyond, 0.0))
        total, served = total + share * extra[k], served + share * k
    marginal = extra[at, n] - extra[at - 1, n]
    return np.asarray(total + np.maximum(units.mean - served, 0.0) * marginal)
