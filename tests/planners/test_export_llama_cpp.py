"""llama.cpp's overrides send the experts of whole layers, and nothing else, to the CPU."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from planners.errors import PlanError
from planners.export import llama_cpp
from planners.export.llama_cpp import Rule
from planners.export.projection import experts, whole_layers
from planners.residency_file import ResidencyFile
from tests.planners.export_case import plan_of, plans, wheel
from traces.models import load_model

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PARTS = ("gate", "up", "down", "gate_up")
OTHER = ("attn_q.weight", "ffn_gate_inp.weight", "ffn_up_shexp.weight", "ffn_norm.weight")

# Architectures in the terms of llama.cpp's own Python package.
ARCHITECTURES = {
    "mixtral-8x7b": "LLAMA",
    "qwen3-30b-a3b": "QWEN3MOE",
    "qwen3-235b-a22b": "QWEN3MOE",
    "qwen1.5-moe-a2.7b": "QWEN2MOE",
    "qwen3-next-80b-a3b": "QWEN3NEXT",
    "deepseek-v3": "DEEPSEEK2",
    "deepseek-v2-lite": "DEEPSEEK2",
    "kimi-k2": "DEEPSEEK2",
    "gpt-oss-120b": "GPT_OSS",
    "olmoe-1b-7b": "OLMOE",
    "dbrx": "DBRX",
    "glm-4.5-air": "GLM4_MOE",
    "llama-4-maverick": "LLAMA4",
    "granite-3.0-3b-a800m": "GRANITE_MOE",
    "phi-3.5-moe": "PHIMOE",
    "minimax-m2": "MINIMAXM2",
    "ernie-4.5-300b-a47b": "ERNIE4_5_MOE",
    "jamba-v0.1": "JAMBA",
}


def overridden(flags: tuple[str, ...], name: str) -> str | None:
    """The buffer of a tensor as the engine reads the flags: split at ',', then at the first '='."""
    for flag, value in zip(flags, flags[1:], strict=False):
        if flag == "--n-cpu-moe":
            for layer in range(int(value)):
                if re.search(rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps", name):
                    return "CPU"
        if flag == "-ot":
            for entry in value.split(","):
                pattern, buffer = entry.split("=", 1)
                if re.search(pattern, name):
                    return buffer
    return None


@given(plan=plans(mixed_bits=True))
@QUICK
def test_expert_tensors_land_in_the_tier_of_their_layer_and_all_others_are_left_alone(
    plan: ResidencyFile, tmp_path: Path
) -> None:
    written = llama_cpp.write(plan, tmp_path / "flags.txt")
    tier = dict(zip(plan.moe_layers, whole_layers(plan, experts(plan)), strict=True))
    for flags in (written.flags, written.override_flags):
        for layer in range(len(plan.layers) + 12):
            for part in PARTS:
                wanted = "CPU" if tier.get(layer, 0) else None
                found = overridden(flags, f"blk.{layer}.ffn_{part}_exps.weight")
                if layer in tier:
                    assert found == wanted
            assert not any(overridden(flags, f"blk.{layer}.{other}") for other in OTHER)
    assert shlex.split(written.file.read_text()) == list(written.flags)


@given(plan=plans())
@QUICK
def test_attention_off_the_device_takes_its_layer_along_but_not_its_experts(
    plan: ResidencyFile, tmp_path: Path
) -> None:
    plan = plan.model_copy(deep=True)
    for row in plan.layers[::2]:
        row.attention_tier = 1
    written = llama_cpp.write(plan, tmp_path / "flags.txt")
    tier = dict(zip(plan.moe_layers, whole_layers(plan, experts(plan)), strict=True))
    for row in plan.layers:
        found = overridden(written.flags, f"blk.{row.layer}.attn_q.weight")
        assert found == ("CPU" if row.attention_tier else None)
        if row.layer in tier:
            placed = overridden(written.flags, f"blk.{row.layer}.ffn_up_exps.weight") or "CUDA0"
            assert placed == ("CPU" if tier[row.layer] else "CUDA0")


def test_the_first_layers_are_counted_with_the_dense_ones(tmp_path: Path) -> None:
    """58 MoE layers behind 3 dense ones; the first 20 of them on the CPU is N = 23."""
    tier = np.repeat((np.arange(58) < 20).astype(int)[:, None], 4, axis=1)
    written = llama_cpp.write(plan_of(tier, dense=3, spare=(0, 0, 0)), tmp_path / "flags.txt")
    assert written.flags == ("-ngl", "999", "--n-cpu-moe", "23")
    assert written.loss.device_share == pytest.approx(38 / 58)
    assert written.loss.lost_share == pytest.approx(0)


def test_other_layers_than_the_first_need_an_override(tmp_path: Path) -> None:
    tier = np.repeat(np.array([0, 1, 0, 1])[:, None], 4, axis=1)
    written = llama_cpp.write(plan_of(tier, spare=(0, 0, 0)), tmp_path / "flags.txt")
    pattern = r"blk\.(1|3)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    assert written.flags == written.override_flags == ("-ngl", "999", "-ot", pattern)


def test_everything_on_the_device_needs_no_rule(tmp_path: Path) -> None:
    written = llama_cpp.write(plan_of(np.zeros((3, 4), int)), tmp_path / "flags.txt")
    assert written.flags == ("-ngl", "999")
    assert written.rules == ()


def test_the_projection_says_what_it_loses(tmp_path: Path) -> None:
    """Each layer's best expert on the device serves 70 %; in its room fits one layer of four."""
    load = np.tile([0.7, 0.1, 0.1, 0.1], (4, 1))
    plan = plan_of(np.tile([0, 1, 1, 1], (4, 1)), load=load, spare=(0, 10**6, 0))
    loss = llama_cpp.write(plan, tmp_path / "flags.txt").loss
    assert loss.plan_device_share == pytest.approx(0.7)
    assert loss.device_share == pytest.approx(0.25)
    assert loss.lost_share == pytest.approx(0.45)
    assert loss.plan_device_bytes == loss.device_bytes == 4000


