"""llama.cpp: whole layers of experts on the CPU (`--n-cpu-moe`, `-ot`), the rest on the GPU.

Nothing is cached and nothing moves while a token is decoded: its time is the bytes it reads, each
at the rate of the memory they lie in. A prompt's batch of 32 tokens and more has its experts copied
to the GPU, all of a layer at a time. Weights are a mapped file: what memory does not hold is read
by page faults.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box, load_box
from hwmodels.cost import ExpertShape
from hwmodels.host_costs import (
    gpu_expert_seconds,
    gpu_flop_per_s,
    host_bytes_per_s,
    host_efficiency,
    with_memory_rate,
)
from moesim.offload.built_in import decide_built_in
from moesim.offload.drive import cold_reads
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import run, simulate
from moesim.published.engines import engine
from moesim.published.sizes import attention_flop, dense_params
from moesim.reproduce.baseline import honest_baseline
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.mixtral_offloading import (
    first_passes,
    swap_cache,
    whole_layer_prices,
    whole_layers,
)
from moesim.reproduce.sources import Sources
from traces.layer_steps import LayerSteps, forward_passes, layer_steps
from traces.model import ModelSpec
from traces.models import load_model
from traces.routing import PREFILL
from traces.synth import uniform_trace, zipf_trace

NAME = "llama-cpp"
PAPER = "llama.cpp and its fork ik_llama.cpp, github.com/ggml-org and github.com/ikawrakow"

STREAM_FROM = 32  # tokens of a batch from which both copy experts to the GPU
MEASURED_SHARE = 0.8  # of nominal DRAM bandwidth that a read benchmark gives; assumed
DENSE_BITS = 6.0  # of weights that are not routed experts, files of about 4 bits; assumed
_BAND = 0.15
_FITTED = (
    "all on the CPU or GPU where it lies; constants of the engine as fitted on published runs, on"
    " {}; weights outside routed experts at 6 bits; empty cache"
)
_COMPROMISE = (
    "; constants of the engine were fitted on this block and another with one GPU compute share for"
    " both, of which large batches here need less, there twice as much; copies at 0.78 of PCIe"
)
_HONEST = "; honest baseline with as many experts on the GPU; 7950X at 60 GB/s and RTX 4080"


@dataclass(frozen=True, slots=True)
class Machine:
    """A box and the engine that runs on it.

    practical_bytes_per_s  read rate of its DRAM as its owner measured it
    graph                  the GPU's launches of a decoded token are one CUDA graph
    """

    box: str
    engine: str
    practical_bytes_per_s: float
    graph: bool = False

    def load(self, drive: str = "", faults: bool = False) -> Box:
        """The box; its drive is read by page faults or by large reads."""
        how = host_efficiency(self.engine)
        how = replace(how, drive_share=how.page_fault_share) if faults else how
        box = load_box(self.box, efficiency=how, drive=drive)
        if box.host is None:
            return box
        host = with_memory_rate(box.host, self.practical_bytes_per_s / MEASURED_SHARE)
        return replace(box, host=host, dram_bytes_per_s=1.083 * host_bytes_per_s(host, how))

    def priced(self, model: ModelSpec, work: LayerSteps, bits: float, box: Box) -> Prices:
        """Prices of decoding: dense weights are read, every layer pays the engine's launches."""
        how = engine(self.engine)
        found = prices(model, box, work, Weights(bits))
        read_s = dense_params(model) * DENSE_BITS / 8 / model.n_layers
        read_s /= box.device.memory_bytes_per_s * how.host.gpu_memory_share
        launch_s = how.layer_s if self.graph else how.eager_s
        layer_s = np.full(work.passes.n_passes, read_s + launch_s)
        none = np.zeros(work.passes.n_passes)
        n_dense = model.n_layers - model.n_moe_layers
        return replace(
            found, first_s=n_dense * layer_s, before_s=layer_s, after_s=none, tail_s=none,
            gpu_fixed_s=0.0, gpu_start_s=0.0,
        )  # fmt: skip


AUTHOR = Machine("rtx-4080-ryzen-7950x", "ik_llama.cpp", 60e9)
MAINLINE = replace(AUTHOR, engine="llama.cpp")
BLACKWELL = Machine("rtx-5080-ryzen-9950x", "llama.cpp", 0.8 * 77e9)


def claims(sources: Sources) -> list[Claim]:
    """The formula of a token, the sweep, measured rates, prompts, and a model beyond memory."""
    return [
        *_identities(),
        *_sweep(sources),
        *_decode_rows(),
        *_prompts_of_the_author(),
        *_prompts_of_a_large_model(),
        *_mapped(sources.seed),
    ]


