"""Judge: is the plan worth it? Paired steps, a bootstrap error bar, a verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError

Verdict = Literal["deploy", "not_worth_it"]
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Gain:
    """Share of step time saved: 1 - plan / current, with a 95 % bootstrap interval.

    n_steps  paired steps it rests on; with one step the interval is the point itself
    """

    mean: float
    low: float
    high: float
    n_steps: int


def paired_gain(
    current_s: npt.NDArray[np.float64], plan_s: npt.NDArray[np.float64], seed: int
) -> Gain:
    """Gain of a plan over what runs today, on the same steps.

    current_s, plan_s  float64[steps], seconds of the same steps under both
    source             percentile bootstrap over steps of the ratio of mean times
    """
    if current_s.shape != plan_s.shape or current_s.size == 0:
        raise PlanError(f"steps: {current_s.shape} against {plan_s.shape}, expected equal and > 0")
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(plan_s), size=(_DRAWS, len(plan_s)))
    draws = 1.0 - plan_s[picks].mean(axis=1) / current_s[picks].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Gain(float(1.0 - plan_s.mean() / current_s.mean()), float(low), float(high), len(plan_s))


def verdict(gain: Gain, least_gain_share: float) -> Verdict:
    """ "deploy" when even the low end of the interval saves least_gain_share of the step."""
    return "deploy" if gain.low >= least_gain_share and gain.mean > 0 else "not_worth_it"
