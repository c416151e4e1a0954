"""Hybrid models: which layers attend, and what stands in place of attention in the others."""

from __future__ import annotations

from typing import Literal

from traces.config_keys import ConfigKeys
from traces.errors import TraceError
from traces.model import Attention

LayerKind = Literal["full", "sliding", "mixer"]

_KINDS: dict[object, LayerKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "mixer",
    "mamba": "mixer",
    0: "mixer",  # MiniMax: attn_type_list
    1: "full",
}


def layer_kinds(keys: ConfigKeys, n_layers: int) -> list[LayerKind]:
    """Kind of each layer, by list or by rule; "sliding" includes Llama 4's chunks."""
    if keys.has("linear_attn_config"):
        raise keys.error("linear_attn_config", "delta attention of this kind is not modelled")
    for key in ("layer_types", "layers_block_type", "attn_type_list"):
        if keys.has(key):
            return [_kind(keys, key, entry) for entry in keys.entries(key, n_layers)]
    if keys.has("attn_layer_period"):  # Jamba
        period = keys.need("attn_layer_period")
        offset = keys.number("attn_layer_offset", default=0) % period
        return ["full" if i % period == offset else "mixer" for i in range(n_layers)]
    if keys.has("full_attention_interval"):  # Qwen3-Next
        period = keys.need("full_attention_interval")
        return ["full" if (i + 1) % period == 0 else "mixer" for i in range(n_layers)]
    return _windowed(keys, n_layers)


def _kind(keys: ConfigKeys, key: str, entry: object) -> LayerKind:
    if isinstance(entry, (str, int)) and entry in _KINDS:
        return _KINDS[entry]
    known = ", ".join(str(kind) for kind in _KINDS)
    raise keys.error(key, f"entry {entry!r} is not among the known: {known}")


def _windowed(keys: ConfigKeys, n_layers: int) -> list[LayerKind]:
    """All layers attend; some only within a window or chunk."""
    if keys.optional("attention_chunk_size"):  # Llama 4: layers without rotary embedding see all
        period = keys.number("no_rope_layer_interval", default=4)
        return ["full" if (i + 1) % max(1, period) == 0 else "sliding" for i in range(n_layers)]
    if not keys.optional("sliding_window") or not keys.flag("use_sliding_window", True):
        return ["full"] * n_layers
    if keys.text("model_type") == "gpt_oss":  # every other layer, the first one included
        return ["full" if i % 2 else "sliding" for i in range(n_layers)]
    n_full = keys.number("max_window_layers", default=0)  # Qwen: the layers below see all
    return ["full" if i < n_full else "sliding" for i in range(n_layers)]


def mixer_params(keys: ConfigKeys, attention: Attention, hidden: int) -> int:
    """Parameters of one layer's token mixer.

    source  gated DeltaNet: Qwen3-Next; Mamba-1: Jamba; Mamba-2: Granite-4; lightning attention:
            MiniMax-01 (arXiv 2501.08313): query, key, value, gate and output of all heads
    """
    if keys.has("linear_num_value_heads"):
        return _delta_net(keys, hidden)
    if keys.has("mamba_n_heads"):
        return _mamba2(keys, hidden)
    if keys.has("mamba_d_state"):
        return _mamba1(keys, hidden)
    if keys.text("model_type").startswith("minimax") or keys.has("attn_type_list"):
        return 5 * hidden * attention.n_heads * attention.head_dim
    raise TraceError(
        f"model {keys.name}: config has no linear_num_value_heads or mamba_d_state, so the size of"
        " its layers without attention is not known"
    )


def _delta_net(keys: ConfigKeys, hidden: int) -> int:
    n_values = keys.need("linear_num_value_heads")
    key_width = keys.need("linear_num_key_heads") * keys.need("linear_key_head_dim")
    value_width = n_values * keys.need("linear_value_head_dim")
    convolved = 2 * key_width + value_width
    project = hidden * (convolved + value_width + 2 * n_values)  # q, k, v, z, then b and a
    return (
        project
        + convolved * keys.number("linear_conv_kernel_dim", default=4)
        + value_width * hidden
    )


def _mamba1(keys: ConfigKeys, hidden: int) -> int:
    inner = keys.number("mamba_expand", default=2) * hidden
    state, rank = keys.need("mamba_d_state"), keys.need("mamba_dt_rank")
    convolution = inner * keys.number("mamba_d_conv", default=4)
    step = inner * (rank + 2 * state) + rank * inner
    return 3 * hidden * inner + convolution + step + inner * state + inner


def _mamba2(keys: ConfigKeys, hidden: int) -> int:
    n_heads = keys.need("mamba_n_heads")
    inner = n_heads * keys.need("mamba_d_head")
    convolved = inner + 2 * keys.number("mamba_n_groups", default=1) * keys.need("mamba_d_state")
    convolution = convolved * keys.number("mamba_d_conv", default=4)
    return hidden * (inner + convolved + n_heads) + convolution + inner * hidden
