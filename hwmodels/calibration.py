"""A calibrated device: constants fitted to measured rows, with what they are worth.

`calibrate` fits and keeps a part of the shapes apart; `predict` asks; `cross_validate` and `score`
say how far predictions are from rows that no fit has seen; `save` and `load` keep it as JSON.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from hwmodels.calibration_fit import LEAST_ROWS, fit, seconds, work_of
from hwmodels.calibration_rows import Row, Rows
from hwmodels.catalog_files import Closed
from hwmodels.errors import HardwareError

FOLDS = 5
MOST_SPREAD = 4.0  # p90 over p10 from which a row says more of the machine's other work
MOST_FILE_BYTES = 64 << 20
STREAM_OP = "stream"
FIELDS = ("device", "op", "source", "weights", "activations", "threads", "variant")
Group = tuple[str, ...]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """Predicted against measured; errors are (predicted - measured) / measured in per cent."""

    rows: int
    mean_abs_pct_error: float
    median_abs_pct_error: float
    p90_abs_pct_error: float
    bias_pct: float
    within_10_pct: float


@dataclass(frozen=True, slots=True)
class Scores:
    """The score of all rows and of each group of them ("cpu_gemm bf16"); skipped by reason."""

    overall: Score
    skipped: Mapping[str, int]
    groups: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Constants of one group, and the least and most seconds, bytes and operations they saw."""

    constants: Mapping[str, float]
    n_rows: int
    n_bytes: tuple[float, float]
    flops: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted groups of one device; fitted holds the identities of the rows that were used.

    held_out  score on the shapes that were kept apart, None when there were none
    """

    device: str
    groups: Mapping[Group, Fitted]
    fitted: frozenset[str]
    files: tuple[str, ...]
    data_sha256: str
    seed: int
    held_out: Score | None = None

    def stream_bytes_per_s(self) -> float:
        """Best memory bandwidth of the device's copies and triads; 0 when none was measured."""
        rates = [
            fitted.constants["bytes_per_s"]
            for group, fitted in self.groups.items()
            if group[FIELDS.index("op")] == STREAM_OP
        ]
        return max(rates, default=0.0)


@dataclass(frozen=True, slots=True)
class Predictions:
    """seconds float64[rows], NaN where no group fits; extrapolated bool[rows], beyond its data."""

    seconds: Floats
    extrapolated: npt.NDArray[np.bool_]


def calibrate(rows: Rows, held_out_share: float = 0.2, seed: int = 0) -> Calibration:
    """Fit every group that has enough rows, keeping a share of the shapes apart as a check.

    held_out_share  0 fits all rows
    raises          HardwareError for rows of several devices, or when no group has enough rows
    """
    if not 0 <= held_out_share < 1:
        raise HardwareError(f"held_out_share={held_out_share} must be in [0, 1)")
    device = _only_device(rows.rows)
    usable, _ = _usable(rows.rows)
    apart = _shapes_apart(usable, held_out_share, seed)
    kept = [row for row in usable if (row.op, row.shape) not in apart]
    groups = _fit_groups(kept)
    if not groups:
        _, why = _usable(rows.rows)
        skipped = ", ".join(f"{count} {reason}" for reason, count in why.items())
        raise HardwareError(
            f"{', '.join(rows.files)}: no group has {LEAST_ROWS} usable rows ({skipped})"
        )
    fitted = frozenset(row.identity for row in kept if row.group in groups)
    done = Calibration(device, groups, fitted, rows.files, rows.sha256, seed)
    if not apart:
        return done
    left = [row for row in usable if (row.op, row.shape) in apart and row.group in groups]
    check = score_of(_errors(done, left)) if left else None
    return Calibration(device, groups, fitted, rows.files, rows.sha256, seed, check)


def predict(calibration: Calibration, rows: Sequence[Row]) -> Predictions:
    """Seconds of the work of each row; what the row measured is not looked at."""
    found = np.full(len(rows), np.nan)
    beyond = np.zeros(len(rows), dtype=np.bool_)
    for group, members in _by_group(enumerate(rows)).items():
        if group not in calibration.groups:
            continue
        fitted = calibration.groups[group]
        index = [position for position, _ in members]
        work = work_of([row for _, row in members])
        found[index] = seconds(fitted.constants, work)
        n_bytes, flops, _ = work.totals
        beyond[index] = _outside(n_bytes, fitted.n_bytes) | _outside(flops, fitted.flops)
    return Predictions(found, beyond)


