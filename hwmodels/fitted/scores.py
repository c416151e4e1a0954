"""How far fitted models are from rows that no fit has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from hwmodels.calibration import Score, score_of
from hwmodels.device import Device
from hwmodels.errors import HardwareError
from hwmodels.fitted.formula import LEAST_ROWS, take
from hwmodels.fitted.kernels import KernelName, nearest_device, nearest_kernel, parse_kernel
from hwmodels.fitted.model import (
    OperatorModel,
    Prediction,
    fit_model,
    fit_parts,
    parts_of,
    predict,
    predict_parts,
)
from hwmodels.fitted.parts import Floats
from hwmodels.fitted.tables import Measured
from hwmodels.fitted.trees import NO_TREES

FOLDS = 5
Apart = Literal["shape", "model"]
# Kernels that ran tuned and undisturbed, so that a formula can be held to a tight bar.
CLEAN = (
    "vllm 0.24.0 bfloat16 vllm_unquantizedfusedmoe_triton_tritonexperts",
    "vllm 0.24.0 fp8_block vllm_fp8moe_triton_tritonexperts",
    "sglang 0.5.14 fp8_block sglang_fused_moe_triton",
    "trtllm 1.3.0rc20 bfloat16 moe_torch_flow_cutlass",
)
TOKEN_EDGES = (1, 8, 64, 512, 4096)


@dataclass(frozen=True, slots=True)
class Predicted:
    """The rows of one kernel with what was predicted for them, NaN where nothing could be.

    fitted_as  device and kernel of the model that spoke
    """

    rows: Measured
    prediction: Prediction
    fitted_as: str

    @property
    def errors(self) -> Floats:
        """(predicted - measured) / measured, float64[n]."""
        return np.asarray(self.prediction.seconds / self.rows.seconds - 1)


def fit_groups(
    groups: Sequence[Measured],
    load: Callable[[str], Device],
    step: Callable[[str], None] = lambda kernel: None,
) -> list[OperatorModel]:
    """A model of every kernel on every device that has enough rows.

    load  the device of a catalogue name; step is told each kernel that was fitted
    """
    models = []
    for group in groups:
        if len(group.seconds) < LEAST_ROWS:
            continue
        models.append(
            fit_model(group.family, group.kernel, load(group.device), group.work, group.seconds)
        )
        step(group.kernel)
    return models


def predict_groups(
    models: Sequence[OperatorModel],
    groups: Sequence[Measured],
    load: Callable[[str], Device],
) -> list[Predicted]:
    """Rows predicted by the nearest kernel of the nearest fitted device.

    raises  HardwareError when a format was measured on no device
    """
    known = {name: load(name) for name in {model.device for model in models}}
    found = []
    for group in groups:
        device = load(group.device)
        model = model_for(models, group, device, known)
        spoke = f"{model.device}: {model.kernel}"
        found.append(Predicted(group, predict(model, device, group.work), spoke))
    return found


def cross_validate(
    groups: Sequence[Measured],
    load: Callable[[str], Device],
    apart: Apart = "shape",
    step: Callable[[str], None] = lambda kernel: None,
) -> list[Predicted]:
    """Each row predicted by a fit that saw no row of its shape, or of its model; one device each.

    apart  "shape": all sizes but the tokens; "model": also whatever the parallel degrees
    """
    found = []
    for group in groups:
        if len(group.seconds) >= 2 * LEAST_ROWS:
            found.append(_cross_validated(group, load(group.device), apart))
        step(group.kernel)
    return found


def _cross_validated(group: Measured, device: Device, apart: Apart) -> Predicted:
    parts = parts_of(group.family, device, group.work)
    labels = group.shape if apart == "shape" else group.model
    order = np.random.default_rng(0).permutation(int(labels.max()) + 1)
    folds = order[labels] % min(FOLDS, len(order))
    seconds, beyond = np.full(len(labels), np.nan), np.zeros(len(labels), np.bool_)
    empty = np.zeros(0, np.float32)
    for fold in np.unique(folds):
        seen, unseen = folds != fold, folds == fold
        if seen.sum() < LEAST_ROWS:
            continue
        blank = OperatorModel(
            group.family, group.kernel, device.name, {}, NO_TREES, empty, empty, 0
        )
        model = fit_parts(blank, take(parts, seen), group.seconds[seen])
        answer = predict_parts(model, take(parts, unseen), device.name)
        seconds[unseen], beyond[unseen] = answer.seconds, answer.extrapolated
    return Predicted(group, Prediction(seconds, beyond), f"{device.name}: other {apart}s")


def with_errors(model: OperatorModel, checked: Predicted) -> OperatorModel:
    """The model with the errors of rows that were kept apart."""
    errors = 100 * np.abs(checked.errors[np.isfinite(checked.errors)])
    if not len(errors):
        return model
    return replace(
        model, error_pct=float(np.median(errors)), p90_pct=float(np.quantile(errors, 0.9))
    )


def group_scores(predicted: Sequence[Predicted]) -> dict[str, Score]:
    """Scores over all rows ("all"), and by each of LABELS; "dtype fp8" is one of dtype."""
    errors = np.concatenate([of.errors for of in predicted])
    known = np.isfinite(errors)
    if not known.any():
        raise HardwareError("no row is left to score")
    labels: dict[str, npt.NDArray[np.str_]] = {
        name: np.concatenate([label(of) for of in predicted])[known]
        for name, label in LABELS.items()
    }
    errors = errors[known]
    found = {"all": score_of(errors)}
    for name, values in labels.items():
        for value in np.unique(values):
            if value:
                found[f"{name} {value}"] = score_of(errors[values == value])
    return found


def _same(of: Predicted, text: str) -> npt.NDArray[np.str_]:
    return np.full(len(of.rows.seconds), text)


def _tokens(of: Predicted) -> npt.NDArray[np.str_]:
    ranges = [f"from {edge}" for edge in TOKEN_EDGES]
    place = np.searchsorted(TOKEN_EDGES, of.rows.tokens, side="right") - 1
    return np.array(ranges)[np.clip(place, 0, None)]


def _code(kernel: KernelName) -> str:
    return f"{kernel.framework} {kernel.code}".strip()


LABELS: Mapping[str, Callable[[Predicted], npt.NDArray[np.str_]]] = {
    "device": lambda of: _same(of, of.rows.device),
    "family": lambda of: _same(of, of.rows.family),
    "dtype": lambda of: _same(of, of.rows.dtype),
    "code": lambda of: _same(of, _code(parse_kernel(of.rows.kernel))),
    "tokens": _tokens,
    "skew": lambda of: of.rows.skew,
    "clean": lambda of: _same(of, "kernels" if of.rows.kernel in CLEAN else ""),
    "kernel": lambda of: _same(of, of.rows.kernel),
}


@dataclass(frozen=True, slots=True)
class SkewScore:
    """Skewed over balanced latency at equal sizes, predicted against measured.

    pairs              rows that have a balanced twin
    mean_abs_pct_error of the ratio
    right_side         share of ratios on the measured side of 1, of those over 5 % from it
    differing          pairs over 5 % from 1
    """

    pairs: int
    mean_abs_pct_error: float
    right_side: float
    differing: int


def skew_scores(predicted: Sequence[Predicted]) -> dict[str, SkewScore]:
    """The score of each skewed distribution over the balanced rows of the same kernel and sizes."""
    import pandas as pd

    frames = [
        pd.DataFrame(
            {"kernel": i, "shape": of.rows.shape, "tokens": of.rows.tokens, "skew": of.rows.skew,
             "measured": of.rows.seconds, "predicted": of.prediction.seconds}
        )
        for i, of in enumerate(predicted) if (of.rows.skew == "balanced").any()
    ]  # fmt: skip
    if not frames:
        return {}
    rows, keys = pd.concat(frames), ["kernel", "shape", "tokens"]
    balanced = rows[rows["skew"] == "balanced"][[*keys, "measured", "predicted"]]
    found = {}
    for skew, of_skew in rows[rows["skew"] != "balanced"].groupby("skew"):
        both = of_skew.merge(balanced, on=keys, suffixes=("", "_balanced")).dropna()
        measured = (both["measured"] / both["measured_balanced"]).to_numpy(np.float64)
        ratio = (both["predicted"] / both["predicted_balanced"]).to_numpy(np.float64)
        differs = np.abs(measured - 1) > 0.05
        side = (np.sign(ratio - 1) == np.sign(measured - 1))[differs]
        found[str(skew)] = SkewScore(
            len(both), float(100 * np.abs(ratio / measured - 1).mean()),
            float(side.mean()) if differs.any() else 1.0, int(differs.sum()),
        )  # fmt: skip
    return found


def model_for(
    models: Sequence[OperatorModel], group: Measured, device: Device, known: dict[str, Device]
) -> OperatorModel:
    """Of the devices that have the format, the nearest; of its kernels, the nearest.

    device  of the group; known, the devices of the models by name
    raises  HardwareError when no device has a kernel of the format
    """
    able: dict[str, OperatorModel] = {}
    for name in known:
        try:
            able[name] = nearest_kernel(
                [m for m in models if m.device == name], group.family, group.kernel
            )
        except HardwareError:
            continue
    if not able:
        raise HardwareError(f"{group.family}: nothing fitted stands for {group.kernel!r}")
    return able[nearest_device(able, device, known)]
