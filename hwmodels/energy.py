"""Energy and price: joules from power states, bytes moved and arithmetic; dollars from rental.

The power of a device that runs a kernel is that of a device ready to run one, plus the energy of
each byte and each floating-point operation over the time they took, at most the board's limit:

    watts = min(tdp, ready + (bytes * per_byte + flops * per_flop) / seconds)

The form is that of Antepara and others (SC'25, eq. 5), who measured each level of the memory
hierarchy on its own. At the limit the device lowers its clock: seconds are taken as given, since
measured seconds include it already, and only the watts stop rising. Constants are published ones
(ENERGY_SOURCES; the paper's table was read as others quote it); none was fitted to the rows they
are scored on (`benchmarks/energy_rows.py`), where the mean error is 30 %, the median 19 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.device import Device, Figure, Kind
from hwmodels.errors import HardwareError

Floats = npt.NDArray[np.float64]
Amount = float | npt.NDArray[np.float64] | npt.NDArray[np.int64]

SECONDS_PER_HOUR = 3600.0
JOULES_PER_KWH = 3.6e6
BIT_J_PER_BYTE = 8e-12  # pJ/bit as J/byte

_SC25 = "Antepara et al., SC'25, doi:10.1145/3712285.3759815, Table 3"
_SMI = "nvidia-smi listings of the H200 in public repositories"
ENERGY_SOURCES: Mapping[str, Figure] = MappingProxyType(
    {
        "idle_share": Figure(75 / 700, "measured", _SMI, "73 to 76 W of 700 W, no process"),
        "ready_share": Figure(
            122 / 700, "measured", _SMI, "120 to 127 W of 700 W, clocks raised, 0 % busy"
        ),
        "hopper.memory": Figure(11.68 * BIT_J_PER_BYTE, "measured", _SC25, "GH200, HBM level"),
        "hopper.l2": Figure(4.87 * BIT_J_PER_BYTE, "measured", _SC25, "GH200, crossbar included"),
        "hopper.l1": Figure(1.45 * BIT_J_PER_BYTE, "measured", _SC25, "GH200"),
        "hopper.flop": Figure(
            0.52e-12, "measured", _SC25 + ", as quoted for the H100 by later work", "FP16 matrix"
        ),
        "a100.memory": Figure(13.11 * BIT_J_PER_BYTE, "measured", _SC25, "A100, HBM level"),
        "a100.l2": Figure(4.71 * BIT_J_PER_BYTE, "measured", _SC25, "A100"),
        "a100.l1": Figure(1.59 * BIT_J_PER_BYTE, "measured", _SC25, "A100"),
        "a100.flop": Figure(0.70e-12, "measured", _SC25, "A100, FP16 matrix"),
        "width": Figure(
            1 / 16,
            "derived",
            "datasheets: half the bits, twice the FLOP/s, at the same board power",
        ),
        "tile": Figure(
            128, "assumed", "rows and columns of a tile of large multiplications in common kernels"
        ),
        "dram.memory": Figure(6 * BIT_J_PER_BYTE, "assumed", "LLMServingSim's configuration: DDR"),
    }
)
_FAMILIES = MappingProxyType(
    {"hopper": ("h100", "h200", "h800", "h20", "gh200"), "a100": ("a100", "a800")}
)
_GPUS = ("gpu", "superchip")


@dataclass(frozen=True, slots=True)
class EnergyModel:
    """Power states of one device and what its work costs; sources in ENERGY_SOURCES.

    idle_w           watts without any work
    ready_w          watts of a kernel that moves and computes nothing: clocks raised, leakage
    tdp_w            board limit, watts
    memory_j_per_byte  device memory and its controller
    cache_j_per_byte   from the last-level cache to the arithmetic; every byte pays it
    flop_j           per floating-point operation of 16-bit operands; proportional to their bits
    tile             operands of a multiplication are read from the cache once a tile, so that a
                     FLOP moves bits / 8 / tile bytes there; 0 leaves this out
    kind             how the energies are known
    """

    idle_w: float
    ready_w: float
    tdp_w: float
    memory_j_per_byte: float
    cache_j_per_byte: float
    flop_j: float
    tile: float = ENERGY_SOURCES["tile"].value
    kind: Kind = "measured"

    def __post_init__(self) -> None:
        if not 0 <= self.idle_w <= self.ready_w <= self.tdp_w:
            raise HardwareError(
                f"power states idle_w={self.idle_w:g}, ready_w={self.ready_w:g},"
                f" tdp_w={self.tdp_w:g} must rise from 0"
            )
        for field in ("memory_j_per_byte", "cache_j_per_byte", "flop_j", "tile"):
            if not getattr(self, field) >= 0:
                raise HardwareError(f"{field}={getattr(self, field)} must be >= 0")

    def dynamic_j(self, n_bytes: Floats, flops: Floats, bits: Amount, cached: Amount) -> Floats:
        """Joules that the work itself takes, above ready_w and before the board's limit."""
        per_byte = self.memory_j_per_byte * (1.0 - cached) + self.cache_j_per_byte
        operand_j = self.cache_j_per_byte / (8 * self.tile) if self.tile else 0.0
        per_flop = bits * (self.flop_j * ENERGY_SOURCES["width"].value + operand_j)
        return np.asarray(n_bytes * per_byte + flops * per_flop)

    def joules(
        self, seconds: Floats, n_bytes: Floats, flops: Floats, bits: Amount, cached: Amount = 0.0
    ) -> Floats:
        """As the function `joules`, without checks."""
        spent = seconds * self.ready_w + self.dynamic_j(n_bytes, flops, bits, cached)
        works = (n_bytes > 0) | (flops > 0)
        busy = np.minimum(spent, seconds * self.tdp_w)
        return np.asarray(np.where(works, busy, seconds * self.idle_w))


