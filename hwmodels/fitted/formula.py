"""The physical stage of a fit: a time is a floor, plus the larger of memory and compute, plus more.

    seconds = floor + (memory ** p + compute ** p) ** (1 / p) + serial

memory, compute and serial are sums of a family's parts (`parts.py`), each times a fitted
coefficient; p says how memory and compute overlap: 1, one after the other; large, the slower alone
counts. A coefficient of 1 is the datasheet's rate. The residual is the logarithm of predicted over
measured, so that ten per cent are worth the same on a microsecond and on a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hwmodels.errors import HardwareError
from hwmodels.fitted.parts import Floats, Parts

LEAST_ROWS = 40
MOST_ROWS = 20_000  # of a fit of a dozen constants
OVERLAP, FLOOR = "overlap", "floor_s"
_OUTLIER = 0.1  # log error from which a row counts linearly, not squared
_PRIOR = 0.02  # pulls a coefficient that the rows say nothing about to where it began
_START = {"memory": 1.2, "compute": 1.2, "serial": 0.2}
_WIDTH = (-6.0, 7.0)  # of the logarithm of a coefficient, about its start
Constants = Mapping[str, float]


def seconds(constants: Constants, parts: Parts) -> Floats:
    """Seconds of each operation, float64[n]; the formula is above."""
    memory = _total(constants, parts.memory)
    compute = _total(constants, parts.compute)
    larger = np.maximum(np.maximum(memory, compute), 1e-12)
    p = 1 + constants[OVERLAP]
    both = larger * ((memory / larger) ** p + (compute / larger) ** p) ** (1 / p)
    return np.asarray(constants[FLOOR] + both + _total(constants, parts.serial))


def fit(parts: Parts, measured: Floats, seed: int = 0) -> dict[str, float]:
    """Constants by name, from seconds of as many operations.

    raises  HardwareError for fewer than LEAST_ROWS operations
    """
    from scipy.optimize import least_squares

    if len(measured) < LEAST_ROWS:
        raise HardwareError(f"{len(measured)} rows, a fit needs {LEAST_ROWS}")
    picked = np.random.default_rng(seed).permutation(len(measured))[:MOST_ROWS]
    names, first = _start(parts, measured)
    found = least_squares(
        _residual(names, first, take(parts, picked), np.log(measured[picked])),
        first,
        bounds=(first + _WIDTH[0], first + _WIDTH[1]),
        loss="soft_l1",
        f_scale=_OUTLIER,
    )
    return dict(zip(names, np.exp(found.x).tolist(), strict=True))


def take(parts: Parts, rows: np.ndarray) -> Parts:
    """The parts of some operations, by index or mask."""
    groups = (parts.memory, parts.compute, parts.serial, parts.shape)
    return Parts(*({name: part[rows] for name, part in group.items()} for group in groups))


def _total(constants: Constants, group: Mapping[str, Floats]) -> Floats:
    total = np.zeros(())
    for name, part in group.items():
        total = total + constants[name] * part
    return np.asarray(total)


def _start(parts: Parts, measured: Floats) -> tuple[tuple[str, ...], Floats]:
    start = {FLOOR: float(np.quantile(measured, 0.01)) / 2, OVERLAP: 2.0}
    for group, value in _START.items():
        start |= dict.fromkeys(getattr(parts, group), value)
    return tuple(start), np.log(np.array(list(start.values())))


def _residual(
    names: tuple[str, ...], first: Floats, parts: Parts, logs: Floats
) -> Callable[[Floats], Floats]:
    weight = _PRIOR * np.sqrt(len(logs)) / 30

    def residual(point: Floats) -> Floats:
        constants = dict(zip(names, np.exp(point), strict=True))
        return np.concatenate((np.log(seconds(constants, parts)) - logs, weight * (point - first)))

    return residual
