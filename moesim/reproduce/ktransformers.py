"""KTransformers (SOSP 2025): attention on the GPU, routed experts on the CPU, some a layer late.

A layer's routed experts are multiplied on the CPU while the GPU does the shared ones. Of the chosen
experts the d with the lowest weights are deferred: their sum joins one layer later, so that the CPU
works through them while the GPU is in the next layer's attention. Experts that stay on the GPU are
chosen by a ratio and a placement; kernels, NUMA and CUDA graphs are claims of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box, load_box
from hwmodels.host_costs import HostEfficiency, host_efficiency
from moesim.lower import offload_kernel
from moesim.lower.offload import Extras
from moesim.offload.built_in import decide_built_in
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import OffloadResult, run, simulate, timeline_of
from moesim.published.engines import engine
from moesim.reproduce.baseline import honest_baseline
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.fiddler import host_of
from moesim.reproduce.mixtral_offloading import calibrated
from moesim.reproduce.sources import Sources
from traces.counting import expert_bytes
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.model import ModelSpec
from traces.models import load_model
from traces.synth import stream, uniform_trace, zipf_trace

NAME = "ktransformers"
PAPER = "KTransformers, SOSP 2025, doi 10.1145/3731569.3764843"

Flags = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]

ON_CPU = OffloadPolicy(on_miss="cpu", budget=0)
MOST_DEFERRED = 4
MANY_LAYERS = 400  # until the slack of the first layer is used up
# The paper's host: two Xeon 8452Y, 220 GB/s measured on each socket of 307 nominal.
LOCAL_BYTES_PER_S, NOMINAL_BYTES_PER_S = 220e9, 307.2e9
AVX_FLOP_PER_S, AMX_FLOP_PER_S, AMX_ROWS = 4.6e12, 21.3e12, 16
DDR_SHARE = 0.73
_BAND = 0.15
_SOSP = (
    "DeepSeek-V3 in 16 bits on an A100 40 GB and two Xeon 8452Y at the published 220 GB/s a socket,"
    " one token at a time; no routing needed, all routed experts are on the CPU"
)
_ZIPF = (
    "synthetic routing, Zipf exponent 0.81, which was fitted on these runs elsewhere (so were"
    " kt-kernel's host constants); seconds of a layer's own work from the row with all experts on"
    " the GPU, of which 35 us for starting experts vanish here once none is on the GPU: measured"
    " rates with experts on both sides are lower"
)


@dataclass(frozen=True, slots=True)
class Published:
    """A published decode rate with all routed experts on the CPU."""

    row: str
    model: str
    bits: float
    host: str
    sockets: int
    tokens_per_s: float


BUSY: Mapping[str, tuple[float, float]] = MappingProxyType({"CPU": (74, 100), "GPU": (28, 37)})
CASES = tuple(
    (gpu, model, bits)
    for gpu, widths in (("a100-40gb", (16.0, 16.0, 16.0)), ("rtx-4080", (4.5, 8.0, 8.0)))
    for model, bits in zip(("deepseek-v3", "deepseek-v2", "qwen2-57b-a14b"), widths, strict=True)
)
# From the table of published runs; bits stored per weight of a routed expert.
DECODED = (
    Published("KT-004", "deepseek-v3", 4.85, "xeon-gold-6454s", 2, 12.208),
    Published("KT-069", "minimax-m2", 8.0, "xeon-platinum-8488c", 2, 21.8),
    Published("KT-081", "minimax-m2", 8.0, "epyc-9355", 2, 32.1),
    Published("KT-093", "qwen3-next-80b-a3b", 8.0, "epyc-9355", 2, 75.9),
    Published("KT-100", "qwen3-next-80b-a3b", 8.0, "xeon-gold-6454s", 2, 53.01),
    Published("KT-178", "deepseek-r1", 2.51, "threadripper-pro-7965wx", 1, 15.1),
)
# Tokens/s of Qwen3-Next-80B-A3B at 0, 10, ... 100 % of the experts on four GPUs, KT-100 to KT-154.
PLACED: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "random": (53.01, 56.63, 58.75, 62.86, 66.81, 70.38, 71.33, 74.4, 79.71, 88.82, 112.61),
        "dynamic": (53.37, 70.22, 74.73, 75.55, 80.98, 81.17, 82.3, 88.7, 92.31, 95.04, 112.99),
    }
)


def claims(sources: Sources) -> list[Claim]:
    """The deferral's closed form, what it gains, and the engine's other claims."""
    return [
        *_identities(),
        *_deferral(),
        *_numa_and_graph(),
        *_kernels(),
        *_bound(),
        *_placements(sources.seed),
    ]


# --- deferral -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of the parts of a layer.

    before   on the GPU up to the gate
    after    on the GPU, beside the routed experts
    expert   of one routed expert on the CPU
    k, d     experts a token takes, and how many of them are deferred
    """

    before: float
    after: float
    expert: float
    k: int = 8
    d: int = 0

    def closed_form(self) -> float:
        """Steady seconds of a layer: the longest of its cycles, GPU alone, CPU alone, and both.

        The handbook prints the first two. The third is a chain: experts that are not deferred wait
        for the gate, and the next gate for them; it counts where deferred ones end sooner than
        the part before the gate.
        """
        now, late = (self.k - self.d) * self.expert, self.d * self.expert
        return max(self.before + self.after, now + late, now + self.before)

    def printed_form(self) -> float:
        """The handbook's: max(t_gpu, t_cpu(k - d) + t_cpu(d of the layer before))."""
        return max(self.before + self.after, self.k * self.expert)


