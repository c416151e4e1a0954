"""ModelSpec: the shape of one Mixture-of-Experts model, and the counts that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from traces.errors import TraceError


@dataclass(frozen=True, slots=True)
class Attention:
    """Shape of one attention layer; multi-head latent attention (MLA) when kv_lora_rank > 0.

    head_dim is the query/key width of one head (MLA: qk_nope_dim + qk_rope_dim).
    sliding_window is in tokens, 0 for none; it holds on n_sliding_layers of the model's layers.
    output_gate: the query projection also makes a gate of the same width (Qwen3-Next).
    n_experts, top_k: query and output projections are themselves a mixture (JetMoE: 8 and 2);
    n_heads counts the heads of the top_k chosen ones, keys and values are shared.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    sliding_window: int = 0
    n_sliding_layers: int = 0
    output_gate: bool = False
    n_experts: int = 1
    top_k: int = 1


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the simulator needs to know of a model; layer indices are absolute (0..n_layers-1).

    shared_intermediate_size  width of all shared experts of a layer together, 0 for none
    ffn_matrices              3 with a gate projection (SwiGLU), 2 without
    n_groups, topk_groups     group-limited routing (DeepSeek-V3: 8 and 4); 1 and 1 for none
    kv_layers                 layers that keep a KV cache
    dense_ffn_matrices        the same for dense layers, 0 when equal to ffn_matrices
    n_encoder_layers          encoder-decoder models: the first layers, without cross-attention
    mixer_params              parameters of one Mamba or linear-attention layer's token mixer
    n_mixer_layers            layers that have such a mixer in place of attention
    """

    name: str
    n_layers: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    attention: Attention
    n_experts: int
    top_k: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    dense_intermediate_size: int
    vocab_size: int
    kv_layers: int
    ffn_matrices: int = 3
    n_groups: int = 1
    topk_groups: int = 1
    router: str = "softmax"
    tied_embeddings: bool = False
    dense_ffn_matrices: int = 0
    n_encoder_layers: int = 0
    mixer_params: int = 0
    n_mixer_layers: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.n_experts:
            raise TraceError(
                f"model {self.name}: top_k={self.top_k} must be in 1..n_experts={self.n_experts}"
            )
        if self.moe_layers and not (
            min(self.moe_layers) >= 0 and max(self.moe_layers) < self.n_layers
        ):
            raise TraceError(
                f"model {self.name}: moe_layers {min(self.moe_layers)}..{max(self.moe_layers)}"
                f" must lie in 0..{self.n_layers - 1}"
            )
        if self.n_experts % self.n_groups:
            raise TraceError(
                f"model {self.name}: n_experts={self.n_experts} must be a multiple of"
                f" n_groups={self.n_groups}"
            )

    @property
    def n_moe_layers(self) -> int:
        """Number of layers with routed experts."""
        return len(self.moe_layers)

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: ffn_matrices * hidden * intermediate."""
        return self.ffn_matrices * self.hidden_size * self.expert_intermediate_size
