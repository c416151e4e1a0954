"""Inference with weights streamed through a small GPU: sizes, bounds, rooflines, layer times.

The model lies in host memory and passes over the link once an iteration; the KV cache and the
attention of decoding tokens may stay on the CPU. Read `StreamBox` and `LayerShape`, then
`decode_layer`, which the policy search (`streamed_policy.py`) minimises. The first part has the
equations of MoE-Lens (arXiv 2504.09345): intensity, saturation, parallel tokens per unit of KV
cache, the bound on throughput and its second stage. The second has the hierarchical roofline and
the layer time of MoE-Lightning (arXiv 2411.11217). All figures are plain SI; FLOP are two per
multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hwmodels.cost import Work
from planners.errors import PlanError
from traces.counting import attention_params
from traces.model import ModelSpec

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StreamBox:
    """A small GPU beside a large host memory, as the rates that are reached (not nominal ones).

    The catalogue's machines are `hwmodels.box.Box`; this is what the cost model needs of one.
    link_bytes_per_s  host to device, all GPUs of the box together
    staging_bytes_per_s  of copies out of pageable into pinned memory, 0 when weights are pinned
    cpu_threads       that compute attention; each is one requester of host memory
    """

    name: str
    gpu_flop_per_s: float
    gpu_bytes_per_s: float
    gpu_memory_bytes: float
    link_bytes_per_s: float
    cpu_flop_per_s: float
    dram_bytes_per_s: float
    host_memory_bytes: float
    cpu_threads: int = 20
    staging_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        for field in self.__slots__:
            value = getattr(self, field)
            if field not in ("name", "staging_bytes_per_s") and not value > 0:
                raise PlanError(f"box {self.name}: {field}={value}, expected > 0")


def joined(box: StreamBox, n_gpus: int, own_links: bool = False) -> StreamBox:
    """The box with n_gpus that split every layer: compute, bandwidth and memory times n_gpus.

    own_links  each GPU has a link and a staging thread of its own, as processes that load their
               shards do; without, they share one, as in MoE-Lightning's optimiser
    """
    if n_gpus < 2:
        return box
    ways = n_gpus if own_links else 1
    return replace(
        box,
        name=f"{n_gpus}x{box.name}",
        gpu_flop_per_s=box.gpu_flop_per_s * n_gpus,
        gpu_bytes_per_s=box.gpu_bytes_per_s * n_gpus,
        gpu_memory_bytes=box.gpu_memory_bytes * n_gpus,
        link_bytes_per_s=box.link_bytes_per_s * ways,
        staging_bytes_per_s=box.staging_bytes_per_s * ways,
    )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Bytes and work of one layer of a model whose layers are all alike.

    dense_bytes     weights of attention and shared experts; expert_bytes of all routed experts
    kv_token_bytes  KV cache of one token; hidden_bytes, qkv_bytes one token's state and projections
    dense_flops     of one token outside the routed experts; expert_flops in its top_k experts
    score_flops     attention of one token to one cached token, scores and values
    workspace_bytes intermediate results of one token in fused experts
    """

    n_layers: int
    n_experts: int
    top_k: int
    n_heads: int
    dense_bytes: float
    expert_bytes: float
    kv_token_bytes: float
    hidden_bytes: float
    qkv_bytes: float
    dense_flops: float
    expert_flops: float
    score_flops: float
    workspace_bytes: float

    @property
    def layer_bytes(self) -> float:
        """Weights of one layer."""
        return self.dense_bytes + self.expert_bytes

    @property
    def token_flops(self) -> float:
        """Work of one token in one layer, attention to cached tokens left out."""
        return self.dense_flops + self.expert_flops

    def touched_bytes(self, tokens: Work) -> Any:
        """Expected bytes of the distinct experts of a batch: E(1 - (1 - k/E)^n) experts."""
        missed = (1.0 - self.top_k / self.n_experts) ** np.asarray(tokens, dtype=np.float64)
        return self.expert_bytes * (1.0 - missed)