def steady_layer_s(times: LayerTimes) -> float:
    """The same from the simulated timeline, late in a pass of many layers."""
    model = load_model("deepseek-v3")
    trace = uniform_trace(1, MANY_LAYERS, model.n_experts, model.top_k)
    work = layer_steps(trace, forward_passes(trace))
    base = prices(model, load_box("rtx-4090-xeon-6454s"), work)
    priced = replace(
        base,
        first_s=np.zeros(1),
        before_s=np.full(1, times.before),
        after_s=np.full(1, times.after),
        tail_s=np.zeros(1),
        cpu_s=times.expert * np.arange(2, dtype=np.float64),
        cpu_fixed_s=0.0,
        cpu_bytes_per_s=1e30,
    )
    decided = decide_built_in(work, ON_CPU)
    part, timeline = timeline_of(work, decided, priced, 0, Extras(deferred=times.d))
    gate_s = timeline.end_s[part.kind == offload_kernel.DENSE]
    return float(gate_s[-4] - gate_s[-54]) / 50


def _identities() -> Iterator[Claim]:
    cases = {
        "nothing deferred": LayerTimes(1e-3, 5e-4, 5e-4),
        "deferred experts cover attention": LayerTimes(1e-3, 5e-4, 5e-4, d=3),
        "GPU the longer": LayerTimes(3e-3, 2e-3, 1e-4, d=2),
        "deferred experts end before attention": LayerTimes(2e-3, 5e-4, 5e-4, d=1),
    }
    for label, times in cases.items():
        ours, expected = steady_layer_s(times), times.closed_form()
        note = "steady seconds of a layer on the timeline over the longest cycle"
        yield _row(f"layer over its closed form, {label}", 1.0, ours / expected, 0.01, note, "A")
    covered, short = (cases[label] for label in list(cases)[1::2])
    note = "max(t_gpu, t_cpu(k - d) + t_cpu(d)) as the handbook prints it"
    ours = steady_layer_s(covered) / covered.printed_form()
    yield _row("layer over the printed form, attention covered", 1.0, ours, 0.01, note, "A")
    ours = steady_layer_s(short) / short.printed_form()
    note += "; it leaves out that experts wait for the gate, and the next gate for them"
    yield _row("layer over the printed form, attention not covered", 1.0, ours, None, note, "A")


def _decode(model: str, n_tokens: int) -> LayerSteps:
    spec = load_model(model)
    trace = uniform_trace(n_tokens, spec.n_moe_layers, spec.n_experts, spec.top_k)
    return layer_steps(trace, forward_passes(trace))


def paper_box(gpu: str, numa_share: float = 1.0) -> Box:
    """The paper's host beside one GPU."""
    share = LOCAL_BYTES_PER_S / NOMINAL_BYTES_PER_S
    how = HostEfficiency(memory_share=share, numa_share=numa_share)
    rate = 2 * LOCAL_BYTES_PER_S
    box = load_box(gpu, efficiency=how)
    return replace(box, host=host_of("xeon-platinum-8452y", 2), dram_bytes_per_s=rate)


def decoded(model: str, box: Box, weights: Weights, deferred: int = 0) -> OffloadResult:
    """Decoding one token at a time with all routed experts on the CPU."""
    work = _decode(model, 3)
    priced = prices(load_model(model), box, work, weights)
    return run(work, decide_built_in(work, ON_CPU), priced, Extras(deferred=deferred))


