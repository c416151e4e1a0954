"""Hugging Face's device_map covers a real model's tensors once each, in the plan's places."""

from __future__ import annotations

import copy
import importlib
import importlib.machinery
import json
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planners.errors import PlanError
from planners.export import device_map, hf_modules
from planners.export.projection import experts, whole_layers
from planners.residency_file import ResidencyFile
from tests.planners.export_case import plan_of, wheel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
PLACES = {"device": 0, "host": "cpu", "disk": "disk"}


def _qwen(n_layers: int = 5) -> Any:
    return transformers.Qwen3MoeConfig(
        **SMALL, num_hidden_layers=n_layers, num_experts=4, num_experts_per_tok=2, head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, mlp_only_layers=[0],
    )  # fmt: skip


def _switch() -> Any:
    return transformers.SwitchTransformersConfig(
        num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_experts=4, d_model=16, d_ff=32, d_kv=4, num_heads=4,
        vocab_size=64,
    )  # fmt: skip


FAMILIES = {
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, num_hidden_layers=3, num_local_experts=4, intermediate_size=8
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL, num_hidden_layers=3, num_local_experts=4, intermediate_size=8, head_dim=8
    ),
    "granite": lambda: transformers.GraniteMoeConfig(
        **SMALL, num_hidden_layers=3, num_local_experts=4, intermediate_size=8
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **SMALL, num_hidden_layers=3, num_experts=4, intermediate_size=8
    ),
}


def _saved(config: Any, folder: Path) -> dict[str, hf_modules.Shape]:
    config.save_pretrained(folder)
    return hf_modules.tensor_shapes(folder)


def _qwen_plan(spare: tuple[int, ...] = (0, 2000, 10**6)) -> ResidencyFile:
    tier = np.array([[0, 0, 1, 2], [0, 0, 0, 0], [1, 1, 2, 2], [0, 1, 1, 2]])
    return plan_of(tier, dense=1, spare=spare)


def _switch_plan() -> ResidencyFile:
    plan = plan_of(np.array([[0, 1, 2, 1], [1, 0, 0, 2]]))
    dense = {"kind": "dense", "expert_tier": [], "expert_bits": []}
    rows = [plan.layers[0].model_copy(update=dense), plan.layers[0]]
    rows += [plan.layers[0].model_copy(update=dense), plan.layers[1]]
    layers = [row.model_copy(update={"layer": index}) for index, row in enumerate(rows)]
    return plan.model_copy(update={"layers": layers})


def _place(places: dict[str, Any], name: str) -> Any:
    """The place of a tensor: that of the innermost entry around it."""
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places[name]


def test_fused_experts_are_placed_by_whole_layers_and_the_loss_is_said(tmp_path: Path) -> None:
    plan, shapes = _qwen_plan(), _saved(_qwen(), tmp_path)
    written = device_map.write(plan, tmp_path / "map.json", shapes)
    assert written.granularity == "layer"
    places = json.loads(written.file.read_text())
    tier = whole_layers(plan, experts(plan))
    assert sorted(set(tier.tolist())) == [0, 1, 2]
    for layer, index in zip(plan.moe_layers, tier, strict=True):
        for part in ("gate_up_proj", "down_proj"):
            found = _place(places, f"model.layers.{layer}.mlp.experts.{part}")
            assert found == PLACES[plan.tiers[index].kind]
        assert _place(places, f"model.layers.{layer}.mlp.gate.weight") == 0
    assert _place(places, "model.layers.0.mlp.up_proj.weight") == 0
    assert written.loss.lost_share == pytest.approx(7 / 16 - 1 / 4)
    assert "offload_folder='offload'" in written.launch


def test_experts_kept_as_modules_go_each_where_the_plan_puts_it(tmp_path: Path) -> None:
    plan, shapes = _switch_plan(), _saved(_switch(), tmp_path)
    written = device_map.write(plan, tmp_path / "map.json", shapes)
    assert written.granularity == "expert"
    assert written.loss.lost_share == 0
    places = json.loads(written.file.read_text())
    blocks = ("encoder.block.1.layer.1", "decoder.block.1.layer.2")
    for block, tiers in zip(blocks, experts(plan).tier, strict=True):
        for expert, index in enumerate(tiers):
            found = _place(places, f"{block}.mlp.experts.expert_{expert}.wi.weight")
            assert found == PLACES[plan.tiers[index].kind]
    assert _place(places, "decoder.block.1.layer.1.EncDecAttention.q.weight") == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_families_name_their_experts_in_their_own_ways(family: str, tmp_path: Path) -> None:
    shapes = _saved(FAMILIES[family](), tmp_path)
    plan = plan_of(np.repeat(np.array([1, 0, 1])[:, None], 4, axis=1), spare=(0, 0, 0))
    places = json.loads(device_map.write(plan, tmp_path / "map.json", shapes).file.read_text())
    tensors = hf_modules.sort_tensors(shapes, 4)
    fused = [tensor for tensor in tensors if tensor.fused]
    assert {tensor.layer for tensor in fused} == {0, 1, 2}
    for tensor in tensors:
        away = tensor.fused and tensor.layer != 1
        assert _place(places, tensor.name) == ("cpu" if away else 0)


def test_attention_goes_to_its_own_tier(tmp_path: Path) -> None:
    plan = _qwen_plan()
    plan.layers[2].attention_tier = 1
    shapes = _saved(_qwen(), tmp_path)
    places = json.loads(device_map.write(plan, tmp_path / "map.json", shapes).file.read_text())
    assert _place(places, "model.layers.2.self_attn.q_proj.weight") == "cpu"
    assert _place(places, "model.layers.3.self_attn.q_proj.weight") == 0


