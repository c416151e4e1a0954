"""Families of Mixture-of-Experts models, tiny and random: hidden 32, 8 experts, top 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

N_EXPERTS, TOP_K, VOCABULARY = 8, 2, 64
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": TOP_K,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "n_routed_experts": N_EXPERTS,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mixtral": {"num_local_experts": N_EXPERTS},
        "qwen3_moe": {
            "num_experts": N_EXPERTS,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "mlp_only_layers": [1],
        },
        "olmoe": {"num_experts": N_EXPERTS},
        "deepseek_v3": _DEEPSEEK,
        "gpt_oss": {"num_local_experts": N_EXPERTS, "head_dim": 16, "sliding_window": 4},
        "granitemoe": {"num_local_experts": N_EXPERTS},
    }
)
_WITHOUT_IDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama4_text": {
            "num_local_experts": N_EXPERTS,
            "head_dim": 16,
            "intermediate_size_mlp": 16,
        },
        "jetmoe": {"num_local_experts": N_EXPERTS, "kv_channels": 16},
        "dbrx": {
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 3,
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": N_EXPERTS, "moe_top_k": TOP_K},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        },
    }
)
FAMILIES = tuple(_FAMILIES)
ROUTERS_WITHOUT_IDS = tuple(_WITHOUT_IDS)  # they hand out logits; JetMoE also mixes its attention
MOE_LAYERS = MappingProxyType({"qwen3_moe": (0, 2), "deepseek_v3": (1, 2)})  # others: all three
CHOICE_FOLLOWS_LOGITS = tuple(family for family in FAMILIES if family != "deepseek_v3")


def tiny_moe(family: str) -> Any:
    """A model of the family, in evaluation mode; routers spread their choices, biases are not 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**_SHAPE, **{**_FAMILIES, **_WITHOUT_IDS}[family]}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 2 or "correction_bias" in name or name.endswith("router.bias"):
                tensor.copy_(torch.randn(tensor.shape) * 0.3)
    return model


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: threads that wait for each other cost more than these models do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts(n_prompts: int = 5, seed: int = 0) -> list[list[int]]:
    """Token ids of prompts of unequal lengths, 1 to 9 tokens; 0, the padding token, among them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    lengths = [1, 9, *rng.integers(2, 9, size=n_prompts - 2).tolist()]
    return [rng.integers(0, VOCABULARY, size=length).tolist() for length in lengths]
