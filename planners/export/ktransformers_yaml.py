"""KTransformers' older injection rules (YAML): the experts of a layer on the GPU or on the CPU.

A rule's regex is searched in a module's name, and the first rule that matches wins. The engine
takes `...mlp.experts` of a layer whole, so a plan of single experts is projected onto layers.
A model needs further rules (attention, gate, MoE block) that come with KTransformers; given such
a file, the rules here are put in front of it, and its own rule for experts is kept for the CPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from planners.errors import PlanError
from planners.export.projection import (
    experts,
    layer_loss,
    need_attention_on_device,
    only_device,
    refuse_kinds,
    whole_layers,
)
from planners.export.record import Export, plan_notes, sidecar_of, write_sidecar
from planners.residency_file import ResidencyFile
from traces.files import write_text

ENGINE = "KTransformers"
BLOCKS = ("mlp", "block_sparse_moe")
_MOST_BYTES = 1 << 20
_CLASS = "ktransformers.operators.experts.KTransformersExperts"
_DEVICE = "cuda:0"
_HEAD = "# Experts of single layers; the first rule that matches wins, so these come first.\n"

Rule = dict[str, Any]


def expert_rule(layers: list[int], on_device: bool, device: str = _DEVICE) -> Rule:
    """The rule for the experts of these layers, computed on the device or on the CPU."""
    kwargs = {"prefill_device": device, "prefill_op": "KExpertsTorch"}
    if on_device:
        kwargs |= {"generate_device": device, "generate_op": "KExpertsMarlin"}
    else:
        kwargs |= {"generate_device": "cpu", "generate_op": "KExpertsCPU", "out_device": device}
    numbers, blocks = "|".join(map(str, layers)), "|".join(BLOCKS)
    return {
        "match": {"name": rf"^model\.layers\.({numbers})\.({blocks})\.experts$"},
        "replace": {"class": _CLASS, "kwargs": kwargs},
        "recursive": False,
    }


def first_match(rules: list[Rule], name: str) -> Rule | None:
    """The rule the engine applies to a module of this name that is no instance of a named class."""
    for rule in rules:
        match = rule["match"]
        if "class" not in match and re.search(match["name"], name):
            return rule
    return None


def read_rules(path: Path) -> list[Rule]:
    """The rules of a model's own file.

    raises  PlanError naming the file and the first rule without match, name or class, or replace
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise PlanError(f"{path}: {path.stat().st_size} bytes, expected at most {_MOST_BYTES}")
        rules = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        check_rules(rules)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    return list(rules)


def check_rules(rules: Any) -> None:
    """PlanError for the first entry that the engine fails on: no match, no replace, a bad regex."""
    if not isinstance(rules, list) or not rules:
        raise PlanError("expected a list of rules")
    for index, rule in enumerate(rules):
        match = rule.get("match") if isinstance(rule, dict) else None
        if not isinstance(match, dict) or not {"name", "class"} & set(match):
            raise PlanError(f"rule {index}: match must have a class or a name")
        if not isinstance(rule.get("replace"), dict):
            raise PlanError(f"rule {index}: replace is missing")
        try:
            re.compile(str(match.get("name", "")))
        except re.error as error:
            raise PlanError(f"rule {index}: match.name: {error}") from error


def rules_of(on_device: dict[int, bool], model_rules: list[Rule]) -> list[Rule]:
    """Rules in front of the model's own; without any, one for the CPU layers too.

    on_device  for every MoE layer, whether its experts are on the device
    """
    by_device: dict[str, list[int]] = {}
    for layer in [layer for layer, here in on_device.items() if here]:
        by_device.setdefault(_device_of(model_rules, layer), []).append(layer)
    rules = [expert_rule(layers, True, device) for device, layers in by_device.items()]
    on_cpu = [layer for layer, here in on_device.items() if not here]
    if on_cpu and not model_rules:
        rules.append(expert_rule(on_cpu, False))
    return [*rules, *model_rules]


def check_experts(rules: list[Rule], on_device: dict[int, bool]) -> None:
    """PlanError for the first MoE layer whose experts the rules compute in the wrong place."""
    for layer, here in on_device.items():
        rule = _experts_rule(rules, layer)
        found = str(_kwargs(rule).get("generate_device", "the default device"))
        if (found == "cpu") == here:
            wanted = "a device" if here else "cpu"
            raise PlanError(f"rules put the experts of layer {layer} on {found}, expected {wanted}")


def write(plan: ResidencyFile, file: Path, model_rules: Path | None = None) -> Export:
    """Write the rules and a sidecar.

    model_rules  the model's own rule file (ktransformers/optimize/optimize_rules/), put behind
    raises       PlanError for a bad rule file, more than one device tier, PIM, or layers without
                 room in host memory
    """
    held = experts(plan)
    only_device(plan, ENGINE)
    refuse_kinds(plan, held, ENGINE, "pim")
    need_attention_on_device(plan, ENGINE)
    tier = whole_layers(plan, held)
    kinds = [plan.tiers[index].kind for index in tier]
    if "disk" in kinds:
        raise PlanError(
            f"{kinds.count('disk')} layers are beyond host memory, and {ENGINE} reads experts of"
            " the CPU from there only"
        )
    on_device = dict(zip(plan.moe_layers, [kind == "device" for kind in kinds], strict=True))
    rules = rules_of(on_device, read_rules(model_rules) if model_rules else [])
    check_rules(rules)
    check_experts(rules, on_device)
    export = Export(
        file=file,
        sidecar=sidecar_of(file),
        program="python -m ktransformers.local_chat --model_path MODEL --gguf_path GGUF",
        flags=("--optimize_config_path", str(file)),
        loss=layer_loss(plan, held, tier),
        notes=(*_notes(on_device, model_rules), *plan_notes(plan)),
    )
    write_text(file, _HEAD + yaml.safe_dump(rules, sort_keys=False))
    write_sidecar(plan, export)
    return export


def _experts_rule(rules: list[Rule], layer: int) -> Rule | None:
    """The rule that decides a layer's experts, whatever the model calls its MoE block."""
    names = [f"model.layers.{layer}.{block}.experts" for block in BLOCKS]
    found = [first_match(rules, name) for name in names]
    return next((rule for rule in found if rule and "experts" in rule["match"]["name"]), None)


def _kwargs(rule: Rule | None) -> dict[str, Any]:
    kwargs = rule["replace"].get("kwargs") if rule else None
    return kwargs if isinstance(kwargs, dict) else {}


def _device_of(rules: list[Rule], layer: int) -> str:
    """The device on which the model's own rules prefill a layer's experts."""
    return str(_kwargs(_experts_rule(rules, layer)).get("prefill_device", _DEVICE))


def _notes(on_device: dict[int, bool], model_rules: Path | None) -> tuple[str, ...]:
    count = sum(on_device.values())
    notes = [f"the experts of {count} of {len(on_device)} MoE layers are on the device"]
    if count:
        notes.append("experts on the GPU exclude CUDA graphs in this engine")
    if model_rules is None:
        notes.append(
            "these rules are for experts only: put them in front of the model's own, or give"
            " that file with --rules"
        )
    return tuple(notes)
