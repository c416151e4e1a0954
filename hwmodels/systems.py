"""Systems by name: a file in `catalog/systems`, or `<device>x<count>` for any device.

`h800x32` is 32 H800 in nodes of eight; a device that joins another number in one domain says so in
its own file (72 GB200). A device's name alone is a system of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

from hwmodels.catalog_files import (
    HostTable,
    SystemFile,
    memory_figure,
    read_file,
    read_folder,
    spelling,
    unknown,
)
from hwmodels.device import Device, Link
from hwmodels.devices import (
    ASSUMED_LATENCY_S,
    achievable_share,
    device_names,
    load_component,
    load_device,
    load_link,
)
from hwmodels.errors import HardwareError
from hwmodels.system import System

_GENERIC = re.compile(r"(?P<device>.+)x(?P<count>\d{1,6})", re.ASCII)


def system_names() -> tuple[str, ...]:
    """Names of the systems with a file of their own, sorted; `<device>x<count>` needs none."""
    return tuple(sorted({file.name for file in _system_files().values()}))


def load_system(name: str) -> System:
    """A system by name or alias, as `<device>x<count>`, or from a file.

    name    "gb200-nvl72", "h800x32", "h200" (one device), or the path of a .toml file
    raises  HardwareError for an unknown name, with the close ones, or for a count that does not
            fill its nodes
    """
    if name.endswith(".toml"):
        return _from_file(read_file(Path(name), SystemFile))
    if file := _system_files().get(spelling(name)):
        return _from_file(file)
    if _is_device(name):
        return _homogeneous(load_device(name), 1)
    match = _GENERIC.fullmatch(spelling(name))
    if match and _is_device(match["device"]):
        return _homogeneous(load_device(match["device"]), int(match["count"]))
    stem = match["device"] if match else name
    known = [*_system_files(), *device_names()]
    raise unknown("system", stem, known)


def system_note(name: str) -> str:
    """Note and source of a system that has a file; "" for a generic one."""
    file = _system_files().get(spelling(name))
    return "" if file is None else " ".join(f"{file.note} Source: {file.source}.".split())


@cache
def _system_files() -> Mapping[str, SystemFile]:
    return read_folder("systems", SystemFile)


def _is_device(name: str) -> bool:
    try:
        load_device(name)
    except HardwareError:
        return False
    return True


def _homogeneous(device: Device, n_devices: int) -> System:
    per_node = device.devices_per_node
    return System(
        name=f"{device.name}x{n_devices}",
        device=device,
        n_devices=n_devices,
        devices_per_node=per_node,
        scale_up=scale_up_link(device, min(n_devices, per_node)),
        scale_out=load_link(device.scale_out),
    )


def _from_file(file: SystemFile) -> System:
    device = load_device(file.device)
    per_node = file.devices_per_node or device.devices_per_node
    return System(
        name=file.name,
        device=device,
        n_devices=file.n_devices,
        devices_per_node=per_node,
        scale_up=scale_up_link(device, min(file.n_devices, per_node)),
        scale_out=load_link(file.scale_out or device.scale_out),
        host=_host(file.host, file.name) if file.host else None,
    )


def scale_up_link(device: Device, n_devices: int) -> Link:
    """The link between n_devices of one node.

    returns  the device's own link at its figure times the share that links of its kind reach; over
             the host link where it has none, or where a bridge joins fewer devices than asked for;
             over the link between nodes where it has neither. Latency is the catalogue's.
    """
    joined = device.link_devices or n_devices
    if device.link_bytes_per_s > 0 and n_devices <= joined:
        return _scaled(device.link, device.link_bytes_per_s)
    if device.host_link and load_component(device.host_link).kind == "link":
        return _scaled(device.host_link, device.host_link_bytes_per_s)
    return load_link(device.scale_out)


def _scaled(catalog: str, bytes_per_s: float) -> Link:
    """A link at a device's own nominal rate with the share, latency and energy of its kind."""
    if not catalog:
        return Link("link", bytes_per_s, ASSUMED_LATENCY_S["link"])
    return replace(load_link(catalog), bytes_per_s=bytes_per_s * achievable_share(catalog))


def _host(table: HostTable, system: str) -> Device:
    """All sockets of a node as one device; its figures stay one socket's, but for the memory."""
    socket = load_device(table.device)
    memory = memory_figure(table.memory, f"system {system}: host.memory")
    figures = dict(socket.figures or {})
    figures["memory.capacity"] = memory
    peaks = {dtype: rate * table.sockets for dtype, rate in socket.flop_per_s.items()}
    return replace(
        socket,
        name=socket.name if table.sockets == 1 else f"{table.sockets}x {socket.name}",
        memory_bytes=int(memory.value),
        memory_bytes_per_s=socket.memory_bytes_per_s * table.sockets,
        flop_per_s=MappingProxyType(peaks),
        tdp_w=socket.tdp_w * table.sockets,
        figures=MappingProxyType(figures),
    )
