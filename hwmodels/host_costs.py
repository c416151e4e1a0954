"""What a host adds to a model that does not fit: experts on the CPU, copies, drives.

Pure functions of (hardware, work), arrays in and arrays out. The two expert functions price one
expert with n tokens and add up over the experts of a layer, since both sides work through their
experts one after the other at the rate of their memory; what a layer pays once is `dispatch_s` and
`handshake_s` of HostEfficiency. Engines differ in how well they use a host: `host_efficiency` has a
profile of each, with the rows that its constants were fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from hwmodels.cost import ExpertShape, Work
from hwmodels.device import Device, Figure, Link
from hwmodels.errors import HardwareError

Floats = npt.NDArray[np.float64]
Unit = Literal["dot8", "dot16", "matrix"]
EightBit = Literal["never", "weights", "always"]
OUTPUT_BYTES = 2.0  # token copies enter and leave an expert in 16 bits


@dataclass(frozen=True, slots=True)
class HostEfficiency:
    """Shares of peak that an engine reaches on a host, and fixed seconds; sources beside it.

    memory_share       of nominal DRAM bandwidth, reading expert weights (all sockets of a host)
    numa_share         of that, on two sockets or more, when threads read memory of the other one
    compute_share      of the peak of compute_unit, many tokens at an expert
    compute_unit       "matrix": tiles (AMX) in 8 bits where the CPU has them; "vector": AVX
    dispatch_s         once a layer: waking the threads, barriers between its matrices
    handshake_s        once a layer that the GPU and the CPU share: handing over, waiting
    gpu_memory_share   of GPU memory bandwidth, reading expert weights at small batches
    gpu_compute_share  of the GPU's peak, many tokens at an expert
    gpu_eight_bit      when that peak is the 8-bit one: "weights" of 8 bits, "always" (activations
                       are quantised beside them), "never"
    pinned_share       of a link's nominal rate, copies from pinned memory
    unpinned_bytes_per_s  most that copies from memory that is not pinned reach
    staging_share      of nominal DRAM bandwidth, when experts are first gathered into a buffer
    copy_s             once a copy, or an expert that is copied
    drive_share        of a drive's rate, large reads past the page cache
    page_fault_share   of a drive's rate, reads through page faults
    """

    memory_share: float = 0.73
    numa_share: float = 1.0
    compute_share: float = 0.35
    compute_unit: Unit = "dot16"
    dispatch_s: float = 20e-6
    handshake_s: float = 30e-6
    gpu_memory_share: float = 0.75
    gpu_compute_share: float = 0.35
    gpu_eight_bit: EightBit = "never"
    pinned_share: float = 0.78
    unpinned_bytes_per_s: float = 10e9
    staging_share: float = 0.061
    copy_s: float = 10e-6
    drive_share: float = 0.93
    page_fault_share: float = 0.5

    def __post_init__(self) -> None:
        for field in HOST_SOURCES:
            value = getattr(self, field)
            if field.endswith("_share") and not 0 < value <= 1:
                raise HardwareError(f"host efficiency {field}={value} must be in (0, 1]")
            if field.endswith("_s") and not value >= 0:
                raise HardwareError(f"host efficiency {field}={value} must be >= 0")
        for field, choices in (("compute_unit", Unit), ("gpu_eight_bit", EightBit)):
            if getattr(self, field) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise HardwareError(
                    f"host efficiency {field}={getattr(self, field)!r}, expected one of {known}"
                )


HOST_SOURCES: Mapping[str, Figure] = MappingProxyType(
    {
        "memory_share": Figure(0.73, "derived", "150 of 204.8 GB/s, 8 channels, MoE-Lens"),
        "numa_share": Figure(1.0, "assumed", "an engine that splits experts over sockets"),
        "compute_share": Figure(0.35, "assumed", "between the engines of PROFILES"),
        "dispatch_s": Figure(20e-6, "assumed", "a few barriers of a pool of threads"),
        "handshake_s": Figure(30e-6, "assumed", "two host functions of a CUDA graph"),
        "gpu_memory_share": Figure(0.75, "assumed", "between the engines of PROFILES"),
        "gpu_compute_share": Figure(0.35, "assumed", "between the engines of PROFILES"),
        "pinned_share": Figure(0.78, "derived", "24 to 25 of 31.5 GB/s, PCIe 4.0 x16, ProMoE"),
        "unpinned_bytes_per_s": Figure(10e9, "derived", "staged through unpinned memory, PCIe 4.0"),
        "staging_share": Figure(0.061, "derived", "KTransformers prefill by layers, two hosts"),
        "copy_s": Figure(10e-6, "assumed", "one asynchronous copy with its event"),
        "drive_share": Figure(0.93, "assumed", "6.5 of 7 GB/s, NVMe Gen4"),
        "page_fault_share": Figure(0.5, "assumed", "read-ahead of 128 KiB at one fault a thread"),
    }
)

DEFAULT_HOST = HostEfficiency()
_LLAMA = "least log error on published runs: LCPP/KTbase, dgx-gpt-oss-120b, 5080, IKLC/357hyb-lc"
_IK = "least log error on published runs: IKLC/357cpu-ik, 357hyb-ik, 520a-main, 520b-main"
_KT2 = "least log error on published runs: KT/V0.2/dual8, V0.2.0/6exp, uberg-cg"
_KT3 = "least log error on published runs: KT/V0.3/8exp"
_KTK = "least log error on published runs: KT/sched/random, dynamic, M2.1/1x4090, 2x4090, 1x5090"
_TWO = "as ktransformers-0.2, which ran on one socket and on two"


def _fitted(source: str, **values: float) -> Mapping[str, Figure]:
    return MappingProxyType(
        {key: Figure(value, "derived", source) for key, value in values.items()}
    )


_ON_GPU_OF_LLAMA = _fitted(_LLAMA + "; at the fit's upper bound", gpu_memory_share=0.92)
_HOST_OF_KT_KERNEL: Mapping[str, Figure] = {
    **_fitted(
        _KTK, memory_share=0.73, dispatch_s=22.5e-6, pinned_share=0.76, staging_share=0.055,
        gpu_compute_share=0.36,
    ),
    **_fitted(_TWO, numa_share=0.55),
    "copy_s": Figure(39e-6, "derived", _KTK, when="two matrices and their scales, four copies"),
}  # fmt: skip
PROFILE_SOURCES: Mapping[str, Mapping[str, Figure]] = MappingProxyType(
    {
        "default": HOST_SOURCES,
        "llama.cpp": {
            **_fitted(
                _LLAMA, memory_share=0.64, numa_share=0.26, compute_share=0.083,
                gpu_compute_share=0.086,
            ),
            **_ON_GPU_OF_LLAMA,
        },
        "ik_llama.cpp": {
            **_fitted(_IK, memory_share=0.58, compute_share=0.325, gpu_compute_share=0.0455),
            **_fitted(_LLAMA, numa_share=0.26),
            **_ON_GPU_OF_LLAMA,
        },
        "ktransformers-0.2": _fitted(
            _KT2, memory_share=0.56, numa_share=0.55, compute_share=0.18, gpu_compute_share=0.35,
        ),
        "ktransformers-0.3": {
            **_fitted(_KT3, memory_share=0.46, compute_share=0.21, gpu_compute_share=0.30),
            **_fitted(_TWO, numa_share=0.55),
        },
        "kt-kernel": {**_HOST_OF_KT_KERNEL, **_fitted(_KTK, compute_share=0.255)},
        "kt-kernel-amx": {**_HOST_OF_KT_KERNEL, **_fitted(_KT3, compute_share=0.21)},
    }
)  # fmt: skip
"""Constants of each engine that are not the default's, with the blocks of rows they were fitted on.

