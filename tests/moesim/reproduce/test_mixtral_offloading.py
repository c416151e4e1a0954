"""Mixtral-offloading: its cache against twins and laws, its pricing, and the claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.offload.built_in import decide_built_in
from moesim.offload.decisions import LOADED, NO_LOAD, PREFETCH, RESIDENT
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Weights, prices
from moesim.offload.simulate import run
from moesim.policies.prefetch import no_predictions, oracle
from moesim.reproduce import mixtral_offloading as mixtral
from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.models import load_model
from traces.synth import zipf_trace

seeds = st.integers(0, 10**6)


def decode(seed: int, n_tokens: int = 40, n_layers: int = 3, reuse: float = 0.3) -> LayerSteps:
    trace = zipf_trace(n_tokens, n_layers, 8, 2, exponent=0.5, reuse=reuse, seed=seed)
    return layer_steps(trace, forward_passes(trace))


@pytest.fixture(scope="module")
def synthetic() -> list[Claim]:
    return mixtral.claims(Sources())


# --- cache ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 8))
def test_without_guesses_it_hits_as_the_per_layer_lru_of_the_simulator(seed: int, k_c: int) -> None:
    work = decode(seed)
    warm = np.zeros((work.n_layers, 8), bool)
    warm[:, :k_c] = True
    policy = OffloadPolicy(
        cache="lru", slots=np.full(work.n_layers, k_c), warm=warm.ravel(), budget=0
    )
    ours, twin = mixtral.swap_cache(work, k_c), decide_built_in(work, policy)
    # Which of the experts that lie there from the start leaves first is the one free choice.
    settled = np.arange(len(ours.was_there)) >= 8 * work.n_layers * 2
    assert ours.was_there[settled].tolist() == twin.was_there[settled].tolist()


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 7))
def test_one_more_cached_expert_never_loses_a_hit(seed: int, k_c: int) -> None:
    work = decode(seed)
    fewer, more = (mixtral.swap_cache(work, n).was_there for n in (k_c, k_c + 1))
    settled = np.arange(len(fewer)) >= 8 * work.n_layers * 2
    assert (more >= fewer)[settled].all()


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 6), st.floats(0, 1))
def test_guesses_push_nothing_out_of_the_cache(seed: int, k_c: int, recall: float) -> None:
    work = decode(seed)
    alone = mixtral.swap_cache(work, k_c)
    guessed = mixtral.swap_cache(work, k_c, oracle(work, recall, seed=seed))
    assert (guessed.was_there >= alone.was_there).all()


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(0, 6), st.floats(0, 1))
def test_every_load_is_used_or_counted_as_wasted(seed: int, k_c: int, recall: float) -> None:
    work = decode(seed)
    found = mixtral.swap_cache(work, k_c, oracle(work, recall, seed=seed))
    used = found.load[found.load != NO_LOAD]
    assert len(set(used.tolist())) == len(used)
    assert len(used) + found.wasted == len(found.loads.object)
    assert (found.loads.object[used] == work.objects()[found.load != NO_LOAD]).all()
    assert ((found.place == RESIDENT) == found.was_there).all()
    ahead = found.loads.kind[used] == PREFETCH
    assert (found.place[found.load != NO_LOAD][~ahead] == LOADED).all()


def test_right_guesses_leave_only_the_first_layer_of_the_run_to_miss() -> None:
    work = decode(0)
    found = mixtral.swap_cache(work, 0, oracle(work, 1.0))
    assert not found.was_there[:2].any()
    assert found.was_there[2:].all()


def test_a_cache_of_all_experts_loads_nothing_and_one_of_none_loads_everything() -> None:
    work = decode(0)
    assert not len(mixtral.swap_cache(work, 8).loads.object)
    assert len(mixtral.swap_cache(work, 0, no_predictions(work)).loads.object) == len(work.expert)


def test_swapping_doubles_the_bytes_of_a_load() -> None:
    work = decode(0)
    once, twice = (mixtral.swap_cache(work, 1, units=units) for units in (1, 2))
    assert 2 * once.loads.units.sum() == twice.loads.units.sum()


# --- seconds --------------------------------------------------------------------------------------


def test_naive_offloading_moves_every_expert_for_every_token() -> None:
    work = decode(0, 4, 32)
    model = load_model("mixtral-8x7b")
    priced = prices(model, mixtral.machine("T4"), work, Weights(mixtral.EXPERT_BITS))
    done = mixtral.whole_layer_run(work, priced)
    whole = 256 * priced.expert_bytes
    assert done.bytes_per_token == pytest.approx(whole)
    copies_s = whole / priced.box.copy_bytes_per_s
    own_s = float(priced.before_s[0] * 32 + priced.tail_s[0]) + 64 * float(priced.gpu_s[1])
    fixed_s = 32 * (priced.box.copy_s + priced.gpu_start_s)
    assert done.seconds / 4 == pytest.approx(copies_s + own_s + fixed_s, rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(seeds, st.floats(0.5, 2.0))
def test_calibrated_prices_make_the_row_exact(seed: int, pass_s: float) -> None:
    work = decode(seed, 6, 32)
    base = prices(load_model("mixtral-8x7b"), mixtral.machine("T4"), work)
    decided = mixtral.swap_cache(work, 7)
    priced = mixtral.calibrated(work, decided, base, pass_s + 4.0)
    assert run(work, decided, priced).seconds / 6 == pytest.approx(pass_s + 4.0, rel=1e-6)


@pytest.mark.parametrize("attention_s", [1e-4, 5e-3, 1e-2, 5e-2])
def test_a_layer_lasts_as_the_formula_says_when_experts_take_no_time(attention_s: float) -> None:
    ours, formula = mixtral.layer_seconds(attention_s, 0.0)
    assert ours == pytest.approx(formula, rel=0.01)
    with_experts, bound = mixtral.layer_seconds(attention_s, 2e-3)
    assert ours <= with_experts <= bound * (1 + 1e-9)


def test_two_bit_experts_have_the_size_of_their_groups_of_sixteen() -> None:
    # 2 bits, and 8 + 8 for every 16 weights, of which each 128 share two 16-bit numbers twice
    assert pytest.approx(3.03125) == mixtral.EXPERT_BITS


# --- claims ---------------------------------------------------------------------------------------


def test_identities_and_most_rows_fall_inside(synthetic: list[Claim]) -> None:
    assert {claim.system for claim in synthetic} == {mixtral.NAME}
    assert all(claim.inside for claim in synthetic if claim.tier == "A" and claim.low is not None)
    judged = [claim for claim in synthetic if claim.tier != "A" and claim.inside is not None]
    assert len(judged) == 8
    assert sum(bool(claim.inside) for claim in judged) >= 5
    assert any("honest baseline" in claim.note for claim in synthetic)


def test_on_the_captured_trace_the_headline_rows_are_reproduced(shared: Path) -> None:

    claims = mixtral.claims(Sources(shared / "traces"))
    by_name = {claim.claim: claim for claim in claims}
    for name in mixtral.PUBLISHED:
        claim = by_name[f"{name}: tokens/s, cache and guesses"]
        assert claim.tier == "B"
        assert claim.inside
    hits = by_name["T4: hits of an LRU cache of 4 in a layer, %"].simulated
    assert 55 < hits < 65


def test_a_captured_trace_without_an_answer_is_not_used(shared: Path) -> None:
    assert mixtral.routing(Sources(shared / "traces", max_tokens=50), 100)[1] == "C"
    assert mixtral.routing(Sources(shared / "traces", max_tokens=500), 100)[1] == "B"
