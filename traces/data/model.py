"""A small decoder-only Mixture-of-Experts transformer: every layer is a MoE layer.

Shapes: B sequences, T tokens each, N = B * T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TinyMoeConfig:
    """Shape of the model; widths in elements."""

    vocab_size: int = 2048
    hidden: int = 128
    n_layers: int = 8
    n_heads: int = 4
    n_experts: int = 32
    top_k: int = 4
    expert_hidden: int = 48
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.n_heads


class Routed(NamedTuple):
    """What a router decided: ids int64[N, K] (best first), weights float[N, K] summing to one."""

    ids: Tensor
    weights: Tensor
    balance_loss: Tensor
    z_loss: Tensor


class KeyValues:
    """Keys and values of one layer's past tokens; grows by what is appended."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._keys is None else self._keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, heads, T, head_dim]; all keys and values so far."""
        if self._keys is not None and self._values is not None:
            keys = torch.cat([self._keys, keys], dim=2)
            values = torch.cat([self._values, values], dim=2)
        self._keys, self._values = keys, values
        return keys, values


class Router(nn.Module):
    """Softmax over all experts, best K renormalised; its losses are over all N tokens."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.gate = nn.Linear(config.hidden, config.n_experts, bias=False)

    def forward(self, x: Tensor) -> Routed:
        """Route x float[N, D]."""
        logits = self.gate(x)
        scores = logits.softmax(dim=-1)
        top, ids = scores.topk(self.top_k, dim=-1)
        z_loss = logits.logsumexp(dim=-1).square().mean()
        return Routed(ids, top / top.sum(-1, keepdim=True), load_balance(scores, ids), z_loss)


class Experts(nn.Module):
    """E gated feed-forward networks, computed expert by expert on grouped tokens."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        n, d, f = config.n_experts, config.hidden, config.expert_hidden
        self.gate_up = nn.Parameter(torch.randn(n, d, 2 * f) / math.sqrt(d))
        depth_scale = 1 / math.sqrt(2 * config.n_layers)
        self.down = nn.Parameter(torch.randn(n, f, d) * (depth_scale / math.sqrt(f)))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts, float[N, D]."""
        order = ids.flatten().argsort(stable=True)
        token = order // ids.shape[1]
        sizes = torch.bincount(ids.flatten(), minlength=self.gate_up.shape[0]).tolist()
        gate, up = grouped_matmul(x[token], self.gate_up, sizes).chunk(2, dim=-1)
        out = grouped_matmul(F.silu(gate) * up, self.down, sizes)
        return torch.zeros_like(x).index_add(0, token, out * weights.flatten()[order, None])


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.theta = config.rope_theta
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(2 * config.n_layers * config.hidden))

    def forward(self, x: Tensor, past: KeyValues | None) -> Tensor:
        """Attend within x float[B, T, D] and to the past; T is 1 when there is a past."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        start = len(past) if past is not None else 0
        q, k = rotate(q, start, self.theta), rotate(k, start, self.theta)
        if past is not None:
            k, v = past.append(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
        projected: Tensor = self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return projected


class Block(nn.Module):
    """Attention, then routed experts, each behind a norm and added to the stream."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor, past: KeyValues | None) -> tuple[Tensor, Routed]:
        """Next stream float[B, T, D] and what the router decided."""
        x = x + self.attention(self.attention_norm(x), past)
        flat = self.moe_norm(x).flatten(0, 1)
        routed: Routed = self.router(flat)
        return x + self.experts(flat, routed.ids, routed.weights).view_as(x), routed


class TinyMoe(nn.Module):
    """The model; input and output embeddings are tied."""

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(
        self, tokens: Tensor, past: list[KeyValues] | None = None
    ) -> tuple[Tensor, list[Routed]]:
        """Logits float[B, T, vocabulary] and each layer's routing for tokens int64[B, T]."""
        x = self.embed(tokens)
        routing = []
        for layer, block in enumerate(self.blocks):
            x, routed = block(x, None if past is None else past[layer])
            routing.append(routed)
        return F.linear(self.norm(x), self.embed.weight), routing

    def empty_past(self) -> list[KeyValues]:
        """A cache to start a sequence with."""
        return [KeyValues() for _ in self.blocks]


def load_balance(scores: Tensor, ids: Tensor) -> Tensor:
    """E * sum_i f_i P_i over all N tokens; 1 when selections are even.

    source  Switch Transformer (arXiv 2101.03961) eq. 4, with f_i a share of all N * K selections
    """
    n_experts = scores.shape[1]
    share = torch.bincount(ids.flatten(), minlength=n_experts) / ids.numel()
    return n_experts * (share * scores.mean(dim=0)).sum()


def grouped_matmul(rows: Tensor, matrices: Tensor, sizes: list[int]) -> Tensor:
    """Rows in E consecutive groups of the given sizes, each times its own matrix of E."""
    groups = zip(rows.split(sizes), matrices.unbind(), strict=True)
    return torch.cat([group @ matrix for group, matrix in groups if len(group)])


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """Rotary position embedding of x float[B, heads, T, head_dim] from position start on."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(start, start + x.shape[2], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
