"""`moesim catalog`: the models, systems, devices and links that moesim knows, with sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli import output
from moesim.errors import SimulationError

if TYPE_CHECKING:
    from hwmodels.device import Device, Figure, Link
    from hwmodels.system import System
    from traces.model import ModelSpec

app = typer.Typer(no_args_is_help=True, help="What is known of models and hardware, with sources.")


@app.callback()
def catalog() -> None:
    """What is known of models and hardware, with sources."""


@app.command()
def models(
    name: Annotated[
        str, typer.Argument(help="Name, alias or path of a config.json; all models when left out.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Models by name, or one model with its whole shape and where that is known from."""
    from traces.models import load_model, model_names

    if name:
        document = _model(load_model(name), name)
        output.emit_json(document) if as_json else output.facts("", _flat(document))
        return
    documents = [_model(load_model(known), known) for known in model_names()]
    if as_json:
        output.emit_json(documents)
        return
    output.table(f"{len(documents)} models", _MODEL_COLUMNS, [_model_row(d) for d in documents])


@app.command()
def systems(
    name: Annotated[
        str, typer.Argument(help="System, <device>x<count>, device or link; all when left out.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write the roofline of the system's device here (PNG).")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Model whose experts are drawn below the roofline.")
    ] = "",
) -> None:
    """Systems, devices and links by name, or one of them with every figure and its source."""
    if plot is not None:
        _plot(name, model, plot)
    document = _named(name) if name else _everything()
    if as_json:
        output.emit_json(document)
    elif name:
        _show_one(document)
    else:
        _show_all(document)


_MODEL_COLUMNS = (
    "name", "layers", "MoE", "experts", "top-k", "hidden", "width", "shared", "total B",
    "active B", "known from",
)  # fmt: skip


def _model(spec: ModelSpec, name: str) -> dict[str, Any]:
    """Shape, counts that follow from it, and provenance; a config.json has no catalogue entry."""
    from traces.counting import active_params, expert_bytes, kv_bytes_per_token, total_params
    from traces.errors import TraceError
    from traces.models import catalog_entry

    entry: dict[str, Any]
    try:
        entry = output.plain(catalog_entry(name))
        entry["published"] = {
            "total_params": entry.pop("total_params"),
            "active_params": entry.pop("active_params"),
        }
    except TraceError:
        entry = {"status": "config", "source": name}
    shape: dict[str, Any] = output.plain(spec)
    return (
        shape
        | entry
        | {
            "name": spec.name,
            "total_params": total_params(spec),
            "active_params": active_params(spec),
            "expert_bytes_bf16": expert_bytes(spec, 16),
            "kv_bytes_per_token_bf16": kv_bytes_per_token(spec),
        }
    )


def _model_row(document: dict[str, Any]) -> tuple[object, ...]:
    return (
        document["name"],
        document["n_layers"],
        len(document["moe_layers"]),
        document["n_experts"],
        document["top_k"],
        document["hidden_size"],
        document["expert_intermediate_size"],
        document["shared_intermediate_size"] or None,
        document["total_params"] / 1e9,
        document["active_params"] / 1e9,
        document["status"],
    )


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested names joined by dots; runs of layer indices as a range."""
    flat: dict[str, object] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            flat[prefix + key] = _list_text(value)
        elif value != "":
            flat[prefix + key] = value
    return flat


def _list_text(values: list[Any]) -> str:
    if len(values) > 3 and all(isinstance(value, int) for value in values):
        steps = {b - a for a, b in zip(values, values[1:], strict=False)}
        if len(steps) == 1:
            every = f" in steps of {steps.pop()}" if steps != {1} else ""
            return f"{values[0]}..{values[-1]}{every} ({len(values)})"
    return ", ".join(str(value) for value in values) or "-"


def _named(name: str) -> dict[str, Any]:
    """A system (or a device as a system of one), else a link; the system's error when neither."""
    from hwmodels.devices import load_component
    from hwmodels.errors import HardwareError
    from hwmodels.systems import load_system

    try:
        return _system(load_system(name), name)
    except HardwareError:
        try:
            component = load_component(name)
        except HardwareError:
            component = None
        if component is None:
            raise
    return {"link": output.plain(component)}


def _system(system: System, name: str) -> dict[str, Any]:
    from hwmodels.systems import system_note

    host = None if system.host is None else _device(system.host)
    return {
        "name": system.name,
        "n_devices": system.n_devices,
        "devices_per_node": min(system.devices_per_node, system.n_devices),
        "n_nodes": system.n_nodes,
        "note": system_note(name),
        "scale_up": _link(system.scale_up),
        "scale_out": _link(system.scale_out),
        "device": _device(system.device),
        "host": host,
    }


def _link(link: Link) -> dict[str, Any]:
    """The link as used, and what the catalogue says of its kind."""
    from hwmodels.devices import load_component
    from hwmodels.errors import HardwareError

    try:
        figures = output.plain(load_component(link.name).figures)
    except HardwareError:
        figures = {}
    used: dict[str, Any] = output.plain(link)
    return used | {"figures": figures}


def _device(device: Device) -> dict[str, Any]:
    from hwmodels.devices import about_device
    from hwmodels.errors import HardwareError

    about: dict[str, Any]
    try:
        about = output.plain(about_device(device.name))
    except HardwareError:  # a host of several sockets has no entry of its own
        about = {}
    figures: dict[str, Any] = output.plain(device)
    return figures | about | {"fitted_operators": _has_fit(device.name)}


