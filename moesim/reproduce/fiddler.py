"""Fiddler (arXiv 2402.07033): experts that do not fit the GPU are multiplied on the CPU.

The most popular experts stay on the GPU. Of the others, the CPU takes those with few tokens, the
GPU those with many, after a copy: the code charges 7 a token on the CPU and 70 a copy, tries every
assignment of a layer's experts and takes the one with the least sum, which is a threshold of ten
tokens. Its two baselines move experts, or all of a layer, for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box, load_box
from hwmodels.device import Device
from hwmodels.devices import load_device
from hwmodels.host_costs import HostEfficiency, host_bytes_per_s, host_efficiency
from moesim.offload.decisions import ON_CPU, RESIDENT
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, prices
from moesim.offload.simulate import OffloadResult, run, simulate
from moesim.policies.dispatch import by_threshold
from moesim.policies.prefetch import next_gate_recall, oracle
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.mixtral_offloading import (
    first_passes,
    half_precision,
    swap_cache,
    whole_layer_run,
)
from moesim.reproduce.sources import Sources
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.models import load_model
from traces.routing import DECODE, PREFILL, RoutingTrace
from traces.synth import stream, uniform_trace

NAME = "fiddler"
PAPER = "Fiddler, arXiv 2402.07033 (ICLR 2025)"

Flags = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]

CPU_COST, COPY_COST = 7, 70  # of src/fiddler/mixtral.py: a token on the CPU, a copy to the GPU
THRESHOLD = COPY_COST / CPU_COST
N_ON_GPU = 56  # of 256 experts, 24 GB
MOST_PASSES = 600  # decoded, of a trace
LENGTHS_IN, LENGTHS_OUT = (16, 32, 64, 128), (16, 32, 64, 128, 256, 512)
_BAND = 0.15
_HOW = "placement by counts of the trace's even requests, run on its odd ones"
_HOST = (
    "; rooflines, hosts stand in for the paper's, which the catalogue has not: the L4's is a Xeon"
    " 5220R of the same generation, the Quadro's two 6126 have two sockets of 128 GB/s; the CPU"
    " reads at 0.73 of nominal bandwidth (0.40 on two sockets), while 7 ms for an expert's 352 MB,"
    " the code's own constant, are 0.39 of one socket's: rooflines flatter its CPU kernel"
)
_CODE = (
    "; 7 ms a token and expert on the CPU, 70 ms a copy: the code's constants read as ms, one pair"
    " for every machine"
)
_SWAP = (
    "; baseline as Fiddler's benchmark sets it up: 16 bits, one expert a layer on the GPU, no"
    " guesses; every swap copies the expert that leaves back on the same stream"
)
_WHOLE = "; baseline copies all experts of a layer from pinned memory when its turn comes"
_HONEST = (
    "; honest baseline: 56 slots as two in each of 28 layers, LRU with next-gate prefetch, misses"
    " on whichever side ends sooner; a copy lasts as long as four experts on the CPU (L4) or eight"
    " (Quadro), so moving experts while decoding does not pay, as Fiddler says"
)


@dataclass(frozen=True, slots=True)
class Setup:
    """One machine and one way of pricing it, with the work of the trace on it.

    decode    passes of one token
    prefill   passes of so many prompt tokens, by their number
    pinned    bool[256], experts on the GPU, by popularity in other requests
    """

    name: str
    box: Box
    decode: LayerSteps
    prefill: Mapping[int, LayerSteps]
    pinned: Flags
    code_costs: bool = False

    def priced(self, work: LayerSteps) -> Prices:
        """Prices of work here."""
        found = prices(load_model("mixtral-8x7b"), self.box, work)
        return in_code_milliseconds(found) if self.code_costs else found

    def fiddler(self, work: LayerSteps) -> OffloadResult:
        """Its run."""
        policy = OffloadPolicy(
            pinned=self.pinned, on_miss="threshold", threshold_tokens=THRESHOLD, budget=0
        )
        return simulate(work, self.priced(work), policy)

    def swapping(self, work: LayerSteps) -> OffloadResult:
        """The run of mixtral-offloading in 16 bits with one expert a layer."""
        return run(work, swap_cache(work, 1, units=2), self.priced(work))

    def whole_layers(self, work: LayerSteps) -> OffloadResult:
        """The run of an engine that copies whole layers."""
        return whole_layer_run(work, self.priced(work))

    def honest(self, work: LayerSteps, seed: int, ahead: int) -> OffloadResult:
        """The run of the honest baseline with as many experts on the GPU."""
        slots = np.where(np.arange(work.n_layers) < N_ON_GPU // 2, 2, 0)
        policy = OffloadPolicy(cache="lru", slots=slots, on_miss="hss", budget=ahead)
        named = oracle(work, next_gate_recall("mixtral-8x7b", work.n_layers), seed=seed)
        return simulate(work, self.priced(work), policy, named)


def claims(sources: Sources) -> list[Claim]:
    """The rule, the placement, tokens/s on two machines, and the ratios to two baselines."""
    trace, tier, note = _trace(sources)
    found = [*_rule(sources.seed)]
    if tier == "B":
        found += _hit_rates(trace, sources.seed)
    work = _work(trace)
    found += _tokens_per_s(work, (tier, note))
    for name, swap, whole in (("L4", 10.1, 22.5), ("Quadro RTX 6000", 8.2, 19.4)):
        found += _ratios(work, name, (swap, whole), (tier, note))
    found += _honest(work, (tier, note), sources.seed)
    return found


def _trace(sources: Sources) -> tuple[RoutingTrace, Tier, str]:
    """The captured trace where it holds what is needed, else even draws."""
    trace = sources.captured("mixtral-8x7b-mtbench")
    if trace is not None and _is_enough(trace):
        return trace, "B", f"captured MT-bench trace, {_HOW}"
    return uniform_trace(4096, 32, 8, 2, sources.seed), "C", f"even synthetic routing, {_HOW}"


def _is_enough(trace: RoutingTrace) -> bool:
    """Whether requests to count and to run are there, the latter with a long prompt and answers."""
    odd = trace.rows(~_even(trace))
    if not {PREFILL, DECODE} <= set(odd.phase.tolist()) or odd.n_tokens == trace.n_tokens:
        return False
    return int(forward_passes(odd, phase="prefill").tokens.max()) >= max(LENGTHS_IN)


# --- the rule -------------------------------------------------------------------------------------


def enumerated_costs(tokens: Longs, there: Flags) -> npt.NDArray[np.int64]:
    """Least cost of a layer over all assignments of its experts to CPU and GPU.

    tokens, there  int64 and bool [cases, experts]: tokens of each, and whether it is on the GPU
    returns        int64[cases]
    source         efeslab/fiddler src/fiddler/mixtral.py: costs of both sides are added up
    """
    n = tokens.shape[1]
    on_gpu = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
    gpu = np.where(there, 0, COPY_COST)
    cost = gpu @ on_gpu.T + (CPU_COST * tokens) @ (1 - on_gpu).T
    return np.asarray(cost.min(axis=1), dtype=np.int64)


def threshold_costs(tokens: Longs, there: Flags) -> npt.NDArray[np.int64]:
    """The same when the simulator's threshold of ten tokens decides: int64[cases]."""
    found = np.zeros(len(tokens), np.int64)
    for case, (row, here) in enumerate(zip(tokens.tolist(), there.tolist(), strict=True)):
        places = by_threshold(row, here, THRESHOLD)
        cost = {RESIDENT: 0, ON_CPU: CPU_COST}
        found[case] = sum(
            cost[place] * n if place in cost else COPY_COST
            for n, place in zip(row, places, strict=True)
        )
    return found


