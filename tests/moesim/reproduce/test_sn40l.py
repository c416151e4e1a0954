"""SN40L: switch times and capacities, a replayed cache of models, and end-to-end latency."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.reproduce import sn40l
from moesim.reproduce.claim import Claim
from moesim.reproduce.sn40l import dgx, latency_s, miss_share, ratio, requests
from moesim.reproduce.sources import Sources

NODE, H100, A100 = sn40l.sn40l(), dgx("h100"), dgx("a100-80gb")


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return sn40l.claims(Sources())


def test_every_identity_holds(claims: list[Claim]) -> None:
    exact = [one for one in claims if one.tier == "A" and one.verdict != "shown"]
    assert len(exact) == 11
    assert all(one.inside for one in exact)


def test_only_popular_models_bring_the_headline_below_its_band(claims: list[Claim]) -> None:
    outside = {one.claim for one in claims if one.verdict == "outside"}
    inside = {one.claim for one in claims if one.verdict == "inside" and one.tier == "C"}
    headline = {f"end to end, H100 over SN40L, batch {batch}, 20 tokens" for batch in (1, 8)}
    assert outside == {claim + ", Zipf" for claim in headline}
    assert headline < inside


def test_every_claim_says_which_links_gpus_fetch_over(claims: list[Claim]) -> None:
    assert all("link" in one.convention for one in claims)
    assert len({(one.claim, one.convention) for one in claims}) == len(claims)
    assert all(one.note for one in claims if one.tier == "C")


def test_switch_times_are_bytes_over_bandwidth() -> None:
    assert A100.switch_s * 1e3 == pytest.approx(421.9, abs=0.05)
    assert H100.switch_s * 1e3 == pytest.approx(210.9, abs=0.05)
    assert NODE.switch_s * 1e3 == pytest.approx(12.86, abs=0.005)
    assert A100.switch_s / NODE.switch_s == pytest.approx(32.8, abs=0.05)
    assert H100.switch_s / NODE.switch_s == pytest.approx(16.4, abs=0.05)
    assert dgx("h100", 8).switch_s == H100.switch_s / 8


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 200), st.integers(1, 220), st.integers(0, 2**31))
def test_uniform_popularity_misses_one_minus_slots_over_models(
    n_models: int, slots: int, seed: int
) -> None:
    found = miss_share(requests(n_models, seed, n=40_000), slots)
    expected = max(0.0, 1 - slots / n_models)
    spread = np.sqrt(expected * (1 - expected) / 36_000)
    assert found == pytest.approx(expected, abs=6 * spread + 1e-9)


def test_popular_models_miss_less_and_more_slots_never_miss_more() -> None:
    even, zipf = requests(150, 0), requests(150, 0, 1.0)
    for stream in (even, zipf):
        shares = [miss_share(stream, slots) for slots in (10, 20, 40, 80, 150)]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0
    assert miss_share(zipf, 40) < miss_share(even, 40)


def test_the_replayed_zipf_misses_are_those_of_ches_approximation() -> None:
    """Che: an item stays while it is asked for again within T, where the mean occupancy is 40."""
    odds = np.arange(1, 151) ** -1.0
    odds /= odds.sum()
    low, high = 0.0, 1e6
    for _ in range(80):
        middle = (low + high) / 2
        full = (1 - np.exp(-odds * middle)).sum() > 40
        low, high = (low, middle) if full else (middle, high)
    expected = (odds * np.exp(-odds * low)).sum()
    assert miss_share(requests(150, 0, 1.0), 40) == pytest.approx(expected, abs=0.01)


def test_latency_is_router_switch_prefill_and_tokens() -> None:
    one = latency_s(NODE, 0.5, 1, 20, 100)
    prefill_s, token_s = NODE.prefill_s_per_token * 100, NODE.token_s
    assert one == pytest.approx(2 * prefill_s + 0.5 * NODE.switch_s + 20 * token_s)
    eight = latency_s(NODE, 0.5, 8, 20, 100)
    assert eight == pytest.approx(8 * one)


def test_the_ratio_falls_to_that_of_the_token_times_as_answers_grow() -> None:
    models = requests(150, 0, n=20_000)
    for node in (NODE, sn40l.sn40l_at_roofline()):
        ratios = [ratio(A100, node, models, 1, output) for output in (1, 20, 200, 2000)]
        assert ratios == sorted(ratios, reverse=True)


def test_fetching_over_eight_links_takes_most_of_the_advantage_away() -> None:
    models = requests(150, 0)
    one, eight = (ratio(dgx("h100", links), NODE, models, 8, 20) for links in (1, 8))
    assert 3.0 <= one <= 5.0
    assert 1.0 < eight < 1.3


def test_a_gpu_node_is_flat_up_to_the_models_its_memory_holds() -> None:
    assert H100.slots == 47
    assert sn40l.last_flat_pool(H100, 3) == 47


def test_an_sn40l_node_stays_flat_where_a_gpu_node_has_jumped() -> None:
    grown = []
    for box in (H100, NODE):
        misses = [miss_share(requests(n, 0), box.slots) for n in (20, 900)]
        few, many = (latency_s(box, miss, 1, 20) for miss in misses)
        grown.append(many / few)
    assert grown[0] > 4
    assert grown[1] < 1.25


def test_a_pass_on_gpus_is_never_faster_than_reading_the_weights() -> None:
    for box, rate in ((H100, 3.35e12), (A100, 2.039e12)):
        assert box.run_s(1, 1) > 2 * 0.9 * sn40l.MODEL_BYTES / (8 * rate)
        assert box.prefill_s(2048) > box.prefill_s(128) > 0
