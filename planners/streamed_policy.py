"""Which policy to run when weights stream: MoE-Lightning's search, made exhaustive.

`best_policy` tries every placement, micro-batch and batch, and fills GPU memory optimally for
each. What does not fit is refused with the memory that is shortest and by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.streamed import (
    LayerShape,
    LayerTime,
    Lengths,
    StreamBox,
    StreamedPolicy,
    decode_layer,
    prefill_layer,
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MemoryRules:
    """How much of each memory a policy may use, and what it must keep there.

    gpu_usable, host_usable  shares of the memories
    workspace_factor         on the intermediate results of fused experts
    buffered_layers          of streamed weights on the GPU, and as many in pinned host memory
    residual_on_gpu          hidden states of the whole batch stay on the GPU during prefill
    n_gpus                   that each hold a copy of the hidden states
    source  fastmoe/backend/optimizer.py of MoE-Lightning's artifact (caoshiyi/artifacts)
    """

    gpu_usable: float = 0.86
    host_usable: float = 0.80
    workspace_factor: float = 1.2
    buffered_layers: int = 2
    residual_on_gpu: bool = True
    n_gpus: int = 1


DEFAULT_RULES = MemoryRules()


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes at the peak of a run; numbers or arrays of one shape."""

    gpu_bytes: Any
    host_bytes: Any


def memory_use(
    shape: LayerShape, lengths: Lengths, policy: StreamedPolicy, rules: MemoryRules = DEFAULT_RULES
) -> MemoryUse:
    """Peak bytes on the GPU and in host memory; affine in both shares.

    Attention weights are resident, the streamed part of the experts has buffered_layers buffers;
    embeddings are left out, as in the source of MemoryRules.
    """
    batch, micro = np.asarray(policy.batch, dtype=np.float64), policy.micro_batch
    streamed = 1.0 - policy.weights_share
    experts = shape.expert_bytes * shape.n_layers
    kv_all = batch * lengths.total * shape.kv_token_bytes * shape.n_layers
    buffers = rules.buffered_layers * shape.expert_bytes * streamed
    hidden = shape.hidden_bytes * rules.n_gpus
    gathered = shape.top_k * shape.hidden_bytes
    work = rules.workspace_factor * (shape.workspace_bytes + gathered * (rules.n_gpus - 1))
    in_prefill = micro * (2 * hidden + 2 * shape.kv_token_bytes) * lengths.prompt
    if rules.residual_on_gpu:
        in_prefill = in_prefill + batch * hidden * lengths.prompt
    in_decode = 2 * hidden * batch
    if policy.attention_on_gpu:
        in_decode = in_decode + 2 * micro * lengths.total * shape.kv_token_bytes
    resident = shape.dense_bytes * shape.n_layers + experts * policy.weights_share
    gpu = resident + kv_all * policy.kv_share + buffers + work * micro * lengths.prompt
    host = experts * streamed + kv_all * (1.0 - policy.kv_share) + buffers
    return MemoryUse(
        gpu + np.maximum(in_prefill, in_decode), host + batch * shape.hidden_bytes * lengths.prompt
    )


@dataclass(frozen=True, slots=True)
class StreamedPlan:
    """A policy with its cost.

    time          of one layer of a decode step
    tokens_per_s  generated tokens per second of decoding (of prefill and decoding together when
                  the search weighed prefill)
    n_tried       policies that were priced
    """

    policy: StreamedPolicy
    time: LayerTime
    memory: MemoryUse
    tokens_per_s: float
    n_tried: int


def best_policy(
    shape: LayerShape,
    box: StreamBox,
    lengths: Lengths,
    rules: MemoryRules = DEFAULT_RULES,
    weigh_prefill: bool = False,
) -> StreamedPlan:
    """The policy with most generated tokens per second; of equals the smallest batch.

    Exhaustive over the four placements of attention and experts, over micro-batches (all up to
    64, then in steps of 5 %) and over batches that are multiples of the micro-batch. The shares
    are not searched: for given batches the optimum is a fractional knapsack (`_filled`).
    raises  PlanError naming the shorter memory when not even one sequence fits
    """
    found: list[tuple[float, StreamedPolicy]] = []
    n_tried = 0
    for placement in [(False, True), (True, True), (False, False), (True, False)]:
        for row in _candidates(shape, box, lengths, rules, placement):
            n_tried += row.batch.size
            rate = policy_tokens_per_s(shape, box, lengths, row, weigh_prefill)
            best = int(np.argmax(np.round(rate / rate.max(), 9)))  # argmax: the first, smallest
            found.append((float(rate[best]), _scalar(row, best)))
    if not found:
        raise PlanError(_shortage(shape, box, lengths, rules))
    top = max(rate for rate, _ in found)
    equals = [item for item in found if item[0] >= top * (1 - 1e-9)]
    rate, policy = min(equals, key=lambda item: (item[1].batch, item[1].micro_batch))
    if not weigh_prefill:
        policy = _trimmed(shape, box, lengths, rules, policy)
    return StreamedPlan(
        policy,
        decode_layer(shape, box, lengths, policy),
        memory_use(shape, lengths, policy, rules),
        rate,
        n_tried,
    )


def policy_tokens_per_s(
    shape: LayerShape,
    box: StreamBox,
    lengths: Lengths,
    policy: StreamedPolicy,
    weigh_prefill: bool = False,
) -> Any:
    """Generated tokens per second of a policy that fits; an array for a policy of arrays."""
    per_layer = decode_layer(shape, box, lengths, policy).total_s
    if weigh_prefill:
        before = prefill_layer(shape, box, lengths, policy).total_s
        per_layer = per_layer + before / lengths.output
    return np.asarray(policy.batch) / (per_layer * shape.n_layers)