def cross_validate(rows: Rows, seed: int = 0) -> Scores:
    """Score each row by a fit that saw no row of its shape; shapes are dealt into FOLDS parts."""
    usable, skipped = _usable(rows.rows)
    skipped["failed"] += rows.failed
    folds = _folds(usable, seed)
    found = np.full(len(usable), np.nan)
    for fold in range(FOLDS):
        groups = _fit_groups([row for row, of in zip(usable, folds, strict=True) if of != fold])
        seen = Calibration("", groups, frozenset(), rows.files, rows.sha256, seed)
        index = [position for position, of in enumerate(folds) if of == fold]
        found[index] = predict(seen, [usable[position] for position in index]).seconds
    return _scores(usable, found, skipped)


def score(calibration: Calibration, rows: Rows) -> Scores:
    """Score the rows that the calibration was not fitted to."""
    unseen = [row for row in rows.rows if row.identity not in calibration.fitted]
    usable, skipped = _usable(unseen)
    skipped.update(failed=rows.failed, fitted=len(rows.rows) - len(unseen))
    return _scores(usable, predict(calibration, usable).seconds, skipped)


class _GroupFile(Closed):
    device: str
    op: str
    source: str
    weights: str
    activations: str
    threads: str
    variant: str
    constants: dict[str, float]
    n_rows: int
    n_bytes: tuple[float, float]
    flops: tuple[float, float]


class _ScoreFile(Closed):
    rows: int
    mean_abs_pct_error: float
    median_abs_pct_error: float
    p90_abs_pct_error: float
    bias_pct: float
    within_10_pct: float


class _DataFile(Closed):
    files: tuple[str, ...]
    sha256: str
    seed: int
    fitted: tuple[str, ...]


class _CalibrationFile(Closed):
    schema_: Literal[1] = Field(alias="schema")
    kind: Literal["calibration"]
    device: str
    data: _DataFile
    held_out: _ScoreFile | None
    groups: list[_GroupFile]


