"""Whole runs of systems that stream weights: prefill, decode steps and tokens per second.

The boxes are those on which MoE-Lightning, FlexGen and MoE-Lens were measured, from the catalogue
and from constants that are named here with their source. A decode step comes from the engine
(`moesim/lower/streamed.py`), prefill from a closed form, since it is bound by one resource.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from hwmodels.cost import DEFAULT_EFFICIENCY
from hwmodels.device import Device
from hwmodels.devices import load_device
from hwmodels.units import parse
from moesim.lower.streamed import cgopipe, iteration_time, micro_step, whole_batch, zigzag
from planners.flexgen import FlexgenProblem, FlexgenRates, flexgen_terms
from planners.streamed import LayerShape, Lengths, StreamBox, StreamedPolicy, prefill_layer

GIB = float(2**30)
# What a cloud T4 reports of its 16 GiB; MoE-Lightning's and FlexGen's code use it.
T4_MEMORY_BYTES = parse("15 GiB", "B")
# Reached by large products on a cloud T4: fitted by FlexGen's authors (FlexgenRates.mm_prefill).
T4_FLOP_PER_S = FlexgenRates().mm_prefill
# MoE-Lightning's artifact has 104 TFLOP/s for an L4 and 16 GiB/s for its link, of 32 nominal.
L4_FLOP_PER_S = 104e12 * DEFAULT_EFFICIENCY.compute_share
L4_LINK_BYTES_PER_S = parse("16 GiB/s", "B/s")
# Cloud CPUs of 24 or 32 threads: launch flag and hardware table of MoE-Lightning's artifact.
CLOUD_DRAM_BYTES_PER_S = parse("100 GB/s", "B/s")
T4_CPU_FLOP_PER_S, L4_CPU_FLOP_PER_S = 0.8e12, 1.6e12
CLOUD_HOST_BYTES = parse("192 GiB", "B")
LARGE_HOST_BYTES, LARGE_THREADS = parse("416 GiB", "B"), 32
# Copies out of memory that is not pinned (handbook's link notes); MoE-Lightning's artifact copies
# weights into a pinned buffer with one thread per process.
STAGING_BYTES_PER_S = parse("10 GB/s", "B/s")
# MoE-Lens' A40: large products reach what gives its T_GPU on Mixtral 8x7B.
A40_GPU_TOKENS_PER_S = 3600.0
LENS_THREADS = 20  # CPU attention of MoE-Lens saturates beyond


def t4_box(n_gpus: int = 1) -> StreamBox:
    """The cloud machine with T4s: 24 threads and 192 GiB, or 32 and 416 GiB for several."""
    return _cloud_box(
        load_device("t4"),
        (T4_MEMORY_BYTES, T4_FLOP_PER_S, FlexgenRates().host_to_gpu, T4_CPU_FLOP_PER_S),
        n_gpus,
    )


def l4_box() -> StreamBox:
    """The cloud machine with one L4, 24 threads and 192 GiB."""
    gpu = load_device("l4")
    figures = (float(gpu.memory_bytes), L4_FLOP_PER_S, L4_LINK_BYTES_PER_S, L4_CPU_FLOP_PER_S)
    return _cloud_box(gpu, figures, 1)


def _cloud_box(gpu: Device, figures: tuple[float, float, float, float], n_gpus: int) -> StreamBox:
    return StreamBox(
        name=gpu.name,
        gpu_flop_per_s=figures[1],
        gpu_bytes_per_s=gpu.memory_bytes_per_s * DEFAULT_EFFICIENCY.memory_share,
        gpu_memory_bytes=figures[0],
        link_bytes_per_s=figures[2],
        cpu_flop_per_s=figures[3],
        dram_bytes_per_s=CLOUD_DRAM_BYTES_PER_S,
        host_memory_bytes=CLOUD_HOST_BYTES if n_gpus == 1 else LARGE_HOST_BYTES,
        cpu_threads=24 if n_gpus == 1 else LARGE_THREADS,
    )


def a40_box(shape: LayerShape, gpu_memory_bytes: float = 16e9) -> StreamBox:
    """MoE-Lens' machine: an A40 held to 16 GB and a Xeon Platinum 8380.

    shape  of Mixtral 8x7B: the GPU's FLOP/s are what makes it 3,600 tokens/s
    """
    gpu, cpu = load_device("a40"), load_device("xeon-platinum-8380")
    return StreamBox(
        name="a40",
        gpu_flop_per_s=A40_GPU_TOKENS_PER_S * shape.token_flops * shape.n_layers,
        gpu_bytes_per_s=gpu.memory_bytes_per_s * DEFAULT_EFFICIENCY.memory_share,
        gpu_memory_bytes=gpu_memory_bytes,
        link_bytes_per_s=_figure(gpu, "host_link.bandwidth_achieved"),
        cpu_flop_per_s=cpu.peak_flop_per_s("fp32"),
        dram_bytes_per_s=_figure(cpu, "memory.bandwidth_achieved"),
        host_memory_bytes=float(cpu.memory_bytes),
        cpu_threads=LENS_THREADS,
    )


def _figure(device: Device, key: str) -> float:
    """A catalogue figure that Device has no field for."""
    return (device.figures or {})[key].value


@dataclass(frozen=True, slots=True)
class RunTime:
    """Seconds of a batch: prefill, then one step for each generated token."""

    batch: int
    output: float
    prefill_s: float
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over all seconds, as MoE-Lightning and FlexGen count."""
        return self.batch * self.output / (self.prefill_s + self.output * self.step_s)


