"""`moesim offload` and `moesim plan residency` on the bundled trace, and plans replayed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.residency_candidates import ResidencyOptions
from moesim.residency_study import residency_study
from planners.residency_file import read_residency
from tests.moesim.cli_case import moesim, refused
from tests.moesim.offload.example import work_of
from traces.layer_steps import part_of, without

BOX = "rtx-4090-xeon-6454s"


def tight(share: float) -> str:
    """Device memory that holds a share of the bundled model's experts beside everything else."""
    from hwmodels.box import load_box
    from moesim.offload.memory import footprint
    from moesim.offload.prices import Weights
    from traces.models import load_model

    foot = footprint(load_model("tiny-moe-32e"), load_box(BOX), Weights(), 4096)
    experts = share * foot.n_experts * foot.expert_bytes
    return f"{foot.dense_bytes + foot.all_kv_bytes + int(experts)} B"


def test_policies_are_tried_side_by_side_on_the_same_tokens() -> None:
    ran = moesim(
        "offload", "bundled", "--system", BOX, "--slots", 8, "--on-miss", "load",
        "--cache", "lru,belady", "--prefetch", "none,next-gate", "--tokens", 800, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    document = ran.json()
    trials = {(t["cache"], t["prefetch"]): t for t in document["trials"]}
    assert len(trials) == 4
    assert trials["belady", "none"]["hit_rate"] > trials["lru", "none"]["hit_rate"]
    assert trials["lru", "next-gate"]["loads_ahead_per_token"] > 0
    assert 0.5 < trials["lru", "next-gate"]["recall"] < 1
    by_convention = trials["lru", "none"]["hit_rate_by_convention"]
    assert set(by_convention) == {"token_batch_free_fill", "execution_order_cold_miss"}
    # Looking a token's experts up at once, and sparing them, can only help against one by one.
    assert by_convention["execution_order_cold_miss"] <= trials["lru", "none"]["hit_rate"] + 0.02
    for trial in trials.values():
        assert {"tokens_per_s", "bytes_per_token", "stall_s_per_token", "joules_per_token"} <= set(
            trial
        )
        assert trial["rho"] == pytest.approx(8 / 4)
    assert document["kinds"]["hit_rate"] == "measured"


def test_equal_seeds_give_equal_documents() -> None:
    command = ("offload", "bundled", "--system", BOX, "--slots", 6, "--prefetch", "next-gate",
               "--tokens", 300, "--json")  # fmt: skip
    assert moesim(*command).out == moesim(*command).out


def test_a_class_of_ones_own_is_tried_beside_the_built_in_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n"
        "    def __init__(self, work): self.last = {}\n"
        "    def use(self, e, now): self.last[e] = now\n"
        "    def insert(self, e, now, ahead): self.last[e] = now\n"
        "    def evict(self, e): pass\n"
        "    def victim(self, c, incoming, now): return min(c, key=self.last.__getitem__)\n"
    )
    ran = moesim("offload", "bundled", "--system", BOX, "--slots", 8, "--on-miss", "load",
                 "--cache", f"lru,{file}:Mine", "--tokens", 300, "--json")  # fmt: skip
    lru, mine = ran.json()["trials"]
    assert mine["hit_rate"] == pytest.approx(lru["hit_rate"], abs=0.02)


def test_a_pass_can_be_looked_at_in_a_trace_viewer(tmp_path: Path) -> None:
    file = tmp_path / "pass.json"
    ran = moesim("offload", "bundled", "--system", BOX, "--slots", 6, "--on-miss", "load",
                 "--tokens", 100, "--timeline", file)  # fmt: skip
    assert ran.code == 0, ran.err
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert {"dense part", "load", "head"} <= names


def test_low_bit_copies_shallow_slots_and_pim_can_be_tried() -> None:
    def tried(*flags: object) -> dict:
        ran = moesim("offload", "bundled", "--system", "h100", "--tokens", 400, "--slots", 10,
                     "--bits", 4, "--json", *flags)  # fmt: skip
        assert ran.code == 0, ran.err
        return ran.json()["trials"][0]

    plain = tried()
    nested = tried("--low-bits", 2, "--high-share", 0.7, "--nested")
    assert 0 < nested["low_bits_share"] < 1
    assert nested["bytes_per_token"] < plain["bytes_per_token"]
    shallow = tried("--shallow", 1)
    assert shallow["hit_rate"] != plain["hit_rate"]
    assert shallow["device_bytes"] <= plain["device_bytes"]
    assert tried("--pim", "duplex-logic-pim")["pim_share"] > 0


