"""Injection rules send each layer's experts where the projection puts them, first match first."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from planners.errors import PlanError
from planners.export import ktransformers_yaml as kt
from planners.export.projection import experts, whole_layers
from planners.residency_file import ResidencyFile
from tests.planners.export_case import plan_of, plans

torch = pytest.importorskip("torch")
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# In the form of the files that come with KTransformers: a class rule, the MoE block, the experts.
MODEL_RULES = r"""
- match: {class: torch.nn.Linear, name: "^model\\.layers\\..*$"}
  replace: {class: ktransformers.operators.linear.KTransformersLinear, kwargs: {generate_device: "cuda"}}
- match: {name: "^model\\.layers\\.[01]\\.mlp\\.experts$"}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {prefill_device: "cuda:0", generate_device: "cpu", generate_op: KExpertsCPU, backend: AMXInt8}
  recursive: False
- match: {name: "^model\\.layers\\..*\\.mlp\\.experts$"}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs: {prefill_device: "cuda:1", generate_device: "cpu", generate_op: KExpertsCPU}
  recursive: False
- match: {name: "^model\\.layers\\..*\\."}
  replace: {class: default, kwargs: {generate_device: "cuda", prefill_device: "cuda"}}
"""  # noqa: E501


def injected(rules: list, model: torch.nn.Module) -> dict[str, dict]:
    """Module name to the kwargs it is injected with, walked as the engine walks the model."""
    found: dict[str, dict] = {}

    def walk(module: torch.nn.Module, name: str) -> None:
        recursive, kwargs = True, {"generate_device": "cuda:0", "prefill_device": "cuda:0"}
        for rule in rules:
            match = rule["match"]
            if "class" in match and not isinstance(module, torch.nn.Linear):
                continue
            if "name" in match and re.search(match["name"], name) is None:
                continue
            kwargs, recursive = rule["replace"].get("kwargs", {}), rule.get("recursive", True)
            break
        found[name] = kwargs
        if recursive:
            for child, inner in module.named_children():
                walk(inner, f"{name}.{child}" if name else child)

    walk(model, "")
    return found


def model_of(plan: ResidencyFile, block: str = "mlp") -> torch.nn.Module:
    """Modules with the names of a Hugging Face MoE model."""

    def layer(kind: str) -> torch.nn.Module:
        inner = torch.nn.Module()
        if kind == "moe":
            inner.experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(2))
        inner.gate = torch.nn.Linear(1, 1)
        return torch.nn.ModuleDict({block: inner, "self_attn": torch.nn.Linear(1, 1)})

    layers = torch.nn.ModuleList(layer(row.kind) for row in plan.layers)
    return torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
@given(plan=plans(most_tiers=2))
@QUICK
def test_every_layers_experts_run_where_the_projection_puts_them(
    plan: ResidencyFile, tmp_path: Path, block: str
) -> None:
    written = kt.write(plan, tmp_path / "rules.yaml")
    found = injected(yaml.safe_load(written.file.read_text()), model_of(plan, block))
    tier = whole_layers(plan, experts(plan))
    for layer, index in zip(plan.moe_layers, tier, strict=True):
        kwargs = found[f"model.layers.{layer}.{block}.experts"]
        assert kwargs["generate_device"] == ("cuda:0" if index == 0 else "cpu")
        assert f"model.layers.{layer}.{block}.experts.0" not in found
    others = {kwargs["generate_device"] for name, kwargs in found.items() if "expert" not in name}
    assert others == {"cuda:0"}


@given(plan=plans(most_tiers=2))
@QUICK
def test_in_front_of_a_models_own_rules_they_keep_its_rule_for_the_cpu(
    plan: ResidencyFile, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(MODEL_RULES)
    written = kt.write(plan, tmp_path / "rules.yaml", own)
    found = injected(yaml.safe_load(written.file.read_text()), model_of(plan))
    tier = whole_layers(plan, experts(plan))
    for layer, index in zip(plan.moe_layers, tier, strict=True):
        kwargs = found[f"model.layers.{layer}.mlp.experts"]
        device = "cuda:0" if layer < 2 else "cuda:1"
        assert kwargs["generate_device"] == (device if index == 0 else "cpu")
        assert kwargs["prefill_device"] == device
        assert (kwargs.get("backend") == "AMXInt8") == (index == 1 and layer < 2)
    assert found["model.layers.0.self_attn"] == {"generate_device": "cuda"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1", "expected a list"),
        ("- replace: {}", "rule 0: match must have"),
        ("- {match: {name: x}, replace: {}}\n- {match: {nam: y}, replace: {}}", "rule 1: match"),
        ("- match: {name: x}", "rule 0: replace is missing"),
        ("- {match: {name: '('}, replace: {}}", "rule 0: match.name"),
        ("- [", "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_bad_rule_file_is_refused_in_one_line_with_its_name(
    text: str, expected: str, tmp_path: Path
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(PlanError, match=expected) as caught:
        kt.write(plan_of(np.array([[0, 1]])), tmp_path / "rules.yaml", own)
    assert str(own) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rules.yaml").exists()


def test_rules_of_another_model_would_leave_the_experts_on_the_gpu_and_are_refused(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("- {match: {name: '^model.embed_tokens'}, replace: {class: default}}")
    plan = plan_of(np.array([[1, 1], [0, 0]]), dense=1)
    with pytest.raises(PlanError, match="experts of layer 1 on the default device, expected cpu"):
        kt.write(plan, tmp_path / "rules.yaml", own)


def test_layers_beyond_host_memory_are_refused(tmp_path: Path) -> None:
    plan = plan_of(np.array([[1, 1], [2, 2]]), spare=(0, 0, 0))
    with pytest.raises(PlanError, match="1 layers are beyond host memory"):
        kt.write(plan, tmp_path / "rules.yaml")