def _has_fit(device: str) -> bool:
    """Whether operators fitted on the device come with this installation."""
    from importlib.resources import files

    return files("hwmodels").joinpath("calibrations", f"{device}.npz").is_file()


def _everything() -> dict[str, Any]:
    from hwmodels.devices import device_names, link_names, load_component, load_device
    from hwmodels.systems import load_system, system_names

    return {
        "systems": [_system(load_system(name), name) for name in system_names()],
        "devices": [_device(load_device(name)) for name in device_names()],
        "links": [output.plain(load_component(name)) for name in link_names()],
    }


def _show_all(document: dict[str, Any]) -> None:
    output.table(
        f"{len(document['systems'])} systems; any <device>x<count> is one too (h800x32)",
        ("name", "device", "devices", "per node", "in a node", "between nodes"),
        [
            (
                system["name"],
                system["device"]["name"],
                system["n_devices"],
                system["devices_per_node"],
                _rate(system["scale_up"]),
                _rate(system["scale_out"]),
            )
            for system in document["systems"]
        ],
        left=2,
    )
    columns = ("name", "kind", "year", "memory", "bandwidth", "bf16 or fp16", "fp8", "power")
    output.table(
        f"{len(document['devices'])} devices", columns, map(_device_row, document["devices"])
    )
    output.table(
        f"{len(document['links'])} links, memories, drives and overheads",
        ("name", "kind", "per", "figures"),
        [
            (
                link["name"],
                link["kind"],
                link["per"],
                ", ".join(f"{key} {_with_unit(key, f)}" for key, f in link["figures"].items()),
            )
            for link in document["links"]
        ],
        left=4,
    )


def _device_row(device: dict[str, Any]) -> tuple[object, ...]:
    from hwmodels.units import format_quantity

    peaks = device["flop_per_s"]
    wide, narrow = peaks.get("bf16") or peaks.get("fp16"), peaks.get("fp8")
    return (
        device["name"],
        device["kind"],
        str(device.get("year", "")),
        _size(device["memory_bytes"]),
        format_quantity(device["memory_bytes_per_s"], "B/s"),
        None if wide is None else format_quantity(wide, "FLOP/s"),
        None if narrow is None else format_quantity(narrow, "FLOP/s"),
        format_quantity(device["tdp_w"], "W") if device["tdp_w"] else None,
    )


def _rate(link: dict[str, Any]) -> str:
    from hwmodels.units import format_quantity

    return f"{link['name']} {format_quantity(link['bytes_per_s'], 'B/s')}"


def _show_one(document: dict[str, Any]) -> None:
    if "link" in document:
        link = document["link"]
        output.facts(link["name"], _flat({k: v for k, v in link.items() if k != "figures"}))
        _show_figures(f"figures of {link['name']}", link["figures"])
        return
    heads = ("n_devices", "devices_per_node", "n_nodes", "note")
    output.facts(document["name"], _flat({key: document[key] for key in heads}))
    for part in ("device", "host"):
        if document[part] is not None:
            _show_device(part, document[part])
    for side in ("scale_up", "scale_out"):
        link = document[side]
        output.say(f"{side}: {_rate(link)}, latency {link['latency_s'] * 1e6:.3g} us")
        _show_figures(f"figures of {link['name']}", link["figures"])


def _show_device(part: str, device: dict[str, Any]) -> None:
    said = ("kind", "vendor", "year", "aliases", "confidence", "note", "devices_per_node",
            "fitted_operators")  # fmt: skip
    facts = {key: device[key] for key in said if key in device}
    if "year" in facts:
        facts["year"] = str(facts["year"])
    output.facts(f"{part} {device['name']}", _flat(facts))
    _show_figures(f"figures of {device['name']}", device["figures"] or {})


def _show_figures(title: str, figures: Mapping[str, dict[str, Any]]) -> None:
    rows = [
        (key, _with_unit(key, figure), figure["kind"], figure["source"], figure["when"])
        for key, figure in figures.items()
    ]
    if rows:
        output.table(title, ("figure", "value", "kind", "source", "when"), rows, left=5)


def _with_unit(key: str, figure: Mapping[str, Any] | Figure) -> str:
    """A figure of the catalogue with the unit of its key."""
    from hwmodels.units import format_quantity

    value = figure["value"] if isinstance(figure, Mapping) else figure.value
    group, _, last = key.partition(".")
    if group == "compute" or group == "compute_achieved":
        return format_quantity(value, "FLOP/s")
    if group == "capacity" or last in ("capacity", "usable", "on_chip"):
        return _size(value)
    units = {"power": "W", "price": "USD/h", "launch": "s", "latency": "s", "energy": "J/B"}
    return format_quantity(value, units.get(group, "B/s"))


def _size(n_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    power = next((p for p in (40, 30, 20, 10) if n_bytes >= 2**p), 0)
    unit = {40: "TiB", 30: "GiB", 20: "MiB", 10: "KiB", 0: "B"}[power]
    return f"{n_bytes / 2**power:,.4g} {unit}"


def _plot(name: str, model: str, path: Path) -> None:
    """The roofline of a system's device; with a model, its experts at growing batches."""
    from hwmodels.systems import load_system
    from moesim.cli.roofline_points import expert_points
    from moesim.report.roofline import Roofs, roofline
    from traces.models import load_model

    if not name:
        raise SimulationError("--plot needs the NAME of a system or device")
    output.check_target(path)
    device = load_system(name).device
    points = [expert_points(load_model(model), device)] if model else []
    roofs = Roofs(device.name, device.memory_bytes_per_s, device.flop_per_s)
    roofline(roofs, points, path)
    output.note(f"wrote {path}")
