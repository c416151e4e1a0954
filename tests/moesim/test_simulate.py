"""Runs of many steps: the fast path against one program per step, and the figures of a Result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.engine import run
from moesim.errors import SimulationError
from moesim.lower.layer_costs import StepOptions
from moesim.simulate import KINDS, Result, Setting, simulate_counts, simulate_steps, step_timeline
from planners.errors import PlanError
from planners.plan import Placement, rank_loads
from tests.ep_examples import TINY, contiguous, h800_system, random_topk, replicated, trace_of
from traces.batches import steps
from traces.errors import TraceError
from traces.routing import RoutingTrace, expert_counts

N_RANKS, PER_RANK, N_STEPS = 8, 6, 5


def case(options: StepOptions) -> tuple[RoutingTrace, Placement, Setting, np.ndarray]:
    rng = np.random.default_rng(0)
    trace = trace_of(random_topk(rng, (400, 3, 16), 4), TINY)
    placement = replicated(rng, (3, 16, 24), (N_RANKS, 8))
    rows = rng.integers(0, 400, (N_STEPS, options.tokens_per_rank * N_RANKS))
    return trace, placement, Setting(TINY, h800_system(N_RANKS), options), rows


@pytest.mark.parametrize("shared_overlap", [False, True])
@pytest.mark.parametrize("rule", ["even", "local"])
def test_every_step_of_the_fast_path_is_the_end_of_its_timeline(
    shared_overlap: bool, rule: str
) -> None:
    options = StepOptions(PER_RANK, shared_overlap=shared_overlap, rule=rule)  # type: ignore[arg-type]
    trace, placement, setting, rows = case(options)
    result = simulate_steps(trace, placement, setting, rows)
    for step in range(N_STEPS):
        program, _ = step_timeline(trace, placement, setting, rows[step])
        assert result.seconds[step] == pytest.approx(run(program).makespan_s, rel=1e-9)


def test_the_breakdown_adds_up_with_and_without_overlap() -> None:
    for overlap in (False, True):
        options = StepOptions(PER_RANK, two_batch_overlap=overlap)
        trace, placement, setting, rows = case(options)
        result = simulate_steps(trace, placement, setting, rows)
        assert sum(result.breakdown_s.values()) == pytest.approx(result.seconds.mean(), rel=1e-9)
        assert all(value >= 0 for part, value in result.breakdown_s.items() if part != "overlap")
        if overlap:
            assert result.breakdown_s["overlap"] <= 0


def test_figures_per_token_follow_from_the_seconds() -> None:
    trace, placement, setting, rows = case(StepOptions(PER_RANK))
    result = simulate_steps(trace, placement, setting, rows)
    tokens = N_STEPS * PER_RANK * N_RANKS
    total_s = result.seconds.sum()
    assert result.tokens_per_s == pytest.approx(tokens / total_s)
    dollars = total_s * N_RANKS * 2.0 / 3600 / tokens * 1e6
    assert result.usd_per_million_tokens == pytest.approx(dollars)
    board = total_s * N_RANKS * 700.0 / tokens
    assert result.joules_per_token is not None
    assert board <= result.joules_per_token < 1.01 * board
    assert result.bytes_per_token["out"] == 0.0  # one node
    assert result.bytes_per_token["up"] > 0
    assert set(result.kinds) == set(KINDS) <= set(Result.__dataclass_fields__)
    assert set(result.inputs) == {"model", "system", "trace_sha256", "placement_sha256"}


def test_unknown_price_and_power_give_no_figure() -> None:
    trace, placement, setting, rows = case(StepOptions(PER_RANK))
    device = replace(setting.system.device, usd_per_hour=0.0, tdp_w=0.0)
    unknown = replace(setting, system=replace(setting.system, device=device))
    result = simulate_steps(trace, placement, unknown, rows)
    assert result.usd_per_million_tokens is None
    assert result.joules_per_token is None


def test_imbalance_of_one_step_over_the_whole_trace_is_that_of_its_counts() -> None:
    rng = np.random.default_rng(1)
    trace = trace_of(random_topk(rng, (64, 3, 16), 4), TINY)
    placement = contiguous(3, 16, N_RANKS)
    setting = Setting(TINY, h800_system(N_RANKS), StepOptions(8))
    result = simulate_steps(trace, placement, setting, np.arange(64)[None])
    counts = np.stack([np.bincount(trace.topk[:, c].ravel(), minlength=16) for c in range(3)])
    loads = rank_loads(placement, counts.astype(np.float64))
    np.testing.assert_allclose(result.max_over_mean, loads.max(axis=1) / loads.mean(axis=1))


def test_equal_inputs_give_equal_results() -> None:
    for overlap in (False, True):
        trace, placement, setting, rows = case(StepOptions(PER_RANK, two_batch_overlap=overlap))
        first = simulate_steps(trace, placement, setting, rows)
        second = simulate_steps(trace, placement, setting, rows)
        np.testing.assert_array_equal(first.seconds, second.seconds)
        assert first.breakdown_s == second.breakdown_s


def test_without_given_rows_the_steps_of_the_phase_are_run() -> None:
    trace, placement, setting, _ = case(StepOptions(PER_RANK))
    result = simulate_steps(trace, placement, setting)
    rows = steps(trace, PER_RANK * N_RANKS, "decode", 0).rows
    np.testing.assert_array_equal(
        result.seconds, simulate_steps(trace, placement, setting, rows).seconds
    )
    assert result.inputs["steps"] in ("each token once", "resampled: the trace is short")
    prefill = replace(setting, options=StepOptions(PER_RANK, "prefill"))
    with pytest.raises(TraceError, match="no prefill token"):
        simulate_steps(trace, placement, prefill)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, placement, setting, rows = case(StepOptions(PER_RANK))
    whole = simulate_steps(trace, placement, setting, rows)
    monkeypatch.setattr("moesim.simulate.CHUNK_BYTES", 1)
    parts = simulate_steps(trace, placement, setting, rows)
    np.testing.assert_array_equal(whole.seconds, parts.seconds)
    np.testing.assert_allclose(whole.max_over_mean, parts.max_over_mean, rtol=1e-12)


def test_inputs_that_do_not_fit_together_are_refused_by_name() -> None:
    trace, placement, setting, rows = case(StepOptions(PER_RANK))
    other = replace(setting, model=replace(TINY, name="other", n_experts=32))
    with pytest.raises(SimulationError, match="16 experts, model other"):
        simulate_steps(trace, placement, other, rows)
    with pytest.raises(SimulationError, match=r"rows: shape \(5, 40\)"):
        simulate_steps(trace, placement, setting, rows[:, :40])
    with pytest.raises(PlanError, match="n_ranks=4"):
        simulate_steps(trace, contiguous(3, 16, 4), setting, rows)


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_drawn_from_counts_cost_about_what_independent_tokens_cost(overlap: bool) -> None:
    rng = np.random.default_rng(0)
    trace = trace_of(random_topk(rng, (4096, 3, 16), 4), TINY)
    placement = contiguous(3, 16, N_RANKS)
    options = StepOptions(64, two_batch_overlap=overlap)
    setting = Setting(TINY, h800_system(N_RANKS), options)
    rows = np.arange(4096).reshape(8, 512)
    from_tokens = simulate_steps(trace, placement, setting, rows)
    drawn = simulate_counts(expert_counts(trace), placement, setting, 40, 0)
    assert drawn.n_steps == 40
    assert drawn.seconds.mean() == pytest.approx(from_tokens.seconds.mean(), rel=0.02)
    assert drawn.bytes_per_token["up"] == pytest.approx(from_tokens.bytes_per_token["up"], rel=0.02)
    assert sum(drawn.breakdown_s.values()) == pytest.approx(drawn.seconds.mean(), rel=1e-9)
    assert drawn.kinds["bytes_per_token"] == "assumed"
    assert from_tokens.kinds["bytes_per_token"] == "measured"


def test_equal_seeds_draw_equal_steps_whatever_the_placement() -> None:
    trace, placement, setting, _ = case(StepOptions(PER_RANK))
    counts = expert_counts(trace)
    first = simulate_counts(counts, placement, setting, 20, 7)
    again = simulate_counts(counts, placement, setting, 20, 7)
    np.testing.assert_array_equal(first.seconds, again.seconds)
    slots = np.roll(placement.physical_to_logical_map, 3 * N_RANKS, axis=1)  # whole ranks move
    moved = simulate_counts(counts, Placement(slots, 16, N_RANKS, N_RANKS), setting, 20, 7)
    np.testing.assert_allclose(moved.max_over_mean, first.max_over_mean, rtol=0.05)
    with pytest.raises(SimulationError, match="n_steps=0"):
        simulate_counts(counts, placement, setting, 0, 7)
