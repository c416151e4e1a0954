"""Predictors: the oracle errs as often as asked, at the last ranks; others see only the past."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import SimulationError
from moesim.policies.prefetch import (
    MIXTRAL_NEXT_GATE,
    Predictions,
    accuracy,
    activation_map,
    next_gate_recall,
    no_predictions,
    oracle,
    popularity,
    previous_token,
    runners_up,
    transitions,
)
from traces.errors import TraceError
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.routing import RoutingTrace
from traces.synth import zipf_trace

seeds = st.integers(0, 10**6)
LAYERS, EXPERTS, TOP_K = 4, 12, 3


def trace_of(seed: int, tokens: int = 96, top_k: int = TOP_K) -> RoutingTrace:
    """Skewed decode routing of four requests."""
    trace = zipf_trace(tokens, LAYERS, EXPERTS, top_k, 0.8, 0.3, seed)
    place = np.arange(tokens)
    a_request = max(1, tokens // 4)
    return replace(
        trace,
        request=(place // a_request).astype(np.int32),
        position=(place % a_request).astype(np.int32),
    )


def work_of(trace: RoutingTrace, batch: int = 1) -> LayerSteps:
    return layer_steps(trace, forward_passes(trace, batch, "decode"))


def requests_of(work: LayerSteps, trace: RoutingTrace) -> np.ndarray:
    return trace.request[work.passes.rows[work.passes.start[:-1]]]


def named(predicted: Predictions, step: int) -> list[int]:
    return predicted.expert[predicted.start[step] : predicted.start[step + 1]].tolist()


def asked(work: LayerSteps, step: int) -> list[int]:
    return work.expert[work.start[step] : work.start[step + 1]].tolist()


# --- oracle -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 4, 9]))
def test_an_oracle_with_recall_one_names_exactly_the_true_experts_in_order(
    seed: int, batch: int
) -> None:
    work = work_of(trace_of(seed), batch)
    predicted = oracle(work, 1.0, seed=seed)
    np.testing.assert_array_equal(predicted.start, work.start)
    np.testing.assert_array_equal(predicted.expert, work.expert)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_an_oracle_with_recall_zero_names_as_many_experts_and_no_true_one(seed: int) -> None:
    work = work_of(trace_of(seed))
    predicted = oracle(work, 0.0, seed=seed)
    np.testing.assert_array_equal(predicted.start, work.start)
    assert accuracy(work, predicted).recall.max() == 0


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0, 1), st.sampled_from([1, 5]))
def test_mean_recall_is_the_one_asked_for_within_sampling_error(
    seed: int, recall: float, batch: int
) -> None:
    work = work_of(trace_of(seed, 2000), batch)
    found = accuracy(work, oracle(work, recall, seed=seed)).recall
    requests = len(work.expert) / work.n_layers
    # Rank makes the draws unequal, which lowers the variance of their sum below the binomial one.
    sigma = np.sqrt(max(recall * (1 - recall), 1e-12) / requests)
    assert np.abs(found - recall).max() <= 5.5 * sigma + 1e-9


def test_recall_may_differ_by_layer() -> None:
    work = work_of(trace_of(1, 4000))
    shares = np.array([0.0, 0.4, 0.8, 1.0])
    np.testing.assert_allclose(accuracy(work, oracle(work, shares)).recall, shares, atol=0.03)


@pytest.mark.parametrize("recall", [0.3, 0.5, 0.8])
def test_the_last_ranks_are_missed_more_often_in_proportion_to_their_rank(recall: float) -> None:
    work = work_of(trace_of(2, 8000, top_k=6))
    predicted = oracle(work, recall, seed=3)
    kept = np.zeros(6)
    for step in range(work.n_steps):
        kept += np.isin(asked(work, step), named(predicted, step))
    centre = (np.arange(6) + 0.5) / 6
    expected = 1 - 2 * (1 - recall) * centre if recall >= 0.5 else 2 * recall * (1 - centre)
    np.testing.assert_allclose(kept / work.n_steps, expected, atol=0.015)
    assert (np.diff(kept) < 0).all()


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 1), st.integers(0, EXPERTS), st.sampled_from([1, 6]))
def test_an_oracle_names_nothing_twice_and_as_many_as_asked_or_as_there_are(
    seed: int, recall: float, extra: int, batch: int
) -> None:
    work = work_of(trace_of(seed, 48), batch)
    predicted = oracle(work, recall, extra, seed)
    for step in range(work.n_steps):
        names, true = named(predicted, step), asked(work, step)
        right = len(set(names) & set(true))
        assert len(set(names)) == len(names)
        assert all(0 <= expert < EXPERTS for expert in names)
        # True experts come first; what is wrong or extra is never a true one.
        assert set(names[:right]) <= set(true)
        assert len(names) == min(len(true) + extra, right + EXPERTS - len(true))


def test_the_same_seed_names_the_same_experts_and_another_others() -> None:
    work = work_of(trace_of(0, 400))
    one, same, other = (oracle(work, 0.5, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.expert, same.expert)
    assert (one.expert != other.expert).any()


def test_near_misses_by_popularity_favour_popular_experts() -> None:
    trace = zipf_trace(4000, 1, EXPERTS, 1, 1.5, 0.0, 5)
    work = work_of(trace)
    uses = np.bincount(work.expert, minlength=EXPERTS)
    wrong = np.bincount(oracle(work, 0.0).expert, minlength=EXPERTS)
    assert wrong[uses.argsort()[-3:]].min() > wrong[uses.argsort()[:6]].max()


def test_near_misses_by_score_are_those_ranked_next() -> None:
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.arange(EXPERTS), (60, LAYERS, 1)), axis=2)
    ranked = np.argsort(-scores, axis=2).astype(np.int16)
    trace = replace(
        trace_of(0, 60), topk=ranked[:, :, :TOP_K].copy(), scores=scores.astype(np.float16)
    )
    passes = forward_passes(trace)
    near = runners_up(trace, passes, 4)
    rows = passes.rows
    np.testing.assert_array_equal(near, ranked[rows, :, TOP_K : TOP_K + 4].reshape(-1, 4))
    work = layer_steps(trace, passes)
    predicted = oracle(work, 0.0, near=near)
    np.testing.assert_array_equal(predicted.expert.reshape(-1, TOP_K), near[:, :TOP_K])


def test_a_trace_without_scores_has_no_runners_up() -> None:
    trace = trace_of(0)
    with pytest.raises(TraceError, match="scores, but the trace holds none"):
        runners_up(trace, forward_passes(trace), 2)


@pytest.mark.parametrize("recall", [-0.1, 1.1])
def test_a_recall_outside_zero_to_one_is_refused(recall: float) -> None:
    with pytest.raises(SimulationError, match="expected within 0..1"):
        oracle(work_of(trace_of(0)), recall)


# --- predictors that see the past ---------------------------------------------------------------

Predictor = Callable[[LayerSteps, np.ndarray], Predictions]
OF_THE_PAST: dict[str, Predictor] = {
    "previous_token": lambda work, request: previous_token(work),
    "transitions": lambda work, request: transitions(work, 4),
    "fading transitions": lambda work, request: transitions(work, 4, fade=0.7),
    "popularity": lambda work, request: popularity(work, 3, period=5),
    "activation_map": lambda work, request: activation_map(work, request, 4, n_stored=2),
}


@pytest.mark.parametrize("name", OF_THE_PAST)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, data=st.data())
def test_another_future_does_not_change_what_was_predicted_before(
    name: str, seed: int, data: st.DataObject
) -> None:
    """The routing changes from a layer-step on: what is named for it and before stays the same."""
    trace, other = trace_of(seed), trace_of(seed + 1)
    step = data.draw(st.integers(0, trace.n_tokens * LAYERS - 1))
    token, layer = divmod(step, LAYERS)
    topk = trace.topk.copy()
    topk[token, layer:] = other.topk[token, layer:]
    topk[token + 1 :] = other.topk[token + 1 :]
    changed = replace(trace, topk=topk)
    found = []
    for one in (trace, changed):
        work = work_of(one)
        found.append(OF_THE_PAST[name](work, requests_of(work, one)))
    end = found[0].start[step + 1]
    np.testing.assert_array_equal(found[0].start[: step + 2], found[1].start[: step + 2])
    np.testing.assert_array_equal(found[0].expert[:end], found[1].expert[:end])


@pytest.mark.parametrize("name", OF_THE_PAST)
def test_nothing_is_named_twice_and_every_name_is_an_expert(name: str) -> None:
    trace = trace_of(7, 200)
    work = work_of(trace)
    predicted = OF_THE_PAST[name](work, requests_of(work, trace))
    assert len(predicted.start) == work.n_steps + 1
    assert len(predicted.expert) > 0
    for step in range(work.n_steps):
        names = named(predicted, step)
        assert len(set(names)) == len(names)
        assert all(0 <= expert < EXPERTS for expert in names)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 4]))
def test_previous_token_names_the_routing_one_pass_before(seed: int, batch: int) -> None:
    work = work_of(trace_of(seed), batch)
    predicted = previous_token(work)
    for step in range(work.n_steps):
        before = asked(work, step - LAYERS) if step >= LAYERS else []
        assert named(predicted, step) == before


def test_transitions_learn_a_rule_from_layer_to_layer_after_seeing_it_once() -> None:
    """Each layer's expert is that of the layer before plus one: known from the second time on."""
    first = np.arange(60) % 5
    topk = ((first[:, None] + np.arange(LAYERS)) % EXPERTS).astype(np.int16)[:, :, None]
    work = work_of(replace(trace_of(0, 60, top_k=1), topk=topk))
    predicted = transitions(work)
    for step in range(work.n_steps):
        layer, token = step % LAYERS, step // LAYERS
        expected = asked(work, step) if layer > 0 and token >= 5 else []
        assert named(predicted, step) == expected


