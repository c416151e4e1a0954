"""`moesim bench`, `calibrate` and `validate kernels`: from a measurement to its score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.moesim.cli_case import moesim, refused

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


def test_bench_names_an_unknown_operator_and_the_known_ones(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch (extra `kernels`)")
    refused(moesim("bench", "gem", "--out", tmp_path), "'gem'", "cpu_gemm")