def layer_shape(model: ModelSpec, value_bytes: float = 2.0) -> LayerShape:
    """The layer of a model with value_bytes per weight, KV number and activation.

    raises  PlanError when some layer has no routed experts, or latent attention
    """
    if model.n_moe_layers != model.n_layers or model.attention.kv_lora_rank:
        raise PlanError(
            f"model {model.name}: {model.n_moe_layers} of {model.n_layers} layers have experts,"
            " expected all, and grouped-query attention"
        )
    a, hidden = model.attention, model.hidden_size
    dense = attention_params(model) + model.ffn_matrices * hidden * model.shared_intermediate_size
    width = model.top_k * (hidden + model.ffn_matrices * model.expert_intermediate_size)
    kv = a.n_kv_heads * (a.head_dim + a.v_head_dim)
    return LayerShape(
        n_layers=model.n_layers,
        n_experts=model.n_experts,
        top_k=model.top_k,
        n_heads=a.n_heads,
        dense_bytes=dense * value_bytes,
        expert_bytes=model.n_experts * model.expert_params * value_bytes,
        kv_token_bytes=kv * value_bytes,
        hidden_bytes=hidden * value_bytes,
        qkv_bytes=(a.n_heads * a.head_dim + kv) * value_bytes,
        dense_flops=2.0 * dense,
        expert_flops=2.0 * model.top_k * model.expert_params,
        score_flops=2.0 * a.n_heads * (a.head_dim + a.v_head_dim),
        workspace_bytes=width * value_bytes,
    )


def intensity(shape: LayerShape, tokens: float) -> float:
    """FLOP per weight byte of a pass, about tokens * top_k / n_experts (MoE-Lens equation 1)."""
    return tokens * shape.token_flops / shape.layer_bytes