def _rule(seed: int) -> Iterator[Claim]:
    rng = stream(seed, "fiddler rule")
    tokens = rng.integers(0, 24, (2000, 8))
    there = rng.random((2000, 8)) < N_ON_GPU / 256
    worse = int((threshold_costs(tokens, there) != enumerated_costs(tokens, there)).sum())
    note = "2,000 random layers, 0 to 23 tokens an expert; at ten tokens both cost the same"
    yield _row(
        "layers where the threshold costs more than the best of 2^8", 0, worse, 0.0, note, "A"
    )
    alone = [n for n in range(1, 24) if by_threshold([n], [False], THRESHOLD)[0] == ON_CPU]
    claim = "most tokens of an absent expert that the CPU takes"
    yield _row(claim, 9, max(alone), 0.0, "7 n < 70", "A")


# --- the placement --------------------------------------------------------------------------------


def popular_experts(trace: RoutingTrace, rows: Flags, n: int) -> Flags:
    """bool[layers * experts]: the n experts chosen most often in those rows, over all layers."""
    layer = np.arange(trace.n_layers)[:, None] * trace.n_experts
    count = np.bincount(
        (trace.topk[rows] + layer).ravel(), minlength=trace.n_layers * trace.n_experts
    )
    marked = np.zeros(len(count), np.bool_)
    marked[np.argsort(-count, kind="stable")[:n]] = True
    return marked


