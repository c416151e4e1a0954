"""Device: one GPU, NPU, CPU or memory-side processor, as figures with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hwmodels.errors import HardwareError

Kind = Literal["measured", "datasheet", "derived", "assumed"]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the catalogue in SI units, with how it is known and from where."""

    value: float
    kind: Kind
    source: str
    when: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """Peak figures of one device; rates are dense and per device, links per direction.

    flop_per_s  by operand dtype: "fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4", "int4"
    link        name of the device-to-device link in the catalogue, "" for none
    link_bytes_per_s, host_link_bytes_per_s, tdp_w, usd_per_hour  0 when not known or none
    launch_s    period of kernels launched in a graph, back to back
    figures     every catalogue figure by key, for the reader ("memory.bandwidth", ...)
    devices_per_node  devices in one scale-up domain, unless a system says otherwise
    scale_out   name of the link to other nodes in the catalogue
    link_devices  how many devices the link joins (a bridge: 2), 0 for all of a node
    l2_bytes, multiprocessors, clock_hz  last-level cache, streaming multiprocessors (compute units)
                and their highest clock; 0 when not known
    """

    name: str
    kind: str
    vendor: str
    memory_bytes: int
    memory_bytes_per_s: float
    flop_per_s: Mapping[str, float]
    link: str
    link_bytes_per_s: float
    host_link: str
    host_link_bytes_per_s: float
    tdp_w: float
    usd_per_hour: float
    launch_s: float
    aliases: tuple[str, ...] = ()
    figures: Mapping[str, Figure] | None = None
    devices_per_node: int = 8
    scale_out: str = "infiniband-ndr"
    link_devices: int = 0
    l2_bytes: float = 0.0
    multiprocessors: int = 0
    clock_hz: float = 0.0

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "memory_bytes_per_s"):
            if not getattr(self, field) > 0:
                raise HardwareError(
                    f"device {self.name}: {field}={getattr(self, field)} must be > 0"
                )

    def peak_flop_per_s(self, dtype: str) -> float:
        """Dense peak for an operand dtype; the error lists the known ones."""
        if dtype not in self.flop_per_s:
            known = ", ".join(sorted(self.flop_per_s))
            raise HardwareError(f"device {self.name}: no peak for dtype {dtype!r}, known: {known}")
        return self.flop_per_s[dtype]


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a link, as seen by one device.

    bytes_per_s  achievable, not theoretical, where the catalogue has it
    """

    name: str
    bytes_per_s: float
    latency_s: float
    energy_j_per_byte: float = 0.0

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or self.latency_s < 0:
            raise HardwareError(
                f"link {self.name}: bytes_per_s={self.bytes_per_s} must be > 0 and"
                f" latency_s={self.latency_s} >= 0"
            )
