"""Cutting and joining traces: parts make up the whole, and no request is on both sides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import edit
from traces.errors import TraceError
from traces.routing import DECODE, PREFILL, RoutingTrace, content_hash


def random_trace(seed: int, n_requests: int) -> RoutingTrace:
    """Rows of interleaved requests; topk, weights and forward name the row, so rows can be told."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(max(2, n_requests), 60))
    request = np.concatenate([np.arange(n_requests), rng.integers(0, n_requests, tokens)])[:tokens]
    rows = np.arange(tokens)
    return RoutingTrace(
        topk=np.repeat(rows[:, None, None], 3, axis=1).astype(np.int16),
        n_experts=64,
        layers=(1, 4, 6),
        request=(rng.permutation(request) * 7 + 3).astype(np.int32),
        position=rows.astype(np.int32),
        phase=rng.integers(0, 2, tokens).astype(np.int8),
        forward=(rows // 5 + 100).astype(np.int64),
        weights=np.ones((tokens, 3, 1), dtype=np.float16),
    )


multi = st.builds(random_trace, st.integers(0, 10**6), st.integers(2, 9))
shares = st.floats(0.01, 0.99)


def rows_of(trace: RoutingTrace) -> list[int]:
    return [int(row) for row in trace.topk[:, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(multi, shares, st.sampled_from(["request", "order"]), st.integers(0, 5))
def test_split_is_a_partition_that_keeps_requests_whole(
    trace: RoutingTrace, share: float, by: edit.By, seed: int
) -> None:
    parts = edit.split(trace, share, by, seed)
    assert parts.how == by
    assert sorted(rows_of(parts.plan) + rows_of(parts.judge)) == rows_of(trace)
    assert not set(parts.plan.request) & set(parts.judge.request)
    assert parts.plan.n_tokens > 0
    assert parts.judge.n_tokens > 0
    for part in (parts.plan, parts.judge):
        assert rows_of(part) == sorted(rows_of(part))
        assert part.position.tolist() == rows_of(part)


@settings(max_examples=30, deadline=None)
@given(multi, shares, st.integers(0, 5))
def test_planned_share_is_reached_and_by_no_more_than_one_request(
    trace: RoutingTrace, share: float, seed: int
) -> None:
    planned = edit.split(trace, share, seed=seed).plan
    sizes = np.bincount(trace.request)
    largest = sizes[np.unique(planned.request)].max()
    left = sizes[sizes > 0].size - np.unique(planned.request).size
    assert planned.n_tokens - largest < share * trace.n_tokens
    assert planned.n_tokens >= share * trace.n_tokens or left == 1


@settings(max_examples=30, deadline=None)
@given(st.builds(random_trace, st.integers(0, 10**6), st.just(1)), shares)
def test_one_request_is_cut_in_time_and_the_result_says_so(
    trace: RoutingTrace, share: float
) -> None:
    parts = edit.split(trace, share)
    assert parts.how == "time"
    assert rows_of(parts.plan) + rows_of(parts.judge) == rows_of(trace)
    assert parts.plan.n_tokens == pytest.approx(share * trace.n_tokens, abs=1)


def test_same_seed_splits_alike_and_other_seeds_do_not() -> None:
    trace = random_trace(1, 9)
    hashes = [content_hash(edit.split(trace, 0.5, seed=seed).plan) for seed in (0, 0, 1, 2, 3, 4)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) > 2


def test_split_by_order_plans_on_the_requests_that_come_first() -> None:
    trace = random_trace(2, 8)
    parts = edit.split(trace, 0.4, by="order")
    begins = {int(r): int(np.argmax(trace.request == r)) for r in np.unique(trace.request)}
    last_planned = max(begins[int(r)] for r in parts.plan.request)
    assert last_planned < min(begins[int(r)] for r in parts.judge.request)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_leaves_a_part_empty_is_refused(share: float) -> None:
    with pytest.raises(TraceError, match=r"expected a share inside \(0, 1\)"):
        edit.split(random_trace(0, 3), share)


def test_an_unknown_way_to_split_and_a_single_token_are_refused() -> None:
    trace = random_trace(0, 3)
    with pytest.raises(TraceError, match="by='layer', expected 'request' or 'order'"):
        edit.split(trace, 0.5, by="layer")  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="of 1 tokens"):
        edit.split(trace.rows(slice(0, 1)), 0.5)


@settings(max_examples=30, deadline=None)
@given(multi)
def test_selections_of_both_phases_make_up_the_whole(trace: RoutingTrace) -> None:
    parts = [rows_of(edit.select(trace, phase=phase)) for phase in (PREFILL, DECODE)]
    assert sorted(parts[0] + parts[1]) == rows_of(trace)


def test_select_takes_the_named_requests_and_layers_of_every_array() -> None:
    trace = random_trace(3, 5)
    wanted = [3, 17]
    part = edit.select(trace, requests=wanted, layers=[6, 1])
    assert set(part.request.tolist()) == set(wanted)
    assert rows_of(part) == [row for row in range(trace.n_tokens) if trace.request[row] in wanted]
    assert part.layers == (1, 6)
    assert part.weights is not None
    assert part.topk.shape[1] == part.weights.shape[1] == 2
    assert content_hash(edit.select(trace)) == content_hash(trace)


def test_a_layer_that_was_not_captured_is_refused_by_number() -> None:
    with pytest.raises(TraceError, match=r"layers \[2\] were not captured"):
        edit.select(random_trace(0, 3), layers=[1, 2])


@settings(max_examples=30, deadline=None)
@given(st.lists(multi, min_size=1, max_size=3))
def test_concat_keeps_every_row_and_keeps_requests_and_passes_apart(
    traces: list[RoutingTrace],
) -> None:
    whole = edit.concat(traces)
    assert rows_of(whole) == [row for trace in traces for row in rows_of(trace)]
    for field in ("request", "forward"):
        ids, at = getattr(whole, field), 0
        assert len(np.unique(ids)) == sum(len(np.unique(getattr(t, field))) for t in traces)
        for trace in traces:
            ours, theirs = ids[at : at + trace.n_tokens], getattr(trace, field)
            assert ((ours[:, None] == ours) == (theirs[:, None] == theirs)).all()
            at += trace.n_tokens


@settings(max_examples=20, deadline=None)
@given(multi, shares)
def test_joining_the_parts_of_a_split_gives_the_rows_back(
    trace: RoutingTrace, share: float
) -> None:
    parts = edit.split(trace, share)
    assert sorted(rows_of(edit.concat([parts.plan, parts.judge]))) == rows_of(trace)


def test_an_array_that_one_trace_lacks_is_left_out_of_the_whole() -> None:
    trace = random_trace(0, 2)
    assert edit.concat([trace, replace(trace, weights=None)]).weights is None
    assert edit.concat([trace, trace]).weights is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "model is  in one trace and other"),
        ({"n_experts": 65}, "n_experts is 64 in one trace and 65"),
        ({"layers": (0, 1, 2)}, r"layers is \(1, 4, 6\)"),
    ],
)
def test_traces_of_different_models_or_shapes_are_not_joined(
    change: dict[str, object], message: str
) -> None:
    trace = random_trace(0, 2)
    with pytest.raises(TraceError, match=message):
        edit.concat([trace, replace(trace, **change)])  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="no trace given"):
        edit.concat([])