def test_a_plan_all_on_the_device_is_one_entry(tmp_path: Path) -> None:
    shapes = _saved(_qwen(), tmp_path)
    plan = plan_of(np.zeros((4, 4), int), dense=1)
    assert json.loads(device_map.write(plan, tmp_path / "m.json", shapes).file.read_text()) == {
        "": 0
    }


@pytest.mark.parametrize(
    ("tier", "dense", "expected"),
    [
        (np.zeros((3, 4), int), 1, "the model has 5 layers, the plan 4"),
        (np.zeros((5, 4), int), 0, "layer 0 is MoE in only one"),
    ],
)
def test_a_plan_of_another_model_is_refused(
    tier: np.ndarray, dense: int, expected: str, tmp_path: Path
) -> None:
    shapes = _saved(_qwen(), tmp_path)
    with pytest.raises(PlanError, match=expected):
        device_map.write(plan_of(tier, dense=dense), tmp_path / "m.json", shapes)
    assert not (tmp_path / "m.json").exists()


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    plan = plan_of(np.zeros((4, 5), int), dense=1)
    with pytest.raises(PlanError, match="4 experts in a layer, the plan 5"):
        device_map.write(plan, tmp_path / "m.json", _saved(_qwen(), tmp_path))
    switch = _switch_plan().model_dump() | {"n_experts": 5}
    for row in switch["layers"]:
        if row["kind"] == "moe":
            row["expert_tier"] += [0]
            row["expert_bits"] += [4.0]
    folder = tmp_path / "switch"
    with pytest.raises(PlanError, match="4 experts in a layer, the plan 5"):
        device_map.write(ResidencyFile(**switch), tmp_path / "m.json", _saved(_switch(), folder))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"a.b": 0}, "tensor a.c.w is under 0 entries"),
        ({"a": 0, "a.c": "cpu"}, "under 2 entries"),
        ({"a": 0, "z": "cpu"}, "entry 'z' names no module"),
        ({"a": "gpu"}, "place 'gpu'"),
    ],
)
def test_a_map_that_accelerate_would_take_and_misplace_is_refused(
    places: dict[str, Any], expected: str
) -> None:
    device_map.check_map({"a.b": 0, "a.c": "cpu"}, ["a.b.w", "a.c.w"])
    with pytest.raises(PlanError, match=expected):
        device_map.check_map(places, ["a.b.w", "a.c.w"])


def test_a_model_that_is_no_file_is_refused_without_a_look_at_the_network(tmp_path: Path) -> None:
    for name in ("Qwen/Qwen3-30B-A3B", str(tmp_path)):
        with pytest.raises(PlanError, match=r"no config\.json"):
            hf_modules.tensor_shapes(Path(name))
    (tmp_path / "config.json").write_text('{"model_type": "of_nobody"}')
    with pytest.raises(PlanError, match="transformers: ") as caught:
        hf_modules.tensor_shapes(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


@pytest.fixture
def accelerate(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[types.ModuleType]:
    """The library itself, from the environment or its wheel."""
    source = tmp_path_factory.mktemp("accelerate")
    with zipfile.ZipFile(wheel("accelerate-*.whl", "accelerate==1.15.0")) as archive:
        archive.extractall(source)
    if "psutil" not in sys.modules:
        psutil = types.ModuleType("psutil")
        psutil.__spec__ = importlib.machinery.ModuleSpec("psutil", None)
        monkeypatch.setitem(sys.modules, "psutil", psutil)
    monkeypatch.syspath_prepend(str(source))
    before = set(sys.modules)
    yield importlib.import_module("accelerate")
    for name in set(sys.modules) - before:
        if name.startswith("accelerate"):
            sys.modules.pop(name)


@pytest.mark.needs_wheel
@pytest.mark.parametrize("family", ["qwen", "switch"])
def test_accelerate_takes_the_map_and_the_model_still_answers_the_same(
    family: str, accelerate: types.ModuleType, tmp_path: Path
) -> None:
    config, plan = (_qwen(), _qwen_plan()) if family == "qwen" else (_switch(), _switch_plan())
    written = device_map.write(plan, tmp_path / "m.json", _saved(config, tmp_path / "model"))
    places = json.loads(written.file.read_text())
    assert {0, "cpu", "disk"} == set(places.values())
    torch.manual_seed(0)
    coder = bool(config.is_encoder_decoder)
    kind = transformers.AutoModelForSeq2SeqLM if coder else transformers.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    accelerate.utils.check_device_map(model, places)
    ids = torch.arange(6)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if coder else {})
    with torch.no_grad():
        expected = model(**inputs).logits
        # No GPU here: the CPU is the device, and what is off it goes to the disk.
        stand_in = {name: "cpu" if place == 0 else "disk" for name, place in places.items()}
        spread = accelerate.dispatch_model(
            copy.deepcopy(model),
            device_map=stand_in,
            main_device="cpu",
            offload_dir=tmp_path / "offload",
        )
        assert any(value.is_meta for value in spread.state_dict().values())
        torch.testing.assert_close(spread(**inputs).logits, expected)
    short = {name: place for name, place in places.items() if "layers.4" not in name}
    if family == "qwen":
        with pytest.raises(ValueError, match="does not give any device"):
            accelerate.utils.check_device_map(model, short)


def test_without_transformers_the_extra_to_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _qwen().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PlanError, match=r"transformers.* install moesim\[capture\]"):
        hf_modules.tensor_shapes(tmp_path)