def save(calibration: Calibration, path: Path) -> None:
    """Write as JSON, whole or not at all; equal calibrations give equal bytes."""
    groups = [
        dict(zip(FIELDS, group, strict=True)) | asdict(fitted)
        for group, fitted in sorted(calibration.groups.items())
    ]
    document = {
        "schema": 1,
        "kind": "calibration",
        "device": calibration.device,
        "data": {
            "files": calibration.files,
            "sha256": calibration.data_sha256,
            "seed": calibration.seed,
            "fitted": sorted(calibration.fitted),
        },
        "held_out": asdict(calibration.held_out) if calibration.held_out else None,
        "groups": groups,
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load(path: Path) -> Calibration:
    """Read what `save` wrote; HardwareError names the field that is wrong."""
    if path.stat().st_size > MOST_FILE_BYTES:
        raise HardwareError(f"{path}: over {MOST_FILE_BYTES} bytes, not a calibration")
    try:
        read = _CalibrationFile.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise HardwareError(f"{path}: {field}: {first['msg'].lower()}") from error
    except (ValueError, RecursionError) as error:
        raise HardwareError(f"{path}: not JSON: {str(error)[:80]}") from error
    return Calibration(
        read.device,
        {_group(item): _fitted(item, path) for item in read.groups},
        frozenset(read.data.fitted),
        read.data.files,
        read.data.sha256,
        read.data.seed,
        Score(**read.held_out.model_dump()) if read.held_out else None,
    )


def _group(item: _GroupFile) -> Group:
    return tuple(str(getattr(item, name)) for name in FIELDS)


def _fitted(item: _GroupFile, path: Path) -> Fitted:
    for name, value in item.constants.items():
        if not (math.isfinite(value) and value > 0):
            raise HardwareError(f"{path}: {item.op}: {name}={value} must be > 0 and finite")
    for name in ("p", "fixed_s"):
        if name not in item.constants:
            raise HardwareError(f"{path}: {item.op}: constant {name!r} is missing")
    return Fitted(item.constants, item.n_rows, item.n_bytes, item.flops)


def _only_device(rows: Sequence[Row]) -> str:
    names = sorted({row.group[0] for row in rows})
    if len(names) != 1:
        raise HardwareError(f"rows of {len(names)} devices ({'; '.join(names)}), expected one")
    return names[0]


def _usable(rows: Sequence[Row]) -> tuple[list[Row], Counter[str]]:
    """Rows that tell of the machine and not of its other work, and how many do not, by reason."""
    skipped = Counter(
        disturbed=sum(row.disturbed for row in rows),
        noisy=sum(not row.disturbed and row.spread > MOST_SPREAD for row in rows),
    )
    return [row for row in rows if not row.disturbed and row.spread <= MOST_SPREAD], skipped


def _by_group(rows: Iterable[tuple[int, Row]]) -> dict[Group, list[tuple[int, Row]]]:
    groups: dict[Group, list[tuple[int, Row]]] = defaultdict(list)
    for position, row in rows:
        groups[row.group].append((position, row))
    return groups


def _fit_groups(rows: Sequence[Row]) -> dict[Group, Fitted]:
    groups = {}
    for group, members in _by_group(enumerate(rows)).items():
        if len(members) >= LEAST_ROWS:
            of_group = [row for _, row in members]
            n_bytes, flops, _ = work_of(of_group).totals
            groups[group] = Fitted(fit(of_group), len(of_group), _range(n_bytes), _range(flops))
    return groups


def _range(values: Floats) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _outside(values: Floats, known: tuple[float, float]) -> npt.NDArray[np.bool_]:
    return np.asarray((values < known[0]) | (values > known[1]), dtype=np.bool_)


def _dealt(rows: Sequence[Row], seed: int) -> dict[str, list[str]]:
    """The shapes of each operator in an order that the seed alone decides."""
    shapes: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        shapes[row.op].add(row.shape)
    dealt = {}
    for op, of_op in sorted(shapes.items()):
        order = np.random.default_rng((seed, zlib.crc32(op.encode()))).permutation(len(of_op))
        listed = sorted(of_op)
        dealt[op] = [listed[position] for position in order]
    return dealt


def _shapes_apart(rows: Sequence[Row], share: float, seed: int) -> set[tuple[str, str]]:
    return {
        (op, shape)
        for op, shapes in _dealt(rows, seed).items()
        for shape in shapes[: math.ceil(share * len(shapes)) if len(shapes) > 1 else 0]
    }


def _folds(rows: Sequence[Row], seed: int) -> list[int]:
    fold = {
        (op, shape): position % FOLDS
        for op, shapes in _dealt(rows, seed).items()
        for position, shape in enumerate(shapes)
    }
    return [fold[row.op, row.shape] for row in rows]


def _errors(calibration: Calibration, rows: Sequence[Row]) -> Floats:
    measured = np.array([row.seconds for row in rows])
    return np.asarray(predict(calibration, rows).seconds / measured - 1)


def _scores(rows: Sequence[Row], predicted: Floats, skipped: Counter[str]) -> Scores:
    known = np.isfinite(predicted)
    skipped["too_few_rows_to_fit"] += int((~known).sum())
    if not known.any():
        reasons = ", ".join(f"{name} {count}" for name, count in skipped.items() if count)
        raise HardwareError(f"no row is left to score: {reasons}")
    errors = predicted / np.array([row.seconds for row in rows]) - 1
    names = np.array([f"{row.op} {row.group[FIELDS.index('weights')]}".strip() for row in rows])
    groups = {
        str(name): score_of(errors[known & (names == name)]) for name in np.unique(names[known])
    }
    return Scores(score_of(errors[known]), {k: v for k, v in skipped.items() if v}, groups)


def score_of(errors: Floats) -> Score:
    """The score of relative errors, float64[n], n >= 1."""
    percent = 100 * np.abs(errors)
    return Score(
        len(errors),
        float(percent.mean()),
        float(np.median(percent)),
        float(np.quantile(percent, 0.9)),
        float(100 * errors.mean()),
        float((percent <= 10).mean()),
    )
