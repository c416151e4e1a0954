"""How many cache slots each layer gets out of one total.

`equal_split` and `shallow_first` are rules; `least_cost_split` is optimal for any cost a layer and
slot, by dynamic programming over layers, and `expected_loads` is AdapMoE's cost for it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError

Slots = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


def equal_split(total: int, n_layers: int, n_experts: int) -> Slots:
    """int64[n_layers]: the same for every layer, n_experts at most.

    Rounded down, so up to n_layers - 1 slots of the total stay unused.
    raises  PlanError for sizes below 1 or a negative total
    """
    return shallow_first(total, n_layers, n_experts, full_layers=0)


def shallow_first(total: int, n_layers: int, n_experts: int, full_layers: int) -> Slots:
    """int64[n_layers]: the first layers whole, the rest of the slots shared equally by the others.

    Rounded down, so that fewer slots than there are other layers stay unused.
    raises  PlanError when the total cannot hold the whole layers
    source  Fate, arXiv 2502.12224: c_i = E for i <= l*, then
            floor((C - (l* + 1) E) / (L - l* - 1)), full_layers = l* + 1
    """
    if min(n_layers, n_experts) < 1 or total < 0 or not 0 <= full_layers <= n_layers:
        raise PlanError(
            f"total={total}, n_layers={n_layers}, n_experts={n_experts},"
            f" full_layers={full_layers}: expected total >= 0, sizes >= 1 and"
            f" full_layers in 0..{n_layers}"
        )
    rest = total - full_layers * n_experts
    if rest < 0:
        raise PlanError(
            f"full_layers={full_layers} need {full_layers * n_experts} slots, total={total}"
            f" is {-rest} short"
        )
    others = n_layers - full_layers
    each = min(n_experts, rest // others) if others else 0
    return np.repeat([n_experts, each], [full_layers, others]).astype(np.int64)


def expected_loads(n_experts: int, recall: float, single_share: float) -> Doubles:
    """float64[n_experts + 1]: loads a token that prefetching does not hide, by slots of the layer.

    For a router of two experts, any two equally likely to be chosen and any to be in a slot.
    recall        share of the layer's experts that the layer before predicts
    single_share  share of tokens that use one expert only (adaptive gating)
    raises        PlanError for fewer than two experts or shares outside 0..1
    source        AdapMoE, arXiv 2408.10284, in its code: of two missing experts one load remains
                  when the prediction was right and two when it was wrong; of one missing expert
                  none and one
    """
    if n_experts < 2 or not (0 <= recall <= 1 and 0 <= single_share <= 1):
        raise PlanError(
            f"n_experts={n_experts}, recall={recall}, single_share={single_share}: expected two"
            " experts or more and shares in 0..1"
        )
    absent = n_experts - np.arange(n_experts + 1, dtype=np.float64)
    pairs = n_experts * (n_experts - 1)
    both = absent * (absent - 1) / pairs
    one = 2 * absent * (n_experts - absent) / pairs
    wrong = 1 - recall
    single = absent / n_experts * wrong
    double = 2 * both * wrong + both * recall + one * wrong
    return np.asarray(single_share * single + (1 - single_share) * double)


def least_cost_split(cost: Doubles, total: int, least: int = 0) -> Slots:
    """int64[n_layers]: the split of at most `total` slots with the lowest sum of costs.

    cost    float64[n_layers, most + 1], finite, cost of layer i with t slots, in any unit
    least   slots that every layer gets at least
    returns the best split; of equal ones the fewest slots for the last layer, then for the one
            before it, and so on
    raises  PlanError for a table that is empty or not finite, or a total below the least
    source  F[i][j] = min over t of F[i-1][j-t] + f_i(t), as in AdapMoE, arXiv 2408.10284
    """
    if cost.ndim != 2 or not cost.shape[0] or not np.isfinite(cost).all():
        raise PlanError(f"cost: shape {cost.shape}, expected finite [n_layers, most + 1]")
    n_layers, most = cost.shape[0], cost.shape[1] - 1
    if not 0 <= least <= most or total < least * n_layers:
        raise PlanError(
            f"least={least}, total={total}: expected least in 0..{most} and a total of"
            f" {n_layers} x least or more"
        )
    best = np.zeros(total + 1)  # lowest cost of the layers so far with at most j slots
    chosen = np.empty((n_layers, total + 1), np.int64)
    for layer in range(n_layers):
        best, chosen[layer] = _with_one_more(best, cost[layer], least)
    slots, left = np.empty(n_layers, np.int64), total
    for layer in range(n_layers - 1, -1, -1):
        slots[layer] = chosen[layer, left]
        left -= slots[layer]
    return slots


def _with_one_more(before: Doubles, cost: Doubles, least: int) -> tuple[Doubles, Slots]:
    """Lowest cost with at most j slots when one more layer is served, and its slots."""
    after = np.full(len(before), np.inf)
    slots = np.full(len(before), least, np.int64)
    for t in range(least, min(len(cost), len(before))):
        with_t = before[: len(before) - t] + cost[t]
        better = with_t < after[t:]
        after[t:][better] = with_t[better]
        slots[t:][better] = t
    return after, slots
