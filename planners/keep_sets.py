"""Which experts must stay: those a task needs, and those nothing may evict or squeeze.

A keep-set is the top n experts of every layer by a score of one kind of work (PreMoe, arXiv
2505.17639); the kind is recognised by the scores of the first MoE layer. Super experts (arXiv
2507.23279) are few, found by the peaks of their output, and are pinned whatever their score:
how often an expert is used does not say how much the model needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planners.errors import PlanError
from planners.residency_file import ResidencyFile
from traces.counting import expert_bytes, total_params
from traces.model import ModelSpec
from traces.routing import MISSING, ExpertCounts, RoutingTrace, require_tokens

Doubles = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

SUPER_QUANTILE, SUPER_SHARE_OF_MAX, SUPER_LAYERS_SHARE = 0.995, 0.1, 0.75


def selection_scores(trace: RoutingTrace | ExpertCounts, marked: int = 1) -> Doubles:
    """Mean router score of every expert over tokens, counted where it is among the best `marked`.

    The published score is the raw router logit. It is used where the trace carries full scores,
    else the gate weight, which orders the experts of one token the same way but weighs tokens
    by how sure the gate was.
    returns  float64[moe_layers, n_experts]
    raises   PlanError for a trace with neither, or marked outside 1..top_k
    source   TCESS, arXiv 2505.17639; the released code marks 1
    """
    trace = require_tokens(trace, "task scores")
    if not 1 <= marked <= trace.top_k:
        raise PlanError(f"marked={marked}, expected 1..{trace.top_k} experts a token")
    chosen, values = _best(trace, marked)
    chosen = np.where(chosen == MISSING, trace.n_experts, chosen)
    scores = np.empty((trace.n_layers, trace.n_experts))
    for layer in range(trace.n_layers):
        ids, worth = chosen[:, layer].ravel(), values[:, layer].ravel()
        scores[layer] = np.bincount(ids, worth, minlength=trace.n_experts + 1)[:-1]
    return scores / max(trace.n_tokens, 1)


def _best(trace: RoutingTrace, marked: int) -> tuple[Index, Doubles]:
    """Ids and scores of the best `marked` of each token, [tokens, moe_layers, marked]."""
    ids = trace.topk.astype(np.int64)
    if trace.scores is not None:
        values = np.take_along_axis(trace.scores, np.maximum(ids, 0), axis=2).astype(np.float64)
    elif trace.weights is not None:
        values = trace.weights.astype(np.float64)
    else:
        raise PlanError("task scores: the trace carries neither gate weights nor router scores")
    values = np.where(ids == MISSING, -np.inf, values)
    order = np.argsort(-values, axis=2, kind="stable")[:, :, :marked]
    best = np.take_along_axis(values, order, axis=2)
    return np.take_along_axis(ids, order, axis=2), np.where(np.isfinite(best), best, 0.0)


def keep_set(scores: Doubles, n: int, pinned: Flags | None = None) -> Index:
    """The n experts of every layer that stay, best first; pinned ones come before all others.

    scores   float64[moe_layers, n_experts], higher is better; of equals the lower id stays
    pinned   bool[moe_layers, n_experts], kept whatever their score
    returns  int64[moe_layers, n]
    raises   PlanError when n is not in 1..n_experts or a layer has more than n pinned
    source   PEP, arXiv 2505.17639
    """
    if scores.ndim != 2 or not 1 <= n <= scores.shape[1]:
        raise PlanError(f"n={n}, expected 1..n_experts of scores {scores.shape}")
    first = np.zeros(scores.shape, np.bool_) if pinned is None else pinned
    if first.shape != scores.shape:
        raise PlanError(f"pinned: shape {first.shape}, expected {scores.shape} as the scores")
    crowded = np.flatnonzero(first.sum(axis=1) > n)
    if len(crowded):
        layer = int(crowded[0])
        raise PlanError(f"layer {layer}: {int(first[layer].sum())} experts pinned, only {n} stay")
    return np.lexsort((-scores, ~first), axis=1)[:, :n].astype(np.int64)


def coverage(counts: ExpertCounts, kept: Index) -> Doubles:
    """Share of each layer's choices that fall on kept experts: float64[moe_layers].

    kept  int64[moe_layers, n]; nan for a layer that was never counted
    """
    total = counts.counts.sum(axis=1)
    inside = np.take_along_axis(counts.counts, kept, axis=1).sum(axis=1)
    share = np.full(len(total), np.nan)
    np.divide(inside, total, out=share, where=total > 0)
    return share


def kept_for_share(counts: ExpertCounts, scores: Doubles, share: float) -> int:
    """The least n whose keep-set covers `share` of all choices, over all layers together."""
    order = keep_set(scores, scores.shape[1])
    covered = np.take_along_axis(counts.counts, order, axis=1).sum(axis=0).cumsum()
    return int(np.searchsorted(covered, share * covered[-1] * (1 - 1e-12))) + 1


def nearest_task(query: Doubles, tasks: Sequence[Doubles]) -> int:
    """The task whose first-layer scores are nearest to the query's, by Euclidean distance.

    query, tasks  float64[n_experts] each, first row of `selection_scores`; of equals the earlier
    source        TAER, arXiv 2505.17639 (flat L2 search)
    """
    if not tasks:
        raise PlanError("tasks: none given, expected at least one")
    return int(np.argmin([float(((query - task) ** 2).sum()) for task in tasks]))


def kept_bytes(spec: ModelSpec, n: int, bits: float = 16) -> int:
    """Bytes of a model that keeps n routed experts a layer: the rest, and n / E of the experts."""
    if not 0 <= n <= spec.n_experts:
        raise PlanError(f"n={n}, expected 0..{spec.n_experts} experts of {spec.name}")
    experts = spec.n_moe_layers * spec.n_experts * spec.expert_params
    rest = (total_params(spec) - experts) * bits / 8
    return round(rest) + spec.n_moe_layers * n * expert_bytes(spec, bits)


def super_experts(peaks: Doubles) -> Flags:
    """Experts with extreme output peaks, to be pinned.

    peaks    float64[moe_layers, n_experts], largest magnitude of the down-projection's output
             over calibration tokens
    returns  bool, same shape: above the 99.5th percentile of all experts, above a tenth of the
             largest peak, and in the first three quarters of the layers
    source   arXiv 2507.23279 and its released detection code
    """
    if peaks.ndim != 2 or not peaks.size or not np.isfinite(peaks).all() or peaks.min() < 0:
        raise PlanError(f"peaks: {peaks.shape}, expected finite magnitudes [moe_layers, n_experts]")
    high = np.maximum(np.quantile(peaks, SUPER_QUANTILE), peaks.max() * SUPER_SHARE_OF_MAX)
    early = np.arange(len(peaks)) < SUPER_LAYERS_SHARE * len(peaks)
    found: Flags = (peaks > high) & early[:, None]
    return found


def require_pinned(plan: ResidencyFile, pinned: Flags, min_bits: float = 16) -> None:
    """Refuse a residency plan in which a pinned expert may leave the fastest tier or lose bits.

    pinned  bool[moe_layers, n_experts], layers as in plan.moe_layers
    raises  PlanError naming the layer, the expert, and what was expected
    """
    bits = np.array([row.expert_bits for row in plan.layers if row.kind == "moe"], np.float64)
    tiers = plan.expert_tiers()
    if pinned.shape != tiers.shape:
        raise PlanError(f"pinned: shape {pinned.shape}, expected {tiers.shape} as in the plan")
    wrong = pinned & ((tiers > 0) | (bits < min_bits))
    if wrong.any():
        row, expert = np.argwhere(wrong)[0].tolist()
        raise PlanError(
            f"layer {plan.moe_layers[row]}: pinned expert {expert} is in tier"
            f" {plan.tiers[tiers[row, expert]].name} at {bits[row, expert]:g} bits, expected"
            f" {plan.tiers[0].name} at {min_bits:g} or more"
        )
