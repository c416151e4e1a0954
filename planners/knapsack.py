"""Multiple-choice knapsack with several capacities: one option for every item, with a bound.

Every item (an expert, a layer's attention, a layer's KV cache) takes one of its options (a tier, a
bit width), each with a cost and a size in every limited memory. The Lagrangian dual is maximised by
cutting planes (Kelley, 1960): at given prices of memory every item picks its cheapest option on its
own, so that a step is one pass over arrays. The dual is the linear relaxation, a bound on any plan;
the plan itself follows from its prices, and what room is left is filled by the best upgrades.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from planners.errors import PlanError

Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]

_MOST_CUTS = 120
_CLOSE = 1e-6  # relative gap of the dual that ends the search
_FILLINGS = 20
_MENDINGS = 200
_DEARER = (1.0, 1.00001, 1.0001, 1.001, 1.01, 1.05, 1.2, 1.5, 2.0, 4.0, 16.0, 256.0)


@dataclass(frozen=True, slots=True)
class Choices:
    """Items and their options.

    cost      float64[items, options], inf where an item lacks the option
    size      float64[items, options, memories], what the option takes of each limited memory
    capacity  float64[memories]
    names     of the memories, for messages
    """

    cost: Doubles
    size: Doubles
    capacity: Doubles
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        n_items, n_options = self.cost.shape
        if self.size.shape != (n_items, n_options, len(self.capacity)):
            raise PlanError(
                f"size: shape {self.size.shape}, expected"
                f" {(n_items, n_options, len(self.capacity))}"
            )
        if not np.isfinite(self.cost).any(axis=1).all():
            item = int((~np.isfinite(self.cost).any(axis=1)).argmax())
            raise PlanError(f"item {item} has no option at all")


@dataclass(frozen=True, slots=True)
class Chosen:
    """An option for every item.

    option  int64[items]
    cost    sum over items
    bound   no choice within the capacities costs less
    prices  float64[memories], worth of one more unit of each memory
    """

    option: Longs
    cost: float
    bound: float
    prices: Doubles

    @property
    def gap(self) -> float:
        """(cost - bound) / bound; 0 when nothing costs anything."""
        return (self.cost - self.bound) / self.bound if self.bound > 0 else 0.0


def choose(choices: Choices) -> Chosen:
    """A cheap choice within the capacities, and a bound.

    raises  PlanError naming the tightest memory and by how much it is short
    """
    prices, bound = _dual(choices)
    starts = [
        found for found in (_raised(choices, prices), _mended(choices, prices)) if found is not None
    ]
    filled = [_filled(choices, option) for option in starts or [_smallest(choices)]]
    costs = [float(_take(choices.cost, option).sum()) for option in filled]
    best = int(np.argmin(costs))
    return Chosen(filled[best], costs[best], min(bound, costs[best]), prices)


def used(choices: Choices, option: Longs) -> Doubles:
    """float64[memories]: what a choice takes of each."""
    rows = np.arange(len(option))
    total: Doubles = choices.size[rows, option].sum(axis=0)
    return total


def _dual(choices: Choices) -> tuple[Doubles, float]:
    """Prices of memory that maximise the dual, and its value."""
    n = len(choices.capacity)
    scale = _price_scale(choices)
    prices, best, best_prices = np.zeros(n), -np.inf, np.zeros(n)
    slopes: list[Doubles] = []
    offsets: list[float] = []
    for _ in range(_MOST_CUTS):
        value, slope = _priced(choices, prices)
        if value > best:
            best, best_prices = value, prices
        slopes.append(slope * scale)
        offsets.append(value - float(slope @ prices))
        prices, upper = _master(slopes, offsets, scale)
        if upper - best <= _CLOSE * max(abs(upper), 1e-300):
            break
    return best_prices, best


def _priced(choices: Choices, prices: Doubles) -> tuple[float, Doubles]:
    """The dual at given prices, and how it changes with them."""
    total = choices.cost + choices.size @ prices
    option = total.argmin(axis=1)
    value = float(_take(total, option).sum() - choices.capacity @ prices)
    return value, used(choices, option) - choices.capacity


def _master(slopes: list[Doubles], offsets: list[float], scale: Doubles) -> tuple[Doubles, float]:
    """Highest point under all cuts, prices between 0 and their scale (as shares of it)."""
    n = len(scale)
    found = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-np.array(slopes), np.ones(len(slopes))]),
        b_ub=np.array(offsets),
        bounds=[(0.0, 1.0)] * n + [(None, None)],
        method="highs",
    )
    if found.x is None or found.fun is None:
        raise PlanError(f"the bound's linear program failed: {found.message}")
    return found.x[:n] * scale, float(-found.fun)


def _price_scale(choices: Choices) -> Doubles:
    """Most that a unit of each memory can be worth: the steepest cost difference per unit."""
    finite = np.where(np.isfinite(choices.cost), choices.cost, np.nan)
    spread = np.nanmax(finite, axis=1) - np.nanmin(finite, axis=1)
    scale = np.empty(len(choices.capacity))
    for memory in range(len(scale)):
        sizes = np.where(choices.size[:, :, memory] > 0, choices.size[:, :, memory], np.inf)
        least = sizes.min(axis=1)
        worth = np.divide(spread, least, out=np.zeros_like(spread), where=np.isfinite(least))
        scale[memory] = max(2.0 * worth.max(initial=0.0), 1e-30)
    return scale


def _raised(choices: Choices, prices: Doubles) -> Longs | None:
    """The choice at prices just high enough that everything fits."""
    for factor in _DEARER:
        raised = prices * factor + (factor - 1.0) * 1e-3 * _price_scale(choices)
        option = np.asarray((choices.cost + choices.size @ raised).argmin(axis=1), np.int64)
        if (used(choices, option) <= choices.capacity).all():
            return option
    return None


def _mended(choices: Choices, prices: Doubles) -> Longs | None:
    """The choice at the dual's prices, mended until everything fits; None when that fails.

    Items that tie at those prices make a memory overfull; the ones whose other option costs least
    for what it frees there, and fits what is left elsewhere, are moved.
    """
    option = np.asarray((choices.cost + choices.size @ prices).argmin(axis=1), np.int64)
    rows = np.arange(len(option))
    for _ in range(_MENDINGS):
        left = choices.capacity - used(choices, option)
        if (left >= 0).all():
            return option
        memory = int((left / np.maximum(choices.capacity, 1e-300)).argmin())
        more = choices.size - choices.size[rows, option][:, None, :]
        priced = choices.cost + choices.size @ prices
        dearer = priced - _take(priced, option)[:, None]
        fits = (more <= np.maximum(left, 0.0)).all(axis=2)
        freed = -more[:, :, memory]
        worth = np.where(fits & (freed > 0), dearer / np.maximum(freed, 1e-300), np.inf)
        to = worth.argmin(axis=1)
        best = _take(worth, to)
        order = np.argsort(best, kind="stable")
        order = order[np.isfinite(best[order])]
        if not len(order):
            return None
        steps = np.cumsum(more[order, to[order]], axis=0)
        enough = int(np.searchsorted(-steps[:, memory], -left[memory])) + 1
        spilt = (steps > np.maximum(left, 0.0)).any(axis=1)
        most = int(spilt.argmax()) if spilt.any() else len(order)
        moved = order[: max(1, min(enough, most))]
        option[moved] = to[moved]
    return None


def _filled(choices: Choices, option: Longs) -> Longs:
    """What room is left, used until no upgrade fits."""
    for _ in range(_FILLINGS):
        fuller = _fill(choices, option)
        if (fuller == option).all():
            break
        option = fuller
    return option


def _smallest(choices: Choices) -> Longs:
    """A choice that only tries to fit; PlanError says which memory is too small."""
    share = choices.size / np.maximum(choices.capacity, 1e-300)
    weight = np.where(np.isfinite(choices.cost), share.max(axis=2), np.inf)
    option = np.asarray(weight.argmin(axis=1), np.int64)
    over = used(choices, option) - choices.capacity
    if (over > 0).any():
        worst = int((over / np.maximum(choices.capacity, 1.0)).argmax())
        raise PlanError(
            f"nothing fits: {choices.names[worst]} is short by {over[worst] / 2**30:.2f} GiB of"
            f" {choices.capacity[worst] / 2**30:.2f} GiB"
        )
    return option


def _fill(choices: Choices, option: Longs) -> Longs:
    """Use what room is left: the upgrade with most gain per size first, one for an item."""
    option = option.copy()
    left = choices.capacity - used(choices, option)
    rows = np.arange(len(option))
    gain = _take(choices.cost, option)[:, None] - choices.cost
    more = choices.size - choices.size[rows, option][:, None, :]
    need = np.maximum(more, 0.0) / np.maximum(choices.capacity, 1e-300)
    items, options = np.nonzero((gain > 0) & (more <= left).all(axis=2))
    density = gain[items, options] / (need[items, options].sum(axis=1) + 1e-12)
    changed = np.zeros(len(option), np.bool_)
    for place in np.argsort(-density, kind="stable").tolist():
        item, to = int(items[place]), int(options[place])
        step = more[item, to]
        if not changed[item] and (step <= left).all():
            option[item], changed[item] = to, True
            left = left - step
    return option


def _take(table: Doubles, option: npt.NDArray[np.int64]) -> Doubles:
    return np.asarray(table[np.arange(len(option)), option])