def on_cpu(work: LayerSteps, n_layers: int, last: bool = False) -> OffloadPolicy:
    """Experts of the first n_layers (`--n-cpu-moe`), or of the last, stay on the CPU."""
    layer = np.arange(work.n_objects) // work.n_experts
    left = layer >= work.n_layers - n_layers if last else layer < n_layers
    return OffloadPolicy(pinned=~left, on_miss="cpu", budget=0)


# --- a token --------------------------------------------------------------------------------------


def _identities() -> Iterator[Claim]:
    note = "Qwen3-30B-A3B, 4.25 bits, no fixed costs; 700 GB/s on the GPU, 60 GB/s on the CPU"
    for n in (0, 14, 48):
        ours, expected = byte_seconds(n, 700e9, 60e9)
        claim = f"seconds of a token over sum of bytes / bandwidth, {n} of 48 layers on the CPU"
        yield _row(claim, 1.0, ours / expected, 0.01, note, "A")


def byte_seconds(n: int, gpu_rate: float, cpu_rate: float) -> tuple[float, float]:
    """Seconds of a token on the simulator without fixed costs, and the sum of bytes over rates.

    source  the handbook: T_token = sum over GPU layers bytes/BW_gpu + over CPU ones bytes/BW_dram
    """
    model = load_model("qwen3-30b-a3b")
    trace = uniform_trace(3, model.n_moe_layers, model.n_experts, model.top_k)
    work = layer_steps(trace, forward_passes(trace))
    base = prices(model, load_box(AUTHOR.box), work, Weights(4.25))
    dense = dense_params(model) * 2 / model.n_layers
    none = np.zeros(3)
    priced = replace(
        base,
        first_s=none,
        before_s=np.full(3, dense / gpu_rate),
        after_s=none,
        tail_s=none,
        gpu_s=np.array([0.0, base.expert_bytes / gpu_rate]),
        gpu_fixed_s=0.0,
        gpu_start_s=0.0,
        cpu_s=np.zeros(2),
        cpu_fixed_s=0.0,
        cpu_bytes_per_s=cpu_rate,
    )
    ours = simulate(work, priced, on_cpu(work, n)).seconds / 3
    routed = model.top_k * base.expert_bytes
    on_gpu = model.n_layers * dense + (model.n_moe_layers - n) * routed
    return ours, on_gpu / gpu_rate + n * routed / cpu_rate


