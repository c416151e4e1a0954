"""How near the watts of `energy.py` come to measured ones, beside two guesses that know nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwmodels.device import Device
from hwmodels.energy import power_w
from hwmodels.errors import HardwareError
from hwmodels.fitted.experts import COLUMNS
from hwmodels.fitted.parts import Floats, Work, checked, chip
from hwmodels.fitted.tables import Measured

OUTPUT_BYTES = 2.0  # intermediate results and outputs are 16 bits wide
SHAPES_OF_A_KERNEL = 1_000_000  # more than there are
GUESSES_W = np.arange(50.0, 2000.0)


@dataclass(frozen=True, slots=True)
class Amounts:
    """What operations do, float64[n] each: as the arguments of `energy.joules`."""

    seconds: Floats
    n_bytes: Floats
    flops: Floats
    bits: Floats
    cached: Floats


@dataclass(frozen=True, slots=True)
class Watts:
    """Measured watts of rows and what was said of them, float64[n] each.

    dtype    str[n], the table's name of the number format
    shape    int64[n], rows of one number have the same sizes but for tokens
    amounts  what each row did
    """

    measured: Floats
    predicted: Floats
    tokens: Floats
    dtype: npt.NDArray[np.str_]
    shape: npt.NDArray[np.int64]
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class PowerScore:
    """Error of watts over rows: mean and median of |predicted / measured - 1|, and bias in watts.

    joules  total predicted over total measured energy of one run of each row, less 1
    """

    rows: int
    mean: float
    median: float
    bias_w: float
    joules: float


def expert_amounts(device: Device, work: Work, seconds: Floats) -> Amounts:
    """Bytes and FLOPs of routed experts; work has the columns of `fitted/experts.py`.

    Weights of distinct experts, and for each token copy its input, its intermediate results in
    and out, and its output. What fits the last-level cache is found there by repeated runs.
    """
    c = checked("experts", work, COLUMNS)
    hidden, inter, copies, operand = (
        c["hidden"], c["intermediate"], c["copies"], c["activation_bits"] / 8,
    )  # fmt: skip
    params = hidden * inter * c["matrices"]
    weights = c["distinct"] * params * c["weight_bits"] / 8
    middle = inter * ((c["matrices"] - 1) * OUTPUT_BYTES + 2 * operand)
    moved = weights + copies * (hidden * (operand + OUTPUT_BYTES) + middle)
    touched = weights + copies * (hidden + inter) * OUTPUT_BYTES
    cached = chip(device).cached_share(touched)
    return Amounts(seconds, moved, 2 * params * copies, c["activation_bits"], cached)


def expert_watts(device: Device, groups: Sequence[Measured]) -> Watts:
    """The rows with a measured power, of routed experts on one device.

    raises  HardwareError when there is none
    """
    found = [
        _watts(device, group, index * SHAPES_OF_A_KERNEL)
        for index, group in enumerate(groups)
        if group.family == "experts" and group.device == device.name
    ]
    if not any(len(one.measured) for one in found):
        raise HardwareError(f"no row of experts on device {device.name} has a measured power")
    amounts = (np.concatenate([getattr(one.amounts, name) for one in found]) for name in _AMOUNTS)
    columns = {name: np.concatenate([getattr(one, name) for one in found]) for name in _COLUMNS}
    return Watts(**columns, amounts=Amounts(*amounts))


_AMOUNTS = ("seconds", "n_bytes", "flops", "bits", "cached")
_COLUMNS = ("measured", "predicted", "tokens", "dtype", "shape")


def _watts(device: Device, group: Measured, first_shape: int) -> Watts:
    keep = np.isfinite(group.watts) & (group.watts > 0)
    work = {name: column[keep] for name, column in group.work.items()}
    of = expert_amounts(device, work, group.seconds[keep])
    said = power_w(device, of.seconds, of.n_bytes, of.flops, of.bits, of.cached)
    dtypes = np.full(int(keep.sum()), group.dtype)
    shapes = group.shape[keep] + first_shape
    return Watts(group.watts[keep], said, group.tokens[keep], dtypes, shapes, of)


def power_score(predicted: Floats, measured: Floats, seconds: Floats) -> PowerScore:
    """The error of watts of some rows, float64[n] each."""
    error = np.abs(predicted / measured - 1)
    return PowerScore(
        len(measured),
        float(error.mean()),
        float(np.median(error)),
        float((predicted - measured).mean()),
        float((predicted * seconds).sum() / (measured * seconds).sum() - 1),
    )


def best_constant(measured: Floats) -> float:
    """The whole watts of least mean relative error: a guess that has seen the answers."""
    errors = [np.abs(guess / measured - 1).mean() for guess in GUESSES_W]
    return float(GUESSES_W[int(np.argmin(errors))])