def lightning_run(
    shape: LayerShape, box: StreamBox, lengths: Lengths, policy: StreamedPolicy, n_gpus: int = 1
) -> RunTime:
    """MoE-Lightning: CGOPipe, weights staged out of pageable memory, in prefill too."""
    staged = replace(box, staging_bytes_per_s=STAGING_BYTES_PER_S * n_gpus)
    step = micro_step(shape, staged, lengths, policy)
    each = iteration_time(lambda n: cgopipe(step, staged, n), shape.n_layers).seconds
    slow = replace(box, link_bytes_per_s=min(box.link_bytes_per_s, staged.staging_bytes_per_s))
    prefill = float(prefill_layer(shape, slow, lengths, policy).total_s) * shape.n_layers
    return RunTime(int(policy.batch), lengths.output, prefill, each)


def flexgen_rates(box: StreamBox) -> FlexgenRates:
    """FlexGen's fitted rates with the box's link, large products and GPU memory."""
    return FlexgenRates(
        host_to_gpu=box.link_bytes_per_s,
        mm_prefill=box.gpu_flop_per_s,
        gpu_bytes_per_s=box.gpu_bytes_per_s,
    )


def flexgen_run(
    shape: LayerShape, box: StreamBox, lengths: Lengths, policy: StreamedPolicy
) -> RunTime:
    """FlexGen, or FlexGen(c) for a policy with attention on the CPU: the zig-zag schedule.

    Attention runs at FlexGen's fitted rates, on the GPU and on the CPU; weights are pinned.
    """
    rates, on_gpu = flexgen_rates(box), policy.attention_on_gpu
    cpu = rates.cpu_flop_per_s(policy.micro_batch, shape.hidden_bytes / 2)
    step = micro_step(shape, replace(box, cpu_flop_per_s=cpu), lengths, policy)
    if on_gpu:
        flops = policy.batch / step.n_micro * lengths.mean_context * shape.score_flops
        step = replace(step, scores_s=max(step.scores_s, flops / rates.bmm_generate))
    each = iteration_time(lambda n: zigzag(step, box, n), shape.n_layers).seconds
    problem = FlexgenProblem(
        shape, lengths, box.gpu_memory_bytes, box.host_memory_bytes, 0.0, rates,
        cpu_attention=not on_gpu,
    )  # fmt: skip
    resident = policy.weights_share
    shares = np.array([[resident, 1 - resident, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    terms = flexgen_terms(problem, policy.batch, policy.micro_batch, shares)
    prefill = float(terms.prefill_s.max()) * shape.n_layers
    return RunTime(int(policy.batch), lengths.output, prefill, each)


def zero_run(shape: LayerShape, box: StreamBox, lengths: Lengths, batch: int) -> RunTime:
    """ZeRO-Inference: the whole batch at once, KV cache on the GPU, weights pinned."""
    policy = StreamedPolicy(batch, batch, attention_on_gpu=True, kv_share=1.0)
    step = micro_step(shape, box, lengths, policy)
    each = iteration_time(lambda n: whole_batch(step, box, n), shape.n_layers).seconds
    prefill = float(prefill_layer(shape, box, lengths, policy).total_s) * shape.n_layers
    return RunTime(batch, lengths.output, prefill, each)


def kv_pages(kv_bytes: float, kv_token_bytes: float, page_tokens: int) -> int:
    """Whole pages in a KV budget."""
    return math.floor(kv_bytes / kv_token_bytes / page_tokens)
