"""D2MoE: serving against the engine and against limits that can be worked out, and the claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim import engine
from moesim.builder import ProgramBuilder
from moesim.policies.load_order import ORDERS, hebf_order, layer_order
from moesim.policies.nested_memory import NestedMemory
from moesim.reproduce import d2moe
from moesim.reproduce import d2moe_serving as serving
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from planners.nested_bits import store_bytes
from traces.counting import total_params

seeds = st.integers(0, 10**6)
RATES = serving.Rates(0.25, 4.0, 0.5, 0.125, 1.0)  # sums of these are exact
PLANES = np.array([4, 2, 2])


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return d2moe.claims(Sources())


def only(claims: list[Claim], start: str) -> Claim:
    (found,) = [claim for claim in claims if claim.claim == start]
    return found


def random_work(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    work = rng.integers(0, 4, (3, 4, 3, 3)) * rng.integers(0, 2, (3, 4, 3, 3))
    work[..., 0, 0] += 1  # somebody always asks
    return work


def on_the_engine(work: np.ndarray, rates: serving.Rates, budget: int, order) -> list[float]:
    """Ends of passes when every read and every group is a task on one of two streams."""
    memory = NestedMemory(work.shape[1:3], PLANES, budget)
    builder = ProgramBuilder()
    drive, device = builder.stream("drive"), builder.stream("device")
    ends, gates = [], []
    for n_pass in work:
        for layer, tokens in enumerate(n_pass):
            gate = builder.append(device, rates.dense_s)
            after = gates[-1:] if rates.ahead else [gate]
            gates.append(gate)
            read = memory.load(layer, tokens).ravel()
            cells = order(tokens).tolist()
            for cell in [c for c in cells if not read[c]] + [c for c in cells if read[c]]:
                waits = []
                if read[cell]:
                    seconds = rates.read_s + read[cell] / rates.read_bytes_per_s
                    waits = [builder.append(drive, seconds, after)]
                last = builder.append(
                    device, rates.group_s + rates.token_s * tokens.flat[cell], waits
                )
        ends.append(last)
    return engine.run(builder.build()).end_s[ends].tolist()


# --- serving ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(24, 100), st.booleans(), st.sampled_from(sorted(ORDERS)))
def test_serving_is_two_streams_of_the_engine(
    seed: int, budget: int, ahead: bool, order: str
) -> None:
    work, rates = random_work(seed), replace(RATES, ahead=ahead)
    pass_s, _ = serving.serve(work, rates, PLANES, budget, ORDERS[order])
    expected = on_the_engine(work, rates, budget, ORDERS[order])
    assert np.cumsum(pass_s).tolist() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(24, 100))
def test_serving_takes_at_least_all_reading_and_all_computing(seed: int, budget: int) -> None:
    work = random_work(seed)
    groups, dense = np.count_nonzero(work), work.shape[0] * work.shape[1] * RATES.dense_s
    compute_s = dense + groups * RATES.group_s + work.sum() * RATES.token_s
    for order in ORDERS.values():
        pass_s, n_bytes = serving.serve(work, RATES, PLANES, budget, order)
        assert pass_s.sum() >= max(compute_s, dense + n_bytes / RATES.read_bytes_per_s) - 1e-9


def test_with_room_for_all_planes_each_is_read_once_and_the_rest_is_computing() -> None:
    work = np.ones((4, 3, 2, 3), np.int64)
    pass_s, n_bytes = serving.serve(work, RATES, PLANES, 3 * 2 * 8, hebf_order)
    assert n_bytes == 3 * 2 * 8
    compute_s = 3 * (RATES.dense_s + 6 * (RATES.group_s + RATES.token_s))
    assert pass_s[1:].tolist() == [compute_s] * 3
    assert pass_s[0] > compute_s


def test_requests_ask_for_two_experts_a_token_with_bits_by_the_target_shares() -> None:
    work = serving.requested(8, seed=1)
    assert work.shape == (8, 32, 8, 3)
    assert (work.sum(axis=(2, 3)) == serving.REQUESTS * 2).all()
    assert work.sum(axis=(0, 1, 2)) / work.sum() == pytest.approx(serving.BIT_SHARES, abs=0.01)
    assert np.array_equal(work, serving.requested(8, seed=1))


def test_a_mean_expert_takes_the_published_profile_with_and_without_fixed_time() -> None:
    tokens = serving.REQUESTS * 2 / 8
    for group_tokens in (0.0, serving.GROUP_TOKENS):
        rates = serving.rates(group_tokens)
        assert 3 * rates.group_s + tokens * rates.token_s == pytest.approx(3.1e-3)


# --- single layers ------------------------------------------------------------------------------


def test_examples_have_the_published_totals_and_the_published_time_in_layer_order() -> None:
    layers = serving.examples(seed=4)
    assert len(layers) == serving.EXAMPLES
    for one in layers:
        assert one.io_s.sum() == pytest.approx(2.6)
        assert one.compute_s.sum() == pytest.approx(2.04)
        assert one.total_s(layer_order(one.tokens)) == pytest.approx(3.55, rel=0.02)
        assert one.total_s(hebf_order(one.tokens)) >= one.bound_s - 1e-9
        assert one.bound_s >= 2.6


def test_order_matters_most_where_reading_and_computing_are_equally_long() -> None:
    work, rates = serving.requested(4, seed=2), serving.rates()
    gains = {ratio: serving.gain(work, rates, ratio) for ratio in (0.1, 0.5, 1.0, 2.0, 10.0)}
    assert max(gains, key=lambda ratio: gains[ratio].hebf) == 1.0
    assert gains[0.1].hebf == pytest.approx(1, abs=0.005)
    assert gains[10.0].hebf == pytest.approx(1, abs=0.005)
    assert all(gain.most >= gain.hebf for gain in gains.values())


# --- claims -------------------------------------------------------------------------------------


def test_the_model_is_llama_2_7b_cut_into_experts() -> None:
    assert total_params(serving.MODEL) == pytest.approx(6.74e9, rel=0.002)


def test_bytes_order_and_bound_are_reproduced_exactly(claims: list[Claim]) -> None:
    exact = [claim for claim in claims if claim.tier == "A" and claim.low is not None]
    assert len(exact) == 8
    assert {claim.verdict for claim in exact} == {"inside"}
    assert all(claim.low == claim.high for claim in exact)


def test_the_published_stores_are_met_in_gib_with_three_whole_models(claims: list[Claim]) -> None:
    nested = only(claims, "LLaMA-MoE nested, GiB")
    apart = only(claims, "LLaMA-MoE as three models of 2, 3 and 4 bits, GiB")
    assert nested.simulated == pytest.approx(3.81, rel=0.01)
    assert apart.simulated == pytest.approx(9.62, rel=0.01)
    assert nested.verdict == apart.verdict == "shown"
    assert store_bytes(serving.MODEL).nested == nested.simulated * 2**30


def test_the_example_is_reproduced_and_bands_are_those_set_beforehand(claims: list[Claim]) -> None:
    example = only(claims, "example: total by HEBF, s")
    assert (example.verdict, example.low, example.high) == ("inside", 2.65, 3.0)
    bands = {
        "HEBF over layer order, I/O as long as compute": (1.1, 1.4),
        "tok/s over EdgeMoE, copies of 6.7 bits": (1.06, 1.16),
    }
    for name, band in bands.items():
        claim = only(claims, name)
        assert (claim.low, claim.high) == band


def test_more_memory_never_slows_serving_but_throughput_rises_in_a_line(
    claims: list[Claim],
) -> None:
    assert only(claims, "budget steps that raise throughput, share").verdict == "inside"
    bend = only(claims, "budget steps that raise it by less than the one before, share")
    assert bend.verdict == "outside"
    few, many = only(claims, "tok/s, 200 MB").simulated, only(claims, "tok/s, 1600 MB").simulated
    assert 1.02 < many / few < 1.1


def test_hebf_gains_nothing_far_from_balance_and_nearly_the_band_at_it(claims: list[Claim]) -> None:
    even = only(claims, "HEBF over layer order, I/O as long as compute")
    assert even.simulated == pytest.approx(1.1, abs=0.015)
    name = "HEBF over layer order, I/O as long as compute: most that any order gains"
    assert even.simulated < only(claims, name).simulated < 1.2
    for how in ("4 times", "a quarter of"):
        assert only(claims, f"HEBF over layer order, I/O {how} compute").verdict == "inside"


def test_edgemoe_is_beaten_when_its_copies_are_wide_and_not_when_they_are_as_narrow(
    claims: list[Claim],
) -> None:
    start = "tok/s over EdgeMoE, copies of"
    assert only(claims, f"{start} 6.7 bits").simulated > 1.1
    assert only(claims, f"{start} 4 bits with its preload").simulated < 1
    both = only(claims, f"{start} 4 bits, both with preload").simulated
    assert both == pytest.approx(1, abs=0.01)


def test_the_honest_baseline_is_shown_beside_and_wins_where_host_memory_holds_all(
    claims: list[Claim],
) -> None:
    for budget in (800, 1600):
        claim = only(claims, f"tok/s over the honest baseline, {budget} MB")
        assert claim.verdict == "shown"
        assert 0.5 < claim.simulated < 1
        assert "ms of stall" in claim.note


def test_nested_copies_on_the_laptop_move_fewer_bytes_with_more_memory() -> None:
    small, large = (d2moe.on_the_laptop(budget, 0)["nested"] for budget in (800, 1600))
    assert large.bytes_per_token < small.bytes_per_token
    assert large.hit_rate > small.hit_rate
    assert 0 < large.low_share < 1


def test_outside_figures_say_why(claims: list[Claim]) -> None:
    outside = [claim for claim in claims if claim.verdict == "outside"]
    assert all(len(claim.note) > 60 for claim in outside)
    assert all(np.isfinite(claim.simulated) for claim in claims)
