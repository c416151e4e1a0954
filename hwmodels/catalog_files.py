"""Catalogue files: the keys they may have, and every figure with its unit, kind and source.

A figure is text with a unit ("3350 GB/s"); a bare number, a key that is not listed here or a
measured figure that does not say when it holds is refused with the file's name.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from hwmodels.device import Figure, Kind
from hwmodels.errors import HardwareError
from hwmodels.units import parse

CATALOG = Path(__file__).parent / "catalog"

DataType = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4", "int4"]
Confidence = Literal["high", "medium", "low"]


class Closed(BaseModel):
    """Base of all file models: a key that is not declared is an error."""

    model_config = ConfigDict(extra="forbid")


class FigureText(Closed):
    """One figure as written; `when` says under which conditions, required when measured."""

    value: StrictStr
    kind: Kind
    source: str = Field(min_length=1)
    when: str = ""

    @model_validator(mode="after")
    def _measured_says_when(self) -> FigureText:
        if self.kind == "measured" and not self.when:
            raise ValueError("a measured figure needs `when`")
        return self


class CatalogFile(Closed):
    """What every catalogue file begins with."""

    name: str
    aliases: tuple[str, ...] = ()
    note: str = ""


class LinkTable(Closed):
    """A device's link: its name as sold, and the file in `links/` that says more of its kind.

    internal  joins parts inside the device (unified memory, a PIM stack), not devices
    devices   how many devices it joins (a bridge: 2), 0 for all of a node
    """

    text: str
    catalog: str = ""
    internal: bool = False
    devices: int = Field(default=0, ge=0)
    bandwidth: FigureText | None = None
    bandwidth_achieved: FigureText | None = None


class DeviceFile(CatalogFile):
    """One file in `devices/`."""

    kind: str
    confidence: Confidence
    vendor: str
    year: int
    devices_per_node: int = Field(default=8, ge=1)
    scale_out: str = "infiniband-ndr"
    memory: dict[
        Literal["capacity", "usable", "on_chip", "bandwidth", "bandwidth_achieved"], FigureText
    ]
    compute: dict[DataType, FigureText] = {}
    compute_achieved: dict[DataType, FigureText] = {}
    chip: dict[Literal["l2", "multiprocessors", "clock"], FigureText] = {}
    link: LinkTable | None = None
    host_link: LinkTable | None = None
    power: dict[Literal["tdp"], FigureText] = {}
    price: dict[Literal["rental"], FigureText] = {}
    launch: dict[Literal["stream", "graph"], FigureText] = {}


class LinkFile(CatalogFile):
    """One file in `links/`: a link, network, memory, storage or fixed overhead."""

    kind: Literal["link", "network", "memory", "storage", "overhead"]
    confidence: Confidence
    generation: str = ""
    per: str = ""
    bandwidth: dict[Literal["theoretical", "achievable"], FigureText] = {}
    latency: dict[Literal["typical", "stream", "graph", "low", "high"], FigureText] = {}
    energy: dict[Literal["transfer"], FigureText] = {}
    capacity: dict[Literal["typical"], FigureText] = {}


class HostTable(Closed):
    """The CPU of one node: a device of the catalogue, how many sockets, and all their memory."""

    device: str
    sockets: int = Field(default=1, ge=1)
    memory: FigureText


class SystemFile(CatalogFile):
    """One file in `systems/`; scale_out and devices_per_node are the device's own by default."""

    source: str = Field(min_length=1)
    device: str
    n_devices: int = Field(ge=1)
    devices_per_node: int = Field(default=0, ge=0)
    scale_out: str = ""
    host: HostTable | None = None


_UNITS: Mapping[str, str] = MappingProxyType(
    {
        "memory.capacity": "B",
        "memory.usable": "B",
        "memory.on_chip": "B",
        "chip.l2": "B",
        "chip.multiprocessors": "SM",
        "chip.clock": "Hz",
        "compute": "FLOP/s",
        "compute_achieved": "FLOP/s",
        "power": "W",
        "price": "USD/h",
        "launch": "s",
        "latency": "s",
        "energy": "J/B",
        "capacity": "B",
    }
)
_File = TypeVar("_File", bound=CatalogFile)


def read_file(path: Path, model: type[_File]) -> _File:
    """One catalogue file, checked against its model.

    raises  HardwareError naming the file and the first key that is wrong
    """
    try:
        file = model.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HardwareError(f"{path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise HardwareError(f"{path}: {key}={first['input']!r}: {first['msg']}") from error
    if file.name != path.stem:
        raise HardwareError(f"{path}: name={file.name!r}, expected the file's name {path.stem!r}")
    return file


def figures(file: DeviceFile | LinkFile, path: str) -> Mapping[str, Figure]:
    """Every figure of a file in SI units, keyed like "memory.bandwidth".

    path    for the message of the HardwareError that a figure without a fitting unit raises
    """
    found: dict[str, Figure] = {}
    for group, table in file:
        if isinstance(table, LinkTable):
            entries = {key: value for key, value in table if isinstance(value, FigureText)}
        elif isinstance(table, dict):
            entries = table
        else:
            continue
        for key, text in entries.items():
            name = f"{group}.{key}"
            found[name] = _figure(text, _unit(name), f"{path}: {name}")
    return MappingProxyType(found)


def _unit(name: str) -> str:
    return _UNITS.get(name) or _UNITS.get(name.split(".")[0], "B/s")


def _figure(text: FigureText, unit: str, where: str) -> Figure:
    try:
        value = parse(text.value, unit)
    except HardwareError as error:
        raise HardwareError(f"{where}: {error}") from error
    return Figure(value, text.kind, text.source, text.when)


def memory_figure(text: FigureText, where: str) -> Figure:
    """A capacity in bytes from its text."""
    return _figure(text, "B", where)


def read_folder(folder: str, model: type[_File]) -> Mapping[str, _File]:
    """Every name and alias in a folder of the catalogue, in one spelling, to its file."""
    found: dict[str, _File] = {}
    for path in sorted((CATALOG / folder).glob("*.toml")):
        file = read_file(path, model)
        for name in (file.name, *file.aliases):
            owner = found.setdefault(spelling(name), file)
            if owner is not file:
                raise HardwareError(f"{path}: {name!r} also names {owner.name}")
    return MappingProxyType(found)


def spelling(name: str) -> str:
    """One spelling for "H100 SXM", "h100_sxm" and "h100-sxm"."""
    return name.strip().lower().replace(" ", "-").replace("_", "-")


def unknown(kind: str, name: str, known: Iterable[str]) -> HardwareError:
    """The error for a name that the catalogue does not have, with the close ones."""
    names = sorted(set(known))
    close = difflib.get_close_matches(spelling(name), names, n=4, cutoff=0.5)
    hint = f"close: {', '.join(close)}" if close else f"{len(names)} names are known"
    shown = name if len(name) <= 80 else name[:77] + "..."
    listed = "hwmodels/catalog/links has" if kind == "link" else "`moesim catalog systems` lists"
    return HardwareError(f"{kind} {shown!r} is not in the catalogue; {hint} ({listed} all)")
