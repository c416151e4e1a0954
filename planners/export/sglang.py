"""SGLang: the file of `--init-expert-location` and the flags that go with it.

The file holds one key, `physical_to_logical_map`, with a row for every decoder layer of the model
(dense ones too) and slots rank-major. Any other key makes SGLang's loader fail, so provenance goes
into a sidecar. The loader checks neither the number of rows nor their width; this writer does.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.planfile import PlanFile
from traces.files import write_text

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SglangExport:
    """What was written: the map file, its sidecar and the launch flags."""

    map_file: Path
    sidecar: Path
    flags: tuple[str, ...]


def physical_to_logical_map(plan: PlanFile) -> IntArray:
    """int32[n_layers, n_slots]: rows of MoE layers from the plan, identity rows for dense ones."""
    identity = np.arange(plan.n_slots, dtype=np.int32) % plan.n_experts
    rows = [np.array(layer.slots, dtype=np.int32) for layer in plan.layers]
    table = np.stack([row if len(row) else identity for row in rows])
    check_map(table, plan.n_experts, plan.expert_parallel_size, len(plan.layers))
    return table


def check_map(table: IntArray, n_experts: int, ep_size: int, n_layers: int) -> None:
    """Refuse a map that SGLang would take and then serve wrongly, or fail on later.

    An expert twice on a rank is allowed: SGLang serves it rightly.
    raises  PlanError for wrong rows or width, ids out of range, or an expert without a slot
    """
    if table.ndim != 2 or table.shape[0] != n_layers:
        raise PlanError(f"map has shape {table.shape}, expected {n_layers} rows, one per layer")
    if table.shape[1] % ep_size or table.shape[1] < n_experts:
        raise PlanError(
            f"map has {table.shape[1]} slots, expected a multiple of ep_size={ep_size} and at"
            f" least {n_experts}"
        )
    if table.min() < 0 or table.max() >= n_experts:
        raise PlanError(f"map holds ids {table.min()}..{table.max()}, expected 0..{n_experts - 1}")
    for layer, row in enumerate(table):
        missing = n_experts - len(np.unique(row))
        if missing:
            raise PlanError(f"layer {layer} has no slot for {missing} of {n_experts} experts")


def launch_flags(plan: PlanFile, map_file: Path, all_to_all: str = "deepep") -> tuple[str, ...]:
    """Flags for `python -m sglang.launch_server`, beside the model's own."""
    redundant = plan.n_slots - plan.n_experts
    dispatch = ("--ep-dispatch-algorithm", "static") if all_to_all != "none" else ()
    return (
        *("--ep-size", str(plan.expert_parallel_size)),
        *("--ep-num-redundant-experts", str(redundant)),
        *("--init-expert-location", str(map_file)),
        *("--moe-a2a-backend", all_to_all),
        *dispatch,
    )


def write(plan: PlanFile, map_file: Path, all_to_all: str = "deepep") -> SglangExport:
    """Write the map file and a sidecar with its provenance and launch flags.

    raises  PlanError when map_file does not end in .json, or the plan does not pass `check_map`
    """
    if map_file.suffix != ".json":
        raise PlanError(f"{map_file}: SGLang reads a plan by its ending; expected .json")
    table = physical_to_logical_map(plan)
    flags = launch_flags(plan, map_file, all_to_all)
    sidecar = map_file.with_suffix(".provenance.json")
    provenance = {
        "model": plan.model,
        "command": shlex.join(("python", "-m", "sglang.launch_server", *flags)),
        "inputs": plan.inputs,
        "verdict": plan.verdict,
        "figures": plan.figures,
        "versions": plan.versions,
    }
    write_text(map_file, json.dumps({"physical_to_logical_map": table.tolist()}) + "\n")
    write_text(sidecar, json.dumps(provenance, indent=1) + "\n")
    return SglangExport(map_file, sidecar, flags)
