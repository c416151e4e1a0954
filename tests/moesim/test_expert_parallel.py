"""The lowered step against its closed form, and what overlap may and may not do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine import run
from moesim.errors import SimulationError
from moesim.lower.expert_parallel import COMPONENTS, step_breakdown, step_program
from moesim.lower.layer_costs import StepOptions, attention_seconds, layer_costs
from planners.dispatch import DispatchCounts, dispatch_counts, source_ranks
from planners.step_time import laws_for, moe_parts
from tests.ep_examples import DEEPSEEK_V3, TINY, contiguous, h800_system, random_topk, replicated
from traces.model import ModelSpec


def counts_for(seed: int, n_ranks: int, per_rank: int, options: StepOptions) -> DispatchCounts:
    """One batch of random routing of TINY over ranks in nodes of eight."""
    rng = np.random.default_rng(seed)
    placement = replicated(rng, (3, 16, 16 + n_ranks - 16 % n_ranks), (n_ranks, min(8, n_ranks)))
    topk = random_topk(rng, (per_rank * n_ranks, 3, 16), 4)
    source = source_ranks(len(topk), n_ranks)
    return dispatch_counts(topk, source, placement, options.mode, options.rule)


def closed_form_s(model: ModelSpec, n_ranks: int, options: StepOptions, c: DispatchCounts) -> float:
    system = h800_system(n_ranks)
    parts = moe_parts(c, laws_for(model, system, options.precision, options.kernel))
    costs = layer_costs(model, system, options)
    breakdown = step_breakdown(model, costs, parts, options.shared_overlap)
    assert tuple(breakdown) == COMPONENTS
    return float(sum(breakdown.values()))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 8, 16]),
    st.integers(1, 20),
    st.sampled_from(["decode", "prefill"]),
    st.booleans(),
)
def test_without_overlap_the_timeline_ends_where_the_closed_form_says(
    seed: int, n_ranks: int, per_rank: int, phase: str, shared_overlap: bool
) -> None:
    options = StepOptions(
        tokens_per_rank=per_rank,
        phase=phase,  # type: ignore[arg-type]
        context=64,
        attention_ranks=2 if n_ranks > 1 else 1,
        shared_overlap=shared_overlap,
        mode="node" if seed % 2 else "device",
    )
    counts = counts_for(seed, n_ranks, per_rank, options)
    program, _ = step_program(TINY, h800_system(n_ranks), options, (counts,))
    expected = closed_form_s(TINY, n_ranks, options, counts)
    assert run(program).makespan_s == pytest.approx(expected, rel=1e-9)


def test_a_whole_deepseek_step_on_32_ranks_ends_where_the_closed_form_says() -> None:
    rng = np.random.default_rng(0)
    options = StepOptions(tokens_per_rank=4, context=4096)
    topk = random_topk(rng, (128, 58, 256), 8)
    counts = dispatch_counts(topk, source_ranks(128, 32), contiguous(58, 256, 32))
    program, names = step_program(DEEPSEEK_V3, h800_system(32), options, (counts,))
    expected = closed_form_s(DEEPSEEK_V3, 32, options, counts)
    assert run(program).makespan_s == pytest.approx(expected, rel=1e-9)
    assert names.labels[int(names.label[0])] == "norms of layer 0"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.sampled_from(["decode", "prefill"]))
def test_two_batches_end_between_the_longest_stream_and_one_after_the_other(
    seed: int, per_rank: int, phase: str
) -> None:
    options = StepOptions(per_rank, phase, 64, two_batch_overlap=True)  # type: ignore[arg-type]
    single = replace(options, two_batch_overlap=False)
    halves = [(per_rank + 1) // 2, per_rank // 2]
    batches = tuple(counts_for(seed + i, 8, n, single) for i, n in enumerate(halves))
    program, _ = step_program(TINY, h800_system(8), options, batches)
    together = run(program).makespan_s
    alone = [
        closed_form_s(TINY, 8, replace(single, tokens_per_rank=n), c)
        for n, c in zip(halves, batches, strict=True)
    ]
    busiest = max(program.seconds[program.stream == s].sum() for s in range(program.n_streams))
    assert max(*alone, busiest) <= together * (1 + 1e-9)
    assert together <= sum(alone) * (1 + 1e-9)


def test_two_batches_hide_communication_of_a_large_prefill() -> None:
    rng = np.random.default_rng(0)
    model = replace(DEEPSEEK_V3, n_layers=6, moe_layers=(3, 4, 5), kv_layers=6)
    placement = contiguous(3, 256, 16)
    options = StepOptions(tokens_per_rank=2048, phase="prefill", two_batch_overlap=True)
    topk = random_topk(rng, (256, 3, 256), 8)
    half = dispatch_counts(np.tile(topk, (64, 1, 1)), source_ranks(16384, 16), placement)
    whole = dispatch_counts(np.tile(topk, (128, 1, 1)), source_ranks(32768, 16), placement)
    system = h800_system(16)
    with_overlap, _ = step_program(model, system, options, (half, half))
    plain, _ = step_program(model, system, replace(options, two_batch_overlap=False), (whole,))
    assert run(with_overlap).makespan_s < 0.9 * run(plain).makespan_s


def test_counts_that_do_not_fit_the_model_or_the_options_are_refused() -> None:
    options = StepOptions(tokens_per_rank=4)
    counts = counts_for(0, 8, 4, options)
    with pytest.raises(SimulationError, match=r"shape \(3, 8\), expected \(58, 8\)"):
        step_program(DEEPSEEK_V3, h800_system(8), options, (counts,))
    overlap = StepOptions(tokens_per_rank=4, two_batch_overlap=True)
    with pytest.raises(SimulationError, match="batches: 1, expected 2"):
        step_program(TINY, h800_system(8), overlap, (counts,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_rank": 0}, "tokens_per_rank=0"),
        ({"tokens_per_rank": 1, "two_batch_overlap": True}, "expected at least 2"),
        ({"phase": "train"}, "phase='train'"),
        ({"context": 0}, "context=0"),
    ],
)
def test_impossible_options_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        StepOptions(**({"tokens_per_rank": 4} | change))  # type: ignore[arg-type]


def test_attention_ranks_must_divide_the_heads() -> None:
    options = StepOptions(tokens_per_rank=4, attention_ranks=3)
    with pytest.raises(SimulationError, match="attention_ranks=3 must divide 128 heads"):
        attention_seconds(DEEPSEEK_V3, h800_system(8), options, 4)


def test_longer_contexts_cost_more_and_sliding_layers_stop_costing_more() -> None:
    def seconds(context: int, sliding: int) -> np.ndarray:
        attention = replace(TINY.attention, sliding_window=128, n_sliding_layers=sliding)
        model = replace(TINY, attention=attention)
        options = StepOptions(tokens_per_rank=64, context=context)
        return attention_seconds(model, h800_system(8), options, 64)

    assert (seconds(100_000, 0) > seconds(1000, 0)).all()
    half = seconds(100_000, 2)
    assert sorted(half)[:2] == pytest.approx(sorted(seconds(128, 2))[:2])
    assert sorted(half)[2:] == pytest.approx(sorted(seconds(100_000, 0))[2:])


def test_splitting_heads_reads_less_per_rank_but_pays_an_all_reduce() -> None:
    def total(ranks: int, tokens: int, context: int) -> float:
        options = StepOptions(tokens, context=context, attention_ranks=ranks)
        return float(attention_seconds(DEEPSEEK_V3, h800_system(8), options, tokens).sum())

    assert total(8, 1, 128) < total(1, 1, 128) * 1.5
    assert total(8, 128, 16) > total(1, 128, 16)
