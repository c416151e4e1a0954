"""Drift: how far expert loads move between planning and use, and which experts move together.

A placement is planned on one workload and used on another. Experts that are chosen together rise
and fall together, so a rank that collects them saves copies and risks more; the planner weighs
both. Experts of one router group count as chosen together when only counts are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from traces.compiled import compiled

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drift:
    """The size of drift.

    relative_sd  standard deviation of an expert's load, as a share of the load
    kin_share    share of that variance in common between experts that are kin (see `token_kin`)
    tail         how many standard deviations the busiest of all ranks lies above its plan

    The defaults are those of serving traffic. Pairs of workloads show (relative_sd, kin_share):
    DeepSeek-V3 serving traffic 0.25 to 0.4, 0.11 to 0.22; gpt-oss-20b, first against second half
    of the requests, 0.5, 0.8; DeepSeek-V2-Lite, law against intent texts, 0.8, 0.4; halves of one
    chat workload (Mixtral) 0.06 and none.
    """

    relative_sd: float = 0.3
    kin_share: float = 0.2
    tail: float = 2.0


NO_DRIFT = Drift(0.0, 0.0, 0.0)


def group_kin(n_experts: int, n_groups: int) -> FloatArray:
    """float64[n_experts, n_experts]: 1 for experts of one router group, when there are groups."""
    if n_groups == 1:
        return np.eye(n_experts)
    group = np.arange(n_experts) // (n_experts // n_groups)
    return np.asarray(group[:, None] == group[None, :], dtype=np.float64)


def token_kin(topk: npt.NDArray[np.int16], n_experts: int) -> FloatArray:
    """float64[n_experts, n_experts] in 0..1: how much more often than by chance two are chosen.

    topk     int16[tokens, k] of one layer, -1 for missing
    returns  lift - 1 of the joint choice, clipped to 0..1; 1 on the diagonal
    """
    together = _together(topk, n_experts)
    alone = np.diag(together).copy()
    by_chance = np.outer(alone, alone) / max(len(topk), 1)
    lift = np.divide(together, by_chance, out=np.zeros_like(together), where=by_chance > 0)
    kin = np.clip(lift - 1.0, 0.0, 1.0)
    np.fill_diagonal(kin, 1.0)
    return kin


@compiled
def _together(topk: npt.NDArray[np.int16], n_experts: int) -> FloatArray:
    """float64[n_experts, n_experts]: tokens that chose both; alone on the diagonal."""
    counts = np.zeros((n_experts, n_experts))
    for token in range(topk.shape[0]):
        for one in topk[token]:
            for other in topk[token]:
                if one >= 0 and other >= 0:
                    counts[one, other] += 1.0
    return counts
