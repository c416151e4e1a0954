"""MoE-Infinity (arXiv 2401.14361): what a request has activated so far says what it will activate.

Predictor  the stored request whose activations match the running one's best names the next layer's
           experts (`activation_map` of `moesim/policies/prefetch.py`)
Cache      one for all layers; the copy with the lowest activation score leaves
Baselines  engines that stream weights layer by layer, whatever the routing: DeepSpeed all of them,
           vLLM what does not fit beside it

Seconds a token are those of decoding, prompts run before it, one request at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box, load_box
from hwmodels.device import Figure
from hwmodels.devices import load_device
from hwmodels.host_costs import host_bytes_per_s
from moesim.offload.built_in import hooks_for
from moesim.offload.decide import decide
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import OffloadResult, run, simulate
from moesim.policies.prefetch import Predictions, accuracy, activation_map, next_gate_recall, oracle
from moesim.reproduce.baseline import NAME as HONEST
from moesim.reproduce.baseline import honest_baseline
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.pre_gated_moe import Blocks, decoder, simulated_s
from moesim.reproduce.sources import Sources
from traces.counting import expert_bytes, total_params
from traces.layer_steps import ForwardPasses, LayerSteps, forward_passes, layer_steps
from traces.model import ModelSpec
from traces.models import load_model
from traces.routing import DECODE, RoutingTrace
from traces.synth import zipf_trace

NAME = "moe-infinity"
PAPER = "MoE-Infinity, arXiv 2401.14361"

FIGURES = MappingProxyType(
    {
        "ratio": Figure(0.75, "datasheet", "device memory for weights, README and its example"),
        "stored": Figure(100, "datasheet", "requests kept, the example's trace_capacity"),
        "vllm": Figure(0.9, "datasheet", "device memory that vLLM takes unless told otherwise"),
        "eager": Figure(
            8.4e-3 / 32, "derived", "least seconds of an eager layer: 8B model on H100"
        ),
        "epsilon": Figure(1e-6, "assumed", "the least activation share in a score"),
    }
)
B_BAND, C_BAND = (0.85, 1.15), (0.5, 2.0)  # times the published figure
_HOW = (
    "A5000 with PCIe 4.0 at 25 GB/s, 75 % of its memory for weights; one load ahead a layer stands"
    " for prefetches of low priority; a layer takes at least 0.26 ms (eager); decoding only"
)


@dataclass(frozen=True, slots=True)
class Setup:
    """A model of the README, where its routing comes from, and the published seconds a token.

    capture   file of the captured trace, "" for synthetic routing by `law`, (exponent, reuse)
    bits      of the weights as released
    tokens    at the end of the trace that are run; the predictor has seen those before
    """

    title: str
    model: str
    bits: int
    tokens: int
    ours_s: float
    deepspeed_s: float
    vllm_s: float | None = None
    capture: str = ""
    law: tuple[float, float] = (0.0, 0.0)


# The laws are nearest to published LRU, LFU and Belady hits of Switch-base-128 and NLLB's decoder
# (arXiv 2505.16056).
SETUPS = (
    Setup("Mixtral-8x7B", "mixtral-8x7b", 16, 1000, 0.735, 2.486, 2.137, "mixtral-8x7b-mtbench"),
    Setup(
        "DeepSeek-V2-Lite", "deepseek-v2-lite", 16, 100, 0.155, 0.737, 0.493, "deepseek-v2-lite-law"
    ),
    Setup("Switch-large-128", "switch-large-128", 32, 600, 0.130, 4.578, law=(0.7, 0.05)),
    Setup("NLLB-MoE-54B", "nllb-moe-54b", 32, 600, 0.119, 8.381, law=(0.9, 0.15)),
)


class ActivationScore:
    """Lowest score leaves: share of its layer's activations in the running request, times all its
    uses so far, times 1 - layer / layers.

    request  int32[n_passes], the request of each pass
    source   arXiv 2401.14361: frequency, the sequence's activation matrix, decay by layer
    """

    def __init__(self, work: LayerSteps, request: npt.NDArray[np.int32]) -> None:
        shape = (work.n_layers, work.n_experts)
        self._request: list[int] = request.tolist()
        self._running = -1
        self._now, self._ever = np.zeros(shape), np.zeros(shape)
        self._decay = 1 - np.arange(work.n_layers) / work.n_layers
        self._score = np.zeros(shape)

    def use(self, expert: int, now: int) -> None:
        """One activation more; a new request begins with none."""
        n_layers, n_experts = self._now.shape
        if self._request[now // n_layers] != self._running:
            self._running = self._request[now // n_layers]
            self._now[:] = 0
            self._score = self._ever * self._decay[:, None] / n_experts
        layer = expert // n_experts
        self._now[layer, expert % n_experts] += 1
        self._ever[layer, expert % n_experts] += 1
        share = self._now[layer] / self._now[layer].sum() + FIGURES["epsilon"].value
        self._score[layer] = share * self._ever[layer] * self._decay[layer]

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """A copy keeps the score it had."""

    def evict(self, expert: int) -> None:
        """Scores are kept for absent experts too."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Lowest score."""
        resident = np.array(candidates)
        return int(resident[self._score.reshape(-1)[resident].argmin()])