def _deferral() -> Iterator[Claim]:
    at = paper_box("a100-40gb")
    done = [decoded("deepseek-v3", at, Weights(16), d) for d in range(MOST_DEFERRED + 1)]
    gain = [result.tokens_per_s / done[0].tokens_per_s for result in done]
    best = int(np.argmax(gain))
    note = f"{_SOSP}; d of 1 to 4 that gains most, first of equals: {best}"
    yield _row("expert deferral over none (KT-165)", 1.33, gain[best], _BAND, note, "B")
    yield _row("the same with the default of 2", 1.33, gain[2], _BAND, _SOSP, "B")
    busy = _SOSP + "; CPU threads wait once a layer for 50 us, GPU kernels at their formulas"
    for unit, label in ((2, "CPU"), (0, "GPU")):
        for run_, published, when in zip(
            (done[0], done[best]), BUSY[label], ("no", "with"), strict=True
        ):
            ours = 100 * run_.busy_s[unit] / run_.seconds
            yield _row(f"{label} busy, {when} deferral, %", published, ours, _BAND, busy, "B")
    gains = {(m, gpu): best_gain(m, gpu, bits) for gpu, m, bits in CASES}
    most = max(gains, key=gains.__getitem__)
    note = (
        "of DeepSeek-V3, DeepSeek-V2 and Qwen2-57B, in 16 bits on an A100 and quantised on an RTX"
        f" 4080, up to four deferred; here {most[0]} on the {most[1]}; all but routed experts in 16"
        " or 8 bits"
    )
    yield _row("expert deferral at most, over none", 1.45, gains[most], _BAND, note, "C")


def best_gain(model: str, gpu: str, bits: float) -> float:
    """Largest gain of deferring one to four experts."""
    weights = Weights(bits, dense_bits=16 if bits == 16 else 8)
    rates = [
        decoded(model, paper_box(gpu), weights, d).tokens_per_s for d in range(MOST_DEFERRED + 1)
    ]
    return max(rates) / rates[0]


# --- NUMA, graphs, kernels, bound -----------------------------------------------------------------


def _numa_and_graph() -> Iterator[Claim]:
    share = host_efficiency("ktransformers-0.2").numa_share
    rates = [
        decoded("deepseek-v3", paper_box("a100-40gb", numa), Weights(16)).tokens_per_s
        for numa in (1.0, share)
    ]
    note = (
        f"{_SOSP}; experts cut over the sockets against threads that read {share:.2f} of the rate,"
        " as fitted on another version and machine"
    )
    yield _row(
        "NUMA tensor parallel over none, decode", 1.63, rates[0] / rates[1], _BAND, note, "C"
    )
    fitted = engine("ktransformers-0.2")
    for label, saved_s in (
        ("launches as fitted on KT/uberg-cg", fitted.eager_s - fitted.layer_s),
        ("103 us a layer, an 8B model on H100", (8.4e-3 - 5.1e-3) / 32),
    ):
        gain = 100 * (graph_gain(saved_s) - 1)
        note = f"DeepSeek-V3 4.85 bits on an RTX 4090 and two Xeon 6454S; {label}; band: above 20"
        yield Claim(
            NAME, f"CUDA graph over none, %, {label}", 20.0, gain, 20.0, float("inf"), "C", "paper",
            note,
        )  # fmt: skip


def graph_gain(saved_s: float) -> float:
    """Decoding speed with a CUDA graph over that without, when it saves so much in a layer."""
    box = load_box("rtx-4090-xeon-6454s", efficiency=host_efficiency("ktransformers-0.2"))
    model, work = load_model("deepseek-v3"), _decode("deepseek-v3", 3)
    with_graph = prices(model, box, work, Weights(4.85, dense_bits=8))
    dense_layers = model.n_layers - model.n_moe_layers
    without = replace(
        with_graph,
        first_s=with_graph.first_s + dense_layers * saved_s,
        before_s=with_graph.before_s + saved_s,
    )
    decided = decide_built_in(work, ON_CPU)
    return run(work, decided, without).seconds / run(work, decided, with_graph).seconds


