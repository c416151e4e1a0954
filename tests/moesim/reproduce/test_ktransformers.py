"""KTransformers: deferral against its closed form, placements by hand, and the claims."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesim.offload.prices import Weights
from moesim.reproduce import ktransformers
from moesim.reproduce.claim import Claim
from moesim.reproduce.ktransformers import LayerTimes, steady_layer_s
from moesim.reproduce.sources import Sources

seconds = st.floats(1e-4, 5e-3)


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return ktransformers.claims(Sources())


@pytest.fixture(scope="module")
def sweep() -> ktransformers.Sweep:
    return ktransformers.sweep(0, n_tokens=24)


# --- deferral -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seconds, seconds, st.floats(1e-5, 1e-3), st.integers(0, 7))
def test_a_layer_lasts_as_long_as_its_longest_cycle(
    before: float, after: float, expert: float, d: int
) -> None:
    times = LayerTimes(before, after, expert, d=d)
    now = (8 - d) * expert
    shorter, longest = sorted([before + after, 8 * expert, now + before])[1:]
    assume(shorter < 0.95 * longest or shorter == longest)  # else slack lasts beyond the pass
    assert steady_layer_s(times) == pytest.approx(times.closed_form(), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(seconds, seconds, st.floats(1e-5, 1e-3), st.integers(0, 7))
def test_the_printed_form_is_exact_where_deferred_experts_cover_attention(
    before: float, after: float, expert: float, d: int
) -> None:
    times = LayerTimes(before, after, expert, d=d)
    assert times.closed_form() >= times.printed_form() * (1 - 1e-12)
    if d * expert >= before:
        assert times.closed_form() == pytest.approx(times.printed_form())


@settings(max_examples=10, deadline=None)
@given(seconds, seconds, st.floats(1e-5, 1e-3))
def test_deferring_more_never_takes_longer(before: float, after: float, expert: float) -> None:
    lasted = [LayerTimes(before, after, expert, d=d).closed_form() for d in range(8)]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(lasted, lasted[1:], strict=False))


def test_nothing_deferred_is_the_sum_of_attention_and_experts() -> None:
    assert LayerTimes(1e-3, 5e-4, 5e-4).closed_form() == pytest.approx(1e-3 + 8 * 5e-4)


def test_cpu_works_all_the_time_once_deferred_experts_cover_attention() -> None:
    box = ktransformers.paper_box("a100-40gb")
    none, some = (ktransformers.decoded("deepseek-v3", box, Weights(16), d) for d in (0, 3))
    busy = [done.busy_s[2] / done.seconds for done in (none, some)]
    assert busy[0] < 0.85 < 0.93 < busy[1]
    assert none.busy_s[2] == pytest.approx(some.busy_s[2], rel=1e-9)  # the same work


def test_two_sockets_read_at_the_published_rate_and_without_numa_at_a_share_of_it() -> None:
    whole, part = (
        ktransformers.decoded("deepseek-v3", ktransformers.paper_box("a100-40gb", n), Weights(16))
        for n in (1.0, 0.5)
    )
    routed = 58 * 8 * 3 * 7168 * 2048 * 2
    fixed = 58 * 50e-6
    for done, rate in ((whole, 440e9), (part, 220e9)):
        assert done.busy_s[2] / 3 == pytest.approx(routed / rate + fixed, rel=1e-6)


# --- kernels and bound ----------------------------------------------------------------------------


def test_tiles_of_sixteen_rows_pay_from_the_share_of_a_tile_that_the_rates_differ_by() -> None:
    n = ktransformers.kernel_switch_tokens()
    assert (n - 1) / 4.6 <= 16 / 21.3 < n / 4.6


def test_bound_of_deepseek_v3_by_hand() -> None:
    row = ktransformers.DECODED[0]
    active = 58 * 8 * 3 * 7168 * 2048 * 4.85 / 8
    assert ktransformers.bound_tokens_per_s(row) == pytest.approx(614.4e9 * 0.73 / active, rel=1e-6)


# --- placements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["random", "dynamic"])
def test_a_ratio_pins_that_share_and_a_larger_one_all_of_it_too(
    sweep: ktransformers.Sweep, placement: str
) -> None:
    few, many = (sweep.pinned(ratio, placement) for ratio in (0.2, 0.5))
    assert few.mean() == pytest.approx(0.2, abs=1e-3)
    assert (many >= few).all()


def test_dynamic_placement_takes_the_most_used_experts(sweep: ktransformers.Sweep) -> None:
    marked = sweep.pinned(0.1, "dynamic")
    assert sweep.counts[marked].min() >= sweep.counts[~marked].max()


def test_more_experts_on_the_gpus_are_never_slower(sweep: ktransformers.Sweep) -> None:
    for placement in ktransformers.PLACED:
        rates = [sweep.rate(ratio, placement) for ratio in np.linspace(0, 1, 6)]
        assert rates == sorted(rates)
        assert rates[-1] == pytest.approx(112.61, rel=1e-6)  # the row that one constant is from
    assert sweep.rate(0.2, "dynamic") > 1.05 * sweep.rate(0.2, "random")


# --- claims ---------------------------------------------------------------------------------------


def test_identities_hold_and_the_headline_is_reproduced(claims: list[Claim]) -> None:
    assert {claim.system for claim in claims} == {ktransformers.NAME}
    assert all(claim.inside for claim in claims if claim.tier == "A" and claim.low is not None)
    by_name = {claim.claim: claim for claim in claims}
    for name in (
        "expert deferral over none (KT-165)",
        "expert deferral at most, over none",
        "NUMA tensor parallel over none, decode",
        "experts on the GPU, 0 to 100 %, random: Kendall's tau",
        "experts on the GPU, 0 to 100 %, dynamic: Kendall's tau",
    ):
        assert by_name[name].inside, name
    assert any("honest baseline" in claim.note for claim in claims)
