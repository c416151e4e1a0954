"""`moesim bench`, `calibrate` and `validate kernels`: from a measurement to its score."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import bench as bench_command
from tests.moesim.cli_case import counts_file, moesim, refused, small_trace, trace_file

KEYS = {
    "rows", "skipped", "mean_abs_pct_error", "median_abs_pct_error", "p90_abs_pct_error",
    "bias_pct", "within_10_pct",
}  # fmt: skip


def rows_file(folder: Path, noise: float) -> Path:
    """Rows whose seconds follow bytes over 10 GB/s plus 20 us, off by a drawn factor."""
    rng = np.random.default_rng(0)
    lines = []
    for n in (512, 768, 1024, 1408, 2048, 3072):
        for m in (2, 4, 8, 16, 32):
            n_bytes, flops = 4 * n * 1024, 2 * m * n * 1024
            median = (20 + n_bytes / 1e4 + flops / 5e4) * float(np.exp(noise * rng.normal()))
            lines.append(
                {
                    "schema": 1, "op": "cpu_gemm", "key": f"{m}-{n}",
                    "device": {"name": "test cpu"}, "sw": {}, "kernel": {"source": "t"},
                    "shape": {"m": m, "n": n, "k": 1024, "threads": 1}, "dtype": {"w": "fp32"},
                    "lat_us": {"median": median, "p10": median, "p90": median, "n": 5},
                    "derived": {"bytes": n_bytes, "flops": flops}, "ok": True,
                }
            )  # fmt: skip
    path = folder / "cpu_gemm.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rows_become_a_calibration_that_predicts_the_shapes_kept_apart(tmp_path: Path) -> None:
    data, out = rows_file(tmp_path, 0.02), tmp_path / "c.json"
    done = moesim("calibrate", "--data", data, "-o", out, "--json").json()
    assert done["groups"] == 1
    scored = moesim("validate", "kernels", "--data", data, "--calibration", out, "--json").json()
    assert scored["rows"] == done["held_out"]["rows"] == 30 - done["fitted_rows"]
    assert scored["skipped_why"] == {"fitted": done["fitted_rows"]}
    assert scored["median_abs_pct_error"] < 5
    assert scored["passed"] is True


def test_validate_has_the_promised_keys_for_all_rows_and_for_each_group(tmp_path: Path) -> None:
    scored = moesim("validate", "kernels", "--data", rows_file(tmp_path, 0.02), "--json").json()
    assert set(scored) >= KEYS | {"groups", "held_out"}
    assert scored["rows"] == 30
    assert set(scored["groups"]["cpu_gemm fp32"]) == KEYS - {"skipped"}
    assert "five parts" in scored["held_out"]


def test_out_of_tolerance_is_exit_code_1_only_when_strict(tmp_path: Path) -> None:
    arguments = ("validate", "kernels", "--data", rows_file(tmp_path, 0.3), "--tolerance", "2")
    assert moesim(*arguments).code == 0
    ran = moesim(*arguments, "--strict")
    assert ran.code == 1
    assert "out of 2 %" in ran.out


def test_tables_name_the_device_and_every_group(tmp_path: Path) -> None:
    data = rows_file(tmp_path, 0.02)
    shown = moesim("calibrate", "--data", tmp_path, "-o", tmp_path / "c.json").out
    assert "test cpu" in shown
    assert "kept apart" in shown
    assert "cpu_gemm fp32" in moesim("validate", "kernels", "--data", data).out


def test_bad_rows_and_a_missing_file_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"schema": 1}\n')
    refused(moesim("calibrate", "--data", bad, "-o", tmp_path / "c.json"), "bad.jsonl:1")
    refused(moesim("validate", "kernels", "--data", tmp_path / "none.jsonl"), "none.jsonl")
    (tmp_path / "empty").mkdir()
    refused(moesim("validate", "kernels", "--data", tmp_path / "empty"), "no .jsonl file")
    assert not (tmp_path / "c.json").exists()


def test_bench_measures_here_and_the_second_time_finds_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch (extra `kernels`)")
    out = tmp_path / "rows"
    arguments = ("bench", "cpu_gemv", "copy", "--out", out, "--json", "--minutes", "0.02")
    first = moesim(*arguments)
    done = first.json()
    assert done["measured"] >= 1
    assert done["left"] > 0
    assert done["files"] == ["cpu_gemv.jsonl"] or "copy" not in done["skipped"]
    assert len((out / "cpu_gemv.jsonl").read_text().splitlines()) == done["measured"]
    assert moesim(*arguments).json()["reused"] == done["measured"]


def experts_row(kernel: str, weights: str, tokens: int, median: float, **facts: object) -> str:
    row = {
        "schema": 1, "op": "cpu_experts", "key": f"{kernel} {weights} {tokens}",
        "device": {"name": "test cpu"}, "sw": {"torch": "2.0"}, "kernel": {"source": kernel},
        "shape": {"tokens": tokens, "topk": 2, "experts": 8, "hidden": 64, "threads": 1},
        "dtype": {"w": weights, "a": "bf16"}, "routing": {"dist": "balanced", "seed": 0},
        "lat_us": {"median": median, "p10": median, "p90": median, "n": 5},
        "derived": {"bytes": 1000 * tokens, "flops": 5000 * tokens}, "ok": True,
    }  # fmt: skip
    return json.dumps(row | facts) + "\n"


def compared_rows(folder: Path) -> Path:
    """Two bf16 kernels, the second twice as slow; int8 as fast as tokens / 8 to the power -1."""
    lines = [
        experts_row(kernel, weights, tokens, median)
        for tokens in (4, 16, 64)
        for kernel, weights, median in (
            ("torch.loop", "bf16", 10.0), ("torch.grouped", "bf16", 20.0),
            ("torch.loop", "int8", 10.0 * tokens / 32),
        )
    ]  # fmt: skip
    lines.append(experts_row("torch.loop", "int4", 4, 1.0, ok=False, lat_us=None, why="no int4"))
    (folder / "cpu_experts.jsonl").write_text("".join(lines))
    return folder


def test_report_only_compares_the_rows_of_a_folder_and_measures_nothing(tmp_path: Path) -> None:
    out = compared_rows(tmp_path)
    done = moesim("bench", "--report-only", "--out", out, "--json").json()
    assert "measured" not in done
    comparison = done["comparison"]
    assert comparison["left_out"] == {"no int4": 1}
    (run,) = comparison["runs"]
    assert (run["device"], run["rows"]) == ("test cpu", 9)
    by_kernel = {(score["kernel"], score["weights"]): score for score in run["kernels"]}
    assert by_kernel["torch.loop", "bf16"]["over_others"] == pytest.approx(2)
    assert by_kernel["torch.grouped", "bf16"]["close_share"] == 0
    (int8,) = run["formats"]
    assert int8["until"] == pytest.approx(8)  # 32 tokens, 2 of 8 experts each
    assert int8["speedup"]["to 1"] == pytest.approx(8)
    assert max(reach["best"] for reach in run["roofline"]) == pytest.approx(1)
    assert run["roofs"][0]["best_seen"] == ["memory", "bf16"]


def test_the_report_is_three_tables_a_table_file_and_a_picture(tmp_path: Path) -> None:
    out = compared_rows(tmp_path)
    shown = moesim("bench", "--report-only", "--out", out).out
    for words in (
        "test cpu, torch 2.0: 9 rows", "against each other", "Share of the measured roofline",
        "best of these rows", "Weight formats over bf16", "rows left out, no int4: 1",
    ):  # fmt: skip
        assert words in shown
    rows = list(csv.DictReader((out / "kernels.csv").read_text().splitlines()))
    assert len(rows) == 9
    slow = [row for row in rows if row["kernel"] == "torch.grouped"]
    assert [float(row["speed over others"]) for row in slow] == [0.5] * 3
    assert [float(row["load"]) for row in slow] == [1, 4, 16]
    picture = (out / "kernels.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    moesim("bench", "--report-only", "--out", out)
    assert (out / "kernels.png").read_bytes() == picture


def test_report_only_without_rows_is_refused(tmp_path: Path) -> None:
    refused(moesim("bench", "--report-only", "--out", tmp_path), "no .jsonl file")


def stand_in_runner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runner that tells the events below, and keeps what it was called with in seen.json."""
    folder.mkdir()
    events: list[dict[str, object]] = [{"event": "start", "points": 6}]
    for why in ("too large", "CannotMeasurePoint: too large", "no such kernel"):
        events.append({"event": "refused", "op": "gate", "kernel": "k", "why": why})
    events += [{"event": "skip", "op": op, "why": "no GPU"} for op in ("copy", "launch")]
    events.append(
        {
            "event": "end", "measured": 0, "refused": 3, "reused": 0, "left": 0, "seconds": 0.1,
            "skipped": {"copy": "no GPU", "launch": "no GPU"},
        }
    )  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "stand_in_bench.py").write_text(
        "import json, sys, pathlib\nimport numpy as np\n"
        "here = pathlib.Path(__file__).parent\n"
        "topk = np.load(sys.argv[sys.argv.index('--routing') + 1])['topk']\n"
        "seen = {'shape': topk.shape, 'sum': int(topk.sum())}\n"
        "(here / 'seen.json').write_text(json.dumps(seen))\n"
        "sys.stdout.write((here / 'events.jsonl').read_text())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(bench_command, "RUNNER", "stand_in_bench")
    return folder


def test_reasons_are_told_once_with_their_operators_or_their_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_runner(tmp_path / "runner", monkeypatch)
    ran = moesim("bench", "--out", tmp_path / "rows", "--json")
    told = [line for line in ran.err.splitlines() if "assumed" not in line]
    assert told == [
        "copy, launch: no GPU",
        "2 points not measured: too large",
        "1 point not measured: no such kernel",
    ]
    done = ran.json()
    assert done["refused_why"] == {"too large": 2, "no such kernel": 1}
    assert done["comparison"] == {"runs": [], "left_out": {}}
    assert not (tmp_path / "rows" / "kernels.png").exists()


def test_the_runner_is_handed_the_routing_of_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = stand_in_runner(tmp_path / "runner", monkeypatch)
    trace = small_trace()
    assert moesim("bench", "--out", tmp_path, "--routing", trace_file(tmp_path, trace)).code == 0
    seen = json.loads((runner / "seen.json").read_text())
    assert seen == {"shape": list(trace.topk.shape), "sum": int(trace.topk.sum())}
    assert moesim("bench", "--out", tmp_path).code == 0
    seen = json.loads((runner / "seen.json").read_text())
    assert seen["shape"][2] == 4, "the bundled trace"


def test_expert_counts_are_no_routing_to_draw_from(tmp_path: Path) -> None:
    ran = moesim("bench", "--out", tmp_path, "--routing", counts_file(tmp_path))
    refused(ran, "captured routing", "token order")


def test_bench_names_an_unknown_operator_and_the_known_ones(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch (extra `kernels`)")
    refused(moesim("bench", "gem", "--out", tmp_path), "'gem'", "cpu_gemm")