def _candidates(
    shape: LayerShape,
    box: StreamBox,
    lengths: Lengths,
    rules: MemoryRules,
    placement: tuple[bool, bool],
) -> Iterator[StreamedPolicy]:
    """Policies that fit, one value with arrays of batches for each micro-batch."""
    usable = box.gpu_memory_bytes * rules.gpu_usable + box.host_memory_bytes * rules.host_usable
    most = int(usable / (lengths.total * shape.kv_token_bytes * shape.n_layers))
    for micro in micro_batches(most):
        batch = micro * np.arange(1, most // micro + 1, dtype=np.float64)
        open_policy = StreamedPolicy(batch, micro, *placement)
        filled, fits = _filled(shape, box, lengths, rules, open_policy)
        if not fits.any():
            return  # a larger micro-batch needs more of both memories
        yield _scalar(filled, fits)


def micro_batches(most: int) -> Iterator[int]:
    """1 to 64, then 5 % more each time, up to `most`."""
    micro = 1
    while micro <= most:
        yield micro
        micro = max(micro + 1, int(micro * 1.05)) if micro >= 64 else micro + 1


def _filled(
    shape: LayerShape, box: StreamBox, lengths: Lengths, rules: MemoryRules, policy: StreamedPolicy
) -> tuple[StreamedPolicy, npt.NDArray[np.bool_]]:
    """The policy with the best shares, and which of its batches fit.

    A GPU byte given to weights saves more link bytes per layer (1 in n_layers less the buffers)
    and more host bytes than one given to the KV cache (mean over final context, 1 in n_layers),
    so weights come first.
    """
    room = box.gpu_memory_bytes * rules.gpu_usable - _gpu(shape, lengths, policy, rules)
    fits = room >= 0
    weights = np.zeros_like(room)
    if policy.ffn_on_gpu:
        each = _gpu(shape, lengths, replace(policy, weights_share=1.0), rules) - _gpu(
            shape, lengths, policy, rules
        )
        weights = np.where(fits, np.clip(room / each, 0.0, 1.0), 0.0)
        room = room - weights * each
    kv = np.zeros_like(room)
    if policy.attention_on_gpu:
        each = _gpu(shape, lengths, replace(policy, kv_share=1.0), rules) - _gpu(
            shape, lengths, policy, rules
        )
        kv = np.where(fits, np.clip(room / each, 0.0, 1.0), 0.0)
    policy = replace(policy, weights_share=weights, kv_share=kv)
    host = memory_use(shape, lengths, policy, rules).host_bytes
    return policy, fits & (host <= box.host_memory_bytes * rules.host_usable)


def _gpu(shape: LayerShape, lengths: Lengths, policy: StreamedPolicy, rules: MemoryRules) -> Any:
    return memory_use(shape, lengths, policy, rules).gpu_bytes


def _scalar(policy: StreamedPolicy, at: Any) -> StreamedPolicy:
    """One batch of a policy of arrays, or those that a mask keeps."""
    parts = (policy.batch[at], policy.weights_share[at], policy.kv_share[at])
    if np.ndim(parts[0]) == 0:
        parts = (int(parts[0]), float(parts[1]), float(parts[2]))
    return replace(policy, batch=parts[0], weights_share=parts[1], kv_share=parts[2])


def _trimmed(
    shape: LayerShape, box: StreamBox, lengths: Lengths, rules: MemoryRules, policy: StreamedPolicy
) -> StreamedPolicy:
    """The least weights_share that costs no time: what the link hides need not be resident."""
    if not policy.ffn_on_gpu:
        return policy
    bare = decode_layer(shape, box, lengths, replace(policy, weights_share=0.0))
    time = decode_layer(shape, box, lengths, policy)
    beyond = float(bare.link_s - time.total_s) * box.link_bytes_per_s / shape.expert_bytes
    share = min(policy.weights_share, max(0.0, beyond))
    trimmed = replace(policy, weights_share=share)
    host = memory_use(shape, lengths, trimmed, rules).host_bytes
    return trimmed if host <= box.host_memory_bytes * rules.host_usable else policy


def _shortage(shape: LayerShape, box: StreamBox, lengths: Lengths, rules: MemoryRules) -> str:
    """Which memory is shorter for a single sequence under the leanest placement."""
    one = StreamedPolicy(np.ones(1), 1)
    filled, _ = _filled(shape, box, lengths, rules, one)
    use = memory_use(shape, lengths, filled, rules)
    memories = (
        ("GPU memory", float(use.gpu_bytes[0]), box.gpu_memory_bytes * rules.gpu_usable),
        ("host memory", float(use.host_bytes[0]), box.host_memory_bytes * rules.host_usable),
    )
    return f"box {box.name}: {tightest(memories)}, even for one sequence of {lengths.total:g}"


def tightest(memories: tuple[tuple[str, float, float], ...]) -> str:
    """Words for the memory that lacks most, of (name, bytes needed, bytes usable)."""
    name, need, usable = max(memories, key=lambda m: (m[1] - m[2]) / max(m[2], 1.0))
    return (
        f"{name} is short by {(need - usable) / 1e9:.2f} GB"
        f" ({need / 1e9:.2f} GB needed, {usable / 1e9:.2f} GB usable)"
    )
