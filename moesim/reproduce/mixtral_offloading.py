"""Mixtral-offloading (arXiv 2312.17238): an LRU cache in every layer, and guesses one layer ahead.

A layer keeps k_c experts on the GPU. What the next layer's gate makes of this layer's hidden state
is loaded into a few spare buffers, without pushing anything out of the cache; an expert that is
used from a buffer takes the place of the layer's least recently used one. Experts are stored in two
bits, all else in four.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box, load_box
from moesim.lower.offload import Extras
from moesim.offload.decisions import (
    DEMAND,
    HIGH,
    LOADED,
    NO_LOAD,
    PREFETCH,
    RESIDENT,
    Decisions,
    Loads,
)
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import OffloadResult, run
from moesim.policies.prefetch import Predictions, next_gate_recall, no_predictions, oracle
from moesim.reproduce.baseline import honest_baseline
from moesim.reproduce.claim import Claim, Tier
from moesim.reproduce.sources import Sources
from traces.layer_steps import ForwardPasses, LayerSteps, forward_passes, layer_steps
from traces.models import load_model
from traces.routing import DECODE
from traces.synth import uniform_trace

NAME = "mixtral-offloading"
PAPER = "Fast Inference of Mixture-of-Experts Language Models with Offloading, arXiv 2312.17238"

# HQQ as the authors set it: 2 bits in groups of 16, each with a scale and a zero of 8 bits, which
# have 16-bit scales and zeros of their own by 128.
EXPERT_BITS = 2 + 16 / 16 + 2 * 32 / 128 / 16
AHEAD = 2  # guesses loaded for the next layer, of the four buffers there are
MOST_TOKENS = 1500  # decoded, of a trace: its hit rates are within half a point of the whole one's
# Tokens/s of Table 2, 2-bit experts: all of it; without guesses; without guesses and cache; whole
# layers (accelerate).
PUBLISHED: Mapping[str, tuple[float, float, float, float]] = MappingProxyType(
    {"T4": (2.09, 1.57, 1.17, 0.66), "RTX 3060": (2.28, 2.05, 1.55, 0.92)}
)
CACHED: Mapping[str, int] = MappingProxyType({"T4": 4, "RTX 3060": 2})
_BAND = 0.15
_FIT = (
    "seconds of a layer's own work are those that make the row without guesses exact: unpacking"
    " 2-bit weights is in no formula here; copies pinned at 0.78 of PCIe, experts 3.03 bits a"
    " weight with their scales"
)
_NAIVE = (
    "; the T4's measured 1.51 s are hardly more than 17 GB of copies alone (1.37 s), so part of a"
    " layer's own work must run beside them, which it does not here"
)
_HONEST = (
    "; honest baseline: per-layer LRU with next-gate prefetch, without the CPU (two cores in Colab)"
)
_BARE = "; the paper's row is without cache and without guesses, some copies of it say otherwise"


@dataclass(slots=True)
class _Layer:
    """Experts of one layer on the GPU: cached ones by age, and guesses in buffers."""

    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    guessed: dict[int, int] = field(default_factory=dict)  # expert to load


@dataclass(slots=True)
class _Log:
    place: list[int] = field(default_factory=list)
    there: list[bool] = field(default_factory=list)
    load: list[int] = field(default_factory=list)
    loads: list[tuple[int, int, int]] = field(default_factory=list)
    evictions: int = 0
    wasted: int = 0

    def issue(self, expert: int, step: int, kind: int) -> int:
        """A load's index."""
        self.loads.append((expert, step, kind))
        return len(self.loads) - 1


def swap_cache(
    work: LayerSteps,
    k_c: int,
    predicted: Predictions | None = None,
    ahead: int = AHEAD,
    units: int = 1,
) -> Decisions:
    """What the runtime decides at every layer-step.

    k_c    experts cached in a layer, fewer than a token needs as well: 0 keeps none
    ahead  guesses loaded for the next layer at most, into buffers that are free again afterwards
    units  size of a load: 2 when the expert that leaves is copied back on the same stream
    source  dvmazur/mixtral-offloading src/expert_cache.py; the guesses follow the paper
    """
    named = predicted or no_predictions(work)
    layers = [_Layer(OrderedDict.fromkeys(range(k_c))) for _ in range(work.n_layers)]
    log = _Log()
    for step in range(work.n_steps):
        first = step % work.n_layers * work.n_experts
        asked = work.expert[work.start[step] : work.start[step + 1]].tolist()
        _use(layers[step % work.n_layers], log, asked, (step, first, k_c))
        target = step + named.distance
        if target < work.n_steps:
            names = named.expert[named.start[target] : named.start[target + 1]].tolist()
            first = target % work.n_layers * work.n_experts
            _guess(layers[target % work.n_layers], log, names[:ahead], step, first)
    return _decisions(log, units)