def test_layers_beyond_host_memory_stay_in_the_file_and_it_is_said(tmp_path: Path) -> None:
    tier = np.repeat(np.array([2, 1, 0])[:, None], 4, axis=1)
    notes = llama_cpp.write(plan_of(tier, spare=(0, 0, 0)), tmp_path / "f.txt").notes
    assert any("1 layers are beyond host memory" in note for note in notes)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(r"blk\.[0-9]{1,2}\.", "CPU"), "splits at commas"),
        (Rule(r"blk\.1=", "CPU"), "splits at commas"),
        (Rule(r"(?<=blk)\.1\.", "CPU"), "splits at commas"),
        (Rule(r"blk\.1\.", "CPU,x"), "splits at commas"),
        (Rule(r"blk\.(0|1)\.ffn", "CPU"), "blk.0.ffn_up_exps.weight lands in CPU, expected CUDA0"),
        (Rule(r"blk\.1\.ffn_(up|down)_exps", "CPU"), "blk.1.ffn_gate_exps.weight lands in CUDA0"),
    ],
)
def test_rules_that_the_engine_would_misread_are_refused(rule: Rule, expected: str) -> None:
    plan = plan_of(np.array([[0, 0], [1, 1]]))
    with pytest.raises(PlanError, match=expected):
        llama_cpp.check_rules(plan, np.array([0, 1]), (rule,))


