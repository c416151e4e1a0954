"""The early gate: its recall is what was asked for, and more names find more experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.policies.noisy_gate import correlation_for, named, rank_ahead
from moesim.policies.prefetch import accuracy
from traces.layer_steps import ForwardPasses, forward_passes, layer_steps
from traces.routing import PREFILL, RoutingTrace
from traces.synth import zipf_trace

LAYERS, EXPERTS, TOP_K = 4, 64, 6


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return zipf_trace(1500, LAYERS, EXPERTS, TOP_K, 0.6, 0.2, seed=1)


def one_pass(n: int) -> ForwardPasses:
    return ForwardPasses(
        np.arange(n), np.array([0, n]), np.array([PREFILL], np.int8), np.zeros(1),
        np.ones(1, np.int32),
    )  # fmt: skip


def test_top_k_names_find_the_share_that_was_asked_for(trace: RoutingTrace) -> None:
    recall = np.array([0.0, 0.6, 0.84, 0.95])
    passes = forward_passes(trace)
    names = named(rank_ahead(trace, recall), passes, TOP_K, TOP_K)
    found = accuracy(layer_steps(trace, passes), names).recall
    assert found[0] == 0  # nothing is known of the first layer
    assert found[1:] == pytest.approx(recall[1:], abs=0.02)


def test_further_names_find_what_the_first_ones_missed(trace: RoutingTrace) -> None:
    ranked, passes = rank_ahead(trace, np.full(LAYERS, 0.84)), forward_passes(trace)
    work = layer_steps(trace, passes)
    found = [
        accuracy(work, named(ranked, passes, n, TOP_K)).recall[1:].mean()
        for n in (TOP_K, TOP_K + 2, TOP_K + 4, EXPERTS)
    ]
    assert (np.diff(found) > 0).all()
    assert found[2] > 0.96
    assert found[3] == 1


@given(st.integers(1, 8))
def test_a_better_gate_correlates_more(top_k: int) -> None:
    recall = np.linspace(0, 1, 21)
    correlation = correlation_for(recall, 32, top_k)
    assert (np.diff(correlation) >= 0).all()
    assert correlation[0] == 0
    assert correlation[-1] == pytest.approx(1)


def test_every_expert_chosen_needs_no_luck() -> None:
    assert correlation_for(np.array([0.5]), 4, 4) == 1


def test_a_perfect_gate_ranks_the_chosen_first_by_weight(trace: RoutingTrace) -> None:
    weights = np.tile(np.arange(1, TOP_K + 1, dtype=np.float16), (trace.n_tokens, LAYERS, 1))
    weighed = RoutingTrace(
        trace.topk, EXPERTS, trace.layers, trace.request, trace.position, trace.phase,
        weights=weights,
    )  # fmt: skip
    ranked = rank_ahead(weighed, np.ones(LAYERS))
    assert (ranked[:, :, :TOP_K] == trace.topk[:, :, ::-1]).all()


def test_a_ranking_holds_every_expert_once(trace: RoutingTrace) -> None:
    ranked = rank_ahead(trace.rows(slice(0, 50)), np.full(LAYERS, 0.7))
    assert (np.sort(ranked, axis=2) == np.arange(EXPERTS)).all()


def test_a_prompt_names_the_union_most_named_first(trace: RoutingTrace) -> None:
    ranked = rank_ahead(trace, np.full(LAYERS, 0.84))
    names = named(ranked, one_pass(200), EXPERTS, TOP_K)
    for layer in range(LAYERS):
        found = names.expert[names.start[layer] : names.start[layer + 1]]
        if layer == 0:
            assert not len(found)
            continue
        count = np.bincount(ranked[:200, layer, :TOP_K].ravel(), minlength=EXPERTS)
        assert set(found) == set(np.flatnonzero(count))
        assert (np.diff(count[found]) <= 0).all()
    few = named(ranked, one_pass(200), 10, TOP_K)
    assert (np.diff(few.start) == [0, 10, 10, 10]).all()


def test_passes_of_one_token_and_longer_ones_may_mix(trace: RoutingTrace) -> None:
    passes = ForwardPasses(
        np.arange(12), np.array([0, 10, 11, 12]), np.array([0, 1, 1], np.int8), np.zeros(3),
        np.ones(3, np.int32),
    )  # fmt: skip
    ranked = rank_ahead(trace, np.full(LAYERS, 0.84))
    mixed = named(ranked, passes, 8, TOP_K, unpredicted=2)
    one = mixed.expert[mixed.start[LAYERS + 2] : mixed.start[LAYERS + 3]]
    assert (one == ranked[10, 2, :8]).all()
    assert (np.diff(mixed.start).reshape(3, LAYERS)[:, :2] == 0).all()


def test_wrong_shapes_and_missing_choices_are_refused(trace: RoutingTrace) -> None:
    with pytest.raises(SimulationError, match="layers"):
        rank_ahead(trace, np.ones(LAYERS + 1))
    with pytest.raises(SimulationError, match="within 0..1"):
        rank_ahead(trace, np.full(LAYERS, 1.5))
    holes = trace.topk.copy()
    holes[0, 2, 0] = -1
    broken = RoutingTrace(holes, EXPERTS, trace.layers, trace.request, trace.position, trace.phase)
    with pytest.raises(SimulationError, match="layer 2"):
        rank_ahead(broken, np.ones(LAYERS))
