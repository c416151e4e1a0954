"""Fate: laws of its systems, and the claims with their verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.offload.policy import OffloadPolicy
from moesim.offload.simulate import simulate
from moesim.reproduce import fate
from moesim.reproduce.claim import Claim
from moesim.reproduce.fate_setup import (
    PROMPT_TOKENS,
    SUBJECTS,
    Routing,
    Window,
    box,
    layer_recall,
    routing,
    windows,
    with_slow_copies,
)
from moesim.reproduce.sources import Sources
from traces.layer_steps import LayerSteps, layer_steps

PRICED, PACED = "priced", "published pace"
HIT, DEMAND = "hit rate with half the cache, %", "decode over Load-on-Demand"
PATH = "decode over Expert Activation Path"
# Claims outside their band on generated routing, and why, in the words of their notes.
OUTSIDE = {
    f"DeepSeekMoE-16B: {HIT}, {PRICED}": "a layer ends before one copy does",
    f"DeepSeekMoE-16B: {PATH}, {PRICED}": "takes time of the link",
    f"DeepSeekMoE-16B: {DEMAND}, {PACED}": "2 ms a copy",
    f"DeepSeekMoE-16B: {PATH}, {PACED}": "2 ms a copy",
    f"Qwen1.5-MoE: {HIT}, {PRICED}": "a layer ends before one copy does",
    f"Qwen1.5-MoE: {DEMAND}, {PRICED}": "takes time of the link",
    f"Qwen1.5-MoE: {PATH}, {PRICED}": "takes time of the link",
    f"Qwen1.5-MoE: {DEMAND}, {PACED}": "2 ms a copy",
    f"Qwen1.5-MoE: {PATH}, {PACED}": "2 ms a copy",
}


@pytest.fixture(scope="module")
def claims() -> list[Claim]:
    return fate.claims(Sources())


@pytest.fixture(scope="module")
def route() -> Routing:
    """DeepSeekMoE's, drawn by Zipf's law."""
    return routing(SUBJECTS[0], Sources())


@pytest.fixture(scope="module")
def both(route: Routing) -> tuple[Window, Window]:
    return windows(route, box("rtx-3090", "pcie-3-x16"))


def figure(claims: list[Claim], name: str) -> float:
    return next(one.simulated for one in claims if one.claim == name)


# --- claims -------------------------------------------------------------------------------------


def test_claims_outside_their_band_are_the_known_ones_and_say_why(claims: list[Claim]) -> None:
    outside = {one.claim: one.note for one in claims if one.verdict == "outside"}
    assert set(outside) == set(OUTSIDE)
    assert all(OUTSIDE[claim] in note for claim, note in outside.items())


def test_every_claim_has_its_own_name_and_says_what_it_rests_on(claims: list[Claim]) -> None:
    assert len({one.claim for one in claims}) == len(claims)
    assert all(one.system == "fate" and one.tier == "C" for one in claims)
    assert all(one.note and one.convention for one in claims)


@pytest.mark.parametrize("model", ["DeepSeekMoE-16B", "Qwen1.5-MoE"])
def test_at_the_published_pace_hits_and_names_are_as_published(
    claims: list[Claim], model: str
) -> None:
    assert figure(claims, f"{model}: {HIT}, {PACED}") == pytest.approx(99.08, abs=1)
    found = figure(claims, f"{model}: experts found by all names, %, {PACED}")
    assert found == pytest.approx(97.15, abs=2)
    assert figure(claims, f"{model}: a prompt's experts found by the gates, %, {PRICED}") > 99.6


def test_the_shallow_rule_pays_on_both_models_in_both_windows(claims: list[Claim]) -> None:
    found = [one for one in claims if "shallow rule" in one.claim]
    assert len(found) == 4
    assert all(one.inside for one in found)


def test_prefetch_alone_is_slower_than_a_cache_alone_where_nothing_hides(
    claims: list[Claim],
) -> None:
    found = [one for one in claims if "prefetch alone" in one.claim]
    assert [one.verdict for one in found] == ["inside", "shown", "inside", "shown"]
    assert [one.simulated < 1 for one in found] == [True, False, True, False]


def test_copies_as_slow_as_the_papers_baselines_bring_its_factor(claims: list[Claim]) -> None:
    slow = [one for one in claims if "as slow as" in one.claim]
    assert len(slow) == 2
    for one in slow:
        assert one.verdict == "shown"
        assert "added after" in one.note
        assert one.simulated == pytest.approx(2.2, abs=0.5)


def test_the_honest_baseline_with_a_cpu_is_faster_at_the_devices_rates(
    claims: list[Claim],
) -> None:
    for model in ("DeepSeekMoE-16B", "Qwen1.5-MoE"):
        name = f"{model}: decode over the honest baseline, {PRICED}"
        assert figure(claims, name) < 1


def test_a_hit_rate_near_one_may_be_slower_than_none() -> None:
    ahead, without = fate.port(seed=0)
    assert ahead.hit_rate > 0.999
    assert without.hit_rate == 0
    assert ahead.tokens_per_s < 0.5 * without.tokens_per_s
    assert ahead.bytes_per_token == pytest.approx(192 * 38e6, rel=0.01)
    assert ahead.stall_s_per_token > without.stall_s_per_token


# --- systems ------------------------------------------------------------------------------------


def test_overlap_never_makes_loading_on_demand_slower(
    route: Routing, both: tuple[Window, Window]
) -> None:
    cost = both[0].prices
    serial_s = fate.on_demand_seconds(route.work, cost)
    overlapped = simulate(route.work, cost, OffloadPolicy())
    assert overlapped.loads == len(route.work.expert)
    assert 0.8 * serial_s < overlapped.seconds <= serial_s * 1.02


def test_low_bit_misses_move_fewer_bytes_and_take_less_time(
    route: Routing, both: tuple[Window, Window]
) -> None:
    low, full = fate.fate(route, both[0], low=True), fate.fate(route, both[0])
    assert 0 < low.low_share < 0.3
    assert full.low_share == 0
    assert low.bytes_per_token < full.bytes_per_token
    assert low.seconds < full.seconds


def test_more_names_hit_more_and_move_more(route: Routing, both: tuple[Window, Window]) -> None:
    priced, paced = both
    assert priced.names(6) == 6
    assert paced.names(6) == paced.hidden == 11
    few = fate.fate(route, priced)
    many = fate.fate(route, replace(priced, layer_s=paced.layer_s))
    assert many.hit_rate > few.hit_rate
    assert many.bytes_per_token > few.bytes_per_token


def test_slow_copies_are_those_that_load_on_demand_needs(
    route: Routing, both: tuple[Window, Window]
) -> None:
    paced = both[1]
    slow = with_slow_copies(paced, 6, 4.1)
    of_layers = 4.1 * paced.layer_s * route.work.n_layers * route.decode.n_passes
    rest = (slow.first_s + slow.tail_s).sum()
    assert fate.on_demand_seconds(route.work, slow) - rest == pytest.approx(of_layers, rel=0.01)


def test_recall_rises_over_the_layers_to_the_published_mean() -> None:
    recall = layer_recall("deepseek-moe-16b", 26)
    assert recall[0] == 0
    assert recall[1:].mean() == pytest.approx(0.84)
    assert recall[1:4].mean() < recall[10:].mean()


def test_a_prompts_experts_are_ordered_by_tokens_and_stay_the_same(route: Routing) -> None:
    work = layer_steps(route.trace, route.prompt(0))
    ordered = fate.popular_first(work)
    assert (ordered.start == work.start).all()
    for step in range(work.n_steps):
        cells = slice(work.start[step], work.start[step + 1])
        assert (np.diff(ordered.tokens[cells]) <= 0).all()
        pairs = sorted(zip(ordered.expert[cells], ordered.tokens[cells], strict=True))
        assert pairs == sorted(zip(work.expert[cells], work.tokens[cells], strict=True))
        assert work.tokens[cells].sum() == PROMPT_TOKENS * work.top_k


def test_popular_experts_first_ends_a_prompt_no_later_than_last(route: Routing) -> None:
    on = box("gtx-1080-ti", "pcie-3-x16")
    work = fate.popular_first(layer_steps(route.trace, route.prompt(0)))
    cost = fate.prices(route.model, on, work, fate.FORM)
    first, last = (simulate(one, cost, OffloadPolicy()).seconds for one in (work, _last(work)))
    assert first <= last


def _last(work: LayerSteps) -> LayerSteps:
    """Every layer-step's experts the other way round."""
    back = np.concatenate(
        [np.arange(e - 1, s - 1, -1) for s, e in zip(work.start, work.start[1:], strict=False)]
    )
    return replace(work, expert=work.expert[back], tokens=work.tokens[back])


def test_routing_fitted_to_a_captured_trace_says_so(shared: Path) -> None:
    fitted = routing(SUBJECTS[0], Sources(shared / "traces"))
    assert fitted.fitted
    assert "deepseek-v2-lite-law" in fitted.origin
    assert fitted.work.n_layers == 26
    hits = fate.fate(fitted, windows(fitted, box("rtx-3090", "pcie-3-x16"))[1]).hit_rate
    assert hits == pytest.approx(0.9908, abs=0.01)
