"""Statistics of traces: laws, plain counting as the oracle, golden and published values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.lcg_trace import lcg_trace, one_request
from tests.oracles.stats_plain import (
    floor_plain,
    requests_of,
    reuse_plain,
    srp_plain,
    windows,
)
from traces import stats
from traces.errors import TraceError
from traces.routing import MISSING, ExpertCounts, RoutingTrace, expert_counts


def random_trace(seed: int, missing_share: float = 0.1) -> RoutingTrace:
    """A small trace of interleaved requests in no order of position, some cells missing."""
    rng = np.random.default_rng(seed)
    tokens, layers, experts = int(rng.integers(1, 60)), int(rng.integers(1, 4)), 6
    k = int(rng.integers(1, 4))
    topk = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :k].astype(np.int16)
    topk[rng.random(topk.shape) < missing_share] = MISSING
    return RoutingTrace(
        topk=topk,
        n_experts=experts,
        layers=tuple(range(1, layers + 1)),
        request=rng.integers(0, 4, tokens).astype(np.int32),
        position=rng.permutation(tokens).astype(np.int32),
        phase=np.zeros(tokens, np.int8),
        forward=rng.integers(0, 5, tokens).astype(np.int64),
    )


traces = st.builds(random_trace, st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.6]))


@pytest.fixture(scope="module")
def golden() -> RoutingTrace:
    return lcg_trace()


# --- load ---------------------------------------------------------------------------------------

EVEN, SINGLE = np.full((1, 8), 3.0), np.eye(8)[:1] * 5


def test_even_load_is_one_nought_one_and_a_single_busy_expert_is_the_opposite() -> None:
    assert stats.max_over_mean(EVEN).tolist() == [1.0]
    assert stats.coefficient_of_variation(EVEN).tolist() == [0.0]
    assert stats.entropy(EVEN) == pytest.approx([1.0])
    assert stats.max_over_mean(SINGLE).tolist() == [8.0]
    assert stats.coefficient_of_variation(SINGLE) == pytest.approx([np.sqrt(7)])
    assert stats.entropy(SINGLE).tolist() == [0.0]


def test_a_layer_without_load_has_no_figure() -> None:
    nothing = np.zeros((1, 4))
    for measure in (stats.max_over_mean, stats.coefficient_of_variation, stats.entropy):
        assert np.isnan(measure(nothing)).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), min_size=2, max_size=20).filter(any), st.integers(1, 9))
def test_measures_of_load_ignore_order_and_scale(values: list[int], scale: int) -> None:
    counts = np.array([values], dtype=np.float64)
    moved = np.sort(counts) * scale
    for measure in (stats.max_over_mean, stats.coefficient_of_variation, stats.entropy):
        assert measure(moved) == pytest.approx(measure(counts))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3))
def test_no_load_is_lost_on_the_way_to_the_ranks(seed: int, per_rank: int, spare: int) -> None:
    rng = np.random.default_rng(seed)
    n_ranks, layers = 4, 3
    n_experts = n_ranks * per_rank
    extra = rng.integers(0, n_experts, spare * n_ranks)
    slots = np.concatenate([np.arange(n_experts), extra])
    placement = np.stack([rng.permutation(slots) for _ in range(layers)])
    counts = rng.random((layers, n_experts))
    ranks = stats.rank_load(counts, placement, n_ranks)
    assert ranks.shape == (layers, n_ranks)
    assert ranks.sum(axis=1) == pytest.approx(counts.sum(axis=1))


def test_replicas_share_the_load_of_their_expert_evenly() -> None:
    counts = np.array([[6.0, 1.0, 2.0]])
    placement = np.array([[0, 1, 0, 2]])  # rank 0: half of 0, and 1; rank 1: half of 0, and 2
    assert stats.rank_load(counts, placement, 2).tolist() == [[4.0, 5.0]]
    assert stats.max_over_mean(stats.rank_load(counts, placement, 2)) == pytest.approx([10 / 9])


@pytest.mark.parametrize(
    ("placement", "n_ranks", "message"),
    [
        ([[0, 1, 2]], 2, "3 slots cannot be shared by 2 ranks"),
        ([[0, 1, 2, 3]], 2, r"ids 0..3, expected 0..2"),
        ([[0, 1, 1, 1]], 2, r"expert 2 of row 0 has load but no slot \(1 such\)"),
        ([[0, 1], [1, 2]], 2, r"shape \[2, 2\], expected \[1, slots\]"),
        ([[0, 1, 2]], 0, "cannot be shared by 0 ranks"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(
    placement: list[list[int]], n_ranks: int, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        stats.rank_load(np.array([[6.0, 1.0, 2.0]]), np.array(placement), n_ranks)


# --- affinity, reuse, working set ---------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(traces)
def test_transitions_and_coactivation_equal_plain_counting(trace: RoutingTrace) -> None:
    shape = (trace.n_layers, trace.n_experts)
    chose = np.zeros((trace.n_tokens, *shape), np.int64)
    for token, layer, i in np.argwhere(trace.topk != MISSING):
        chose[token, layer, trace.topk[token, layer, i]] = 1
    follow = np.einsum("tle,tlf->lef", chose[:, :-1], chose[:, 1:])
    together = np.einsum("tle,tlf->lef", chose, chose)
    assert (stats.transitions(trace) == follow).all()
    assert (stats.coactivation(trace) == together).all()
    diagonal = np.diagonal(stats.coactivation(trace), axis1=1, axis2=2)
    assert (diagonal == stats.load(trace)).all()


def test_large_matrices_are_refused_before_they_are_allocated() -> None:
    wide = one_request(np.zeros((1, 40, 1), np.int16), 30000)
    with pytest.raises(TraceError, match="39 x 30000 x 30000 counts need 280800000000 bytes"):
        stats.transitions(wide)
    with pytest.raises(TraceError, match="co-activation matrices: 40 x"):
        stats.coactivation(wide)


@settings(max_examples=60, deadline=None)
@given(traces)
def test_reuse_equals_plain_counting(trace: RoutingTrace) -> None:
    expected = [reuse_plain(trace, layer) for layer in range(trace.n_layers)]
    assert stats.reuse_ratio(trace) == pytest.approx(expected, nan_ok=True)


def test_constant_routing_and_independent_draws_both_have_reuse_one() -> None:
    constant = one_request(np.tile(np.array([[[4, 1]]], np.int16), (50, 1, 1)), 8)
    assert stats.reuse_ratio(constant).tolist() == [1.0]
    rng = np.random.default_rng(5)
    skew = rng.random((20000, 1, 16)) * np.linspace(1, 3, 16)
    drawn = one_request(np.argsort(-skew, axis=2)[:, :, :4], 16)
    assert stats.reuse_ratio(drawn) == pytest.approx([1.0], abs=0.01)


def test_each_request_with_experts_of_its_own_has_reuse_equal_to_their_number() -> None:
    topk = np.repeat(np.arange(4, dtype=np.int16), 100).reshape(-1, 1, 1)
    trace = one_request(topk, 4)
    apart = RoutingTrace(
        topk=topk,
        n_experts=4,
        layers=(0,),
        request=np.repeat(np.arange(4, dtype=np.int32), 100),
        position=trace.position,
        phase=trace.phase,
    )
    assert stats.reuse_ratio(apart).tolist() == [4.0]
    assert stats.reuse_ratio(trace)[0] < 4.0  # as one request, three of the pairs share nothing


@settings(max_examples=60, deadline=None)
@given(traces, st.integers(1, 8))
def test_working_set_equals_plain_counting(trace: RoutingTrace, window: int) -> None:
    for layer, measured in enumerate(stats.working_set(trace, window)):
        sizes = [len(set(used)) for used in windows(trace, layer, window)]
        expected = np.mean(sizes) if sizes else np.nan
        assert measured == pytest.approx(expected, nan_ok=True)


def test_working_set_of_independent_draws_meets_its_closed_form() -> None:
    rng = np.random.default_rng(3)
    topk = np.argsort(rng.random((20000, 1, 16)), axis=2)[:, :, :4]
    measured = stats.working_set(one_request(topk, 16), 6)
    assert measured == pytest.approx([stats.independent_working_set(16, 4, 6)], rel=0.01)
    assert stats.independent_working_set(16, 4, 1) == 4.0


@settings(max_examples=30, deadline=None)
@given(traces)
def test_distinct_experts_of_forward_passes_equal_plain_counting(trace: RoutingTrace) -> None:
    tokens, distinct = stats.distinct_per_forward(trace)
    assert trace.forward is not None
    for i, forward in enumerate(np.unique(trace.forward)):
        rows = trace.topk[trace.forward == forward]
        assert tokens[i] == len(rows)
        expected = [len(set(rows[:, layer].ravel()) - {MISSING}) for layer in range(trace.n_layers)]
        assert distinct[i].tolist() == expected
    assert len(tokens) == len(np.unique(trace.forward))


def test_random_batches_lie_between_one_token_and_the_whole_trace(golden: RoutingTrace) -> None:
    rng = np.random.default_rng(0)
    assert (stats.distinct_per_batch(golden, 1, 5, rng) == 2).all()
    assert (stats.distinct_per_batch(golden, golden.n_tokens, 1, rng) == 8).all()
    with pytest.raises(TraceError, match=r"batch_tokens=513, n_batches=1: expected 1..512"):
        stats.distinct_per_batch(golden, 513, 1, rng)
    with pytest.raises(TraceError, match="forward: the trace logs no forward passes"):
        stats.distinct_per_forward(golden)


# --- SRP and SCH --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(traces, st.integers(1, 12))
def test_srp_equals_trying_every_rule(trace: RoutingTrace, m: int) -> None:
    result = stats.srp(trace, m)
    lengths = [len(request) for request in requests_of(trace, 0)]
    assert result.n_windows == sum(max(0, length - m + 1) for length in lengths)
    layers = list(range(trace.n_layers))
    if not any(used for layer in layers for used in windows(trace, layer, m)):
        assert np.isnan(result.srp)
        return
    f1, threshold, rho_hat = srp_plain(trace, layers, m)
    assert (result.srp, result.rho_hat) == pytest.approx((f1, rho_hat))
    assert result.threshold == threshold
    for layer in layers:
        if any(windows(trace, layer, m)):
            assert result.per_layer[layer] == pytest.approx(srp_plain(trace, [layer], m)[0])


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (64, 6), (15, 1), (128, 1)])
@pytest.mark.parametrize("m", [1, 4, 16, 64])
def test_floor_is_exact(n_experts: int, top_k: int, m: int) -> None:
    measured = stats.srp_floor(n_experts, top_k, m)
    assert measured == pytest.approx(floor_plain(n_experts, top_k, m), abs=1e-12)


FLOORS = {  # (k, E): floors at 4, 16, 64, 256 tokens, to three decimals
    (1, 4): (0.565, 0.452, 0.409, 0.400),
    (1, 5): (0.513, 0.400, 0.349, 0.335),
    (1, 8): (0.464, 0.321, 0.253, 0.229),
    (6, 64): (0.447, 0.281, 0.210, 0.183),
    (1, 15): (0.433, 0.241, 0.171, 0.140),
    (1, 16): (0.431, 0.237, 0.165, 0.134),
    (1, 64): (0.408, 0.161, 0.085, 0.053),
    (1, 128): (0.404, 0.124, 0.063, 0.037),
}


@pytest.mark.parametrize(("shape", "floors"), FLOORS.items())
def test_floors_equal_the_published_table(
    shape: tuple[int, int], floors: tuple[float, ...]
) -> None:
    top_k, n_experts = shape
    measured = [stats.srp_floor(n_experts, top_k, m) for m in (4, 16, 64, 256)]
    assert measured == pytest.approx(floors, abs=5.1e-4)


def test_independent_routing_scores_its_floor() -> None:
    rng = np.random.default_rng(1)
    topk = np.argsort(rng.random((20000, 2, 16)), axis=2)[:, :, :4]
    result = stats.srp(one_request(topk, 16), 16)
    assert result.srp == pytest.approx(result.floor, abs=0.005)


def test_routing_that_never_changes_scores_one() -> None:
    result = stats.srp(one_request(np.tile(np.array([[[1, 3]]], np.int16), (40, 2, 1)), 8), 16)
    assert (result.srp, result.rho_hat, result.per_layer.tolist()) == (1.0, 1.0, [1.0, 1.0])


def test_requests_shorter_than_the_window_give_no_score(golden: RoutingTrace) -> None:
    result = stats.srp(golden, 2**20)
    assert (result.n_windows, result.threshold) == (0, 0)
    assert np.isnan(result.srp)


GOLDEN_SRP = {4: (0.759993, 2, 1.162574), 16: (0.553898, 5, 1.545523), 64: (0.444154, 15, 2.258352)}


@pytest.mark.parametrize(("m", "expected"), GOLDEN_SRP.items())
def test_golden_srp(golden: RoutingTrace, m: int, expected: tuple[float, int, float]) -> None:
    result = stats.srp(golden, m)
    assert result.srp == pytest.approx(expected[0], abs=5e-7)
    assert result.threshold == expected[1]
    assert result.rho_hat == pytest.approx(expected[2], abs=5e-7)


def test_golden_sch(golden: RoutingTrace) -> None:
    assert stats.sch(golden, 16, 1) == pytest.approx(0.585693, abs=5e-7)
    assert stats.sch(golden, 16, 2) == pytest.approx(0.850098, abs=5e-7)


def test_every_srp_of_the_golden_file(golden: RoutingTrace, shared: Path) -> None:
    document = json.loads((shared / "handbook" / "golden.json").read_text(encoding="utf-8"))
    for m, expected in document["srp"].items():
        result = stats.srp(golden, int(m))
        measured = (result.srp, result.threshold, result.rho_hat)
        published = (expected["F1"], expected["t"], expected["rho_hat"])
        assert measured == pytest.approx(published, abs=5e-7), m
    assert len(document["srp"]) == 3


# --- summary ------------------------------------------------------------------------------------


def test_summary_is_json_and_names_every_convention(golden: RoutingTrace) -> None:
    summary = stats.summarize(golden)
    document = json.loads(json.dumps(stats.to_json(summary), allow_nan=False))
    assert document["kind"] == "routing_trace"
    assert (document["tokens"], document["requests"]) == (512, 1)
    assert document["phases"] == {"prefill": 512, "decode": 0}
    rates = {(c["policy"], c["rho"], c["convention"]): c["hit_rate"] for c in document["caches"]}
    assert len(rates) == 12
    assert rates["lru", 2.0, "execution_order_cold_miss"] == pytest.approx(0.771973, abs=5e-7)
    assert rates["perfect_lfu", 2.0, "token_batch_free_fill"] == pytest.approx(0.600342, abs=5e-7)
    assert rates["belady", 1.0, "execution_order_cold_miss"] == pytest.approx(0.721924, abs=5e-7)
    assert [w["window_tokens"] for w in document["windows"]] == [4, 16, 64]
    lru = document["caches"][0]
    assert (lru["slots"], lru["expert_share"]) == (8, 0.25)
    assert lru["misses_per_token"] == pytest.approx(8 * (1 - lru["hit_rate"]))


def test_summary_counts_missing_cells_and_says_none_where_nothing_is_defined() -> None:
    topk = np.array([[[0, 1], [-1, -1]], [[1, -1], [-1, -1]]], np.int16)
    summary = stats.summarize(one_request(topk, 4))
    assert summary.missing_cells == 5
    assert summary.entropy.per_layer[1] is None
    assert summary.reuse_ratio is not None
    assert summary.reuse_ratio.per_layer[1] is None
    assert [(w.n_windows, w.srp, w.working_set) for w in summary.windows] == [(0, None, None)] * 3
    json.dumps(stats.to_json(summary), allow_nan=False)


def test_read_only_and_strided_choices_give_the_same_summary(golden: RoutingTrace) -> None:
    doubled = np.repeat(golden.topk, 2, axis=0)[::2]
    doubled.setflags(write=False)
    assert not doubled.flags.c_contiguous
    assert stats.summarize(one_request(golden.topk, 8)) == stats.summarize(
        RoutingTrace(doubled, 8, golden.layers, golden.request, golden.position, golden.phase)
    )


def test_counts_give_load_and_nothing_that_needs_order(golden: RoutingTrace) -> None:
    of_counts, of_trace = stats.summarize(expert_counts(golden)), stats.summarize(golden)
    assert of_counts.kind == "expert_counts"
    assert of_counts.max_over_mean == of_trace.max_over_mean
    assert (of_counts.tokens, of_counts.reuse_ratio, of_counts.caches) == (None, None, ())


@pytest.mark.parametrize(
    "measure",
    [
        stats.transitions,
        stats.coactivation,
        stats.reuse_ratio,
        stats.distinct_per_forward,
        lambda counts: stats.srp(counts, 4),
        lambda counts: stats.sch(counts, 4, 1),
        lambda counts: stats.working_set(counts, 4),
    ],
)
def test_what_needs_token_order_refuses_counts(measure: object) -> None:
    counts = ExpertCounts(np.ones((2, 4)), (0, 1))
    with pytest.raises(TraceError, match="needs token order"):
        measure(counts)  # type: ignore[operator]


def test_a_trace_without_a_single_choice_is_refused() -> None:
    with pytest.raises(TraceError, match="no expert was ever chosen"):
        stats.summarize(one_request(np.full((3, 2, 1), MISSING, np.int16), 4))


@pytest.mark.parametrize("window", [0, -1, 10**30])
def test_windows_of_no_or_too_many_tokens_are_refused(golden: RoutingTrace, window: int) -> None:
    with pytest.raises(TraceError, match=f"window_tokens={window}"):
        stats.working_set(golden, window)
    with pytest.raises(TraceError, match=f"window_tokens={window}"):
        stats.srp(golden, window)


# --- captured routing against the published figures of the same model ---------------------------

PUBLISHED = {  # SRP at 4, 16, 64; LRU, LFU, Belady at rho 2; SCH(16) at rho 1 and 2
    "mixtral-8x7b-mtbench": ((0.626, 0.494, 0.445), (0.614, 0.595, 0.820), (0.452, 0.742)),
    "deepseek-v2-lite-law": ((0.532, 0.379, 0.307), (0.420, 0.375, 0.648), (0.378, 0.580)),
}


@pytest.mark.parametrize(
    ("name", "n_experts"), [("mixtral-8x7b-mtbench", 8), ("deepseek-v2-lite-law", 64)]
)
def test_captured_routing_meets_the_published_consistency_of_its_model(
    name: str, n_experts: int, shared: Path
) -> None:
    """Other text than the paper's, so 2 points of SRP and 3 of hit rate are allowed."""
    with np.load(shared / "traces" / f"{name}.npz", allow_pickle=False) as file:
        topk, request, phase = file["topk"], file["seq"], file["phase"]
    layers, position = tuple(range(topk.shape[1])), np.arange(len(topk), dtype=np.int32)
    trace = RoutingTrace(topk, n_experts, layers, request, position, phase)
    summary = stats.summarize(trace)
    consistency, hits, foresight = PUBLISHED[name]
    assert [w.srp for w in summary.windows] == pytest.approx(consistency, abs=0.02)
    batched = [c for c in summary.caches if c.convention == "token_batch_free_fill"]
    assert [c.hit_rate for c in batched if c.rho == 2] == pytest.approx(hits, abs=0.03)
    assert [stats.sch(trace, 16, rho) for rho in (1, 2)] == pytest.approx(foresight, abs=0.03)
