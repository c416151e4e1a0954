"""Runs of HybriMoE (`hybrimoe.py`): decode and prefill benches, its parts alone, its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.offload.built_in import hooks_for
from moesim.offload.decide import Hooks, decide
from moesim.offload.policy import OffloadPolicy
from moesim.offload.prices import Prices, Weights, prices
from moesim.offload.simulate import OffloadResult, run, simulate
from moesim.policies.dispatch import hss
from moesim.policies.impact import Forecast, ImpactPrefetch, Scheduler, Watched, forecast
from moesim.policies.noisy_gate import named, rank_ahead
from moesim.policies.prefetch import DEFAULT_NEXT_GATE, Prefetcher, no_predictions
from moesim.reproduce.fate import popular_first
from moesim.reproduce.hybrimoe_setup import (
    CPU_SLOPE_MS,
    FillBehind,
    Scored,
    box,
    by_constants,
    on_cpu,
    paper_hss,
)
from traces.layer_steps import ForwardPasses, LayerSteps, forward_passes, layer_steps
from traces.models import load_model
from traces.routing import PREFILL, RoutingTrace

MODEL = "deepseek-v2-lite"
DECODE_TOKENS = 160
SHARE = 0.25  # of a layer's experts in slots
AHEAD_SLOTS = 2
LAYERS_AHEAD = 3
FORM = Weights(expert_bits=4.0)

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Bench:
    """Work with its prices, what the early gates say of it, and the experts that are popular.

    scheduler  the hybrid schedule that systems with one use
    popular    int64[n_layers, n_experts], most popular first, from tokens that are not replayed
    """

    work: LayerSteps
    cost: Prices
    forecasts: tuple[Forecast, ...]
    popular: npt.NDArray[np.int64]
    scheduler: Scheduler

    @property
    def slots(self) -> int:
        """Slots of a layer."""
        return round(SHARE * self.work.n_experts)

    def resident(self, n: int) -> Flags:
        """bool[n_objects]: the n most popular experts of every layer."""
        marked = np.zeros(self.popular.shape, np.bool_)
        np.put_along_axis(marked, self.popular[:, :n], True, axis=1)
        return marked.reshape(-1)

    def room(self, n: int) -> npt.NDArray[np.int64]:
        """n slots in every layer."""
        return np.full(self.work.n_layers, n, np.int64)


def static(bench: Bench, scheduler: Scheduler) -> OffloadResult:
    """Popular experts for good; misses as the schedule says."""
    pinned = bench.resident(bench.slots)
    if scheduler in (on_cpu, hss):
        policy = OffloadPolicy(pinned=pinned, on_miss="cpu" if scheduler == on_cpu else "hss")
        return simulate(bench.work, bench.cost, policy)
    return _in_plain_loop(bench, OffloadPolicy(pinned=pinned), scheduler)


def prefetched(bench: Bench, n_pinned: int, n_slots: int) -> OffloadResult:
    """So many popular experts for good, and slots that prefetch fills; misses on the CPU."""
    pinned = bench.resident(n_pinned)
    policy = OffloadPolicy(cache="fifo", slots=bench.room(n_slots), pinned=pinned, on_miss="cpu")
    return _in_plain_loop(bench, policy, on_cpu, "impact")


def cached(bench: Bench) -> OffloadResult:
    """An MRS cache filled behind the CPU, which computes the misses."""
    warm = bench.resident(bench.slots)
    policy = OffloadPolicy(cache="mrs", slots=bench.room(bench.slots), warm=warm, on_miss="cpu")
    return _in_plain_loop(bench, policy, on_cpu, "fill")


def all_parts(bench: Bench, cache: str = "mrs", n_slots: int = 0) -> OffloadResult:
    """Hybrid schedule, dynamic cache of n_slots (0: no more than SHARE), prefetch."""
    warm = bench.resident(bench.slots)
    policy = OffloadPolicy(cache=cache, slots=bench.room(n_slots or bench.slots), warm=warm)
    return _in_plain_loop(bench, policy, bench.scheduler, "impact")


def to_gpu(bench: Bench) -> OffloadResult:
    """Every miss through an LRU cache to the GPU."""
    warm = bench.resident(bench.slots)
    policy = OffloadPolicy(cache="lru", slots=bench.room(bench.slots), warm=warm)
    return simulate(bench.work, bench.cost, policy)


def _in_plain_loop(
    bench: Bench, policy: OffloadPolicy, scheduler: Scheduler, ahead: str = ""
) -> OffloadResult:
    """`ahead`: "impact", "fill", or nothing is fetched ahead."""
    times = bench.cost.unit_times()
    held = Watched(hooks_for(bench.work, policy).cache, policy.pinned)
    dense_s = float((bench.cost.before_s + bench.cost.after_s).mean())
    impact = ImpactPrefetch(bench.work, bench.forecasts, held, times, dense_s, scheduler)
    made: Mapping[str, Prefetcher] = {"impact": impact, "fill": FillBehind(impact, held)}
    hooks = Hooks(held, lambda tokens, there: scheduler(tokens, there, times), made.get(ahead))
    known = no_predictions(bench.work).known_at(LAYERS_AHEAD if ahead == "impact" else 1)
    return run(bench.work, decide(bench.work, policy, hooks, known), bench.cost)


def benches(scored: Scored, seed: int) -> tuple[Bench, Bench]:
    """Decode with the released schedule and constants, and with the paper's at the box's prices."""
    trace = scored.trace
    replayed = trace.rows(slice(0, DECODE_TOKENS))
    passes = forward_passes(replayed)
    work = layer_steps(replayed, passes)
    cost = prices(load_model(MODEL), box(), work, FORM)
    fixed = by_constants(cost, CPU_SLOPE_MS[MODEL])
    popular = by_use(trace.rows(slice(DECODE_TOKENS, None)))
    known = forecasts(replayed, passes, work, seed)
    return Bench(work, fixed, known, popular, hss), Bench(work, cost, known, popular, paper_hss)


def by_use(trace: RoutingTrace) -> npt.NDArray[np.int64]:
    """int64[n_layers, n_experts]: experts from the most to the least chosen."""
    count = np.stack(
        [
            np.bincount(trace.topk[:, layer].ravel(), minlength=trace.n_experts)
            for layer in range(trace.n_layers)
        ]
    )
    return np.argsort(-count, axis=1, kind="stable").astype(np.int64)


def forecasts(
    trace: RoutingTrace, passes: ForwardPasses, work: LayerSteps, seed: int
) -> tuple[Forecast, ...]:
    """What the next three gates name; for a prompt all that any of its tokens does."""
    found = []
    for distance in range(1, LAYERS_AHEAD + 1):
        recall = np.full(trace.n_layers, DEFAULT_NEXT_GATE**distance)
        ranked = rank_ahead(trace, recall, seed + distance)
        most = trace.top_k if (passes.tokens == 1).all() else trace.n_experts
        names = named(ranked, passes, most, trace.top_k, unpredicted=distance)
        found.append(forecast(work, names.known_at(distance)))
    return tuple(found)


def prompt_bench(scored: Scored, index: int, seed: int) -> Bench:
    """One request of the trace as one prompt, at the box's prices; largest experts first."""
    trace = scored.trace
    mine = trace.request == np.unique(trace.request)[index]
    prompt = trace.rows(mine)
    passes = ForwardPasses(
        rows=np.arange(prompt.n_tokens, dtype=np.int64),
        start=np.array([0, prompt.n_tokens]),
        phase=np.array([PREFILL], np.int8),
        context=np.zeros(1),
        requests=np.ones(1, np.int32),
    )
    work = popular_first(layer_steps(prompt, passes))
    cost = prices(load_model(MODEL), box(), work, FORM)
    known = forecasts(prompt, passes, work, seed)
    return Bench(work, cost, known, by_use(trace.rows(~mine)), paper_hss)


def decode_parts(bench: Bench) -> dict[str, OffloadResult]:
    """The baseline (misses on the CPU), each part alone, and all of them."""
    return {
        "base": static(bench, on_cpu),
        "schedule": static(bench, bench.scheduler),
        "prefetch": prefetched(bench, bench.slots - AHEAD_SLOTS, AHEAD_SLOTS),
        "cache": cached(bench),
        "all": all_parts(bench),
    }


def prefill_parts(bench: Bench) -> dict[str, OffloadResult]:
    """The same for one prompt, whose passing copies have room of their own."""
    n_experts = bench.work.n_experts
    return {
        "base": static(bench, on_cpu),
        "schedule": static(bench, bench.scheduler),
        "prefetch": prefetched(bench, bench.slots, n_experts - bench.slots),
        "all": all_parts(bench, "lru", n_experts),
        "to the GPU": to_gpu(bench),
    }