Blocks are those of a table of published runs that moesim/published/rows.py reads; fitted anew by
moesim/published/fit.py.
"""

_CHOICES: Mapping[str, tuple[Unit, EightBit]] = MappingProxyType(
    {
        "default": ("dot16", "never"),
        "llama.cpp": ("dot8", "always"),
        "ik_llama.cpp": ("dot8", "always"),
        "ktransformers-0.2": ("dot8", "never"),
        "ktransformers-0.3": ("matrix", "never"),
        "kt-kernel": ("dot16", "weights"),
        "kt-kernel-amx": ("matrix", "weights"),
    }
)
PROFILES: Mapping[str, HostEfficiency] = MappingProxyType(
    {
        name: HostEfficiency(
            compute_unit=_CHOICES[name][0],
            gpu_eight_bit=_CHOICES[name][1],
            **{field: figure.value for field, figure in figures.items()},
        )
        for name, figures in PROFILE_SOURCES.items()
    }
)


def host_efficiency(engine: str) -> HostEfficiency:
    """The profile of an engine; the error lists the known ones."""
    if engine not in PROFILES:
        raise HardwareError(f"engine {engine!r} has no host profile, known: {', '.join(PROFILES)}")
    return PROFILES[engine]


def n_sockets(host: Device) -> int:
    """Sockets that a system's host stands for: its bandwidth over that of its own data sheet."""
    figure = (host.figures or {}).get("memory.bandwidth")
    return 1 if figure is None else max(1, round(host.memory_bytes_per_s / figure.value))


