"""MoE-Infinity's config passes its parser, and its ratio is the plan's share of the device."""

from __future__ import annotations

import json
from dataclasses import field, make_dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from planners.errors import PlanError
from planners.export import moe_infinity
from planners.export.moe_infinity import Machine
from planners.export.projection import experts, rooms
from planners.residency_file import CacheEntry, ResidencyFile
from tests.planners.export_case import plan_of, plans

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MACHINE = Machine(device_bytes=10**6, offload_path="/data/offload", host_bytes=4 * 10**9)


@given(plan=plans(mixed_bits=True))
@QUICK
def test_the_ratio_of_the_device_never_exceeds_the_plans_tier(
    plan: ResidencyFile, tmp_path: Path
) -> None:
    if plan.tiers[0].capacity_bytes == 0:
        return
    config = json.loads(
        moe_infinity.write(plan, tmp_path / "config.json", MACHINE).file.read_text()
    )
    given_bytes = config["device_memory_ratio"] * MACHINE.device_bytes
    assert given_bytes <= plan.tiers[0].capacity_bytes * (1 + 1e-12)
    assert given_bytes >= plan.tiers[0].capacity_bytes - 1e-6 * MACHINE.device_bytes
    assert config["host_memory_ratio"] * MACHINE.host_bytes <= plan.tiers[1].capacity_bytes
    assert set(config) <= set(moe_infinity.KEYS)


@given(plan=plans(mixed_bits=True))
@settings(QUICK, max_examples=25)
def test_no_choice_of_experts_in_the_room_serves_more_than_the_bound(
    plan: ResidencyFile, tmp_path: Path
) -> None:
    if plan.tiers[0].capacity_bytes == 0:
        return
    held = experts(plan)
    room, rng = rooms(plan, held)[0], np.random.default_rng(0)
    loss = moe_infinity.write(plan, tmp_path / "config.json", MACHINE).loss
    assert loss.device_share is None
    assert loss.plan_device_share <= loss.device_share_at_most + 1e-9
    share, size = held.share.ravel(), held.n_bytes.ravel()
    for _ in range(50):
        order = rng.permutation(len(share))
        fits = order[np.cumsum(size[order]) <= room]
        assert share[fits].sum() / len(held.share) <= loss.device_share_at_most + 1e-9


def test_the_bound_is_the_best_choice_when_experts_are_of_one_size(tmp_path: Path) -> None:
    load = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    plan = plan_of(np.array([[0, 1, 1], [1, 1, 0]]), load=load, spare=(1000, 10**6, 0))
    loss = moe_infinity.write(plan, tmp_path / "config.json", MACHINE).loss
    best = max(sum(c) for c in combinations(load.ravel(), 3)) / 2
    assert loss.device_share_at_most == pytest.approx(best) == pytest.approx(0.8)
    assert loss.device_bytes == 3000


def test_the_kv_share_is_not_the_engines(tmp_path: Path) -> None:
    plan = plan_of(np.array([[0, 1]]), others=499_000, kv_bytes=400_000)
    assert plan.tiers[0].capacity_bytes == 500_000
    written = moe_infinity.write(plan, tmp_path / "config.json", MACHINE)
    assert json.loads(written.file.read_text())["device_memory_ratio"] == 0.1


def test_transformers_parser_takes_the_file_and_no_unknown_key(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    defaults = {"offload_path": "", "trace_path": None, "trace_capacity": 1000, "num_threads": 8}
    fields = [
        (key, kind, field(default=defaults.get(key, 0.9 if kind is float else False)))
        for key, kind in moe_infinity.KEYS.items()
    ]
    parser = transformers.HfArgumentParser(make_dataclass("ArcherConfig", fields))
    cache = CacheEntry(slots=[1], policy="lru", prefetch="next-gate")
    plan = plan_of(np.array([[0, 1]]), others=600_000, cache=cache)
    written = moe_infinity.write(plan, tmp_path / "config.json", MACHINE)
    parsed = parser.parse_json_file(json_file=str(written.file))[0]
    assert parsed.device_memory_ratio == pytest.approx(0.602)
    assert parsed.offload_path == "/data/offload"
    assert parsed.prefetch is True
    assert parsed.trace_capacity == 1000
    with pytest.raises(ValueError, match="not used"):
        parser.parse_dict(json.loads(written.file.read_text()) | {"experts": [1]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"experts": [1]}, "key 'experts' is unknown"),
        ({"device_memory_ratio": 1.5}, "share in"),
        ({"device_memory_ratio": 0.0}, "share in"),
        ({"device_memory_ratio": "0.5"}, "expected float"),
        ({"trace_capacity": True}, "expected int"),
        ({"offload_path": ""}, "offload_path is missing"),
    ],
)
def test_a_config_that_the_engine_would_stop_at_is_refused(
    change: dict[str, object], expected: str
) -> None:
    good: dict[str, object] = {"offload_path": "/x", "device_memory_ratio": 0.5, "prefetch": False}
    moe_infinity.check_config(good)
    with pytest.raises(PlanError, match=expected):
        moe_infinity.check_config(good | change)


def test_a_device_smaller_than_the_plans_tier_is_refused(tmp_path: Path) -> None:
    plan = plan_of(np.array([[0, 1]]), others=10**6)
    with pytest.raises(PlanError, match=r"device memory: .* 1001000 bytes.* has 1000000"):
        moe_infinity.write(plan, tmp_path / "config.json", MACHINE)


def test_a_ratio_that_newer_versions_lower_is_said(tmp_path: Path) -> None:
    plan = plan_of(np.array([[0, 1]]), others=900_000)
    notes = " ".join(moe_infinity.write(plan, tmp_path / "config.json", MACHINE).notes)
    assert "lower device_memory_ratio=0.901 to 0.85" in notes
