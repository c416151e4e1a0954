"""Hugging Face: the device_map of `from_pretrained`, modules to a device, "cpu" or "disk".

Where the model keeps its experts as modules, each goes where the plan puts it; where they are
fused (most families since transformers 5), the layer's experts are one module and the plan is
projected onto whole layers. What is not on the device is copied there whenever it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from planners.errors import PlanError
from planners.export.hf_modules import Shape, Tensor, sort_tensors
from planners.export.projection import (
    Experts,
    IntArray,
    experts,
    layer_loss,
    loss_of,
    only_device,
    refuse_kinds,
    whole_layers,
    with_slots_filled,
)
from planners.export.record import Export, filled_note, plan_notes, sidecar_of, write_sidecar
from planners.residency_file import ResidencyFile
from traces.files import write_text

ENGINE = "device_map"
Place = int | str
DeviceMap = dict[str, Place]
Granularity = Literal["expert", "layer"]
_PLACE: Mapping[str, Place] = {"device": 0, "host": "cpu", "disk": "disk"}


@dataclass(frozen=True, slots=True)
class MapExport(Export):
    """What was written, and whether single experts or whole layers could be placed."""

    granularity: Granularity


def granularity_of(plan: ResidencyFile, tensors: list[Tensor]) -> Granularity:
    """ "expert" when every MoE layer keeps its experts as modules of their own, else "layer".

    raises  PlanError when the model's layers and experts are not those of the plan
    """
    single: dict[int, set[int]] = {t.layer: set() for t in tensors if t.layer is not None}
    fused = {tensor.layer for tensor in tensors if tensor.layer is not None and tensor.fused}
    for tensor in tensors:
        if tensor.layer is not None and tensor.expert is not None:
            single[tensor.layer].add(tensor.expert)
    if set(single) != set(range(len(plan.layers))):
        raise PlanError(f"the model has {len(single)} layers, the plan {len(plan.layers)}")
    moe = fused | {layer for layer, found in single.items() if found}
    if moe != set(plan.moe_layers):
        odd = min(moe ^ set(plan.moe_layers))
        raise PlanError(f"layer {odd} is MoE in only one of model and plan")
    stacked = {t.shape[0] for t in tensors if t.fused and len(t.shape) == 3}
    counts = stacked | {len(single[layer]) for layer in moe - fused}
    if counts - {plan.n_experts}:
        raise PlanError(
            f"the model has {min(counts - {plan.n_experts})} experts in a layer, the plan"
            f" {plan.n_experts}"
        )
    return "layer" if fused else "expert"


def device_map(plan: ResidencyFile, tensors: list[Tensor], tier: IntArray) -> DeviceMap:
    """Places of the largest modules that lie in one tier whole; no entry inside another.

    tier    int64[moe_layers, n_experts], for fused experts with equal rows
    raises  PlanError when a module with tensors of its own would lie in two tiers
    """
    row = {layer: index for index, layer in enumerate(plan.moe_layers)}
    places: DeviceMap = {}
    for tensor in tensors:
        if tensor.layer is None:
            place = 0
        elif tensor.expert is not None or tensor.fused:
            place = int(tier[row[tensor.layer], tensor.expert or 0])
        else:
            place = plan.layers[tensor.layer].attention_tier
        kind = "device" if tensor.layer is None else plan.tiers[place].kind
        places[tensor.name] = _PLACE[kind]
    return _modules(places)


def check_map(places: DeviceMap, names: Iterable[str]) -> None:
    """Refuse a map that leaves a tensor out, puts one in two places, or names what is not there.

    A module inside another entry would first be moved to the outer one's device.

    raises  PlanError naming the tensor or the entry
    """
    names = list(names)
    covered = {name: [key for key in _ancestors(name) if key in places] for name in names}
    for name, keys in covered.items():
        if len(keys) != 1:
            raise PlanError(f"tensor {name} is under {len(keys)} entries {keys}, expected one")
    idle = set(places) - {key for keys in covered.values() for key in keys}
    if idle:
        raise PlanError(f"entry {min(idle)!r} names no module of the model")
    strange = {str(value) for value in places.values()} - {str(value) for value in _PLACE.values()}
    if strange:
        raise PlanError(f"place {min(strange)!r}, expected 0, 'cpu' or 'disk'")


def write(
    plan: ResidencyFile, file: Path, shapes: Mapping[str, Shape], offload_folder: str = "offload"
) -> MapExport:
    """Write the map and a sidecar.

    shapes          name and shape of the model's tensors, from `hf_modules.tensor_shapes`
    offload_folder  where accelerate keeps what is on "disk"
    raises          PlanError when model and plan differ, for several device tiers or PIM, and
                    when whole layers fit no tier
    """
    planned, plan = plan, with_slots_filled(plan)
    held = experts(plan)
    only_device(plan, ENGINE)
    refuse_kinds(plan, held, ENGINE, "pim")
    tensors = sort_tensors(shapes, plan.n_experts)
    granularity = granularity_of(plan, tensors)
    tier = held.tier
    loss = loss_of(plan, held, held.on_device)
    if granularity == "layer":
        by_layer = whole_layers(plan, held)
        loss, tier = layer_loss(plan, held, by_layer), by_layer[:, None].repeat(plan.n_experts, 1)
    places = device_map(plan, tensors, tier)
    check_map(places, shapes)
    export = MapExport(
        file=file,
        sidecar=sidecar_of(file),
        program=_program(file, places, offload_folder),
        flags=(),
        loss=loss,
        notes=(*_notes(plan, held, tier, granularity), *plan_notes(planned), *filled_note(planned)),
        granularity=granularity,
    )
    write_text(file, json.dumps(places, indent=1) + "\n")
    write_sidecar(planned, export)
    return export


def _modules(places: DeviceMap) -> DeviceMap:
    """Tensors grouped into the outermost modules whose tensors share a place."""
    within: dict[str, set[Place]] = {}
    for name, place in places.items():
        for module in _ancestors(name)[1:]:
            within.setdefault(module, set()).add(place)
    grouped: DeviceMap = {}
    for name, place in places.items():
        whole = [module for module in _ancestors(name)[1:] if len(within[module]) == 1]
        if not whole:
            raise PlanError(f"module of tensor {name} lies in two tiers, and cannot be split")
        grouped[whole[-1]] = place
    return grouped


def _ancestors(name: str) -> list[str]:
    """The name and the modules around it, innermost first; the model itself is ""."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _program(file: Path, places: DeviceMap, offload_folder: str) -> str:
    disk = f", offload_folder={offload_folder!r}" if "disk" in places.values() else ""
    return f"from_pretrained(MODEL, device_map=json.load(open({str(file)!r})){disk})"


def _notes(
    plan: ResidencyFile, held: Experts, tier: IntArray, granularity: Granularity
) -> tuple[str, ...]:
    device = only_device(plan, ENGINE)
    away = int(held.n_bytes[tier != device].sum())
    if granularity == "layer":
        return (
            "the model fuses the experts of a layer: placed by whole layers",
            f"every forward pass copies {away} bytes of experts to the device",
        )
    return (
        "the model keeps experts as modules: each is placed on its own",
        f"{away} bytes of experts are off the device and copied there when one of them runs",
    )