def kernel_switch_tokens() -> int:
    """Fewest tokens at an expert where AMX multiplies sooner: it pads to 16 rows, AVX does not."""
    tokens = np.arange(1, 65)
    amx = AMX_ROWS * -(-tokens // AMX_ROWS) / AMX_FLOP_PER_S
    return int(tokens[tokens / AVX_FLOP_PER_S > amx][0])


def _kernels() -> Iterator[Claim]:
    note = (
        "one socket's sustained 21.3 TFLOPS with tiles of 16 rows against 4.6 in AVX-512 vectors"
        " (peak, recalled); the engine switches above 4, so from 5; band: half to twice that"
    )
    ours = kernel_switch_tokens()
    claim = "tokens at an expert from which AMX is used"
    yield Claim(NAME, claim, 5.0, ours, 2.5, 10.0, "C", "arithmetic alone", note)
    read = AVX_FLOP_PER_S / LOCAL_BYTES_PER_S
    note = "16-bit weights read at 220 GB/s: below this both kernels wait for memory"
    yield _row("tokens at an expert where AVX-512 outlasts the reads", None, read, None, note, "C")


def bound_tokens_per_s(row: Published) -> float:
    """Most tokens/s that memory allows: bandwidth times 0.73 over active routed bytes."""
    model = load_model(row.model)
    active = model.n_moe_layers * model.top_k * expert_bytes(model, row.bits)
    return host_of(row.host, row.sockets).memory_bytes_per_s * DDR_SHARE / active


def _bound() -> Iterator[Claim]:
    shares = {row.row: row.tokens_per_s / bound_tokens_per_s(row) for row in DECODED}
    worst = max(shares, key=shares.__getitem__)
    note = f"of {len(shares)} rows with all routed experts on the CPU; the nearest is {worst}"
    claim = "published decode rate over bandwidth x 0.73 / active routed bytes, highest"
    yield Claim(NAME, claim, None, shares[worst], 0.0, 1.0, "C", "handbook", note)


# --- ratio of experts on the GPU ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sweep:
    """Qwen3-Next-80B-A3B on four RTX 4090 and two Xeon 6454S.

    work    tokens that are timed
    counts  float64[n_objects], how often each expert was chosen in tokens before those
    """

    model: ModelSpec
    work: LayerSteps
    counts: Doubles
    priced: Prices
    seed: int

    def pinned(self, ratio: float, placement: str) -> Flags:
        """bool[n_objects]: experts on the GPUs."""
        score = self.counts
        if placement == "random":
            score = stream(self.seed, "ktransformers placement").random(self.work.n_objects)
        marked = np.zeros(self.work.n_objects, np.bool_)
        marked[np.argsort(-score, kind="stable")[: round(ratio * len(marked))]] = True
        return marked

    def rate(self, ratio: float, placement: str) -> float:
        """Tokens/s."""
        policy = OffloadPolicy(pinned=self.pinned(ratio, placement), on_miss="cpu", budget=0)
        return simulate(self.work, self.priced, policy).tokens_per_s


def sweep(seed: int, n_tokens: int = 96) -> Sweep:
    """Half of a synthetic request to rank experts by, half to time."""
    model = load_model("qwen3-next-80b-a3b")
    trace = zipf_trace(
        2 * n_tokens, model.n_moe_layers, model.n_experts, model.top_k, 0.81, seed=seed
    )
    before, after = (
        layer_steps(part, forward_passes(part))
        for part in (trace.rows(slice(0, n_tokens)), trace.rows(slice(n_tokens, None)))
    )
    box = load_box("rtx-4090x4-xeon-6454s", efficiency=host_efficiency("kt-kernel"))
    base = prices(model, box, after, Weights(8, dense_bits=8))
    everything = decide_built_in(after, OffloadPolicy(pinned=np.ones(after.n_objects, np.bool_)))
    priced = calibrated(after, everything, base, 1 / PLACED["random"][-1])
    counts = np.bincount(before.objects(), minlength=before.n_objects).astype(np.float64)
    return Sweep(model, after, counts, priced, seed)


def _placements(seed: int) -> Iterator[Claim]:
    from scipy.stats import kendalltau

    at, ratios = sweep(seed), np.linspace(0, 1, 11)
    found = {
        placement: np.array([at.rate(ratio, placement) for ratio in ratios]) for placement in PLACED
    }
    for placement, ours in found.items():
        published = np.array(PLACED[placement])
        tau = kendalltau(ours, published).statistic
        error = 100 * np.median(np.abs(ours / published - 1)[:-1])
        claim = f"experts on the GPU, 0 to 100 %, {placement}"
        yield Claim(NAME, f"{claim}: Kendall's tau", None, tau, 0.8, 1.0, "C", "paper", _ZIPF)
        claim = f"{claim}: median error, %"
        yield Claim(NAME, claim, None, error, 0.0, 20.0, "C", "paper", _ZIPF + "; 0 to 90 %")
    random, dynamic = (np.array(PLACED[name]) for name in ("random", "dynamic"))
    ours = found["dynamic"][1] / found["random"][1]
    yield _row("dynamic over random at 10 %", dynamic[1] / random[1], ours, _BAND, _ZIPF, "C")
    ours = found["random"][10] / found["random"][9]
    note = _ZIPF + "; without any expert on the CPU a layer waits for none"
    yield _row("random: 100 % over 90 %", random[10] / random[9], ours, _BAND, note, "C")
    slots = round(0.1 * at.model.n_experts)
    honest = honest_baseline(at.work, at.priced, slots, seed=seed).tokens_per_s
    note = _ZIPF + "; honest baseline with 51 slots a layer, a tenth of the experts"
    yield _row("dynamic at 10 % over the honest baseline", None, found["dynamic"][1] / honest,
               None, note, "C")  # fmt: skip


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    within: float | None,
    note: str,
    tier: Tier,
) -> Claim:
    """within  share of the published figure that the band spans on either side, None for no band"""
    low = high = None
    if within is not None and published is not None:
        low, high = (1 - within) * published, (1 + within) * published
    return Claim(NAME, claim, published, float(simulated), low, high, tier, "paper", note)