def saturation_tokens(
    gpu_flop_per_s: float, link_bytes_per_s: float, n_experts: int, top_k: int
) -> float:
    """Tokens of one pass that keep the GPU busy while weights stream (MoE-Lens equation 2)."""
    return gpu_flop_per_s / link_bytes_per_s * n_experts / top_k


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every request: its prompt (padded length where prompts are padded), its output."""

    prompt: float
    output: float

    def __post_init__(self) -> None:
        if not (self.prompt >= 1 and self.output >= 1):
            raise PlanError(f"lengths: {self.prompt} and {self.output} tokens, expected >= 1")

    @property
    def total(self) -> float:
        """Prompt and output together."""
        return self.prompt + self.output

    @property
    def mean_context(self) -> float:
        """Mean resident length over the output: prompt + output / 2."""
        return self.prompt + self.output / 2


def parallel_tokens_per_kv_token(lengths: Lengths) -> float:
    """Tokens processed per token of KV capacity and iteration over a sequence's life (PME).

    source  MoE-Lens equation 3 in closed form, 2(p + g) / ((2p + g) g)
    """
    return lengths.total / (lengths.mean_context * lengths.output)


def parallel_tokens_per_kv_token_exact(prompt: int, output: int) -> float:
    """The same as the sum it abbreviates: (p + g) / sum of (p + j) for j = 0..g."""
    occupied = sum(prompt + j for j in range(output + 1))
    return (prompt + output) / occupied


def throughput_bound(
    lengths: Lengths, kv_tokens: float, weights_s: float, gpu_tokens_per_s: float = np.inf
) -> float:
    """T_max, prompt and generated tokens per second: min(PME * kv_tokens / weights_s, GPU).

    weights_s  seconds to stream the model once (delta)
    source     MoE-Lens equation 4
    """
    return float(
        min(parallel_tokens_per_kv_token(lengths) * kv_tokens / weights_s, gpu_tokens_per_s)
    )


def overlap_gain(lengths: Lengths) -> float:
    """Effective KV capacity won by staggered admission: (p + g) / (p + g/2), MoE-Lens eq. 5."""
    return lengths.total / lengths.mean_context


@dataclass(frozen=True, slots=True)
class Limits:
    """What an iteration is limited by.

    kv_tokens         capacity of the KV cache in tokens; page_tokens of one page
    weights_s         seconds to stream the model once
    gpu_tokens_per_s  tokens the GPU computes per second
    kv_token_bytes    KV bytes of a token, all layers; dram_bytes_per_s at which the CPU reads them
    """

    kv_tokens: float
    page_tokens: int
    weights_s: float
    gpu_tokens_per_s: float
    kv_token_bytes: float
    dram_bytes_per_s: float

    @property
    def most_tokens(self) -> float:
        """Tokens that fill an iteration without lengthening it (n_real)."""
        return self.gpu_tokens_per_s * self.weights_s


@dataclass(frozen=True, slots=True)
class Stage2:
    """Paced admission: requests admitted per iteration, tokens and seconds of an iteration.

    bound_tokens_per_s  prompt and generated tokens per second with endless requests
    """

    requests: float
    tokens: float
    iteration_s: float
    bound_tokens_per_s: float
    output_tokens: float

    def tokens_per_s(self, n_requests: float) -> float:
        """With n_requests in all: filling and draining take `output` iterations more."""
        iterations = n_requests / self.requests + self.output_tokens
        per_request = self.tokens / self.requests
        return n_requests * per_request / (iterations * self.iteration_s)


def stage2(lengths: Lengths, limits: Limits) -> Stage2:
    """Admission that keeps the KV cache full: q * g * (p + g/2 + b/2) <= kv_tokens (equation 6)."""
    resident = lengths.output * (lengths.mean_context + limits.page_tokens / 2)
    requests = min(limits.kv_tokens / resident, limits.most_tokens / lengths.total)
    tokens = requests * lengths.total
    kv_read = requests * lengths.output * lengths.mean_context * limits.kv_token_bytes
    seconds = max(
        limits.weights_s, tokens / limits.gpu_tokens_per_s, kv_read / limits.dram_bytes_per_s
    )
    return Stage2(requests, tokens, seconds, tokens / seconds, lengths.output)


@dataclass(frozen=True, slots=True)
class TurningPoints:
    """Where the binding roof changes, in FLOP per byte of data that starts in host memory.

    stay     P1: up to here computing on the CPU is at least as fast as moving data to the GPU
    full     P2: from here the GPU's own roof binds, no longer the link
    balance  GPU FLOP per host byte at which GPU memory and link take equally long
    """

    stay: float
    full: float
    balance: float


def gpu_roof(box: StreamBox, gpu_intensity: float, host_intensity: float) -> float:
    """FLOP/s reached on the GPU with data from the host: min(peak, memory, link).

    gpu_intensity   FLOP per byte of GPU memory; host_intensity FLOP per byte over the link
    source          MoE-Lightning, hierarchical roofline
    """
    return min(
        box.gpu_flop_per_s,
        box.gpu_bytes_per_s * gpu_intensity,
        box.link_bytes_per_s * host_intensity,
    )


def cpu_roof(box: StreamBox, host_intensity: float) -> float:
    """FLOP/s reached on the CPU: min(peak, host memory)."""
    return min(box.cpu_flop_per_s, box.dram_bytes_per_s * host_intensity)


def turning_points(box: StreamBox, gpu_intensity: float) -> TurningPoints:
    """The points for work with gpu_intensity FLOP per byte of GPU memory.

    P1 is where the CPU's compute roof meets the link's; below it the CPU's memory roof, being
    steeper than the link's, is above it too.
    """
    own = min(box.gpu_flop_per_s, box.gpu_bytes_per_s * gpu_intensity)
    return TurningPoints(
        stay=box.cpu_flop_per_s / box.link_bytes_per_s,
        full=own / box.link_bytes_per_s,
        balance=box.gpu_bytes_per_s * gpu_intensity / box.link_bytes_per_s,
    )


@dataclass(frozen=True, slots=True)
class StreamedPolicy:
    """What runs where; batch, micro_batch and the shares are numbers or arrays of one shape.

    batch          sequences of one pass (N), micro_batch of one GPU call (mu)
    weights_share  of routed experts that stay in GPU memory (r_w)
    kv_share       of the KV cache that stays in GPU memory (r_c); 0 with attention on the CPU
    """

    batch: Any
    micro_batch: Any
    attention_on_gpu: bool = False
    ffn_on_gpu: bool = True
    weights_share: Any = 0.0
    kv_share: Any = 0.0


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds of one layer by resource; they overlap, so the layer takes the longest."""

    link_s: Any
    cpu_s: Any
    gpu_s: Any

    @property
    def total_s(self) -> Any:
        """T = max(link, CPU, GPU)."""
        return np.maximum(np.maximum(self.link_s, self.cpu_s), self.gpu_s)


