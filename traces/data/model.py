"""A small decoder-only Mixture-of-Experts transformer: every layer is a MoE layer.

Shapes: B sequences, T tokens each, N = B * T tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        """Route x float[N, D]; in float32 also under autocast, since near ties decide."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.gate(x)
        scores = logits.softmax(dim=-1)
        top, ids = scores.topk(self.top_k, dim=-1)
        z_loss = logits.logsumexp(dim=-1).square().mean()
        return Routed(ids, top / top.sum(-1, keepdim=True), load_balance(scores, ids), z_loss)


class Experts(nn.Module):
    """E gated feed-forward networks on tokens sorted by expert.

    grouped  False: one expert after another in the type of x, its sizes read on the host;
             True: all at once in bfloat16 by `grouped_experts`, which never waits for the device
    """

    def __init__(self, config: TinyMoeConfig) -> None:
        super().__init__()
        self.grouped = False
        n, d, f = config.n_experts, config.hidden, config.expert_hidden
        self.gate_up = nn.Parameter(torch.randn(n, d, 2 * f) / math.sqrt(d))
        depth_scale = 1 / math.sqrt(2 * config.n_layers)
        self.down = nn.Parameter(torch.randn(n, f, d) * (depth_scale / math.sqrt(f)))

    @property
    def n_experts(self) -> int:
        """E."""
        return self.gate_up.shape[0]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of each token's experts, float[N, D]."""
        if self.grouped:
            return grouped_experts(x, Routes.of(ids, weights, self.n_experts), self)
        order = ids.flatten().argsort(stable=True)
        token = order // ids.shape[1]
        sizes = torch.bincount(ids.flatten(), minlength=self.n_experts).tolist()
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

    def group_experts(self, grouped: bool) -> None:
        """Choose how every layer computes its experts; see `Experts`."""
        for block in self.blocks:
            block.experts.grouped = grouped


def flop_per_token(config: TinyMoeConfig, window: int) -> float:
    """Operations to train on one token of windows of that many tokens.

    source  6 for each parameter that a token meets, and 6 * window * hidden in each layer for
            causal attention: two products forward, twice that backward, half of them masked
    """
    layer = (
        4 * config.hidden**2
        + config.hidden * config.n_experts
        + 3 * config.top_k * config.hidden * config.expert_hidden
    )
    met = config.n_layers * layer + config.vocab_size * config.hidden
    return 6.0 * (met + config.n_layers * window * config.hidden)


def load_balance(scores: Tensor, ids: Tensor) -> Tensor:
    """E * sum_i f_i P_i over all N tokens; 1 when selections are even.

    source  Switch Transformer (arXiv 2101.03961) eq. 4, with f_i a share of all N * K selections
    """
    n_experts = scores.shape[1]
    share = selections(ids, n_experts) / ids.numel()
    return n_experts * (share * scores.mean(dim=0)).sum()


def selections(ids: Tensor, n_experts: int) -> Tensor:
    """How often each expert was chosen, int64[E]; unlike bincount it never waits for the device."""
    flat = ids.flatten()
    return torch.zeros(n_experts, dtype=torch.int64, device=ids.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


def grouped_matmul(rows: Tensor, matrices: Tensor, sizes: list[int]) -> Tensor:
    """Rows in E consecutive groups of the given sizes, each times its own matrix of E."""
    groups = zip(rows.split(sizes), matrices.unbind(), strict=True)
    return torch.cat([group @ matrix for group, matrix in groups if len(group)])


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """Rotary position embedding of x float[B, heads, T, head_dim] from position start on."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    stop = start + x.shape[2]
    position = torch.arange(start, stop, dtype=torch.float32, device=x.device)
    angle = position[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class Routes(NamedTuple):
    """N * K routed rows sorted by expert; row r of the sorted is copy order[r] of the unsorted."""

    order: Tensor  # int64[N * K]
    inverse: Tensor  # int64[N * K], where each copy of each token went
    ends: Tensor  # int32[E], where each expert's rows end
    weights: Tensor  # float[N * K], sorted
    top_k: int

    @classmethod
    def of(cls, ids: Tensor, weights: Tensor, n_experts: int) -> Routes:
        """Sort the selections ids int64[N, K] by expert."""
        order = ids.flatten().argsort(stable=True)
        rank = torch.arange(len(order), device=ids.device)
        inverse = torch.empty_like(order).scatter_(0, order, rank)
        ends = selections(ids, n_experts).cumsum(0).to(torch.int32)
        return cls(order, inverse, ends, weights.flatten().index_select(0, order), ids.shape[1])

    def spread(self, x: Tensor) -> Tensor:
        """Each token's row once per expert it goes to, sorted: [N, D] to [N * K, D]."""
        return x.index_select(0, self.order // self.top_k)

    def gather(self, rows: Tensor) -> Tensor:
        """Sum of each token's sorted rows, added in float32: [N * K, D] to [N, D]."""
        unsorted = rows.index_select(0, self.inverse).view(-1, self.top_k, rows.shape[1])
        return unsorted.sum(1, dtype=torch.float32).to(rows.dtype)


class _Spread(torch.autograd.Function):
    """`Routes.spread`, whose gradient is `Routes.gather`: reads only, no atomic additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return routes.spread(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.routes.gather(gradient), None


class _Gather(torch.autograd.Function):
    """`Routes.gather`, whose gradient is `Routes.spread`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return routes.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.routes.spread(gradient), None


def grouped_experts(x: Tensor, routes: Routes, experts: Experts) -> Tensor:
    """What `Experts.forward` returns, in two grouped products of bfloat16.

    Gate weights multiply the narrow rows before the second product, which is linear in them.
    """
    low = torch.bfloat16
    rows = _Spread.apply(x.to(low), routes)
    both = F.grouped_mm(rows, experts.gate_up.to(low), offs=routes.ends)
    gate, up = both.chunk(2, dim=-1)
    inner = F.silu(gate) * up * routes.weights.to(low)[:, None]
    out = F.grouped_mm(inner, experts.down.to(low), offs=routes.ends)
    gathered: Tensor = _Gather.apply(out, routes)
    return gathered.to(x.dtype)


def grouping_works(device: str, hidden: int, expert_hidden: int) -> bool:
    """Whether grouped experts and their gradients agree with the loop on a device, idle ones too.

    The experts tried have the given widths, in elements; False also where torch has no
    `grouped_mm` for the device.
    """
    config = TinyMoeConfig(hidden=hidden, expert_hidden=expert_hidden, n_experts=4, top_k=2)
    made = torch.Generator().manual_seed(0)
    x = torch.randn(48, hidden, generator=made).to(device)
    ids = torch.tensor([[0, 2], [2, 3]]).repeat(24, 1).to(device)  # expert 1 gets no token
    weights = torch.rand(48, 2, generator=made).to(device)
    experts = Experts(config).to(device)
    found = []
    for experts.grouped in (False, True):
        given, chances = x.clone().requires_grad_(), weights.clone().requires_grad_()
        try:
            out = experts(given, ids, chances)
            parameters = (given, chances, experts.gate_up, experts.down)
            gradients = torch.autograd.grad(out.square().sum(), parameters)
        except (RuntimeError, AttributeError):
            return False
        found.append([out.detach(), *gradients])
    errors = [(a - b).norm() / b.norm() for a, b in zip(found[1], found[0], strict=True)]
    return all(float(error) < 0.03 for error in errors)  # bfloat16 keeps 8 bits; a NaN is False
