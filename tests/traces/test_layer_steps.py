"""Forward passes and layer-steps of a trace, and reuse distances over them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from traces.errors import TraceError
from traces.layer_steps import forward_passes, layer_steps
from traces.replay import replay_trace
from traces.reuse_distance import lru_hits, reuse_distances
from traces.routing import DECODE, MISSING, PREFILL, RoutingTrace
from traces.synth import zipf_trace


def trace(n_prompt: int = 5, n_output: int = 3, n_requests: int = 2) -> RoutingTrace:
    """Requests of a prompt and an output, two layers of six experts, top-2."""
    n = (n_prompt + n_output) * n_requests
    rng = np.random.default_rng(0)
    position = np.tile(np.arange(n_prompt + n_output), n_requests)
    return RoutingTrace(
        topk=np.argsort(rng.random((n, 2, 6)), axis=2)[:, :, :2].astype(np.int16),
        n_experts=6,
        layers=(0, 1),
        request=np.repeat(np.arange(n_requests), n_prompt + n_output).astype(np.int32),
        position=position.astype(np.int32),
        phase=np.where(position < n_prompt, PREFILL, DECODE).astype(np.int8),
        weights=np.full((n, 2, 2), 0.5, np.float16),
    )


def test_a_prompt_is_one_pass_and_every_output_token_another() -> None:
    passes = forward_passes(trace())
    assert passes.tokens.tolist() == [5, 1, 1, 1] * 2
    assert passes.phase.tolist() == [PREFILL, DECODE, DECODE, DECODE] * 2
    assert passes.context.tolist() == [0, 5, 6, 7] * 2


def test_long_prompts_run_in_chunks() -> None:
    passes = forward_passes(trace(), chunk_tokens=2)
    assert passes.tokens.tolist() == [2, 2, 1, 1, 1, 1] * 2
    assert passes.context.tolist() == [0, 2, 4, 5, 6, 7] * 2


def test_one_phase_can_be_asked_for() -> None:
    assert forward_passes(trace(), phase="decode").tokens.tolist() == [1] * 6
    assert forward_passes(trace(), phase="prefill").tokens.tolist() == [5, 5]
    with pytest.raises(TraceError, match="no decode token"):
        forward_passes(trace(n_output=0), phase="decode")


def test_batches_hold_as_many_requests_as_asked() -> None:
    passes = forward_passes(trace(n_requests=6), batch_size=3, phase="decode")
    assert (passes.tokens == 3).all()
    assert (passes.requests == 3).all()
    with pytest.raises(TraceError, match="say which phase"):
        forward_passes(trace(), batch_size=3)


def test_every_choice_is_counted_once() -> None:
    source = trace()
    work = layer_steps(source, forward_passes(source))
    assert int(work.tokens.sum()) == source.topk.size
    for step in range(work.n_steps):
        cells = slice(work.start[step], work.start[step + 1])
        rows = work.passes.rows[slice(*work.passes.start[step // 2 : step // 2 + 2])]
        chosen = source.topk[rows, step % 2].ravel()
        counts = np.bincount(chosen, minlength=6)
        np.testing.assert_array_equal(work.tokens[cells], counts[work.expert[cells]])
        assert len(np.unique(work.expert[cells])) == (counts > 0).sum() == len(work.tokens[cells])


def test_gate_weights_add_up_over_tokens() -> None:
    source = trace()
    work = layer_steps(source, forward_passes(source))
    assert work.gate is not None
    np.testing.assert_allclose(work.gate, 0.5 * work.tokens)


def test_missing_choices_are_left_out_and_counted() -> None:
    source = trace()
    topk = source.topk.copy()
    topk[0, 1] = MISSING
    holed = replace(source, topk=topk)
    work = layer_steps(holed, forward_passes(holed))
    assert work.n_missing == 2
    assert int(work.tokens.sum()) == source.topk.size - 2


def test_the_fast_way_for_single_tokens_equals_the_counting_one() -> None:
    source = replace(zipf_trace(300, 3, 8, 2, seed=1), weights=None)
    fast = layer_steps(source, forward_passes(source))
    slow = layer_steps(
        replace(source, weights=np.ones(source.topk.shape, np.float16)), forward_passes(source)
    )
    np.testing.assert_array_equal(fast.expert, slow.expert)
    np.testing.assert_array_equal(fast.start, slow.start)


@pytest.mark.parametrize("slots", [1, 2, 4, 7])
def test_reuse_distances_give_the_hits_of_every_lru_cache(slots: int) -> None:
    source = zipf_trace(800, 3, 8, 2, 0.7, 0.3, seed=2)
    work = layer_steps(source, forward_passes(source))
    replayed = replay_trace(source, slots, "lru", scope="per_layer")
    assert int(lru_hits(work)[:, slots].sum()) == replayed.n_hits


def test_distances_account_for_every_request() -> None:
    source = zipf_trace(500, 2, 8, 2, seed=3)
    work = layer_steps(source, forward_passes(source))
    counts = reuse_distances(work)
    assert int(counts.sum()) == len(work.expert)
    np.testing.assert_array_equal(counts[:, 0], [8, 8])  # first requests