def host_bytes_per_s(host: Device, efficiency: HostEfficiency = DEFAULT_HOST) -> float:
    """Bytes/s at which a host reads expert weights, all its sockets together."""
    numa = efficiency.numa_share if n_sockets(host) > 1 else 1.0
    return host.memory_bytes_per_s * efficiency.memory_share * numa


def host_flop_per_s(host: Device, efficiency: HostEfficiency = DEFAULT_HOST) -> float:
    """FLOP/s that a host reaches with many tokens at an expert.

    matrix  the 8-bit peak: AMX tiles on an Intel server of 2023 or later
    dot8    8-bit vector dot products: the 8-bit peak, or four times fp32 where that is of tiles
    dot16   16-bit vector dot products: the bf16 peak, or fp32 where that is of tiles (Intel issues
            one such product a cycle but two fp32 multiply-adds: as many FLOP)
    A CPU without dot products has fp32 in their place. Threads that read the other socket's memory
    (numa_share) also wait for it here.
    """
    peaks = host.flop_per_s
    fp32 = host.peak_flop_per_s("fp32")
    tiles = host.vendor == "Intel" and "bf16" in peaks
    peak = {
        "matrix": peaks.get("int8", fp32),
        "dot8": 4 * fp32 if tiles else peaks.get("int8", fp32),
        "dot16": fp32 if tiles else peaks.get("bf16", fp32),
    }[efficiency.compute_unit]
    numa = efficiency.numa_share if n_sockets(host) > 1 else 1.0
    return peak * efficiency.compute_share * numa


def cpu_expert_seconds(
    host: Device,
    shape: ExpertShape,
    tokens: Work,
    weight_bits: float,
    efficiency: HostEfficiency = DEFAULT_HOST,
) -> Floats:
    """Seconds of one routed expert on the CPU, for each number of tokens; 0 for none.

    tokens       token copies at the expert, any shape; add results up over a layer's experts
    weight_bits  bits stored per weight in DRAM, scales included
    returns      float64 of that shape: the larger of reading weights and multiplying, never falling
                 with tokens; dispatch_s and handshake_s of a layer are not in it
    """
    count = _counts(tokens)
    weights = _weight_bytes(shape, weight_bits)
    rate = host_bytes_per_s(host, efficiency)
    flop_rate = host_flop_per_s(host, efficiency)
    return _larger(count, weights / rate, 2.0 * shape.n_params / flop_rate)


def gpu_expert_seconds(
    device: Device,
    shape: ExpertShape,
    tokens: Work,
    weight_bits: float,
    efficiency: HostEfficiency = DEFAULT_HOST,
) -> Floats:
    """Seconds of one resident expert on the GPU beside others of its layer; 0 for no token.

    tokens, weight_bits, returns  as in cpu_expert_seconds; launches are not in it
    """
    count = _counts(tokens)
    rate = device.memory_bytes_per_s * efficiency.gpu_memory_share
    flop_rate = gpu_flop_per_s(device, weight_bits, efficiency)
    weights = _weight_bytes(shape, weight_bits)
    return _larger(count, weights / rate, 2.0 * shape.n_params / flop_rate)


