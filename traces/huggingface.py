"""ModelSpec from a Hugging Face config.json, whatever family wrote it.

Families differ in key names, not in facts: each function below reads one fact from the names it
goes by. An architecture not named here works when its keys are among these; a fact without a key
is a TraceError that lists the names looked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from traces.config_keys import ConfigKeys, flatten
from traces.errors import TraceError
from traces.mixers import layer_kinds, mixer_params
from traces.model import Attention, ModelSpec

MAX_CONFIG_BYTES = 16 * 2**20

N_EXPERTS = (
    "n_routed_experts",
    "num_routed_experts",
    "num_local_experts",
    "num_experts",
    "moe_num_experts",
)
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "num_selected_experts",
    "router_topk",
    "top_k_experts",
)
N_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
HIDDEN = ("hidden_size", "d_model", "n_embd")
N_HEADS = ("num_attention_heads", "n_heads", "num_heads", "n_head")
N_KV_HEADS = ("num_key_value_heads", "kv_n_heads", "num_attention_groups")
HEAD_DIM = ("head_dim", "attention_head_dim", "kv_channels", "d_kv")
EXPERT_WIDTH = (
    "moe_intermediate_size",
    "expert_intermediate_size",
    "ffn_hidden_size",
    "intermediate_size",
)
N_SHARED = (
    "n_shared_experts",
    "num_shared_experts",
    "num_shared_expert",
    "moe_num_shared_experts",
)
SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
FIRST_MOE_LAYER = (
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
    "moe_layer_num_skipped",
)
# Scoring that the family's code fixes and its config.json does not repeat.
_FAMILY_ROUTERS = {
    "deepseek_v3": "sigmoid-bias",
    "deepseek_v32": "sigmoid-bias",
    "kimi_k2": "sigmoid-bias",
    "glm4_moe": "sigmoid-bias",
    "glm4_moe_lite": "sigmoid-bias",
    "glm_moe_dsa": "sigmoid-bias",
    "ernie4_5_moe": "softmax-bias",
    "phimoe": "sparsemixer",
    "llama4": "sigmoid",
    "llama4_text": "sigmoid",
}
# Families whose class default is norm_topk_prob=false, so that an absent key means false.
_RAW_BY_DEFAULT = ("olmoe", "qwen2_moe", "deepseek", "deepseek_v2")


def read_config(path: str | Path) -> dict[str, object]:
    """The JSON object in a config.json, or in the config.json of a model folder.

    raises  TraceError when the file is missing, over 16 MiB, not JSON or not an object
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        size = file.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise TraceError(f"{file}: {size} bytes, expected at most {MAX_CONFIG_BYTES}")
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise TraceError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TraceError(f"{file}: holds {type(config).__name__}, expected a JSON object")
    return config


def model_from_config(config: Mapping[str, object], name: str) -> ModelSpec:
    """The model that a config.json describes.

    config  the parsed JSON; a nested text_config (multimodal models) is looked into
    name    the name to give the model
    raises  TraceError naming the missing key, or the key with a value that cannot be
    """
    keys = flatten(config, name)
    if keys.optional("zero_expert_num"):
        raise keys.error("zero_expert_num", "experts that compute nothing are not modelled")
    if keys.flag("is_encoder_decoder") or keys.has("num_decoder_layers"):
        spec = _encoder_decoder(keys)
    else:
        spec = _decoder(keys)
    if not spec.moe_layers:
        raise TraceError(f"model {name}: config leaves no layer with routed experts")
    return spec


def _decoder(keys: ConfigKeys) -> ModelSpec:
    n_layers = keys.layers(*N_LAYERS)
    moe_layers = _moe_layers(keys, n_layers)
    kinds = layer_kinds(keys, n_layers)
    n_mixers = kinds.count("mixer")
    attention = _attention(keys, kinds.count("sliding"))
    return ModelSpec(
        name=keys.name,
        n_layers=n_layers,
        moe_layers=moe_layers,
        hidden_size=keys.need(*HIDDEN),
        attention=attention,
        n_experts=keys.need(*N_EXPERTS),
        top_k=keys.need(*TOP_K),
        expert_intermediate_size=keys.need(*EXPERT_WIDTH),
        shared_intermediate_size=_shared_width(keys),
        dense_intermediate_size=_dense_width(keys) if len(moe_layers) < n_layers else 0,
        vocab_size=keys.need("vocab_size"),
        kv_layers=n_layers - n_mixers,
        ffn_matrices=_ffn_matrices(keys),
        n_groups=max(1, keys.number("n_group", "num_expert_group", default=1)),
        topk_groups=max(1, keys.number("topk_group", default=1)),
        router=_router(keys),
        tied_embeddings=keys.flag("tie_word_embeddings", default=_family(keys) == "jetmoe"),
        mixer_params=mixer_params(keys, attention, keys.need(*HIDDEN)) if n_mixers else 0,
        n_mixer_layers=n_mixers,
    )


