"""Box: one machine with memories of several speeds, and what copies between them are limited by."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.device import Device, Link
from hwmodels.devices import load_component, load_link
from hwmodels.errors import HardwareError
from hwmodels.host_costs import DEFAULT_HOST, HostEfficiency, host_bytes_per_s
from hwmodels.system import System
from hwmodels.systems import load_system

DEFAULT_HOST_BYTES = 256 * 2**30
# 119.5 GB/s of CPU experts and copies together where the CPU's experts alone reach 110.3 GB/s
# (EPYC Rome with eight channels, FlashML-org/FreeToken issue 444).
_TOGETHER = 1.083
_UNIFIED = ("soc", "edge-soc")


@dataclass(frozen=True, slots=True)
class Box:
    """One machine; the first n_devices of its GPUs are used.

    device           the GPUs (or sockets of another accelerator), all alike
    host             CPU with its DRAM; None for a plain memory behind the host link
    host_bytes       host memory that may hold experts
    copy_bytes_per_s  host to one device, achievable; inf where memory is one (unified)
    copy_s           fixed seconds of a copy
    dram_bytes_per_s  host memory's rate for everything that reads it, CPU and copies together
    drive            NVMe under the host memory, None for none
    system           the system it is part of: links between its devices, operators' prices
    """

    system: System
    device: Device
    n_devices: int
    host: Device | None
    host_bytes: int
    copy_bytes_per_s: float
    copy_s: float
    dram_bytes_per_s: float
    drive: Link | None = None
    efficiency: HostEfficiency = DEFAULT_HOST

    def __post_init__(self) -> None:
        if self.n_devices < 1 or self.n_devices > self.system.n_devices:
            raise HardwareError(
                f"box {self.system.name}: n_devices={self.n_devices}, expected"
                f" 1..{self.system.n_devices}"
            )
        for field in ("copy_bytes_per_s", "dram_bytes_per_s"):
            if not getattr(self, field) > 0:
                raise HardwareError(
                    f"box {self.system.name}: the host tier has no link ({field}="
                    f"{getattr(self, field)}); name a device with a host link"
                )

    @property
    def device_bytes(self) -> int:
        """Memory of the devices in use, together."""
        return self.n_devices * self.device.memory_bytes

    @property
    def unified(self) -> bool:
        """Whether host and device share one memory, so that nothing has to be copied."""
        return self.copy_bytes_per_s == float("inf")


def load_box(
    name: str,
    drive: str = "",
    host_bytes: int = 0,
    n_devices: int = 0,
    efficiency: HostEfficiency = DEFAULT_HOST,
) -> Box:
    """A box by the name of a system or device of the catalogue.

    drive       name of a drive in the catalogue, "" for none
    host_bytes  host memory for experts; 0 takes the system's, or 256 GiB where none is known
    n_devices   devices of the node in use, 0 for all
    raises      HardwareError for unknown names, or a device without a host link
    """
    system = load_system(name)
    device, host = system.device, system.host
    copy, memory_bytes = _host_side(system, efficiency)
    dram = _TOGETHER * host_bytes_per_s(host, efficiency) if host else copy * system.n_devices
    return Box(
        system=system,
        device=device,
        n_devices=n_devices or min(system.n_devices, system.devices_per_node),
        host=host,
        host_bytes=host_bytes or memory_bytes,
        copy_bytes_per_s=copy,
        copy_s=efficiency.copy_s,
        dram_bytes_per_s=dram,
        drive=load_link(drive) if drive else None,
        efficiency=efficiency,
    )


def _host_side(system: System, efficiency: HostEfficiency) -> tuple[float, int]:
    """Achievable bytes/s of one device's copies from the host tier, and that tier's bytes."""
    device = system.device
    if device.kind in _UNIFIED:
        return float("inf"), device.memory_bytes
    if device.host_link and load_component(device.host_link).kind == "memory":
        capacity = load_component(device.host_link).figures["capacity.typical"].value
        return load_link(device.host_link).bytes_per_s, int(capacity) * system.n_devices
    host_bytes = system.host.memory_bytes if system.host else DEFAULT_HOST_BYTES
    return device.host_link_bytes_per_s * efficiency.pinned_share, host_bytes