def _even(trace: RoutingTrace) -> Flags:
    return np.asarray(trace.request % 2 == 0)


def _hit_rates(trace: RoutingTrace, seed: int) -> Iterator[Claim]:
    odd = trace.rows(~_even(trace))
    chosen = odd.topk + np.arange(trace.n_layers)[:, None] * trace.n_experts
    popular = popular_experts(trace, _even(trace), N_ON_GPU)
    anywhere = np.zeros_like(popular)
    anywhere[stream(seed, "fiddler placement").permutation(len(popular))[:N_ON_GPU]] = True
    note = f"captured MT-bench trace in place of ShareGPT, {_HOW}; band: 3 points, tier B"
    for label, marked, published in (("popular", popular, 25.2), ("random", anywhere, 21.9)):
        hit = 100 * float(marked[chosen].mean())
        band = (published - 3, published + 3)
        yield Claim(
            NAME, f"hit rate, 56 {label} of 256 experts on the GPU, %", published, hit, *band,
            "B", "paper", note,
        )  # fmt: skip


# --- tokens/s -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Work:
    decode: LayerSteps
    prefill: Mapping[int, LayerSteps]
    pinned: Flags


def _work(trace: RoutingTrace) -> _Work:
    """Decode and prefill passes of the odd requests; popular experts of the even ones."""
    odd = trace.rows(~_even(trace))
    decode = first_passes(forward_passes(odd, phase="decode"), MOST_PASSES)
    prompts = odd if (odd.phase == PREFILL).any() else replace(odd, phase=np.zeros_like(odd.phase))
    return _Work(
        layer_steps(odd, decode),
        MappingProxyType({n: _prompts(prompts, n) for n in LENGTHS_IN}),
        popular_experts(trace, _even(trace), N_ON_GPU),
    )


def _prompts(trace: RoutingTrace, n: int) -> LayerSteps:
    """Passes of n prompt tokens, 16 of them at most."""
    cut = forward_passes(trace, phase="prefill", chunk_tokens=n)
    whole = np.flatnonzero(cut.tokens == n)[:16]
    rows = np.concatenate([cut.rows[cut.start[p] : cut.start[p + 1]] for p in whole])
    passes = replace(
        cut,
        rows=rows,
        start=n * np.arange(len(whole) + 1),
        phase=cut.phase[whole],
        context=np.zeros(len(whole)),
        requests=cut.requests[whole],
    )
    return layer_steps(trace, passes)


def setup(name: str, work: _Work, code_costs: bool = False) -> Setup:
    """One of the paper's two machines with the work."""
    box = _box("l4", host_of("xeon-gold-5220r", 1)) if name == "L4" else _quadro()
    return Setup(name, box, work.decode, work.prefill, work.pinned, code_costs)


def _quadro() -> Box:
    numa = host_efficiency("ktransformers-0.2").numa_share
    host = replace(host_of("xeon-gold-5220r", 2), name="2x xeon-gold-6126")
    return _box("quadro-rtx-6000", host, HostEfficiency(numa_share=numa))


def host_of(name: str, sockets: int) -> Device:
    """All sockets of a host of the catalogue as one device."""
    device = load_device(name)
    peaks = {dtype: rate * sockets for dtype, rate in device.flop_per_s.items()}
    return replace(
        device,
        memory_bytes_per_s=sockets * device.memory_bytes_per_s,
        flop_per_s=MappingProxyType(peaks),
    )


def _box(device: str, host: Device, efficiency: HostEfficiency | None = None) -> Box:
    how = efficiency or HostEfficiency()
    box = half_precision(load_box(device, efficiency=how))
    together = max(host_bytes_per_s(host, how), box.copy_bytes_per_s)
    return replace(box, host=host, dram_bytes_per_s=1.083 * together)


