"""How offloading engines run a layer: what they overlap, and the constants that are theirs.

Few constants, each shared by every row of an engine, none by a row alone. `FITTED` says which were
fitted, from where they started, and on which blocks of the table. Assumed and not fitted are: the
handshake of GPU and CPU, copies from memory that is not pinned, page faults, launches without a
graph of kt-kernel (as KTransformers 0.2), and everything of kt-kernel-amx, which takes the
constants of kt-kernel with the arithmetic of KTransformers 0.3. Which engine overlaps what, and
when it copies experts to the GPU, follows from its documents and sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from hwmodels.host_costs import HostEfficiency, host_efficiency
from moesim.errors import SimulationError


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine.

    host              how it uses CPU, memory, GPU and links (hwmodels/host_costs.py)
    overlap           CPU and GPU work on the experts of a layer at once; else one after the other
    gather            experts are gathered into a pinned buffer to be streamed; else copied from
                      where they are
    pinned            copies come from pinned memory
    mapped            weights are a mapped file: the first pass over them pays page faults
    tensor_parallel   several GPUs split every layer; else they take layers in turn
    absorbed          prefill multiplies with latent keys (MLA) at their full width
    whole_prompts     a prompt is one pass; else micro-batches
    layer_s           on the GPU, once a layer and pass: launches and small operators, in a graph
    eager_s           the same without a graph
    all_reduce_s      once a sum over tensor-parallel GPUs of small messages, two a layer
    kv_share          of memory bandwidth, reading the cache in decoding
    attention_share   of the GPU's 16-bit peak, scores and values of prefill
    loop_s            on the GPU, for every resident expert of a layer, taken or not
    """

    host: HostEfficiency
    overlap: bool = False
    gather: bool = False
    pinned: bool = True
    mapped: bool = False
    tensor_parallel: bool = False
    absorbed: bool = False
    whole_prompts: bool = False
    layer_s: float = 40e-6
    eager_s: float = 120e-6
    all_reduce_s: float = 20e-6
    kv_share: float = 0.6
    attention_share: float = 0.4
    loop_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Skew:
    """Zipf exponents of how often the experts of a layer are chosen.

    own     by one request, which a placement that follows it knows; fitted on KT/sched/dynamic
    static  over many requests, which a placement by counts knows: experts ranked on some requests
            and counted on others give 0.53 to 0.77 on Qwen3-30B-A3B (English tasks), 0.70 on
            gpt-oss-20b and 0.51 to 0.64 on DeepSeek-V3's loads
    """

    own: float = 0.825
    static: float = 0.66


DEFAULT_SKEW = Skew()
FAULT_BYTES_PER_S = 44e9
"""Touching a mapped file in the page cache for the first time: 1.5 us for each 64 KiB; assumed, so
chosen that IKLC/357hyb-lc starts slower than it goes on, as measured."""

_LLAMA = Engine(
    host_efficiency("llama.cpp"), pinned=False, mapped=True,
    layer_s=51e-6, eager_s=117e-6, kv_share=0.53, attention_share=0.86,
)  # fmt: skip
_KTRANSFORMERS = Engine(
    host_efficiency("ktransformers-0.2"), overlap=True, absorbed=True, whole_prompts=True,
    layer_s=41e-6, eager_s=770e-6, loop_s=19e-6, attention_share=0.36,
)  # fmt: skip
_KT_KERNEL = Engine(
    host_efficiency("kt-kernel"), overlap=True, gather=True, tensor_parallel=True,
    whole_prompts=True, layer_s=136e-6, eager_s=800e-6, all_reduce_s=18e-6, kv_share=0.89,
    attention_share=0.69,
)  # fmt: skip
ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "llama.cpp": _LLAMA,
        "ik_llama.cpp": replace(
            _LLAMA, host=host_efficiency("ik_llama.cpp"), pinned=True, mapped=False, eager_s=86e-6
        ),
        "ktransformers-0.2": _KTRANSFORMERS,
        "ktransformers-0.3": replace(
            _KTRANSFORMERS, host=host_efficiency("ktransformers-0.3"), attention_share=0.128
        ),
        "kt-kernel": _KT_KERNEL,
        "kt-kernel-amx": replace(_KT_KERNEL, host=host_efficiency("kt-kernel-amx")),
    }
)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Which constants of an engine were fitted, and on what.

    start   where each began, by field of Engine, of its host's HostEfficiency, or "own" of Skew
    blocks  blocks of the table whose rows were used
    """

    start: Mapping[str, float]
    blocks: tuple[str, ...]


def _fit(blocks: tuple[str, ...], **start: float) -> Fitted:
    return Fitted(MappingProxyType(start), blocks)


FITTED: Mapping[str, Fitted] = MappingProxyType(
    {
        "llama.cpp": _fit(
            ("LCPP/KTbase", "IKLC/357hyb-lc", "LCPP/dgx-gpt-oss-120b", "LCPP/5080-Q4--n-"),
            memory_share=0.58, numa_share=0.35, compute_share=0.10,
            gpu_memory_share=0.75, gpu_compute_share=0.08, layer_s=40e-6,
            eager_s=120e-6, kv_share=0.6, attention_share=0.4,
        ),
        "ik_llama.cpp": _fit(
            ("IKLC/357cpu-ik", "IKLC/357hyb-ik", "IKLC/520a-main", "IKLC/520b-main"),
            memory_share=0.58, compute_share=0.34, gpu_compute_share=0.08,
            eager_s=120e-6,
        ),
        "ktransformers-0.2": _fit(
            ("KT/V0.2/dual8", "KT/V0.2.0/6exp", "KT/uberg-cg"),
            memory_share=0.57, numa_share=0.6, compute_share=0.16, layer_s=40e-6,
            eager_s=800e-6, loop_s=20e-6, gpu_compute_share=0.35,
            attention_share=0.4,
        ),
        "ktransformers-0.3": _fit(
            ("KT/V0.3/8exp",),
            memory_share=0.57, compute_share=0.22, gpu_compute_share=0.35,
            attention_share=0.15,
        ),
        "kt-kernel": _fit(
            (
                "KT/sched/random", "KT/sched/dynamic", "KT/M2.1/1x4090", "KT/M2.1/2x4090",
                "KT/M2.1/1x5090",
            ),
            memory_share=0.57, compute_share=0.20, dispatch_s=20e-6,
            layer_s=110e-6, all_reduce_s=20e-6, gpu_compute_share=0.25,
            attention_share=0.4, kv_share=0.9, pinned_share=0.78,
            staging_share=0.061, copy_s=40e-6, own=0.93,
        ),
    }
)  # fmt: skip
"""The five fits. Any other engine or constant takes these or is assumed."""


def engine(name: str) -> Engine:
    """The engine of a name; the error lists the known ones."""
    if name not in ENGINES:
        raise SimulationError(f"engine {name!r} is not known, known: {', '.join(ENGINES)}")
    return ENGINES[name]


def with_constants(base: Engine, changes: Mapping[str, float]) -> Engine:
    """The engine with other constants, its own or its host's, by field name."""
    known = Engine.__dataclass_fields__
    own: dict[str, Any] = {name: value for name, value in changes.items() if name in known}
    of_host: dict[str, Any] = {key: value for key, value in changes.items() if key not in own}
    return replace(base, host=replace(base.host, **of_host), **own)
