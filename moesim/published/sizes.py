"""Bytes and FLOP of a pass outside the routed experts."""

from __future__ import annotations

from traces.counting import attention_params
from traces.model import ModelSpec


def dense_params(model: ModelSpec) -> float:
    """Weights that every token multiplies with: all but routed experts and the input embedding."""
    attention = (model.n_layers - model.n_mixer_layers) * attention_params(model)
    mixers = model.n_mixer_layers * model.mixer_params
    matrices = model.dense_ffn_matrices or model.ffn_matrices
    dense = (model.n_layers - model.n_moe_layers) * matrices * model.dense_intermediate_size
    shared = model.n_moe_layers * model.ffn_matrices * model.shared_intermediate_size
    router = model.n_moe_layers * model.n_experts
    return attention + mixers + model.hidden_size * (dense + shared + router + model.vocab_size)


def kv_bytes_read(model: ModelSpec, context: float, bits: float) -> float:
    """Bytes of one sequence's cache that a decoding step reads, over all layers."""
    a = model.attention
    values = a.kv_lora_rank + a.qk_rope_dim
    if not a.kv_lora_rank:
        values = a.n_kv_heads * (a.head_dim + a.v_head_dim)
    return _seen_layers(model, context) * values * bits / 8


def attention_flop(model: ModelSpec, tokens: float, seen: float, absorbed: bool) -> float:
    """FLOP of scores and values of `tokens` queries that see `seen` keys each on average.

    absorbed  latent attention multiplies with keys and values at their latent width
    """
    a = model.attention
    width = a.head_dim + a.v_head_dim
    if a.kv_lora_rank and absorbed:
        width = 2 * a.kv_lora_rank + a.qk_rope_dim
    return 2.0 * tokens * _seen_layers(model, seen) * a.n_heads * width


def _seen_layers(model: ModelSpec, context: float) -> float:
    """Cached tokens that a query sees, summed over layers."""
    a = model.attention
    window = min(context, a.sliding_window or context)
    return (model.kv_layers - a.n_sliding_layers) * context + a.n_sliding_layers * window
