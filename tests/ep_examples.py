"""A DeepSeek-V3 on H800 nodes, written out by hand, for tests of expert parallelism."""

from __future__ import annotations

import numpy as np

from hwmodels.device import Device, Link
from hwmodels.system import System
from planners.plan import Placement
from traces.model import Attention, ModelSpec
from traces.routing import RoutingTrace

H800 = Device(
    name="h800",
    kind="gpu",
    vendor="NVIDIA",
    memory_bytes=80 * 2**30,
    memory_bytes_per_s=3.35e12,
    flop_per_s={"bf16": 989e12, "fp8": 1979e12},
    link="NVLink4 (cut)",
    link_bytes_per_s=200e9,
    host_link="PCIe5 x16",
    host_link_bytes_per_s=64e9,
    tdp_w=700.0,
    usd_per_hour=2.0,
    launch_s=2.5e-6,
)
NVLINK = Link("NVLink4 (cut)", 160e9, 5e-6, 1e-11)  # 0.8 of 200 GB/s
NDR = Link("InfiniBand NDR", 48e9, 0.6e-6, 3e-11)

DEEPSEEK_V3 = ModelSpec(
    name="deepseek-v3",
    n_layers=61,
    moe_layers=tuple(range(3, 61)),
    hidden_size=7168,
    attention=Attention(
        n_heads=128,
        n_kv_heads=128,
        head_dim=192,
        v_head_dim=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_dim=128,
        qk_rope_dim=64,
    ),
    n_experts=256,
    top_k=8,
    expert_intermediate_size=2048,
    shared_intermediate_size=2048,
    dense_intermediate_size=18432,
    vocab_size=129280,
    kv_layers=61,
    n_groups=8,
    topk_groups=4,
)

TINY = ModelSpec(
    name="tiny",
    n_layers=4,
    moe_layers=(1, 2, 3),
    hidden_size=256,
    attention=Attention(n_heads=8, n_kv_heads=2, head_dim=32, v_head_dim=32),
    n_experts=16,
    top_k=4,
    expert_intermediate_size=128,
    shared_intermediate_size=128,
    dense_intermediate_size=512,
    vocab_size=1000,
    kv_layers=4,
)


def h800_system(n_devices: int) -> System:
    """n_devices H800 in nodes of eight."""
    return System(f"h800x{n_devices}", H800, n_devices, 8, NVLINK, NDR)


def contiguous(n_layers: int, n_experts: int, n_ranks: int, ranks_per_node: int = 8) -> Placement:
    """Expert e in slot e, no replicas."""
    slots = np.tile(np.arange(n_experts, dtype=np.int32), (n_layers, 1))
    return Placement(slots, n_experts, n_ranks, min(ranks_per_node, n_ranks))


def replicated(
    rng: np.random.Generator, shape: tuple[int, int, int], ranks: tuple[int, int]
) -> Placement:
    """Random slots with random replicas; shape (layers, experts, slots), ranks (n, per node)."""
    n_layers, n_experts, n_slots = shape
    extra = rng.integers(0, n_experts, (n_layers, n_slots - n_experts))
    slots = np.concatenate([np.tile(np.arange(n_experts), (n_layers, 1)), extra], axis=1)
    return Placement(rng.permuted(slots, axis=1).astype(np.int32), n_experts, *ranks)


def random_topk(rng: np.random.Generator, shape: tuple[int, int, int], top_k: int) -> np.ndarray:
    """int16[tokens, layers, top_k] distinct uniform choices; shape (tokens, layers, experts)."""
    return np.argpartition(rng.random(shape), top_k - 1, axis=2)[:, :, :top_k].astype(np.int16)


def trace_of(topk: np.ndarray, model: ModelSpec, phase: int = 1) -> RoutingTrace:
    """A trace with these choices, one request per token."""
    n = len(topk)
    return RoutingTrace(
        topk,
        model.n_experts,
        model.moe_layers,
        np.arange(n, dtype=np.int32),
        np.zeros(n, dtype=np.int32),
        np.full(n, phase, dtype=np.int8),
        model=model.name,
    )