def test_popularity_offers_the_most_used_so_far_once_a_period() -> None:
    trace = trace_of(3, 40)
    work = work_of(trace)
    predicted = popularity(work, 2, period=10, fade=1.0)
    for step in range(work.n_steps):
        token, layer = divmod(step, LAYERS)
        if token == 0 or token % 10:
            assert named(predicted, step) == []
            continue
        uses = np.bincount(trace.topk[:token, layer].ravel(), minlength=EXPERTS)
        assert named(predicted, step) == np.argsort(-uses, kind="stable")[:2].tolist()


def test_the_activation_map_follows_the_stored_request_that_is_most_alike() -> None:
    """Two kinds of requests: from the second token on, each is told by its own kind's map."""
    kinds = np.array([0, 1, 0, 1, 1, 0])
    topk = np.repeat(3 * kinds[:, None] + np.zeros(LAYERS, int), 10, axis=0)[:, :, None]
    place = np.arange(60)
    trace = replace(
        trace_of(0, 60, top_k=1),
        topk=topk.astype(np.int16),
        request=(place // 10).astype(np.int32),
        position=(place % 10).astype(np.int32),
    )
    work = work_of(trace)
    predicted = activation_map(work, requests_of(work, trace))
    for step in range(work.n_steps):
        token = step // LAYERS
        if token % 10 == 0 or token < 10:
            assert named(predicted, step) == []  # nothing known of the request, or none stored
        elif token >= 20:
            assert named(predicted, step) == [3 * kinds[token // 10]]


def test_the_activation_map_wants_the_request_of_every_pass() -> None:
    work = work_of(trace_of(0))
    with pytest.raises(SimulationError, match=r"request: shape \(3,\)"):
        activation_map(work, np.zeros(3, np.int32))


def test_counts_below_one_are_refused() -> None:
    work = work_of(trace_of(0))
    with pytest.raises(SimulationError, match="n_named=0"):
        popularity(work, 0)
    with pytest.raises(SimulationError, match="distance=0"):
        previous_token(work).known_at(0)


# --- measuring ----------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0, 1), st.integers(0, 3))
def test_accuracy_counts_named_and_asked_experts(seed: int, recall: float, extra: int) -> None:
    work = work_of(trace_of(seed, 24), 4)
    predicted = oracle(work, recall, extra, seed)
    both, true, offered = np.zeros(LAYERS), np.zeros(LAYERS), np.zeros(LAYERS)
    for step in range(work.n_steps):
        names, needed = set(named(predicted, step)), set(asked(work, step))
        both[step % LAYERS] += len(names & needed)
        true[step % LAYERS] += len(needed)
        offered[step % LAYERS] += len(names)
    found = accuracy(work, predicted)
    np.testing.assert_allclose(found.recall, both / true)
    np.testing.assert_allclose(found.precision, both / offered)


def test_accuracy_of_no_predictions_is_no_recall_and_no_precision() -> None:
    work = work_of(trace_of(0))
    found = accuracy(work, no_predictions(work))
    assert (found.recall == 0).all()
    assert np.isnan(found.precision).all()


def test_published_next_gate_recalls_leave_out_the_first_layer_and_stretch() -> None:
    known = next_gate_recall("mixtral-8x7b", len(MIXTRAL_NEXT_GATE))
    assert known[0] == 0
    np.testing.assert_allclose(known[1:], MIXTRAL_NEXT_GATE[1:])
    for model, layers in (("mixtral-8x7b", 12), ("qwen3-30b-a3b", 48), ("another", 3)):
        found = next_gate_recall(model, layers)
        assert found.shape == (layers,)
        assert found[0] == 0
        assert (found[1:] > 0.5).all()
        assert (found < 1).all()
