"""One fitted kernel of one device: work in, seconds out, with what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.device import Device
from hwmodels.errors import HardwareError
from hwmodels.fitted import (
    attention,
    collectives,
    expert_exchange,
    experts,
    formula,
    gemm,
    latent_attention,
)
from hwmodels.fitted.parts import Floats, Parts, Work
from hwmodels.fitted.trees import NO_TREES, Trees, evaluate, grow

FAMILIES: Mapping[str, Callable[[Device, Work], Parts]] = MappingProxyType(
    {
        "gemm": gemm.parts,
        "experts": experts.parts,
        "attention_decode": attention.decode_parts,
        "attention_prefill": attention.prefill_parts,
        "latent_decode": latent_attention.decode_parts,
        "latent_prefill": latent_attention.prefill_parts,
        "collective": collectives.parts,
        "exchange_low_latency": expert_exchange.low_latency_parts,
        "exchange_normal": expert_exchange.normal_parts,
    }
)
MOST_TREES, MOST_LEAVES, ROWS_A_TREE = 60, 31, 25
MORE_TREES = MappingProxyType({"experts": 100})  # of families with more to say
FEW_ROWS, FEW_LEAVES = 3000, 15
MOST_CORRECTION = np.log(20.0)  # of the formula by the trees
RANGE_SLACK = 0.02  # in shape units, about 1.4 % of a size


@dataclass(frozen=True, slots=True)
class OperatorModel:
    """A kernel of a family as it was measured on one device.

    kernel     framework, version, dtypes and name, as the table has them
    constants  of the formula; trees, of what it leaves
    low, high  float32[shapes]: least and most of each shape number among the rows
    rows       that were fitted
    error_pct  median absolute error on rows of shapes that were kept apart, NaN when none were
    p90_pct    the 90th percentile of it
    """

    family: str
    kernel: str
    device: str
    constants: Mapping[str, float]
    trees: Trees
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]
    rows: int
    error_pct: float = float("nan")
    p90_pct: float = float("nan")


@dataclass(frozen=True, slots=True)
class Prediction:
    """seconds float64[n]; extrapolated bool[n]: outside the measured sizes, or another device."""

    seconds: Floats
    extrapolated: npt.NDArray[np.bool_]


def parts_of(family: str, device: Device, work: Work) -> Parts:
    """The parts of work of a family; HardwareError lists the families for an unknown one."""
    if family not in FAMILIES:
        raise HardwareError(f"family {family!r} is unknown, known: {', '.join(FAMILIES)}")
    return FAMILIES[family](device, work)


def fit_model(
    family: str, kernel: str, device: Device, work: Work, measured: Floats
) -> OperatorModel:
    """Fit a kernel to seconds measured on a device.

    raises  HardwareError for too few rows, or seconds that are not > 0
    """
    measured = np.asarray(measured, dtype=np.float64)
    if not (measured > 0).all():
        raise HardwareError(f"{family} {kernel}: measured seconds must be > 0")
    parts = parts_of(family, device, work)
    return fit_parts(OperatorModel(family, kernel, device.name, {}, NO_TREES, *_NOTHING, 0),
                     parts, measured)  # fmt: skip


def fit_parts(unfitted: OperatorModel, parts: Parts, measured: Floats) -> OperatorModel:
    """The model with constants, trees and range of the rows."""
    constants = formula.fit(parts, measured)
    features = parts.features()
    left = np.log(measured / formula.seconds(constants, parts))
    most = MORE_TREES.get(unfitted.family, MOST_TREES)
    n_trees = min(most, len(measured) // ROWS_A_TREE)
    leaves = FEW_LEAVES if len(measured) < FEW_ROWS else MOST_LEAVES
    trees = grow(features, left, n_trees, leaves) if n_trees else NO_TREES
    return replace(
        unfitted,
        constants=constants,
        trees=trees,
        low=features.min(axis=1),
        high=features.max(axis=1),
        rows=len(measured),
    )


def predict(model: OperatorModel, device: Device, work: Work) -> Prediction:
    """Seconds of work on a device, which may be another than the model was measured on.

    work    columns of the model's family, float64[n]
    raises  HardwareError for columns that are missing, negative or inconsistent
    """
    return predict_parts(model, parts_of(model.family, device, work), device.name)


def predict_parts(model: OperatorModel, parts: Parts, device_name: str) -> Prediction:
    """As `predict`, from parts that are made already."""
    features = parts.features()
    correction = evaluate(model.trees, features)
    seconds = formula.seconds(model.constants, parts) * np.exp(
        np.clip(correction, -MOST_CORRECTION, MOST_CORRECTION)
    )
    low, high = model.low - RANGE_SLACK, model.high + RANGE_SLACK
    beyond = ((features < low[:, None]) | (features > high[:, None])).any(axis=0)
    return Prediction(seconds, np.asarray(beyond | (device_name != model.device)))


_NOTHING = (np.zeros(0, np.float32), np.zeros(0, np.float32))