def decode_layer(
    shape: LayerShape, box: StreamBox, lengths: Lengths, policy: StreamedPolicy
) -> LayerTime:
    """One layer of one decode step of the whole batch, at the mean context.

    Attention weights stay on the GPU, as in MoE-Lightning; routed experts stream unless they are
    resident or run on the CPU. Each micro-batch reads its experts from GPU memory anew.
    source  MoE-Lightning section 4 and performance_model/cost_model.py of its artifact
    """
    p = policy
    batch, calls = np.asarray(p.batch, dtype=np.float64), p.batch / p.micro_batch
    kv_bytes = batch * lengths.mean_context * shape.kv_token_bytes
    score_flops = batch * lengths.mean_context * shape.score_flops
    ffn_flops = batch * shape.expert_flops
    moved = shape.expert_bytes * (1.0 - p.weights_share) * p.ffn_on_gpu
    moved = moved + kv_bytes * (1.0 - p.kv_share) * p.attention_on_gpu
    if p.ffn_on_gpu and not p.attention_on_gpu:
        moved = moved + batch * shape.hidden_bytes
    gpu_s = _roof_s(box, batch * shape.dense_flops, calls * shape.dense_bytes)
    if p.attention_on_gpu:
        gpu_s = gpu_s + _roof_s(box, score_flops, kv_bytes)
        cpu_s = np.zeros_like(batch)
    else:
        cpu_s = _cpu_s(box, score_flops, kv_bytes)
    if p.ffn_on_gpu:
        gpu_s = gpu_s + _roof_s(box, ffn_flops, calls * shape.touched_bytes(p.micro_batch))
    else:
        cpu_s = cpu_s + _cpu_s(box, ffn_flops, shape.touched_bytes(batch))
    return LayerTime(moved / box.link_bytes_per_s, cpu_s, gpu_s)


def prefill_layer(
    shape: LayerShape, box: StreamBox, lengths: Lengths, policy: StreamedPolicy
) -> LayerTime:
    """One layer of the prefill of the whole batch: on the GPU, weights and hidden states stream.

    The KV cache leaves over the link's other direction, which is counted as a link of its own.
    """
    tokens = np.asarray(policy.batch, dtype=np.float64) * lengths.prompt
    calls = policy.batch / policy.micro_batch
    weights = shape.expert_bytes * (1.0 - policy.weights_share)
    up = weights + tokens * shape.hidden_bytes
    down = tokens * (shape.hidden_bytes + shape.kv_token_bytes)
    flops = tokens * (shape.token_flops + shape.score_flops * lengths.prompt / 2)
    gpu_s = _roof_s(box, flops, calls * shape.layer_bytes)
    return LayerTime(np.maximum(up, down) / box.link_bytes_per_s, np.zeros_like(tokens), gpu_s)


def _roof_s(box: StreamBox, flops: Work, n_bytes: Work) -> Floats:
    return np.maximum(flops / np.float64(box.gpu_flop_per_s), n_bytes / box.gpu_bytes_per_s)


def _cpu_s(box: StreamBox, flops: Work, n_bytes: Work) -> Floats:
    return np.maximum(flops / np.float64(box.cpu_flop_per_s), n_bytes / box.dram_bytes_per_s)
