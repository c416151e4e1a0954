"""A gate applied too early, as a noisy ranking of all experts: what naming more of them gains.

`prefetch.oracle` replaces true experts by wrong ones, and its extra names are always wrong. Here an
expert that the prediction misses stands just below the ones it names, as it does for a gate fed
with the hidden state of a layer before: more names find it. Gate scores of a token are normal
variables, and the predicted ones correlate with the true ones (the hidden states of neighbouring
layers are nearly parallel: cosines of 0.84 to 0.93, Fate, arXiv 2502.12224). One number a layer,
the correlation, follows from the share of experts found; everything else follows from it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from moesim.errors import SimulationError
from moesim.policies.prefetch import Predictions
from traces.layer_steps import ForwardPasses
from traces.routing import RoutingTrace
from traces.synth import stream

Doubles = npt.NDArray[np.float64]
Ranking = npt.NDArray[np.int16]

_DRAWS = 4000  # tokens that a correlation's recall is measured on
_GRID = np.array(
    [
        *(0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99),
        *(0.994, 0.997, 0.999, 0.9997, 1.0),
    ]
)


@cache
def _recall_of_grid(n_experts: int, top_k: int) -> tuple[float, ...]:
    """Share of the top_k found among the top_k predicted, at every correlation of the grid."""
    rng = stream(0, "noisy gate")
    true = -np.sort(-rng.standard_normal((_DRAWS, n_experts)), axis=1)
    noise = rng.standard_normal(true.shape)
    found = []
    for correlation in _GRID.tolist():
        predicted = correlation * true + np.sqrt(1 - correlation**2) * noise
        best = np.argpartition(-predicted, top_k - 1, axis=1)[:, :top_k]
        found.append(float((best < top_k).mean()))
    return tuple(found)


def correlation_for(recall: Doubles, n_experts: int, top_k: int) -> Doubles:
    """Correlation of predicted with true scores at which top_k names find that share.

    recall   float64[any shape], 0..1; what blind chance finds, top_k / n_experts, or less gives 0
    raises   SimulationError for a recall outside 0..1
    """
    if not ((recall >= 0) & (recall <= 1)).all():
        raise SimulationError(f"recall={recall.min()}..{recall.max()}, expected within 0..1")
    if top_k == n_experts:
        return np.ones_like(recall)
    return np.asarray(np.interp(recall, _recall_of_grid(n_experts, top_k), _GRID))


def rank_ahead(trace: RoutingTrace, recall: Doubles, seed: int = 0) -> Ranking:
    """int16[tokens, layers, experts]: experts by predicted score, best first.

    The chosen experts have a token's highest scores, in the order of their gate weights (as given
    without); the others follow by popularity in the trace and chance.
    recall  float64[layers], share of a token's experts found among its top_k predicted ones
    raises  SimulationError for recall of another shape
    """
    if recall.shape != (trace.n_layers,):
        raise SimulationError(f"recall: shape {recall.shape}, expected ({trace.n_layers},) layers")
    tokens, n_layers, n_experts = trace.n_tokens, trace.n_layers, trace.n_experts
    rng = stream(seed, "gate ahead")
    correlation = correlation_for(recall, n_experts, trace.top_k)
    score = -np.sort(-rng.standard_normal((tokens, n_experts)), axis=1)
    ranked = np.empty((tokens, n_layers, n_experts), np.int16)
    for layer in range(n_layers):
        order = _true_order(trace, layer, rng)
        noise = rng.standard_normal(score.shape)
        predicted = correlation[layer] * score + np.sqrt(1 - correlation[layer] ** 2) * noise
        best = np.argsort(-predicted, axis=1)
        ranked[:, layer] = np.take_along_axis(order, best, axis=1)
    return ranked


def _true_order(trace: RoutingTrace, layer: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """int64[tokens, experts]: the experts from the highest gate score to the lowest."""
    chosen = trace.topk[:, layer].astype(np.int64)
    if (chosen < 0).any():
        raise SimulationError(
            f"a ranking needs every choice, but layer {trace.layers[layer]} of the trace misses"
            f" {int((chosen < 0).sum())}"
        )
    count = np.bincount(chosen.ravel(), minlength=trace.n_experts)
    score = np.log(count + 1.0) + rng.gumbel(size=(trace.n_tokens, trace.n_experts))
    top = 1e6 - np.arange(trace.top_k, dtype=np.float64)
    high = np.broadcast_to(top, chosen.shape)
    if trace.weights is not None:
        high = 1e6 + trace.weights[:, layer].astype(np.float64)
    np.put_along_axis(score, chosen, high, axis=1)
    return np.argsort(-score, axis=1)


def named(
    ranked: Ranking, passes: ForwardPasses, n_named: int, top_k: int, unpredicted: int = 1
) -> Predictions:
    """Experts expected at every layer-step of the passes.

    A pass of one token names its first n_named experts. A longer one names what the first top_k of
    any of its tokens name, the most often named first, n_named at most.
    unpredicted  first layers of a pass that nothing is known of (no layer before them)
    """
    n_layers = ranked.shape[1]
    if (passes.tokens == 1).all():
        best = ranked[passes.rows, unpredicted:, :n_named].astype(np.int32)
        sizes = np.full((passes.n_passes, n_layers), best.shape[2], np.int64)
        sizes[:, :unpredicted] = 0
        return Predictions(_starts(sizes.ravel()), best.ravel())
    expert: list[npt.NDArray[np.int32]] = []
    for p in range(passes.n_passes):
        rows = passes.rows[passes.start[p] : passes.start[p + 1]]
        names = n_named if len(rows) == 1 else top_k
        for layer in range(n_layers):
            of_layer = ranked[rows, layer, :names] if layer >= unpredicted else ranked[:0, 0]
            expert.append(_most_named(of_layer, len(rows))[:n_named])
    return Predictions(_starts(np.array([len(one) for one in expert])), np.concatenate(expert))


def _starts(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _most_named(best: Ranking, n_tokens: int) -> npt.NDArray[np.int32]:
    """Experts that occur, most frequent first, of equal ones the lower; one token's as ranked."""
    if n_tokens == 1:
        return best.ravel().astype(np.int32)
    expert, count = np.unique(best, return_counts=True)
    return expert[np.argsort(-count, kind="stable")].astype(np.int32)
