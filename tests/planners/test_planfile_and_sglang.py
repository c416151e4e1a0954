"""The neutral plan survives a round trip, and SGLang's file is what its loader wants."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planners.errors import PlanError
from planners.export import sglang
from planners.incumbents import Shape, contiguous
from planners.planfile import PlanFile, layers_of, read_plan, write_plan


@pytest.fixture
def plan() -> PlanFile:
    placement = contiguous(3, 8, Shape(2, 10, 2))
    return PlanFile(
        model="example",
        n_experts=8,
        top_k=2,
        expert_parallel_size=2,
        ranks_per_node=2,
        n_slots=10,
        layers=layers_of(placement, moe_layers=(1, 2, 4), n_layers=5),
    )


def test_a_plan_survives_the_round_trip(plan: PlanFile, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    assert again == plan
    assert again.moe_layers == (1, 2, 4)
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"n_slot": 10}, "n_slot"),
        ({"n_slots": 12}, "has 10 entries, expected 12"),
        ({"n_experts": 7}, "expected 0..6"),
        ({"expert_parallel_size": 3}, "not divisible"),
        ({"schema_version": 2}, "schema_version"),
        ({"layers": []}, "no moe layer"),
    ],
)
def test_a_bad_plan_is_refused_in_one_line_that_names_file_and_field(
    plan: PlanFile, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.model_dump() | change))
    with pytest.raises(PlanError, match=expected) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sglang_file_has_a_row_per_decoder_layer_and_no_other_key(
    plan: PlanFile, tmp_path: Path
) -> None:
    written = sglang.write(plan, tmp_path / "map.json")
    content = json.loads(written.map_file.read_text())
    assert list(content) == ["physical_to_logical_map"]
    table = np.array(content["physical_to_logical_map"])
    assert table.shape == (5, 10)
    assert table[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert (table[[1, 2, 4]] == plan.placement().physical_to_logical_map).all()


def test_sglang_flags_say_how_many_slots_are_redundant(plan: PlanFile, tmp_path: Path) -> None:
    flags = sglang.write(plan, tmp_path / "map.json").flags
    assert flags[flags.index("--ep-num-redundant-experts") + 1] == "2"
    assert flags[flags.index("--ep-size") + 1] == "2"
    without = sglang.launch_flags(plan, tmp_path / "map.json", all_to_all="none")
    assert "--ep-dispatch-algorithm" not in without


def _good_map() -> np.ndarray:
    return np.tile(np.arange(10, dtype=np.int32) % 8, (3, 1))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda t: t[:2], "expected 3 rows"),
        (lambda t: t[:, :9], "multiple of ep_size=2"),
        (lambda t: np.where(t == 3, 4, t), "no slot for 1 of 8"),
        (lambda t: t - 1, "ids -1"),
    ],
)
def test_what_sglang_would_not_notice_is_refused(spoil: object, expected: str) -> None:
    with pytest.raises(PlanError, match=expected):
        sglang.check_map(spoil(_good_map()), n_experts=8, ep_size=2, n_layers=3)  # type: ignore[operator]


def test_a_map_file_must_end_in_json(plan: PlanFile, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"expected \.json"):
        sglang.write(plan, tmp_path / "map.txt")
    assert not list(tmp_path.iterdir())