def energy_model(device: Device) -> EnergyModel | None:
    """What is known of a device's energy, None without a board power.

    GPUs of the Hopper and A100 families have measured energies. Other GPUs borrow Hopper's, other
    devices are given an energy per FLOP at which all their arithmetic draws their board power:
    both "assumed". Power states are shares of board power, those of the H200.
    """
    if not device.tdp_w > 0:
        return None
    idle, ready = (_value(state) * device.tdp_w for state in ("idle_share", "ready_share"))
    if device.kind not in _GPUS:
        rates = device.flop_per_s
        peak = rates.get("bf16") or rates.get("fp16") or rates.get("fp32")
        per_flop = (device.tdp_w - ready) / peak if peak else _value("hopper.flop")
        memory = _value("dram.memory")
        return EnergyModel(idle, ready, device.tdp_w, memory, 0.0, per_flop, 0.0, "assumed")
    family = next((name for name, of in _FAMILIES.items() if device.name.startswith(of)), None)
    source = family or "hopper"
    return EnergyModel(
        idle, ready, device.tdp_w,
        memory_j_per_byte=_value(f"{source}.memory"),
        cache_j_per_byte=_value(f"{source}.l2") + _value(f"{source}.l1"),
        flop_j=_value(f"{source}.flop"),
        kind="measured" if family else "assumed",
    )  # fmt: skip


def joules(
    device: Device,
    seconds: Amount,
    n_bytes: Amount,
    flops: Amount,
    bits: Amount = 16,
    cached: Amount = 0.0,
) -> Floats:
    """Joules of each operation, float64[n]; arguments are numbers or arrays that broadcast.

    seconds   the operation takes, launch included
    n_bytes   moved between device memory and the arithmetic
    bits      of the operands that are multiplied
    cached    share of the bytes found in the last-level cache, in [0, 1]
    returns   between idle and board power times seconds; NaN for a device without a known board
              power, so that unknown energy cannot pass for none
    raises    HardwareError naming the argument that is negative or not finite, or work in no time
    """
    named = {"seconds": seconds, "n_bytes": n_bytes, "flops": flops, "bits": bits, "cached": cached}
    s, moved, work, width, near = np.broadcast_arrays(
        *(_checked(name, value) for name, value in named.items())
    )
    if (near > 1).any():
        raise HardwareError(f"cached={near.max():g} must be in [0, 1]")
    if ((s == 0) & ((moved > 0) | (work > 0))).any():
        raise HardwareError("seconds=0 for an operation with bytes or flops, expected > 0")
    model = energy_model(device)
    return np.full(s.shape, np.nan) if model is None else model.joules(s, moved, work, width, near)


def power_w(
    device: Device,
    seconds: Amount,
    n_bytes: Amount,
    flops: Amount,
    bits: Amount = 16,
    cached: Amount = 0.0,
) -> Floats:
    """Mean watts of each operation; as `joules`, and idle watts for nothing in no time."""
    lasts = np.asarray(seconds, dtype=np.float64)
    spent = joules(device, lasts, n_bytes, flops, bits, cached)
    idle = _value("idle_share") * device.tdp_w if device.tdp_w > 0 else np.nan
    found = np.full(spent.shape, idle)
    return np.asarray(
        np.divide(spent, lasts, out=found, where=np.broadcast_to(lasts > 0, spent.shape))
    )


def usd(device: Device, seconds: Amount, n_devices: Amount = 1) -> Floats:
    """Dollars to rent n_devices for seconds, by the catalogue; NaN where it has no price."""
    lasts, count = _checked("seconds", seconds), _checked("n_devices", n_devices)
    hourly = device.usd_per_hour if device.usd_per_hour > 0 else np.nan
    return np.asarray(lasts * count * hourly / SECONDS_PER_HOUR)


def electricity_usd(energy_j: Amount, usd_per_kwh: float, pue: float = 1.0) -> Floats:
    """Dollars of electricity; pue is a site's power over that of its machines, at least 1.

    Rental prices include electricity: add this only to owned machines.
    """
    if not usd_per_kwh >= 0 or not pue >= 1:
        raise HardwareError(f"usd_per_kwh={usd_per_kwh} must be >= 0 and pue={pue} >= 1")
    return np.asarray(_checked("energy_j", energy_j) * (usd_per_kwh * pue / JOULES_PER_KWH))


def _value(key: str) -> float:
    return ENERGY_SOURCES[key].value


def _checked(name: str, value: Amount) -> Floats:
    found = np.asarray(value, dtype=np.float64)
    wrong = ~(np.isfinite(found) & (found >= 0))
    if wrong.any():
        raise HardwareError(f"{name}={found[wrong].flat[0]:g} must be >= 0 and finite")
    return found
