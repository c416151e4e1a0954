"""SGLang's paged experts: K slots in every MoE layer, the rest paged from pinned host memory.

The engine takes one number. Which experts are resident follows from LRU at run time (it starts
with experts 0..K-1), so a plan of single experts becomes the largest K that its device has room
for. The host keeps a pinned copy of all experts, the resident ones too.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from planners.errors import PlanError
from planners.export.projection import (
    equal_slots,
    experts,
    need_attention_on_device,
    need_host_room,
    only_device,
    refuse_kinds,
    slots_loss,
)
from planners.export.record import Export, plan_notes, sidecar_of, write_sidecar
from planners.residency_file import ResidencyFile
from traces.files import write_text

ENGINE = "SGLang's paged experts"


def check_slots(slots: int, top_k: int, n_experts: int) -> None:
    """PlanError for a number of slots that the engine refuses at start, or silently lowers."""
    if not top_k <= slots <= n_experts:
        raise PlanError(f"K={slots} slots, expected top_k={top_k} to n_experts={n_experts}")


def launch_flags(slots: int) -> tuple[str, ...]:
    """Flags for `python -m sglang.launch_server`, beside the model's own.

    One GPU only; shared experts that are fused into the routed ones cannot be paged.
    """
    return (
        "--enable-paged-experts",
        *("--paged-experts-num-resident", str(slots)),
        *("--tp-size", "1"),
        "--disable-shared-experts-fusion",
    )


def write(plan: ResidencyFile, file: Path) -> Export:
    """Write the launch flags as a line of text (for `xargs -a FILE`), and a sidecar.

    raises  PlanError when the device has no room for top_k experts in every layer, the host none
            for all experts, or the plan needs more than one device, PIM, or attention elsewhere
    """
    held, device = experts(plan), only_device(plan, ENGINE)
    refuse_kinds(plan, held, ENGINE, "pim")
    need_attention_on_device(plan, ENGINE)
    need_host_room(plan, held, int(held.n_bytes.sum()), "the pinned copy of all experts")
    slots = equal_slots(plan, held, device)
    check_slots(slots, plan.top_k, plan.n_experts)
    export = Export(
        file=file,
        sidecar=sidecar_of(file),
        program="python -m sglang.launch_server --model-path MODEL",
        flags=launch_flags(slots),
        loss=slots_loss(plan, held, slots),
        notes=(*_notes(plan, slots), *plan_notes(plan, keeps_cache=True)),
    )
    write_text(file, shlex.join(export.flags) + "\n")
    write_sidecar(plan, export)
    return export


def _notes(plan: ResidencyFile, slots: int) -> tuple[str, ...]:
    notes = [
        f"K={slots} of {plan.n_experts} experts in each of {len(plan.moe_layers)} MoE layers;"
        f" decode graphs cover up to {slots // plan.top_k} requests, larger batches run without"
    ]
    if plan.cache.policy not in ("", "lru"):
        notes.append(f"the engine evicts by LRU, the plan's cache by {plan.cache.policy}")
    if plan.cache.on_miss != "load":
        notes.append(f"the engine loads what is missing, the plan's on_miss={plan.cache.on_miss}")
    if plan.cache.prefetch:
        notes.append(f"the plan's prefetch ({plan.cache.prefetch}) is not carried over")
    return tuple(notes)
