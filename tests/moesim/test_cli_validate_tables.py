"""`moesim validate kernels` and `calibrate` on Parquet tables: laws, refusals, measured error."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hwmodels.devices import load_device
from hwmodels.fitted import store
from hwmodels.fitted.model import Prediction, parts_of, predict
from hwmodels.fitted.scores import CLEAN, Predicted, fit_groups, predict_groups
from hwmodels.fitted.tables import read_tables
from moesim.cli import validate_tables, validate_tables_report
from moesim.report.fit_pictures import fit_pictures
from tests.moesim.cli_case import moesim, refused

KEYS = {
    "rows", "skipped", "mean_abs_pct_error", "median_abs_pct_error", "p90_abs_pct_error",
    "bias_pct", "within_10_pct",
}  # fmt: skip
MORE_KEYS = {"groups", "skew", "fitted_as", "extrapolated", "held_out", "passed", "inputs"}
ROWS = 300


def law_rows(hw: str, kernel: str, seed: int = 0, noise: float = 0.01) -> pd.DataFrame:
    """Products whose seconds are 4 us plus the larger of memory and arithmetic at 80 % each."""
    rng = np.random.default_rng(seed)
    sizes = [512, 1024, 1536, 2048, 3072, 4096, 6144, 8192]
    m, n, k = 2 ** rng.integers(0, 13, ROWS), rng.choice(sizes, ROWS), rng.choice(sizes, ROWS)
    work = {"m": m, "n": n, "k": k, "weight_bits": np.full(ROWS, 16), "activation_bits": m * 0 + 16}
    device = load_device({"h100_sxm": "h100", "h200_sxm": "h200"}[hw])
    parts = parts_of("gemm", device, {name: v.astype(float) for name, v in work.items()})
    moved = parts.memory["memory"] + parts.memory["cache"] / 2
    seconds = 4e-6 + np.maximum(moved, parts.compute["arithmetic"]) / 0.8
    seconds *= np.exp(noise * rng.standard_normal(ROWS))
    return pd.DataFrame(
        {"hw": hw, "framework": "vllm", "version": "1", "gemm_dtype": "bfloat16",
         "kernel_source": kernel, "m": m, "n": n, "k": k, "latency_ms": 1e3 * seconds}
    )  # fmt: skip


def table(path: Path, *frames: pd.DataFrame) -> Path:
    pd.concat(frames).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """h100.parquet, two kernels, and h200.parquet, one of them by other sizes."""
    made = tmp_path_factory.mktemp("tables")
    table(made / "h100.parquet", law_rows("h100_sxm", "torch"), law_rows("h100_sxm", "cutlass", 1))
    table(made / "h200.parquet", law_rows("h200_sxm", "torch", 2))
    return made


@pytest.fixture(scope="module")
def calibrated(folder: Path) -> tuple[Path, dict]:
    out = folder / "fits" / "h100.npz"
    out.parent.mkdir()
    ran = moesim("calibrate", "--data", folder / "h100.parquet", "-o", out, "--no-check", "--json")
    return out, ran.json()


def score(*arguments: object) -> dict:
    ran = moesim("validate", "kernels", *arguments, "--json")
    assert ran.code == 0, ran.err
    return ran.json()


def test_rows_of_a_known_law_are_predicted_from_other_shapes_within_its_noise(
    folder: Path,
) -> None:
    found = score("--data", folder / "h200.parquet", "--apart", "shape")
    assert set(found) >= KEYS | MORE_KEYS
    assert found["rows"] == ROWS
    assert found["held_out"] == "other shapes of the same kernel and device"
    assert found["fitted_as"] == []
    assert 0.3 < found["median_abs_pct_error"] < 5  # below the noise would be a leak
    assert found["passed"] is True
    assert set(found["groups"]["device h200"]) == KEYS - {"skipped"}


def test_unasked_the_shipped_fits_predict_but_never_one_of_tables_that_are_held_back(
    folder: Path,
) -> None:
    found = score("--data", folder / "h200.parquet")
    assert found["held_out"] == "calibrations of h100"  # the H200's own was fitted to such tables
    assert {of["by_device"] for of in found["fitted_as"]} == {"h100"}
    own = score("--data", folder / "h200.parquet", "--shipped")
    assert own["held_out"] == "calibrations of h200"


def test_a_table_that_the_shipped_fits_saw_is_scored_by_shapes_kept_apart(shared: Path) -> None:
    found = score("--data", shared / "measured" / "calibration-context_mla.parquet")
    assert found["held_out"] == "other shapes of the same kernel and device"


def test_a_fit_on_one_device_predicts_another_and_says_so(folder: Path) -> None:
    found = score("--data", folder / "h200.parquet", "--fit", folder / "h100.parquet")
    assert found["held_out"] == "fitted on h100.parquet"
    assert found["extrapolated"]["other_device"]["rows"] == ROWS
    assert "other_kernel" not in found["extrapolated"]
    (by,) = found["fitted_as"]
    assert (by["by_device"], by["by_kernel"]) == ("h100", by["kernel"])
    assert found["mean_abs_pct_error"] < 10
    files = found["inputs"]["files"]
    assert set(files["data"]) == {"h200.parquet"}
    assert len(files["fit"]["h100.parquet"]) == 64


def test_only_the_kernels_that_speak_are_fitted_and_the_answer_is_that_of_all(
    folder: Path,
) -> None:
    paths = [folder / "h200.parquet"], [folder / "h100.parquet"]
    outcome = validate_tables.run(validate_tables.Wish(*paths))
    groups, fit = read_tables(paths[0]).groups, read_tables(paths[1]).groups
    (expected,) = predict_groups(fit_groups(fit, load_device), groups, load_device)
    (found,) = outcome.predicted
    assert found.fitted_as == expected.fitted_as
    np.testing.assert_array_equal(found.prediction.seconds, expected.prediction.seconds)
    np.testing.assert_array_equal(found.prediction.extrapolated, expected.prediction.extrapolated)


def test_a_kernel_that_was_not_fitted_is_predicted_by_its_relative_and_named(
    folder: Path, tmp_path: Path
) -> None:
    data = table(tmp_path / "new.parquet", law_rows("h100_sxm", "unheard_of", 3))
    ran = moesim("validate", "kernels", "--data", data, "--fit", folder / "h100.parquet")
    assert "Kernels that were not measured before" in ran.out
    assert "unheard_of" in ran.out
    assert "predicted by another kernel" in ran.out
    assert "predicted from another device" not in ran.out


def test_sizes_beyond_the_fitted_ones_are_counted_apart(folder: Path, tmp_path: Path) -> None:
    rows = law_rows("h100_sxm", "torch", 4)
    rows.loc[:9, "n"] = 200_000
    found = score("--data", table(tmp_path / "big.parquet", rows), "--fit", folder / "h100.parquet")
    outside, inside = (found["extrapolated"][f"{side}_range"] for side in ("outside", "inside"))
    assert outside["rows"] >= 10
    assert outside["rows"] + inside["rows"] == ROWS
    assert outside["mean_abs_pct_error"] > inside["mean_abs_pct_error"]


def test_a_perfect_model_scores_zero_and_a_constant_factor_is_all_bias(folder: Path) -> None:
    group = read_tables([folder / "h100.parquet"]).groups[0]
    for factor, error in ((1.0, 0.0), (1.2, 20.0)):
        answer = Prediction(factor * group.seconds, np.zeros(ROWS, np.bool_))
        outcome = validate_tables.Outcome(
            [Predicted(group, answer, f"h100: {group.kernel}")],
            [answer.extrapolated], {"no time": 2}, "", {},
        )  # fmt: skip
        found = validate_tables_report.document(outcome)
        for key in ("mean_abs_pct_error", "median_abs_pct_error", "bias_pct"):
            assert found[key] == pytest.approx(error, abs=1e-9)
        assert (found["skipped"], found["skipped_why"]) == (2, {"no time": 2})
        assert sum(of["rows"] for n, of in found["groups"].items() if n.startswith("tokens")) == (
            ROWS
        )


def test_a_file_that_is_fitted_may_not_be_scored_even_as_a_copy(
    folder: Path, tmp_path: Path
) -> None:
    data = folder / "h100.parquet"
    refused(moesim("validate", "kernels", "--data", data, "--fit", data), "h100.parquet")
    copy = tmp_path / "other-name.parquet"
    copy.write_bytes(data.read_bytes())
    refused(moesim("validate", "kernels", "--data", data, "--fit", copy), "other-name", "h100")


def test_a_calibration_that_saw_the_rows_is_not_taken_for_a_held_out_score(
    folder: Path, calibrated: tuple[Path, dict], tmp_path: Path
) -> None:
    out, _ = calibrated
    seen = score("--data", folder / "h100.parquet", "--calibration", out)
    assert seen["held_out"].startswith("not held out: ")
    assert "very files" in seen["held_out"]
    other = tmp_path / "h100.parquet"
    table(other, law_rows("h100_sxm", "torch", 5))
    assert "that name" in score("--data", other, "--calibration", out)["held_out"]
    unseen = score("--data", folder / "h200.parquet", "--calibration", out)
    assert unseen["held_out"] == "calibrations of h100"


def test_shipped_fits_are_used_and_their_absence_is_one_line(
    folder: Path, calibrated: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store, "SHIPPED", calibrated[0].parent)
    store.shipped.cache_clear()
    found = score("--data", folder / "h200.parquet", "--shipped")
    assert found["held_out"] == "calibrations of h100"
    monkeypatch.setattr(store, "SHIPPED", tmp_path)
    store.shipped.cache_clear()
    refused(moesim("validate", "kernels", "--data", folder / "h200.parquet", "--shipped"), "npz")


def test_a_calibration_file_gives_back_the_fit_of_every_kernel(
    folder: Path, calibrated: tuple[Path, dict]
) -> None:
    out, answer = calibrated
    (of_file,) = answer["files"]
    assert (of_file["kernels"], of_file["fitted_rows"]) == (2, 2 * ROWS)
    assert of_file["held_out"] == {}
    assert of_file["bytes"] == out.stat().st_size
    fitted = store.load(out)
    data = read_tables([folder / "h100.parquet"])
    assert fitted.data_sha256 == data.sha256
    by_name = {group.kernel: group for group in data.groups}
    for model in fitted.models:
        group = by_name[model.kernel]
        errors = predict(model, load_device("h100"), group.work).seconds / group.seconds - 1
        assert np.median(np.abs(errors)) < 0.03


def test_calibrate_writes_a_file_for_each_device_with_its_error_on_shapes_kept_apart(
    tmp_path: Path,
) -> None:
    frames = [law_rows(hw, "torch").head(120) for hw in ("h100_sxm", "h200_sxm")]
    data, out = table(tmp_path / "both.parquet", *frames), tmp_path / "fits"
    refused(moesim("calibrate", "--data", data, "-o", tmp_path / "one.npz"), "h100, h200", "folder")
    ran = moesim("calibrate", "--data", data, "-o", out)
    assert ran.code == 0, ran.err
    assert "gemm" in ran.out
    for name in ("h100", "h200"):
        fitted = store.load(out / f"{name}.npz")
        assert fitted.device == name
        assert 0 < fitted.held_out["gemm"] < 10
        assert fitted.models[0].error_pct < fitted.models[0].p90_pct


def test_rows_and_tables_do_not_mix_and_flags_of_one_are_refused_for_the_other(
    folder: Path, tmp_path: Path
) -> None:
    rows, data = tmp_path / "rows.jsonl", folder / "h200.parquet"
    rows.write_text('{"schema": 1}\n')
    for command in (("calibrate", "-o", tmp_path / "o"), ("validate", "kernels")):
        refused(moesim(*command, "--data", rows, "--data", data), "h200.parquet", "rows.jsonl")
    refused(moesim("validate", "kernels", "--data", rows, "--shipped"), "--shipped")
    refused(moesim("validate", "kernels", "--data", rows, "--fit", rows), "--fit")
    refused(moesim("calibrate", "--data", rows, "--no-check"), "--no-check")
    refused(moesim("validate", "kernels", "--data", data, "--apart", "row"), "--apart", "model")
    refused(moesim("validate", "kernels", "--data", data, "--kernels", "few"), "clean")
    both = ("--shipped", "--fit", folder / "h100.parquet")
    refused(moesim("validate", "kernels", "--data", data, *both), "--fit and --shipped")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda rows: rows.drop(columns="kernel_source"), "kernel_source"),
        (lambda rows: rows.drop(columns="m"), "bad.parquet"),
        (lambda rows: rows.assign(m="many"), "bad.parquet"),
        (lambda rows: rows.assign(hw="abacus"), "device not in the catalogue"),
        (lambda rows: rows.assign(latency_ms=0.0), "no time"),
        (lambda rows: rows.head(30), "too few rows"),
        (lambda rows: rows.head(0), "no row"),
        (lambda rows: rows.assign(m=-1), "m=-1"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, change, word: str
) -> None:
    path = table(tmp_path / "bad.parquet", change(law_rows("h100_sxm", "torch")))
    refused(moesim("validate", "kernels", "--data", path, "--apart", "shape"), word)
    refused(moesim("calibrate", "--data", path, "-o", tmp_path / "fits"))
    assert not list(tmp_path.rglob("*.npz"))


def test_truncated_missing_and_foreign_files_are_refused_in_one_line(
    folder: Path, tmp_path: Path
) -> None:
    whole, cut = (folder / "h100.parquet").read_bytes(), tmp_path / "cut.parquet"
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 9):
        cut.write_bytes(whole[:size])
        refused(moesim("validate", "kernels", "--data", cut), "cut.parquet")
    refused(moesim("validate", "kernels", "--data", tmp_path / "none.parquet"), "none.parquet")
    wrong = ("--calibration", folder / "h100.parquet")
    refused(moesim("validate", "kernels", "--data", folder / "h200.parquet", *wrong), "h100")


def test_clean_kernels_are_scored_alone_and_the_others_counted(tmp_path: Path) -> None:
    framework, version, dtype, source = CLEAN[0].split(" ")
    clean = law_rows("h100_sxm", source).assign(framework=framework, version=version)
    data = table(tmp_path / "t.parquet", clean, law_rows("h100_sxm", "torch"))
    assert dtype == "bfloat16"
    found = score("--data", data, "--kernels", "clean", "--apart", "model")
    assert found["rows"] == found["groups"]["clean kernels"]["rows"] == ROWS
    assert found["skipped_why"] == {"not a clean kernel": ROWS}
    assert found["held_out"].startswith("other models")


def test_strict_turns_a_bad_score_into_exit_code_1(folder: Path, tmp_path: Path) -> None:
    slow = law_rows("h200_sxm", "torch", 6)
    slow["latency_ms"] *= 1.5
    data = table(tmp_path / "slow.parquet", slow)
    arguments = ("validate", "kernels", "--data", data, "--fit", folder / "h100.parquet")
    assert moesim(*arguments).code == 0
    ran = moesim(*arguments, "--strict")
    assert ran.code == 1
    assert "out of 15 % (median)" in ran.out


def test_a_result_folder_holds_record_table_and_pictures(folder: Path, tmp_path: Path) -> None:
    arguments = ("--data", folder / "h200.parquet", "--fit", folder / "h100.parquet")
    found = score(*arguments, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found
    lines = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert len(lines) == 2 + len(found["groups"])
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["error_by_load.png", "predicted_over_measured.png", "roofline_share.png"]


def test_equal_predictions_give_equal_pictures(folder: Path, tmp_path: Path) -> None:
    group = read_tables([folder / "h100.parquet"]).groups[0]
    answer = Prediction(1.1 * group.seconds, np.zeros(ROWS, np.bool_))
    answer = replace(answer, seconds=np.where(group.tokens < 4, np.nan, answer.seconds))
    of = [Predicted(group, answer, "h100: other shapes")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fit_pictures(of, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_tables_of_the_optional_package_are_read_by_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "aiconfigurator_core" / "systems" / "data" / "h200_sxm" / "gemm" / "v"
    at.mkdir(parents=True)
    (tmp_path / "aiconfigurator_core" / "__init__.py").write_text("")
    rows = law_rows("h200_sxm", "torch").assign(framework="VLLM").drop(columns="hw")
    rows.rename(columns={"latency_ms": "latency"}).to_parquet(at / "gemm_perf.parquet")
    refused(moesim("validate", "kernels", "--data", "aiconfigurator:h20"), "aiconfigurator")
    monkeypatch.syspath_prepend(tmp_path)
    refused(moesim("validate", "kernels", "--data", "aiconfigurator:../x"), "h200_sxm")
    found = score("--data", "aiconfigurator:h200_sxm")
    assert found["rows"] == ROWS
    assert "kernel vllm 1 bfloat16 torch" in found["groups"]
    assert "aiconfigurator_core" not in sys.modules


def test_prefill_of_latent_attention_on_an_unseen_device_is_within_tolerance(
    shared: Path, tmp_path: Path
) -> None:
    """One kernel of context_mla, fitted on H100 and scored on H200; all of it needs minutes."""
    source, paths = "flash_attention", {}
    for part in ("calibration", "validation"):
        rows = pd.read_parquet(shared / "measured" / f"{part}-context_mla.parquet")
        chosen = (rows["kernel_source"] == source) & (rows["kv_cache_dtype"] == "bfloat16")
        paths[part] = table(
            tmp_path / f"{part}.parquet", rows[chosen & rows["hw"].isin(["h100_sxm", "h200_sxm"])]
        )
    found = score("--data", paths["validation"], "--fit", paths["calibration"])
    assert found["rows"] == 880
    assert set(found["groups"]) >= {"device h200", "family latent_prefill", "dtype bfloat16"}
    assert found["mean_abs_pct_error"] < 12  # 5.9 with the fit of all kernels
    assert found["median_abs_pct_error"] < 8
    assert found["mean_abs_pct_error"] > 1  # the tables' noise; less would be a leak
