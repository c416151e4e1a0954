"""Dispatch: golden vectors of HybriMoE's schedule, its laws, and Fiddler's threshold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.offload.decisions import LOADED, ON_CPU, RESIDENT
from moesim.policies.dispatch import UnitTimes, by_threshold, hss
from moesim.policies.impact import busy_seconds

SLOPES = (0.2, 0.8, 1.0)


def constants(slope: float, most: int = 10) -> UnitTimes:
    """The released code's, in its unit."""
    return UnitTimes([0.0] + [0.5] * most, [slope * n for n in range(most + 1)], 0.79, 0.41791)


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    tokens = draw(st.lists(st.integers(1, 10), min_size=1, max_size=7))
    there = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    return tokens, there


@st.composite
def any_times(draw: st.DrawFn) -> UnitTimes:
    """Times that never fall with tokens."""
    steps = st.lists(st.floats(0.01, 2), min_size=10, max_size=10)
    gpu, cpu = (np.cumsum([0.0, *draw(steps)]).tolist() for _ in range(2))
    return UnitTimes(gpu, cpu, draw(st.floats(0, 2)), draw(st.floats(0.01, 2)))


def least_makespan(tokens: list[int], there: list[bool], times: UnitTimes) -> float:
    """Over all assignments."""
    choices = [(RESIDENT if here else LOADED, ON_CPU) for here in there]
    every = itertools.product(*choices)
    return min(busy_seconds(tokens, there, place, times).makespan_s for place in every)


def hss_makespan(tokens: list[int], there: list[bool], times: UnitTimes) -> float:
    return busy_seconds(tokens, there, hss(tokens, there, times), times).makespan_s


# --- golden vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "n_there", "slope", "on_cpu", "gpu", "cpu"),
    [
        ([1] * 6, 2, 1.0, [5], 2.5, 1.79),
        ([1, 1], 0, 0.2, [1], 0.91791, 0.99),
        ([9, 4, 2, 7, 3, 1, 1, 5], 3, 0.2, [4, 5, 6], 2.5, 1.79),
        ([9, 4, 2, 7, 3, 1, 1, 5], 3, 0.8, [5, 6], 3.0, 2.39),
    ],
)
def test_vectors_of_the_released_schedule_come_out_exactly(
    tokens: list[int], n_there: int, slope: float, on_cpu: list[int], gpu: float, cpu: float
) -> None:
    there = [cell < n_there for cell in range(len(tokens))]
    place = hss(tokens, there, constants(slope))
    expected = [RESIDENT if here else LOADED for here in there]
    for cell in on_cpu:
        expected[cell] = ON_CPU
    assert place == expected
    busy = busy_seconds(tokens, there, place, constants(slope))
    assert busy.gpu_s == pytest.approx(gpu, rel=1e-12)
    assert busy.cpu_s == pytest.approx(cpu, rel=1e-12)


# --- laws of the hybrid schedule ----------------------------------------------------------------


@given(layers(), any_times())
def test_only_missing_experts_are_loaded(
    layer: tuple[list[int], list[bool]], times: UnitTimes
) -> None:
    tokens, there = layer
    for here, where in zip(there, hss(tokens, there, times), strict=True):
        assert where in ((RESIDENT, ON_CPU) if here else (LOADED, ON_CPU))


@settings(max_examples=200)
@given(layers(), any_times())
def test_it_never_ends_later_than_all_misses_on_one_side(
    layer: tuple[list[int], list[bool]], times: UnitTimes
) -> None:
    tokens, there = layer
    found = hss_makespan(tokens, there, times)
    for missing in (LOADED, ON_CPU):
        place = [RESIDENT if here else missing for here in there]
        assert found <= busy_seconds(tokens, there, place, times).makespan_s + 1e-9


@settings(max_examples=100)
@given(layers(), st.sampled_from(SLOPES))
def test_no_assignment_ends_in_less_than_half_its_time_by_the_released_constants(
    layer: tuple[list[int], list[bool]], slope: float
) -> None:
    tokens, there = layer
    times = constants(slope)
    found, least = hss_makespan(tokens, there, times), least_makespan(tokens, there, times)
    assert least - 1e-9 <= found <= 2 * least


def test_where_large_experts_suit_the_cpu_it_may_take_four_times_the_least() -> None:
    # On the GPU an expert of many tokens is slow, on the CPU every expert costs about the same.
    times = UnitTimes([0.0, 0.02, 2.0], [0.0, 0.4, 0.42], 0.0, 1.0)
    tokens, there = [2, 1, 1, 1, 1], [True] * 5
    worse = hss_makespan(tokens, there, times) / least_makespan(tokens, there, times)
    assert worse > 3.5


@pytest.mark.parametrize("slope", SLOPES)
def test_in_decode_no_assignment_ends_sooner_by_the_released_constants(slope: float) -> None:
    times = constants(slope)
    for n in range(1, 9):
        for n_there in range(n + 1):
            tokens, there = [1] * n, [cell < n_there for cell in range(n)]
            least = least_makespan(tokens, there, times)
            assert hss_makespan(tokens, there, times) == pytest.approx(least, rel=1e-12)


def test_the_cpu_takes_small_cached_experts_when_nothing_is_missing() -> None:
    times = UnitTimes([0.0, 3.0, 3.0, 3.0], [0.0, 1.0, 2.0, 3.0], 0.0, 1.0)
    assert hss([3, 2, 1], [True] * 3, times) == [RESIDENT, ON_CPU, ON_CPU]


def test_of_equal_experts_the_earlier_goes_to_the_gpu() -> None:
    times = UnitTimes([0.0, 1.0], [0.0, 1.0], 0.0, 0.5)
    assert hss([1, 1], [False, False], times) == [LOADED, ON_CPU]


# --- the threshold ------------------------------------------------------------------------------

CPU_PER_TOKEN, GPU_MISS, GPU_HIT = 7, 70, 0  # Fiddler's units; only ten tokens a transfer matters


def fiddler_cost(tokens: list[int], there: list[bool], on_cpu: tuple[bool, ...]) -> int:
    """The sum that its code minimises."""
    return sum(
        CPU_PER_TOKEN * n if cpu else (GPU_HIT if here else GPU_MISS)
        for n, here, cpu in zip(tokens, there, on_cpu, strict=True)
    )


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 30), min_size=8, max_size=8),
    st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_ten_tokens_as_threshold_are_the_best_of_all_256_assignments_by_the_sum(
    tokens: list[int], there: list[bool]
) -> None:
    every = list(itertools.product((False, True), repeat=8))
    costs = [fiddler_cost(tokens, there, on_cpu) for on_cpu in every]
    chosen = tuple(place == ON_CPU for place in by_threshold(tokens, there, 10))
    assert fiddler_cost(tokens, there, chosen) == min(costs)
    if 10 not in tokens:  # at ten tokens both sides cost the same
        assert costs.count(min(costs)) == 1


@given(layers(), st.floats(0, 20))
def test_cached_experts_stay_whatever_the_threshold(
    layer: tuple[list[int], list[bool]], threshold: float
) -> None:
    tokens, there = layer
    for n, here, where in zip(tokens, there, by_threshold(tokens, there, threshold), strict=True):
        assert where == (RESIDENT if here else ON_CPU if n < threshold else LOADED)
