"""SGLang's paged experts get the largest K that fits, and the figures are what its LRU does."""

from __future__ import annotations

import re
import shlex
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from planners.errors import PlanError
from planners.export import sglang_paged
from planners.export.projection import experts, rooms
from planners.residency_file import CacheEntry, ResidencyFile
from tests.planners.export_case import EXPERT_BYTES, functions_of, plan_of, plans, wheel

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WHEEL = ("sglang-*.whl", "sglang==0.5.23")


def _slots(flags: tuple[str, ...]) -> int:
    return int(flags[flags.index("--paged-experts-num-resident") + 1])


@given(plan=plans(mixed_bits=True))
@QUICK
def test_k_is_the_most_that_fits_and_at_least_top_k(plan: ResidencyFile, tmp_path: Path) -> None:
    held = experts(plan)
    one_slot = int(held.n_bytes.max(axis=1).sum())
    room = int(rooms(plan, held)[0])
    if room < one_slot:
        with pytest.raises(PlanError, match="expected at least top_k=1"):
            sglang_paged.write(plan, tmp_path / "never.txt")
        assert not (tmp_path / "never.txt").exists()
        return
    written = sglang_paged.write(plan, tmp_path / "flags.txt")
    assert _slots(written.flags) == min(room // one_slot, plan.n_experts)
    assert written.loss.device_bytes <= room
    assert shlex.split(written.file.read_text()) == list(written.flags)


def test_the_host_must_hold_all_experts_the_resident_ones_too(tmp_path: Path) -> None:
    plan = plan_of(np.array([[0, 0, 1, 1]]), spare=(0, 1000, 0))
    with pytest.raises(PlanError, match="pinned copy of all experts takes 4000.*short by 1000$"):
        sglang_paged.write(plan, tmp_path / "flags.txt")
    enough = plan_of(np.array([[0, 0, 1, 1]]), spare=(0, 2000, 0))
    assert _slots(sglang_paged.write(enough, tmp_path / "flags.txt").flags) == 2


def test_notes_name_what_of_the_plans_cache_is_another(tmp_path: Path) -> None:
    cache = CacheEntry(slots=[1], policy="lfu", on_miss="cpu", prefetch="next-gate")
    plan = plan_of(np.array([[0, 1, 1, 1]]), cache=cache)
    written = sglang_paged.write(plan, tmp_path / "flags.txt")
    text = " ".join(written.notes)
    assert _slots(written.flags) == 2
    for words in ("LRU, the plan's cache by lfu", "on_miss=cpu", "prefetch (next-gate)"):
        assert words in text
    same = plan_of(np.array([[0, 1]]), cache=CacheEntry(slots=[1], policy="lru"))
    notes = sglang_paged.write(same, tmp_path / "flags.txt").notes
    assert not any("evicts" in note or "not carried over" in note for note in notes)


@pytest.mark.parametrize("slots", [1, 9])
def test_a_number_that_the_engine_refuses_or_lowers_is_refused(slots: int) -> None:
    with pytest.raises(PlanError, match=f"K={slots}"):
        sglang_paged.check_slots(slots, top_k=2, n_experts=8)


@pytest.mark.needs_wheel
def test_every_flag_is_one_of_the_engines() -> None:
    with zipfile.ZipFile(wheel(*WHEEL)) as archive:
        names = [n for n in archive.namelist() if "/srt/arg_groups/fields/" in n]
        text = "\n".join(archive.read(name).decode() for name in names)
    for flag in sglang_paged.launch_flags(8):
        if flag.startswith("--"):
            field = flag.removeprefix("--").replace("-", "_")
            assert re.search(rf"^\s+{field}: A\[", text, re.M), flag


@pytest.mark.needs_wheel
@pytest.mark.parametrize("capacity_slots", [3, 8])
def test_the_engines_own_lru_hits_as_the_loss_says(capacity_slots: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    load = rng.dirichlet(np.full(16, 0.4), 2)
    room = (2 * capacity_slots - 2) * EXPERT_BYTES
    plan = plan_of(np.tile([0] + [1] * 15, (2, 1)), load=load, spare=(room, 10**6, 0))
    written = sglang_paged.write(plan, tmp_path / "flags.txt")
    slots = _slots(written.flags)
    assert slots == capacity_slots
    policy_class, plan_waves = _engine_policy()
    hits = []
    for share in load:
        policy, missed, draws = policy_class(slots), 0, rng.choice(16, 20_000, p=share)
        for expert in draws.tolist():
            missed += sum(len(wave.loads) for wave in plan_waves(policy, [expert]))
        hits.append(1 - missed / len(draws))
    assert written.loss.device_share == pytest.approx(np.mean(hits), abs=0.02)
    assert written.loss.device_share_at_most >= np.mean(hits) - 0.01


def _engine_policy() -> tuple[Any, Any]:
    """LRUPolicy and plan_waves of the wheel."""

    @dataclass
    class Wave:
        experts: list[int]
        slots: list[int]
        loads: list[tuple[int, int]]

    known: dict[str, Any] = {"OrderedDict": OrderedDict, "Wave": Wave}
    member = "sglang/srt/layers/moe/paged_experts/residency.py"
    functions_of(wheel(*WHEEL), member, ["LRUPolicy", "plan_waves"], known)
    return known["LRUPolicy"], known["plan_waves"]
