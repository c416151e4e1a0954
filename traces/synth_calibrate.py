"""Measuring a trace, and correcting a generator until what it generates measures the same.

Rows are tokens in the order of their requests; arrays in, arrays out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from traces import synth_kernels as kernels
from traces.synth_kernels import Doubles, Flags, Floats, Ids, Index
from traces.synth_model import AGES_TOKENS, RoutingModel, age_buckets

Sampler = Callable[[RoutingModel, int], tuple[Ids, Flags]]

FAR_TOKENS = (32, 64, 128)  # how far back the size of the tilts is measured
LOG_LIMIT = 8.0  # one log weight stays within -8..8, so that float32 products stay finite
_LOG_FLOOR = -20.0  # of popularity: an expert that is never chosen
_RECENCY_LIMIT = 3.0
_PRIOR_TOKENS = 32.0  # tokens of average behaviour that a rare expert's chances are shrunk by
_FIRST_STEP, _STEP_ROUNDS = 0.7, 4.0  # full steps for about 5 rounds, then 4 / round
_MOMENTUM = 0.5  # of popularity and reuse, which answer weakly where an expert nearly always wins
_AVERAGED_SHARE = 1 / 3  # of the rounds, the last ones


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the calibration matches; all float64.

    share     [layers, experts], share of the layer's choices, sums to 1
    chosen    [layers, experts], chance that a token chooses the expert, sums to top_k
    reuse     [layers], overlap of consecutive tokens over independent draws; nan without any two
    kept      [layers, experts], chance that the token before had chosen the expert, given it is
    hazard    [layers, buckets of AGES_TOKENS], chance of an expert of that age to be chosen
    far       [layers], chance that the token FAR_TOKENS before had chosen it; nan without such
    together  [layers], sum of P_ij^2 / (x_i x_j) over pairs of one token's set; 0 for top-1
    pairs     [layers - 1, experts, experts], share of (i, j) at adjacent layers, sums to 1
    """

    share: Doubles
    chosen: Doubles
    reuse: Doubles
    kept: Doubles
    hazard: Doubles
    far: Doubles
    together: Doubles
    pairs: Doubles


def measure(topk: Ids, first: Flags, n_experts: int) -> Statistics:
    """Statistics of topk int16[tokens, layers, k], at least one token."""
    n_tokens, n_layers, top_k = topk.shape
    chosen, kept = np.zeros((2, n_layers, n_experts))
    aged, exposed = np.zeros((2, n_layers, len(AGES_TOKENS) + 1))
    far, compared = np.zeros((2, n_layers))
    together = np.zeros((n_layers, n_experts, n_experts))
    pairs = np.zeros((n_layers - 1, n_experts, n_experts))
    lags = np.array(FAR_TOKENS, dtype=np.int64)
    tallies = (chosen, kept, aged, exposed, far, compared, together, pairs)
    kernels.count_choices(topk, first, lags, age_buckets(), tallies)
    total = np.maximum(chosen.sum(axis=1, keepdims=True), 1)
    share, prior = chosen / total, _PRIOR_TOKENS
    independent = ((chosen / n_tokens) ** 2).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        reuse = kept.sum(axis=1) / np.count_nonzero(~first) / independent
        far_share = far / compared
    return Statistics(
        share=share,
        chosen=np.minimum(share * top_k, 1),
        reuse=reuse,
        kept=(kept + prior * kept.sum(axis=1, keepdims=True) / total) / (chosen + prior),
        hazard=(aged + prior * top_k / n_experts) / (exposed + prior),
        far=far_share,
        together=_mean_lift(together, share),
        pairs=pairs / np.maximum(pairs.sum(axis=(1, 2), keepdims=True), 1),
    )


def affinity(topk: Ids, cluster: Index, n_experts: int) -> Doubles:
    """float64[layers - 1], the statistic of `synth.affinity_ratio`; cluster int64[tokens]."""
    ratios = np.empty(topk.shape[1] - 1)
    for layer in range(len(ratios)):
        here = np.ascontiguousarray(topk[:, layer])
        there = np.ascontiguousarray(topk[:, layer + 1])
        pairs = np.zeros((n_experts, n_experts))
        kernels.count_pairs(here, there, pairs)
        ratios[layer] = np.nan
        if pairs.any():
            ratios[layer] = kernels.between_cluster_squares(here, there, cluster, pairs)
    return ratios


def without_counting_noise(pairs: Doubles, ratio: Doubles) -> Doubles:
    """Pair shares pulled towards independence until their sum of squares is the unbiased `ratio`.

    pairs  [layers - 1, experts, experts] as counted; ratio [layers - 1] of `affinity`, where nan
           leaves no dependence
    method sum x_i y_j (lift_ij - 1)^2 of counted pairs is too large by the counting noise; scaling
           every lift - 1 by the square root of the true part takes the excess out
    """
    independent = pairs.sum(axis=2)[:, :, None] * pairs.sum(axis=1)[:, None, :]
    lift = np.divide(pairs, independent, out=np.ones_like(pairs), where=independent > 0)
    counted = (independent * (lift - 1) ** 2).sum(axis=(1, 2))
    wanted = np.maximum(np.nan_to_num(ratio, nan=1.0) - 1, 0)
    scale = np.sqrt(np.minimum(wanted / np.maximum(counted, 1e-12), 1))
    return np.asarray(independent * (1 + scale[:, None, None] * (lift - 1)))


