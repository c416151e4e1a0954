"""Keep-sets and pins: scores, what is kept, what it covers, which task it is, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planners import keep_sets
from planners.errors import PlanError
from planners.residency_file import ResidencyFile, ResidentLayer, TierEntry
from traces.counting import total_params
from traces.models import load_model
from traces.routing import ExpertCounts, RoutingTrace

seeds = st.integers(0, 10**6)


def trace_of(
    topk: list[list[list[int]]], weights: list[list[list[float]]] | None, n_experts: int
) -> RoutingTrace:
    choices = np.array(topk, np.int16)
    tokens, layers, _ = choices.shape
    return RoutingTrace(
        topk=choices,
        n_experts=n_experts,
        layers=tuple(range(layers)),
        request=np.zeros(tokens, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        phase=np.zeros(tokens, np.int8),
        weights=None if weights is None else np.array(weights, np.float16),
    )


def random_counts(seed: int) -> ExpertCounts:
    rng = np.random.default_rng(seed)
    layers, experts = int(rng.integers(1, 5)), int(rng.integers(1, 12))
    return ExpertCounts(rng.integers(0, 9, (layers, experts)).astype(float), tuple(range(layers)))


# --- scores -------------------------------------------------------------------------------------


def test_a_score_is_the_mean_weight_over_tokens_of_the_experts_that_are_marked() -> None:
    trace = trace_of([[[0, 1]], [[1, 2]]], [[[0.25, 0.75]], [[0.5, 0.125]]], 4)
    assert keep_sets.selection_scores(trace).tolist() == [[0, (0.75 + 0.5) / 2, 0, 0]]
    both = [[0.125, (0.75 + 0.5) / 2, 0.0625, 0]]
    assert keep_sets.selection_scores(trace, marked=2).tolist() == both


def test_full_scores_are_used_as_they_are_and_negative_ones_count_against_an_expert() -> None:
    scores = np.array([[[-1.0, -2.0, -9.0]], [[3.0, 1.0, 2.0]]], np.float16)
    plain = trace_of([[[0, 1]], [[0, 2]]], None, 3)
    trace = RoutingTrace(
        plain.topk, 3, (0,), plain.request, plain.position, plain.phase, scores=scores
    )
    assert keep_sets.selection_scores(trace).tolist() == [[1.0, 0.0, 0.0]]
    assert keep_sets.selection_scores(trace, 2).tolist() == [[1.0, -1.0, 1.0]]


def test_missing_choices_score_nothing() -> None:
    trace = trace_of([[[0, -1]], [[-1, -1]]], [[[0.5, 0.9]], [[0.9, 0.9]]], 2)
    assert keep_sets.selection_scores(trace, 2).tolist() == [[0.25, 0.0]]


def test_a_trace_without_scores_or_with_counts_only_is_refused() -> None:
    bare = trace_of([[[0]]], None, 2)
    with pytest.raises(PlanError, match="neither gate weights nor router scores"):
        keep_sets.selection_scores(bare)
    with pytest.raises(PlanError, match=r"marked=2, expected 1\.\.1"):
        keep_sets.selection_scores(bare, 2)
    with pytest.raises(ValueError, match="needs token order"):
        keep_sets.selection_scores(random_counts(0))


# --- keep-sets and coverage ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_coverage_grows_with_the_set_up_to_everything_and_no_set_beats_the_counts_own(
    seed: int,
) -> None:
    counts = random_counts(seed)
    scores = np.random.default_rng(seed + 1).random(counts.counts.shape)
    counted = counts.counts.sum(axis=1) > 0
    before = np.zeros(counts.n_layers)
    for n in range(1, counts.n_experts + 1):
        own = keep_sets.coverage(counts, keep_sets.keep_set(counts.counts, n))
        share = keep_sets.coverage(counts, keep_sets.keep_set(scores, n))
        assert (share[counted] >= before[counted]).all()
        assert (own[counted] >= share[counted] - 1e-12).all()
        assert np.isnan(share[~counted]).all()
        before = share
    assert before[counted] == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 11))
def test_pinned_experts_stay_whatever_their_score_and_the_rest_goes_by_score(
    seed: int, n: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random((3, 11))
    pinned = np.zeros(scores.shape, bool)
    pinned[1, rng.choice(11, min(n, 2), replace=False)] = True
    kept = keep_sets.keep_set(scores, n, pinned)
    assert kept.shape == (3, n)
    assert set(np.flatnonzero(pinned[1])) <= set(kept[1].tolist())
    assert kept[0].tolist() == np.argsort(-scores[0])[:n].tolist()
    others = [expert for expert in kept[1].tolist() if not pinned[1, expert]]
    ranked = [e for e in np.argsort(-scores[1]).tolist() if not pinned[1, e]]
    assert others == ranked[: len(others)]


def test_a_keep_set_too_small_for_its_pins_is_refused() -> None:
    pinned = np.array([[False] * 4, [True, True, False, False]])
    with pytest.raises(PlanError, match="layer 1: 2 experts pinned, only 1 stay"):
        keep_sets.keep_set(np.zeros((2, 4)), 1, pinned)
    with pytest.raises(PlanError, match=r"n=5, expected 1\.\.n_experts"):
        keep_sets.keep_set(np.zeros((2, 4)), 5)
    with pytest.raises(PlanError, match="pinned: shape"):
        keep_sets.keep_set(np.zeros((2, 4)), 1, pinned[:1])


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(0.01, 1.0))
def test_the_least_set_for_a_share_reaches_it_and_one_expert_fewer_does_not(
    seed: int, share: float
) -> None:
    counts = random_counts(seed)
    if not counts.counts.any():
        return
    scores = np.random.default_rng(seed).random(counts.counts.shape)
    n = keep_sets.kept_for_share(counts, scores, share)

    def covered(kept: np.ndarray) -> float:
        inside = np.take_along_axis(counts.counts, kept, axis=1).sum()
        return float(inside / counts.counts.sum())

    assert covered(keep_sets.keep_set(scores, n)) >= share - 1e-9
    if n > 1:
        assert covered(keep_sets.keep_set(scores, n - 1)) < share


def test_the_nearest_task_is_by_distance_not_by_angle() -> None:
    tasks = [np.array([1.0, 0.0]), np.array([9.0, 1.0])]
    assert keep_sets.nearest_task(np.array([2.0, 0.3]), tasks) == 0
    assert keep_sets.nearest_task(np.array([8.0, 0.0]), tasks) == 1
    with pytest.raises(PlanError, match="tasks: none given"):
        keep_sets.nearest_task(np.zeros(2), [])


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deepseek-r1", "mixtral-8x7b", "qwen3-30b-a3b"])
def test_kept_bytes_go_in_a_straight_line_from_the_rest_to_the_whole_model(name: str) -> None:
    spec = load_model(name)
    every, none = keep_sets.kept_bytes(spec, spec.n_experts), keep_sets.kept_bytes(spec, 0)
    assert every == 2 * total_params(spec)
    half = keep_sets.kept_bytes(spec, spec.n_experts // 2)
    assert 2 * half == every + none
    with pytest.raises(PlanError, match="n=-1"):
        keep_sets.kept_bytes(spec, -1)


# --- super experts ------------------------------------------------------------------------------


def test_super_experts_are_extreme_and_early() -> None:
    peaks = np.ones((8, 100))
    peaks[1, 7], peaks[5, 3] = 1000.0, 101.0
    peaks[2, 4] = 100.0  # just a tenth of the largest is not above it
    peaks[6, 2] = 5000.0 / 5  # in the last quarter
    assert np.argwhere(keep_sets.super_experts(peaks)).tolist() == [[1, 7], [5, 3]]


def test_where_many_are_high_only_the_top_half_percent_counts() -> None:
    peaks = np.ones((4, 100))
    peaks[0, :20] = 50.0 + np.arange(20)
    found = keep_sets.super_experts(peaks)
    assert np.argwhere(found).tolist() == [[0, 18], [0, 19]]  # 0.5 % of 400


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(1e-3, 1e3))
def test_super_experts_do_not_depend_on_the_scale_and_even_peaks_have_none(
    seed: int, scale: float
) -> None:
    peaks = np.random.default_rng(seed).lognormal(0, 2, (8, 40))
    found = keep_sets.super_experts(peaks)
    assert (keep_sets.super_experts(peaks * 2.0 ** round(np.log2(scale))) == found).all()
    assert found.sum() <= np.ceil(0.005 * peaks.size)
    assert not found[6:].any()
    assert not keep_sets.super_experts(np.full((8, 40), scale)).any()


def test_peaks_that_are_not_magnitudes_are_refused() -> None:
    for bad in (np.array([[-1.0]]), np.array([[np.nan]]), np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(PlanError, match="expected finite magnitudes"):
            keep_sets.super_experts(bad)


def plan_of(tiers: list[list[int]], bits: list[list[float]]) -> ResidencyFile:
    """A plan with a dense layer 0 and one MoE layer for each row."""
    layers = [ResidentLayer(layer=0, kind="dense")]
    for row, (tier, bit) in enumerate(zip(tiers, bits, strict=True)):
        layers.append(ResidentLayer(layer=row + 1, kind="moe", expert_tier=tier, expert_bits=bit))
    return ResidencyFile(
        model="m",
        n_experts=len(tiers[0]),
        top_k=1,
        expert_bytes=100,
        tiers=[
            TierEntry(name="gpu", kind="device", capacity_bytes=1000),
            TierEntry(name="ram", kind="host", capacity_bytes=1000),
        ],
        layers=layers,
    )


def test_a_plan_that_moves_or_squeezes_a_pinned_expert_is_refused() -> None:
    pinned = np.array([[False, False], [False, True]])
    keep_sets.require_pinned(plan_of([[1, 1], [1, 0]], [[4, 4], [4, 16]]), pinned)
    with pytest.raises(PlanError, match="layer 2: pinned expert 1 is in tier ram at 16 bits"):
        keep_sets.require_pinned(plan_of([[0, 0], [0, 1]], [[16, 16], [16, 16]]), pinned)
    with pytest.raises(PlanError, match=r"tier gpu at 8 bits, expected gpu at 16 or more"):
        keep_sets.require_pinned(plan_of([[0, 0], [0, 0]], [[16, 16], [16, 8]]), pinned)
    with pytest.raises(PlanError, match=r"pinned: shape \(1, 2\), expected \(2, 2\)"):
        keep_sets.require_pinned(plan_of([[0, 0], [0, 0]], [[16, 16], [16, 16]]), pinned[:1])


# --- captured -----------------------------------------------------------------------------------


def test_scores_of_a_captured_trace_add_up_to_its_gate_weights(shared: Path) -> None:
    from traces.formats.detect import read_any

    trace = read_any(shared / "traces" / "deepseek-v2-lite-law.npz")
    assert isinstance(trace, RoutingTrace)
    assert trace.weights is not None
    weights = trace.weights.astype(np.float64)
    every = keep_sets.selection_scores(trace, trace.top_k)
    assert every.sum(axis=1) == pytest.approx(weights.sum(axis=2).mean(axis=0))
    best = keep_sets.selection_scores(trace)
    assert best.sum(axis=1) == pytest.approx(weights.max(axis=2).mean(axis=0))
