"""What HybriMoE (`hybrimoe.py`) runs on: its box, its times, scored routing, and its two schedules.

The released code decides by constants in an unnamed unit: an expert on the GPU 0.5, a transfer
0.41791, on the CPU 0.79 for the first and a slope a token. A 4-bit expert of DeepSeek-V2-Lite in
0.41791 ms is 10.4 GB/s, what PCIe 3 carries, so the unit is read as a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from hwmodels.box import Box, load_box
from hwmodels.devices import load_device, load_link
from hwmodels.host_costs import host_bytes_per_s, host_efficiency
from moesim.offload.decisions import LOADED, ON_CPU, RESIDENT
from moesim.offload.prices import Prices
from moesim.policies.dispatch import UnitTimes
from moesim.policies.impact import ImpactPrefetch, Watched
from moesim.reproduce.sources import Sources
from traces.routing import DECODE, RoutingTrace
from traces.synth import stream

GPU_MS, MOVE_MS, CPU_START_MS = 0.5, 0.41791, 0.79
CPU_SLOPE_MS = MappingProxyType({"deepseek-v2-lite": 1.0, "mixtral-8x7b": 0.2, "qwen2": 0.8})
HOST_CORES, CORES_OF_SOCKET = 10, 24

# Of DeepSeek-V2-Lite's captured law texts: experts that the next token of a request chooses again,
# 29.0 %, and 13.1 % if tokens were independent; six gate weights add up to 0.39.
POPULARITY_SPREAD, PERSISTENCE = 0.36, 0.39

Scores = npt.NDArray[np.float32]


def unit_times(slope: float, most: int) -> UnitTimes:
    """The released code's constants, in its unit, for up to `most` tokens at an expert."""
    gpu = [0.0] + [GPU_MS] * most
    return UnitTimes(gpu, [slope * n for n in range(most + 1)], CPU_START_MS, MOVE_MS)


def by_constants(cost: Prices, slope: float) -> Prices:
    """The prices with the released code's constants for experts and copies, the rest as it is.

    The constants were measured with everything running, so nothing is shared on top of them.
    """
    times = unit_times(slope, len(cost.gpu_s) - 1)
    free = 1e18
    return replace(
        cost,
        gpu_s=1e-3 * np.array(times.gpu_s),
        gpu_fixed_s=0.0,
        cpu_s=1e-3 * np.array(times.cpu_s),
        cpu_fixed_s=1e-3 * times.cpu_start_s,
        cpu_bytes_per_s=free,
        box=replace(
            cost.box,
            copy_s=0.0,
            copy_bytes_per_s=cost.expert_bytes / (1e-3 * times.load_s),
            dram_bytes_per_s=free,
        ),
    )


def box() -> Box:
    """RTX A6000 beside a Xeon Gold 5220R of which 10 of 24 cores compute, over its PCIe 3."""
    one = load_box("rtx-a6000", efficiency=host_efficiency("ktransformers-0.2"))
    whole = load_device("xeon-gold-5220r")
    peaks = {name: rate * HOST_CORES / CORES_OF_SOCKET for name, rate in whole.flop_per_s.items()}
    host = replace(whole, flop_per_s=MappingProxyType(peaks))
    return replace(
        one,
        system=replace(one.system, host=host),
        host=host,
        host_bytes=host.memory_bytes,
        copy_bytes_per_s=load_link("pcie-3-x16").bytes_per_s,
        dram_bytes_per_s=host_bytes_per_s(host, one.efficiency),
    )


# --- routing ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scored:
    """A trace with gate weights, and all gate scores of it where they are known.

    scores  float32[tokens, layers, experts], softmax, None when only the chosen ones were captured
    """

    trace: RoutingTrace
    scores: Scores | None
    captured: bool
    origin: str


def routing(sources: Sources, stem: str) -> Scored:
    """A captured trace, its tokens taken for decode steps; made ones where it is not to be had."""
    trace = sources.captured(stem)
    if trace is None or trace.weights is None:
        return scored_trace(2000, 26, sources.seed)
    decode = np.full(trace.n_tokens, DECODE, np.int8)
    note = f"captured {stem}, prefill-like tokens run one by one; gate weights of the chosen only"
    return Scored(replace(trace, phase=decode), None, True, note)


def scored_trace(n_tokens: int, n_layers: int, seed: int) -> Scored:
    """Tokens whose 64 gate scores are all known, six of them chosen, in requests of 250.

    A score's logarithm is the expert's popularity plus a term that fades from token to token; the
    two constants give the repeats of DeepSeek-V2-Lite's captured tokens.
    """
    rng = stream(seed, "hybrimoe scores")
    n_experts, top_k, length = 64, 6, 250
    logit = rng.standard_normal((n_tokens, n_layers, n_experts), dtype=np.float32)
    for t in range(1, n_tokens):
        if t % length:
            logit[t] *= np.sqrt(1 - PERSISTENCE**2)
            logit[t] += PERSISTENCE * logit[t - 1]
    popular = POPULARITY_SPREAD * rng.standard_normal((n_layers, n_experts))
    score = np.exp(logit + popular.astype(np.float32))
    score /= score.sum(axis=2, keepdims=True)
    topk = np.argsort(-score, axis=2)[:, :, :top_k]
    token = np.arange(n_tokens, dtype=np.int32)
    trace = RoutingTrace(
        topk=topk.astype(np.int16),
        n_experts=n_experts,
        layers=tuple(range(n_layers)),
        request=token // length,
        position=token % length,
        phase=np.full(n_tokens, DECODE, np.int8),
        weights=np.take_along_axis(score, topk, axis=2).astype(np.float16),
        capture="generated with all gate scores",
    )
    return Scored(trace, score, False, "generated, persistent normal gate scores")


