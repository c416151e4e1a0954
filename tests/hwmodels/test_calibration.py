"""Calibration: constants come back from rows made by the formula; unseen rows are scored alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import calibration
from hwmodels.calibration_fit import fit, seconds, work_of
from hwmodels.calibration_rows import Row, Rows, read_rows
from hwmodels.errors import HardwareError

TRUE = {"p": 2.0, "fixed_s": 2e-5, "bytes_per_s": 2e10, "flop_per_s": 5e10}
SIZES = ((768, 2048), (2048, 768), (4096, 2048), (1408, 2048), (2048, 2048), (512, 512))
ROWS_OF_X = (2, 4, 8, 16, 32, 64)


def line(m: int = 8, n: int = 768, k: int = 2048, median: float = 100.0, **changes: object) -> dict:
    row = {
        "schema": 1,
        "op": "cpu_gemm",
        "key": f"{m}-{n}-{k}",
        "device": {"name": "test cpu", "cores": 2},
        "sw": {"torch": "0"},
        "kernel": {"source": "torch.linear", "config": {}},
        "shape": {"m": m, "n": n, "k": k, "threads": 2},
        "dtype": {"w": "bf16", "a": "bf16"},
        "routing": {},
        "method": {},
        "lat_us": {"median": median, "p10": median * 0.9, "p90": median * 1.1, "n": 9},
        "telemetry": {"load_average": 0.0},
        "derived": {"bytes": 2 * n * k, "flops": 2 * m * n * k},
        "check": {},
        "ok": True,
        "why": "",
    }
    return row | changes


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def rows_by_formula(folder: Path, true: dict[str, float] = TRUE, noise: float = 0.0) -> Rows:
    rows = read_rows([write(folder / "a.jsonl", [line(m, *s) for m in ROWS_OF_X for s in SIZES])])
    exact = seconds(true, work_of(rows.rows))
    shaken = exact * np.exp(noise * np.random.default_rng(0).normal(size=len(exact)))
    made = [replace(row, seconds=float(t)) for row, t in zip(rows.rows, shaken, strict=True)]
    return replace(rows, rows=tuple(made))


@settings(max_examples=12, deadline=None)
@given(
    bandwidth=st.floats(5e9, 1e11), intensity=st.floats(2.0, 10.0), fixed_us=st.floats(20.0, 200.0)
)
def test_a_fit_to_rows_made_by_the_formula_gives_back_its_constants(
    tmp_path_factory: pytest.TempPathFactory, bandwidth: float, intensity: float, fixed_us: float
) -> None:
    true = TRUE | {
        "bytes_per_s": bandwidth,
        "flop_per_s": bandwidth * intensity,
        "fixed_s": fixed_us * 1e-6,
    }
    rows = rows_by_formula(tmp_path_factory.mktemp("rows"), true).rows
    found = fit(rows)
    for name, value in true.items():
        assert found[name] == pytest.approx(value, rel=0.15), name
    assert seconds(found, work_of(rows)) == pytest.approx([r.seconds for r in rows], rel=0.02)


def expert_row(counts: list[int]) -> dict:
    hidden, inter = 1024, 512
    chosen, weights = sum(counts), len(counts) * 6 * hidden * inter
    return line(
        op="cpu_experts",
        key=str(counts),
        shape={"tokens": chosen, "hidden": hidden, "inter": inter, "experts": 8, "threads": 1},
        routing={"dist": "drawn", "counts": counts},
        derived={"bytes": weights + chosen * 4 * hidden, "flops": 6 * chosen * hidden * inter},
    )


def test_an_idle_expert_costs_nothing_and_each_busy_one_reads_its_weights(tmp_path: Path) -> None:
    lines = [expert_row([4, 4]), expert_row([4, 0, 4]), expert_row([8]), expert_row([1])]
    rows = read_rows([write(tmp_path / "e.jsonl", lines)]).rows
    slow_memory = TRUE | {"one_row_bytes_per_s": 1e9, "bytes_per_s": 1e9, "flop_per_s": 1e15}
    two, with_idle, one, single = seconds(slow_memory, work_of(rows))
    # The row with an idle expert says one more expert was read than was; the bytes are its word.
    assert len(rows[1].rows) == len(rows[0].rows) == 2
    assert two < with_idle
    assert two - TRUE["fixed_s"] == pytest.approx(2 * (one - TRUE["fixed_s"]), rel=0.01)
    assert single < one


def test_more_reads_in_flight_never_make_one_slower_and_the_pipe_bounds_them() -> None:
    constants = {
        "p": 2.0, "fixed_s": 1e-4, "piece_s": 1e-6, "bytes_per_s": 1e9, "pipe_bytes_per_s": 3e9,
    }  # fmt: skip
    one = np.array([1e6])
    rows = [
        Row(("d", "nvme_read"), "", "", 1.0, 1.0, one, one, np.zeros(1), in_flight=float(depth))
        for depth in (1, 2, 4, 64)
    ]
    taken = seconds(constants, work_of(rows))
    assert (np.diff(taken) < 0).all()
    assert taken[-1] > 1e6 / 3e9


def test_rows_of_a_shape_kept_apart_are_not_fitted_and_are_predicted_well(tmp_path: Path) -> None:
    rows = rows_by_formula(tmp_path, noise=0.03)
    done = calibration.calibrate(rows, held_out_share=0.3, seed=1)
    apart = [row for row in rows.rows if row.identity not in done.fitted]
    assert len({row.shape for row in apart}) == 2
    assert not {row.shape for row in apart} & {
        row.shape for row in rows.rows if row.identity in done.fitted
    }
    scores = calibration.score(done, rows)
    assert scores.overall.rows == len(apart)
    assert scores.skipped == {"fitted": len(done.fitted)}
    assert scores.overall == done.held_out
    assert scores.overall.median_abs_pct_error < 6


def test_cross_validation_scores_each_row_once_and_finds_a_wrong_shape(tmp_path: Path) -> None:
    rows = rows_by_formula(tmp_path)
    good = calibration.cross_validate(rows)
    assert good.overall.rows == len(rows.rows)
    assert good.overall.p90_abs_pct_error < 3
    odd = rows.rows[0].shape
    wrong = [replace(r, seconds=3 * r.seconds) if r.shape == odd else r for r in rows.rows]
    bad = calibration.cross_validate(replace(rows, rows=tuple(wrong)))
    # What a shape measured cannot leak into its own prediction: all its rows stay 3 times off.
    assert bad.overall.p90_abs_pct_error > 60


def test_noisy_and_failed_rows_are_counted_not_fitted(tmp_path: Path) -> None:
    noisy = {"median": 100.0, "p10": 10.0, "p90": 900.0, "n": 9}
    lines = [line(m, *s, median=50.0 * m) for m in ROWS_OF_X for s in SIZES]
    lines += [line(3, lat_us=noisy), line(5, ok=False, why="out of memory", lat_us=None)]
    lines.append(line(7, telemetry={"disturbed": True}))
    scores = calibration.cross_validate(read_rows([write(tmp_path / "a.jsonl", lines)]))
    assert scores.skipped == {"failed": 1, "noisy": 1, "disturbed": 1}


def test_a_calibration_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    rows = rows_by_formula(tmp_path)
    done = calibration.calibrate(rows)
    calibration.save(done, tmp_path / "c.json")
    again = calibration.load(tmp_path / "c.json")
    assert again == done
    calibration.save(again, tmp_path / "d.json")
    assert (tmp_path / "d.json").read_bytes() == (tmp_path / "c.json").read_bytes()


def test_a_question_beyond_the_data_is_marked_and_an_unknown_kernel_has_no_answer(
    tmp_path: Path,
) -> None:
    rows = rows_by_formula(tmp_path)
    done = calibration.calibrate(rows, held_out_share=0)
    lines = [line(8), line(8, 40960, 2048), line(8, kernel={"source": "another"})]
    asked = read_rows([write(tmp_path / "q.jsonl", lines)]).rows
    answer = calibration.predict(done, asked)
    assert answer.extrapolated.tolist() == [False, True, False]
    assert np.isnan(answer.seconds).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"speed": 3}, ("a.jsonl:2", "speed", "extra")),
        ({"schema": 2}, ("a.jsonl:2", "schema")),
        ({"ok": None}, ("a.jsonl:2", "ok")),
        ({"lat_us": {"median": -1, "p10": 1, "p90": 1, "n": 1}}, ("a.jsonl:2", "lat_us.median")),
        ({"dtype": {"w": "bf16", "bits": 16}}, ("a.jsonl:2", "dtype.bits")),
        ({"derived": {"bytes": float("nan")}}, ("a.jsonl:2", "derived.bytes")),
        ({"routing": {"counts": [-1]}}, ("a.jsonl:2", "routing.counts.0")),
    ],
)
def test_a_bad_row_is_refused_by_file_line_and_field(
    tmp_path: Path, bad: dict, words: tuple[str, ...]
) -> None:
    path = write(tmp_path / "a.jsonl", [line(), line(16) | bad])
    with pytest.raises(HardwareError) as error:
        read_rows([path])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", "null", '{"schema": 1', "[" * 100_000])
def test_a_line_that_is_no_row_is_refused_by_its_number(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line()) + "\n" + text + "\n")
    with pytest.raises(HardwareError, match=r"a\.jsonl:2"):
        read_rows([path])


def test_rows_of_two_devices_are_not_one_calibration(tmp_path: Path) -> None:
    lines = [line(2), line(4, device={"name": "another"})]
    with pytest.raises(HardwareError, match="2 devices"):
        calibration.calibrate(read_rows([write(tmp_path / "a.jsonl", lines)]))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["groups"][0]["constants"].update(p=-1), "p=-1"),
        (lambda d: d["groups"][0]["constants"].pop("fixed_s"), "fixed_s"),
        (lambda d: d.update(kind="plan"), "kind"),
    ],
)
def test_a_damaged_calibration_is_refused_by_field(tmp_path: Path, change, word: str) -> None:
    calibration.save(calibration.calibrate(rows_by_formula(tmp_path)), tmp_path / "c.json")
    document = json.loads((tmp_path / "c.json").read_text())
    change(document)
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(HardwareError, match=word):
        calibration.load(tmp_path / "c.json")


def test_shapes_not_fitted_of_a_measured_cpu_are_predicted_within_15_percent() -> None:
    results = Path(__file__).parents[2] / "kernels" / "results" / "cpu-amd-epyc-2-cores"
    rows = read_rows([results])
    scores = calibration.cross_validate(rows)
    assert scores.overall.rows + sum(scores.skipped.values()) == len(rows.rows) + rows.failed
    assert scores.overall.rows > 150
    assert scores.overall.median_abs_pct_error < 15
    assert abs(scores.overall.bias_pct) < 5
