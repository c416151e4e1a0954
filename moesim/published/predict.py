"""Seconds of a pass of an offloaded model, from where its weights are and how the engine runs.

A decoding step is, layer by layer: attention and all else that is dense (on the GPU, or on the CPU
when nothing is on the GPU), then the routed experts that the step's tokens choose. Each is
multiplied where it lies: on the GPU beside the CPU, or one after the other, as the engine does. A
layer that leaves no expert to the CPU pays nothing for it: this is why the last tenth of the
experts buys more than any other. Prefill is the same with many tokens at each expert, unless the
engine copies the experts to the GPU first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from hwmodels.cost import ExpertShape
from hwmodels.device import Device
from hwmodels.host_costs import (
    copy_seconds,
    cpu_expert_seconds,
    gather_seconds,
    gpu_expert_seconds,
    gpu_flop_per_s,
    host_bytes_per_s,
    host_flop_per_s,
)
from moesim.errors import SimulationError
from moesim.published.engines import DEFAULT_SKEW, FAULT_BYTES_PER_S, Engine, Skew, engine
from moesim.published.rows import OffloadRow, Placement
from moesim.published.sizes import attention_flop, dense_params, kv_bytes_read
from traces.model import ModelSpec

Floats = npt.NDArray[np.float64]
ROOM_LEFT_BYTES = 1.5e9  # of GPU memory for buffers, when experts fill the rest; assumed


def predicted(row: OffloadRow, how: Engine | None = None, skew: Skew = DEFAULT_SKEW) -> float:
    """The row's metric: tokens/s of all requests, or milliseconds between the tokens of one."""
    run = Run(row, how or engine(row.engine), skew)
    work = row.work
    if work.phase == "prefill":
        return work.tokens * work.sequences / run.prefill_s()
    step_s = run.decode_s()
    return step_s * 1e3 if row.metric == "itl_ms" else work.sequences / step_s


@cache
def popularity(n_experts: int, top_k: int, exponent: float) -> Floats:
    """Chance that a token takes each expert, most popular first: float64[n_experts], sum top_k.

    p_e = min(1, c e^-exponent), with c such that they add up
    """
    weight = np.arange(1, n_experts + 1, dtype=np.float64) ** -exponent
    sure = np.zeros(n_experts, dtype=np.bool_)
    while not sure.all():
        rest = weight * (top_k - sure.sum()) / weight[~sure].sum()
        if rest[~sure].max() <= 1:
            break
        sure |= rest >= 1
    chance: Floats = np.ones(n_experts) if sure.all() else np.where(sure, 1.0, rest)
    chance.flags.writeable = False
    return chance


@dataclass(frozen=True, slots=True)
class Layers:
    """n routed layers of one kind.

    there  share of each expert, most popular first, that is on the device: float64[n_experts]
    """

    n: float
    there: Floats


def placed(model: ModelSpec, placement: Placement, share: float) -> tuple[Layers, ...]:
    """Routed layers by what of them is on the device, for a share of all experts.

    uniform, random         every expert alike, without regard to popularity
    frequency, dynamic      the most popular of every layer
    front- or back-loading  whole layers, and a part of one
    """
    n, n_experts = model.n_moe_layers, model.n_experts
    if placement in ("front-loading", "back-loading"):
        full = int(share * n + 1e-9)
        kinds = [(full, 1.0), (min(1, n - full), share * n - full), (max(0, n - full - 1), 0.0)]
        return tuple(Layers(k, np.full(n_experts, of)) for k, of in kinds if k)
    if placement in ("frequency", "dynamic"):
        ranked = np.clip(share * n_experts - np.arange(n_experts), 0.0, 1.0)
        return (Layers(n, ranked),)
    return (Layers(n, np.full(n_experts, share)),)