class RecentScores:
    """MRS over all gate scores: S <- decay * TopP(s) + (1 - decay) * S; the lowest leaves."""

    def __init__(self, scores: Scores, top_p: int, decay: float = 0.5) -> None:
        """`scores` float32[tokens, layers, experts] of one-token passes; top_p scores count."""
        self._scores, self._top_p, self._decay = scores, top_p, decay
        self._recent = np.zeros(scores.shape[1:])
        self._heard = -1

    def use(self, expert: int, now: int) -> None:
        """At the first expert of a layer-step its layer's scores are heard."""
        if now == self._heard:
            return
        self._heard = now
        token, layer = divmod(now, len(self._recent))
        score, recent = self._scores[token, layer], self._recent[layer]
        best = np.argpartition(-score, self._top_p - 1)[: self._top_p]
        recent *= 1.0 - self._decay
        recent[best] += self._decay * score[best]

    def insert(self, expert: int, now: int, ahead: bool) -> None:
        """A copy keeps the score it had."""

    def evict(self, expert: int) -> None:
        """Scores are kept for absent experts too."""

    def victim(self, candidates: Sequence[int], incoming: int, now: int) -> int:
        """Lowest score."""
        recent = self._recent.reshape(-1)
        return min(candidates, key=lambda expert: recent[expert])


# --- schedules ----------------------------------------------------------------------------------


def paper_hss(tokens: Sequence[int], there: Sequence[bool], times: UnitTimes) -> list[int]:
    """The paper's hybrid schedule: the best that its three priorities allow.

    The link moves missing experts, largest first; the CPU takes the missing ones that are left,
    smallest first, and then may take the smallest of those that are there; the GPU has the rest.
    How many are moved and how many taken makes max(T_cpu, T_gpu) least; of equal ones the fewest
    taken, then the fewest moved. The released code (`moesim/policies/dispatch.py`) goes through
    one queue from both ends and never does both.
    """
    largest = sorted(range(len(tokens)), key=lambda cell: (-tokens[cell], cell))
    missing = [cell for cell in largest if not there[cell]]
    ready = [cell for cell in largest if there[cell]]
    ends = _ends([tokens[cell] for cell in missing], [tokens[cell] for cell in ready], times)
    taken, moved = np.unravel_index(int(ends.argmin()), ends.shape)
    place = [RESIDENT] * len(tokens)
    for cell in missing[:moved]:
        place[cell] = LOADED
    for cell in missing[moved:] + ready[len(ready) - taken :]:
        place[cell] = ON_CPU
    return place


def _ends(missing: list[int], ready: list[int], times: UnitTimes) -> npt.NDArray[np.float64]:
    """float64[ready + 1, missing + 1]: makespan by how many are taken and how many are moved.

    missing, ready  token copies, largest first
    """
    on_gpu = _sums([times.gpu_s[n] for n in missing])
    # The i-th move ends after i loads; what the GPU has then done of the moves before counts back.
    arrived = np.arange(1, len(missing) + 1) * times.load_s - on_gpu[:-1]
    behind = np.maximum.accumulate(np.append(-np.inf, arrived))
    kept = _sums([times.gpu_s[n] for n in ready])[::-1]
    gpu_s = on_gpu + np.maximum(kept[:, None], behind)
    left = _sums([times.cpu_s[n] for n in reversed(missing)])[::-1]
    taken = _sums([times.cpu_s[n] for n in reversed(ready)])
    cpu_s = left + taken[:, None]
    cpu_s[cpu_s > 0] += times.cpu_start_s
    return np.asarray(np.maximum(gpu_s, cpu_s))


def _sums(seconds: list[float]) -> npt.NDArray[np.float64]:
    """float64[n + 1]: sums of the first 0, 1, ... n."""
    return np.cumsum([0.0, *seconds])


def on_cpu(tokens: Sequence[int], there: Sequence[bool], times: UnitTimes) -> list[int]:
    """Every missing expert on the CPU, as KTransformers and llama.cpp do."""
    return [RESIDENT if here else ON_CPU for here in there]


class FillBehind:
    """Copies what the running layer has just missed into its slots, while the link has time.

    A dynamic cache beside a CPU that computes the misses needs somebody to fill it.
    """

    def __init__(self, ahead: ImpactPrefetch, held: Watched) -> None:
        """`ahead` knows how many copies the link has time for, `held` what was missed."""
        self._ahead, self._held = ahead, held

    def wanted(self, now: int, layer: int, objects: Sequence[int]) -> list[int]:
        """Missed experts in the order of the gate."""
        missed = [expert for expert in objects if not self._held.was_there(expert)]
        return missed[: self._ahead.free_copies(now, objects)]
