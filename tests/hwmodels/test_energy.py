"""Laws of energy and price, and how near published constants come to measured watts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.cost import Cost, ExpertShape
from hwmodels.device import Device
from hwmodels.devices import device_names, load_device
from hwmodels.energy import (
    ENERGY_SOURCES,
    EnergyModel,
    electricity_usd,
    energy_model,
    joules,
    power_w,
    usd,
)
from hwmodels.energy_scores import best_constant, expert_watts, power_score
from hwmodels.errors import HardwareError
from hwmodels.fitted.tables import read_tables
from hwmodels.operators import AttentionShape, attention_decode, elementwise, gemm, routed_experts

H200 = load_device("h200")
CPU = next(
    device
    for device in map(load_device, device_names())
    if device.kind == "cpu" and device.tdp_w > 0
)
devices = st.sampled_from([H200, load_device("a100-80gb"), load_device("l40s"), CPU])
seconds = st.floats(1e-6, 1.0)
amounts = st.floats(0, 1e13)
bits = st.sampled_from([4.0, 8.0, 16.0, 32.0])
shares = st.floats(0, 1)


@given(devices, seconds, amounts, amounts, bits, shares)
def test_power_is_between_idle_and_board_power(
    device: Device, s: float, moved: float, work: float, width: float, near: float
) -> None:
    model = energy_model(device)
    assert model is not None
    watts = float(power_w(device, s, moved, work, width, near))
    assert model.idle_w * (1 - 1e-12) <= watts <= model.tdp_w * (1 + 1e-12)
    if moved or work:
        assert watts >= model.ready_w * (1 - 1e-12)


@given(devices, seconds, amounts, amounts, bits, st.floats(1, 10))
def test_energy_never_falls_with_more_bytes_flops_bits_or_seconds(
    device: Device, s: float, moved: float, work: float, width: float, more: float
) -> None:
    base = float(joules(device, s, moved, work, width))
    for grown in (
        joules(device, s, moved * more, work, width),
        joules(device, s, moved, work * more, width),
        joules(device, s, moved, work, width * more),
        joules(device, s * more, moved, work, width),
    ):
        assert float(grown) >= base * (1 - 1e-12)


@given(seconds, amounts, amounts, shares, shares)
def test_bytes_found_in_the_cache_cost_less(
    s: float, moved: float, work: float, one: float, other: float
) -> None:
    near, far = max(one, other), min(one, other)
    assert joules(H200, s, moved, work, 16, near) <= joules(H200, s, moved, work, 16, far)


@given(st.lists(st.tuples(seconds, st.floats(0, 1e5), st.floats(0, 1e7)), min_size=1, max_size=8))
def test_energy_of_operations_in_sequence_adds_up(rows: list[tuple[float, float, float]]) -> None:
    s, moved, work = (np.array(column) for column in zip(*rows, strict=True))
    moved = moved + 1  # a byte each, so that all are kernels
    each = joules(H200, s, moved, work)
    assert float(each.sum()) == pytest.approx(float(joules(H200, s.sum(), moved.sum(), work.sum())))
    costs = [gemm(H200, (m, 512, 512)) for m in (1, 64)]
    assert float((costs[0] + costs[1]).joules) == float(costs[0].joules) + float(costs[1].joules)


@given(seconds)
def test_no_work_costs_idle_power_and_nothing_in_no_time_costs_nothing(s: float) -> None:
    idle = ENERGY_SOURCES["idle_share"].value * 700
    assert float(joules(H200, s, 0, 0)) == pytest.approx(s * idle)
    assert float(joules(H200, 0, 0, 0)) == 0
    assert float(power_w(H200, 0, 0, 0)) == pytest.approx(idle)


def test_a_large_multiplication_is_limited_by_board_power_and_a_small_one_is_not() -> None:
    large, small = gemm(H200, (16384, 8192, 8192)), gemm(H200, (1, 64, 64))
    assert float(large.joules / large.seconds) == pytest.approx(700)
    assert 122 <= float(small.joules / small.seconds) < 200


def test_streaming_memory_takes_the_published_energy_of_each_level() -> None:
    cost = elementwise(H200, 1e10)
    per_byte = (11.68 + 4.87 + 1.45) * 8e-12
    assert float(cost.joules) == pytest.approx(float(cost.seconds) * 122 + 1e10 * per_byte)


@given(st.integers(1, 20_000), st.integers(1, 128))
def test_operators_take_at_most_board_power_while_they_run(tokens: int, distinct: int) -> None:
    shape, heads = ExpertShape(2048, 768), AttentionShape(32, 8, 128, 128)
    costs: list[Cost] = [
        gemm(H200, (tokens, 768, 2048), "fp8"),
        routed_experts(H200, shape, (tokens, distinct)),
        attention_decode(H200, heads, (tokens, 1000)),
    ]
    for cost in costs:
        watts = float(cost.joules / cost.seconds)
        assert 122 * (1 - 1e-12) <= watts <= 700 * (1 + 1e-12)


def test_narrow_operands_take_less_energy_for_the_same_arithmetic() -> None:
    wide, narrow = (float(power_w(H200, 1.0, 0, 1e14, width)) for width in (16, 8))
    ready = ENERGY_SOURCES["ready_share"].value * 700
    assert narrow - ready == pytest.approx((wide - ready) / 2)


def test_energy_is_unknown_not_zero_without_a_board_power() -> None:
    unknown = replace(H200, tdp_w=0.0)
    assert energy_model(unknown) is None
    assert np.isnan(joules(unknown, 1.0, 1.0, 1.0))
    assert np.isnan(power_w(unknown, 1.0, 1.0, 1.0))
    assert np.isnan(gemm(unknown, (1, 64, 64)).joules)


@given(st.floats(0, 1e7), st.integers(1, 10_000))
def test_rent_is_proportional_to_devices_and_hours(s: float, n: int) -> None:
    assert float(usd(H200, s, n)) == pytest.approx(s / 3600 * n * H200.usd_per_hour)
    assert np.isnan(usd(replace(H200, usd_per_hour=0.0), s, n))


def test_electricity_is_priced_by_the_kilowatt_hour_and_the_sites_overhead() -> None:
    assert float(electricity_usd(3.6e6, 0.10, 1.3)) == pytest.approx(0.13)
    with pytest.raises(HardwareError, match="pue=0.9"):
        electricity_usd(1.0, 0.1, 0.9)


def test_impossible_arguments_are_refused_by_name() -> None:
    with pytest.raises(HardwareError, match="n_bytes=-1"):
        joules(H200, 1.0, -1.0, 0)
    with pytest.raises(HardwareError, match="flops=nan"):
        joules(H200, 1.0, 0, np.array([1.0, np.nan]))
    with pytest.raises(HardwareError, match="cached=1.5"):
        joules(H200, 1.0, 1.0, 0, 16, 1.5)
    with pytest.raises(HardwareError, match="seconds=0"):
        power_w(H200, 0.0, 1.0, 0)
    with pytest.raises(HardwareError, match="n_devices=-1"):
        usd(H200, 1.0, -1)
    with pytest.raises(HardwareError, match="ready_w=9"):
        EnergyModel(10, 9, 700, 0, 0, 0)


def test_arrays_broadcast_and_every_constant_has_a_source() -> None:
    found = power_w(H200, np.full((3, 1), 1e-3), np.array([0.0, 1e9]), 1e9)
    assert found.shape == (3, 2)
    assert found.dtype == np.float64
    assert all(figure.source and figure.value > 0 for figure in ENERGY_SOURCES.values())


def test_every_device_of_the_catalogue_with_a_board_power_has_an_energy_model() -> None:
    kinds = {name: energy_model(load_device(name)) for name in device_names()}
    assert {name for name, model in kinds.items() if model and model.kind == "measured"} >= {
        "h100", "h200", "a100-80gb",
    }  # fmt: skip
    for name, model in kinds.items():
        assert (model is None) == (load_device(name).tdp_w <= 0), name


def test_published_constants_meet_measured_watts_within_their_stated_error(
    shared: Path, tmp_path: Path
) -> None:
    rows = pd.read_parquet(
        shared / "measured" / "validation-moe.parquet",
        filters=[("power_w", ">", 0), ("distribution", "==", "balanced")],
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    watts = expert_watts(H200, read_tables([tmp_path / "rows.parquet"]).groups)
    seconds = watts.amounts.seconds
    score = power_score(watts.predicted, watts.measured, seconds)
    board = power_score(np.full(score.rows, 700.0), watts.measured, seconds)
    constant = np.full(score.rows, best_constant(watts.measured))
    blind = power_score(constant, watts.measured, seconds)
    assert score.rows > 10_000
    assert score.mean < 0.33  # coarse: see benchmarks/energy_rows.py for where it errs
    assert score.median < 0.22
    assert score.mean < board.mean - 0.10
    assert score.mean < blind.mean
