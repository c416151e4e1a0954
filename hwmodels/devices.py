"""Devices, links and memories by name, from the files in `catalog/devices` and `catalog/links`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from hwmodels.catalog_files import (
    DeviceFile,
    LinkFile,
    LinkTable,
    figures,
    read_file,
    read_folder,
    spelling,
    unknown,
)
from hwmodels.device import Device, Figure, Link
from hwmodels.errors import HardwareError

# Launch period of devices that no benchmark of the catalogue covers.
ASSUMED_LAUNCH = Figure(
    1.3e-6, "assumed", "as the A100 and H200, measured 1.34 and 1.29 us in a CUDA graph"
)
ASSUMED_CPU_LAUNCH = Figure(5e-6, "assumed", "waking a waiting pool of threads")
# Latency of links that the catalogue has no figure for, by kind.
ASSUMED_LATENCY_S: Mapping[str, float] = MappingProxyType(
    {"link": 5e-6, "network": 2e-6, "memory": 0.4e-6, "storage": 80e-6}
)


@dataclass(frozen=True, slots=True)
class Component:
    """One link, memory, drive or fixed overhead with all its figures.

    figures  in SI units: "bandwidth.theoretical", "bandwidth.achievable" (bytes/s, one direction),
             "latency.typical" (s; kernel periods: "latency.stream", "latency.graph"),
             "energy.transfer" (J/byte), "capacity.typical" (bytes)
    per      what the figures are for: a slot, GPU, port, stack, channel, drive, kernel
    """

    name: str
    kind: str
    per: str
    generation: str
    aliases: tuple[str, ...]
    confidence: str
    note: str
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class About:
    """What a reader should know before using a device's figures.

    year        of its release
    confidence  "high", "medium" or "low": how far its sources can be trusted as a whole
    note        conflicts and traps, "" for none
    """

    year: int
    confidence: str
    note: str


def device_names() -> tuple[str, ...]:
    """Names of the devices in the catalogue, sorted."""
    return tuple(sorted({file.name for file in _device_files().values()}))


def link_names() -> tuple[str, ...]:
    """Names of the links, memories, drives and overheads in the catalogue, sorted."""
    return tuple(sorted({file.name for file in _link_files().values()}))


def load_device(name: str) -> Device:
    """A device by name or alias (case, spaces and underscores do not matter), or from a file.

    name    a name ending in .toml is the path of a file in the catalogue's form

    raises  HardwareError for an unknown name, with the close ones
    """
    return _device(_device_file(name))


def about_device(name: str) -> About:
    """What the catalogue says of a device beside its figures, by name or alias."""
    file = _device_file(name)
    return About(file.year, file.confidence, " ".join(file.note.split()))


def load_component(name: str) -> Component:
    """Every figure of a link, memory, drive or overhead, by name or alias.

    raises  HardwareError for an unknown name, with the close ones
    """
    file = _link_files().get(spelling(name))
    if file is None:
        raise unknown("link", name, _link_files())
    return Component(
        name=file.name,
        kind=file.kind,
        per=file.per,
        generation=file.generation,
        aliases=file.aliases,
        confidence=file.confidence,
        note=" ".join(file.note.split()),
        figures=figures(file, file.name),
    )


def load_link(name: str) -> Link:
    """A link, memory or drive as a rate and a latency: achievable rate if known, else nominal.

    Latency is ASSUMED_LATENCY_S where the catalogue has none.

    raises  HardwareError for an unknown name, or an overhead, which has no rate
    """
    component = load_component(name)
    known = component.figures
    rate = known.get("bandwidth.achievable") or known.get("bandwidth.theoretical")
    if rate is None:
        raise HardwareError(f"{component.kind} {component.name} has no bandwidth")
    latency = known.get("latency.typical")
    energy = known.get("energy.transfer")
    return Link(
        name=component.name,
        bytes_per_s=rate.value,
        latency_s=latency.value if latency else ASSUMED_LATENCY_S[component.kind],
        energy_j_per_byte=energy.value if energy else 0.0,
    )


def achievable_share(name: str) -> float:
    """Share of a link's nominal rate that transfers reach; 1 where the catalogue has no figure."""
    known = load_component(name).figures
    if "bandwidth.achievable" not in known:
        return 1.0
    return known["bandwidth.achievable"].value / known["bandwidth.theoretical"].value


@cache
def _device_files() -> Mapping[str, DeviceFile]:
    return read_folder("devices", DeviceFile)


@cache
def _link_files() -> Mapping[str, LinkFile]:
    return read_folder("links", LinkFile)


def _device_file(name: str) -> DeviceFile:
    if name.endswith(".toml"):
        return read_file(Path(name), DeviceFile)
    file = _device_files().get(spelling(name))
    if file is None:
        raise unknown("device", name, _device_files())
    return file


def _device(file: DeviceFile) -> Device:
    known = dict(figures(file, file.name))
    for key in ("memory.capacity", "memory.bandwidth"):
        if key not in known:
            raise HardwareError(f"device {file.name}: {key} is missing")
    assumed = ASSUMED_CPU_LAUNCH if file.kind == "cpu" else ASSUMED_LAUNCH
    known.setdefault("launch.graph", known.get("launch.stream", assumed))
    compute = {str(key): known[f"compute.{key}"].value for key in file.compute}
    return Device(
        name=file.name,
        kind=file.kind,
        vendor=file.vendor,
        memory_bytes=int(known["memory.capacity"].value),
        memory_bytes_per_s=known["memory.bandwidth"].value,
        flop_per_s=MappingProxyType(compute),
        link=_catalog_link(file.link),
        link_bytes_per_s=0.0 if _is_internal(file.link) else _value(known, "link.bandwidth"),
        host_link=_catalog_link(file.host_link),
        host_link_bytes_per_s=_value(known, "host_link.bandwidth"),
        tdp_w=_value(known, "power.tdp"),
        usd_per_hour=_value(known, "price.rental"),
        launch_s=known["launch.graph"].value,
        aliases=file.aliases,
        figures=MappingProxyType(known),
        devices_per_node=file.devices_per_node,
        scale_out=file.scale_out,
        link_devices=file.link.devices if file.link is not None else 0,
        l2_bytes=_value(known, "chip.l2"),
        multiprocessors=int(_value(known, "chip.multiprocessors")),
        clock_hz=_value(known, "chip.clock"),
    )


def _value(known: Mapping[str, Figure], key: str) -> float:
    """The figure's value, 0 where there is none."""
    return known[key].value if key in known else 0.0


def _catalog_link(table: LinkTable | None) -> str:
    return table.catalog if table is not None else ""


def _is_internal(table: LinkTable | None) -> bool:
    return table is not None and table.internal
