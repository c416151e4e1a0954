"""llama.cpp and ik_llama.cpp: which layers' experts stay in CPU memory.

The experts of a layer are one tensor per projection (`blk.N.ffn_{gate,up,down}_exps.weight`, N
counts all decoder layers), so a plan of single experts is projected onto whole layers.
`--n-cpu-moe N` covers the first N layers, dense ones counted; where the projection is another set,
`-ot REGEX=BUFFER` says it. Rules are tried in order, the first whose regex (ECMAScript, searched
in the tensor's name) matches wins; the engine splits the argument at commas, so none may occur.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planners.errors import PlanError
from planners.export.projection import (
    IntArray,
    experts,
    layer_loss,
    only_device,
    refuse_kinds,
    whole_layers,
)
from planners.export.record import Export, plan_notes, sidecar_of, write_sidecar
from planners.residency_file import ResidencyFile
from traces.files import write_text

ENGINE = "llama.cpp"
HOST = "CPU"
# Every form a layer's expert tensors go by; the same words as the engine's own --n-cpu-moe.
PROJECTIONS = ("up", "down", "gate", "gate_up")
_EXPERTS = r"ffn_(up|down|gate|gate_up)_(ch|)exps"
# What Python's re and std::regex's ECMAScript read alike, and no comma or equals sign.
_PLAIN_REGEX = re.compile(r"[\w.\\|()]+")


@dataclass(frozen=True, slots=True)
class Rule:
    """One override: tensors whose name the pattern is found in go to the buffer."""

    pattern: str
    buffer: str

    @property
    def argument(self) -> str:
        """The value of one -ot."""
        return f"{self.pattern}={self.buffer}"


@dataclass(frozen=True, slots=True)
class LlamaExport(Export):
    """What was written, and the overrides that say the same to any version.

    rules           first match wins
    override_flags  the -ot form; equal to flags unless they use --n-cpu-moe
    """

    rules: tuple[Rule, ...]
    override_flags: tuple[str, ...]


def rules_of(plan: ResidencyFile, tier: IntArray, device_buffer: str = "CUDA0") -> tuple[Rule, ...]:
    """Overrides for a tier per MoE layer; layers not named follow the device of -ngl.

    Layers whose attention is off the device get a rule for all their tensors, after the rules for
    their experts.
    """
    device = [entry.kind == "device" for entry in plan.tiers]
    on_cpu = {layer for layer, t in zip(plan.moe_layers, tier, strict=True) if not device[t]}
    away = {row.layer for row in plan.layers if not device[row.attention_tier]}
    kept = away & (set(plan.moe_layers) - on_cpu)
    wanted = (
        (on_cpu, rf"\.{_EXPERTS}", HOST),
        (kept, rf"\.{_EXPERTS}", device_buffer),
        (away, r"\.", HOST),
    )
    return tuple(
        Rule(rf"blk\.({'|'.join(map(str, sorted(layers)))}){rest}", buffer)
        for layers, rest, buffer in wanted
        if layers
    )


def n_cpu_moe(plan: ResidencyFile, tier: IntArray) -> int | None:
    """N of --n-cpu-moe, None when the projection is not "the experts of the first N layers"."""
    device = [entry.kind == "device" for entry in plan.tiers]
    if not all(device[row.attention_tier] for row in plan.layers):
        return None
    on_cpu = [not device[t] for t in tier]
    count = sum(on_cpu)
    if count == 0 or not all(on_cpu[:count]):
        return None
    return plan.moe_layers[count - 1] + 1


def buffer_of(name: str, rules: tuple[Rule, ...]) -> str | None:
    """Where the engine puts a tensor; None when it follows -ngl."""
    for rule in rules:
        if re.search(rule.pattern, name):
            return rule.buffer
    return None


def check_rules(
    plan: ResidencyFile, tier: IntArray, rules: tuple[Rule, ...], device_buffer: str = "CUDA0"
) -> None:
    """Refuse rules that the engine would misread, or that send a layer's experts elsewhere.

    raises  PlanError for a pattern with a comma, an equals sign or a form that is not in plain
            ECMAScript, and for the first expert tensor that lands off the tier of its layer
    """
    for rule in rules:
        if not _PLAIN_REGEX.fullmatch(rule.pattern) or not re.fullmatch(r"\w+", rule.buffer):
            raise PlanError(
                f"-ot {rule.argument!r}: expected a regex of letters, digits, _ . \\ | ( ) and"
                " a buffer's name: the engine splits at commas and equals signs"
            )
    device = [entry.kind == "device" for entry in plan.tiers]
    for layer, place in zip(plan.moe_layers, tier, strict=True):
        for projection in PROJECTIONS:
            name = f"blk.{layer}.ffn_{projection}_exps.weight"
            found = buffer_of(name, rules) or device_buffer
            wanted = device_buffer if device[place] else HOST
            if found != wanted:
                raise PlanError(f"{name} lands in {found}, expected {wanted}")


def write(plan: ResidencyFile, file: Path, device_buffer: str = "CUDA0") -> LlamaExport:
    """Write the flags as a line of text (for `xargs -a FILE`), and a sidecar.

    device_buffer  the engine's name of the device's buffers: CUDA0, Metal, Vulkan0, ...
    raises         PlanError for more than one device tier, PIM, or layers that fit no tier
    """
    held = experts(plan)
    only_device(plan, ENGINE)
    refuse_kinds(plan, held, ENGINE, "pim")
    tier = whole_layers(plan, held)
    rules = rules_of(plan, tier, device_buffer)
    check_rules(plan, tier, rules, device_buffer)
    first = n_cpu_moe(plan, tier)
    overrides = ("-ngl", "999", *(word for rule in rules for word in ("-ot", rule.argument)))
    export = LlamaExport(
        file=file,
        sidecar=sidecar_of(file),
        program="llama-server -m MODEL.gguf",
        flags=overrides if first is None else ("-ngl", "999", "--n-cpu-moe", str(first)),
        loss=layer_loss(plan, held, tier),
        notes=(*_notes(plan, tier), *plan_notes(plan)),
        rules=rules,
        override_flags=overrides,
    )
    write_text(file, shlex.join(export.flags) + "\n")
    write_sidecar(plan, export)
    return export


def _notes(plan: ResidencyFile, tier: IntArray) -> tuple[str, ...]:
    kinds = np.array([entry.kind for entry in plan.tiers])[tier]
    count = int((kinds == "device").sum())
    notes = [f"the experts of {count} of {len(tier)} MoE layers are on the device"]
    if (kinds == "disk").any():
        notes.append(
            f"{int((kinds == 'disk').sum())} layers are beyond host memory: the engine reads them"
            " from the file as it goes; do not give --no-mmap or --mlock"
        )
    if any(plan.tiers[row.attention_tier].kind != "device" for row in plan.layers):
        notes.append("overrides move weights only; the KV cache stays where -ngl puts it")
    return tuple(notes)
