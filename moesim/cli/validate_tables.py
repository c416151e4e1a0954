"""Public tables of measured operators against predictions by fitted operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hwmodels.devices import load_device
from hwmodels.errors import HardwareError
from hwmodels.fitted.formula import LEAST_ROWS
from hwmodels.fitted.model import OperatorModel, Prediction, parts_of, predict_parts
from hwmodels.fitted.scores import (
    CLEAN,
    Apart,
    Predicted,
    cross_validate,
    fit_groups,
    model_for,
)
from hwmodels.fitted.store import FittedDevice, load, shipped, shipped_names
from hwmodels.fitted.trees import NO_TREES
from moesim.cli import output
from moesim.cli.table_inputs import TableInputs, read, refuse_shared
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from hwmodels.fitted.tables import Measured

APARTS: Mapping[str, Apart] = {"shape": "shape", "model": "model"}
KERNELS = ("all", "clean")
HELD_BACK = "validation-"  # tables of such names are kept for scoring; what saw them does not score


@dataclass(frozen=True, slots=True)
class Wish:
    """What to score, and by which fit; at most one of fit, calibration and shipped.

    data, fit    tables; calibration, a file or folder of fitted operators
    apart        what a fold of a cross-validation has of its own: "shape" or "model"; "" asks for
                 none where the shipped fits have not seen the data
    kernels      "all" or "clean"
    """

    data: Sequence[Path]
    fit: Sequence[Path] = ()
    calibration: Path | None = None
    shipped: bool = False
    apart: str = ""
    kernels: str = "all"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows with predictions, and where those came from.

    outside  of each kernel, bool[n]: sizes beyond those that were fitted
    skipped  rows without a prediction, by reason
    held_out which rows the fit had not seen; it begins with "not held out" when it had seen some
    files    file to sha256, of the rows and of what was fitted
    """

    predicted: Sequence[Predicted]
    outside: Sequence[np.ndarray]
    skipped: Mapping[str, int]
    held_out: str
    files: Mapping[str, Mapping[str, str]]


def run(wish: Wish) -> Outcome:
    """Predict every row of the data that can be.

    raises  SimulationError for a wish that contradicts itself, or when no row can be predicted;
            HardwareError for a file that cannot be used; OSError
    """
    _check(wish)
    if wish.fit:
        refuse_shared(wish.data, wish.fit)
    data = read(wish.data)
    groups, skipped = _wanted(data, wish.kernels)
    if wish.fit:
        done = _by_fit(groups, read(wish.fit))
    elif wish.shipped or wish.calibration:
        done = _by_stored(groups, data, _stored(wish.calibration))
    elif not wish.apart and (unseen := _unseen(data)):
        done = _by_stored(groups, data, unseen)
    else:
        done = _apart(groups, APARTS[wish.apart or "shape"])
    counted = Counter(skipped) + Counter(done.skipped)
    if not done.predicted:
        raise SimulationError(f"no row is left to score: {_reasons(counted)}")
    return replace(done, skipped=counted, files={"data": data.files} | dict(done.files))


def _check(wish: Wish) -> None:
    for flag, value, known in (
        ("--apart", wish.apart or "shape", tuple(APARTS)),
        ("--kernels", wish.kernels, KERNELS),
    ):
        if value not in known:
            raise SimulationError(f"{flag} {value!r}: expected one of {', '.join(known)}")
    fits = {"--fit": wish.fit, "--calibration": wish.calibration, "--shipped": wish.shipped}
    if len(given := [flag for flag, value in fits.items() if value]) > 1:
        raise SimulationError(f"{' and '.join(given)}: pass one of them")


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in counts.items() if n) or "no rows"


def _wanted(data: TableInputs, kernels: str) -> tuple[list[Measured], dict[str, int]]:
    wanted = [g for g in data.groups if kernels == "all" or g.kernel in CLEAN]
    left_out = _n_rows(data.groups) - _n_rows(wanted)
    return wanted, dict(data.table.skipped) | {"not a clean kernel": left_out}


def _apart(groups: Sequence[Measured], apart: Apart) -> Outcome:
    """Each row by a fit to other rows of its own kernel and device."""
    label = "fitting kernels without the rows they predict"
    with output.progress(len(groups), label) as advance:
        found = cross_validate(groups, load_device, apart, lambda kernel: advance(1))
    few = _n_rows(groups) - _n_rows([of.rows for of in found])
    missing = sum(int(np.isnan(of.prediction.seconds).sum()) for of in found)
    known = [of for of in found if np.isfinite(of.prediction.seconds).any()]
    return Outcome(
        known,
        [of.prediction.extrapolated for of in known],
        {"too few rows of the kernel": few, f"too few rows of other {apart}s": missing},
        f"other {apart}s of the same kernel and device",
        {},
    )