@dataclass(frozen=True, slots=True)
class Run:
    """One row on its engine."""

    row: OffloadRow
    how: Engine
    skew: Skew

    @property
    def gpus(self) -> int:
        """GPUs that work on one layer at once."""
        return self.row.machine.n_devices if self.how.tensor_parallel else 1

    @property
    def gpu(self) -> Device:
        """One GPU of the machine; SimulationError for none."""
        if self.row.machine.device is None:
            raise SimulationError(f"row {self.row.name}: no device to run on")
        return self.row.machine.device

    @property
    def cpu(self) -> Device:
        """The host of the machine; SimulationError for none."""
        if self.row.machine.host is None:
            raise SimulationError(f"row {self.row.name}: no host to run on")
        return self.row.machine.host

    @property
    def on_host(self) -> bool:
        """Whether nothing is on a GPU."""
        return self.row.residency.dense == "host"

    @property
    def expert(self) -> ExpertShape:
        """Shape of a routed expert."""
        model = self.row.model
        return ExpertShape(model.hidden_size, model.expert_intermediate_size, model.ffn_matrices)

    @property
    def expert_bytes(self) -> float:
        """Bytes of a routed expert as stored."""
        return self.expert.n_params * self.row.expert_bits / 8

    @property
    def chance(self) -> Floats:
        """Chance of each expert of a layer to be taken by a token.

        As one request chooses, where the pass is of one or the placement follows it; as many do,
        where requests differ or the placement ranks experts by counts of many.
        """
        placement = self.row.residency.placement
        own = placement == "dynamic" or (self.row.work.alike and placement != "frequency")
        exponent = self.skew.own if own else self.skew.static
        return popularity(self.row.model.n_experts, self.row.model.top_k, exponent)

    def kinds(self) -> tuple[Layers, ...]:
        """Routed layers by what of them is on the device."""
        residency = self.row.residency
        share = self.fitting_share() if residency.fill else residency.share
        return placed(self.row.model, residency.placement, share)

    def fitting_share(self) -> float:
        """Share of the routed experts that fits beside the rest of the model and 65,536 tokens."""
        row = self.row
        embedding = row.model.vocab_size * row.model.hidden_size
        rest = (dense_params(row.model) + embedding) * row.dense_bits / 8 + ROOM_LEFT_BYTES
        rest += kv_bytes_read(row.model, 65_536.0, row.kv_bits)
        room = self.gpu.memory_bytes * row.machine.n_devices - rest
        n_experts = row.model.n_moe_layers * row.model.n_experts
        return min(1.0, max(0.0, room / (n_experts * self.expert_bytes)))

    def decode_s(self) -> float:
        """Seconds of one decoding step: one token of every sequence."""
        work = self.row.work
        tokens = float(work.sequences)
        dense = self.dense_s(tokens, self.row.residency.graph) + self.cache_s(work.depth) * tokens
        return dense + sum(kind.n * self.experts_s(kind, tokens) for kind in self.kinds())

    def prefill_s(self) -> float:
        """Seconds of all prompts, in equal passes of at most a micro-batch (or whole prompts)."""
        work = self.row.work
        in_all = work.tokens * work.sequences
        most = work.tokens if self.how.whole_prompts or self.row.residency.copied else None
        n_passes = -(-in_all // (most or min(work.micro_batch, in_all)))
        tokens = in_all / n_passes
        seen = work.depth + work.tokens / 2
        first = self.faults_s() if work.first_pass else 0.0
        return n_passes * self.pass_s(tokens, seen) + first

    def pass_s(self, tokens: float, seen: float) -> float:
        """One pass of prefill over `tokens` queries that see `seen` keys each on average."""
        flop = attention_flop(self.row.model, tokens, seen, self.how.absorbed)
        if self.on_host:
            attention_s = flop / host_flop_per_s(self.cpu, self.how.host)
        else:
            attention_s = flop / (_peak(self.gpu) * self.gpus * self.how.attention_share)
        streams = tokens >= self.row.stream_from and not self.on_host
        routed_s = self.streamed_s if streams else self.experts_s
        experts = sum(kind.n * routed_s(kind, tokens) for kind in self.kinds())
        return self.dense_s(tokens, graph=False) + attention_s + experts

    def dense_s(self, tokens: float, graph: bool) -> float:
        """Everything but attention's core and routed experts: reading weights or arithmetic.

        graph  launched as one CUDA graph, as decoding may be
        """
        model, how = self.row.model, self.how
        n_bytes = dense_params(model) * self.row.dense_bits / 8
        flop = 2.0 * dense_params(model) * tokens
        if self.on_host:
            rates = host_bytes_per_s(self.cpu, how.host), host_flop_per_s(self.cpu, how.host)
            return max(n_bytes / rates[0], flop / rates[1]) + model.n_layers * how.host.dispatch_s
        read_s = n_bytes / (self.gpu.memory_bytes_per_s * how.host.gpu_memory_share)
        flop_rate = gpu_flop_per_s(self.gpu, self.row.dense_bits, how.host)
        busy_s = max(read_s, flop / flop_rate) / self.gpus
        fixed = how.layer_s if graph else how.eager_s
        summed = 2 * how.all_reduce_s if self.gpus > 1 else 0.0
        return busy_s + model.n_layers * (fixed + summed)

    def cache_s(self, context: float) -> float:
        """Reading one sequence's cache in a decoding step."""
        n_bytes = kv_bytes_read(self.row.model, context, self.row.kv_bits)
        if self.on_host:
            return n_bytes / host_bytes_per_s(self.cpu, self.how.host)
        return n_bytes / (self.gpu.memory_bytes_per_s * self.how.kv_share * self.gpus)

    def experts_s(self, kind: Layers, tokens: float) -> float:
        """Routed experts of one layer for a pass of `tokens`, multiplied where they are."""
        if self.row.residency.copied:
            return self.copied_s(kind, tokens)
        left = 1.0 - kind.there
        here = 0.0 if not kind.there.any() else self.on_gpu_s(kind.there, tokens)
        some = self.some(left, tokens)
        if not some:
            return here
        beside = self.on_cpu_s(left, tokens) / some  # when any is left to the CPU at all
        longer = max(here, beside) if self.how.overlap else here + beside
        return some * longer + (1.0 - some) * here

    def some(self, left: Floats, tokens: float) -> float:
        """Chance that the tokens take any of the experts that are not on the device."""
        top_k = self.row.model.top_k
        hit = max(0.0, 1.0 - float(np.sum(self.chance * left)) / top_k)
        return 1.0 - float(hit ** (top_k * tokens))

    def on_gpu_s(self, there: Floats, tokens: float) -> float:
        """Those of the experts on the device that the tokens take."""
        taken, copies = self.taken(tokens)
        host = self.how.host
        each = gpu_expert_seconds(self.gpu, self.expert, copies, self.row.expert_bits, host)
        loop_s = self.how.loop_s * float(there.sum())
        return float(np.sum(taken * there * each)) / self.gpus + loop_s

    def on_cpu_s(self, left: Floats, tokens: float) -> float:
        """Those left to the CPU; what a layer pays once, only when any of them is taken.

        Seconds on average, layers that leave it nothing included.
        """
        host = self.how.host
        taken, copies = self.taken(tokens)
        each = cpu_expert_seconds(self.cpu, self.expert, copies, self.row.expert_bits, host)
        once = 0.0 if self.on_host else host.dispatch_s + host.handshake_s
        paged = self.paged_s(float(np.sum(taken * left)))
        busy = float(np.sum(taken * left * each))
        return self.some(left, tokens) * once + busy + paged

    def paged_s(self, n_taken: float) -> float:
        """Reading taken experts whose pages memory does not hold."""
        machine, model = self.row.machine, self.row.model
        if not self.row.residency.paged:
            return 0.0
        whole = self.expert_bytes * model.n_experts * model.n_moe_layers
        held = np.clip(
            machine.memory_bytes / whole * model.n_experts - np.arange(model.n_experts), 0, 1
        )
        missed = 1.0 - float(np.sum(self.chance * held)) / model.top_k
        rate = machine.drive_bytes_per_s * self.how.host.page_fault_share
        return n_taken * missed * self.expert_bytes / rate

    def copied_s(self, kind: Layers, tokens: float) -> float:
        """Taken experts, copied to the device first where they are not there."""
        taken, _ = self.taken(tokens)
        n_copied = float(np.sum(taken * (1.0 - kind.there)))
        return n_copied * self.copy_s() + self.on_gpu_s(np.ones_like(kind.there), tokens)

    def streamed_s(self, kind: Layers, tokens: float) -> float:
        """All experts of a layer on the device, copied there first where they are not.

        kt-kernel builds a second, whole layer on the device and copies the resident ones too.
        """
        absent = float(np.sum(1.0 - kind.there))
        copies = self.row.model.n_experts if self.how.gather and absent else absent
        busy = self.on_gpu_s(np.ones_like(kind.there), tokens)
        return copies * self.copy_s() + busy

    def copy_s(self) -> float:
        """One expert from host memory to the device, or to all of them, each its part."""
        n_bytes, link, host = self.expert_bytes, self.row.machine.link_bytes_per_s, self.how.host
        if self.how.gather:
            return float(gather_seconds(self.cpu, link, n_bytes, self.gpus, host))
        return float(copy_seconds(link, n_bytes, host, self.how.pinned))

    def faults_s(self) -> float:
        """Page faults of the first pass over experts that stay in a mapped file."""
        if not self.how.mapped:
            return 0.0
        absent = sum(kind.n * float(np.sum(1.0 - kind.there)) for kind in self.kinds())
        return absent * self.expert_bytes / FAULT_BYTES_PER_S

    def taken(self, tokens: float) -> tuple[Floats, Floats]:
        """(chance that some token takes each expert, token copies at it if so)."""
        taken = 1.0 - (1.0 - self.chance) ** tokens
        return taken, tokens * self.chance / np.maximum(taken, 1e-300)


def _peak(device: Device) -> float:
    return device.peak_flop_per_s("bf16" if "bf16" in device.flop_per_s else "fp16")
