"""Super Experts: a few experts with extreme outputs that must never be evicted or squeezed.

The detection rule is exact; the peaks of the paper's model were not captured, so it is tried on
peaks with three planted. What pinning costs is replayed: a cache of every layer's own slots, with
and without one slot taken by an expert that never leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.reproduce.claim import Claim
from moesim.reproduce.sources import Sources
from planners.keep_sets import SUPER_LAYERS_SHARE, super_experts
from traces.counting import expert_bytes
from traces.models import load_model
from traces.replay import replay, slots_for, stream_of
from traces.routing import MISSING, RoutingTrace
from traces.synth import stream, zipf_trace

NAME = "super-experts"
PAPER = "arXiv 2507.23279"

PINS = 3
RHO = 2.0  # slots of a layer over the experts of a token
PLACEMENTS = 16  # drawn, since captures do not say which experts are super
CAPTURES = ("gpt-oss-20b-decode", "mixtral-8x7b-mtbench", "deepseek-v2-lite-law")  # whole models
SYNTHETIC_TOKENS = 4000

Longs = npt.NDArray[np.int64]
Pin = tuple[int, int]  # column of the layer, expert


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """One LRU of `slots` experts a layer, some slots held by pinned experts.

    requests  int64[moe_layers, n_experts], how often each expert was asked for
    hits      int64[moe_layers], with no pins
    """

    trace: RoutingTrace
    slots: int
    requests: Longs
    hits: Longs

    def hit_rate(self, pins: tuple[Pin, ...] = ()) -> float:
        """Share of requests served when the pinned experts never leave their slots."""
        hits = self.hits.copy()
        for column in {column for column, _ in pins}:
            held = sorted({expert for layer, expert in pins if layer == column})
            hits[column] = self.requests[column, held].sum()
            hits[column] += _hits(self.trace, column, self.slots - len(held), held)
        return float(hits.sum() / self.requests.sum())


def layer_caches(trace: RoutingTrace, slots: int) -> LayerCaches:
    """The caches without pins, replayed once."""
    columns = range(trace.n_layers)
    requests = [
        np.bincount(_chosen(trace, column, []), minlength=trace.n_experts) for column in columns
    ]
    hits = [_hits(trace, column, slots, []) for column in columns]
    return LayerCaches(trace, slots, np.array(requests, np.int64), np.array(hits, np.int64))


def _hits(trace: RoutingTrace, column: int, slots: int, pinned: list[int]) -> int:
    """Hits of one layer's LRU on everything but the pinned experts, which are always there."""
    chosen = _chosen(trace, column, pinned)
    return replay(stream_of(chosen), slots).n_hits if slots > 0 and len(chosen) else 0


def _chosen(trace: RoutingTrace, column: int, without: list[int]) -> npt.NDArray[np.int32]:
    """Experts asked for at a layer, one request after the other, missing cells left out."""
    chosen = trace.topk[:, column].ravel().astype(np.int32)
    return chosen[~np.isin(chosen, [MISSING, *without])]


def pin_placements(trace: RoutingTrace, seed: int) -> list[tuple[Pin, ...]]:
    """Sets of PINS experts in different layers of the first three quarters, drawn at random."""
    rng = stream(seed, "super experts")
    early = max(PINS, int(SUPER_LAYERS_SHARE * trace.n_layers))
    return [
        tuple(
            (int(column), int(rng.integers(trace.n_experts)))
            for column in rng.choice(min(early, trace.n_layers), PINS, replace=False)
        )
        for _ in range(PLACEMENTS)
    ]


def planted_peaks(n_layers: int, n_experts: int, seed: int) -> tuple[npt.NDArray[np.float64], int]:
    """Peaks of ordinary experts (log-normal), three extreme ones early and one late.

    returns  float64[n_layers, n_experts], and how many the rule should find
    """
    rng = stream(seed, "peaks")
    peaks = rng.lognormal(0.0, 0.5, (n_layers, n_experts))
    peaks[np.arange(1, 1 + PINS), rng.integers(n_experts, size=PINS)] = 1000.0, 400.0, 150.0
    peaks[-1, int(rng.integers(n_experts))] = 800.0  # late: not one of them
    return peaks, PINS


def claims(sources: Sources) -> list[Claim]:
    """The rule, what the pins weigh, and what they do to the hit rate."""
    qwen = load_model("qwen3-30b-a3b")
    made = zipf_trace(
        SYNTHETIC_TOKENS, qwen.n_moe_layers, qwen.n_experts, qwen.top_k, 1.0, 0.5, sources.seed
    )
    traces = {f"{qwen.name} shape, Zipf 1, half reused": made}
    for stem in CAPTURES:
        captured = sources.captured(stem)
        if captured is not None:
            traces[stem] = captured
    found = [_rule(sources.seed), _weight()]
    for name, trace in traces.items():
        found += _cost(name, trace, sources.seed)
    return found


def _rule(seed: int) -> Claim:
    qwen = load_model("qwen3-30b-a3b")
    peaks, planted = planted_peaks(qwen.n_moe_layers, qwen.n_experts, seed)
    found = int(super_experts(peaks).sum())
    note = "three planted among log-normal peaks, a fourth in the last layer must not count"
    claim = f"super experts the rule finds among {peaks.size}"
    return Claim(NAME, claim, 3, found, planted, planted, "A", "code", note)


def _weight() -> Claim:
    qwen = load_model("qwen3-30b-a3b")
    experts = qwen.n_moe_layers * qwen.n_experts
    note = f"three of them are {PINS * expert_bytes(qwen) / 2**20:g} MiB at 16 bits"
    claim = "routed experts of Qwen3-30B-A3B, of which 3 are super"
    return Claim(NAME, claim, 6144, experts, 6144, 6144, "A", "identity", note)


def _cost(name: str, trace: RoutingTrace, seed: int) -> list[Claim]:
    """Change of the hit rate: the mean over placements, and the farthest from none."""
    caches = layer_caches(trace, slots_for(trace, RHO, "per_layer"))
    free = caches.hit_rate()
    change = [caches.hit_rate(pins) - free for pins in pin_placements(trace, seed)]
    note = (
        f"LRU of {caches.slots} of {trace.n_experts} slots in each of {trace.n_layers} layers,"
        f" {free:.1%} without pins; 3 pins are one in {caches.slots * trace.n_layers // PINS} slots"
        f" (256 in the paper's model); {PLACEMENTS} random placements, since which experts are"
        " super was not captured"
    )
    return [
        Claim(
            system=NAME,
            claim=f"{name}: hit rate change with 3 pins, {kind}",
            published=None,
            simulated=ours,
            low=-0.001,
            high=0.001,
            tier="C",
            convention="execution order, cold miss",
            note=note,
        )
        for kind, ours in (("mean", float(np.mean(change))), ("farthest", max(change, key=abs)))
    ]