def _family(keys: ConfigKeys) -> str:
    return keys.text("model_type").lower()


def _attention(keys: ConfigKeys, n_sliding: int) -> Attention:
    if keys.optional("kv_lora_rank"):
        return _latent_attention(keys)
    n_heads = keys.need(*N_HEADS)
    nope = keys.number("qk_nope_head_dim", "qk_nope_dim", default=0)
    rope = keys.number("qk_rope_head_dim", "qk_rope_dim", default=0)
    head_dim = nope + rope or keys.optional(*HEAD_DIM) or keys.need(*HIDDEN) // n_heads
    mixture = _family(keys) == "jetmoe"
    window = keys.number("sliding_window", "attention_chunk_size", default=0) if n_sliding else 0
    return Attention(
        n_heads=n_heads,
        n_kv_heads=keys.number(*N_KV_HEADS, default=n_heads),
        head_dim=head_dim,
        v_head_dim=keys.number("v_head_dim", default=head_dim),
        sliding_window=window,
        n_sliding_layers=n_sliding if window else 0,
        output_gate=keys.flag("attn_output_gate", default=_family(keys) == "qwen3_next"),
        n_experts=keys.need(*N_EXPERTS) if mixture else 1,
        top_k=keys.need(*TOP_K) if mixture else 1,
    )


def _latent_attention(keys: ConfigKeys) -> Attention:
    n_heads = keys.need(*N_HEADS)
    nope, rope = keys.need("qk_nope_head_dim"), keys.need("qk_rope_head_dim")
    return Attention(
        n_heads=n_heads,
        n_kv_heads=keys.number(*N_KV_HEADS, default=n_heads),
        head_dim=nope + rope,
        v_head_dim=keys.need("v_head_dim"),
        q_lora_rank=keys.number("q_lora_rank", default=0),
        kv_lora_rank=keys.need("kv_lora_rank"),
        qk_nope_dim=nope,
        qk_rope_dim=rope,
    )


def _moe_layers(keys: ConfigKeys, n_layers: int) -> tuple[int, ...]:
    """Absolute indices of the layers with routed experts, by list or by rule."""
    if keys.has("mlp_layer_types"):
        kinds = keys.entries("mlp_layer_types", n_layers)
        return tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
    if keys.has("moe_layers"):
        return tuple(sorted(set(keys.wholes("moe_layers"))))
    if keys.has("moe_layers_enum"):
        return _enumerated_layers(keys)
    if isinstance(keys.values.get("moe_layer_freq"), list):
        return tuple(i for i, used in enumerate(keys.entries("moe_layer_freq", n_layers)) if used)
    first = keys.number(*FIRST_MOE_LAYER, default=0)
    last = n_layers - 1
    if keys.has("moe_layer_end_index") and keys.values["moe_layer_end_index"] != -1:
        last = keys.need("moe_layer_end_index")
    period, offset = _moe_rhythm(keys)
    dense = set(keys.wholes("mlp_only_layers"))
    return tuple(
        i for i in range(n_layers) if first <= i <= last and i % period == offset and i not in dense
    )


def _enumerated_layers(keys: ConfigKeys) -> tuple[int, ...]:
    """Step-3 writes the layers as text: "4,5,6"."""
    parts = [part.strip() for part in keys.text("moe_layers_enum").split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts):
        raise keys.error("moe_layers_enum", "expected whole numbers with commas between them")
    return tuple(sorted({int(part) for part in parts}))


