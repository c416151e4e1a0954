"""`moesim plan placement`, `export` and `demo`: what scripts rely on, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planners.planfile import read_plan
from tests.moesim.cli_case import (
    config_file,
    counts_file,
    moesim,
    refused,
    small_trace,
    trace_file,
)
from traces import parquet

KEYS = {"max_over_mean", "step_time_s", "lower_bound", "gap", "verdict", "solve_seconds"}
PLACEMENTS = {"contiguous", "eplb_hierarchical", "eplb_global", "plan"}


def flags(folder: Path, *more: object) -> tuple[object, ...]:
    common = (trace_file(folder), "--model", config_file(folder), "--system", "h200x4")
    return ("plan", "placement", *common, "--slots", 12, "--tokens-per-rank", 8, *more)


def test_the_document_has_every_key_that_scripts_rely_on(tmp_path: Path) -> None:
    ran = moesim(*flags(tmp_path, "--json"))
    assert ran.code == 0
    document = ran.json()
    assert set(document) >= KEYS
    for key in ("max_over_mean", "step_time_s"):
        assert set(document[key]) >= PLACEMENTS
    assert document["verdict"] in ("deploy", "not_worth_it")
    assert document["lower_bound"] <= document["max_over_mean"]["plan"] * (1 + 1e-9)
    assert document["gap"] >= -1e-9
    assert document["gain"]["contiguous"]["low"] <= document["gain"]["contiguous"]["high"]


def test_equal_requests_give_equal_documents_but_for_the_clock(tmp_path: Path) -> None:
    documents = [moesim(*flags(tmp_path, "--json")).json() for _ in range(2)]
    for document in documents:
        document.pop("solve_seconds")
    assert documents[0] == documents[1]


def test_the_folder_holds_plan_record_table_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert moesim(*flags(tmp_path, "-o", out)).code == 0
    names = {path.name for path in out.iterdir()}
    pictures = {"rank_load.png", "step_time.png"}
    assert names == {"plan.json", "result.json", "table.csv", "report.html", *pictures}
    plan = read_plan(out / "plan.json")
    assert plan.placement().n_slots == 12
    record = json.loads((out / "result.json").read_text())
    assert plan.figures["step_time_s"] == record["step_time_s"]
    assert record["inputs"]["planned_sha256"] != record["inputs"]["judged_sha256"]


def test_counts_are_judged_on_themselves_and_the_output_says_so(tmp_path: Path) -> None:
    common = ("--model", config_file(tmp_path), "--system", "h200x4", "--slots", 12)
    ran = moesim("plan", "placement", counts_file(tmp_path), *common)
    assert ran.code == 0
    assert "the same counts it was planned on" in ran.out
    assert "Not priced: which experts a token chooses together" in ran.out


def test_another_file_can_be_the_judge(tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    parquet.write(small_trace(seed=5), other)
    ran = moesim(*flags(tmp_path, "--judge", other, "--json"))
    assert ran.json()["judged_on"].startswith("600 tokens")
    assert ran.json()["gain_surviving_share"] is not None


def test_an_even_load_is_not_worth_a_plan_and_strict_says_so_by_exit_code(
    tmp_path: Path,
) -> None:
    base = small_trace(2400)
    rng = np.random.default_rng(0)
    even = np.argsort(rng.random((2400, 2, 8)), axis=2)[:, :, :2].astype(np.int16)
    path = trace_file(tmp_path, replace(base, topk=even))
    common = ("--model", config_file(tmp_path), "--system", "h200x4", "--slots", 8)
    ran = moesim("plan", "placement", path, *common, "--strict", "--json")
    assert ran.code == 1
    assert ran.json()["verdict"] == "not_worth_it"


def test_a_plan_can_be_compared_with_the_plan_that_runs_today(tmp_path: Path) -> None:
    out = tmp_path / "first"
    moesim(*flags(tmp_path, "-o", out))
    again = moesim(*flags(tmp_path, "--current", out / "plan.json", "--json")).json()
    assert again["compared_with"] == "current"
    assert again["migration"]["moved_slots"] == 0
    assert again["verdict"] == "not_worth_it"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (("--slots", 13), ("slots=13", "ranks=4", "12 and 16")),
        (("--slots", 4), ("slots=4", "8 experts", "4 short")),
        (("--nodes", 3), ("--nodes 3", "4 ranks")),
        (("--ranks", 8), ("--ranks 8", "h200x4", "4 devices")),
        (("--send", "rack"), ("'rack'", "device, expert, node")),
        (("--replica-rule", "near"), ("'near'", "even, local")),
        (("--phase", "idle"), ("'idle'",)),
        (("--current", "best"), ("'best'", "contiguous")),
        (("--split", "luck"), ("'luck'", "request")),
        (("--judge", "missing.parquet"), ("missing.parquet",)),
        (("--node-limited", "--nodes", 2), ("groups=1", "nodes=2")),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    tmp_path: Path, changed: tuple[object, ...], words: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    refused(moesim(*flags(tmp_path, "-o", out, *changed)), *words)
    assert not out.exists()


def test_on_one_node_a_node_limit_changes_nothing(tmp_path: Path) -> None:
    limited = moesim(*flags(tmp_path, "--node-limited", "--json")).json()
    free = moesim(*flags(tmp_path, "--json")).json()
    assert limited["step_time_s"]["plan"] == free["step_time_s"]["plan"]


def test_unknown_models_and_devices_are_refused_with_the_near_ones(tmp_path: Path) -> None:
    trace = trace_file(tmp_path)
    command = ("plan", "placement", trace, "--slots", 12)
    refused(moesim(*command, "--model", "mixtral-8x7", "--system", "h200x4"), "mixtral-8x7b")
    config = config_file(tmp_path)
    refused(moesim(*command, "--model", config, "--system", "h20x0x4"), "h20")
    refused(moesim(*command, "--model", config), "--system")


def test_a_trace_of_another_model_is_refused_by_its_numbers(tmp_path: Path) -> None:
    command = ("plan", "placement", trace_file(tmp_path), "--model", "mixtral-8x7b")
    refused(moesim(*command, "--system", "h200x4", "--slots", 12), "small.parquet", "all 32")


def test_export_writes_sglangs_file_and_says_how_to_launch(tmp_path: Path) -> None:
    moesim(*flags(tmp_path, "-o", tmp_path / "out"))
    target = tmp_path / "map.json"
    ran = moesim("export", tmp_path / "out" / "plan.json", "--to", "sglang", "-o", target)
    assert ran.code == 0
    assert "--ep-num-redundant-experts 4" in ran.out
    table = json.loads(target.read_text())["physical_to_logical_map"]
    assert np.array(table).shape == (2, 12)


def test_export_refuses_engines_and_files_it_does_not_know(tmp_path: Path) -> None:
    moesim(*flags(tmp_path, "-o", tmp_path / "out"))
    plan = tmp_path / "out" / "plan.json"
    refused(moesim("export", plan, "--to", "abacus", "-o", tmp_path / "x.json"), "abacus", "sglang")
    broken = tmp_path / "broken.json"
    broken.write_text(plan.read_text()[:-20])
    refused(moesim("export", broken, "--to", "sglang", "-o", tmp_path / "x.json"), "broken.json")
    assert not (tmp_path / "x.json").exists()


def test_demo_goes_the_whole_way_and_times_every_part(tmp_path: Path) -> None:
    ran = moesim("demo", "-o", tmp_path / "demo")
    assert ran.code == 0
    assert "What took how long" in ran.out
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"plan.json", "sglang.json", "report.html", "stats.json", "step.trace.json"} <= names
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Verdict" in page
    assert "rank_load.png" in page
    record = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert len(record["demo_seconds"]) == 6


@pytest.mark.needs_shared
def test_plans_of_one_text_domain_say_how_much_of_the_gain_survives_on_another(
    shared: Path,
) -> None:
    law, intent = (shared / "traces" / f"deepseek-v2-lite-{d}.npz" for d in ("law", "intent"))
    command = ("plan", "placement", law, "--judge", intent, "--system", "h800x8", "--slots", 72)
    document = moesim(*command, "--json").json()
    assert document["gain_on_planned_part"]["mean"] > 0.05
    assert document["gain_surviving_share"] < 0.8


@pytest.mark.needs_shared
@pytest.mark.parametrize("form", [(), ("--node-limited",)])
def test_a_plan_for_deepseek_v3_goes_from_recorded_counts_to_sglangs_file(
    shared: Path, tmp_path: Path, form: tuple[str, ...]
) -> None:
    dump = shared / "raw" / "sglang-logical-count-decode_in2000out100.json"
    mine, target = tmp_path / "mine.parquet", tmp_path / "placement.json"
    assert moesim("trace", "import", dump, "-o", mine, "--model", "deepseek-v3").code == 0
    cluster = ("--system", "h800x64", "--slots", 320, "--steps", 2)
    ran = moesim("plan", "placement", mine, *cluster, *form, "-o", tmp_path, "--json")
    assert ran.code == 0
    assert moesim("export", tmp_path / "plan.json", "--to", "sglang", "-o", target).code == 0
    table = np.array(json.loads(target.read_text())["physical_to_logical_map"])
    assert table.shape == (61, 320)
    document, layers = ran.json(), ran.json()["per_layer"]["max_over_mean"]
    incumbents = ("eplb_hierarchical",) if form else ("eplb_hierarchical", "eplb_global")
    for name in incumbents:
        assert (np.array(layers["plan"]) <= np.array(layers[name]) * (1 + 1e-9)).all()
        assert document["step_time_s"]["plan"] <= document["step_time_s"][name]
    assert document["node_limited"]["gap"] < 0.02
