"""Shapes read from config.json files of many families.

The configs hold only the keys that bear on the shape. Full-size ones must give the very shape that
the catalogue holds, which was written from a table and not through this reader.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces.counting import total_params
from traces.errors import TraceError
from traces.huggingface import model_from_config, read_config
from traces.model import ModelSpec
from traces.models import load_model

Config = dict[str, object]


def decoder(n_layers: int, hidden: int, heads: int, kv_heads: int, vocab: int) -> Config:
    return {
        "num_hidden_layers": n_layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


def deepseek(experts: int, top_k: int, width: int, shared: int, first: int) -> Config:
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "n_shared_experts": shared,
        "first_k_dense_replace": first,
        "moe_layer_freq": 1,
    }


def latent(query_rank: int | None) -> Config:
    return {
        "q_lora_rank": query_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }


def qwen(experts: int, top_k: int, width: int) -> Config:
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": 32768,
    }


def local(experts: int, top_k: int, width: int) -> Config:
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "intermediate_size": width,
    }


FULL_SIZE: dict[str, Config] = {
    "mixtral-8x7b": decoder(32, 4096, 32, 8, 32000)
    | local(8, 2, 14336)
    | {"model_type": "mixtral", "sliding_window": None},
    "deepseek-moe-16b": decoder(28, 2048, 16, 16, 102400)
    | deepseek(64, 6, 1408, 2, 1)
    | {"model_type": "deepseek", "intermediate_size": 10944, "norm_topk_prob": False},
    "deepseek-v2-lite": decoder(27, 2048, 16, 16, 102400)
    | deepseek(64, 6, 1408, 2, 1)
    | latent(None)
    | {"model_type": "deepseek_v2", "intermediate_size": 10944, "n_group": 1, "topk_group": 1},
    "deepseek-v2": decoder(60, 5120, 128, 128, 102400)
    | deepseek(160, 6, 1536, 2, 1)
    | latent(1536)
    | {"model_type": "deepseek_v2", "intermediate_size": 12288, "n_group": 8, "topk_group": 3},
    "deepseek-v3": decoder(61, 7168, 128, 128, 129280)
    | deepseek(256, 8, 2048, 1, 3)
    | latent(1536)
    | {"model_type": "deepseek_v3", "intermediate_size": 18432, "n_group": 8, "topk_group": 4}
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1},
    "kimi-k2": decoder(61, 7168, 64, 64, 163840)
    | deepseek(384, 8, 2048, 1, 1)
    | latent(1536)
    | {"model_type": "kimi_k2", "intermediate_size": 18432, "n_group": 1, "topk_group": 1},
    "glm-5": decoder(78, 6144, 64, 64, 154880)
    | deepseek(256, 8, 2048, 1, 3)
    | latent(2048)
    | {"model_type": "glm_moe_dsa", "intermediate_size": 12288}
    | {"qk_nope_head_dim": 192, "v_head_dim": 256, "index_topk": 2048},
    "glm-4.5": decoder(92, 5120, 96, 8, 151552)
    | deepseek(160, 8, 1536, 1, 3)
    | {"model_type": "glm4_moe", "intermediate_size": 12288, "head_dim": 128, "n_group": 1},
    "qwen1.5-moe-a2.7b": decoder(24, 2048, 16, 16, 151936)
    | qwen(60, 4, 1408)
    | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 5632}
    | {"intermediate_size": 5632},
    "qwen3-30b-a3b": decoder(48, 2048, 32, 4, 151936)
    | qwen(128, 8, 768)
    | {"model_type": "qwen3_moe", "head_dim": 128, "norm_topk_prob": True}
    | {"intermediate_size": 6144},
    "qwen3-next-80b-a3b": decoder(48, 2048, 16, 2, 151936)
    | qwen(512, 10, 512)
    | {"model_type": "qwen3_next", "head_dim": 256, "shared_expert_intermediate_size": 512}
    | {"full_attention_interval": 4, "norm_topk_prob": True, "linear_conv_kernel_dim": 4}
    | {"linear_num_key_heads": 16, "linear_key_head_dim": 128}
    | {"linear_num_value_heads": 32, "linear_value_head_dim": 128},
    "gpt-oss-20b": decoder(24, 2880, 64, 8, 201088)
    | local(32, 4, 2880)
    | {"model_type": "gpt_oss", "head_dim": 64, "sliding_window": 128}
    | {"layer_types": ["sliding_attention", "full_attention"] * 12},
    "olmoe-1b-7b": decoder(16, 2048, 16, 16, 50304)
    | {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8}
    | {"intermediate_size": 1024, "norm_topk_prob": False},
    "granite-3.0-1b-a400m": decoder(24, 1024, 16, 8, 49155)
    | local(32, 8, 512)
    | {"model_type": "granitemoe", "tie_word_embeddings": True},
    "minimax-m2": decoder(62, 3072, 48, 8, 200064)
    | local(256, 8, 1536)
    | {"model_type": "minimax_m2", "head_dim": 128, "scoring_func": "sigmoid"}
    | {"use_routing_bias": True, "shared_intermediate_size": 0, "attn_type_list": [1] * 62},
    "minimax-m1": decoder(80, 6144, 64, 8, 200064)
    | local(32, 2, 9216)
    | {"model_type": "minimax_m1", "head_dim": 128, "shared_intermediate_size": 0}
    | {"attn_type_list": ([0] * 7 + [1]) * 10},
    "llama-4-maverick": {
        "model_type": "llama4",
        "vision_config": {"hidden_size": 1408, "num_hidden_layers": 34},
        "text_config": decoder(48, 5120, 40, 8, 202048)
        | local(128, 1, 8192)
        | {"model_type": "llama4_text", "head_dim": 128, "intermediate_size_mlp": 16384}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 8192},
    },
    "dbrx": {
        "model_type": "dbrx",
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "vocab_size": 100352,
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        "attn_config": {"kv_n_heads": 8, "clip_qkv": 8},
    },
    "jamba-v0.1": decoder(32, 4096, 32, 8, 65536)
    | {"model_type": "jamba", "num_experts": 16, "num_experts_per_tok": 2}
    | {"intermediate_size": 14336, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"attn_layer_period": 8, "attn_layer_offset": 4, "mamba_expand": 2, "mamba_d_conv": 4}
    | {"mamba_d_state": 16, "mamba_dt_rank": 256},
    "jetmoe-8b": decoder(24, 2048, 32, 16, 32000)
    | {"model_type": "jetmoe", "kv_channels": 128, "ffn_hidden_size": 5632}
    | {"moe_num_experts": 8, "moe_top_k": 2, "tie_word_embeddings": True, "glu": True},
    "hunyuan-a13b": decoder(32, 4096, 32, 8, 128167)
    | {"model_type": "hunyuan_v1_moe", "attention_head_dim": 128, "num_experts": 64}
    | {"moe_topk": [8] * 32, "num_shared_expert": [1] * 32}
    | {"moe_intermediate_size": [3072] * 32, "intermediate_size": 3072},
    "ernie-4.5-21b-a3b": decoder(28, 2560, 20, 4, 103424)
    | {"model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 6}
    | {"moe_num_shared_experts": 2, "moe_intermediate_size": 1536, "intermediate_size": 12288}
    | {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}
    | {"tie_word_embeddings": True},
    "switch-base-8": {
        "model_type": "switch_transformers",
        "is_encoder_decoder": True,
        "d_model": 768,
        "d_ff": 3072,
        "d_kv": 64,
        "num_heads": 12,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_sparse_encoder_layers": 6,
        "num_sparse_decoder_layers": 6,
        "num_experts": 8,
        "vocab_size": 32128,
    },
    "nllb-moe-54b": {
        "model_type": "nllb-moe",
        "is_encoder_decoder": True,
        "d_model": 2048,
        "encoder_layers": 24,
        "decoder_layers": 24,
        "encoder_sparse_step": 4,
        "decoder_sparse_step": 4,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 8192,
        "num_experts": 128,
        "num_hidden_layers": 24,
        "vocab_size": 256206,
    },
    "ling-mini-2.0": decoder(20, 2048, 16, 4, 157184)
    | {"model_type": "bailing_moe", "num_experts": 256, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 512, "num_shared_experts": 1, "first_k_dense_replace": 1}
    | {"intermediate_size": 5120, "n_group": 8, "topk_group": 4, "head_dim": 128}
    | {"score_function": "sigmoid", "moe_router_enable_expert_bias": True},
}


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_a_published_config_gives_the_shape_that_the_catalogue_holds(name: str) -> None:
    assert model_from_config(FULL_SIZE[name], name) == load_model(name)


# Published after the catalogue was made; the totals are in their names.
NEWER: dict[str, tuple[float, Config]] = {
    "qwen3.5-397b-a17b": (
        397e9,
        {
            "model_type": "qwen3_5_moe",
            "tie_word_embeddings": False,
            "vision_config": {"hidden_size": 1152, "num_heads": 16},
            "text_config": decoder(60, 4096, 32, 2, 248320)
            | {"model_type": "qwen3_5_moe_text", "head_dim": 256, "attn_output_gate": True}
            | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15}
            | {"linear_num_key_heads": 16, "linear_key_head_dim": 128}
            | {"linear_num_value_heads": 64, "linear_value_head_dim": 128}
            | {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024}
            | {"shared_expert_intermediate_size": 1024, "mlp_only_layers": []},
        },
    ),
    "glm-4.7-flash-30b": (
        30e9,
        decoder(47, 2048, 20, 20, 154880)
        | deepseek(64, 4, 1536, 1, 1)
        | latent(768)
        | {"model_type": "glm4_moe_lite", "head_dim": 64, "intermediate_size": 10240}
        | {"qk_nope_head_dim": 192, "v_head_dim": 256},
    ),
}


@pytest.mark.parametrize("name", sorted(NEWER))
def test_a_model_outside_the_catalogue_gives_its_published_total(name: str) -> None:
    published, config = NEWER[name]
    assert total_params(model_from_config(config, name)) == pytest.approx(published, rel=0.02)


def small(**changes: object) -> Config:
    return decoder(4, 64, 4, 2, 100) | local(8, 2, 32) | changes


def read(**changes: object) -> ModelSpec:
    return model_from_config(small(**changes), "small")


def test_an_unknown_family_works_when_its_keys_are_known() -> None:
    spec = model_from_config(
        {
            "model_type": "not-published-yet",
            "n_layer": 3,
            "n_embd": 48,
            "n_head": 6,
            "vocab_size": 10,
            "moe_num_experts": 4,
            "moe_top_k": 1,
            "expert_intermediate_size": 16,
        },
        "new",
    )
    assert (spec.n_layers, spec.moe_layers, spec.hidden_size) == (3, (0, 1, 2), 48)
    assert (spec.attention.n_kv_heads, spec.attention.head_dim) == (6, 8)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("num_local_experts", "num_local_experts"),
        ("num_experts_per_tok", "num_experts_per_tok"),
        ("num_hidden_layers", "num_hidden_layers"),
        ("hidden_size", "hidden_size"),
        ("num_attention_heads", "num_attention_heads"),
        ("intermediate_size", "moe_intermediate_size"),
        ("vocab_size", "vocab_size"),
    ],
)
def test_a_missing_key_is_named(key: str, named: str) -> None:
    config = small()
    del config[key]
    with pytest.raises(TraceError, match=rf"model small: config has no .*{named}"):
        model_from_config(config, "small")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "expected at most 10000"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers='many'"),
        ({"hidden_size": -4}, "hidden_size=-4"),
        ({"hidden_size": 2**60}, "hidden_size"),
        ({"num_local_experts": True}, "num_local_experts=True"),
        ({"num_experts_per_tok": 9}, "top_k=9"),
        ({"num_experts_per_tok": [2, 2, 1, 2]}, "expected one number for all layers"),
        ({"vocab_size": 0}, "expected at least 1"),
        ({"n_group": 3}, "n_groups=3"),
        ({"layer_types": ["full_attention"]}, "one entry for each of 4 layers"),
        ({"layer_types": ["psychic"] * 4}, "'psychic' is not among the known"),
        ({"layer_types": ["linear_attention"] * 4}, "no linear_num_value_heads"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "not modelled"),
        ({"zero_expert_num": 4}, "zero_expert_num=4"),
        ({"moe_layers": [1, 7]}, r"moe_layers 1\.\.7 must lie in 0\.\.3"),
        ({"moe_layers": ["1"]}, "expected a list of whole numbers"),
        ({"moe_layers_enum": "1,x"}, "expected whole numbers"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "no layer with routed experts"),
        ({"tie_word_embeddings": "no"}, "expected true or false"),
        ({"text_config": 3}, "text_config is not an object"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_key(changes: Config, message: str) -> None:
    with pytest.raises(TraceError, match=message) as caught:
        model_from_config(small(**changes), "small")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, (1, 2)),
        ({"moe_layers": [3, 1]}, (1, 3)),
        ({"moe_layers_enum": "2,3"}, (2, 3)),
        ({"moe_layer_freq": [0, 1, 1, 1]}, (1, 2, 3)),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, (2,)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0]}, (1, 2, 3)),
        ({"interleave_moe_layer_step": 4}, (3,)),
        ({"expert_layer_period": 2, "expert_layer_offset": 0}, (0, 2)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, (1, 2)),
        ({"moe_layer_interval": 2, "moe_layer_start_index": 2}, (3,)),
    ],
)
def test_each_way_of_saying_which_layers_have_experts(
    changes: Config, expected: tuple[int, ...]
) -> None:
    assert read(**changes).moe_layers == expected


def test_dense_layers_take_the_dense_width_and_need_one() -> None:
    config = small(moe_intermediate_size=16, first_k_dense_replace=1)
    spec = model_from_config(config, "small")
    assert (spec.expert_intermediate_size, spec.dense_intermediate_size) == (16, 32)
    del config["intermediate_size"]
    with pytest.raises(TraceError, match="intermediate_size"):
        model_from_config(config, "small")


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 0),
        ({"n_shared_experts": 2}, 64),
        ({"n_shared_experts": 0}, 0),
        ({"shared_expert_intermediate_size": 96}, 96),
        ({"share_expert_dim": 40}, 40),
        ({"num_shared_expert": [1] * 4, "use_mixed_mlp_moe": False}, 0),
    ],
)
def test_shared_experts_are_one_width(changes: Config, width: int) -> None:
    assert read(**changes).shared_intermediate_size == width


@pytest.mark.parametrize(
    ("changes", "window", "n_sliding"),
    [
        ({"sliding_window": 16}, 16, 4),
        ({"sliding_window": 16, "use_sliding_window": False}, 0, 0),
        ({"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, 16, 1),
        ({"sliding_window": 16, "model_type": "gpt_oss"}, 16, 2),
        ({"sliding_window": None}, 0, 0),
        ({"attention_chunk_size": 32}, 32, 3),
        ({"layer_types": ["full_attention"] * 4, "sliding_window": 16}, 0, 0),
    ],
)
def test_windows_hold_on_the_layers_that_have_them(
    changes: Config, window: int, n_sliding: int
) -> None:
    attention = read(**changes).attention
    assert (attention.sliding_window, attention.n_sliding_layers) == (window, n_sliding)


def test_layers_without_attention_keep_no_cache() -> None:
    mamba2 = {"mamba_n_heads": 16, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
    spec = read(layer_types=["mamba", "attention", "mamba", "mamba"], **mamba2)
    assert (spec.kv_layers, spec.n_mixer_layers) == (1, 3)
    inner, convolved = 128, 128 + 2 * 4
    assert spec.mixer_params == 64 * (inner + convolved + 16) + convolved * 4 + inner * 64


@pytest.mark.parametrize(
    ("changes", "router"),
    [
        ({}, "softmax"),
        ({"norm_topk_prob": False}, "softmax-raw"),
        ({"model_type": "olmoe"}, "softmax-raw"),
        ({"model_type": "phimoe"}, "sparsemixer"),
        ({"scoring_func": "sigmoid"}, "sigmoid"),
        ({"scoring_func": "sigmoid", "topk_method": "noaux_tc"}, "sigmoid-bias"),
    ],
)
def test_routers_are_told_apart(changes: Config, router: str) -> None:
    assert read(**changes).router == router


def test_queries_may_be_wider_than_values() -> None:
    attention = read(qk_nope_dim=24, qk_rope_dim=8, v_head_dim=24).attention
    assert (attention.head_dim, attention.v_head_dim) == (32, 24)


def test_a_model_folder_and_its_config_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small()))
    assert load_model(folder) == load_model(folder / "config.json")
    assert load_model(folder / "config.json") == replace(read(), name="my-model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "holds list, expected a JSON object"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_path(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_config_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_config(tmp_path / "absent.json")


_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.floats(),
    st.text("ab1,\n", max_size=5),
    st.lists(st.integers(-1, 9), max_size=5),
    st.dictionaries(st.text("ab", max_size=3), st.integers(), max_size=2),
)
_keys = st.sampled_from(
    sorted({key for config in FULL_SIZE.values() for key in config} | {"moe_layers", "mamba"})
)


@given(st.sampled_from(sorted(FULL_SIZE)), st.dictionaries(_keys, _values, max_size=4))
def test_any_config_gives_a_model_or_one_line(name: str, changes: Config) -> None:
    message = None
    try:
        assert model_from_config(FULL_SIZE[name] | changes, name).moe_layers
    except TraceError as error:
        message = str(error)
    assert message is None or ("\n" not in message and name in message)
