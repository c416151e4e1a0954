"""Chains of experts: drawn activity against closed forms, and its way through a RoutingTrace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from traces.errors import TraceError
from traces.layer_steps import forward_passes, layer_steps
from traces.markov import (
    Chain,
    activity_of,
    activity_trace,
    chain_with,
    draw_activity,
    independent,
    sparsity,
)
from traces.routing import expert_counts
from traces.synth import zipf_trace

seeds = st.integers(0, 10**6)
chances = st.floats(0.01, 0.99)


def all_off(chain: Chain, n_tokens: int) -> float:
    """Over all sequences of states, the chance of the one that is off throughout."""
    share, move = chain.active_share, {0: chain.turn_on, 1: chain.turn_off}
    odds = {}
    for states in itertools.product((0, 1), repeat=n_tokens):
        odds[states] = share if states[0] else 1 - share
        for before, after in itertools.pairwise(states):
            odds[states] *= move[before] if before != after else 1 - move[before]
    assert sum(odds.values()) == pytest.approx(1)
    return odds[(0,) * n_tokens]


@settings(deadline=None)
@given(chances, chances, st.integers(1, 6))
def test_sparsity_is_the_chance_of_the_sequence_that_is_off_throughout(
    turn_on: float, turn_off: float, n_tokens: int
) -> None:
    chain = Chain(turn_on, turn_off)
    assert chain.sparsity(n_tokens) == pytest.approx(all_off(chain, n_tokens))


@settings(deadline=None)
@given(chances, st.integers(1, 40))
def test_independent_experts_are_off_in_a_chunk_with_the_power_of_one_token(
    share: float, n_tokens: int
) -> None:
    assert independent(share).sparsity(n_tokens) == pytest.approx((1 - share) ** n_tokens)
    assert independent(share).active_share == pytest.approx(share)


@settings(deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.99), st.integers(2, 64))
def test_a_solved_chain_has_the_sparsities_it_was_solved_for(
    tls: float, kept: float, chunk: int
) -> None:
    turn_off = (1 - kept ** (1 / (chunk - 1))) * tls / (1 - tls)
    assume(abs(turn_off - 1) > 1e-9)
    if turn_off > 1:  # experts would have to change faster than a chain can
        with pytest.raises(TraceError, match="turn_off"):
            chain_with(tls, tls * kept, chunk)
        return
    chain = chain_with(tls, tls * kept, chunk)
    assert chain.sparsity() == pytest.approx(tls)
    assert chain.sparsity(chunk) == pytest.approx(tls * kept)


def test_the_published_sparsities_give_the_published_chances() -> None:
    chain = chain_with(0.8, 0.7, 8)
    assert chain.turn_on == pytest.approx(0.0189, abs=5e-5)
    assert chain.turn_off == pytest.approx(0.0756, abs=5e-5)
    assert independent(0.2).sparsity(8) == pytest.approx(0.168, abs=5e-4)


@pytest.mark.parametrize("chain", [Chain(0.0189, 0.0756), independent(0.2), Chain(0.3, 0.1)])
def test_drawn_activity_has_the_chain_s_sparsity_over_every_window(chain: Chain) -> None:
    active = draw_activity(chain, (1024, 20, 50), seed=3)
    for n_tokens in (1, 2, 8):
        found = sparsity(active, n_tokens, 256)
        assert found == pytest.approx(chain.sparsity(n_tokens), abs=0.01)


def test_drawn_experts_turn_on_and_off_as_often_as_they_should() -> None:
    chain = Chain(0.0189, 0.0756)
    active = draw_activity(chain, (2000, 10, 40), seed=1, request_tokens=2000)
    before, after = active[:-1], active[1:]
    assert after[~before].mean() == pytest.approx(chain.turn_on, rel=0.03)
    assert (~after[before]).mean() == pytest.approx(chain.turn_off, rel=0.03)


def test_equal_seeds_give_equal_bytes_and_requests_start_anew() -> None:
    always = Chain(0.0, 1.0)
    assert not draw_activity(always, (10, 2, 3)).any()
    stays = Chain(0.001, 0.001)
    active = draw_activity(stays, (512, 8, 64), seed=5, request_tokens=64)
    assert np.array_equal(active, draw_activity(stays, (512, 8, 64), seed=5, request_tokens=64))
    changed = (active[1:] != active[:-1]).mean(axis=(1, 2))
    assert changed[63] > 0.3 > 10 * changed[:63].max()


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 9), st.integers(1, 12))
def test_windows_are_counted_as_a_loop_counts_them(seed: int, n_tokens: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    active = rng.random((23, 2, 3)) < 0.2
    windows = [
        active[first + at : first + at + n_tokens].any(axis=0)
        for first in range(0, 23, length)
        for at in range(min(length, 23 - first) - n_tokens + 1)
    ]
    if not windows:
        with pytest.raises(TraceError, match=f"windows of {n_tokens} tokens"):
            sparsity(active, n_tokens, length)
        return
    assert sparsity(active, n_tokens, length) == pytest.approx(1 - np.mean(windows))


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(0, 1))
def test_activity_survives_the_way_through_a_trace(seed: int, share: float) -> None:
    active = np.random.default_rng(seed).random((17, 3, 11)) < share
    trace = activity_trace(active, request_tokens=5)
    assert np.array_equal(activity_of(trace), active)
    counts = expert_counts(trace).counts
    assert counts.tolist() == active.sum(axis=0).tolist()
    assert trace.request.tolist() == [token // 5 for token in range(17)]
    chosen = trace.topk.astype(int)
    missing = chosen < 0
    assert (np.diff(missing.astype(int), axis=2) >= 0).all()  # holes come last
    work = layer_steps(trace, forward_passes(trace))
    assert len(work.expert) == active.sum()


def test_a_chunk_of_the_trace_needs_the_union_of_its_tokens() -> None:
    active = draw_activity(Chain(0.05, 0.2), (64, 3, 20), seed=2)
    trace = activity_trace(active, top_k=20)
    trace = trace.rows(slice(0, 64))
    passes = forward_passes(trace, batch_size=1, chunk_tokens=0)
    assert passes.n_passes == 64
    alike = type(trace)(
        trace.topk, 20, trace.layers, trace.request, trace.position, np.zeros(64, np.int8)
    )
    work = layer_steps(alike, forward_passes(alike, chunk_tokens=8))
    union = active.reshape(8, 8, 3, 20).any(axis=1).sum(axis=2)
    assert np.diff(work.start).tolist() == union.ravel().tolist()


def test_any_trace_becomes_activity_whose_cells_are_its_choices() -> None:
    trace = zipf_trace(50, 2, 8, 3)
    active = activity_of(trace)
    assert (active.sum(axis=2) == 3).all()
    assert sparsity(active) == pytest.approx(1 - 3 / 8)


def test_chances_shapes_and_widths_out_of_range_are_refused() -> None:
    with pytest.raises(TraceError, match=r"turn_on=1\.5"):
        Chain(1.5, 0.1)
    with pytest.raises(TraceError, match="both 0"):
        Chain(0.0, 0.0)
    with pytest.raises(TraceError, match=r"chunk=1: expected .* chunk of 2 or more"):
        chain_with(0.8, 0.7, 1)
    with pytest.raises(TraceError, match=r"token_sparsity=0\.7"):
        chain_with(0.7, 0.8, 8)
    with pytest.raises(TraceError, match=r"shape=\(0, 1, 1\)"):
        draw_activity(independent(0.2), (0, 1, 1))
    with pytest.raises(TraceError, match="top_k=1, but a token has 2 active experts"):
        activity_trace(np.ones((1, 1, 2), bool), top_k=1)
