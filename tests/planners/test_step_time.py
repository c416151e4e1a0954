"""Step time from counts: the compiled pass against numpy, and what moves the prediction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.collective import AllToAllLaw
from hwmodels.cost import ExpertLaw
from planners.dispatch import (
    MODES,
    Mode,
    Routing,
    dispatch_counts,
    expected_dispatch,
    source_ranks,
    step_counts,
)
from planners.errors import PlanError
from planners.step_time import (
    BF16,
    MoeLaws,
    Precision,
    check_system,
    copy_bytes,
    default_precision,
    laws_for,
    moe_parts,
    moe_seconds,
    step_seconds_from_counts,
)
from tests.ep_examples import DEEPSEEK_V3, H800, contiguous, h800_system, random_topk, replicated


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(MODES)))
def test_the_compiled_pass_equals_numpy(seed: int, mode: Mode) -> None:
    rng = np.random.default_rng(seed)
    placement = replicated(rng, (3, 16, 24), (8, 4))
    topk = random_topk(rng, (40, 3, 16), 4)
    counts = step_counts(topk, rng.integers(0, 40, (5, 16)), source_ranks(16, 8), placement, mode)
    laws = MoeLaws(
        ExpertLaw(*(rng.random(4) * 1e-5)), AllToAllLaw(*(rng.random(3) * 1e-6)), 900.0, 1800.0
    )
    parts = moe_parts(counts, laws)
    compiled = step_seconds_from_counts(counts, laws)
    for got, want in zip(
        compiled, (parts.dispatch_s, parts.experts_s, parts.combine_s), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(moe_seconds(counts, laws), compiled.sum(axis=0), rtol=1e-12)


def test_the_busiest_rank_and_both_ways_of_its_bytes_make_the_layer() -> None:
    laws = MoeLaws(ExpertLaw(1.0, 10.0, 3.0, 0.5), AllToAllLaw(0.25, 1.0, 2.0), 1.0, 2.0)
    topk = np.array([[[0, 1]], [[0, 3]]], dtype=np.int16)  # ranks 0 and 1 of one node
    counts = dispatch_counts(topk, np.array([0, 1], np.int32), contiguous(1, 4, 2))
    parts = moe_parts(counts, laws)
    # rank 0 computes 3 copies with 2 experts, rank 1 one copy; one copy goes from rank 1 to 0
    assert float(parts.experts_s[0]) == 1.0 + max(2 * 10.0, 3 * 3.0) + 3 * 0.5
    assert float(parts.dispatch_s[0]) == 0.25 + 1.0
    assert float(parts.combine_s[0]) == 0.25 + 2.0


def test_copies_in_eight_bits_carry_their_scales() -> None:
    assert copy_bytes(7168, 8) == 7168 + 4 * 56
    assert copy_bytes(7168, 16) == 2 * 7168


def test_a_device_without_fp8_runs_in_sixteen_bits() -> None:
    from dataclasses import replace

    assert default_precision(H800) == Precision()
    assert default_precision(replace(H800, flop_per_s={"bf16": 312e12})) == BF16
    old = replace(H800, flop_per_s={"fp16": 125e12})
    assert default_precision(old).compute_dtype == "fp16"


def test_a_placement_of_another_size_is_refused_by_name() -> None:
    check_system(contiguous(1, 256, 32), h800_system(32))
    check_system(contiguous(1, 256, 4), h800_system(4))
    with pytest.raises(PlanError, match="n_ranks=16, system h800x32 has 32"):
        check_system(contiguous(1, 256, 16), h800_system(32))
    with pytest.raises(PlanError, match="ranks_per_node=4, system h800x16 has 8"):
        check_system(contiguous(1, 256, 16, 4), h800_system(16))
    counts = dispatch_counts(
        np.zeros((4, 1, 1), np.int16), np.zeros(4, np.int32), contiguous(1, 4, 2)
    )
    with pytest.raises(PlanError, match=r"rank_tokens has shape \(1, 2\)"):
        step_seconds_from_counts(counts, laws_for(DEEPSEEK_V3, h800_system(8)))


def test_fewer_nodes_per_token_shorten_a_prefill_step_that_the_nic_limits() -> None:
    laws = laws_for(DEEPSEEK_V3, h800_system(32), kernel="normal")
    shares = np.ones((1, 256))
    placement = contiguous(1, 256, 32)
    free = expected_dispatch(shares, 4096, placement, Routing(8), "node")
    limited = expected_dispatch(shares, 4096, placement, Routing(8, 4, 2), "node")
    assert limited.out_send.sum() < 0.75 * free.out_send.sum()
    assert moe_parts(limited, laws).dispatch_s[0] < 0.75 * moe_parts(free, laws).dispatch_s[0]


def test_balancing_tokens_alone_does_nothing_for_a_decode_step_bound_by_weights() -> None:
    """Each rank reads all of its experts anyway, so an even load buys next to nothing."""
    laws = laws_for(DEEPSEEK_V3, h800_system(8))
    skewed, uniform = np.ones((1, 256)), np.ones((1, 256))
    skewed[0, :32] = 2.0  # rank 0 carries twice the tokens
    placement = contiguous(1, 256, 8)
    times = [
        float(moe_parts(expected_dispatch(s, 64, placement, Routing(8)), laws).experts_s[0])
        for s in (skewed, uniform)
    ]
    assert times[0] < 1.05 * times[1]
    large = [
        float(moe_parts(expected_dispatch(s, 4096, placement, Routing(8)), laws).experts_s[0])
        for s in (skewed, uniform)
    ]
    assert large[0] > 1.6 * large[1]