def test_what_cannot_be_tried_is_refused_in_one_line(tmp_path: Path) -> None:
    on_box = ("offload", "bundled", "--system", BOX, "--tokens", 50)
    refused(moesim(*on_box, "--slots", 3, "--on-miss", "load"), "top_k=4", "slots")
    refused(moesim(*on_box, "--cache", "clock"), "clock", "lru")
    refused(moesim(*on_box, "--prefetch", "crystal-ball"), "crystal-ball", "next-gate")
    refused(moesim(*on_box, "--on-miss", "pray"), "pray")
    refused(moesim(*on_box, "--kv-tokens", 10**9), "device memory is short by")
    refused(moesim(*on_box, "--cache", f"{tmp_path}/none.py:C"), "no Python file")
    refused(moesim("offload", "bundled", "--system", "abacus"), "abacus")


def test_a_plan_is_made_judged_written_replayed_and_exported(tmp_path: Path) -> None:
    ran = moesim(
        "plan", "residency", "bundled", "--system", BOX, "--device-memory", tight(0.4),
        "--on-miss", "load", "--tokens", 1500, "-o", tmp_path, "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    document = ran.json()
    assert 4 <= document["slots_that_fit_per_layer"] < 32
    assert document["tokens_per_s"]["plan"] > 0
    assert document["verdict"] in ("deploy", "not_worth_it")
    assert document["gap"] >= 0
    hits = document["hit_rate"]
    assert hits["belady"] >= hits["lru_uniform"]
    assert set(document["lru_hit_rate_by_convention"]) == {
        "token_batch_free_fill",
        "execution_order_cold_miss",
    }
    for name in ("plan.json", "result.json", "table.csv", "report.html", "residency.png"):
        assert (tmp_path / name).stat().st_size > 0
    plan = read_residency(tmp_path / "plan.json")
    assert plan.verdict == document["verdict"]
    replayed = moesim("simulate", "--trace", "bundled", "--plan", tmp_path / "plan.json", "--json")
    assert replayed.code == 0, replayed.err
    assert replayed.json()["trials"][0]["hit_rate"] == pytest.approx(hits["plan"], abs=0.1)
    exported = moesim("export", tmp_path / "plan.json", "--to", "sglang-paged", "-o",
                      tmp_path / "paged.json", "--json")  # fmt: skip
    assert exported.code == 0, exported.err


def test_when_all_experts_fit_no_plan_helps_and_strict_says_no() -> None:
    ran = moesim("plan", "residency", "bundled", "--system", BOX, "--tokens", 600, "--strict")
    assert ran.code == 1
    assert "nothing to plan" in ran.out
    assert "not worth it" in ran.out


def test_random_routing_is_told_from_its_working_set() -> None:
    from hwmodels.box import load_box
    from traces.models import load_model
    from traces.synth import uniform_trace

    model = load_model("mixtral-8x7b")
    trace = uniform_trace(1200, model.n_moe_layers, 8, 2, seed=0)
    box = load_box(BOX)
    study = residency_study(trace, model, box, ResidencyOptions(on_miss="load", kv_tokens=256))
    assert "as good as random" in study.reason
    assert study.verdict == "not_worth_it"


def test_a_plan_needs_all_layers_and_token_order(tmp_path: Path) -> None:
    refused(moesim("plan", "residency", "bundled", "--system", BOX, "--device-memory", "1 GB"),
            "device memory is short by")  # fmt: skip
    refused(moesim("plan", "residency", "bundled", "--system", "rtx-4090", "--on-miss", "cpu"),
            "no CPU in the catalogue")  # fmt: skip
    counts = tmp_path / "counts.csv"
    counts.write_text("layer,expert,count\n0,0,5\n0,1,3\n")
    refused(moesim("plan", "residency", counts, "--system", BOX), "counts")


def test_parts_and_remainders_of_layer_steps_add_up() -> None:
    work = work_of(60)
    first, second = part_of(work, 0, 25), part_of(work, 25, work.passes.n_passes)
    np.testing.assert_array_equal(np.r_[first.expert, second.expert], work.expert)
    pinned = np.zeros(work.n_objects, np.bool_)
    pinned[::4] = True
    rest = without(work, pinned)
    assert rest.n_steps == work.n_steps
    assert not pinned[rest.objects()].any()
    assert len(rest.expert) == int((~pinned[work.objects()]).sum())


def test_captured_gpt_oss_gains_on_unseen_requests(shared: Path) -> None:
    from hwmodels.box import load_box
    from moesim.offload.prices import Weights
    from traces.formats.detect import read_any
    from traces.models import load_model

    trace = read_any(shared / "traces" / "gpt-oss-20b-decode.npz")
    options = ResidencyOptions(
        Weights(4.25), device_bytes=9 * 10**9, on_miss="load", most_tokens=6000
    )
    study = residency_study(trace, load_model("gpt-oss-20b"), load_box(BOX), options)
    assert study.verdict == "deploy"
    assert study.current == "lru_uniform"
    assert 0.05 < study.gain.low < study.gain.mean < 0.12
    assert 0 < study.to_belady < 0.5
