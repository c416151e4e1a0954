"""MoE-Infinity: the JSON of its ArcherConfig.

The engine takes a share of the device's memory and decides itself which experts are there, from
activations it has seen; a plan of single experts becomes that share, and the loss says what the
best choice of experts in the same room would serve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planners.errors import PlanError
from planners.export.projection import (
    Experts,
    Loss,
    experts,
    loss_of,
    only_device,
    refuse_kinds,
    rooms,
)
from planners.export.record import Export, plan_notes, sidecar_of, write_sidecar
from planners.residency_file import ResidencyFile
from traces.files import write_text

ENGINE = "MoE-Infinity"
# Every key of its ArcherConfig with its type; any other is refused by its parser.
KEYS: Mapping[str, type] = {
    "offload_path": str,
    "trace_capacity": int,
    "trace_path": str,
    "prefetch": bool,
    "device_memory_ratio": float,
    "num_threads": int,
    "host_memory_ratio": float,
}
_NATIVE_KV_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Machine:
    """What the engine takes its ratios of, and where it keeps the weights.

    device_bytes, host_bytes  whole memory of the device and the host; host_bytes 0 leaves the
                              engine's own share (0.9)
    offload_path              folder of the engine's copy of the weights, one per model
    """

    device_bytes: int
    offload_path: str
    host_bytes: int = 0


def config_of(plan: ResidencyFile, held: Experts, machine: Machine) -> dict[str, object]:
    """The config: the plan's device tier without its KV share, as a share of the device."""
    device = only_device(plan, ENGINE)
    config: dict[str, object] = {
        "offload_path": machine.offload_path,
        "device_memory_ratio": _ratio(
            "device", plan.tiers[device].capacity_bytes - plan.kv_bytes, machine.device_bytes
        ),
        "prefetch": bool(plan.cache.prefetch),
    }
    if machine.host_bytes:
        host = sum(entry.capacity_bytes for entry in plan.tiers if entry.kind == "host")
        config["host_memory_ratio"] = _ratio("host", host, machine.host_bytes)
    return config


def check_config(config: Mapping[str, object]) -> None:
    """Refuse a config that the engine's parser stops at, or takes and then runs badly.

    raises  PlanError for an unknown key, a wrong type, a ratio outside (0, 1], or no offload_path
    """
    for key, value in config.items():
        if key not in KEYS:
            raise PlanError(f"key {key!r} is unknown to {ENGINE}, known: {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]) or (KEYS[key] is int and isinstance(value, bool)):
            raise PlanError(f"{key} is {value!r}, expected {KEYS[key].__name__}")
        if key.endswith("_ratio") and isinstance(value, float) and not 0 < value <= 1:
            raise PlanError(f"{key} is {value}, expected a share in (0, 1]")
    if not config.get("offload_path"):
        raise PlanError("offload_path is missing: the engine keeps its copy of the weights there")


def write(plan: ResidencyFile, file: Path, machine: Machine) -> Export:
    """Write the config and a sidecar.

    raises  PlanError for more than one device tier, PIM, or a config that `check_config` refuses
    """
    held = experts(plan)
    refuse_kinds(plan, held, ENGINE, "pim")
    config = config_of(plan, held, machine)
    check_config(config)
    export = Export(
        file=file,
        sidecar=sidecar_of(file),
        program=f"moe_infinity.MoE(MODEL, {str(file)!r})",
        flags=(),
        loss=_loss(plan, held),
        notes=(*_notes(config), *plan_notes(plan)),
    )
    write_text(file, json.dumps(config, indent=1) + "\n")
    write_sidecar(plan, export)
    return export


def _ratio(name: str, wanted: int, memory: int) -> float:
    """wanted / memory, rounded down to 6 digits; PlanError when it is not in (0, 1]."""
    if not 0 < wanted <= memory:
        raise PlanError(
            f"{name} memory: the plan gives weights {wanted} bytes, the whole {name} has {memory};"
            " expected a share in (0, 1]"
        )
    return wanted * 10**6 // memory / 10**6


def _loss(plan: ResidencyFile, held: Experts) -> Loss:
    """Bounds only: the engine's own cache decides what is resident."""
    room = int(rooms(plan, held)[only_device(plan, ENGINE)])
    pinned = loss_of(plan, held, held.on_device)
    best = np.argsort(-held.share / held.n_bytes, axis=None, kind="stable")
    taken = np.cumsum(held.n_bytes.ravel()[best])
    count = int(np.searchsorted(taken, room, side="right"))
    # The first expert that does not fit, taken in part, makes this a bound on every choice.
    part = (room - (taken[count - 1] if count else 0)) / held.n_bytes.ravel()[best[count:]][:1]
    share = held.share.ravel()[best]
    most = share[:count].sum() + (part * share[count : count + 1]).sum()
    return Loss(
        plan_device_share=pinned.plan_device_share,
        device_share=None,
        device_share_kind="the engine's cache decides at run time",
        device_share_at_most=min(1.0, float(most) / len(held.share)),
        plan_device_bytes=pinned.plan_device_bytes,
        device_bytes=int(taken[count - 1]) if count else 0,
        plan_cache_bytes=pinned.plan_cache_bytes,
        layers_without_load=held.unknown,
    )


def _notes(config: Mapping[str, object]) -> tuple[str, ...]:
    notes = ["the engine chooses the resident experts from its own trace, not from the plan"]
    ratio = config["device_memory_ratio"]
    if isinstance(ratio, float) and ratio > 1 - _NATIVE_KV_SHARE:
        notes.append(
            f"versions with the native engine keep {_NATIVE_KV_SHARE:g} of the device for KV blocks"
            f" and lower device_memory_ratio={ratio:g} to {1 - _NATIVE_KV_SHARE:g}"
        )
    return tuple(notes)