def in_code_milliseconds(found: Prices) -> Prices:
    """Prices with the code's 7 and 70 as milliseconds in place of rooflines of host and link."""
    tokens = np.arange(len(found.cpu_s), dtype=np.float64)
    copy = found.unit_bytes / (COPY_COST * 1e-3)
    fast = replace(found.box, copy_bytes_per_s=copy, copy_s=0.0, dram_bytes_per_s=1e15)
    cpu_s = CPU_COST * 1e-3 * tokens
    return replace(found, box=fast, cpu_s=cpu_s, cpu_fixed_s=0.0, cpu_bytes_per_s=1e15)


def rate(decode: OffloadResult, prefill: OffloadResult, n_out: int) -> float:
    """Output tokens/s of one request: its prompt in one pass, then token by token."""
    return n_out / float(prefill.pass_s.mean() + n_out * decode.pass_s.mean())


def rates(decode: OffloadResult, prefill: Mapping[int, OffloadResult]) -> npt.NDArray[np.float64]:
    """The same for every length in and out: float64[settings]."""
    return np.array([rate(decode, prefill[n], out) for n in LENGTHS_IN for out in LENGTHS_OUT])


def _tokens_per_s(work: _Work, source: tuple[Tier, str]) -> Iterator[Claim]:
    tier, routed = source
    at = setup("L4", work)
    decode = at.fiddler(work.decode)
    prefill = {n: at.fiddler(passes) for n, passes in work.prefill.items()}
    note = routed + _HOST
    found = rates(decode, prefill)
    claim = "L4, BF16 in 24 GB: tokens/s, above 3"
    yield Claim(NAME, claim, 3.0, decode.tokens_per_s, 3.0, float("inf"), "C", "paper", note)
    slow = setup("L4", work, code_costs=True).fiddler(work.decode).tokens_per_s
    yield _row("the same from the code's constants", 3.0, slow, _BAND, routed + _CODE, tier, "code")
    read = note + "; published values are read off a plot"
    for n_in, n_out, published in ((16, 16, 2.27), (16, 512, 3.95), (128, 512, 3.65)):
        ours = rate(decode, prefill[n_in], n_out)
        yield _row(f"L4: tokens/s, {n_in} in, {n_out} out", published, ours, _BAND, read, "C")
    note = read + "; the 15 settings are not listed, here all 24 of 16..128 in and 16..512 out"
    yield _row("L4: tokens/s, mean of settings", 2.77, found.mean(), _BAND, note, "C")


def _ratios(
    work: _Work, name: str, published: tuple[float, float], source: tuple[Tier, str]
) -> Iterator[Claim]:
    """Fiddler over its two baselines, priced by rooflines and by the code's constants."""
    for code_costs in (False, True):
        at, plain = setup(name, work, code_costs), setup(name, work)
        ours = at.fiddler(work.decode).tokens_per_s
        note = source[1] + (_CODE if code_costs else _HOST)
        tier: Tier = source[0] if code_costs else "C"
        how = "code" if code_costs else "paper"
        swap = ours / plain.swapping(work.decode).tokens_per_s
        whole = ours / plain.whole_layers(work.decode).tokens_per_s
        mark = ", code's constants" if code_costs else ""
        more = "; published as a mean over lengths, here decoding alone; weak baseline"
        over = f"{name}: over mixtral-offloading{mark}"
        yield _row(over, published[0], swap, _BAND, note + _SWAP + more, tier, how)
        over = f"{name}: over DeepSpeed-MII{mark}"
        yield _row(over, published[1], whole, _BAND, note + _WHOLE + more, tier, how)


def _honest(work: _Work, source: tuple[Tier, str], seed: int) -> Iterator[Claim]:
    for name in ("L4", "Quadro RTX 6000"):
        at = setup(name, work)
        ours = at.fiddler(work.decode).tokens_per_s
        for ahead, mark in ((1, ""), (0, ", nothing loaded ahead")):
            over = ours / at.honest(work.decode, seed, ahead).tokens_per_s
            claim = f"{name}: over the honest baseline{mark}"
            yield _row(claim, None, over, None, source[1] + _HOST + _HONEST, source[0])


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    within: float | None,
    note: str,
    tier: Tier,
    convention: str = "paper",
) -> Claim:
    """within  share of the published figure that the band spans on either side, None for no band"""
    low = high = None
    if within is not None and published is not None:
        low, high = (1 - within) * published, (1 + within) * published
    return Claim(NAME, claim, published, float(simulated), low, high, tier, convention, note)