@dataclass(frozen=True, slots=True)
class Case:
    """The end of a trace on the box, with what the predictor says after all that came before.

    request  int32[n_passes]
    slots    experts that fit beside the dense weights
    """

    model: ModelSpec
    work: LayerSteps
    request: npt.NDArray[np.int32]
    prices: Prices
    predicted: Predictions
    slots: int


def machine() -> Box:
    """An A5000 with 1 TB of host memory; the CPU is not named, an EPYC 7453 is assumed."""
    base, host = load_box("rtx-a5000"), load_device("epyc-7453")
    rate = host_bytes_per_s(host, base.efficiency)
    return replace(base, host=host, host_bytes=10**12, dram_bytes_per_s=rate)


def slots_for(model: ModelSpec, bits: int, box: Box) -> int:
    """Experts that the device holds beside all dense weights of the model, encoder included."""
    room = FIGURES["ratio"].value * box.device_bytes - dense_bytes(model, bits)
    return int(room // expert_bytes(model, bits))


def dense_bytes(model: ModelSpec, bits: int) -> float:
    """Everything but the routed experts."""
    experts = model.n_moe_layers * model.n_experts * expert_bytes(model, bits)
    return total_params(model) * bits / 8 - experts


def case(setup: Setup, sources: Sources) -> Case | None:
    """A setup on its trace; None when that was captured and is not at hand."""
    whole = load_model(setup.model)
    model = decoder(whole) if whole.n_encoder_layers else whole
    trace = _routing(setup, model, sources)
    if trace is None:
        return None
    passes = forward_passes(trace)
    request = trace.request[passes.rows[passes.start[:-1]]]
    work = layer_steps(trace, passes)
    predicted = activation_map(work, request, n_stored=int(FIGURES["stored"].value))
    first = first_pass(passes, setup.tokens)
    work, predicted = tail(work, predicted, first)
    box = machine()
    costs = eager(model, prices(model, box, work, Weights(setup.bits)), setup.bits)
    slots = slots_for(whole, setup.bits, box)
    return Case(model, work, request[first:], costs, predicted, slots)


def _routing(setup: Setup, model: ModelSpec, sources: Sources) -> RoutingTrace | None:
    """The captured trace, teacher-forced text taken for decoding; or 4,096 tokens by the law."""
    if not setup.capture:
        shape = (model.n_moe_layers, model.n_experts, model.top_k)
        return zipf_trace(4096, *shape, *setup.law, sources.seed)
    trace = sources.captured(setup.capture)
    if trace is None or (trace.phase == DECODE).any():
        return trace
    return replace(trace, phase=np.full(trace.n_tokens, DECODE, np.int8))


def first_pass(passes: ForwardPasses, n_tokens: int) -> int:
    """The first pass of the last n_tokens."""
    return int(np.searchsorted(passes.start, passes.start[-1] - n_tokens))


def tail(work: LayerSteps, predicted: Predictions, first: int) -> tuple[LayerSteps, Predictions]:
    """Both from a pass on."""
    step, rows = first * work.n_layers, int(work.passes.start[first])
    cell, named = int(work.start[step]), int(predicted.start[step])
    old = work.passes
    passes = ForwardPasses(
        rows=old.rows[rows:],
        start=old.start[first:] - rows,
        phase=old.phase[first:],
        context=old.context[first:],
        requests=old.requests[first:],
    )
    rest = replace(
        work,
        start=work.start[step:] - cell,
        expert=work.expert[cell:],
        tokens=work.tokens[cell:],
        gate=None if work.gate is None else work.gate[cell:],
        passes=passes,
    )
    return rest, replace(
        predicted, start=predicted.start[step:] - named, expert=predicted.expert[named:]
    )


def eager(model: ModelSpec, costs: Prices, bits: int) -> Prices:
    """Dense parts as an eager framework runs them: 32-bit weights are twice the bytes, and no layer
    takes less than its launches."""
    times, least = bits / 16, FIGURES["eager"].value
    n_dense = model.n_layers - model.n_moe_layers
    return replace(
        costs,
        before_s=np.maximum(times * costs.before_s, least),
        first_s=np.maximum(times * costs.first_s, n_dense * least),
        after_s=times * costs.after_s,
        tail_s=times * costs.tail_s,
    )


def moe_infinity(one: Case, budget: int = 1) -> OffloadResult:
    """Loads ahead by activation map, `budget` a layer; misses loaded; the lowest score leaves."""
    policy = OffloadPolicy(slots=np.array([one.slots]), budget=budget)
    cache = ActivationScore(one.work, one.request)
    hooks = replace(hooks_for(one.work, policy), cache=cache)
    return run(one.work, decide(one.work, policy, hooks, one.predicted), one.prices)


def streamed_s(one: Case, bits: int, resident_bytes: float) -> float:
    """Seconds a token when every weight that is not resident is copied, one layer ahead."""
    costs, n = one.prices, one.model.n_moe_layers
    total = total_params(one.model) * bits / 8
    moved = max(0.0, total - resident_bytes)
    computed = (costs.before_s + costs.after_s).mean() + (
        costs.first_s.mean() + costs.tail_s.mean()
    ) / n
    experts = one.model.top_k * costs.gpu_s[1] + costs.gpu_fixed_s
    blocks = Blocks(
        copy_s=np.zeros((2, n)),
        all_s=moved / n / costs.box.copy_bytes_per_s,
        block_s=float(computed + experts),
        gate_s=0.0,
    )
    return float(simulated_s(blocks, "prefetch-all")[1])


def claims(sources: Sources) -> list[Claim]:
    """Seconds a token of every model of the README, and of its baselines."""
    found: list[Claim] = []
    for setup in SETUPS:
        one = case(setup, sources)
        if one is not None:
            found += _of_model(setup, one, sources.seed)
    return found


def _of_model(setup: Setup, one: Case, seed: int) -> Iterator[Claim]:
    ours, alone = moe_infinity(one), moe_infinity(one, budget=0)
    seconds, alone_s = 1 / ours.decode_tokens_per_s, 1 / alone.decode_tokens_per_s
    note = (
        f"{_HOW}. Loads ahead stand in the way of those that are needed, since the link has no"
        f" priorities here: without them {alone_s:.3f} s"
    )
    if setup.ours_s > B_BAND[1] * alone_s:
        more_ms = 1e3 * (setup.ours_s - alone_s) / one.model.n_layers
        note += (
            f". The published figure less that is {more_ms:.1f} ms a layer, which a framework"
            " spends outside the link and the rooflines"
        )
    yield _claim(setup, "MoE-Infinity", setup.ours_s, seconds, note)
    yield from _baselines(setup, one)
    yield from _honest(setup, one, seed)
    yield from _figures(setup, one, ours, alone)


def _baselines(setup: Setup, one: Case) -> Iterator[Claim]:
    held = FIGURES["vllm"].value * one.prices.box.device_bytes
    moved = total_params(one.model) * setup.bits / 8
    rate = moved / setup.deepspeed_s / 1e9
    note = "all weights pass the link once a token, one layer ahead, at 25 GB/s"
    said = f"{note}; in the published time it would be {rate:.0f} GB/s"
    seconds = streamed_s(one, setup.bits, 0.0)
    yield _claim(setup, "DeepSpeed", setup.deepspeed_s, seconds, said)
    if setup.vllm_s is not None:
        rate = (moved - held) / setup.vllm_s / 1e9
        said = f"{note}, but for 90 % of the device; in the published time {rate:.0f} GB/s"
        seconds = streamed_s(one, setup.bits, held)
        yield _claim(setup, "vLLM", setup.vllm_s, seconds, said)


def _claim(setup: Setup, system: str, published: float, seconds: float, note: str) -> Claim:
    """One of the README's figures."""
    tier: Tier = "B" if setup.capture else "C"
    times = B_BAND if tier == "B" else C_BAND
    source = f"captured {setup.capture}" if setup.capture else f"synthetic, Zipf {setup.law[0]}"
    said = f"{note}; {source}"
    if tier == "C":
        said += "; band half to twice, fixed before the run"
    band = (times[0] * published, times[1] * published)
    return _row(f"{setup.title}: {system}, s/token", published, seconds, band, said, tier)


def _row(
    claim: str,
    published: float | None,
    simulated: float,
    band: tuple[float, float] | None,
    note: str,
    tier: Tier = "C",
) -> Claim:
    low, high = band or (None, None)
    return Claim(NAME, claim, published, float(simulated), low, high, tier, "execution order", note)


def _honest(setup: Setup, one: Case, seed: int) -> Iterator[Claim]:
    """The honest baseline in as much memory."""
    recall = float(next_gate_recall(one.model.name, one.work.n_layers).mean())
    for cpu, how in ((True, ""), (False, ", misses loaded")):
        found = honest(one, recall, cpu, seed)
        note = f"{HONEST}; {one.slots} slots in all, recall {recall:.2f}; {_HOW}"
        seconds = 1 / found.decode_tokens_per_s
        yield _row(f"{setup.title}: honest baseline{how}, s/token", None, seconds, None, note)


def honest(one: Case, recall: float, cpu: bool, seed: int) -> OffloadResult:
    """The honest baseline; where a layer's share of slots is below top-k, the first layers have
    top-k slots each and the others none."""
    work = one.work
    per_layer = one.slots // work.n_layers
    if per_layer >= work.top_k:
        return honest_baseline(work, one.prices, per_layer, recall, cpu, seed)
    served = np.arange(work.n_layers) < one.slots // work.top_k
    slots = np.where(served, work.top_k, 0).astype(np.int64)
    policy = OffloadPolicy(slots=slots, on_miss="hss" if cpu else "load", budget=1)
    return simulate(work, one.prices, policy, oracle(work, recall, seed=seed))


def _figures(setup: Setup, one: Case, ours: OffloadResult, alone: OffloadResult) -> Iterator[Claim]:
    """What only makes sense together, and what the score and the prefetches are worth."""
    lru = simulate(one.work, one.prices, OffloadPolicy(slots=np.array([one.slots])))
    share = 100 * one.slots / one.work.n_objects
    note = f"{one.slots} slots for all layers, {share:.0f} % of the experts; {_HOW}"
    for name, found in (("ours", ours), ("no prefetch", alone), ("global LRU, no prefetch", lru)):
        figures = {
            "hit rate, %": 100 * found.hit_rate,
            "GB a token, prompts included": found.bytes_per_token / 1e9,
            "stall, s a token, prompts included": found.stall_s_per_token,
        }
        for figure, value in figures.items():
            yield _row(f"{setup.title}: {name}: {figure}", None, value, None, note)
    off = f"{note}; the README's example leaves prefetches at their default, off: added when seen"
    seconds = 1 / alone.decode_tokens_per_s
    yield _row(f"{setup.title}: no prefetch, s/token", setup.ours_s, seconds, None, off)
    seconds = 1 / lru.decode_tokens_per_s
    yield _row(f"{setup.title}: global LRU, no prefetch, s/token", None, seconds, None, note)
    recall = 100 * _recall(one)
    yield _row(f"{setup.title}: recall of the activation map, %", None, recall, None, note)


def _recall(one: Case) -> float:
    return float(np.nanmean(accuracy(one.work, one.predicted).recall))
