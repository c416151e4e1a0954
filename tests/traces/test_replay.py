"""Cache replay: laws on any stream, equality with its plain form, published golden values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.lcg_trace import LAYERS, TOKENS, TOP_K, lcg_trace, one_request
from tests.oracles.replay_plain import fewest_misses, replay_plain
from traces.errors import TraceError
from traces.replay import (
    CONVENTIONS,
    EXECUTION_ORDER,
    POLICIES,
    TOKEN_BATCH,
    RequestStream,
    hit_rate,
    in_request_order,
    replay,
    replay_trace,
    request_stream,
    slots_for,
)
from traces.routing import RoutingTrace, expert_counts

ONLINE = ("lru", "lfu", "perfect_lfu", "fifo", "arc")
streams = st.lists(st.integers(0, 9), min_size=1, max_size=80)
token_lists = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=20)


def run(ids: list[int], slots: int, policy: str) -> int:
    return replay(np.array(ids), slots, policy).n_misses


def as_stream(tokens: list[list[int]], convention: str) -> RequestStream:
    flat = np.array([key for token in tokens for key in token], dtype=np.int32)
    ends = np.cumsum([len(token) for token in tokens])
    return RequestStream(flat, 10, ends, np.array([len(tokens)]), convention)


@pytest.fixture(scope="module")
def golden() -> RoutingTrace:
    return lcg_trace()


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(max_examples=60, deadline=None)
@given(tokens=token_lists, slots=st.integers(1, 12), lookahead=st.integers(1, 5))
def test_compiled_replay_equals_its_plain_form(
    policy: str, convention: str, tokens: list[list[int]], slots: int, lookahead: int
) -> None:
    result = replay(as_stream(tokens, convention), slots, policy, lookahead)
    hits, evictions = replay_plain(tokens, slots, policy, convention == TOKEN_BATCH, lookahead)
    assert result.hits.tolist() == [hits[key] for key in range(10)]
    assert result.evictions.tolist() == [evictions[key] for key in range(10)]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None)
@given(tokens=token_lists, slots=st.integers(1, 12), convention=st.sampled_from(CONVENTIONS))
def test_every_request_is_a_hit_or_a_miss(
    policy: str, tokens: list[list[int]], slots: int, convention: str
) -> None:
    result = replay(as_stream(tokens, convention), slots, policy)
    assert result.n_hits + result.n_misses == result.n_requests == sum(map(len, tokens))
    assert (result.hits >= 0).all()
    assert (result.hits <= result.requests).all()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None)
@given(ids=streams, slots=st.integers(1, 12))
def test_in_execution_order_what_came_in_either_left_or_is_still_there(
    policy: str, ids: list[int], slots: int
) -> None:
    result = replay(np.array(ids), slots, policy)
    still_there = result.n_misses - result.n_evictions
    assert still_there == min(slots, len(set(ids)))


@settings(max_examples=60, deadline=None)
@given(ids=streams, slots=st.integers(1, 10))
def test_more_slots_never_hurt_lru(ids: list[int], slots: int) -> None:
    assert run(ids, slots + 1, "lru") <= run(ids, slots, "lru")


@pytest.mark.parametrize("policy", [*ONLINE, "segment"])
@settings(max_examples=60, deadline=None)
@given(ids=streams, slots=st.integers(1, 10))
def test_belady_is_never_worse_in_execution_order(policy: str, ids: list[int], slots: int) -> None:
    assert run(ids, slots, "belady") <= run(ids, slots, policy)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 5), min_size=1, max_size=25), slots=st.integers(1, 5))
def test_belady_equals_the_best_of_all_choices(ids: list[int], slots: int) -> None:
    assert run(ids, slots, "belady") == fewest_misses(ids, slots)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=30, deadline=None)
@given(ids=streams, extra=st.integers(0, 10**30))
def test_with_a_slot_for_every_object_only_first_requests_miss(
    policy: str, ids: list[int], extra: int
) -> None:
    slots = len(set(ids)) + extra
    result = replay(np.array(ids), slots, policy, lookahead_tokens=1 + extra)
    assert (result.n_misses, result.n_evictions) == (len(set(ids)), 0)


def test_cyclic_scan_defeats_lru_entirely() -> None:
    scan = np.tile(np.arange(11), 50)
    assert replay(scan, 10, "lru").n_hits == 0
    assert replay(scan, 11, "lru").n_misses == 11
    assert replay(scan, 10, "belady").hit_rate > 0.8


def test_lfu_forgets_on_eviction_and_perfect_lfu_does_not() -> None:
    # Bursts of 1 and 2 drive 0 out; when it returns and 3 comes, only perfect_lfu spares it.
    ids = np.array([0, 0, 0, *[1] * 4, *[2] * 4, 0, 3, 0])
    assert replay(ids, 2, "lfu").hits[0] == 2
    assert replay(ids, 2, "perfect_lfu").hits[0] == 3


def test_fifo_ignores_hits_and_lru_does_not() -> None:
    ids = np.array([0, 1, 0, 2, 0])
    assert replay(ids, 2, "fifo").n_hits == 1
    assert replay(ids, 2, "lru").n_hits == 2


def test_arc_keeps_a_reused_pair_through_a_long_scan() -> None:
    ids = [0, 1, 0, 1, *range(2, 100), 0, 1]
    assert replay(np.array(ids), 4, "arc").n_hits == 4
    assert replay(np.array(ids), 4, "lru").n_hits == 2


# --- traces -------------------------------------------------------------------------------------


def two_requests(order: list[int]) -> RoutingTrace:
    """Two requests of three tokens that use the same experts, rows in the given order."""
    topk = np.array([[[0]], [[1]], [[0]], [[0]], [[1]], [[0]]], dtype=np.int16)
    trace = RoutingTrace(
        topk=topk,
        n_experts=2,
        layers=(3,),
        request=np.array([0, 0, 0, 7, 7, 7], np.int32),
        position=np.array([0, 1, 2, 0, 1, 2], np.int32),
        phase=np.zeros(6, np.int8),
    )
    return trace.rows(np.array(order))


def test_execution_order_keeps_one_cache_and_token_batch_begins_each_request_anew() -> None:
    trace = two_requests([0, 1, 2, 3, 4, 5])
    assert replay_trace(trace, 2, convention=EXECUTION_ORDER).n_misses == 2
    # With one slot: 0 (free), 1 misses, 0 misses - in each of the two requests.
    batched = replay_trace(trace, 1, convention=TOKEN_BATCH)
    assert batched.n_hits == 2


def test_token_batch_takes_interleaved_requests_apart() -> None:
    straight = replay_trace(two_requests([0, 1, 2, 3, 4, 5]), 1, convention=TOKEN_BATCH)
    mixed = replay_trace(two_requests([3, 0, 4, 1, 5, 2]), 1, convention=TOKEN_BATCH)
    assert mixed.hits.tolist() == straight.hits.tolist()
    topk, starts = in_request_order(two_requests([5, 4, 3, 2, 1, 0]))
    assert topk.ravel().tolist() == [0, 1, 0, 0, 1, 0]
    assert starts.tolist() == [0, 3, 6]


def test_missing_cells_are_left_out_and_counted() -> None:
    topk = np.array([[[0, -1]], [[-1, -1]], [[1, 0]]], dtype=np.int16)
    stream = request_stream(one_request(topk, 4))
    assert stream.objects.tolist() == [0, 1, 0]
    assert stream.token_end.tolist() == [1, 1, 3]
    assert stream.n_missing == 3


def test_one_cache_per_layer_serves_each_layer_alone(golden: RoutingTrace) -> None:
    result = replay_trace(golden, 2, "lru", scope="per_layer")
    assert result.per_layer(result.requests).tolist() == [TOKENS * TOP_K] * LAYERS
    for layer in range(LAYERS):
        alone = one_request(golden.topk[:, [layer]], golden.n_experts)
        expected = replay_trace(alone, 2, "lru").n_hits
        assert result.per_layer(result.hits)[layer] == expected


def test_slots_round_down_but_not_by_float_error(golden: RoutingTrace) -> None:
    assert slots_for(golden, 0.5) == 4
    assert slots_for(golden, 2, "per_layer") == 4
    wide = one_request(np.tile(np.arange(10, dtype=np.int16), (1, 1, 1)), 10)
    assert slots_for(wide, 0.7) == 7
    with pytest.raises(TraceError, match="rho=0.1: gives no slot"):
        slots_for(golden, 0.1)


def test_an_empty_stream_has_no_hit_rate() -> None:
    result = replay(np.array([], dtype=np.int64), 4)
    assert result.n_requests == 0
    assert np.isnan(result.hit_rate)


@pytest.mark.parametrize(
    ("stream", "slots", "policy", "message"),
    [
        (np.array([0, 1]), 2, "mru", "policy: 'mru' is unknown, expected one of lru, lfu"),
        (np.array([0, 1]), 0, "lru", "slots=0"),
        (np.array([0, -1]), 2, "lru", "object ids -1..0, expected 0"),
        (np.array([0, 2**40]), 2, "lru", "object id 1099511627776, expected <"),
        (np.array([0.5]), 2, "lru", "expected integers"),
        (np.array([[1]]), 2, "lru", "expected integers"),
    ],
)
def test_bad_input_is_refused_by_name(
    stream: np.ndarray, slots: int, policy: str, message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        replay(stream, slots, policy)


def test_unknown_convention_and_scope_and_counts_are_refused(golden: RoutingTrace) -> None:
    with pytest.raises(TraceError, match="convention: 'paper' is unknown, expected one of token"):
        hit_rate(golden, "lru", 1, "paper")
    with pytest.raises(TraceError, match="scope: 'node' is unknown"):
        hit_rate(golden, "lru", 1, scope="node")
    with pytest.raises(TraceError, match="needs token order"):
        hit_rate(expert_counts(golden), "lru", 1)


def test_ends_that_do_not_cover_the_stream_are_refused() -> None:
    with pytest.raises(TraceError, match="token_end must rise from 0 to 2"):
        RequestStream(np.zeros(2, np.int32), 1, np.array([1]), np.array([1]))


# --- golden values ------------------------------------------------------------------------------

GOLDEN_HITS = [  # rho, policy, lookahead, token_batch_free_fill, execution_order_cold_miss
    (0.5, "lru", 1, 0.340088, 0.0),
    (0.5, "belady", 1, 0.428223, 0.398682),
    (0.5, "segment", 4, 0.429443, 0.322754),
    (1, "perfect_lfu", 1, 0.343262, 0.249512),
    (1, "segment", 16, 0.585693, 0.510498),
    (2, "segment", 64, 0.737305, 0.675537),
    (2, "lru", 1, 0.786133, 0.771973),
    (3, "belady", 1, 0.958984, 0.953125),
]


@pytest.mark.parametrize(("rho", "policy", "lookahead", "batch", "order"), GOLDEN_HITS)
def test_golden_hit_rates(
    golden: RoutingTrace, rho: float, policy: str, lookahead: int, batch: float, order: float
) -> None:
    measured = [
        hit_rate(golden, policy, rho, convention, lookahead_tokens=lookahead)
        for convention in (TOKEN_BATCH, EXECUTION_ORDER)
    ]
    assert measured == pytest.approx([batch, order], abs=5e-7)


def test_golden_per_layer_lru(golden: RoutingTrace) -> None:
    rates = [replay_trace(golden, c, "lru", scope="per_layer").hit_rate for c in (1, 2, 3, 4, 6)]
    assert rates == pytest.approx([0.126465, 0.66333, 0.719238, 0.777344, 0.887207], abs=5e-7)


def test_every_hit_rate_of_the_golden_file(golden: RoutingTrace, shared: Path) -> None:
    document = json.loads((shared / "handbook" / "golden.json").read_text(encoding="utf-8"))
    assert golden.topk[:4].tolist() == document["trace"]["first_tokens"]
    assert golden.topk[-1].tolist() == document["trace"]["last_token"]
    policies = {"lru": ("lru", 1), "lfu": ("perfect_lfu", 1), "belady": ("belady", 1)}
    policies |= {f"fsf{m}": ("segment", m) for m in (4, 16, 64)}
    checked = 0
    for rho, by_policy in document["hit"].items():
        for name, by_convention in by_policy.items():
            policy, lookahead = policies[name]
            for convention, expected in by_convention.items():
                rate = hit_rate(golden, policy, float(rho), convention, lookahead_tokens=lookahead)
                assert rate == pytest.approx(expected, abs=5e-7), (rho, name, convention)
                checked += 1
    assert checked == 60
    for slots, expected in document["per_layer_lru_exec_order"].items():
        rate = replay_trace(golden, int(slots), "lru", scope="per_layer").hit_rate
        assert rate == pytest.approx(expected, abs=5e-7), slots
