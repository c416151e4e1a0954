"""Laws of the cost model, and its error against published curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.cost import (
    EFFICIENCY_SOURCES,
    Cost,
    Efficiency,
    ExpertLaw,
    ExpertShape,
    expert_law,
    expert_seconds,
)
from hwmodels.errors import HardwareError
from hwmodels.operators import (
    AttentionShape,
    attention_decode,
    attention_prefill,
    copy,
    elementwise,
    gate,
    gemm,
    permute,
    routed_experts,
)
from tests.ep_examples import H800, h800_system

H200 = replace(H800, name="h200", memory_bytes_per_s=4.8e12)
V3_EXPERT = ExpertShape(7168, 2048)
laws = st.builds(
    ExpertLaw,
    st.floats(0, 1e-4),
    st.floats(1e-9, 1e-4),
    st.floats(1e-9, 1e-5),
    st.floats(0, 1e-6),
)
counts = st.integers(0, 10_000)


@given(laws, counts, counts, st.integers(0, 100))
def test_expert_seconds_never_fall_with_more_tokens_or_more_distinct_experts(
    law: ExpertLaw, tokens: int, distinct: int, more: int
) -> None:
    base = float(expert_seconds(law, tokens, distinct))
    assert float(expert_seconds(law, tokens + more, distinct)) >= base
    assert float(expert_seconds(law, tokens, distinct + more)) >= base


def test_a_rank_without_tokens_costs_nothing() -> None:
    law = expert_law(H800, V3_EXPERT)
    assert expert_seconds(law, np.array([0.0, 1.0]), np.array([0.0, 1.0]))[0] == 0.0


def test_skew_makes_small_batches_faster_and_large_ones_slower() -> None:
    law = expert_law(H200, ExpertShape(2048, 768), 16, "bf16")
    n_experts, top_k, n_ranks = 128, 8, 8
    popularity = 1.0 / np.arange(1, n_experts + 1) ** 0.6
    popularity = np.random.default_rng(0).permutation(popularity / popularity.sum())

    def busiest_rank(share: np.ndarray, tokens: int) -> float:
        chosen = np.minimum(1.0, top_k * share)
        distinct = 1 - (1 - chosen) ** tokens
        per_rank = (tokens * chosen).reshape(n_ranks, -1).sum(axis=1)
        return float(expert_seconds(law, per_rank, distinct.reshape(n_ranks, -1).sum(axis=1)).max())

    def one_device(share: np.ndarray, tokens: int) -> float:
        chosen = np.minimum(1.0, top_k * share)
        distinct = float((1 - (1 - chosen) ** tokens).sum())
        return float(expert_seconds(law, tokens * top_k, distinct))

    uniform = np.full(n_experts, 1 / n_experts)
    assert one_device(popularity, 24) < 0.95 * one_device(uniform, 24)
    assert busiest_rank(popularity, 4096) > 1.05 * busiest_rank(uniform, 4096)


# Published latencies of vLLM's fused experts on one H200, BF16, balanced routing (seconds of one
# layer by tokens); balanced routing activates min(experts, tokens * top_k) experts.
REFERENCE = {
    ("mixtral-8x7b", 8, 2, 4096, 14336): {
        1: 0.210e-3,
        4: 0.670e-3,
        64: 0.671e-3,
        512: 0.818e-3,
        1024: 1.527e-3,
        4096: 5.574e-3,
        16384: 22.05e-3,
    },
    ("qwen3-30b-a3b", 128, 8, 2048, 768): {
        1: 0.038e-3,
        8: 0.164e-3,
        64: 0.30e-3,
        1024: 0.403e-3,
        4096: 0.850e-3,
        16384: 3.048e-3,
    },
}


def reference_errors() -> list[float]:
    errors = []
    for (_, n_experts, top_k, hidden, intermediate), points in REFERENCE.items():
        law = expert_law(H200, ExpertShape(hidden, intermediate), 16, "bf16")
        for tokens, measured in points.items():
            distinct = min(n_experts, tokens * top_k)
            errors.append(float(expert_seconds(law, tokens * top_k, distinct)) / measured - 1)
    return errors


def test_expert_law_meets_the_published_h200_curves_within_their_stated_error() -> None:
    errors = np.abs(reference_errors())
    assert np.median(errors) < 0.10
    assert errors.max() < 0.50  # one token of small experts: fixed time differs by kernel


def test_expert_law_meets_unseen_h200_rows_within_its_stated_error(
    shared: Path,
) -> None:
    rows = pd.read_parquet(
        shared / "measured" / "validation-moe.parquet",
        filters=[
            ("framework", "==", "vllm"),
            ("version", "==", "0.24.0"),
            ("kernel_source", "==", "vllm_fp8moe_triton_tritonexperts"),
            ("distribution", "==", "balanced"),
        ],
    )
    inter = rows.inter_size / rows.moe_tp_size
    copies = rows.num_tokens * rows.topk / rows.moe_ep_size
    distinct = np.minimum(rows.num_experts / rows.moe_ep_size, copies)
    predicted = [
        float(expert_seconds(expert_law(H200, ExpertShape(h, int(i)), 8, "fp8"), c, d))
        for h, i, c, d in zip(rows.hidden_size, inter, copies, distinct, strict=True)
    ]
    errors = np.abs(np.array(predicted) / (rows.latency_ms.to_numpy() * 1e-3) - 1)
    assert len(errors) > 1000
    assert np.median(errors) < 0.12
    assert np.quantile(errors, 0.9) < 0.40


def test_every_constant_has_a_source_and_the_value_it_is_used_with() -> None:
    fields = Efficiency.__dataclass_fields__
    assert set(EFFICIENCY_SOURCES) == set(fields)
    for field, figure in EFFICIENCY_SOURCES.items():
        assert figure.value == getattr(Efficiency(), field), field
        assert figure.source


def test_a_share_above_one_is_refused_by_name() -> None:
    with pytest.raises(HardwareError, match="memory_share=1.5"):
        Efficiency(memory_share=1.5)
    with pytest.raises(HardwareError, match="op_s=-1"):
        Efficiency(op_s=-1)


def test_unknown_dtypes_and_bits_are_refused_with_the_known_ones() -> None:
    with pytest.raises(HardwareError, match="known: bf16, fp8"):
        gemm(H800, (1, 1, 1), "int4")
    with pytest.raises(HardwareError, match="fp7"):
        gemm(H800, (1, 1, 1), "fp7")
    with pytest.raises(HardwareError, match="weight_bits=0"):
        expert_law(H800, V3_EXPERT, 0)


def test_costs_of_an_array_are_the_costs_of_its_elements() -> None:
    tokens = np.array([1.0, 64.0, 4096.0])
    together = gemm(H800, (tokens, 7168, 2048), "fp8")
    for i, count in enumerate(tokens):
        alone = gemm(H800, (count, 7168, 2048), "fp8")
        for field in ("seconds", "joules", "bytes", "flops"):
            assert getattr(alone, field) == getattr(together, field)[i]


@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_gemm_is_never_faster_than_memory_or_arithmetic(tokens: int) -> None:
    cost = gemm(H800, (tokens, 24576, 1536), "bf16")
    assert float(cost.flops) == 2 * tokens * 24576 * 1536
    assert float(cost.seconds) > float(cost.flops) / 989e12
    assert float(cost.seconds) > float(cost.bytes) / 3.35e12


def test_no_work_costs_nothing_in_every_operator() -> None:
    shape = AttentionShape(32, 8, 128, 128)
    costs: list[Cost] = [
        gemm(H800, (0, 10, 10)),
        elementwise(H800, 0.0),
        permute(H800, 0.0, 4096),
        attention_decode(H800, shape, (0, 1000)),
        attention_prefill(H800, shape, (0, 1000)),
        routed_experts(H800, V3_EXPERT, (0, 0)),
        copy(h800_system(8).scale_up, 0.0),
        gate(H800, 0, (7168, 256), 8),
    ]
    for cost in costs:
        assert float(cost.seconds) == 0.0
        assert float(cost.joules) == 0.0


def test_latent_attention_reads_less_cache_than_full_heads_and_computes_more() -> None:
    latent = AttentionShape(128, 128, 192, 128, kv_rank=512, rope_dim=64)
    full = AttentionShape(128, 128, 192, 128)
    work = (64, 4096)
    assert latent.kv_values_per_token == 576
    small, large = attention_decode(H800, latent, work), attention_decode(H800, full, work)
    assert float(small.bytes) < float(large.bytes) / 20
    assert float(small.flops) > 3 * float(large.flops)


def test_a_window_caps_what_decode_reads_and_prefill_computes() -> None:
    windowed = AttentionShape(64, 8, 64, 64, window=128)
    full = AttentionShape(64, 8, 64, 64)
    for work in ((8, 100), (8, 128)):
        assert attention_decode(H800, windowed, work) == attention_decode(H800, full, work)
    far = attention_decode(H800, windowed, (8, 100_000))
    assert float(far.bytes) == float(attention_decode(H800, full, (8, 128)).bytes)
    long_prompt = attention_prefill(H800, windowed, (10_000, 0))
    assert float(long_prompt.flops) < float(attention_prefill(H800, full, (10_000, 0)).flops) / 30


def test_prefill_in_two_parts_computes_what_one_part_does() -> None:
    shape = AttentionShape(32, 8, 128, 128)
    whole = attention_prefill(H800, shape, (1000, 0))
    parts = attention_prefill(H800, shape, (np.array([600, 400]), np.array([0, 600])))
    assert float(parts.flops.sum()) == pytest.approx(float(whole.flops), rel=1e-12)


def test_the_sum_of_costs_takes_the_less_certain_kind() -> None:
    experts = routed_experts(H800, V3_EXPERT, (10, 2))
    assert experts.kind == "fitted"
    both = experts + elementwise(H800, 100.0)
    assert both.kind == "analytic"
    assert float(both.bytes) == float(experts.bytes) + 100.0
