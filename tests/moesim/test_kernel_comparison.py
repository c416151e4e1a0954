"""Kernels compared: laws of the ratios, exact small cases, and what is never put side by side."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.calibration_rows import RowModel
from moesim.errors import SimulationError
from moesim.report.kernel_comparison import compare, fraction, kernel_scores, peers, reaches, roof
from moesim.report.kernel_formats import (
    ALWAYS,
    NEVER,
    PARTLY,
    crossover,
    format_curves,
    format_scores,
)
from moesim.report.kernel_pictures import kernel_pictures
from moesim.report.kernel_samples import DISTURBED, RANGES, Run, Sample, load_range, samples_of

RUN = Run("test device", (("torch", "2"), ("triton", "3")))
positive = st.floats(1e-6, 1e6)


def sample(
    kernel: str = "a.one", load: float = 1.0, seconds: float = 1.0, **facts: object
) -> Sample:
    base = Sample(
        run=RUN, revision="r1", op="grouped_gemm", kernel=kernel, shape={"hidden": 64},
        fixed="64", dist="balanced, 0", drawn="[]", weights="bf16", activations="bf16", group=0,
        axis="tokens per expert", load=load, seconds=seconds, n_bytes=8.0, flops=2.0,
    )  # fmt: skip
    return replace(base, **facts)


def model(**facts: object) -> RowModel:
    row = {
        "schema": 1, "op": "grouped_gemm",
        "device": {"name": "d"}, "sw": {"torch": "2", "git": "x"},
        "kernel": {"source": "moesim.triton.grouped"}, "dtype": {"w": "int4", "a": "bf16"},
        "shape": {"tokens": 64, "topk": 8, "experts": 128, "hidden": 64},
        "routing": {"dist": "balanced", "seed": 0, "counts": [4] * 128},
        "lat_us": {"median": 5.0, "p10": 5.0, "p90": 5.0, "n": 5},
        "derived": {"bytes": 10, "flops": 20}, "ok": True,
    }  # fmt: skip
    return RowModel.model_validate(row | facts)


def test_a_row_becomes_a_sample_with_its_tokens_per_expert() -> None:
    (found,) = samples_of([model()]).samples
    assert (found.axis, found.load) == ("tokens per expert", 4.0)
    assert found.seconds == pytest.approx(5e-6)
    assert (found.run.device, found.run.software) == ("d", (("torch", "2"),))
    assert found.revision == "x"


def test_rows_that_say_nothing_are_counted_by_reason() -> None:
    failed = model(ok=False, why="CannotMeasurePoint: too large", lat_us=None)
    disturbed = model(telemetry={"disturbed": True})
    found = samples_of([model(), model(), failed, failed, disturbed])
    assert len(found.samples) == 1
    assert found.left_out == {"too large": 2, DISTURBED: 1, "measured again later": 1}


def test_a_size_that_is_no_number_is_refused_by_its_name() -> None:
    with pytest.raises(SimulationError, match=r"shape\.experts=0, expected a positive number"):
        samples_of([model(shape={"tokens": 1, "topk": 1, "experts": 0})])


@given(st.dictionaries(st.sampled_from("abcde"), positive, min_size=2))
def test_the_fastest_kernel_is_the_best_and_only_it_beats_all_others(
    seconds: dict[str, float],
) -> None:
    found = peers([sample(kernel, seconds=s) for kernel, s in seconds.items()])
    assert max(peer.of_best for peer in found) == 1
    for peer in found:
        fastest = peer.sample.seconds == min(seconds.values())
        assert (peer.of_best == 1) is fastest
        assert (peer.over_others >= 1) is fastest
        assert fastest or peer.over_others == peer.of_best


def test_the_score_of_two_equal_kernels_is_one_at_every_point() -> None:
    found = peers([sample(k, load, 3.0) for k in ("a.one", "b.two") for load in (1, 2)])
    for score in kernel_scores(found):
        assert (score.points, score.of_best, score.over_others) == (2, 1, 1)
        assert score.close_share == 1


def test_a_kernel_twice_as_slow_at_one_of_two_points_is_close_at_half_of_them() -> None:
    rows = [sample("a", 1, 1.0), sample("b", 1, 1.0), sample("a", 2, 2.0), sample("b", 2, 1.0)]
    slow, fast = kernel_scores(peers(rows))
    assert (slow.close_share, slow.worst, slow.worst_load) == (0.5, 0.5, 2)
    assert slow.of_best == pytest.approx(math.sqrt(0.5))
    assert fast.over_others == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    "other",
    [
        {"run": Run("test device", (("torch", "2.1"), ("triton", "3")))},
        {"run": Run("other device", RUN.software)},
        {"fixed": "128"},
        {"dist": "power_law_1.2, 0"},
        {"drawn": "[2]"},
        {"load": 2.0},
        {"weights": "int4"},
    ],
    ids=lambda facts: next(iter(facts)),
)
def test_what_differs_in_anything_but_the_kernel_is_not_compared(other: dict[str, object]) -> None:
    assert peers([sample("a"), sample("b")])
    assert not peers([sample("a"), sample("b", **other)])


def test_rows_of_two_software_sets_make_two_comparisons_with_roofs_of_their_own() -> None:
    newer = Run(RUN.device, (("torch", "3"),))
    rows = [sample("a"), sample("b"), sample("a", seconds=0.1, run=newer)]
    rows.append(sample("a", seconds=0.05, run=newer, weights="int4"))
    old, new = compare(rows)
    assert (old.run, new.run) == (RUN, newer)
    assert (len(old.peers), len(new.peers)) == (2, 0)
    assert (len(old.curves), len(new.curves)) == (0, 1)
    assert old.roofs[0].bytes_per_s == pytest.approx(8)
    assert new.roofs[0].bytes_per_s == pytest.approx(160)


@given(st.lists(st.tuples(positive, positive, positive), min_size=1))
def test_no_row_is_above_a_roof_that_is_the_best_of_the_rows(
    work: list[tuple[float, float, float]],
) -> None:
    rows = [sample(load=i + 1, seconds=s, n_bytes=b, flops=f) for i, (s, b, f) in enumerate(work)]
    (found,) = compare(rows)
    assert found.roofs[0].best_seen == ("memory", "bf16")
    assert max(found.fractions) == pytest.approx(1)


def test_measured_peaks_are_the_roof_and_rows_are_shares_of_it() -> None:
    copy = sample("torch.copy_", op="peak", shape={"kind": "copy"}, n_bytes=100.0, flops=0.0)
    product = sample("torch.mm", op="peak", shape={"kind": "gemm_bf16"}, n_bytes=900.0, flops=50.0)
    row = sample(n_bytes=20.0, flops=25.0)
    of = roof([copy, product, row], 0)
    assert (of.bytes_per_s, dict(of.flop_per_s), of.best_seen) == (100, {"bf16": 50}, ())
    assert fraction(row, of) == 0.5
    (found,) = compare([copy, product, row])
    assert found.rows == (row,)


def test_rows_of_one_thread_have_the_roof_of_one_thread() -> None:
    rows = [
        sample("torch.add", op="stream", shape={"threads": threads}, n_bytes=10.0 * threads)
        for threads in (1, 2)
    ]
    rows.append(sample(op="cpu_experts", shape={"threads": 1}, n_bytes=5.0, flops=0.0))
    (found,) = compare(rows)
    assert found.fractions == (0.5,)


def test_reaches_are_by_kernel_and_range_of_loads() -> None:
    rows = [sample(load=load) for load in (0.5, 1, 2, 200)]
    found = reaches(rows, [0.2, 0.4, 0.6, 0.8])
    assert [(r.load, r.rows, r.median, r.best) for r in found] == [
        ("to 1", 2, pytest.approx(0.3), 0.4), ("to 16", 1, 0.6, 0.6), ("above", 1, 0.8, 0.8),
    ]  # fmt: skip
    assert [load_range(load) for load in (1, 16, 128, 129)] == list(RANGES)


@given(st.floats(1.1, 900), st.floats(0.1, 3))
def test_a_speed_up_that_falls_as_a_power_of_the_load_crosses_where_it_must(
    at: float, power: float
) -> None:
    loads = [1, 4, 16, 64, 256, 1024]
    found = crossover(loads, [(load / at) ** -power for load in loads])
    assert found.until == pytest.approx(at)
    assert (found.verdict, found.since, found.gaps) == (PARTLY, None, 0)
    mirrored = crossover(loads, [(load / at) ** power for load in loads])
    assert (mirrored.since, mirrored.until) == (pytest.approx(at), None)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_a_crossover_lies_between_a_faster_and_a_slower_point(speedups: list[float]) -> None:
    loads = [2.0**i for i in range(len(speedups))]
    found = crossover(loads, speedups)
    faster = [load for load, speedup in zip(loads, speedups, strict=True) if speedup > 1]
    assert (found.verdict == NEVER) is (not faster)
    assert (found.verdict == ALWAYS) is (len(faster) == len(loads))
    if found.until is not None:
        assert max(faster) <= found.until <= 2 * max(faster)
    if found.since is not None:
        assert min(faster) / 2 <= found.since <= min(faster)


def test_formats_are_compared_within_a_kernel_else_within_its_library() -> None:
    rows = [
        sample("torch.linear", seconds=4.0), sample("torch.mm", seconds=3.0),
        sample("other.mm", seconds=1.0), sample("torch.int4", seconds=1.0, weights="int4"),
        sample("torch.linear", seconds=8.0, weights="fp32"),
        sample("alone.mm", weights="int8"),
    ]  # fmt: skip
    fp32, int4 = format_curves(rows)
    assert (int4.weights, int4.base_kernel, int4.speedups) == ("int4", "torch.mm", (3.0,))
    assert (fp32.weights, fp32.base_kernel, fp32.speedups) == ("fp32", "torch.linear", (0.5,))


def test_one_row_and_many_of_a_product_are_one_curve() -> None:
    rows = [
        sample(op=op, load=load, weights=weights, seconds=seconds)
        for op, load, both in (("cpu_gemv", 1, (1.0, 2.0)), ("cpu_gemm", 4, (2.0, 1.0)))
        for weights, seconds in zip(("int8", "bf16"), both, strict=True)
    ]
    (curve,) = format_curves(rows)
    assert (curve.op, curve.loads, curve.speedups) == ("cpu_gemm", (1, 4), (2.0, 0.5))
    assert curve.crossover.until == pytest.approx(2)


def test_the_score_of_a_format_is_its_middle_curve_with_the_rest_counted() -> None:
    def pair(fixed: str, speeds: tuple[float, float]) -> list[Sample]:
        return [
            sample("a", load, seconds, weights=weights, fixed=fixed)
            for load, speed in zip((1, 4), speeds, strict=True)
            for weights, seconds in (("int4", 1.0), ("bf16", speed))
        ]

    rows = pair("never", (0.5, 0.5)) + pair("to 2", (2.0, 0.5)) + pair("always", (4.0, 2.0))
    (score,) = format_scores(format_curves(rows))
    assert (score.curves, score.never, score.open_ended) == (3, 1, 1)
    assert (score.verdict, score.until) == (PARTLY, pytest.approx(2))
    assert score.least == score.most == score.until
    assert score.speedup[0] == pytest.approx(4 ** (1 / 3))
    assert score.speedup[2:] == (None, None)


def test_the_picture_is_drawn_for_one_kernel_and_for_several_runs(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    kernel_pictures(compare([sample()]), alone)
    other = Run("other device", RUN.software)
    rows = [
        sample(kernel, load, load / 10 + 1, run=run, weights=weights)
        for kernel in ("a.one", "a.two") for load in (0.25, 1, 30) for run in (RUN, other)
        for weights in ("bf16", "int4")
    ]  # fmt: skip
    kernel_pictures(compare(rows), both)
    assert alone.read_bytes().startswith(b"\x89PNG")
    heights = [int.from_bytes(path.read_bytes()[20:24], "big") for path in (alone, both)]
    assert heights[1] == 2 * heights[0]
    with pytest.raises(SimulationError, match="no rows to compare"):
        kernel_pictures([], tmp_path / "none.png")
