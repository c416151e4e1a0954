"""Generated traces: laws, plain counting as the oracle, and fidelity to two captured traces."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.synth_plain import affinity_plain, counts_plain
from traces import edit, synth, synth_calibrate, synth_kernels, synth_model
from traces.errors import TraceError
from traces.formats.detect import read_any
from traces.locality import reuse_ratio
from traces.routing import DECODE, MISSING, PREFILL, RoutingTrace, content_hash, expert_counts

LAGS, AGES = (1, 3), (1, 2, 4)


def random_trace(seed: int, missing_share: float = 0.1) -> RoutingTrace:
    """A small trace in request order, with some cells missing."""
    rng = np.random.default_rng(seed)
    tokens, layers, experts = int(rng.integers(2, 40)), int(rng.integers(1, 4)), 5
    k = int(rng.integers(1, 4))
    topk = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k].astype(np.int16)
    topk[rng.random(topk.shape) < missing_share] = MISSING
    request = np.sort(rng.integers(0, 4, tokens)).astype(np.int32)
    return RoutingTrace(
        topk=topk,
        n_experts=experts,
        layers=tuple(range(1, layers + 1)),
        request=request,
        position=np.arange(tokens, dtype=np.int32),
        phase=rng.integers(0, 2, tokens).astype(np.int8),
    )


traces = st.builds(random_trace, st.integers(0, 10**6), st.sampled_from([0.0, 0.2]))


@pytest.fixture(scope="module")
def small() -> RoutingTrace:
    """Four layers, eight experts, prefill then decode in requests of differing length."""
    trace = synth.zipf_trace(3000, 4, 8, 2, exponent=1.0, reuse=0.4, seed=1)
    rng = np.random.default_rng(2)
    lengths = rng.integers(20, 200, 60)
    lengths = lengths[np.cumsum(lengths) <= trace.n_tokens]
    trace = trace.rows(slice(0, int(lengths.sum())))
    request = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    phase = np.where(position < 10, PREFILL, DECODE).astype(np.int8)
    return replace(trace, request=request, position=position + 7, phase=phase)


@pytest.fixture(scope="module")
def fitted(small: RoutingTrace) -> synth.FittedTrace:
    return synth.fit(small, seed=3, rounds=10)


# --- counting -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(traces)
def test_compiled_counts_equal_plain_counting(trace: RoutingTrace) -> None:
    n_layers, n_experts = trace.n_layers, trace.n_experts
    bucket = np.searchsorted(AGES, np.arange(AGES[-1] + 2)).astype(np.int64)
    shapes = {
        "chosen": (n_layers, n_experts),
        "kept": (n_layers, n_experts),
        "aged": (n_layers, len(AGES) + 1),
        "exposed": (n_layers, len(AGES) + 1),
        "far": (n_layers,),
        "compared": (n_layers,),
        "together": (n_layers, n_experts, n_experts),
        "following": (n_layers - 1, n_experts, n_experts),
    }
    got = {name: np.zeros(shape) for name, shape in shapes.items()}
    first = synth_model.starts(trace.request)
    lags = np.array(LAGS, dtype=np.int64)
    synth_kernels.count_choices(trace.topk, first, lags, bucket, tuple(got.values()))
    for name, cells in counts_plain(trace, LAGS, AGES).items():
        assert {tuple(c): got[name][tuple(c)] for c in np.argwhere(got[name])} == {
            cell: count for cell, count in cells.items() if count
        }, name


@settings(max_examples=40, deadline=None)
@given(traces)
def test_affinity_equals_agreement_of_tokens_of_different_requests(trace: RoutingTrace) -> None:
    if len(np.unique(trace.request)) < 2:
        return  # a single request is cut into stretches, which the plain form does not do
    ratios = synth.affinity_ratio(trace)
    assert ratios.shape == (trace.n_layers - 1,)
    for layer, ratio in enumerate(ratios):
        assert ratio == pytest.approx(affinity_plain(trace, layer), nan_ok=True, rel=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 1.0], ids=["even", "skewed"])
def test_affinity_of_independent_layers_is_one_on_average_however_few_the_tokens(
    exponent: float,
) -> None:
    ratios = []
    for seed in range(60):
        drawn = synth.zipf_trace(60, 20, 16, 2, exponent=exponent, seed=seed)
        ratios.append(np.mean(synth.affinity_ratio(_requests_of(drawn, 1))))
    # the plain estimate would be about 1 + 15^2 / (60 * 4) = 1.94
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.03)


def test_affinity_of_layers_that_copy_each_other_is_the_number_of_experts() -> None:
    trace = synth.uniform_trace(40_000, 1, 8, 1, seed=5)
    copied = replace(trace, topk=np.repeat(trace.topk, 3, axis=1), layers=(0, 1, 2))
    assert synth.affinity_ratio(copied) == pytest.approx([8.0, 8.0], rel=0.01)


def test_affinity_needs_a_token_and_two_tokens_to_compare() -> None:
    trace = synth.uniform_trace(4, 3, 4, 1)
    with pytest.raises(TraceError, match="affinity needs at least one token"):
        synth.affinity_ratio(trace.rows(slice(0, 0)))
    assert np.isnan(synth.affinity_ratio(trace.rows(slice(0, 1)))).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_reuse_of_the_fit_is_the_reuse_of_the_statistics(seed: int) -> None:
    trace = random_trace(seed, missing_share=0.0)
    first = synth_model.starts(trace.request)
    if first.all():
        return
    measured = synth_calibrate.measure(trace.topk, first, trace.n_experts)
    assert measured.reuse == pytest.approx(reuse_ratio(trace), rel=1e-9)


def test_taking_out_counting_noise_leaves_the_wanted_sum_of_squares_and_the_margins() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(1, 50, (3, 6, 6)).astype(np.float64)
    pairs /= pairs.sum(axis=(1, 2), keepdims=True)
    wanted = np.array([1.02, 1.05, np.nan])
    cleaned = synth_calibrate.without_counting_noise(pairs, wanted)
    independent = pairs.sum(axis=2)[:, :, None] * pairs.sum(axis=1)[:, None, :]
    assert (cleaned**2 / independent).sum(axis=(1, 2)) == pytest.approx([1.02, 1.05, 1.0])
    assert cleaned.sum(axis=2) == pytest.approx(pairs.sum(axis=2))
    assert cleaned.sum(axis=1) == pytest.approx(pairs.sum(axis=1))


# --- drawing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e8], ids=["near weights", "one weight dwarfs the rest"])
def test_draws_without_replacement_have_the_exact_probabilities(scale: float) -> None:
    weight = np.array([1.0, 5.0 * scale, 2.0, 4.0], dtype=np.float32)
    rng, n = np.random.default_rng(1), 40_000
    seen: dict[tuple[int, ...], int] = {}
    chosen = np.empty(2, dtype=np.int16)
    for _ in range(n):
        synth_kernels.draw_without_replacement(weight.copy(), chosen, rng)
        key = tuple(int(e) for e in chosen)
        seen[key] = seen.get(key, 0) + 1
    total = float(weight.sum())
    for a, b in permutations(range(4), 2):
        others = float(np.delete(weight, a).sum())
        exact = float(weight[a]) / total * float(weight[b]) / others
        spread = np.sqrt(exact * (1 - exact) / n)
        assert seen.get((a, b), 0) / n == pytest.approx(exact, abs=5 * spread + 1e-9)


def test_tokens_never_choose_an_expert_twice(fitted: synth.FittedTrace) -> None:
    topk = synth.generate(fitted, n_tokens=2000, seed=1).topk
    assert (np.diff(np.sort(topk, axis=2), axis=2) > 0).all()
    assert topk.min() >= 0
    assert topk.max() < 8


def test_same_seed_same_bytes_and_another_seed_others(
    small: RoutingTrace, fitted: synth.FittedTrace
) -> None:
    again = synth.fit(small, seed=3, rounds=10)
    one = content_hash(synth.generate(fitted, n_tokens=2000, seed=4))
    assert one == content_hash(synth.generate(again, n_tokens=2000, seed=4))
    assert one != content_hash(synth.generate(fitted, n_tokens=2000, seed=5))


def test_as_many_requests_as_the_source_have_its_lengths_phases_and_positions(
    small: RoutingTrace, fitted: synth.FittedTrace
) -> None:
    made = synth.generate(fitted, n_requests=fitted.requests.n_requests, seed=2)
    assert made.n_tokens == small.n_tokens
    assert sorted(np.bincount(made.request)) == sorted(np.bincount(small.request))
    assert np.bincount(made.phase).tolist() == np.bincount(small.phase).tolist()
    starts = synth_model.starts(made.request)
    assert (made.position[starts] == 7).all()
    assert (np.diff(made.position)[~starts[1:]] == 1).all()
    assert ((made.position < 17) == (made.phase == PREFILL)).all()


@pytest.mark.parametrize("n_tokens", [1, 777, 9000])
def test_asked_for_tokens_gives_exactly_as_many(fitted: synth.FittedTrace, n_tokens: int) -> None:
    made = synth.generate(fitted, n_tokens=n_tokens)
    assert made.n_tokens == n_tokens
    assert (made.layers, made.n_experts, made.top_k) == ((0, 1, 2, 3), 8, 2)


@pytest.mark.parametrize("size", [{}, {"n_tokens": 5, "n_requests": 5}, {"n_requests": 0}])
def test_size_is_asked_for_once_and_positive(
    fitted: synth.FittedTrace, size: dict[str, int]
) -> None:
    with pytest.raises(TraceError, match="give exactly one, at least 1"):
        synth.generate(fitted, **size)


def test_an_empty_trace_or_a_negative_seed_is_refused(small: RoutingTrace) -> None:
    with pytest.raises(TraceError, match="fit needs at least one token"):
        synth.fit(small.rows(slice(0, 0)))
    with pytest.raises(TraceError, match="seed=-1"):
        synth.fit(small, seed=-1)


@pytest.mark.parametrize(("n_layers", "top_k"), [(1, 1), (1, 3), (2, 1), (2, 4)])
def test_one_layer_one_expert_a_token_or_all_of_them_can_be_fitted(
    n_layers: int, top_k: int
) -> None:
    trace = synth.zipf_trace(600, n_layers, 4, top_k, exponent=1.0, reuse=0.3)
    made = synth.generate(synth.fit(trace, rounds=4), n_tokens=300)
    assert made.topk.shape == (300, n_layers, top_k)


def test_missing_cells_are_skipped_not_generated(small: RoutingTrace) -> None:
    topk = small.topk.copy()
    topk[np.random.default_rng(0).random(topk.shape) < 0.3] = MISSING
    made = synth.generate(synth.fit(replace(small, topk=topk), rounds=8), n_tokens=3000)
    assert (made.topk != MISSING).all()
    assert _popularity_distance(small, made).max() < 0.08


def test_a_trace_of_too_many_requests_is_fitted_on_a_sample_that_is_named() -> None:
    trace = synth.uniform_trace(9000, 1, 4, 1)
    trace = _requests_of(trace, 3)
    fitted = synth.fit(trace, rounds=1)
    assert fitted.requests.n_requests == 2048
    assert fitted.sample_share == pytest.approx(2048 / 3000)


# --- laws without a source ----------------------------------------------------------------------


def test_zipf_popularity_follows_the_law() -> None:
    trace = synth.zipf_trace(60_000, 3, 16, 1, exponent=1.2, seed=3)
    law = np.arange(1, 17) ** -1.2 / (np.arange(1, 17) ** -1.2).sum()
    for counts in expert_counts(trace).counts:
        assert np.sort(counts)[::-1] / 60_000 == pytest.approx(law, abs=0.01)


def test_reuse_of_one_repeats_the_first_token_and_none_is_independent() -> None:
    frozen = synth.zipf_trace(1024, 2, 16, 4, exponent=0.5, reuse=1.0)
    for request in range(4):
        assert np.unique(frozen.topk[frozen.request == request], axis=0).shape[0] == 1
    free = synth.uniform_trace(40_000, 2, 16, 4)
    assert reuse_ratio(free) == pytest.approx([1.0, 1.0], abs=0.01)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([(4, 1), (4, 4), (9, 3)]), st.floats(0, 1))
def test_law_traces_are_valid_and_repeatable(
    seed: int, shape: tuple[int, int], reuse: float
) -> None:
    made = [synth.zipf_trace(300, 2, *shape, exponent=2.0, reuse=reuse, seed=seed) for _ in "ab"]
    assert content_hash(made[0]) == content_hash(made[1])
    assert (np.diff(np.sort(made[0].topk, axis=2), axis=2) > 0).all()
    assert np.bincount(made[0].request).tolist() == [256, 44]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exponent": -1.0}, "exponent=-1.0, expected 0..20"),
        ({"exponent": float("nan")}, "exponent=nan"),
        ({"reuse": 1.5}, "reuse=1.5, expected a chance"),
        ({"top_k": 9}, "top_k=9"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"seed": -2}, "seed=-2"),
    ],
)
def test_a_law_out_of_range_is_refused_by_name(change: dict[str, float], message: str) -> None:
    usual = {"n_tokens": 10, "n_layers": 1, "n_experts": 8, "top_k": 2}
    with pytest.raises(TraceError, match=message):
        synth.zipf_trace(**(usual | change))  # type: ignore[arg-type]


# --- fidelity to captured traces ------------------------------------------------------------------

TOLERANCE = 0.05


@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("file", "n_requests"), [("mixtral-8x7b-mtbench.npz", 63), ("gpt-oss-20b-decode.npz", 100)]
)
def test_generated_trace_keeps_popularity_reuse_and_affinity_within_five_percent(
    shared: Path, file: str, n_requests: int
) -> None:
    whole = read_any(shared / "traces" / file)
    assert isinstance(whole, RoutingTrace)
    # a quarter of gpt-oss keeps the test short; benchmarks/synth_fidelity.py takes all of it
    requests = np.random.default_rng(0).permutation(np.unique(whole.request))[:n_requests]
    source = edit.select(whole, requests=requests.tolist())
    made = synth.generate(synth.fit(source), n_tokens=source.n_tokens, seed=11)
    assert _popularity_distance(source, made).max() < TOLERANCE
    for statistic in (reuse_ratio, synth.affinity_ratio):
        ours, theirs = statistic(made), statistic(source)
        assert ours.mean() == pytest.approx(theirs.mean(), rel=TOLERANCE)
        assert ours == pytest.approx(theirs, rel=2 * TOLERANCE)  # in every layer
        # a trace without any dependence would be 1: what exceeds it is kept, too
        assert ours.mean() - 1 == pytest.approx(theirs.mean() - 1, rel=2 * TOLERANCE)


def _popularity_distance(a: RoutingTrace, b: RoutingTrace) -> np.ndarray:
    """float64[layers], total variation distance of the expert shares."""
    shares = [c / c.sum(axis=1, keepdims=True) for c in (expert_counts(t).counts for t in (a, b))]
    return np.asarray(np.abs(shares[0] - shares[1]).sum(axis=1) / 2)


def _requests_of(trace: RoutingTrace, n_tokens: int) -> RoutingTrace:
    token = np.arange(trace.n_tokens, dtype=np.int32)
    return replace(trace, request=token // n_tokens, position=token % n_tokens)
