"""KTransformers' SGLang fork: the counts from which it picks the experts of the GPU.

With `--kt-expert-placement-strategy frequency` the fork sums the counts of a .pt file over their
first axis and puts the largest, over all layers together, on the GPU. Counts of one on the plan's
experts and a ratio that comes to exactly their number make it choose them and no others; layers
may differ in number. The rows are all decoder layers; rows of dense ones must be zero, or they
take the place of experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.export.projection import (
    Experts,
    experts,
    loss_of,
    need_attention_on_device,
    need_host_room,
    refuse_kinds,
    with_slots_filled,
)
from planners.export.record import Export, filled_note, plan_notes, sidecar_of, write_sidecar
from planners.export.torch_file import write_tensor
from planners.residency_file import ResidencyFile

IntArray = npt.NDArray[np.int32]
ENGINE = "KTransformers"


def logical_count(plan: ResidencyFile, held: Experts) -> IntArray:
    """int32[1, n_layers, n_experts]: one on every expert that the plan pins on the device."""
    table = np.zeros((1, len(plan.layers), plan.n_experts), dtype=np.int32)
    table[0, list(plan.moe_layers)] = held.on_device
    return table


def gpu_experts_ratio(n_pinned: int, n_moe_layers: int, n_experts: int) -> float:
    """The ratio from which the fork's int(ratio * experts of all MoE layers) gives n_pinned."""
    total = n_moe_layers * n_experts
    return min(1.0, (n_pinned + 0.5) / total)


def layer_rule(plan: ResidencyFile) -> tuple[int, int]:
    """(first, step) such that MoE layers are those from `first` on that `step` divides.

    The fork knows MoE layers by this rule only (first_k_dense_replace and moe_layer_freq of the
    model's config.json), and counts the experts of the ratio with it.

    raises  PlanError when the plan's MoE layers follow no such rule
    """
    layers, n_layers = plan.moe_layers, len(plan.layers)
    for step in range(1, n_layers + 1):
        if layers == tuple(i for i in range(layers[0], n_layers) if i % step == 0):
            return layers[0], step
    raise PlanError(
        f"moe_layers {_shown(layers)} of {n_layers}: KTransformers finds MoE layers by"
        " first_k_dense_replace and moe_layer_freq, expected all multiples of one step from a"
        " first layer on"
    )


def check_counts(
    table: IntArray, ratio: float, moe_layers: tuple[int, ...], shape: tuple[int, int]
) -> None:
    """Refuse counts that the fork would take and then place other experts by, or fail on.

    shape   (n_layers, n_experts)
    raises  PlanError for a wrong shape or dtype, counts on dense layers, values other than 0 and
            1, or a ratio that does not come to the number of ones
    """
    if table.ndim != 3 or table.shape[1:] != shape:
        raise PlanError(f"logical_count has shape {table.shape}, expected (steps, {shape})")
    if table.dtype != np.int32:
        raise PlanError(f"logical_count is {table.dtype}, expected int32")
    summed = table.sum(axis=0)
    if summed.min() < 0 or summed.max() > 1:
        raise PlanError(
            f"logical_count sums to {summed.min()}..{summed.max()}, expected 0 and 1 only: other"
            " values rank experts against each other"
        )
    dense = sorted(set(range(shape[0])) - set(moe_layers))
    if summed[dense].any():
        raise PlanError(f"logical_count is not zero on dense layers {_shown(tuple(dense))}")
    picked, wanted = int(len(moe_layers) * shape[1] * ratio), int(summed.sum())
    if picked != wanted:
        raise PlanError(f"ratio {ratio!r} picks {picked} experts, expected the plan's {wanted}")


def write(plan: ResidencyFile, file: Path) -> Export:
    """Write the counts and a sidecar.

    raises  PlanError when the file does not end in .pt (the fork reads no other, and would then
            place experts evenly), or the plan has no form in KTransformers
    """
    if file.suffix != ".pt":
        raise PlanError(f"{file}: KTransformers reads counts by their ending; expected .pt")
    planned, plan = plan, with_slots_filled(plan)
    held = experts(plan)
    refuse_kinds(plan, held, ENGINE, "pim")
    need_attention_on_device(plan, ENGINE)
    need_host_room(plan, held, int(held.n_bytes[~held.on_device].sum()), "experts of the CPU")
    table, rule = logical_count(plan, held), layer_rule(plan)
    ratio = gpu_experts_ratio(int(table.sum()), len(plan.moe_layers), plan.n_experts)
    check_counts(table, ratio, plan.moe_layers, (len(plan.layers), plan.n_experts))
    export = Export(
        file=file,
        sidecar=sidecar_of(file),
        program="python -m sglang.launch_server --model-path MODEL",
        flags=launch_flags(file, ratio),
        loss=loss_of(plan, held, held.on_device),
        notes=(*_notes(rule), *plan_notes(planned), *filled_note(planned)),
    )
    write_tensor(file, "logical_count", table)
    write_sidecar(planned, export)
    return export


def launch_flags(file: Path, ratio: float) -> tuple[str, ...]:
    """Flags of the fork's `python -m sglang.launch_server`, beside the model's own."""
    return (
        *("--kt-expert-placement-strategy", "frequency"),
        *("--init-expert-location", str(file)),
        *("--kt-gpu-experts-ratio", repr(ratio)),
    )


def _notes(rule: tuple[int, int]) -> tuple[str, ...]:
    notes = [
        "add --kt-weight-path and --kt-method of your CPU weights: without the path the counts"
        " are taken for EPLB; leave --kt-enable-dynamic-expert-update off, it moves the experts"
    ]
    if rule != (0, 1):
        notes.append(
            f"the model's config.json must say first_k_dense_replace={rule[0]} and"
            f" moe_layer_freq={rule[1]}, or the fork counts other MoE layers"
        )
    return tuple(notes)


def _shown(layers: tuple[int, ...]) -> str:
    text = ", ".join(map(str, layers[:8]))
    return f"[{text}, ...]" if len(layers) > 8 else f"[{text}]"
