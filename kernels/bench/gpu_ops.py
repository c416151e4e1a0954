"""Which function measures which operator of the GPU: (point, accelerator) -> Measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from moesim_kernels.bench import gpu_attention, gpu_copies, gpu_experts, gpu_floor, gpu_router
from moesim_kernels.bench.accelerator import Accelerator
from moesim_kernels.bench.measured import Measured
from moesim_kernels.bench.points import Point

GPU_OPS: Mapping[str, Callable[[Point, Accelerator], Measured]] = MappingProxyType(
    {
        "peak": gpu_floor.peak,
        "launch": gpu_floor.launch,
        "copy": gpu_copies.copy,
        "overlap": gpu_copies.overlap,
        "grouped_gemm": gpu_experts.grouped_gemm,
        "gate": gpu_router.gate,
        "permute": gpu_router.permute,
        "unpermute": gpu_router.unpermute,
        "attention_decode": gpu_attention.decode,
        "attention_prefill": gpu_attention.prefill,
    }
)