@pytest.fixture(scope="module")
def gguf() -> ModuleType:
    """The names of tensors from llama.cpp's own Python package."""
    path = wheel("gguf-*.whl", "gguf==0.19.0")
    with zipfile.ZipFile(path) as archive:
        source = archive.read("gguf/constants.py")
    spec = importlib.util.spec_from_loader("gguf_constants", None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gguf_constants"] = module
    exec(compile(source, "gguf/constants.py", "exec"), vars(module))
    del sys.modules["gguf_constants"]
    return module


@pytest.mark.needs_wheel
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_a_real_models_tensors_the_overrides_catch_the_routed_experts_and_no_other(
    gguf: ModuleType, name: str, tmp_path: Path
) -> None:
    plan = _catalogue_plan(name)
    written = llama_cpp.write(plan, tmp_path / "flags.txt")
    tier = dict(zip(plan.moe_layers, whole_layers(plan, experts(plan)), strict=True))
    kinds = gguf.MODEL_TENSORS[gguf.MODEL_ARCH[ARCHITECTURES[name]]]
    names = [gguf.TENSOR_NAMES[kind] for kind in kinds]
    routed = {f"blk.{{bid}}.ffn_{part}_exps" for part in PARTS}
    assert len(routed & set(names)) >= 3
    caught = 0
    for layer in range(len(plan.layers)):
        for form in names:
            found = overridden(written.override_flags, form.format(bid=layer) + ".weight")
            wanted = "CPU" if form in routed and tier.get(layer, 0) else None
            if form in routed and layer not in tier:
                continue  # a dense layer has no such tensor
            assert found == wanted, form.format(bid=layer)
            caught += found == "CPU"
    assert caught == len(routed & set(names)) * sum(index > 0 for index in tier.values())


def _catalogue_plan(name: str) -> ResidencyFile:
    """The hotter half of each layer's experts on the device, loads drawn at random."""
    spec = load_model(name)
    rng = np.random.default_rng(5)
    load = rng.dirichlet(np.full(spec.n_experts, 0.5), spec.n_moe_layers)
    tier = (load.argsort(axis=1).argsort(axis=1) < spec.n_experts // 2).astype(int)
    plan = plan_of(tier, load=load)
    rows = dict(zip(spec.moe_layers, plan.layers, strict=True))
    empty = {"kind": "dense", "expert_tier": [], "expert_bits": [], "load": []}
    layers = [
        (rows[i] if i in rows else plan.layers[0].model_copy(update=empty)).model_copy(
            update={"layer": i}
        )
        for i in range(spec.n_layers)
    ]
    return ResidencyFile.model_validate(
        plan.model_dump() | {"layers": [row.model_dump() for row in layers], "model": name}
    )


PROGRAM = r"""
#include <iostream>
#include <regex>
#include <string>
#include <vector>
int main() {
  std::string line;
  std::vector<std::regex> rules;
  while (std::getline(std::cin, line) && line != "--") rules.emplace_back(line);
  while (std::getline(std::cin, line)) {
    size_t i = 0;
    while (i < rules.size() && !std::regex_search(line, rules[i])) ++i;
    std::cout << i << "\n";
  }
}
"""


def test_cpp_regexes_match_the_same_tensors_as_ours(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, to try the patterns on std::regex")
    source = tmp_path / "rules.cpp"
    source.write_text(PROGRAM)
    program = tmp_path / "rules"
    subprocess.run([compiler, "-O0", "-o", program, source], check=True)
    plan = _catalogue_plan("qwen3-235b-a22b")
    for row in plan.layers[::5]:
        row.attention_tier = 1
    rules = llama_cpp.write(plan, tmp_path / "flags.txt").rules
    assert len(rules) == 3
    parts = [f"ffn_{part}_exps.weight" for part in PARTS]
    names = [f"blk.{layer}.{part}" for layer in range(100) for part in (*parts, *OTHER)]
    lines = [*(rule.pattern for rule in rules), "--", *names]
    done = subprocess.run(
        [program], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True
    )
    buffers = [*(rule.buffer for rule in rules), None]
    found = [buffers[int(index)] for index in done.stdout.split()]
    assert found == [llama_cpp.buffer_of(name, rules) for name in names]


def test_xargs_hands_the_flags_over_unchanged(tmp_path: Path) -> None:
    if shutil.which("xargs") is None:
        pytest.skip("needs xargs")
    tier = np.repeat(np.array([0, 1, 0, 1])[:, None], 4, axis=1)
    written = llama_cpp.write(plan_of(tier, spare=(0, 0, 0)), tmp_path / "flags.txt")
    command = ["xargs", "-a", str(written.file), "printf", r"%s\n"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == list(written.flags)