def _moe_rhythm(keys: ConfigKeys) -> tuple[int, int]:
    """(period, offset): a layer has experts when its index modulo period is the offset."""
    if keys.has("expert_layer_period"):  # Jamba
        period = keys.need("expert_layer_period")
        return period, keys.number("expert_layer_offset", default=0) % period
    for key in ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"):
        if keys.optional(key):  # Qwen, Llama 4, ERNIE: every period-th layer, counted from one
            period = keys.need(key)
            return period, period - 1
    return max(1, keys.number("moe_layer_freq", default=1)), 0  # DeepSeek


def _shared_width(keys: ConfigKeys) -> int:
    """Width of all shared experts of a layer together."""
    if not keys.flag("use_mixed_mlp_moe", True):  # Hunyuan
        return 0
    count = keys.optional(*N_SHARED)
    if count is not None:
        return count * keys.need(*EXPERT_WIDTH)
    if keys.has("interleave_moe_layer_step"):  # Llama 4 has one, without a key
        return keys.need(*EXPERT_WIDTH)
    return keys.number(*SHARED_WIDTH, default=0)


def _dense_width(keys: ConfigKeys) -> int:
    return keys.need("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size")


def _ffn_matrices(keys: ConfigKeys) -> int:
    """3 with a gate projection; 2 where a key says that there is none."""
    gated = keys.flag("glu", True) and keys.flag("mlp_gated", True)
    return 3 if gated and keys.text("mlp_hidden_act") != "relu2" else 2


def _router(keys: ConfigKeys) -> str:
    """One of models.ROUTERS."""
    family = _family(keys)
    if family in _FAMILY_ROUTERS:
        return _FAMILY_ROUTERS[family]
    bias = (
        keys.text("topk_method") == "noaux_tc"
        or keys.flag("use_routing_bias")
        or keys.flag("moe_router_enable_expert_bias")
    )
    if "sigmoid" in keys.text("scoring_func", "score_function", "moe_router_activation_func"):
        return "sigmoid-bias" if bias else "sigmoid"
    renormalised = keys.flag("norm_topk_prob", default=family not in _RAW_BY_DEFAULT)
    return "softmax" if renormalised else "softmax-raw"


def _encoder_decoder(keys: ConfigKeys) -> ModelSpec:
    """Switch Transformers and NLLB-MoE: encoder layers first, then decoder layers."""
    n_encoder = keys.layers("encoder_layers", "num_layers")
    n_decoder = keys.layers("decoder_layers", "num_decoder_layers", "num_layers")
    n_heads = keys.need("num_heads", "encoder_attention_heads")
    hidden = keys.need(*HIDDEN)
    head_dim = keys.optional(*HEAD_DIM) or hidden // n_heads
    width = keys.need("d_ff", "encoder_ffn_dim")
    encoder = _sparse_half(keys, "encoder", n_encoder)
    decoder = tuple(n_encoder + i for i in _sparse_half(keys, "decoder", n_decoder))
    return ModelSpec(
        name=keys.name,
        n_layers=n_encoder + n_decoder,
        moe_layers=encoder + decoder,
        hidden_size=hidden,
        attention=Attention(n_heads, n_heads, head_dim, head_dim),
        n_experts=keys.need(*N_EXPERTS),
        top_k=keys.number(*TOP_K, default=1 if keys.has("d_ff") else 2),  # Switch, NLLB
        expert_intermediate_size=width,
        shared_intermediate_size=0,
        dense_intermediate_size=width if len(encoder + decoder) < n_encoder + n_decoder else 0,
        vocab_size=keys.need("vocab_size"),
        kv_layers=n_decoder,
        ffn_matrices=3 if keys.flag("is_gated_act") else 2,
        router="softmax-raw" if keys.has("d_ff") else "softmax",  # Switch, NLLB
        tied_embeddings=keys.flag("tie_word_embeddings", default=True),
        n_encoder_layers=n_encoder,
    )


def _sparse_half(keys: ConfigKeys, half: str, n_layers: int) -> tuple[int, ...]:
    """Sparse layers of one half; Switch counts from layer 1, NLLB to every step-th layer."""
    step = keys.optional(f"{half}_sparse_step")
    if step is None:
        n_sparse = keys.need(f"num_sparse_{half}_layers")
        step = max(1, n_layers // n_sparse)
    if step == 0:
        return ()
    offset = 1 % step if keys.has("d_ff") else step - 1
    return tuple(i for i in range(n_layers) if i % step == offset)
