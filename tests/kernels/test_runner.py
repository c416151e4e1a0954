"""The runner: nothing twice, whole lines only, most informative first, and time is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from moesim_kernels import runner  # noqa: E402
from moesim_kernels.bench import alltoall, cpu, disk, rows, timing  # noqa: E402
from moesim_kernels.bench.measured import (  # noqa: E402
    CannotMeasure,
    CannotMeasurePoint,
    Measured,
)
from moesim_kernels.bench.points import Point, interleaved, ladder  # noqa: E402
from moesim_kernels.bench.routing import routed_ids  # noqa: E402
from moesim_kernels.runner import all_points  # noqa: E402

POINTS = [Point("stream", {"bytes": 4096 * i, "kind": "copy", "threads": 1}) for i in range(1, 9)]


def quick(point: Point) -> dict[str, object]:
    return Measured(timing.Timed([1e-3, 2e-3, 3e-3]), "test", int(point.shape["bytes"])).row(point)


def test_a_second_run_measures_nothing_and_a_third_only_what_is_missing(tmp_path: Path) -> None:
    asked: list[Point] = []

    def measure(point: Point) -> dict[str, object]:
        asked.append(point)
        return quick(point)

    def run(points: list[Point]) -> runner.Summary:
        return runner.run(points, measure, tmp_path, 1.0, lambda event: None)

    assert run(POINTS[:5]).measured == 5
    assert (run(POINTS[:5]).measured, len(asked)) == (0, 5)
    assert (run(POINTS).reused, asked[5:]) == (5, POINTS[5:])


def test_a_line_cut_short_is_dropped_and_measured_again(tmp_path: Path) -> None:
    runner.run(POINTS, quick, tmp_path, 1.0, lambda event: None)
    path = rows.row_file(tmp_path, "stream")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = runner.run(POINTS, quick, tmp_path, 1.0, lambda event: None)
    assert (again.reused, again.measured) == (7, 1)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 8


def test_a_killed_run_leaves_whole_lines_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moesim_kernels.runner", "stream", "cpu_gemv"]
    command += ["--minutes", "1", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if json.loads(line)["event"] == "row":
                break
        process.send_signal(signal.SIGKILL)
    texts = [path.read_text() for path in tmp_path.glob("*.jsonl")]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    assert lines
    assert all(json.loads(line)["ok"] and line.endswith("\n") for line in lines)


def test_when_the_time_is_over_the_rest_is_counted_as_left(tmp_path: Path) -> None:
    def slow(point: Point) -> dict[str, object]:
        time.sleep(0.05)
        return quick(point)

    done = runner.run(POINTS, slow, tmp_path, 0.12 / 60, lambda event: None)
    assert done.measured + done.left == len(POINTS)
    assert 1 <= done.measured <= 4


def test_an_operator_that_cannot_run_is_reported_once_and_the_others_go_on(tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    copies = [Point("copy", {"bytes": n, "to": "gpu", "memory": "pinned"}) for n in (1, 2, 3)]

    def measure(point: Point) -> dict[str, object]:
        if point.op == "copy":
            raise CannotMeasure("no GPU")
        return quick(point)

    points = [*copies, *POINTS]
    done = runner.run(points, measure, tmp_path, 1.0, events.append)
    assert (done.measured, done.skipped) == (8, {"copy": "no GPU"})
    assert [event["why"] for event in events if event["event"] == "skip"] == ["no GPU"]


@pytest.mark.parametrize(
    "error", [CannotMeasurePoint("too large"), ValueError("a\nb"), MemoryError()]
)
def test_a_point_that_fails_has_a_row_that_says_why_and_is_not_tried_again(
    tmp_path: Path, error: Exception
) -> None:
    events: list[dict[str, object]] = []

    def measure(point: Point) -> dict[str, object]:
        if point is POINTS[2]:
            raise error
        return quick(point)

    done = runner.run(POINTS, measure, tmp_path, 1.0, events.append)
    assert (done.measured, done.refused, done.skipped) == (7, 1, {})
    (refused,) = (event for event in events if event["event"] == "refused")
    lines = rows.row_file(tmp_path, "stream").read_text().splitlines()
    (failed,) = (row for row in map(json.loads, lines) if not row["ok"])
    assert failed["why"] == refused["why"]
    assert failed["why"].startswith(type(error).__name__)
    assert "\n" not in failed["why"]
    assert failed["shape"] == dict(POINTS[2].shape)
    again = runner.run(POINTS, measure, tmp_path, 1.0, events.append)
    assert (again.reused, again.measured, again.refused) == (8, 0, 0)


@pytest.mark.parametrize("word", runner.FATAL)
def test_what_stops_the_device_ends_the_run_and_the_next_goes_on_behind_it(
    tmp_path: Path, word: str
) -> None:
    def measure(point: Point) -> dict[str, object]:
        if point is POINTS[2]:
            raise RuntimeError(f"{word}: an illegal memory access was encountered")
        return quick(point)

    with pytest.raises(RuntimeError, match=word):
        runner.run(POINTS, measure, tmp_path, 1.0, lambda event: None)
    lines = rows.row_file(tmp_path, "stream").read_text().splitlines()
    assert [json.loads(line)["ok"] for line in lines] == [True, True, False]
    again = runner.run(POINTS, measure, tmp_path, 1.0, lambda event: None)
    assert (again.reused, again.measured) == (3, 5)


def test_an_unknown_operator_lists_the_known_ones() -> None:
    known = "cpu_gemv, .*all_to_all, .*peak, .*grouped_gemm, "
    with pytest.raises(ValueError, match=f"'gem' is unknown, known: {known}"):
        runner.chosen_points(["gem"])


def test_every_operator_can_be_measured_here_or_says_why_not(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: its operators would be measured")
    on_gpu = [op for op in all_points() if runner.device_of(op)["kind"] == "gpu"]
    with runner.this_machine(tmp_path) as measure:
        for op in on_gpu:
            with pytest.raises(CannotMeasure):
                measure(all_points()[op][0])
    assert {"peak", "launch", "copy", "grouped_gemm", "overlap"} <= set(on_gpu)


def test_no_point_is_there_twice_and_every_operator_is_equally_far_along() -> None:
    points = interleaved(all_points())
    assert len({point.key("x") for point in points}) == len(points)
    half = points[: len(points) // 2]
    for op, of_op in all_points().items():
        done = sum(point.op == op for point in half)
        assert done == pytest.approx(len(of_op) / 2, abs=1 + 0.01 * len(of_op)), op


def test_a_ladder_starts_with_the_first_of_each_and_holds_every_combination() -> None:
    steps = ladder("ab", (1, 2, 3))
    assert steps[0] == ("a", 1)
    assert len(set(steps)) == 6
    assert steps[-1] == ("b", 3)


@pytest.mark.parametrize(("load", "topk"), [("balanced", 2), ("power_law_1.2", 4)])
def test_each_token_takes_k_experts_and_a_power_law_is_more_uneven(load: str, topk: int) -> None:
    ids, even = (routed_ids(400, 16, topk, of, seed=3) for of in (load, "balanced"))
    assert ids.shape == (400, topk)
    assert all(len(set(chosen)) == topk for chosen in ids.tolist())
    counts, even_counts = (np.bincount(of.ravel(), minlength=16) for of in (ids, even))
    assert len(counts) == 16
    assert counts.max() > 1.2 * even_counts.max() or load == "balanced"
    assert (ids == routed_ids(400, 16, topk, load, seed=3)).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "int4"])
def test_every_weight_type_multiplies_as_its_dequantised_weights_do(dtype: str) -> None:
    _, _, error = cpu._products(dtype, 64, 256, 1)
    assert error < {"fp32": 1e-6}.get(dtype, 1e-2)


def test_a_layer_of_experts_equals_the_plain_formula_in_float64() -> None:
    import torch

    torch.manual_seed(0)
    layer = [(torch.randn(6, 4), torch.randn(4, 3)) for _ in range(2)]
    inputs = [torch.randn(2, 4), torch.randn(1, 4)]
    for x, (up, down), result in zip(inputs, layer, cpu.run_experts(inputs, layer), strict=True):
        both = x.double().numpy() @ up.double().numpy().T
        gate, value = both[:, :3], both[:, 3:]
        expected = (gate / (1 + np.exp(-gate)) * value) @ down.double().numpy().T
        assert result.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_row_of_each_kind_measured_here_says_what_it_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.02)
    monkeypatch.setattr(timing, "cache_bytes", lambda: 1 << 20)
    sizes = {"tokens": 3, "hidden": 64, "inter": 32, "experts": 4, "topk": 2, "threads": 1}
    points = [
        Point("cpu_gemm", {"m": 2, "n": 64, "k": 128, "threads": 1}, {"w": "bf16", "a": "bf16"}),
        Point("cpu_experts", sizes, {"w": "fp32"}, {"dist": "balanced", "seed": 0}),
        Point("stream", {"bytes": 1 << 20, "kind": "triad", "threads": 1}),
        Point("all_to_all", {"bytes": 4096, "ranks": 2, "split": "uneven"}),
    ]
    with runner.this_machine(tmp_path) as measure:
        gemm, experts, stream, exchange = (measure(point) for point in points)
    assert gemm["derived"] == {"bytes": 2 * (64 * 128 + 2 * (64 + 128)), "flops": 2 * 2 * 64 * 128}
    routing = experts["routing"]
    assert sum(routing["counts"]) == 6
    assert routing["distinct"] == len(routing["counts"])
    assert routing["max_load"] == max(routing["counts"])
    assert stream["derived"]["bytes"] == 3 << 20
    assert exchange["derived"]["bytes"] == 3072
    for row in (gemm, experts, stream, exchange):
        assert 0 < row["lat_us"]["p10"] <= row["lat_us"]["median"] <= row["lat_us"]["p90"]


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("n_ranks", [2, 3, 8])
def test_an_exchange_sends_all_its_bytes_and_half_as_much_again_to_the_last_rank(
    split: str, n_ranks: int
) -> None:
    sent = alltoall.sizes(48_000, n_ranks, split)
    assert sum(sent) == 48_000
    assert sent[-1] == 48_000 / n_ranks * {"even": 1, "uneven": 1.5}[split]
    assert max(sent[:-1]) - min(sent[:-1]) <= 1
    incoming, outgoing = sent[-1] * (n_ranks - 1), 48_000 - min(sent)
    assert alltoall.busiest(sent) == max(incoming, outgoing)


def test_nccl_is_refused_in_words_without_a_second_gpu() -> None:
    import torch

    if torch.cuda.device_count() > 1:
        pytest.skip("there is more than one GPU")
    with pytest.raises(CannotMeasure, match="NCCL needs more than one GPU"):
        alltoall.Ranks("nccl", 2)


def test_memory_nodes_are_counted_and_there_is_at_least_one(tmp_path: Path) -> None:
    assert timing.numa_nodes(tmp_path) == 1
    for name in ("node0", "node1", "node12", "possible", "has_cpu"):
        (tmp_path / name).mkdir()
    assert timing.numa_nodes(tmp_path) == 3
    assert timing.cpu()["numa_nodes"] >= 1


def test_reads_go_past_the_page_cache_and_leave_no_file(tmp_path: Path) -> None:
    try:
        file = disk.DirectFile(tmp_path, 8 << 20)
    except CannotMeasure as refusal:
        pytest.skip(f"{refusal}")
    try:
        assert list(tmp_path.iterdir()) == []
        row = disk.read(Point("nvme_read", {"block_bytes": 1 << 20, "depth": 2}), file)
    finally:
        file.close()
    assert row.n_bytes == 1 << 20
    assert min(row.timed.seconds) > 0


def test_a_file_system_without_direct_reads_gives_up_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_open = disk.os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & disk.os.O_DIRECT == disk.os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return plain_open(path, flags, *rest)

    monkeypatch.setattr(disk.os, "open", refuse)
    with pytest.raises(CannotMeasure, match="refuses O_DIRECT"):
        disk.DirectFile(tmp_path, 4 << 20)
    assert list(tmp_path.iterdir()) == []


def test_calls_that_lost_their_core_are_left_out_where_enough_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = {"calls": 0, "lost": 0}

    def call() -> None:
        state["calls"] += 1
        if state["calls"] % 2:
            state["lost"] += 5
            time.sleep(0.01)

    monkeypatch.setattr(timing, "_preemptions", lambda: state["lost"])
    timed = timing.repeat(call, 0.2)
    assert not timed.disturbed
    assert max(timed.seconds) < 0.009
    monkeypatch.setattr(timing, "_preemptions", lambda: state["calls"])
    assert timing.repeat(call, 0.05).disturbed
