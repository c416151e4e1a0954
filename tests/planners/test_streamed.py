"""Streamed weights: MoE-Lens' equations, the roofline's laws, and what the searches promise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planners.errors import PlanError
from planners.flexgen import (
    FlexgenProblem,
    FlexgenRates,
    flexgen_capacity,
    flexgen_plan,
    flexgen_search,
    flexgen_terms,
)
from planners.streamed import (
    LayerShape,
    Lengths,
    Limits,
    StreamBox,
    StreamedPolicy,
    cpu_roof,
    decode_layer,
    gpu_roof,
    intensity,
    joined,
    layer_shape,
    overlap_gain,
    parallel_tokens_per_kv_token,
    parallel_tokens_per_kv_token_exact,
    prefill_layer,
    saturation_tokens,
    stage2,
    throughput_bound,
    turning_points,
)
from planners.streamed_policy import (
    MemoryRules,
    best_policy,
    memory_use,
    micro_batches,
    policy_tokens_per_s,
)
from traces.models import load_model

GIB = 2.0**30
MIXTRAL = layer_shape(load_model("mixtral-8x7b"))
T4 = StreamBox("t4", 65e12, 320e9, 15 * GIB, 16e9, 0.8e12, 100e9, 192 * GIB, 24)
MTBENCH = Lengths(418, 128)
SMALL = LayerShape(
    n_layers=4, n_experts=4, top_k=2, n_heads=4, dense_bytes=4e6, expert_bytes=40e6,
    kv_token_bytes=1e3, hidden_bytes=2e3, qkv_bytes=3e3, dense_flops=4e6, expert_flops=20e6,
    score_flops=4e3, workspace_bytes=20e3,
)  # fmt: skip

boxes = st.builds(
    StreamBox,
    name=st.just("small"),
    gpu_flop_per_s=st.floats(1e12, 1e14),
    gpu_bytes_per_s=st.floats(5e10, 1e12),
    gpu_memory_bytes=st.floats(140e6, 600e6),
    link_bytes_per_s=st.floats(1e9, 5e10),
    cpu_flop_per_s=st.floats(1e10, 1e13),
    dram_bytes_per_s=st.floats(1e10, 3e11),
    host_memory_bytes=st.floats(400e6, 1e9),
)
lengths = st.builds(Lengths, st.integers(1, 600), st.integers(1, 300))


def test_check_values_of_moe_lens_hold_to_one_percent() -> None:
    kv_tokens, weights_s = 70e9 / 131_072, 94e9 / 19.5e9
    table = {(98, 32): 3948, (98, 64): 2157, (98, 128): 1207, (98, 256): 678}
    table |= {(926, 128): 921, (128, 512): 361}
    for pair, published in table.items():
        found = throughput_bound(Lengths(*pair), kv_tokens, weights_s)
        assert found == pytest.approx(published, rel=0.01)
    assert throughput_bound(Lengths(98, 32), kv_tokens, weights_s, 3600.0) == 3600.0
    assert parallel_tokens_per_kv_token(Lengths(98, 32)) == pytest.approx(0.0356, rel=0.01)
    for flop_per_s, published in ((150e12, 18_750), (181e12, 22_600), (312e12, 39_000)):
        assert saturation_tokens(flop_per_s, 32e9, 8, 2) == pytest.approx(published, rel=0.01)
    assert weights_s == pytest.approx(4.82, rel=0.01)
    assert kv_tokens == pytest.approx(534e3, rel=0.01)
    assert MIXTRAL.kv_token_bytes * MIXTRAL.n_layers == 131_072


def test_intensity_is_equation_one_written_out_for_mixtral() -> None:
    h, h_i, s, n = 4096, 14_336, 4, 777.0
    dense = 4 * h * h + 4 * h * h / s
    expected = n * (6 * 2 * h * h_i + dense) / (6 * 8 * h * h_i + dense)
    assert intensity(MIXTRAL, n) == pytest.approx(expected, rel=1e-12)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_closed_form_of_pme_exceeds_its_sum_by_one_iteration(p: int, g: int) -> None:
    closed = parallel_tokens_per_kv_token(Lengths(p, g))
    exact = parallel_tokens_per_kv_token_exact(p, g)
    assert closed == pytest.approx(exact * (g + 1) / g, rel=1e-9)
    assert 1.0 < overlap_gain(Lengths(p, g)) < 2.0


@given(lengths, st.floats(1e3, 1e7), st.integers(1, 64), st.floats(0.1, 20.0))
def test_the_second_stage_never_beats_the_bound_and_nears_its_own(
    pair: Lengths, kv_tokens: float, page: int, weights_s: float
) -> None:
    limits = Limits(kv_tokens, page, weights_s, 3600.0, 131_072.0, 150e9)
    stage = stage2(pair, limits)
    bound = throughput_bound(pair, kv_tokens, weights_s, 3600.0)
    assert stage.bound_tokens_per_s <= bound * (1 + 1e-9)
    few, many = stage.tokens_per_s(1e2), stage.tokens_per_s(1e3)
    assert few < many < stage.bound_tokens_per_s
    assert stage.tokens_per_s(1e12) == pytest.approx(stage.bound_tokens_per_s, rel=1e-3)


@given(boxes, st.floats(0.1, 1e4), st.floats(0.01, 1e6))
def test_turning_points_are_where_roofs_meet(
    box: StreamBox, gpu_intensity: float, host: float
) -> None:
    assume(box.dram_bytes_per_s > box.link_bytes_per_s)
    points = turning_points(box, gpu_intensity)
    if host <= points.stay:
        assert cpu_roof(box, host) >= gpu_roof(box, gpu_intensity, host) * (1 - 1e-9)
    if host >= points.full:
        assert gpu_roof(box, gpu_intensity, host) == pytest.approx(
            gpu_roof(box, gpu_intensity, math.inf)
        )
    else:
        assert gpu_roof(box, gpu_intensity, host) == box.link_bytes_per_s * host
    at_balance = box.link_bytes_per_s * points.balance
    assert at_balance == pytest.approx(box.gpu_bytes_per_s * gpu_intensity)


@given(boxes, lengths, st.integers(1, 50), st.integers(1, 8), st.booleans(), st.booleans())
def test_no_faster_part_makes_a_layer_slower(
    box: StreamBox, pair: Lengths, micro: int, count: int, on_gpu: bool, ffn: bool
) -> None:
    policy = StreamedPolicy(micro * count, micro, on_gpu, ffn)
    for price in (decode_layer, prefill_layer):
        before = price(SMALL, box, pair, policy).total_s
        for field in ("gpu_flop_per_s", "gpu_bytes_per_s", "link_bytes_per_s", "cpu_flop_per_s"):
            faster = replace(box, **{field: 2 * getattr(box, field)})
            assert price(SMALL, faster, pair, policy).total_s <= before * (1 + 1e-12)


@given(lengths, st.integers(1, 50), st.booleans(), st.floats(0, 1), st.floats(0, 1))
def test_memory_is_affine_in_the_shares_and_weights_leave_the_host(
    pair: Lengths, micro: int, on_gpu: bool, weights: float, kv: float
) -> None:
    def use(w: float, c: float) -> np.ndarray:
        policy = StreamedPolicy(3 * micro, micro, on_gpu, True, w, c)
        found = memory_use(SMALL, pair, policy)
        return np.array([float(found.gpu_bytes), float(found.host_bytes)])

    mixed = use(0, 0) + weights * (use(1, 0) - use(0, 0)) + kv * (use(0, 1) - use(0, 0))
    assert use(weights, kv) == pytest.approx(mixed)
    assert use(1, 0)[1] < use(0, 0)[1]


@settings(max_examples=25, deadline=None)
@given(boxes, st.builds(Lengths, st.integers(50, 600), st.integers(50, 300)), st.booleans())
def test_no_policy_on_a_grid_beats_the_search_and_the_choice_fits(
    box: StreamBox, pair: Lengths, weigh_prefill: bool
) -> None:
    rules = MemoryRules()
    room = (box.gpu_memory_bytes * rules.gpu_usable, box.host_memory_bytes * rules.host_usable)

    def fits(policy: StreamedPolicy) -> bool:
        use = memory_use(SMALL, pair, policy, rules)
        gpu, host = float(use.gpu_bytes), float(use.host_bytes)
        return gpu <= room[0] * (1 + 1e-9) and host <= room[1] * (1 + 1e-9)

    grid = itertools.product(
        (1, 3, 10, 40), (1, 2, 5, 20), (0, 1), (0, 1), (0, 0.3, 1), (0, 0.5, 1)
    )
    rates = []
    for micro, count, attention, ffn, weights, kv in grid:
        if (kv and not attention) or (weights and not ffn):
            continue
        policy = StreamedPolicy(micro * count, micro, bool(attention), bool(ffn), weights, kv)
        if fits(policy):
            rates.append(float(policy_tokens_per_s(SMALL, box, pair, policy, weigh_prefill)))
    if not rates:
        return
    plan = best_policy(SMALL, box, pair, rules, weigh_prefill)
    assert fits(plan.policy)
    again = policy_tokens_per_s(SMALL, box, pair, plan.policy, weigh_prefill)
    assert float(again) == pytest.approx(plan.tokens_per_s)
    assert max(rates) <= plan.tokens_per_s * (1 + 1e-9)


def test_a_t4_attends_on_the_cpu_and_streams_all_experts_to_the_gpu() -> None:
    plan = best_policy(MIXTRAL, T4, MTBENCH)
    assert not plan.policy.attention_on_gpu
    assert plan.policy.ffn_on_gpu
    assert plan.policy.weights_share < 0.05
    assert 252 <= plan.policy.batch <= 1008
    assert 18 <= plan.policy.micro_batch <= 72
    assert plan.n_tried > 10_000


def test_what_does_not_fit_names_the_memory_and_the_gap() -> None:
    with pytest.raises(PlanError, match=r"host memory is short by \d+\.\d\d GB"):
        best_policy(MIXTRAL, replace(T4, host_memory_bytes=100 * GIB), MTBENCH)
    with pytest.raises(PlanError, match=r"GPU memory is short by \d+\.\d\d GB .* usable"):
        best_policy(MIXTRAL, replace(T4, gpu_memory_bytes=6 * GIB), MTBENCH)
    with pytest.raises(PlanError, match="gpu_flop_per_s=0"):
        replace(T4, gpu_flop_per_s=0.0)
    with pytest.raises(PlanError, match="expected >= 1"):
        Lengths(0, 5)
    with pytest.raises(PlanError, match="61 layers have experts"):
        layer_shape(load_model("deepseek-v3"))


def test_joined_gpus_share_a_link_unless_told_otherwise() -> None:
    two = joined(replace(T4, staging_bytes_per_s=1e9), 2)
    own = joined(replace(T4, staging_bytes_per_s=1e9), 2, own_links=True)
    assert (two.gpu_flop_per_s, two.link_bytes_per_s) == (130e12, 16e9)
    assert (own.link_bytes_per_s, own.staging_bytes_per_s) == (32e9, 2e9)


@given(st.integers(0, 3000))
def test_micro_batches_rise_without_leaving_out_the_small_ones(most: int) -> None:
    sizes = list(micro_batches(most))
    assert sizes[:64] == list(range(1, min(most, 64) + 1))
    assert all(a < b <= max(a + 1, 1.05 * a) for a, b in itertools.pairwise(sizes))
    assert all(size <= most for size in sizes)


def opt_30b() -> LayerShape:
    h = 7168.0
    return LayerShape(
        48,
        1,
        1,
        56,
        8 * h * h,
        16 * h * h,
        4 * h,
        2 * h,
        6 * h,
        8 * h * h,
        16 * h * h,
        4 * h,
        8 * h,
    )


OPT = FlexgenProblem(opt_30b(), Lengths(512, 32), 15 * GIB, 208 * GIB, 1500 * GIB)
shares_of_three = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda v: sum(v) > 0.1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(shares_of_three, min_size=3, max_size=3), st.sampled_from([1, 4, 16]),
    st.integers(1, 6), st.booleans(),
)  # fmt: skip
def test_the_linear_program_bounds_every_feasible_split(
    rows: list[list[float]], micro: int, count: int, on_cpu: bool
) -> None:
    roomy = {"gpu_memory_bytes": 80 * GIB, "host_memory_bytes": 400 * GIB}
    problem = replace(OPT, cpu_attention=on_cpu, **roomy)
    shares = np.array([np.array(row) / sum(row) for row in rows])
    shares[2, :2] /= shares[2, :2].sum() or 1.0
    shares[2] = (shares[2, 0], 1 - shares[2, 0], 0.0)
    terms = flexgen_terms(problem, micro * count, micro, shares)
    assume((terms.memory_bytes <= flexgen_capacity(problem)).all())
    plan = flexgen_plan(problem, micro * count, micro)
    assert plan.seconds <= terms.seconds(48, 32) * (1 + 1e-7)
    assert plan.shares.sum(axis=1) == pytest.approx(1.0)
    own = flexgen_terms(problem, micro * count, micro, plan.shares).memory_bytes
    assert (own <= flexgen_capacity(problem) * (1 + 1e-7)).all()


@given(st.lists(st.floats(-1, 1), min_size=9, max_size=9), st.floats(0, 1))
def test_terms_are_affine_in_the_shares(raw: list[float], t: float) -> None:
    a, b = np.zeros((3, 3)), np.array(raw).reshape(3, 3)

    def all_of(shares: np.ndarray) -> np.ndarray:
        terms = flexgen_terms(OPT, 32, 8, shares)
        return np.concatenate([terms.prefill_s, terms.generate_s, terms.memory_bytes / GIB])

    mixed = (1 - t) * all_of(a) + t * all_of(b)
    assert all_of(t * b) == pytest.approx(mixed, rel=1e-9, abs=1e-6)


def test_opt_30b_comes_within_fifteen_percent_of_its_published_throughput() -> None:
    assert flexgen_plan(OPT, 144, 48).tokens_per_s == pytest.approx(7.32, rel=0.15)
    assert flexgen_search(OPT).tokens_per_s >= flexgen_plan(OPT, 128, 32).tokens_per_s


def test_a_faster_link_never_hurts_the_linear_program() -> None:
    seconds = [
        flexgen_plan(
            replace(OPT, rates=replace(FlexgenRates(), host_to_gpu=rate * GIB)), 96, 32
        ).seconds
        for rate in (3.0, 12.89, 40.0)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_a_block_that_does_not_fit_names_the_memory_and_the_gap() -> None:
    tight = replace(OPT, host_memory_bytes=10 * GIB, disk_bytes=0.0)
    with pytest.raises(PlanError, match=r"144 sequences: host memory .* short by \d+\.\d\d GB"):
        flexgen_plan(tight, 144, 48)
    with pytest.raises(PlanError, match="GPU memory in prefill is short"):
        flexgen_plan(replace(OPT, gpu_memory_bytes=1 * GIB), 144, 48)
    with pytest.raises(PlanError, match="block of 1 sequences"):
        flexgen_search(tight)
