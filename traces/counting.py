"""Counts that follow from a model's shape: parameters, expert bytes, KV bytes.

Norms, biases and router corrections are left out: together they are below 0.1 % of any model in
the catalogue. Extra prediction heads (DeepSeek-V3's multi-token layer) and vision towers are not
counted either, as in the published totals that the tests compare with.
"""

from __future__ import annotations

import math

from traces.model import Attention, ModelSpec


def attention_params(spec: ModelSpec) -> int:
    """Parameters of one self-attention layer.

    source  query, key, value and output projections; latent attention: the low-rank pairs of
            DeepSeek-V2 (arXiv 2405.04434, section 2.1); a mixture of query and output
            projections holds all its experts (JetMoE, arXiv 2404.07413)
    """
    return _attention_params(spec, spec.attention.n_experts)


def _attention_params(spec: ModelSpec, n_experts: int) -> int:
    """One attention layer with n_experts of its query and output experts, if it is a mixture."""
    attention, hidden = spec.attention, spec.hidden_size
    if attention.kv_lora_rank:
        return _latent_params(attention, hidden)
    router = hidden * attention.n_experts if attention.n_experts > 1 else 0
    return _grouped_params(attention, hidden, n_experts) + router


def _latent_params(a: Attention, hidden: int) -> int:
    query_width = a.n_heads * (a.qk_nope_dim + a.qk_rope_dim)
    query = hidden * query_width
    if a.q_lora_rank:
        query = hidden * a.q_lora_rank + a.q_lora_rank * query_width
    down = hidden * (a.kv_lora_rank + a.qk_rope_dim)
    up = a.kv_lora_rank * a.n_heads * (a.qk_nope_dim + a.v_head_dim)
    return query + down + up + a.n_heads * a.v_head_dim * hidden


def _grouped_params(a: Attention, hidden: int, n_experts: int) -> int:
    query = hidden * a.n_heads * a.head_dim * (2 if a.output_gate else 1)
    output = a.n_heads * a.v_head_dim * hidden
    keys_values = hidden * a.n_kv_heads * (a.head_dim + a.v_head_dim)
    return (query + output) * n_experts // a.top_k + keys_values


def _common_params(spec: ModelSpec, attention: int) -> int:
    """Everything but embeddings and routed experts, with `attention` parameters a layer."""
    cross_layers = spec.n_layers - spec.n_encoder_layers if spec.n_encoder_layers else 0
    attention_layers = spec.n_layers - spec.n_mixer_layers + cross_layers
    hidden = spec.hidden_size
    matrices = spec.dense_ffn_matrices or spec.ffn_matrices
    dense = (spec.n_layers - spec.n_moe_layers) * matrices * hidden * spec.dense_intermediate_size
    shared = spec.ffn_matrices * hidden * spec.shared_intermediate_size
    router = hidden * spec.n_experts
    return (
        attention_layers * attention
        + spec.n_mixer_layers * spec.mixer_params
        + dense
        + spec.n_moe_layers * (shared + router)
    )


def total_params(spec: ModelSpec) -> int:
    """All parameters: attention, dense layers, shared and routed experts, routers, embeddings.

    Decoder layers of an encoder-decoder model have a second, cross-attention; the output head
    is counted beside the input embedding unless they are tied.
    """
    experts = spec.n_moe_layers * spec.n_experts * spec.expert_params
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tied_embeddings else 2)
    return _common_params(spec, attention_params(spec)) + experts + embeddings


def active_params(spec: ModelSpec) -> int:
    """Parameters that one token multiplies with: top_k experts, and the output head once.

    The input embedding is a look-up and is not counted. With a router that chooses a varying
    number of experts (ReLU routing) top_k is the most a token may take, and this is an upper bound.
    """
    experts = spec.n_moe_layers * spec.top_k * spec.expert_params
    head = spec.vocab_size * spec.hidden_size
    return _common_params(spec, _attention_params(spec, spec.attention.top_k)) + experts + head


def expert_share(spec: ModelSpec) -> float:
    """Share of all parameters that sits in routed experts, 0..1 (shared experts excluded)."""
    return spec.n_moe_layers * spec.n_experts * spec.expert_params / total_params(spec)


def expert_bytes(spec: ModelSpec, bits: float = 16) -> int:
    """Bytes of one routed expert at `bits` per weight, rounded up.

    Scales and zero points count as fractions of a bit: 4 bits with one 16-bit scale per 128
    weights is 4.125.
    """
    return math.ceil(spec.expert_params * bits / 8)


def kv_bytes_per_token(spec: ModelSpec, bytes_per_value: float = 2) -> int:
    """KV bytes that one more token adds over all layers, sliding windows not yet full.

    Latent attention keeps kv_lora_rank + qk_rope_dim values a layer, grouped-query attention
    n_kv_heads * (head_dim + v_head_dim). Layers without a cache (kv_layers < n_layers) add none;
    encoder-decoder models: decoder self-attention only, cross-attention is paid once a request.
    """
    return math.ceil(spec.kv_layers * _kv_values(spec.attention) * bytes_per_value)


def kv_bytes(spec: ModelSpec, n_tokens: int, bytes_per_value: float = 2) -> int:
    """KV bytes of one request of n_tokens; layers with a sliding window keep at most the window."""
    attention = spec.attention
    kept_tokens = spec.kv_layers * n_tokens
    if attention.sliding_window:
        beyond = max(0, n_tokens - attention.sliding_window)
        kept_tokens -= attention.n_sliding_layers * beyond
    return math.ceil(kept_tokens * _kv_values(attention) * bytes_per_value)


def _kv_values(a: Attention) -> int:
    if a.kv_lora_rank:
        return a.kv_lora_rank + a.qk_rope_dim
    return a.n_kv_heads * (a.head_dim + a.v_head_dim)