def _use(layer: _Layer, log: _Log, asked: list[int], at: tuple[int, int, int]) -> None:
    """Experts of one layer-step: cached, in a buffer, or loaded now."""
    step, first, k_c = at
    for expert in asked:
        load, cached = layer.guessed.pop(expert, NO_LOAD), expert in layer.cached
        there = cached or load != NO_LOAD
        log.there.append(there)
        log.place.append(RESIDENT if there else LOADED)
        log.load.append(load if there else log.issue(first + expert, step, DEMAND))
        layer.cached[expert] = None
        layer.cached.move_to_end(expert)
    while len(layer.cached) > k_c:
        layer.cached.popitem(last=False)
        log.evictions += 1
    log.wasted += len(layer.guessed)
    layer.guessed.clear()


def _guess(layer: _Layer, log: _Log, names: list[int], step: int, first: int) -> None:
    for expert in names:
        if expert not in layer.cached:
            layer.guessed[expert] = log.issue(first + expert, step, PREFETCH)


def _decisions(log: _Log, units: int) -> Decisions:
    columns = np.array(log.loads, np.int64).reshape(-1, 3)
    return Decisions(
        place=np.array(log.place, np.int8),
        was_there=np.array(log.there, np.bool_),
        level=np.full(len(log.place), HIGH, np.int8),
        load=np.array(log.load, np.int32),
        loads=Loads(
            columns[:, 0].astype(np.int32),
            columns[:, 1].copy(),
            columns[:, 2].astype(np.int8),
            np.full(len(columns), units, np.int32),
        ),
        evictions=log.evictions,
        refused=0,
        wasted=log.wasted,
    )


def whole_layers(work: LayerSteps) -> LayerSteps:
    """The same passes with a layer's experts as one object, for engines that move whole layers.

    Its token copies are the tokens of the pass.
    """
    return LayerSteps(
        start=np.arange(work.n_steps + 1, dtype=np.int64),
        expert=np.zeros(work.n_steps, np.int32),
        tokens=np.repeat(work.passes.tokens, work.n_layers).astype(np.int32),
        gate=None,
        n_layers=work.n_layers,
        n_experts=1,
        top_k=1,
        passes=work.passes,
    )


def whole_layer_prices(base: Prices, layer_s: npt.NDArray[np.float64], n_experts: int) -> Prices:
    """Prices of whole layers of n_experts.

    layer_s  float64[most tokens + 1], device seconds of a layer's experts by tokens of the pass
    """
    n_bytes = base.expert_bytes * n_experts
    return replace(base, gpu_s=layer_s, expert_bytes=n_bytes, unit_bytes=float(n_bytes))


def whole_layer_run(work: LayerSteps, base: Prices) -> OffloadResult:
    """Decoding that loads all experts of a layer when its turn comes, and keeps none."""
    layers = whole_layers(work)
    layer_s = work.top_k * base.gpu_s[1] * np.arange(int(layers.tokens.max()) + 1)
    priced = whole_layer_prices(base, layer_s, work.n_experts)
    return run(layers, swap_cache(layers, 0), priced)


def claims(sources: Sources) -> list[Claim]:
    """The formula of a layer, then the four rows on two GPUs."""
    work, tier, trace = routing(sources)
    found = list(_formula())
    for name in PUBLISHED:
        found += _rows(name, work, (tier, trace), sources.seed)
    return found


def routing(sources: Sources, most: int = MOST_TOKENS) -> tuple[LayerSteps, Tier, str]:
    """Decode passes of the captured Mixtral trace, else of even draws; its tier and a note."""
    trace = sources.captured("mixtral-8x7b-mtbench")
    if trace is not None and (trace.phase == DECODE).any():
        passes = first_passes(forward_passes(trace, phase="decode"), most)
        return layer_steps(trace, passes), "B", "captured MT-bench trace"
    even = uniform_trace(most, 32, 8, 2, sources.seed)
    passes = forward_passes(even)
    return layer_steps(even, passes), "C", "even synthetic routing, without locality"


def first_passes(passes: ForwardPasses, n: int) -> ForwardPasses:
    """The first n forward passes."""
    n = min(n, passes.n_passes)
    return ForwardPasses(
        rows=passes.rows[: passes.start[n]],
        start=passes.start[: n + 1],
        phase=passes.phase[:n],
        context=passes.context[:n],
        requests=passes.requests[:n],
    )


def half_precision(box: Box) -> Box:
    """The box with fp16 where its GPU, older than bf16, has none."""
    peaks = box.device.flop_per_s
    if "bf16" in peaks:
        return box
    device = replace(box.device, flop_per_s=MappingProxyType({**peaks, "bf16": peaks["fp16"]}))
    return replace(box, device=device, system=replace(box.system, device=device))