def calibrate(
    model: RoutingModel, target: Statistics, sample: Sampler, rounds: int
) -> RoutingModel:
    """The model after `rounds` of generating, measuring and correcting its log weights.

    sample  (model, round) -> topk int16[tokens, layers, k] and its first-token flags
    method  moment matching by stochastic approximation (Robbins and Monro 1951): a log weight
            moves by the log odds wanted less those generated, in steps that shrink; the last third
            of the rounds is averaged (Polyak and Juditsky 1992)
    """
    first_averaged = rounds - max(int(rounds * _AVERAGED_SHARE), 1)
    total: RoutingModel | None = None
    velocity = np.zeros((2, *target.share.shape))
    for round_ in range(rounds):
        topk, first = sample(model, round_)
        got = measure(topk, first, target.share.shape[1])
        step = min(_FIRST_STEP, _STEP_ROUNDS / (1 + round_))
        velocity = _MOMENTUM * velocity + step * np.stack(
            [_log_odds(target.chosen, got.chosen), _log_odds(target.kept, got.kept)]
        )
        model = _corrected(model, target, got, step, velocity)
        if round_ >= first_averaged:
            total = model if total is None else _sum(total, model)
    return model if total is None else _scaled(total, 1 / (rounds - first_averaged))


def pair_correction(wanted: Doubles, got: Doubles, chosen: Doubles) -> Doubles:
    """What to add to the affinity weights: log odds of j after i, wanted less generated.

    wanted, got  pair shares [layers - 1, experts, experts]; chosen [layers, experts]
    returns      [layers - 1, experts, experts]; a pair that is rare even at random moves little,
                 and what every i would add to the same j is left to j's popularity
    """
    floor = 0.02 * chosen[1:, None] + 1e-6
    odds = _log_odds(_conditional(wanted, chosen), _conditional(got, chosen), floor)
    common = (odds * got.sum(axis=2)[:, :, None]).sum(axis=1, keepdims=True)
    return np.asarray(odds - common)


def _corrected(
    model: RoutingModel, target: Statistics, got: Statistics, step: float, velocity: Doubles
) -> RoutingModel:
    top_k = float(target.chosen.sum(axis=1).max())
    # each of the k experts chosen one layer before adds its weight: a full step would overshoot
    pair_step = step * min(0.8, 1.6 / top_k)
    pair = model.affinity + pair_step * pair_correction(target.pairs, got.pairs, got.chosen)
    recency = model.recency + step * _log_odds(target.hazard, got.hazard)
    recency[:, 0] = 0  # the token before is what `reuse` is for
    recency[:, 1:] -= recency[:, -1:]
    tilt = model.tilt_basis * _gain(target.far, got.far, step)[:, None]
    types = model.types * _gain(target.together, got.together, step)[:, None]
    return replace(
        model,
        popularity=_within(model.popularity + velocity[0], _LOG_FLOOR, LOG_LIMIT),
        reuse=_within(model.reuse + velocity[1], -LOG_LIMIT, LOG_LIMIT),
        recency=_within(recency, -_RECENCY_LIMIT, _RECENCY_LIMIT),
        affinity=_within(pair, -LOG_LIMIT, LOG_LIMIT),
        types=_within(types, -LOG_LIMIT, LOG_LIMIT),
        tilt_basis=tilt.astype(np.float32),
    )


def _gain(wanted: Doubles, got: Doubles, step: float) -> Doubles:
    """[layers] factor of a tilt or type: two steps, since both statistics are squares of it."""
    known = np.isfinite(wanted) & np.isfinite(got) & (wanted > 0) & (got > 0)
    ratio = np.divide(wanted, got, out=np.ones_like(wanted), where=known)
    return np.asarray(np.exp(np.clip(2 * step * np.log(ratio), -0.5, 0.5)))


def _within(log_weight: Doubles | Floats, low: float, high: float) -> Floats:
    return np.asarray(np.clip(log_weight, low, high), dtype=np.float32)


def _conditional(pairs: Doubles, chosen: Doubles) -> Doubles:
    """Chance of j at the next layer for a token that chose i; j's own where i never occurs."""
    x = pairs.sum(axis=2, keepdims=True)
    k = chosen.sum(axis=1)[1:, None, None]
    own = np.zeros_like(pairs) + chosen[1:, None]
    return np.asarray(np.divide(k * pairs, x, out=own, where=x > 0))


def _log_odds(wanted: Doubles, got: Doubles, floor: Doubles | float = 1e-5) -> Doubles:
    chosen = np.log((wanted + floor) / (got + floor))
    other = np.log((np.maximum(1 - wanted, 0) + 1e-3) / (np.maximum(1 - got, 0) + 1e-3))
    return np.asarray(chosen - other)


def _mean_lift(together: Doubles, share: Doubles) -> Doubles:
    p = together / np.maximum(together.sum(axis=(1, 2), keepdims=True), 1)
    independent = share[:, :, None] * share[:, None, :]
    squares = np.divide(p**2, independent, out=np.zeros_like(p), where=independent > 0)
    return np.asarray(squares.sum(axis=(1, 2)))


def _sum(a: RoutingModel, b: RoutingModel) -> RoutingModel:
    return replace(a, **{n: getattr(a, n) + getattr(b, n) for n in _CALIBRATED})


def _scaled(a: RoutingModel, factor: float) -> RoutingModel:
    return replace(a, **{n: getattr(a, n) * np.float32(factor) for n in _CALIBRATED})


_CALIBRATED = ("popularity", "reuse", "recency", "affinity", "types", "tilt_basis")
