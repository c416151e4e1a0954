"""Time per output token of measured runs: reading, pricing, the command and the published bar."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from hwmodels.fitted.store import save, shipped
from moesim.cli.validate_end_to_end import end_to_end
from moesim.errors import SimulationError
from moesim.lower.engine_step import Ranks
from moesim.serving_rows import COLUMNS, NOT_AGGREGATED, PIPELINE, read_serving
from moesim.validate import predict_serving, score_serving
from tests.moesim.formula_device import formula_device

MEDIAN_BAR, RANK_BAR, LEAST_ROWS = 15.0, 0.95, 560
RANK_BAR_WITH_QUEUED = 0.92  # short of RANK_BAR: ten runs of unknown concurrency are in it
RUN = {
    "id": "a_tp8_ep8_1", "silicon_data_source": "x", "backend": "vllm", "backend_version": "1",
    "model_path": "Qwen/Qwen3-235B-A22B-FP8", "system": "h200_sxm", "mode": "agg", "isl": "1024",
    "osl": "1024", "gemm_quant_mode": "fp8", "moe_quant_mode": "fp8", "batch_size": "16.0",
    "tp_size": "8.0", "pp_size": "1.0", "attention_dp_size": "1.0", "moe_tp_size": "8.0",
    "moe_ep_size": "1.0", "silicon_ttft_ms": "200", "silicon_tpot_ms": "12.5",
}  # fmt: skip


def written(folder: Path, *changes: dict[str, str]) -> Path:
    path = folder / "runs.csv"
    with path.open("w", newline="") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        lines.writerows([RUN | change for change in changes])
    return path


def read_one(folder: Path, **change: str) -> object:
    return read_serving(written(folder, change)).rows[0]


def test_a_row_becomes_a_load_in_seconds_and_the_checkpoints_formats(tmp_path: Path) -> None:
    row = read_one(tmp_path)
    assert (row.isl, row.osl, row.concurrency, row.tpot_s) == (1024, 1024, 16, 0.0125)
    assert row.checkpoint.experts == "fp8_block"
    assert row.ranks == Ranks(8, 1, 8, 1)


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        (("64", "1", "8", "8"), Ranks(8, 1, 1, 8)),
        (("1", "64", "8", "8"), Ranks(1, 8, 1, 8)),
        (("8", "1", "1", "8"), Ranks(8, 1, 1, 8)),
        (("1", "8", "1", "8"), Ranks(1, 8, 1, 8)),
        (("4", "1", "2", "2"), Ranks(4, 1, 2, 2)),
        (("2", "", "4", "1"), Ranks(2, 2, 4, 1)),
    ],
)
def test_flags_that_the_table_multiplied_are_read_as_they_were_given(
    tmp_path: Path, sizes: tuple[str, ...], ranks: Ranks
) -> None:
    names = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    assert read_one(tmp_path, **dict(zip(names, sizes, strict=True))).ranks == ranks


def test_the_load_generators_concurrency_wins_over_the_batch_of_a_rank(tmp_path: Path) -> None:
    split = {"tp_size": "1", "attention_dp_size": "8", "moe_tp_size": "1", "moe_ep_size": "8"}
    assert read_one(tmp_path, **split).concurrency == 128
    assert read_one(tmp_path, silicon_data_source="silicon_concurrency=48").concurrency == 48


def test_rows_that_cannot_be_priced_are_counted_with_the_reason(tmp_path: Path) -> None:
    path = written(
        tmp_path, {}, {"mode": "disagg"}, {"pp_size": "2"}, {"model_path": "nobody/nothing"},
        {"silicon_ttft_ms": "20000"}, {"moe_tp_size": "3"}, {"backend": "mystery"},
        {"system": "abacus"},
    )  # fmt: skip
    found = predict_serving(read_serving(path), formula_device())
    assert (len(found.rows), sum(found.skipped.values())) == (2, 6)
    assert {NOT_AGGREGATED, PIPELINE} <= set(found.skipped)
    assert [row.queued for row in found.rows] == [False, True]
    reasons = " ".join(found.skipped)
    for told in ("nobody/nothing", "tp 8 x dp 1", "mystery", "abacus"):
        assert told in reasons


@pytest.mark.parametrize(
    ("column", "value"), [("isl", "many"), ("silicon_tpot_ms", "-1"), ("tp_size", "2.5"),
                          ("osl", "inf"), ("batch_size", "")],
)  # fmt: skip
def test_a_cell_that_is_no_size_is_an_error_with_file_row_and_column(
    tmp_path: Path, column: str, value: str
) -> None:
    with pytest.raises(SimulationError, match=rf"runs\.csv: row 2: {column}=") as caught:
        read_serving(written(tmp_path, {column: value}))
    assert "\n" not in str(caught.value)


def test_a_file_without_the_columns_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SimulationError, match=r"other\.csv: column 'id' is missing"):
        read_serving(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SimulationError, match="not a CSV table"):
        read_serving(path)


def test_a_perfect_prediction_scores_no_error_and_full_rank_correlation(tmp_path: Path) -> None:
    loads = ("4", "16", "64")
    found = predict_serving(
        read_serving(written(tmp_path, *({"batch_size": n} for n in loads))), formula_device()
    )
    again = written(tmp_path, *(
        {"batch_size": n, "silicon_tpot_ms": repr(float(1e3 * s))}
        for n, s in zip(loads, found.seconds, strict=True)
    ))  # fmt: skip
    score = score_serving(predict_serving(read_serving(again), formula_device()))
    assert score.overall.mean_abs_pct_error == pytest.approx(0, abs=1e-9)
    assert score.rank_correlation == pytest.approx(1)
    assert score.groups["batch 16"].rows == 1


def test_the_command_writes_one_document_and_a_picture(tmp_path: Path) -> None:
    path, fit = written(tmp_path, {}, {"batch_size": "64"}), tmp_path / "plain.npz"
    save(formula_device(), fit)
    app = typer.Typer()
    app.command()(end_to_end)
    args = ["--data", str(path), "--fitted", str(fit), "--output", str(tmp_path / "out"), "--json"]
    ran = CliRunner().invoke(app, args)
    assert ran.exit_code == 0, ran.output
    record = json.loads(ran.stdout)
    assert (record["rows"], record["fitted_on"], record["extrapolated"]) == (2, "h100", 2)
    assert {"skipped", "skipped_why", "median_abs_pct_error", "rank_correlation"} <= set(record)
    assert (tmp_path / "out" / "predicted_over_measured.png").stat().st_size > 5000
    table = CliRunner().invoke(app, args[:-1])
    assert "rank correlation" in table.stdout


def test_published_runs_are_within_the_bar(shared: Path) -> None:
    """H100 operators on the run's datasheet; no run, and no operator of the H200, was fitted."""
    fitted = shipped("h100")
    assert fitted is not None
    found = predict_serving(read_serving(shared / "measured/validation-e2e_serving.csv"), fitted)
    score = score_serving(found)
    assert len(found.rows) >= LEAST_ROWS
    assert score.overall.median_abs_pct_error <= MEDIAN_BAR
    assert score.steady_rank_correlation >= RANK_BAR
    assert score.rank_correlation >= RANK_BAR_WITH_QUEUED
    assert np.isfinite(found.seconds).all()