def machine(name: str) -> Box:
    """The machine of one column of Table 2."""
    if name == "T4":
        return half_precision(load_box("t4"))
    laptop = load_box("rtx-3060-laptop")
    desktop = replace(
        laptop.device,
        name="rtx-3060",
        memory_bytes=12 * 2**30,
        memory_bytes_per_s=360e9,
        host_link_bytes_per_s=32e9,
    )
    copy = 32e9 * laptop.efficiency.pinned_share
    return replace(
        laptop,
        device=desktop,
        system=replace(laptop.system, device=desktop),
        copy_bytes_per_s=copy,
        dram_bytes_per_s=copy,
    )


def _rows(name: str, work: LayerSteps, source: tuple[Tier, str], seed: int) -> Iterator[Claim]:
    """Three rows that follow from the one that a constant was taken from, and what they rest on."""
    full, alone, bare, naive = PUBLISHED[name]
    k_c, (tier, routed) = CACHED[name], source
    recall = next_gate_recall("mixtral-8x7b", work.n_layers)
    guesses = oracle(work, recall, seed=seed)
    cached = swap_cache(work, k_c)
    base = prices(load_model("mixtral-8x7b"), machine(name), work, Weights(EXPERT_BITS))
    priced = calibrated(work, cached, base, 1 / alone)

    def rate(kept: int, named: Predictions | None) -> float:
        return run(work, swap_cache(work, kept, named), priced).tokens_per_s

    note = f"{routed}; {_FIT}"
    ours, whole = rate(k_c, guesses), whole_layer_run(work, priced).tokens_per_s
    yield _row(f"{name}: tokens/s, cache and guesses", full, ours, _BAND, note, tier)
    neither = rate(0, None)
    yield _row(f"{name}: tokens/s, neither", bare, neither, _BAND, note + _BARE, tier)
    yield _row(f"{name}: tokens/s, whole layers", naive, whole, _BAND, note + _NAIVE, tier)
    claim = f"{name}: cache and guesses over whole layers"
    yield _row(claim, full / naive, ours / whole, _BAND, note, tier)
    yield _row(f"{name}: tokens/s, guesses only", None, rate(0, guesses), None, note, tier)
    hits = f"{name}: hits of an LRU cache of {k_c} in a layer, %"
    yield _row(hits, None, 100 * cached.hit_rate, None, routed, tier)
    own_ms = 1e3 * float((priced.before_s - base.before_s).mean())
    yield _row(f"{name}: ms of a layer taken from one row", None, own_ms, None, _FIT, tier)
    named = float(recall[1:].mean())
    honest = honest_baseline(work, priced, k_c, recall=named, cpu=False, seed=seed)
    over = ours / honest.tokens_per_s
    yield _row(f"{name}: over the honest baseline", None, over, None, note + _HONEST, tier)


def calibrated(work: LayerSteps, decided: Decisions, base: Prices, pass_s: float) -> Prices:
    """The prices with so much more work in every layer that a pass lasts pass_s on average."""
    short_s = pass_s - run(work, decided, base).seconds / work.passes.n_passes
    return replace(base, before_s=base.before_s + max(0.0, short_s / work.n_layers))


def _formula() -> Iterator[Claim]:
    """Seconds of a layer against t_attn + max(0, misses * S / B - t_attn), which charges loads."""
    note = (
        "both experts of every layer guessed and loaded ahead, experts' own time left out: with it"
        " the formula is an upper bound, since loads overlap with experts too"
    )
    for label, attention_s in (("loads longer", 1e-3), ("attention longer", 20e-3)):
        ours, formula = layer_seconds(attention_s, 0.0)
        yield _row(
            f"seconds of a layer over the formula, {label}", 1.0, ours / formula, 0.01, note, "A"
        )
    ours, formula = layer_seconds(1e-3, 1e-3)
    note = "experts of 1 ms, attention of 1 ms, two loads of 5.3 ms"
    yield _row("the same with experts' time", 1.0, ours / formula, None, note, "A")


def layer_seconds(attention_s: float, expert_s: float) -> tuple[float, float]:
    """Steady seconds of a layer when all is guessed right and nothing cached; and the formula's.

    source  the handbook's reading of the paper: t_attn + k t_exp + max(0, misses S / B - t_attn)
    """
    trace = uniform_trace(24, 32, 8, 2)
    work = layer_steps(trace, forward_passes(trace))
    base = prices(load_model("mixtral-8x7b"), machine("T4"), work, Weights(EXPERT_BITS))
    n = work.passes.n_passes
    nothing = np.zeros(n)
    priced = replace(
        base,
        box=replace(base.box, copy_s=0.0),
        first_s=nothing,
        before_s=np.full(n, attention_s),
        after_s=nothing,
        tail_s=nothing,
        gpu_s=expert_s * np.arange(3, dtype=np.float64),
        gpu_fixed_s=0.0,
        gpu_start_s=0.0,
    )
    done = run(work, swap_cache(work, 0, oracle(work, 1.0)), priced, Extras())
    load_s = base.expert_bytes / base.box.copy_bytes_per_s
    formula = attention_s + 2 * expert_s + max(0.0, 2 * load_s - attention_s)
    return float(done.pass_s[1:].mean() / work.n_layers), formula


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