def gpu_flop_per_s(
    device: Device, weight_bits: float, efficiency: HostEfficiency = DEFAULT_HOST
) -> float:
    """FLOP/s that a GPU reaches with many tokens, for weights of so many bits.

    The 8-bit peak counts where the engine multiplies in 8 bits and the device can: int8 for weights
    that are quantised beside their activations, fp8 for weights stored so.
    """
    wide = device.peak_flop_per_s("bf16" if "bf16" in device.flop_per_s else "fp16")
    peak = wide
    if efficiency.gpu_eight_bit == "always" and weight_bits < 16:
        peak = device.flop_per_s.get("int8", wide)
    elif efficiency.gpu_eight_bit == "weights" and 8 <= weight_bits < 9:
        peak = device.flop_per_s.get("fp8", wide)
    return peak * efficiency.gpu_compute_share


def copy_seconds(
    link_bytes_per_s: float,
    n_bytes: Work,
    efficiency: HostEfficiency = DEFAULT_HOST,
    pinned: bool = True,
) -> Floats:
    """Seconds of copies between host and device, each of n_bytes alone; 0 bytes cost 0 s.

    link_bytes_per_s  nominal rate of the link, one direction (Device.host_link_bytes_per_s)
    pinned            False: the driver stages the copy through a buffer of its own
    """
    if not link_bytes_per_s > 0:
        raise HardwareError(f"link_bytes_per_s={link_bytes_per_s} must be > 0")
    size = _counts(n_bytes)
    rate = link_bytes_per_s * efficiency.pinned_share
    if not pinned:
        rate = min(rate, efficiency.unpinned_bytes_per_s)
    return np.where(size > 0, efficiency.copy_s + size / rate, 0.0)


def gather_seconds(
    host: Device,
    link_bytes_per_s: float,
    n_bytes: Work,
    n_links: int = 1,
    efficiency: HostEfficiency = DEFAULT_HOST,
) -> Floats:
    """Seconds to stream one expert of n_bytes to n_links GPUs, each taking its part.

    The host gathers experts in a pinned buffer while the ones before are copied, so the slower of
    the two counts: DRAM is read, written and read again by the copy. copy_s is paid once an expert.
    """
    if n_links < 1 or not link_bytes_per_s > 0:
        raise HardwareError(
            f"n_links={n_links} and link_bytes_per_s={link_bytes_per_s} must be >= 1 and > 0"
        )
    size = _counts(n_bytes)
    links = link_bytes_per_s * efficiency.pinned_share * n_links
    rate = min(links, host.memory_bytes_per_s * efficiency.staging_share)
    return np.where(size > 0, efficiency.copy_s + size / rate, 0.0)


def drive_seconds(
    drive: Link,
    n_bytes: Work,
    efficiency: HostEfficiency = DEFAULT_HOST,
    page_faults: bool = False,
) -> Floats:
    """Seconds to read experts from a drive, one read at a time; 0 bytes cost 0 s.

    page_faults  a mapped file that is read when it is touched, in place of reads of a whole expert
    """
    size = _counts(n_bytes)
    share = efficiency.page_fault_share if page_faults else efficiency.drive_share
    return np.where(size > 0, drive.latency_s + size / (drive.bytes_per_s * share), 0.0)


def with_memory_rate(host: Device, bytes_per_s: float) -> Device:
    """The host with another nominal DRAM bandwidth: fewer channels in use, other modules."""
    return replace(host, memory_bytes_per_s=bytes_per_s)


def _counts(work: Work) -> Floats:
    found = np.asarray(work, dtype=np.float64)
    if not (np.isfinite(found) & (found >= 0)).all():
        raise HardwareError(f"work must be finite and >= 0, found {found.min()}")
    return found


def _weight_bytes(shape: ExpertShape, weight_bits: float) -> float:
    if not 0 < weight_bits <= 32:
        raise HardwareError(f"weight_bits={weight_bits} must be in (0, 32]")
    return shape.n_params * weight_bits / 8


def _larger(count: Floats, weight_s: float, token_s: float) -> Floats:
    return np.where(count > 0, np.maximum(weight_s, count * token_s), 0.0)
