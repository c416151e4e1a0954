"""System: n equal devices in nodes, one fast link inside a node and a slower one between."""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels.device import Device, Link
from hwmodels.errors import HardwareError


@dataclass(frozen=True, slots=True)
class System:
    """A homogeneous cluster; rank r sits on node r // devices_per_node.

    scale_up   link of one device to the others of its node (NVLink, HCCS, PCIe)
    scale_out  link of one device to other nodes (its share of the node's NICs)
    host       CPU of a node with its DRAM, None when not modelled
    """

    name: str
    device: Device
    n_devices: int
    devices_per_node: int
    scale_up: Link
    scale_out: Link
    host: Device | None = None

    def __post_init__(self) -> None:
        if self.n_devices < 1 or self.devices_per_node < 1:
            raise HardwareError(
                f"system {self.name}: n_devices={self.n_devices} and"
                f" devices_per_node={self.devices_per_node} must be >= 1"
            )
        if self.n_devices > self.devices_per_node and self.n_devices % self.devices_per_node:
            raise HardwareError(
                f"system {self.name}: n_devices={self.n_devices} must be a multiple of"
                f" devices_per_node={self.devices_per_node}"
            )

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return max(1, self.n_devices // self.devices_per_node)
