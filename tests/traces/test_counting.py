"""Counts of a model against a list of its weight matrices, and the laws they obey."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from traces.counting import (
    active_params,
    attention_params,
    expert_bytes,
    expert_share,
    kv_bytes,
    kv_bytes_per_token,
    total_params,
)
from traces.model import Attention, ModelSpec

Matrix = tuple[int, int]


def grouped(heads: int = 4, kv_heads: int = 2, width: int = 8) -> Attention:
    return Attention(heads, kv_heads, width, width)


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    size = st.integers(1, 16)
    if draw(st.booleans()):
        return Attention(draw(size), draw(size), draw(size), draw(size))
    nope, rope = draw(size), draw(size)
    return Attention(
        n_heads=draw(size),
        n_kv_heads=1,
        head_dim=nope + rope,
        v_head_dim=draw(size),
        q_lora_rank=draw(st.integers(0, 8)),
        kv_lora_rank=draw(size),
        qk_nope_dim=nope,
        qk_rope_dim=rope,
    )


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    n_layers = draw(st.integers(1, 6))
    moe_layers = tuple(sorted(draw(st.sets(st.integers(0, n_layers - 1), min_size=1))))
    n_experts = draw(st.integers(1, 8))
    size = st.integers(1, 32)
    return ModelSpec(
        name="drawn",
        n_layers=n_layers,
        moe_layers=moe_layers,
        hidden_size=draw(size),
        attention=draw(attentions()),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        expert_intermediate_size=draw(size),
        shared_intermediate_size=draw(st.integers(0, 32)),
        dense_intermediate_size=draw(st.integers(0, 32)),
        vocab_size=draw(size),
        kv_layers=n_layers,
        ffn_matrices=draw(st.sampled_from([2, 3])),
        tied_embeddings=draw(st.booleans()),
    )


def attention_matrices(spec: ModelSpec) -> list[Matrix]:
    a, hidden = spec.attention, spec.hidden_size
    if not a.kv_lora_rank:
        return [
            (hidden, a.n_heads * a.head_dim),
            (hidden, a.n_kv_heads * a.head_dim),
            (hidden, a.n_kv_heads * a.v_head_dim),
            (a.n_heads * a.v_head_dim, hidden),
        ]
    query = [(hidden, a.n_heads * a.head_dim)]
    if a.q_lora_rank:
        query = [(hidden, a.q_lora_rank), (a.q_lora_rank, a.n_heads * a.head_dim)]
    return [
        *query,
        (hidden, a.kv_lora_rank),
        (hidden, a.qk_rope_dim),
        (a.kv_lora_rank, a.n_heads * a.qk_nope_dim),
        (a.kv_lora_rank, a.n_heads * a.v_head_dim),
        (a.n_heads * a.v_head_dim, hidden),
    ]


def layer_matrices(spec: ModelSpec, layer: int, experts: int) -> list[Matrix]:
    """Every weight matrix of a decoder layer, with `experts` of its routed experts."""
    hidden = spec.hidden_size
    matrices = attention_matrices(spec)
    if layer not in spec.moe_layers:
        return matrices + [(hidden, spec.dense_intermediate_size)] * spec.ffn_matrices
    matrices.append((hidden, spec.n_experts))
    matrices += [(hidden, spec.shared_intermediate_size)] * spec.ffn_matrices
    return matrices + [(hidden, spec.expert_intermediate_size)] * spec.ffn_matrices * experts


def listed_params(spec: ModelSpec, experts: int, embeddings: int) -> int:
    matrices = [m for i in range(spec.n_layers) for m in layer_matrices(spec, i, experts)]
    matrices += [(spec.vocab_size, spec.hidden_size)] * embeddings
    return sum(rows * columns for rows, columns in matrices)


@given(specs())
def test_totals_are_the_sum_over_every_weight_matrix(spec: ModelSpec) -> None:
    assert attention_params(spec) == sum(r * c for r, c in attention_matrices(spec))
    embeddings = 1 if spec.tied_embeddings else 2
    assert total_params(spec) == listed_params(spec, spec.n_experts, embeddings)
    assert active_params(spec) == listed_params(spec, spec.top_k, 1)


@given(specs())
def test_a_token_never_uses_more_than_the_model_has(spec: ModelSpec) -> None:
    assert active_params(spec) <= total_params(spec)
    assert 0 < expert_share(spec) < 1


@given(specs(), st.floats(0.5, 16), st.floats(0.5, 16))
def test_more_bits_never_make_an_expert_smaller(spec: ModelSpec, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert expert_bytes(spec, low) <= expert_bytes(spec, high)
    assert expert_bytes(spec, 16) == 2 * spec.expert_params


@given(specs(), st.integers(0, 500), st.integers(1, 500), st.integers(0, 6))
def test_a_window_caps_the_cache_and_changes_nothing_before_it_is_full(
    spec: ModelSpec, n_tokens: int, window: int, n_sliding: int
) -> None:
    sliding = min(n_sliding, spec.n_layers)
    attention = replace(spec.attention, sliding_window=window, n_sliding_layers=sliding)
    windowed = replace(spec, attention=attention)
    uncapped = n_tokens * kv_bytes_per_token(spec)
    assert kv_bytes(spec, n_tokens) == uncapped
    assert kv_bytes(windowed, n_tokens) <= uncapped
    if n_tokens <= window:
        assert kv_bytes(windowed, n_tokens) == uncapped
    else:
        growth = kv_bytes(windowed, n_tokens + 1) - kv_bytes(windowed, n_tokens)
        full = spec.n_layers - sliding
        assert growth * spec.n_layers == kv_bytes_per_token(spec) * full


def small_spec(**changes: object) -> ModelSpec:
    spec = ModelSpec("small", 4, (1, 3), 16, grouped(), 4, 2, 8, 0, 12, 10, 4)
    return replace(spec, **changes)  # type: ignore[arg-type]


def test_decoder_layers_of_an_encoder_decoder_model_have_a_second_attention() -> None:
    plain, both = small_spec(), small_spec(n_encoder_layers=1)
    assert total_params(both) - total_params(plain) == 3 * attention_params(plain)


def test_layers_with_another_mixer_count_it_in_place_of_attention() -> None:
    plain, hybrid = small_spec(), small_spec(mixer_params=1000, n_mixer_layers=3)
    assert total_params(hybrid) - total_params(plain) == 3 * (1000 - attention_params(plain))


def test_a_mixture_of_attention_holds_all_its_experts_and_uses_the_chosen() -> None:
    plain = small_spec()
    mixture = small_spec(attention=replace(grouped(), n_experts=8, top_k=2))
    router = 16 * 8
    query_and_output = 2 * 16 * 4 * 8
    keys_and_values = 2 * 16 * 2 * 8
    assert attention_params(mixture) == 4 * query_and_output + keys_and_values + router
    assert active_params(mixture) == active_params(plain) + 4 * router


def test_an_output_gate_adds_one_matrix_as_wide_as_the_queries() -> None:
    gated = small_spec(attention=replace(grouped(), output_gate=True))
    assert attention_params(gated) - attention_params(small_spec()) == 16 * 4 * 8


def test_dense_layers_may_have_another_number_of_matrices_than_experts() -> None:
    two = small_spec(ffn_matrices=2)
    assert (
        total_params(replace(two, dense_ffn_matrices=3)) - total_params(two) == 2 * 16 * 12
    )  # one more matrix in each of the two dense layers
