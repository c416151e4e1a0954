"""What a family of operators says of its work on a device, before anything is fitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hwmodels.device import Device
from hwmodels.errors import HardwareError

Floats = npt.NDArray[np.float64]
Work = Mapping[str, Floats]
# A cache of which a share is used by other data; how sharply reuse ends beyond it.
CACHE_SHARE, CACHE_EDGE = 0.7, 4.0
# Of a device whose chip the catalogue does not describe.
USUAL_L2_BYTES, USUAL_MULTIPROCESSORS, USUAL_CLOCK_HZ = 50e6, 132, 1.98e9


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds that the parts of each operation take at datasheet rates, float64[n] each, by name.

    memory   reading and writing; overlaps with compute, and its parts add up
    compute  arithmetic; overlaps with memory, and its parts add up
    serial   what comes on top of the larger of the two
    shape    numbers that describe the work to the trees, in no unit; most are logarithms to base 2
    """

    memory: Mapping[str, Floats]
    compute: Mapping[str, Floats]
    serial: Mapping[str, Floats]
    shape: Mapping[str, Floats]

    def __len__(self) -> int:
        """Number of operations."""
        return len(next(iter(self.shape.values())))

    def features(self) -> npt.NDArray[np.float32]:
        """float32[shapes, n], what the trees see."""
        found = np.empty((len(self.shape), len(self)), np.float32)
        for row, values in zip(found, self.shape.values(), strict=True):
            row[:] = values
        return found


@dataclass(frozen=True, slots=True)
class Chip:
    """Rates of a device that parts are divided by; bytes/s, bytes, 1, Hz."""

    memory_bytes_per_s: float
    l2_bytes: float
    multiprocessors: int
    clock_hz: float

    def cached_share(self, n_bytes: Floats) -> Floats:
        """Share of a working set that repeated runs find in the last-level cache."""
        filled = n_bytes / (self.l2_bytes * CACHE_SHARE)
        return np.asarray(1 / (1 + filled**CACHE_EDGE))


def chip(device: Device) -> Chip:
    """The rates of a device; usual ones where the catalogue has none."""
    return Chip(
        device.memory_bytes_per_s,
        device.l2_bytes or USUAL_L2_BYTES,
        device.multiprocessors or USUAL_MULTIPROCESSORS,
        device.clock_hz or USUAL_CLOCK_HZ,
    )


def peak(device: Device, bits: Floats) -> Floats:
    """FLOP/s for operands of each number of bits: bf16 above 8, fp8 (else int8, bf16) at 8 and 4.

    Weight-only formats compute in 16 bits: give the bits of the activations.
    """
    rates = device.flop_per_s
    wide = rates.get("bf16") or rates.get("fp16") or rates.get("fp32")
    if not wide:
        raise HardwareError(f"device {device.name}: no peak FLOP/s for 16-bit operands")
    narrow = rates.get("fp8") or rates.get("int8") or wide
    return np.where(bits <= 8, narrow, wide)


def log2(values: Floats) -> Floats:
    """Logarithm to base 2, of 1e-12 where a value is smaller."""
    return np.log2(np.maximum(values, 1e-12))


def checked(family: str, work: Work, columns: Iterable[str], at_least: float = 0.0) -> Work:
    """The columns as float64 arrays of one length.

    raises  HardwareError naming the column that is missing, of another length, negative or not
            finite, with its first such value
    """
    names = tuple(columns)
    missing = [name for name in names if name not in work]
    if missing:
        raise HardwareError(f"{family}: column {missing[0]!r} is missing, has {', '.join(work)}")
    arrays = {name: np.atleast_1d(np.asarray(work[name], dtype=np.float64)) for name in names}
    n = max(len(array) for array in arrays.values())
    for name, array in arrays.items():
        if array.ndim != 1 or len(array) not in (1, n):
            raise HardwareError(f"{family}: {name} has shape {array.shape}, expected ({n},)")
        if not (len(array) and array.min() >= at_least and array.max() < np.inf):  # NaN fails too
            wrong = array[~(np.isfinite(array) & (array >= at_least))]
            if len(wrong):
                raise HardwareError(f"{family}: {name}={wrong[0]:g} must be >= {at_least:g}")
    return {name: full_length(array, n) for name, array in arrays.items()}


def full_length(array: Floats, n: int) -> Floats:
    """An array of one value or n as one of n (np.broadcast_to is slower for little arrays)."""
    return array if len(array) == n else np.full(n, array[0])
