"""ExpertFlow: baselines load what they say, the predictor is paid for, and the claims."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.policies.batching import active_experts, paths_of
from moesim.policies.prefetch import oracle
from moesim.reproduce import expertflow
from moesim.reproduce.claim import Claim
from moesim.reproduce.expertflow import Case
from moesim.reproduce.sources import Sources
from traces.models import load_model

# Claims outside their band, and why, in the words of their notes.
OUTSIDE = {
    "speed over SE-MoE, 4 slots, batch 32": "distinct ones with this routing",
    "speed over per-layer LRU, 4 slots, batch 32": "so loads decide",
}
EXPERT_S = 9437184 / 25e9


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return expertflow.claims(Sources())


@pytest.fixture(scope="module")
def small() -> Case:
    return expertflow.case(load_model("switch-base-32"), 8, 0)


def figure(claims: list[Claim], name: str) -> float:
    return next(one.simulated for one in claims if one.claim == name)


# --- claims -------------------------------------------------------------------------------------


def test_memory_follows_from_shapes(claims: list[Claim]) -> None:
    """0.33 GB of dense weights, 48 slots and the predictor, of 14.8 GB."""
    (exact,) = (one for one in claims if one.tier == "A")
    assert exact.inside
    assert exact.simulated == pytest.approx(0.0536, abs=0.0005)


def test_claims_outside_their_band_are_the_known_ones_and_say_why(claims: list[Claim]) -> None:
    outside = {one.claim: one.note for one in claims if one.verdict == "outside"}
    assert set(outside) == set(OUTSIDE)
    assert all(OUTSIDE[claim] in note for claim, note in outside.items())


def test_every_claim_has_its_own_name_and_trends_name_their_assumptions(
    claims: list[Claim],
) -> None:
    assert len({one.claim for one in claims}) == len(claims)
    assert all(one.system == "expertflow" for one in claims)
    assert all(one.note for one in claims)


def test_a_high_hit_rate_does_not_make_plec_faster_than_lru_on_a_full_link(
    claims: list[Claim],
) -> None:
    """The handbook's warning: hits by prefetch are loads all the same."""
    assert figure(claims, "PLEC: hit rate, %") > 70 + figure(claims, "per-layer LRU: hit rate, %")
    assert figure(claims, "PLEC: MB a token") > figure(claims, "per-layer LRU: MB a token")
    assert figure(claims, "speed over per-layer LRU, 4 slots, batch 32") < 1


def test_computing_misses_on_the_cpu_beats_all_of_it(claims: list[Claim]) -> None:
    assert figure(claims, "speed over the honest baseline, 4 slots, batch 32") < 0.5


def test_the_gain_over_se_moe_grows_with_experts_as_published(claims: list[Claim]) -> None:
    rows = [one for one in claims if one.claim.startswith("Switch-")]
    published = [one.published for one in rows]
    assert published == [2.01, 3.19, 5.86]
    found = [one.simulated for one in rows]
    assert found == sorted(found)
    for one in rows:
        assert one.published is not None
        assert 0.75 < one.simulated / one.published < 1.25


# --- systems ------------------------------------------------------------------------------------


def test_se_moe_loads_every_expert_of_every_layer_once(small: Case) -> None:
    found = expertflow.se_moe(small)
    loads = found.loads + found.loads_ahead
    distinct_in_first = small.work.start[1]
    assert loads == (small.work.n_steps - 1) * 32 + distinct_in_first
    assert found.hit_rate == pytest.approx(1 - distinct_in_first / len(small.work.expert))
    # The link is never idle: 32 copies a layer.
    per_layer_s = found.seconds / small.work.n_steps
    assert per_layer_s == pytest.approx(32 * (EXPERT_S + 10e-6), rel=0.02)


def test_pre_gated_misses_in_the_very_first_layer_only(small: Case) -> None:
    found = expertflow.pre_gated(small, 4)
    assert found.loads == small.work.start[1]


def test_lru_on_demand_loads_nothing_ahead(small: Case) -> None:
    found = expertflow.per_layer_lru(small, 4)
    assert found.loads_ahead == 0
    assert found.loads == round((1 - found.hit_rate) * len(small.work.expert))


def test_the_predictor_costs_its_seconds_and_a_slot(
    small: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = oracle(small.work, 0.9)
    paid = expertflow.expertflow(small, 1, predicted)
    free = dict(expertflow.FIGURES)
    for name in ("predictor", "seconds"):
        free[name] = replace(free[name], value=0.0)
    monkeypatch.setattr(expertflow, "FIGURES", free)
    unpaid = expertflow.expertflow(small, 1, predicted)
    assert paid.seconds > unpaid.seconds
    assert paid.hit_rate < unpaid.hit_rate


def test_wrong_predictions_cost_time(small: Case) -> None:
    right, wrong = (
        expertflow.expertflow(small, 4, oracle(small.work, recall)) for recall in (1.0, 0.5)
    )
    assert wrong.seconds > 1.1 * right.seconds
    assert wrong.hit_rate < right.hit_rate


def test_no_system_beats_the_bytes_it_moves(small: Case) -> None:
    """Seconds are at least those of the copies on the link."""
    for found in (
        expertflow.expertflow(small, 4, oracle(small.work, 0.9)),
        expertflow.per_layer_lru(small, 4),
        expertflow.pre_gated(small, 4),
    ):
        moved = found.bytes_per_token * found.pass_tokens.sum()
        # The last loads ahead may still be under way when the last pass ends.
        late = 48 * EXPERT_S
        assert found.seconds + late > moved / 25e9


# --- token scheduler ----------------------------------------------------------------------------


def test_pairs_of_batches_keep_their_tokens() -> None:
    model = load_model("switch-base-128")
    trace = expertflow.clustered_trace(model, 640, 1)
    pairs = np.arange(640).reshape(10, 64)
    dealt = expertflow.dealt_anew(trace, pairs, 1)
    np.testing.assert_array_equal(np.sort(dealt, axis=1), pairs)
    paths = paths_of(trace.topk, model.n_experts)
    before = active_experts(paths, pairs.reshape(20, 32)).sum()
    after = active_experts(paths, dealt.reshape(20, 32)).sum()
    assert after < 0.95 * before


def test_tokens_of_one_kind_share_most_of_their_path() -> None:
    model = load_model("switch-base-128")
    chosen = expertflow.clustered_trace(model, 4000, 0).topk[:, :, 0]
    shares = np.array([np.bincount(layer, minlength=128).max() / 4000 for layer in chosen.T])
    first = 0.8 / (1 / np.arange(1, 65)).sum()  # the most frequent kind follows its path
    assert (shares > 0.9 * first).all()


def test_batches_are_cut_to_whole_ones() -> None:
    passes = expertflow.in_batches(np.arange(70), 32)
    assert passes.n_passes == 2
    np.testing.assert_array_equal(passes.tokens, [32, 32])
