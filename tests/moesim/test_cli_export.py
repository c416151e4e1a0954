"""`moesim export` of residency plans: files, flags, what the projection loses, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from moesim.cli import export
from planners.planfile import PlanFile, layers_of, write_plan
from planners.residency_file import ResidencyFile, write_residency
from tests.moesim.cli_case import CONFIG, config_file, moesim, refused
from tests.planners.export_case import plan_of

LOAD = np.tile([0.4, 0.2, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0], (2, 1))


def _plan() -> ResidencyFile:
    """A plan of the model of `cli_case`: the best four experts of both layers on the device."""
    tier = np.tile([0, 0, 0, 0, 1, 1, 1, 1], (2, 1))
    return plan_of(tier, load=LOAD, top_k=2, model="tiny")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "residency.json"
    write_residency(_plan(), path)
    return path


@pytest.fixture
def placement(tmp_path: Path) -> Path:
    from planners.incumbents import Shape, contiguous

    path = tmp_path / "placement.json"
    layers = layers_of(contiguous(2, 8, Shape(2, 8, 2)), moe_layers=(0, 1), n_layers=2)
    sizes = {"n_experts": 8, "top_k": 2, "expert_parallel_size": 2, "ranks_per_node": 2}
    write_plan(PlanFile(model="tiny", n_slots=8, layers=layers, **sizes), path)
    return path


def _arguments(engine: str, folder: Path) -> tuple[str, tuple[object, ...]]:
    """Name of the file and the flags that the engine needs."""
    return {
        "ktransformers": ("counts.pt", ()),
        "ktransformers-yaml": ("rules.yaml", ()),
        "llama-cpp": ("flags.txt", ()),
        "sglang-paged": ("flags.txt", ()),
        "moe-infinity": (
            "config.json",
            ("--device-memory", "1 MB", "--host-memory", "64 GB", "--offload-folder", "/data"),
        ),
        "device-map": ("map.json", ("--model", config_file(folder))),
    }[engine]


@pytest.mark.parametrize("engine", export.RESIDENCY)
def test_every_engine_gets_its_file_and_the_loss_is_said(
    engine: str, plan: Path, tmp_path: Path
) -> None:
    name, flags = _arguments(engine, tmp_path)
    command = ("export", plan, "--to", engine, "-o", tmp_path / name, *flags)
    ran = moesim(*command, "--json")
    assert ran.code == 0, ran.err
    document = ran.json()
    assert document["engine"] == engine
    assert Path(document["file"]).is_file()
    sidecar = json.loads(Path(document["sidecar"]).read_text())
    assert sidecar["loss"] == document["loss"]
    assert document["loss"]["plan_device_share"] == pytest.approx(0.8)
    assert document["loss"]["device_share_at_most"] <= 1
    assert document["launch"]
    assert document["notes"]
    again = moesim(*command)
    assert "Activations of routed experts served by the device" in again.out
    assert str(tmp_path / name) in again.out
    for flag in document["flags"]:
        assert flag in again.out


def test_the_figures_are_of_this_plan(plan: Path, tmp_path: Path) -> None:
    """In the room of four experts a layer: one layer of two, or four slots in each."""

    def loss(engine: str) -> dict:
        name, flags = _arguments(engine, tmp_path)
        ran = moesim("export", plan, "--to", engine, "-o", tmp_path / name, *flags, "--json")
        return ran.json()["loss"]

    assert loss("ktransformers")["lost_share"] == 0
    assert loss("llama-cpp")["lost_share"] == pytest.approx(0.3)
    assert loss("ktransformers-yaml")["device_share"] == pytest.approx(0.5)
    assert loss("device-map")["device_bytes"] == 8000
    paged = loss("sglang-paged")
    assert paged["device_share_at_most"] == pytest.approx(0.8)
    assert 0.5 < paged["device_share"] < 0.8
    assert loss("moe-infinity")["device_share"] is None


def test_the_model_of_a_device_map_may_be_the_plans_own(tmp_path: Path) -> None:
    write_residency(
        _plan().model_copy(update={"model": str(config_file(tmp_path))}), tmp_path / "p"
    )
    target = tmp_path / "map.json"
    ran = moesim("export", tmp_path / "p", "--to", "device-map", "-o", target, "--json")
    assert ran.json()["granularity"] == "layer"
    assert sorted(set(map(str, json.loads(target.read_text()).values()))) == ["0", "cpu"]
    assert CONFIG["num_local_experts"] == 8


def test_a_models_own_rules_can_be_given(plan: Path, tmp_path: Path) -> None:
    own, target = tmp_path / "own.yaml", tmp_path / "rules.yaml"
    own.write_text(
        "- match: {name: '\\.experts$'}\n"
        "  replace: {class: C, kwargs: {prefill_device: 'cuda:2', generate_device: cpu}}\n"
    )
    command = ("export", plan, "--to", "ktransformers-yaml", "-o", target)
    assert moesim(*command, "--rules", own).code == 0
    rules = yaml.safe_load(target.read_text())
    assert rules[0]["replace"]["kwargs"]["generate_device"] == "cuda:2"
    assert rules[1]["replace"]["class"] == "C"
    own.write_text("[]")
    refused(moesim(*command, "--rules", own), str(own), "list of rules")
    refused(moesim(*command, "--rules", tmp_path / "none.yaml"), "none.yaml")


def test_overrides_are_shown_beside_the_shorter_form(plan: Path, tmp_path: Path) -> None:
    ran = moesim("export", plan, "--to", "llama-cpp", "-o", tmp_path / "f.txt")
    assert "--n-cpu-moe 1" in ran.out
    assert r"'blk\.(0)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'" in ran.out
    command = ("export", plan, "--to", "llama-cpp", "-o", tmp_path / "f.txt", "--json")
    assert "-ot" in moesim(*command).json()["override_flags"]


@pytest.mark.parametrize("engine", export.RESIDENCY)
def test_a_placement_plan_is_refused_by_engines_of_residency_plans(
    engine: str, placement: Path, tmp_path: Path
) -> None:
    ran = moesim("export", placement, "--to", engine, "-o", tmp_path / "x.json")
    refused(ran, "placement.json", "kind is 'placement'", engine, "it is for: sglang")
    assert not (tmp_path / "x.json").exists()


def test_a_residency_plan_is_refused_by_sglangs_expert_location(plan: Path, tmp_path: Path) -> None:
    ran = moesim("export", plan, "--to", "sglang", "-o", tmp_path / "x.json")
    refused(ran, "residency.json", "kind is 'residency'", "ktransformers", "device-map")


def test_placement_plans_still_go_to_sglang(placement: Path, tmp_path: Path) -> None:
    target = tmp_path / "map.json"
    ran = moesim("export", placement, "--to", "sglang", "-o", target, "--json")
    assert set(ran.json()) == {"file", "sidecar", "flags"}
    assert len(json.loads(target.read_text())["physical_to_logical_map"]) == 2


def test_what_is_missing_or_wrong_is_one_line(plan: Path, tmp_path: Path) -> None:
    def ran(engine: str, name: str, *flags: object) -> object:
        return moesim("export", plan, "--to", engine, "-o", tmp_path / name, *flags)

    refused(ran("moe-infinity", "c.json"), "--device-memory", "--offload-folder")
    bare = ("--device-memory", "24", "--offload-folder", "/data")
    refused(ran("moe-infinity", "c.json", *bare), "no unit")
    small = ("--device-memory", "1 kB", "--offload-folder", "/data")
    refused(ran("moe-infinity", "c.json", *small), "residency.json", "device memory", "8000 bytes")
    refused(ran("device-map", "m.json"), "tiny", "config.json")
    refused(ran("ktransformers", "counts.json"), "counts.json", "expected .pt")
    refused(ran("llama-cpp", "nowhere/f.txt"), "nowhere")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["residency.json"]


def test_a_plan_that_does_not_fit_names_the_file_the_tier_and_the_gap(tmp_path: Path) -> None:
    content = _plan().model_dump()
    content["tiers"][0]["capacity_bytes"] -= 123
    path = tmp_path / "tight.json"
    path.write_text(json.dumps(content))
    ran = moesim("export", path, "--to", "ktransformers", "-o", tmp_path / "c.pt")
    refused(ran, "tight.json", "tier gpu", "short by 123")
    path.write_text(json.dumps(content)[:-30])
    refused(moesim("export", path, "--to", "llama-cpp", "-o", tmp_path / "f.txt"), "tight.json")
    content["kind"] = "residence"
    path.write_text(json.dumps(content))
    refused(moesim("export", path, "--to", "llama-cpp", "-o", tmp_path / "f.txt"), "kind")
