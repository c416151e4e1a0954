"""The physical formula of a measured operation, and its constants by least squares.

A piece of work (one product, one expert) costs

    piece_s + ((bytes / bytes_per_s) ** p + (flops / flop_per_s) ** p) ** (1 / p)

and an operation costs fixed_s plus its pieces. p says how memory and compute overlap: 1, one after
the other; large, the slower alone counts. A product of one row runs other code than one of many,
so it has rates of its own. Requests with several in flight (reads of a disk) cost each

    (((fixed_s + bytes / bytes_per_s) / in_flight) ** p + (piece_s + bytes / pipe_bytes_per_s) ** p)
    ** (1 / p)

The residual is the logarithm of predicted over measured: ten per cent are worth the same on a
microsecond and on a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwmodels.calibration_rows import Row
from hwmodels.errors import HardwareError

MEMORY = ("one_row_bytes_per_s", "bytes_per_s")
COMPUTE = ("one_row_flop_per_s", "flop_per_s")
REQUEST_OPS = ("nvme_read",)
LEAST_ROWS = 3
_PRIOR_WEIGHT = 0.02  # pulls a constant that the rows say nothing about to where it began
_WIDTH = np.log(1e4)
_SAME_INTENSITY = 1.2
_OUTLIER = 0.2  # log error from which a row counts linearly, not squared

Floats = npt.NDArray[np.float64]
Constants = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Work:
    """Work of many operations, flat: arrays over pieces, `owner` is the operation of each.

    owner, path     int64[pieces]; path 0 for a piece of one row, 1 otherwise
    n_bytes, flops  float64[pieces]
    in_flight       float64[operations]
    requests        the operations are requests, see above
    """

    owner: npt.NDArray[np.int64]
    path: npt.NDArray[np.int64]
    n_bytes: Floats
    flops: Floats
    in_flight: Floats
    requests: bool

    @property
    def totals(self) -> tuple[Floats, Floats, Floats]:
        """Bytes, operations and pieces of each operation, float64[operations] each."""
        n, one = len(self.in_flight), np.ones(len(self.owner))
        return (
            np.bincount(self.owner, self.n_bytes, n).astype(np.float64),
            np.bincount(self.owner, self.flops, n).astype(np.float64),
            np.bincount(self.owner, one, n).astype(np.float64),
        )


def work_of(rows: Sequence[Row]) -> Work:
    """The work of rows of one operator, in their order."""
    sizes = [len(row.rows) for row in rows]
    return Work(
        np.repeat(np.arange(len(rows)), sizes),
        (np.concatenate([row.rows for row in rows]) != 1).astype(np.int64),
        np.concatenate([row.n_bytes for row in rows]),
        np.concatenate([row.flops for row in rows]),
        np.array([row.in_flight for row in rows]),
        rows[0].op in REQUEST_OPS,
    )


def seconds(constants: Constants, work: Work) -> Floats:
    """Predicted seconds of each operation, float64[operations]; the formula is above."""
    p, fixed_s, piece_s = constants["p"], constants["fixed_s"], constants.get("piece_s", 0.0)
    if work.requests:
        alone = (fixed_s + work.n_bytes / constants["bytes_per_s"]) / work.in_flight
        pipe = piece_s + work.n_bytes / constants["pipe_bytes_per_s"]
        return _joint(alone, pipe, p)
    memory_s = work.n_bytes / _by_path(constants, MEMORY)[work.path]
    compute_s = work.flops / _by_path(constants, COMPUTE)[work.path]
    pieces_s = piece_s + _joint(memory_s, compute_s, p)
    of_pieces = np.bincount(work.owner, pieces_s, len(work.in_flight))
    return np.asarray(fixed_s + of_pieces, dtype=np.float64)


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Constants of one group of rows; those that its work cannot show are left out.

    raises  HardwareError for fewer than LEAST_ROWS rows
    """
    if len(rows) < LEAST_ROWS:
        raise HardwareError(
            f"{rows[0].op if rows else 'fit'}: {len(rows)} rows, {LEAST_ROWS} least"
        )
    from scipy.optimize import least_squares

    work, measured = work_of(rows), np.array([row.seconds for row in rows])
    start = _start(work, measured)
    names, first = tuple(start), np.log(np.array(list(start.values())))
    found = least_squares(
        _residual(names, first, work, measured),
        first,
        bounds=(first - _WIDTH, first + _WIDTH),
        loss="soft_l1",
        f_scale=_OUTLIER,
    )
    return _constants(names, found.x)


def _by_path(constants: Constants, names: tuple[str, str]) -> Floats:
    return np.array([constants.get(name, np.inf) for name in names])


def _joint(a: Floats, b: Floats, p: float) -> Floats:
    """(a**p + b**p) ** (1/p), safe for any size of a and b."""
    larger = np.maximum(np.maximum(a, b), 1e-300)
    joint: Floats = larger * ((a / larger) ** p + (b / larger) ** p) ** (1 / p)
    return np.where((a == 0) & (b == 0), 0.0, joint)


def _start(work: Work, measured: Floats) -> dict[str, float]:
    """Where the search begins, by name; `p` is held as p - 1 so that it stays above 1."""
    n_bytes, flops, pieces = work.totals
    start = {"p": 0.5, "fixed_s": float(measured.min()) / 4}
    memory = float((n_bytes / measured).max()) or 1.0
    if work.requests:
        start["fixed_s"] = float((measured * work.in_flight).min())
        rates = {"bytes_per_s": memory, "pipe_bytes_per_s": memory}
        return start | rates | {"piece_s": float(measured.min()) / 2}
    compute = float((flops / measured).max())
    for path in np.unique(work.path):
        start[MEMORY[path]] = 2 * memory
        if _tells_compute_from_memory(work, path):
            start[COMPUTE[path]] = 2 * compute
    if pieces.max() > 1:
        start["piece_s"] = float((measured / pieces).min()) / 10
    return start


def _tells_compute_from_memory(work: Work, path: int) -> bool:
    """Whether operations per byte differ among the pieces; else bytes alone explain the time."""
    of_path = work.path == path
    intensity = work.flops[of_path] / np.maximum(work.n_bytes[of_path], 1)
    return bool(intensity.max() > _SAME_INTENSITY * intensity.min() and intensity.max() > 0)


def _constants(names: tuple[str, ...], logs: Floats) -> dict[str, float]:
    values = dict(zip(names, np.exp(logs).tolist(), strict=True))
    return values | {"p": 1 + min(values["p"], 8.0)}


def _residual(
    names: tuple[str, ...], first: Floats, work: Work, measured: Floats
) -> Callable[[Floats], Floats]:
    def residual(logs: Floats) -> Floats:
        predicted = seconds(_constants(names, logs), work)
        pull = _PRIOR_WEIGHT * (logs - first)
        return np.concatenate((np.log(predicted / measured), pull))

    return residual
