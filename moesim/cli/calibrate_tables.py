"""Parquet tables of measured operators into one file of fitted operators for each device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.calibration import Score, score_of
from hwmodels.devices import load_device
from hwmodels.fitted.formula import LEAST_ROWS
from hwmodels.fitted.model import OperatorModel
from hwmodels.fitted.scores import Predicted, cross_validate, fit_groups, with_errors
from hwmodels.fitted.store import FittedDevice, save
from moesim import __version__
from moesim.cli import output
from moesim.cli.table_inputs import TableInputs, read
from moesim.errors import SimulationError

SUFFIX = ".npz"
COLUMNS = ("family", "kernels", "rows", "held-out rows", "mean %", "median %", "p90 %")


@dataclass(frozen=True, slots=True)
class Written:
    """A file of fitted operators; held_out, by family, on shapes that a fit had not seen."""

    file: Path
    fitted: FittedDevice
    held_out: Mapping[str, Score]


@dataclass(frozen=True, slots=True)
class Done:
    """All files of one call; skipped, rows that were not fitted, by reason."""

    written: Sequence[Written]
    skipped: Mapping[str, int]


def calibrate_tables(data: Sequence[Path], out: Path | None, check: bool) -> Done:
    """Fit every kernel, and write a file for each device.

    out    a .npz file when the tables are of one device, else a folder; None names one here
    check  also measure the error on shapes kept apart, which takes several times as long
    raises SimulationError when there is nothing to fit, or one file for several devices; OSError
    """
    inputs = read(data)
    groups = [group for group in inputs.groups if len(group.seconds) >= LEAST_ROWS]
    rows = sum(len(g.seconds) for g in inputs.groups)
    few = rows - sum(len(g.seconds) for g in groups)
    if not groups:
        raise SimulationError(f"{rows} rows of {len(inputs.groups)} kernels: too few to fit one")
    files = _targets(sorted({group.device for group in groups}), out)
    steps = len(groups) * (2 if check else 1)
    with output.progress(steps, "fitting kernels") as advance:
        models = fit_groups(groups, load_device, lambda kernel: advance(1))
        checked = (
            cross_validate(groups, load_device, step=lambda kernel: advance(1)) if check else []
        )
    written = [_written(file, device, (models, checked), inputs) for device, file in files.items()]
    for one in written:
        save(one.fitted, one.file)
    return Done(written, dict(inputs.table.skipped) | {"too few rows of the kernel": few})


def _targets(devices: Sequence[str], out: Path | None) -> dict[str, Path]:
    """Device to file; the folder is made."""
    if out is None:
        out = Path(f"{devices[0]}{SUFFIX}") if len(devices) == 1 else Path("calibrations")
    if out.suffix != SUFFIX:
        output.result_folder(out)
        return {device: out / f"{device}{SUFFIX}" for device in devices}
    if len(devices) > 1:
        names = ", ".join(devices)
        raise SimulationError(f"--output {out}: tables of {names} need a folder, not one file")
    output.check_target(out)
    return {devices[0]: out}


def _written(
    file: Path,
    device: str,
    fits: tuple[Sequence[OperatorModel], Sequence[Predicted]],
    inputs: TableInputs,
) -> Written:
    """The models of a device with their errors."""
    checked = {(of.rows.family, of.rows.kernel): of for of in fits[1] if of.rows.device == device}
    models = []
    for model in (model for model in fits[0] if model.device == device):
        of = checked.get((model.family, model.kernel))
        models.append(model if of is None else with_errors(model, of))
    held_out = _by_family(list(checked.values()))
    errors = {family: score.mean_abs_pct_error for family, score in held_out.items()}
    said = "errors are on shapes kept apart" if errors else "not checked on shapes kept apart"
    note = f"fitted by moesim {__version__}; {said}"
    files, digest = inputs.table.files, inputs.table.sha256
    return Written(file, FittedDevice(device, tuple(models), files, digest, errors, note), held_out)


def _by_family(checked: Sequence[Predicted]) -> dict[str, Score]:
    found = {}
    for family in sorted({of.rows.family for of in checked}):
        errors = np.concatenate([of.errors for of in checked if of.rows.family == family])
        if np.isfinite(errors).any():
            found[family] = score_of(errors[np.isfinite(errors)])
    return found


def document(done: Done) -> dict[str, Any]:
    """What `--json` answers: every file with its families."""
    return {
        "files": [
            {
                "file": one.file,
                "device": one.fitted.device,
                "bytes": one.file.stat().st_size,
                "kernels": len(one.fitted.models),
                "fitted_rows": sum(model.rows for model in one.fitted.models),
                "held_out": {family: asdict(score) for family, score in one.held_out.items()},
                "data": one.fitted.files,
                "data_sha256": one.fitted.data_sha256,
                "note": one.fitted.note,
            }
            for one in done.written
        ],
        "skipped": {reason: count for reason, count in done.skipped.items() if count},
    }


def show(done: Done) -> None:
    """A table for each device."""
    for one in done.written:
        size = one.file.stat().st_size
        output.table(f"{one.fitted.device}, in {one.file} ({size:,} bytes)", COLUMNS, _lines(one))
    for reason, count in done.skipped.items():
        if count:
            output.say(f"skipped, {reason}: {count:,}")


def _lines(one: Written) -> list[list[object]]:
    lines: list[list[object]] = []
    for family in sorted({model.family for model in one.fitted.models}):
        models = [model for model in one.fitted.models if model.family == family]
        head: list[object] = [family, len(models), sum(model.rows for model in models)]
        lines.append(head + _errors(one.held_out.get(family)))
    return lines


def _errors(of: Score | None) -> list[object]:
    if of is None:
        return [None] * 4
    return [of.rows, of.mean_abs_pct_error, of.median_abs_pct_error, of.p90_abs_pct_error]
