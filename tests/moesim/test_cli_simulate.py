"""`moesim simulate`: steps of a tiny trace under a plan, beside the contiguous placement."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hwmodels.systems import load_system
from moesim.lower.layer_costs import StepOptions
from moesim.simulate import Setting, simulate_steps
from planners.plan import Placement
from planners.planfile import PlanFile, layers_of, write_plan
from tests.moesim.cli_case import (
    config_file,
    counts_file,
    moesim,
    refused,
    small_trace,
    trace_file,
)
from traces.batches import steps
from traces.models import load_model

# Every rank of four: one popular expert of 0..3, one unpopular of 7..4, one replica of 0..3.
SLOTS = [0, 7, 1, 1, 6, 2, 2, 5, 3, 3, 4, 0]
KEYS = ("step_time_s", "tokens_per_s", "max_over_mean", "breakdown_s", "bytes_per_token")


def placement() -> Placement:
    return Placement(np.array([SLOTS, SLOTS], dtype=np.int32), 8, 4, 2)


def plan_file(folder: Path, **changes: object) -> Path:
    base = PlanFile(
        model="tiny",
        n_experts=8,
        top_k=2,
        expert_parallel_size=4,
        ranks_per_node=2,
        n_slots=12,
        layers=layers_of(placement(), (0, 1), 2),
        inputs={"system": "h200x4", "phase": "decode", "tokens_per_rank": 3},
    )
    path = folder / "plan.json"
    write_plan(base.model_copy(update=changes), path)
    return path


def flags(folder: Path, *more: object) -> tuple[object, ...]:
    common = ("--trace", trace_file(folder), "--model", config_file(folder))
    return ("simulate", *common, *more)


def test_figures_are_those_of_the_library_for_the_same_steps(tmp_path: Path) -> None:
    ran = moesim(*flags(tmp_path, "--plan", plan_file(tmp_path), "--steps", 5, "--json"))
    assert ran.code == 0, ran.err
    document = ran.json()
    assert set(KEYS) <= set(document)
    system = replace(load_system("h200x4"), devices_per_node=2)
    model = load_model(tmp_path / "config.json")
    setting = Setting(model, system, StepOptions(tokens_per_rank=3))
    rows = steps(small_trace(), 12, "decode", 0).rows[:5]
    result = simulate_steps(small_trace(), placement(), setting, rows)
    assert document["step_time_s"]["plan"] == result.seconds.mean()
    assert document["tokens_per_s"]["plan"] == result.tokens_per_s
    assert document["breakdown_s"]["plan"] == dict(result.breakdown_s)
    assert document["steps"] == 5
    assert set(document["step_time_s"]) == {"contiguous", "plan"}
    assert document["inputs"]["system"] == "h200x4"
    assert document["inputs"]["devices_per_node"] == 2


def test_equal_flags_give_equal_bytes_on_stdout(tmp_path: Path) -> None:
    arguments = flags(tmp_path, "--system", "h200x4", "--json")
    assert moesim(*arguments).out == moesim(*arguments).out


def test_without_a_plan_it_is_contiguous_and_says_so(tmp_path: Path) -> None:
    ran = moesim(*flags(tmp_path, "--system", "h200x3", "--json"))
    assert "no --plan: contiguous placement in 9 slots" in ran.err
    assert list(ran.json()["step_time_s"]) == ["contiguous"]


def test_every_flag_reaches_the_step(tmp_path: Path) -> None:
    base = moesim(*flags(tmp_path, "--system", "h200x4", "--tokens-per-rank", 4, "--json")).json()
    for more in (
        ("--phase", "prefill"),
        ("--tokens-per-rank", 8),
        ("--context", 8192),
        ("--two-batch-overlap",),
        ("--send", "expert"),
        ("--seed", 5),
        ("--steps", 2),
        ("--system", "h800x4"),
    ):
        arguments = ("--system", "h200x4", "--tokens-per-rank", 4, *more, "--json")
        other = moesim(*flags(tmp_path, *arguments)).json()
        assert other["step_time_s"] != base["step_time_s"], more
    local = moesim(
        *flags(tmp_path, "--plan", plan_file(tmp_path), "--replica-rule", "local", "--json")
    ).json()
    assert local["inputs"]["replica_rule"] == "local"


def test_for_people_it_is_a_row_per_component_and_the_figures(tmp_path: Path) -> None:
    ran = moesim(*flags(tmp_path, "--plan", plan_file(tmp_path)))
    assert ran.code == 0, ran.err
    for word in ("attention", "dispatch", "experts", "combine", "step", "contiguous", "plan"):
        assert word in ran.out
    assert "tokens/s" in ran.out
    assert "analytic" in ran.out


def test_a_result_folder_holds_record_table_and_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "deep"
    ran = moesim(*flags(tmp_path, "--plan", plan_file(tmp_path), "-o", folder, "--json"))
    assert ran.code == 0, ran.err
    names = {path.name for path in folder.iterdir()}
    assert names == {"result.json", "table.csv", "rank_load.png", "step_time.png"}
    record = json.loads((folder / "result.json").read_text())
    assert record == ran.json()
    assert {"kinds", "inputs", "versions", "seed"} <= set(record)
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    total = sum(float(row["seconds"]) for row in rows if row["placement"] == "plan")
    assert total == pytest.approx(record["step_time_s"]["plan"])
    assert (folder / "rank_load.png").read_bytes().startswith(b"\x89PNG")


def test_a_timeline_ends_with_the_step(tmp_path: Path) -> None:
    timeline = tmp_path / "step.json"
    more = ("--system", "h200x4", "--steps", 1, "--timeline", timeline, "--json")
    ran = moesim(*flags(tmp_path, *more))
    assert ran.code == 0, ran.err
    events = json.loads(timeline.read_text())["traceEvents"]
    end_us = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
    assert end_us * 1e-6 == pytest.approx(ran.json()["step_time_s"]["contiguous"], abs=1e-9)


def test_counts_run_with_drawn_steps_and_say_what_is_assumed(tmp_path: Path) -> None:
    more = ("--model", config_file(tmp_path), "--system", "h200x4", "--steps", 3)
    ran = moesim("simulate", "--trace", counts_file(tmp_path), *more, "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["kinds"]["max_over_mean"] == "assumed"
    refused(
        moesim("simulate", "--trace", counts_file(tmp_path), *more, "--timeline", tmp_path / "t"),
        "--timeline needs token order",
    )


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    run = ("--system", "h200x4")
    trace = ("simulate", "--trace", trace_file(tmp_path))
    refused(moesim(*trace, *run), "needs the model")
    refused(moesim(*flags(tmp_path)), "--system")
    refused(moesim(*flags(tmp_path, "--system", "h201x4")), "h201")
    refused(moesim(*flags(tmp_path, *run, "--phase", "training")), "'training'")
    refused(moesim(*flags(tmp_path, *run, "--send", "pigeon")), "--send 'pigeon'", "device")
    refused(moesim(*flags(tmp_path, *run, "--replica-rule", "x")), "--replica-rule 'x'")
    refused(moesim(*trace, *run, "--model", "deepseek-v3"), "expected 256")
    plan = plan_file(tmp_path)
    refused(moesim(*flags(tmp_path, "--plan", plan, "--system", "h200x8")), "n_ranks=4")
    refused(moesim(*flags(tmp_path, *run, "--plan", tmp_path / "no.json")), "no.json")
    plan.write_text('{"schema_version": 1}')
    refused(moesim(*flags(tmp_path, *run, "--plan", plan)), "plan.json", "model")


def test_a_plan_of_other_layers_is_refused(tmp_path: Path) -> None:
    other = Placement(np.array([SLOTS], dtype=np.int32), 8, 4, 2)
    plan = plan_file(tmp_path, layers=layers_of(other, (1,), 2))
    refused(moesim(*flags(tmp_path, "--plan", plan)), "1 MoE layers of 8", "has 2 of 8")


def test_nothing_is_written_when_it_cannot_run(tmp_path: Path) -> None:
    out, timeline = tmp_path / "out", tmp_path / "t.json"
    more = ("--system", "h200x4", "--phase", "x", "-o", out, "--timeline", timeline)
    refused(moesim(*flags(tmp_path, *more)))
    assert not out.exists()
    assert not timeline.exists()


def test_a_plan_made_here_runs_without_any_other_flag(tmp_path: Path) -> None:
    """plan placement, then simulate and export of what it wrote."""
    trace = trace_file(tmp_path, replace(small_trace(), model="tiny"))
    config = config_file(tmp_path)
    where = ("--system", "h200x4", "--slots", 12)
    made = moesim("plan", "placement", trace, "--model", config, *where, "-o", tmp_path / "plan")
    assert made.code == 0, made.err
    plan = tmp_path / "plan" / "plan.json"
    ran = moesim("simulate", "--trace", trace, "--model", config, "--plan", plan, "--json")
    assert ran.code == 0, ran.err
    assert ran.json()["step_time_s"]["plan"] <= ran.json()["step_time_s"]["contiguous"]
    sent = moesim("export", plan, "--to", "sglang", "-o", tmp_path / "map.json", "--json")
    assert sent.code == 0, sent.err
    assert (tmp_path / "map.json").is_file()
