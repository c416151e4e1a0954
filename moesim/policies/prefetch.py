"""What is fetched ahead: predictions of the experts of a later layer, best first.

A prediction for layer-step t is known at the gate of layer-step t - distance. `oracle` knows the
true routing and errs at a given rate: "what if a predictor were this good". The others look only at
the past of the trace, so that `accuracy` measures them:

previous_token   the experts the same layer chose in the pass before
transitions      experts that followed those of the layer before, as counted so far (EdgeMoE)
popularity       the most used of the layer so far, older uses fading
activation_map   the stored request whose activations match this one's best (MoE-Infinity)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.policies import prefetch_kernels as kernels
from traces.errors import TraceError
from traces.layer_steps import ForwardPasses, LayerSteps
from traces.routing import RoutingTrace
from traces.synth import stream

Longs = npt.NDArray[np.int64]
Ints = npt.NDArray[np.int32]
Doubles = npt.NDArray[np.float64]

# Share of a layer's experts that the next layer's gate names from this layer's hidden state, on
# Mixtral's layers 1 to 31 (AdapMoE's src/dp.py); other models by their mean (handbook, section 4).
MIXTRAL_NEXT_GATE = (
    *(0.566, 0.721, 0.789, 0.866, 0.859, 0.830, 0.840, 0.849, 0.801, 0.898, 0.898, 0.893, 0.910),
    *(0.925, 0.881, 0.915, 0.939, 0.905, 0.879, 0.876, 0.893, 0.879, 0.876, 0.888, 0.884, 0.922),
    *(0.913, 0.886, 0.900, 0.903, 0.850),
)
NEXT_GATE_RECALL = {
    "qwen3-30b-a3b": 0.886,
    "deepseek-moe-16b": 0.84,
    "qwen1.5-moe-a2.7b": 0.84,
    "mixtral-8x7b": 0.866,
}
DEFAULT_NEXT_GATE = 0.85


@dataclass(frozen=True, slots=True)
class Predictions:
    """Experts expected at every layer-step, best first.

    start     int64[n_steps + 1], where each layer-step's predictions begin
    expert    int32[predicted], expert ids within the layer
    distance  layer-steps between the gate at which they are known and the predicted one
    """

    start: Longs
    expert: Ints
    distance: int = 1

    def __post_init__(self) -> None:
        if self.distance < 1:
            raise SimulationError(f"distance={self.distance}, expected at least 1 layer-step")

    def known_at(self, distance: int) -> Predictions:
        """The same predictions, known so many layer-steps ahead."""
        return replace(self, distance=distance)


class Prefetcher(Protocol):
    """A prefetcher of one's own: what to fetch at this gate, objects, best first."""

    def wanted(self, now: int, layer: int, objects: Sequence[int]) -> Sequence[int]:
        """Objects (layer * n_experts + expert) to fetch, given those the gate has just chosen."""


def no_predictions(work: LayerSteps) -> Predictions:
    """Nothing is fetched ahead."""
    return Predictions(np.zeros(work.n_steps + 1, np.int64), np.zeros(0, np.int32))


def next_gate_recall(model: str, n_layers: int) -> Doubles:
    """float64[n_layers]: share of experts the next layer's gate names, as published for the model.

    Mixtral has one figure a layer, whose layer 0 nobody predicts (0); others have one mean, or
    DEFAULT_NEXT_GATE where nothing is published. With other layer counts Mixtral's are stretched.
    """
    if model != "mixtral-8x7b":
        recall = np.full(n_layers, NEXT_GATE_RECALL.get(model, DEFAULT_NEXT_GATE))
    else:
        known = np.array(MIXTRAL_NEXT_GATE)
        recall = np.interp(np.linspace(0, 1, n_layers), np.linspace(0, 1, len(known)), known)
    recall[0] = 0.0
    return recall


def oracle(
    work: LayerSteps,
    recall: float | Doubles,
    extra: int = 0,
    seed: int = 0,
    near: Ints | None = None,
) -> Predictions:
    """The true experts, some of them replaced by near misses.

    recall  share of true experts that are named, one number or float64[n_layers]; the last ranks
            of a layer-step are missed more often, in proportion to their rank, since that is where
            gates differ
    extra   further names after the top_k ones; never a true one that was missed, so that recall
            stays as asked (`noisy_gate.py` ranks a whole layer instead)
    near    int32[n_steps, m], experts that nearly made it, best first (`runners_up`); None draws
            them by the layer's popularity
    raises  SimulationError for a recall outside 0..1
    """
    shares = np.broadcast_to(np.asarray(recall, np.float64), (work.n_layers,))
    if not ((shares >= 0) & (shares <= 1)).all():
        raise SimulationError(f"recall={shares.min()}..{shares.max()}, expected within 0..1")
    rng = stream(seed, "next-gate oracle")
    counts = np.bincount(work.objects(), minlength=work.n_objects).reshape(work.n_layers, -1)
    weight = (counts + 1.0) / (counts + 1.0).sum(axis=1, keepdims=True)
    missed = near if near is not None else np.zeros((0, 0), np.int32)
    start, expert = kernels.corrupt(
        work.start, work.expert, np.ascontiguousarray(shares), np.cumsum(weight, axis=1), missed,
        extra, rng,
    )  # fmt: skip
    return Predictions(start, expert)


