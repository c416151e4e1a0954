"""What an exporter hands back, and the sidecar that says where a file comes from.

An engine's own file often takes no other key, so its provenance lies beside it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from planners.export.projection import Loss
from planners.residency_file import ResidencyFile
from traces.files import write_text


@dataclass(frozen=True, slots=True)
class Export:
    """An engine's file as written.

    program  what to start, in front of the flags; "" where the file is not used by flags
    flags    to launch with, beside the model's own
    loss     the plan beside what the engine makes of it
    notes    what the file cannot say: what the plan loses, what the user must set
    """

    file: Path
    sidecar: Path
    program: str
    flags: tuple[str, ...]
    loss: Loss
    notes: tuple[str, ...]

    @property
    def launch(self) -> str:
        """The line to launch with."""
        return f"{self.program} {shlex.join(self.flags)}".strip()


def sidecar_of(file: Path) -> Path:
    """Where the provenance of a file goes."""
    return file.with_suffix(".provenance.json")


def write_sidecar(plan: ResidencyFile, export: Export) -> None:
    """Write the inputs, figures and loss behind a file."""
    provenance = {
        "model": plan.model,
        "launch": export.launch,
        "loss": asdict(export.loss) | {"lost_share": export.loss.lost_share},
        "notes": export.notes,
        "inputs": plan.inputs,
        "verdict": plan.verdict,
        "figures": plan.figures,
        "versions": plan.versions,
    }
    write_text(export.sidecar, json.dumps(provenance, indent=1) + "\n")


def plan_notes(plan: ResidencyFile, *, keeps_cache: bool = False) -> tuple[str, ...]:
    """What no engine's residency file carries over: mixed bits, and the plan's own cache."""
    bits = sorted({bits for layer in plan.layers for bits in layer.expert_bits})
    notes = []
    if len(bits) > 1:
        shown = ", ".join(f"{value:g}" for value in bits)
        notes.append(f"the plan mixes {shown} bits; the engine serves the checkpoint it is given")
    if plan.cache.policy:
        carried = "" if keeps_cache else " is not carried over"
        notes.append(
            f"the plan's cache ({plan.cache.policy}, {sum(plan.cache.slots)} slots){carried}: the"
            " planned share counts pinned experts only"
        )
    return tuple(notes)


def filled_note(plan: ResidencyFile) -> tuple[str, ...]:
    """What became of a cache's slots for an engine that places experts for good."""
    n_slots = sum(plan.cache.slots)
    return (f"{n_slots} slots of the cache hold the most used experts for good",) if n_slots else ()