def _sweep(sources: Sources) -> Iterator[Claim]:
    model, trace = load_model("gpt-oss-20b"), sources.captured("gpt-oss-20b-decode")
    tier: Tier = "B" if trace is not None else "C"
    routed = "captured gpt-oss-20b trace" if trace is not None else "even synthetic routing"
    if trace is None:
        trace = uniform_trace(200, model.n_moe_layers, model.n_experts, model.top_k, sources.seed)
    work = layer_steps(trace, first_passes(forward_passes(trace), 200))
    priced = MAINLINE.priced(model, work, 4.25, MAINLINE.load())
    rates = np.array([simulate(work, priced, on_cpu(work, n)).tokens_per_s for n in range(25)])
    faster = int((np.diff(rates) > 0).sum())
    claim = "steps of --n-cpu-moe 0 to 24 that make decoding faster"
    yield _row(claim, 0, faster, 0.0, routed, "A")
    per_layer = np.diff(1 / rates)
    spread = float(per_layer.max() / per_layer.min())
    note = f"{routed}; the longest over the shortest"
    yield _row("seconds that each layer on the CPU adds, spread", 1.0, spread, 0.01, note, "A")
    honest = honest_baseline(work, priced, model.n_experts // 2, seed=sources.seed)
    over = rates[12] / honest.tokens_per_s
    claim = "--n-cpu-moe 12 of 24 over the honest baseline"
    yield _row(claim, None, over, None, routed + _HONEST, tier)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A published decode rate with some layers' experts on the CPU."""

    row: str
    machine: Machine
    model: str
    bits: float
    n_on_cpu: int
    last: bool
    tokens_per_s: float
    fitted: str


DECODED = (
    Decoded("IKLC-014", MAINLINE, "qwen3-30b-a3b", 4.25, 14, True, 68.68, "this block too"),
    Decoded("IKLC-022", AUTHOR, "qwen3-30b-a3b", 4.25, 14, True, 76.74, "this block too"),
    Decoded("LCPP-093", BLACKWELL, "qwen3.5-35b-a3b", 4.85, 24, False, 69.6, "this block too"),
    Decoded("IKLC-040", AUTHOR, "deepseek-v2-lite", 4.5, 26, False, 45.28, "other blocks"),
)


def _decode_rows() -> Iterator[Claim]:
    for row in DECODED:
        model = load_model(row.model)
        trace = uniform_trace(4, model.n_moe_layers, model.n_experts, model.top_k)
        work = layer_steps(trace, forward_passes(trace))
        priced = row.machine.priced(model, work, row.bits, row.machine.load())
        ours = simulate(work, priced, on_cpu(work, row.n_on_cpu, row.last)).tokens_per_s
        where = "last" if row.last else "first"
        claim = (
            f"{row.row}: tokens/s, {model.name}, {row.machine.engine}, {where} {row.n_on_cpu}"
            f" of {model.n_moe_layers} layers on the CPU"
        )
        note = _FITTED.format(row.fitted)
        yield _row(claim, row.tokens_per_s, ours, _BAND, note, "B")


# --- prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's batch on a machine.

    bits    stored per weight of a routed expert
    tokens  of the batch; prompt: of the whole prompt, whose tokens see half of it on average
    """

    model: ModelSpec
    machine: Machine
    box: Box
    bits: float
    tokens: int
    prompt: int

    def work(self) -> LayerSteps:
        """One pass of that many tokens, evenly routed."""
        n, model = self.tokens, self.model
        trace = uniform_trace(n, model.n_moe_layers, model.n_experts, model.top_k)
        together = replace(
            trace,
            phase=np.full(n, PREFILL, np.int8),
            request=np.zeros(n, np.int32),
            position=np.arange(n, dtype=np.int32),
        )
        return layer_steps(together, forward_passes(together))

    def priced(self, work: LayerSteps) -> Prices:
        """Prices of the pass: arithmetic of everything dense and of attention, by the engine."""
        how, model = engine(self.machine.engine), self.model
        found = self.machine.priced(model, work, self.bits, self.box)
        flop_rate = gpu_flop_per_s(self.box.device, DENSE_BITS, how.host)
        flop_s = 2 * dense_params(model) * self.tokens / flop_rate / model.n_layers
        peak = self.box.device.peak_flop_per_s("bf16") * how.attention_share
        scores = attention_flop(model, self.tokens, self.prompt / 2, how.absorbed)
        layer_s = np.maximum(found.before_s - how.eager_s, flop_s) + how.eager_s
        layer_s += scores / peak / model.n_layers
        n_dense = model.n_layers - model.n_moe_layers
        return replace(found, first_s=n_dense * layer_s, before_s=layer_s)

    def layer_s(self) -> npt.NDArray[np.float64]:
        """float64[tokens + 1]: a layer's experts on the GPU, tokens spread over them evenly."""
        model, how = self.model, engine(self.machine.engine).host
        shape = ExpertShape(model.hidden_size, model.expert_intermediate_size, model.ffn_matrices)
        copies = np.arange(self.tokens + 1) * model.top_k / model.n_experts
        one = gpu_expert_seconds(self.box.device, shape, copies, self.bits, how)
        return np.asarray(one * model.n_experts, dtype=np.float64)

    def streamed(self) -> float:
        """Tokens/s when all experts are copied to the GPU, layer by layer."""
        work = self.work()
        layers = whole_layers(work)
        base = replace(self.priced(work), n_gpus=self.box.n_devices, links=1)
        priced = whole_layer_prices(base, self.layer_s(), self.model.n_experts)
        return self.tokens / run(layers, swap_cache(layers, 0), priced).seconds

    def on_cpu(self) -> float:
        """Tokens/s when all experts are multiplied on the CPU."""
        work = self.work()
        policy = on_cpu(work, self.model.n_moe_layers)
        return self.tokens / simulate(work, self.priced(work), policy).seconds

    def rate(self) -> float:
        """Tokens/s by the engines' rule."""
        return self.streamed() if self.tokens >= STREAM_FROM else self.on_cpu()


def _prompts_of_the_author() -> Iterator[Claim]:
    model, box = load_model("deepseek-v2-lite"), AUTHOR.load()
    measured = {128: 344.75, 256: 604.47, 512: 973.29, 1024: 1427.88, 2048: 1804.31, 4096: 1878.12}
    note = (
        "IKLC-043 to 053, DeepSeek-V2-Lite at 4.25 bits, RTX 4080 over PCIe 4, prompt of 4,096; all"
        " experts of a layer copied, then multiplied" + _COMPROMISE
    )
    for n, published in measured.items():
        ours = Prompt(model, AUTHOR, box, 4.25, n, 4096).rate()
        yield _row(f"prompt tokens/s, batches of {n}", published, ours, _BAND, note, "B")


def _prompts_of_a_large_model() -> Iterator[Claim]:
    at = Machine("rtx-4080-ryzen-7950x", "ik_llama.cpp", MEASURED_SHARE * 51.2e9)
    model, box, bits = load_model("deepseek-v3"), two_3090(at), 1.55
    measured = {16: 7.81, 32: 1.89, 64: 3.69, 128: 7.44, 512: 27.94, 1024: 52.96, 4096: 166.23}
    note = (
        "IKLC-055 to 071, DeepSeek-V3 at 1.55 bits, two RTX 3090 on eight lanes of PCIe 3 each,"
        " layers in turn; CPU not named, a 7950X with two channels of DDR4-3200 in its place; from"
        " 32 tokens all experts of a layer are copied" + _COMPROMISE
    )
    rates = {n: Prompt(model, at, box, bits, n, n).rate() for n in measured}
    for n, published in measured.items():
        yield _row(f"prompt tokens/s, batch of {n}", published, rates[n], _BAND, note, "C")
    ours, published = rates[16] / rates[32], measured[16] / measured[32]
    yield _row("a batch of 16 on the CPU over one of 32 copied", published, ours, _BAND, note, "C")
    sizes = (Prompt(model, at, box, bits, 2**power, 2**power) for power in range(5, 12))
    first = next((size.tokens for size in sizes if size.streamed() > size.on_cpu()), float("inf"))
    more = "; the fork's later rule is 32 tokens an expert, 1,024 here; of powers of two"
    yield _row("tokens from which copying pays", 1024.0, first, None, note + more, "C")


def two_3090(at: Machine) -> Box:
    """Two RTX 3090 with eight lanes of PCIe 3 each, beside the machine's host."""
    host, how = at.load().host, host_efficiency(at.engine)
    box = load_box("rtx-3090x2", efficiency=how)
    return replace(
        box,
        host=host,
        copy_bytes_per_s=8e9 * how.pinned_share,
        dram_bytes_per_s=at.load().dram_bytes_per_s,
    )


# --- a model beyond memory ------------------------------------------------------------------------


def mapped_run(memory_bytes: float, exponent: float, reuse: float = 0.0, seed: int = 0) -> float:
    """Tokens/s of DeepSeek-R1 from a mapped file of 212 GiB: the last 60 of 180 tokens.

    exponent, reuse  of Zipf's law for how often experts are chosen; chance that one of them stays
                     from token to token
    """
    model, bits = load_model("deepseek-r1"), 212 * 2**30 * 8 / 671e9
    at = Machine(BLACKWELL.box, "ktransformers-0.2", 88e9, graph=True)
    box, gpu = at.load(drive="nvme-gen5", faults=True), load_box("rtx-3090-ti").device
    box = replace(box, device=gpu, system=replace(box.system, device=gpu))
    sizes = (model.n_moe_layers, model.n_experts, model.top_k)
    trace = zipf_trace(180, *sizes, exponent=exponent, reuse=reuse, seed=seed)
    work = layer_steps(trace, forward_passes(trace))
    priced = at.priced(model, work, bits, box)
    decided = decide_built_in(work, on_cpu(work, model.n_moe_layers))
    held = int(memory_bytes / priced.expert_bytes)
    done = run(work, decided, priced, cold_reads(work, decided, held))
    return 60 / float(done.pass_s[-60:].sum())


def _mapped(seed: int) -> Iterator[Claim]:
    note = (
        "KT-182: RTX 3090 Ti, 9950X at 88 GB/s, 96 GB, one PCIe 5 drive; the page cache as LRU over"
        " experts in all of memory; page faults at half the drive's 12.5 GB/s, assumed; synthetic"
        " Zipf routing, exponent 0.81 as fitted on other runs, no reuse between tokens beyond that"
    )
    found = mapped_run(96e9, 0.81, seed=seed)
    yield _row("KT-182: tokens/s, model 2.2 times memory", 3.2, found, _BAND, note, "C")
    flat, sticky = mapped_run(96e9, 0.6, seed=seed), mapped_run(96e9, 0.81, 0.3, seed)
    yield _row("the same, exponent 0.6", 3.2, flat, None, note, "C")
    yield _row(
        "the same, three in ten experts stay for the next token", 3.2, sticky, None, note, "C"
    )
    enough = mapped_run(240e9, 0.81, seed=seed)
    claim = "memory for all of it over memory for less than half"
    yield _row(claim, None, enough / found, None, note, "C")


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
    return Claim(NAME, claim, published, float(simulated), low, high, tier, "code", note)
