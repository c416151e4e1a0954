"""Experts on the CPU, copies from the host, reads from drives: laws, limits, profiles."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.cost import ExpertShape
from hwmodels.device import Link
from hwmodels.devices import load_device
from hwmodels.errors import HardwareError
from hwmodels.host_costs import (
    DEFAULT_HOST,
    HOST_SOURCES,
    PROFILE_SOURCES,
    PROFILES,
    HostEfficiency,
    copy_seconds,
    cpu_expert_seconds,
    drive_seconds,
    gather_seconds,
    gpu_expert_seconds,
    gpu_flop_per_s,
    host_bytes_per_s,
    host_efficiency,
    host_flop_per_s,
    n_sockets,
    with_memory_rate,
)
from hwmodels.systems import load_system

BOX = load_system("rtx-4090-xeon-6454s")
GPU = BOX.device
assert BOX.host is not None
HOST = BOX.host
DESKTOP = load_device("ryzen-9-7950x")
SHAPE = ExpertShape(2048, 768)
ENGINES = sorted(PROFILES)
COUNTS = st.lists(st.integers(0, 10_000), min_size=1, max_size=8).map(sorted)


@pytest.mark.parametrize("engine", ENGINES)
@given(tokens=COUNTS, bits=st.sampled_from([1.66, 4.25, 4.85, 8.0, 16.0]))
def test_more_tokens_or_wider_weights_never_take_less_and_no_tokens_take_nothing(
    engine: str, tokens: list[int], bits: float
) -> None:
    for seconds_of, device in ((cpu_expert_seconds, HOST), (gpu_expert_seconds, GPU)):
        seconds = seconds_of(device, SHAPE, np.array(tokens), bits, PROFILES[engine])
        wider = seconds_of(device, SHAPE, np.array(tokens), bits * 1.5, PROFILES[engine])
        assert seconds.shape == (len(tokens),)
        assert (np.diff(seconds) >= 0).all()
        assert ((seconds == 0) == (np.array(tokens) == 0)).all()
        if bits * 1.5 < 16:  # wider still narrow enough to be multiplied in the same format
            narrow = 8 <= bits < 9 or 8 <= bits * 1.5 < 9
            assert narrow or (wider >= seconds).all()


def test_few_tokens_cost_reading_the_weights_and_many_cost_the_arithmetic() -> None:
    few, many = cpu_expert_seconds(HOST, SHAPE, np.array([1, 100_000]), 8.0)
    assert few == pytest.approx(SHAPE.n_params / host_bytes_per_s(HOST))
    assert many == pytest.approx(100_000 * 2 * SHAPE.n_params / host_flop_per_s(HOST))


def test_the_default_cpu_beats_copying_an_expert_for_one_token_but_not_for_a_thousand() -> None:
    one, thousand = cpu_expert_seconds(HOST, SHAPE, np.array([1, 1000]), 8.0)
    copied = float(copy_seconds(GPU.host_link_bytes_per_s, SHAPE.n_params))
    copied += float(gpu_expert_seconds(GPU, SHAPE, 1000, 8.0))
    assert one < copied < thousand


def test_sockets_are_counted_from_a_systems_host() -> None:
    assert n_sockets(HOST) == 2
    assert n_sockets(load_device("xeon-gold-6454s")) == 1
    assert n_sockets(DESKTOP) == 1


def test_reading_the_other_sockets_memory_slows_two_sockets_only() -> None:
    blind = HostEfficiency(numa_share=0.5)
    assert host_bytes_per_s(HOST, blind) == pytest.approx(host_bytes_per_s(HOST) / 2)
    assert host_bytes_per_s(DESKTOP, blind) == host_bytes_per_s(DESKTOP)


def test_arithmetic_units_are_ordered_as_their_operands_are_wide() -> None:
    def rate(unit: str, host: str) -> float:
        efficiency = HostEfficiency(compute_unit=unit, compute_share=1.0)  # type: ignore[arg-type]
        return host_flop_per_s(load_device(host), efficiency)

    for host in ("xeon-gold-6454s", "ryzen-9-7950x"):
        assert rate("dot16", host) < rate("dot8", host) <= rate("matrix", host)
    assert rate("matrix", "xeon-gold-6454s") > 10 * rate("dot8", "xeon-gold-6454s")
    assert rate("matrix", "ryzen-9-7950x") == rate("dot8", "ryzen-9-7950x")
    old = load_device("xeon-gold-6138").flop_per_s["fp32"]
    assert rate("dot8", "xeon-gold-6138") == rate("dot16", "xeon-gold-6138") == old


def test_eight_bit_multiplication_is_used_where_the_engine_says() -> None:
    def rate(kind: str, bits: float) -> float:
        efficiency = HostEfficiency(gpu_eight_bit=kind, gpu_compute_share=1.0)  # type: ignore[arg-type]
        return gpu_flop_per_s(GPU, bits, efficiency)

    peaks = GPU.flop_per_s
    assert rate("never", 4.0) == rate("weights", 4.0) == peaks["bf16"]
    assert rate("weights", 8.0) == peaks["fp8"]
    assert rate("always", 4.0) == peaks["int8"]
    assert rate("always", 16.0) == peaks["bf16"]


@given(st.floats(0, 1e12), st.floats(0, 1e12))
def test_copies_and_reads_grow_with_their_bytes_and_nothing_costs_nothing(
    one: float, other: float
) -> None:
    sizes = np.array(sorted((0.0, one, other)))
    drive = Link("drive", 7e9, 70e-6)
    for seconds in (
        copy_seconds(32e9, sizes),
        copy_seconds(32e9, sizes, pinned=False),
        gather_seconds(HOST, 32e9, sizes, 2),
        drive_seconds(drive, sizes),
        drive_seconds(drive, sizes, page_faults=True),
    ):
        assert seconds[0] == 0
        assert (np.diff(seconds) >= 0).all()


def test_unpinned_and_paged_reads_are_never_faster() -> None:
    drive = Link("drive", 7e9, 70e-6)
    assert copy_seconds(64e9, 1e9, pinned=False) > copy_seconds(64e9, 1e9)
    assert copy_seconds(4e9, 1e9, pinned=False) == copy_seconds(4e9, 1e9)
    assert drive_seconds(drive, 1e9, page_faults=True) > drive_seconds(drive, 1e9)


def test_more_links_help_until_the_host_cannot_gather_faster() -> None:
    times = [float(gather_seconds(HOST, 32e9, 1e9, n)) for n in (1, 2, 4, 8)]
    assert times[0] > times[1]
    assert times[2] == times[3]
    assert times[3] == pytest.approx(
        DEFAULT_HOST.copy_s + 1e9 / (HOST.memory_bytes_per_s * DEFAULT_HOST.staging_share)
    )


def test_a_host_with_fewer_channels_reads_slower() -> None:
    half = with_memory_rate(DESKTOP, DESKTOP.memory_bytes_per_s / 2)
    assert host_bytes_per_s(half) == pytest.approx(host_bytes_per_s(DESKTOP) / 2)


def test_every_constant_has_a_source_and_every_profile_says_where_its_own_are_from() -> None:
    numbers = {f.name for f in fields(HostEfficiency)} - {"compute_unit", "gpu_eight_bit"}
    assert set(HOST_SOURCES) == numbers
    for name, figures in PROFILE_SOURCES.items():
        for field, figure in figures.items():
            assert getattr(PROFILES[name], field) == figure.value
            assert len(figure.source) > 10
        untold = numbers - set(figures)
        assert all(getattr(PROFILES[name], f) == getattr(DEFAULT_HOST, f) for f in untold)


@pytest.mark.parametrize(
    "change",
    [
        {"memory_share": 0.0}, {"compute_share": 1.5}, {"dispatch_s": -1.0},
        {"compute_unit": "abacus"}, {"gpu_eight_bit": "sometimes"},
    ],
)  # fmt: skip
def test_a_constant_outside_its_range_is_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(HardwareError, match=next(iter(change))):
        HostEfficiency(**change)  # type: ignore[arg-type]


def test_work_that_is_no_number_and_engines_without_a_profile_are_refused() -> None:
    with pytest.raises(HardwareError, match="finite"):
        cpu_expert_seconds(HOST, SHAPE, np.array([1.0, np.nan]), 8.0)
    with pytest.raises(HardwareError, match="weight_bits=0"):
        cpu_expert_seconds(HOST, SHAPE, 1, 0.0)
    with pytest.raises(HardwareError, match="link_bytes_per_s"):
        copy_seconds(0.0, 1.0)
    with pytest.raises(HardwareError, match="n_links=0"):
        gather_seconds(HOST, 32e9, 1.0, 0)
    with pytest.raises(HardwareError, match="no host profile"):
        host_efficiency("nobody's engine")
