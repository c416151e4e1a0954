"""Fit the constants of `engines.py` to blocks of a table of runs.

    from moesim.published.fit import fit
    fit(read_offload_rows(path).rows)

Constants are varied by factors, to the least sum of squared log errors of the rows of the blocks in
FITTED, with a weak pull to where they started (a factor of two costs as much as one row that is off
by 17 %). What is fitted for one engine is not varied for another that shares it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moesim.published.engines import DEFAULT_SKEW, ENGINES, FITTED, Engine, Skew, with_constants
from moesim.published.predict import predicted
from moesim.published.rows import OffloadRow

ROWS_OF_A_BLOCK = 6.0  # that every block counts as
PULL = 0.25  # log error that a factor of e away from the start counts for
LARGEST_FACTOR = 6.0
LARGEST_SHARE = 0.92


def in_fit(row: OffloadRow) -> bool:
    """Whether constants were fitted on a row's block."""
    fitted = FITTED.get(row.engine)
    return fitted is not None and row.block in fitted.blocks and not row.flag


def fit(
    rows: Sequence[OffloadRow],
    names: Sequence[str] = tuple(FITTED),
    without: Sequence[str] = (),
) -> Mapping[str, Mapping[str, float]]:
    """Constants by engine and field, fitted on its blocks but those in `without`."""
    return {name: fit_engine(rows, name, without) for name in names}


def fit_engine(
    rows: Sequence[OffloadRow], name: str, without: Sequence[str] = ()
) -> Mapping[str, float]:
    """Constants of one engine by field, "own" for the skew of requests."""
    from scipy.optimize import least_squares

    begin = FITTED[name].start
    fields = tuple(begin)
    counts = Counter(row.block for row in rows)
    used = [row for row in rows if row.engine == name and in_fit(row) and row.block not in without]
    weight = np.sqrt([counts[row.block] / ROWS_OF_A_BLOCK for row in used])
    start = np.array(list(begin.values()))

    def errors(log_factors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values = dict(zip(fields, start * np.exp(log_factors), strict=True))
        how, skew = apply(ENGINES[name], values)
        off = [math.log(predicted(row, how, skew) / row.measured) for row in used]
        return np.concatenate([off / weight, PULL * log_factors])

    limit = math.log(LARGEST_FACTOR)
    upper = [
        min(limit, math.log(LARGEST_SHARE / value)) if field.endswith("_share") else limit
        for field, value in begin.items()
    ]
    bounds = np.full(len(fields), -limit), np.maximum(upper, 1e-9)
    found = least_squares(errors, np.zeros(len(fields)), bounds=bounds, loss="soft_l1", f_scale=0.2)
    return dict(zip(fields, (start * np.exp(found.x)).tolist(), strict=True))


def apply(base: Engine, values: Mapping[str, float]) -> tuple[Engine, Skew]:
    """The engine and the skew of requests with fitted constants in place of theirs."""
    own = values.get("own", DEFAULT_SKEW.own)
    rest = {field: value for field, value in values.items() if field != "own"}
    return with_constants(base, rest), replace(DEFAULT_SKEW, own=own)
