"""Steps of work: every token once and in order, full steps only, plain lock step as the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles.synth_plain import lock_step_plain
from traces.batch_kernels import lock_step
from traces.batches import Steps, source_rank, steps
from traces.errors import TraceError
from traces.routing import DECODE, PREFILL, RoutingTrace


def trace_of(sizes: list[int], seed: int, phase: int = DECODE) -> RoutingTrace:
    """Interleaved requests of the given lengths, rows in no order of position."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(len(sizes)), sizes)
    position = np.concatenate([np.arange(n) for n in sizes])
    order = rng.permutation(len(request))
    return RoutingTrace(
        topk=np.zeros((len(request), 1, 1), np.int16),
        n_experts=4,
        layers=(0,),
        request=request[order].astype(np.int32),
        position=position[order].astype(np.int32),
        phase=np.full(len(request), phase, np.int8),
    )


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)
seeds = st.integers(0, 10**6)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 8))
def test_compiled_lock_step_equals_the_plain_one(sizes: list[int], n_slots: int) -> None:
    plain = lock_step_plain(sizes, n_slots)
    size = np.array(sizes, dtype=np.int64)
    start = np.cumsum(size) - size
    rows = np.full((size.sum() // n_slots + 1, n_slots), -1, dtype=np.int64)
    full = lock_step(size, np.zeros(len(size), dtype=np.int64), start, rows)
    assert rows[:full].tolist() == [[int(start[r]) + t for r, t in row] for row in plain]


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 12), seeds)
def test_decode_runs_every_token_at_most_once_and_each_request_in_order_in_one_slot(
    sizes: list[int], n_slots: int, seed: int
) -> None:
    n_slots = min(n_slots, len(sizes))
    trace = trace_of(sizes, seed)
    made = steps(trace, n_slots, "decode", seed)
    assert not made.resampled
    assert len(np.unique(made.rows)) == made.rows.size == trace.n_tokens - made.left_out
    for slot in range(n_slots):
        request, position = trace.request[made.rows[:, slot]], trace.position[made.rows[:, slot]]
        new = np.concatenate(([True], np.diff(request) != 0))
        assert (position[new] == 0).all()
        assert (np.diff(position)[~new[1:]] == 1).all()
        assert len(np.unique(request)) == np.count_nonzero(new)
    for request in range(len(sizes)):
        assert len(np.unique(np.argwhere(trace.request[made.rows] == request)[:, 1])) <= 1


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 12), seeds)
def test_decode_leaves_tokens_out_only_when_a_slot_would_stand_idle(
    sizes: list[int], n_slots: int, seed: int
) -> None:
    n_slots = min(n_slots, len(sizes))
    made = steps(trace_of(sizes, seed), n_slots, "decode", seed)
    # at most the other slots' running requests, each less the token it has run
    assert made.left_out <= (n_slots - 1) * (max(sizes) - 1)


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 40), seeds)
def test_prefill_runs_requests_one_after_the_other_in_full_steps(
    sizes: list[int], tokens_per_step: int, seed: int
) -> None:
    trace = trace_of(sizes, seed, PREFILL)
    made = steps(trace, tokens_per_step, "prefill", seed)
    if trace.n_tokens < tokens_per_step:
        assert made.resampled
        assert made.rows.shape == (1, tokens_per_step)
        assert set(made.rows[0]) == set(range(trace.n_tokens))
        return
    assert made.rows.size == trace.n_tokens // tokens_per_step * tokens_per_step
    assert made.left_out == trace.n_tokens % tokens_per_step
    row = made.rows.ravel()
    assert len(np.unique(row)) == row.size
    new = np.concatenate(([True], np.diff(trace.request[row]) != 0))
    assert (trace.position[row][new] == 0).all()
    assert np.count_nonzero(new) == len(np.unique(trace.request[row]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.integers(1, 9), seeds)
def test_a_batch_larger_than_the_requests_is_resampled_and_runs_each_request_round_in_order(
    sizes: list[int], more: int, seed: int
) -> None:
    n_slots = len(sizes) + more
    trace = trace_of(sizes, seed)
    made = steps(trace, n_slots, "decode", seed)
    assert made.resampled
    assert made.rows.shape == (max(1, trace.n_tokens // n_slots), n_slots)
    assert made.left_out == trace.n_tokens - len(np.unique(made.rows))
    for slot in made.rows.T:
        done = 0
        while done < len(slot):
            size = sizes[trace.request[slot[done]]]
            run = slot[done : done + size]
            expected = (trace.position[run[0]] + np.arange(len(run))) % size
            assert trace.position[run].tolist() == expected.tolist()
            assert len(set(trace.request[run])) == 1
            done += size


def test_resampling_keeps_the_popularity_of_tokens_when_requests_are_alike() -> None:
    trace = trace_of([50] * 20, 3)
    made = steps(trace, 64, "decode", 0)
    times = np.bincount(made.rows.ravel(), minlength=trace.n_tokens)
    assert times.mean() == pytest.approx(960 / 1000)
    assert times.max() <= 4


def test_same_seed_same_rows_and_another_seed_others() -> None:
    trace = trace_of(list(range(3, 40)), 1)
    for n_slots in (8, 64):
        one, two, three = (steps(trace, n_slots, "decode", seed).rows for seed in (5, 5, 6))
        assert (one == two).all()
        assert not np.array_equal(one, three)


def test_only_tokens_of_the_phase_are_run() -> None:
    trace = trace_of([10] * 6, 1)
    phase = np.where(trace.position < 4, PREFILL, DECODE).astype(np.int8)
    trace = replace(trace, phase=phase)
    for name, code, tokens in (("prefill", PREFILL, 24), ("decode", DECODE, 36)):
        made = steps(trace, 6, name, 0)  # type: ignore[arg-type]
        assert (trace.phase[made.rows] == code).all()
        assert made.rows.size == tokens


# --- forward passes as logged ---------------------------------------------------------------------


@pytest.fixture
def logged() -> RoutingTrace:
    """Passes 10 (3 decode), 11 (2 decode, 1 prefill), 12 (3 decode), 13 (2 decode), shuffled."""
    trace = trace_of([11], 4)
    forward = np.array([10, 10, 10, 11, 11, 11, 12, 12, 12, 13, 13])[trace.position]
    phase = np.where(trace.position == 5, PREFILL, DECODE).astype(np.int8)
    return replace(trace, forward=forward.astype(np.int64), phase=phase)


def test_logged_passes_of_the_size_are_run_as_they_ran(logged: RoutingTrace) -> None:
    made = steps(logged, 3, "decode", 0, by_forward=True)
    assert logged.forward is not None
    assert logged.forward[made.rows].tolist() == [[10, 10, 10], [12, 12, 12]]
    assert len(np.unique(made.rows)) == 6
    assert (made.resampled, made.left_out) == (False, 4)


def test_a_size_no_pass_has_is_refused_with_the_sizes_there_are(logged: RoutingTrace) -> None:
    with pytest.raises(TraceError, match="tokens_per_step=4: no forward pass .* hold 2..3 tokens"):
        steps(logged, 4, "decode", 0, by_forward=True)
    with pytest.raises(TraceError, match="no forward pass .* hold both phases"):
        steps(logged, 1, "prefill", 0, by_forward=True)
    with pytest.raises(TraceError, match="logs no forward passes"):
        steps(replace(logged, forward=None), 3, "decode", 0, by_forward=True)


# --- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_slots", "n_ranks"), [(8, 1), (8, 2), (12, 4), (6, 6)])
def test_every_rank_has_equal_consecutive_slots(n_slots: int, n_ranks: int) -> None:
    rank = source_rank(Steps(np.zeros((2, n_slots), np.int64), False), n_ranks)
    assert np.bincount(rank).tolist() == [n_slots // n_ranks] * n_ranks
    assert (np.diff(rank) >= 0).all()


@pytest.mark.parametrize("n_ranks", [0, 3, 16])
def test_slots_that_cannot_be_shared_out_equally_are_refused(n_ranks: int) -> None:
    with pytest.raises(TraceError, match=f"n_ranks={n_ranks}, expected a divisor of 8"):
        source_rank(Steps(np.zeros((2, 8), np.int64), False), n_ranks)


@pytest.mark.parametrize(
    ("n_slots", "phase", "message"),
    [(0, "decode", "tokens_per_step=0"), (4, "both", "phase='both'"), (4, "prefill", "no prefill")],
)
def test_a_step_that_cannot_be_is_refused_by_name(n_slots: int, phase: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        steps(trace_of([3, 3], 0), n_slots, phase, 0)  # type: ignore[arg-type]