def _by_fit(groups: Sequence[Measured], fit: TableInputs) -> Outcome:
    """Each row by the nearest kernel of the nearest device of other tables."""
    able = {_key(_blank(g)): g for g in fit.groups if len(g.seconds) >= LEAST_ROWS}
    speakers = _speakers([_blank(g) for g in able.values()], groups)
    needed = {_key(model): able[_key(model)] for _, model in speakers}
    label = "fitting the kernels that are asked for"
    with output.progress(len(needed), label) as advance:
        fitted = fit_groups(list(needed.values()), load_device, lambda kernel: advance(1))
    by_key = {_key(model): model for model in fitted}
    spoken = [(group, by_key[_key(model)]) for group, model in speakers]
    names = f"fitted on {', '.join(fit.files)}"
    return _outcome(groups, spoken, names, {"fit": fit.files})


def _by_stored(
    groups: Sequence[Measured], data: TableInputs, stored: Sequence[FittedDevice]
) -> Outcome:
    """Each row by the nearest kernel of fits that are kept in files."""
    spoken = _speakers([model for fitted in stored for model in fitted.models], groups)
    used = {model.device for _, model in spoken}
    # A fit has seen rows of its own device only.
    at_home = {model.device for group, model in spoken if group.device == model.device}
    names = f"calibrations of {', '.join(sorted(used))}"
    seen = [text for f in stored if f.device in at_home and (text := seen_by(f, data))]
    says = f"not held out: {'; '.join(seen)}" if seen else names
    files = {f"calibration {f.device}": {n: "" for n in f.files} for f in stored}
    files |= {f"calibration {f.device} sha256": {"all": f.data_sha256} for f in stored}
    return _outcome(groups, spoken, says, files)


def seen_by(fitted: FittedDevice, data: TableInputs) -> str:
    """Why rows of the data may be among those a calibration was fitted to; "" when they are not."""
    of = f"the calibration of {fitted.device}"
    if fitted.data_sha256 == data.table.sha256:
        return f"{of} was fitted to these very files"
    if same := [name for name in data.files if name in fitted.files]:
        return f"{of} was fitted to {', '.join(same)}, or to a file of that name"
    if installed := [name for name in data.files if name.startswith("aiconfigurator-")]:
        return f"{of} may have seen rows of {installed[0]}"
    return ""


def _unseen(data: TableInputs) -> list[FittedDevice]:
    """The shipped fits that may score the data; none when one of them saw it.

    Those fitted to tables that are held back are left out: they would know the answer.
    """
    usable = [
        fitted for name in shipped_names()
        if (fitted := shipped(name)) is not None
        and not any(file.startswith(HELD_BACK) for file in fitted.files)
    ]  # fmt: skip
    return [] if any(seen_by(fitted, data) for fitted in usable) else usable


def _stored(path: Path | None) -> list[FittedDevice]:
    """The shipped fits, or those of a file or folder."""
    if path is None:
        found = [fitted for name in shipped_names() if (fitted := shipped(name)) is not None]
    else:
        found = [load(file) for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    if not found:
        raise SimulationError(f"{path or 'this installation'}: no fitted operators (.npz)")
    return found


def _speakers(
    models: Sequence[OperatorModel], groups: Sequence[Measured]
) -> list[tuple[Measured, OperatorModel]]:
    """The model that predicts each kernel, as `predict_groups` chooses; without those of none."""
    known = {name: load_device(name) for name in {model.device for model in models}}
    found = []
    for group in groups:
        try:
            model = model_for(models, group, load_device(group.device), known)
        except HardwareError:  # no kernel of the format on any device
            continue
        found.append((group, model))
    return found


def _outcome(
    groups: Sequence[Measured],
    spoken: Sequence[tuple[Measured, OperatorModel]],
    held_out: str,
    files: Mapping[str, Mapping[str, str]],
) -> Outcome:
    predicted, outside = [], []
    with output.progress(len(spoken), "predicting kernels") as advance:
        for group, model in spoken:
            of, beyond = _predicted(group, model)
            predicted.append(of)
            outside.append(beyond)
            advance(1)
    left = _n_rows(groups) - _n_rows([group for group, _ in spoken])
    return Outcome(predicted, outside, {"nothing fitted of the format": left}, held_out, files)


def _predicted(group: Measured, model: OperatorModel) -> tuple[Predicted, np.ndarray]:
    """The prediction, and which rows lie beyond the sizes that were fitted, on any device."""
    parts = parts_of(group.family, load_device(group.device), group.work)
    at_home = predict_parts(model, parts, model.device)
    beyond = at_home.extrapolated
    elsewhere = group.device != model.device
    answer = Prediction(at_home.seconds, beyond | elsewhere)
    return Predicted(group, answer, f"{model.device}: {model.kernel}"), beyond


def _n_rows(groups: Sequence[Measured]) -> int:
    return sum(len(group.seconds) for group in groups)


def _key(model: OperatorModel) -> tuple[str, str, str]:
    return model.device, model.family, model.kernel


def _blank(group: Measured) -> OperatorModel:
    """A model as it is before the fit; enough to choose by."""
    empty = np.zeros(0, np.float32)
    return OperatorModel(
        group.family, group.kernel, group.device, {}, NO_TREES, empty, empty, len(group.seconds)
    )