def runners_up(trace: RoutingTrace, passes: ForwardPasses, n_more: int) -> Ints:
    """int32[n_steps, n_more]: experts ranked after the chosen ones by the captured router scores.

    Passes of one token; a layer-step of a longer pass takes its first token's.
    raises  TraceError when the trace carries no scores
    """
    if trace.scores is None:
        raise TraceError(
            "near misses by router score need scores, but the trace holds none; capture it with"
            " scores, or draw them by popularity"
        )
    if not 0 < n_more <= trace.n_experts - trace.top_k:
        raise TraceError(f"n_more={n_more}, expected 1..{trace.n_experts - trace.top_k}")
    scores = trace.scores[passes.rows[passes.start[:-1]]].astype(np.float32)
    first = trace.topk[passes.rows[passes.start[:-1]]].astype(np.int64)
    np.put_along_axis(scores, np.maximum(first, 0), -np.inf, axis=2)
    ranked = np.argsort(-scores, axis=2, kind="stable")[:, :, :n_more]
    return np.ascontiguousarray(ranked.reshape(-1, n_more).astype(np.int32))


def previous_token(work: LayerSteps) -> Predictions:
    """Experts of the same layer in the pass before; none in the first pass."""
    sizes = np.diff(work.start)
    of_before = np.concatenate([np.zeros(work.n_layers, np.int64), sizes[: -work.n_layers]])
    start = np.concatenate([[0], np.cumsum(of_before)]).astype(np.int64)
    return Predictions(start, work.expert[: start[-1]].copy())


def transitions(work: LayerSteps, n_named: int = 0, fade: float = 1.0) -> Predictions:
    """The n_named (top_k when 0) experts that most often followed those of the layer before.

    Counts are those of the passes before, so nothing of the future is used; a pass's first layer
    has nothing before it. `fade` below 1 lets old counts fade by that factor a pass.
    """
    named = n_named or work.top_k
    start, expert = kernels.follow(
        work.start, work.expert, work.n_layers, work.n_experts, named, fade
    )
    return Predictions(start, expert)


def popularity(work: LayerSteps, n_named: int, period: int = 60, fade: float = 0.5) -> Predictions:
    """The n_named most used experts of each layer so far, counted anew every `period` passes.

    The list is offered in the pass after a count only: between counts nothing moves.
    """
    if n_named < 1 or period < 1:
        raise SimulationError(f"n_named={n_named}, period={period}: expected >= 1")
    start, expert = kernels.popular(
        work.start, work.expert, (work.n_layers, work.n_experts), n_named, period, fade
    )
    return Predictions(start, expert)


def activation_map(
    work: LayerSteps, request: npt.NDArray[np.int32], n_named: int = 0, n_stored: int = 100
) -> Predictions:
    """Experts of the stored request whose activations so far resemble this one's most.

    request   int32[n_passes], the request of each pass (passes of one request)
    n_stored  requests kept; the least matched one leaves for a new one
    source    MoE-Infinity (arXiv 2401.14361): mean cosine over the layers of two sequences'
              expert activation matrices
    """
    named = n_named or work.top_k
    if request.shape != (work.passes.n_passes,):
        raise SimulationError(
            f"request: shape {request.shape}, expected ({work.passes.n_passes},) passes"
        )
    start, expert = kernels.match_requests(
        work.start, work.expert, (work.n_layers, work.n_experts), request, named, n_stored
    )
    return Predictions(start, expert)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How good predictions are, by layer; nan where nothing was asked or named.

    recall     float64[n_layers], asked experts that were named
    precision  float64[n_layers], named experts that were asked
    """

    recall: Doubles
    precision: Doubles


def accuracy(work: LayerSteps, predicted: Predictions) -> Accuracy:
    """Recall and precision of predictions against the routing that followed."""
    asked, named, both = kernels.overlap(
        work.start, work.expert, predicted.start, predicted.expert, work.n_layers, work.n_experts
    )
    nothing = np.full(work.n_layers, np.nan)
    return Accuracy(
        np.divide(both, asked, out=nothing.copy(), where=asked > 0),
        np.divide(both, named, out=nothing.copy(), where=named > 0),
    )
