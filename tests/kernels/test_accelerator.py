"""Turns that keep the cache cold, clocks and throttling, and times taken on a real GPU."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch (extra `kernels`)")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from moesim_kernels.bench import accelerator, health, timing  # noqa: E402
from moesim_kernels.bench.measured import CannotMeasure, CannotMeasurePoint  # noqa: E402

from tests.kernels.stand_in import stand_in  # noqa: E402

BUSY, POWER_CAP, IDLE = "0x0000000000000000", "0x0000000000000004", "0x0000000000000001"


@given(
    st.integers(1, 1 << 32), st.integers(0, 1 << 34), st.integers(1, 1 << 28),
    st.integers(1 << 20, 1 << 38),
)  # fmt: skip
def test_copies_fit_the_memory_and_are_no_more_than_a_cold_cache_needs(
    busy: int, idle: int, l2: int, memory: int
) -> None:
    gpu, whole = stand_in(l2_bytes=l2, memory_bytes=memory), busy + idle
    room = accelerator.MEMORY_SHARE * memory
    if whole > room:
        with pytest.raises(CannotMeasurePoint, match="do not fit"):
            gpu.copies(busy, whole)
        return
    n = gpu.copies(busy, whole)
    assert n >= 1
    assert n * whole <= room
    wanted = accelerator.CACHES * l2
    assert (n - 1) * busy < wanted
    limited = n == accelerator.MOST_COPIES or (n + 1) * whole > room * (1 - 1e-9)
    assert n * busy >= wanted or limited


def test_a_line_of_nvidia_smi_is_clock_power_heat_and_reasons() -> None:
    assert health.parse(f"1980, 312.45, 41, {POWER_CAP}\n") == (1980.0, 312.45, 41.0, 4)


@pytest.mark.parametrize(
    "line",
    [
        f"[N/A], 312.45, 41, {BUSY}\n", f"1980, [Not Supported], 41, {BUSY}\n", "\n",
        "1980, 312.45, 41, [N/A]\n", "1980, 312.45\n", "No devices were found\n",
        'Field "clocks.sm" is not a valid field to query.\n',
    ],
)  # fmt: skip
def test_a_line_without_all_four_figures_is_passed_over(line: str) -> None:
    assert health.parse(line) is None


def _seen(*lines: str) -> health.Health:
    watch = health.Health()
    watch.read(lines)
    return watch


def test_telemetry_is_of_busy_samples_since_the_last_question() -> None:
    watch = _seen(
        f"345, 70, 30, {IDLE}", f"1980, 300, 40, {BUSY}", f"1980, 320, 42, {BUSY}",
        f"1965, 310, 41, {BUSY}", "[N/A], 1, 1, 0x0",
    )  # fmt: skip
    assert watch.since_last() == {
        "sm_mhz": 1980, "watt": 310, "temp_c": 41, "throttled": False, "samples": 3
    }  # fmt: skip
    assert watch.since_last() == {}
    watch.read([f"345, 70, 30, {IDLE}"])
    assert watch.since_last() == {}


@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [(0x0, False), (0x2, False), (0x4, True), (0x8, True), (0x10, False), (0x20, True),
     (0x40, True), (0x80, True), (0x100, False)],
)  # fmt: skip
def test_power_cap_slowdown_and_heat_count_as_throttling(reasons: int, throttled: bool) -> None:
    watch = _seen(*[f"1980, 300, 40, {BUSY}"] * 5, f"1980, 300, 40, {reasons:#018x}")
    assert watch.since_last()["throttled"] is throttled


@pytest.mark.parametrize(("mhz", "throttled"), [(1785, False), (1700, True)])
def test_a_clock_a_tenth_under_the_best_seen_counts_as_throttled(mhz: int, throttled: bool) -> None:
    watch = _seen(f"1980, 300, 40, {BUSY}")
    assert watch.since_last()["throttled"] is False
    watch.read([f"{mhz}, 300, 40, {BUSY}"] * 3)
    assert watch.since_last()["throttled"] is throttled


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_the_sampler_reads_nvidia_smi_in_the_background_and_ends_it(path: Path) -> None:
    tool = path / "nvidia-smi"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {path}/asked\necho $$ > {path}/pid\n'
        f'while :; do echo "1980, 300, 40, {BUSY}"; sleep 0.01; done\n'
    )
    tool.chmod(0o755)
    with health.Health() as watch:
        until = time.monotonic() + 10
        while not (seen := watch.since_last()) and time.monotonic() < until:
            time.sleep(0.02)
    assert seen["sm_mhz"] == 1980
    asked = (path / "asked").read_text().split()
    assert f"--query-gpu={health.QUERY}" in asked
    assert all(
        word.startswith(("--query-gpu=", "--format=", "--id=", "--loop-ms=")) for word in asked
    )
    assert not Path(f"/proc/{(path / 'pid').read_text().strip()}").exists()


def test_without_nvidia_smi_nothing_is_known_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with health.Health() as watch:
        assert watch.since_last() == {}
    health.driver.cache_clear()
    assert health.driver() == ""
    health.driver.cache_clear()


def test_a_measurement_forgets_what_was_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.001)
    answers = iter([{"watt": 1}, {"watt": 2}] * 2)
    gpu = stand_in(health=lambda: next(answers))
    made = gpu.measured([lambda: None], source="x", n_bytes=1, method={"note": "kept"})
    assert made.telemetry == {"watt": 2}
    assert made.method == {"timer": "perf_counter", "copies": 1, "note": "kept"}
    assert gpu.by_the_clock(lambda: None, source="x", n_bytes=1).telemetry == {"watt": 2}


@given(st.integers(1, 64), st.floats(1e-7, 1.0))
def test_a_graph_holds_whole_rounds_of_turns(n_distinct: int, once_s: float) -> None:
    n_calls = accelerator._turns(n_distinct, once_s)
    assert n_calls % n_distinct == 0
    assert n_distinct <= n_calls <= accelerator.MOST_CALLS
    fewer = n_calls - n_distinct
    assert fewer * max(once_s, 1e-6) < accelerator.GRAPH_SECONDS


def test_samples_are_enough_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "POINT_SECONDS", 0.0)
    assert accelerator.sampled(lambda: 1) == [1] * timing.LEAST
    monkeypatch.setattr(timing, "POINT_SECONDS", 60.0)
    assert accelerator.sampled(lambda: 1) == [1] * timing.MOST


def test_without_a_gpu_there_is_no_accelerator() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(CannotMeasure, match="no GPU"), accelerator.this_gpu():
        pass
    assert accelerator.gpu_facts()["name"] == ""


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("times on a GPU need one, and there is none")
    with accelerator.this_gpu() as held:
        yield held


def test_a_copy_on_a_gpu_takes_as_long_by_graph_as_by_events(gpu) -> None:
    source, target = (torch.ones(1 << 26, device="cuda") for _ in range(2))
    by_graph, how = gpu.time([lambda: target.copy_(source)], True)
    by_events, plain = gpu.time([lambda: target.copy_(source)], False)
    assert (how["timer"], plain["timer"]) == ("cudagraph", "events")
    median_us = [timing.latency(timed.seconds)["median"] for timed in (by_graph, by_events)]
    assert median_us[0] == pytest.approx(median_us[1], rel=0.25)


def test_a_call_that_waits_for_the_gpu_is_timed_by_events_and_leaves_the_stream(gpu) -> None:
    x, before = torch.ones(8, device="cuda"), torch.cuda.current_stream()
    _, how = gpu.time([lambda: x.sum().item()], True)
    assert how["timer"] == "events"
    assert torch.cuda.current_stream() == before
    with pytest.raises(CannotMeasurePoint, match="cannot be captured"):
        gpu.replay_of(lambda: x.sum().item())


def test_a_replay_does_the_work_of_the_call(gpu) -> None:
    x = torch.zeros(4, device="cuda")
    replay = gpu.replay_of(lambda: x.add_(1))
    before = x[0].item()
    for _ in range(3):
        replay()
    assert x.tolist() == [before + 3] * 4
